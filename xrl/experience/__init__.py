"""From prompts to what the actor learns from: answers, verdicts, advantages.

asking.py      what rank 0 asks of the engines while the other ranks wait
collect.py     prompts to judged groups, as the answers come
partial.py     answers that were cut off, and go on in the next rollout
experience.py  a batch a step, the same on every rank
evaluate.py    pass rates on held-out prompts
turns.py       actor and engines on the same devices
"""
