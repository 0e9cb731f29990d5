"""The embedded engine: a batched decoder on CPU and CUDA, in this process, for every family but DeepSeek.

engine.py     the engine contract: requests in, futures out, a thread that steps
scheduler.py  who runs: requests waiting, samples running, blocks handed out and returned
batch.py      the arrays of one decode step
model.py      the forward pass: prefill and decode
mlp.py        its MLPs: gated ones, and mixtures of them
weights.py    Hugging Face tensors -> packed weights, a layer at a time
cache.py      the paged KV cache
sampler.py    tokens and log-probs from logits
"""
