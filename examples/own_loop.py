"""GRPO in a loop of one's own, with a judge and an advantage of one's own, on the demo's task.

    python examples/own_loop.py
    torchrun --nproc-per-node 4 examples/own_loop.py --config configs/demo_tp2pp2.yaml

Flags of `xrl train` may follow. Every rank runs the same lines; rank 0 samples and judges.
"""

import json
import sys
from collections.abc import Sequence

import xrl


def judge(response: str, prompt: xrl.Prompt) -> float:
    """1 for the right number behind the last ####."""
    return float(response.rpartition("####")[2].strip() == prompt.ground_truth)


class LeaveOneOut(xrl.GRPO):
    def advantages(self, rewards: Sequence[float]) -> list[float]:
        """Each answer against the mean of the others (RLOO, arXiv:2402.14740)."""
        return [reward - (sum(rewards) - reward) / (len(rewards) - 1) for reward in rewards]


settings = xrl.load_settings("--config", "configs/demo_single.yaml", "--num-rollouts", "80", *sys.argv[1:])
with xrl.Session(settings, judge=judge, algorithm=LeaveOneOut(settings.algorithm)) as run:
    run.publish(version=run.first_step)
    before = run.evaluate()
    for step in range(run.first_step + 1, run.num_steps + 1):
        batch = run.take(step)
        run.actor.learn(batch.samples, run.algorithm)
        run.publish(version=step)
        if run.leads and step % 10 == 0:
            print(f"step {step}: reward {batch.metrics['reward/mean']:.3f}")
    after = run.evaluate()
    if run.leads:
        print(json.dumps({"steps": step, "before": before["eval/pass@1"], "after": after["eval/pass@1"]}))
