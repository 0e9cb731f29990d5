"""`xrl train` with one step changed and a hook of one's own, on the demo's task.

    python examples/own_trainer.py
    torchrun --nproc-per-node 4 examples/own_trainer.py --config configs/demo_tp2pp2.yaml

Everything else is as in `xrl train`: checkpoints, evaluation, metrics, canary. Flags of it may follow.
"""

import sys
from dataclasses import replace

import xrl

MOST_TOKENS = 30  # the longest answers of the demo have 32


class ShortAnswers(xrl.Trainer):
    """Learns nothing from answers that come near the limit, right or wrong."""

    def take(self, step: int) -> xrl.Batch:
        batch = super().take(step)
        if batch.scored is None:  # not rank 0
            return batch
        kept = [sample for sample in batch.scored.samples if sample.trained.sum() <= MOST_TOKENS]
        return replace(batch, scored=replace(batch.scored, samples=kept))


def say(trainer: xrl.Trainer, step: int) -> None:
    """A hook: called on every rank after each step."""
    if step in (1, trainer.num_steps) and run.leads:
        print(f"step {step} of {trainer.num_steps}: the engines have weights version {trainer.version}")


settings = xrl.load_settings("--config", "configs/demo_single.yaml", "--num-rollouts", "20", *sys.argv[1:])
with xrl.Session(settings) as run:
    run.trainer(kind=ShortAnswers, hooks=[say]).train()
