"""Why a run learns nothing, in a sentence: what was seen, in numbers, and what to do."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from xrl.metrics.learning import Cause, Oddity, RolloutRecord
from xrl.metrics.pass_rate import passes
from xrl.metrics.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class LearningWords:
    """The sentences, with what they need to know of the run."""

    judge: str
    max_response_length: int
    ignore_eos: bool  # every answer is meant to run to its limit
    has_stop_tokens: bool
    trajectory: Callable[[int], Path]  # rollout -> the file of its answers

    def nothing_learned(self, idle: Sequence[RolloutRecord]) -> str:
        """What rollouts from which nothing was learned have in common: their most frequent cause."""
        cause, count = Counter(record.cause for record in idle).most_common(1)[0]
        assert cause is not None
        records = [record for record in idle if record.cause == cause]
        which = f"the last {len(idle)} rollouts" if len(idle) > 1 else f"rollout {records[-1].rollout_id}"
        if count < len(idle):
            which += f", {count} of them for this reason"
        return f"nothing was learned from {which}: {self._why(cause, records)}; {self._see(records[-1])}"

    def odd(self, oddity: Oddity, num_rollouts: int, record: RolloutRecord) -> str:
        """What is odd about rollouts from which something was learned all the same; the last of them is given."""
        what = f"every answer of the last {num_rollouts} rollouts"
        if oddity == "truncated":
            return f"{what} {self._cut_off()}; {self._see(record)}"
        return f"{what} was empty, though their rewards differ; {self._see(record)}"

    def _why(self, cause: Cause, records: Sequence[RolloutRecord]) -> str:
        num_updates = sum(record.num_updates for record in records)
        updates = "its only update" if num_updates == 1 else f"all {num_updates:,} updates"
        match cause:
            case "empty":
                return self._empty(records)
            case "too small":
                return _too_small(records)
            case "flat":
                return self._flat(records)
            case "lr":
                return (
                    f"the learning rate was 0 in {updates}: raise --lr, or --min-lr where the schedule has come to its "
                    f"end (--lr-decay-iters)"
                )
            case "gradient":
                return (
                    f"the gradient was exactly 0 in {updates}: every advantage is 0, or every token is out of the loss "
                    f"by its ratio or its importance weight (--clip-low, --clip-high, --importance-bound)"
                )
            case "unchanged":
                lr = max(record.lr for record in records)
                return (
                    f"not one weight changed in {updates}: lr {lr:g} is too small for their number format, raise --lr"
                )

    def _empty(self, records: Sequence[RolloutRecord]) -> str:
        value = common_reward(records)
        rewards = "" if value is None else f", with reward {value:g} from --judge {self.judge}"
        return (
            f"all {_num_answers(records):,} answers are empty{rewards}: there is no text in them but white space; is "
            f"--model a chat model, and does its chat template end where the assistant's answer begins?"
        )

    def _flat(self, records: Sequence[RolloutRecord]) -> str:
        is_cut = all(record.all_truncated for record in records) and not self.ignore_eos
        cut_off = f"; every answer {self._cut_off()}" if is_cut else ""
        if any(record.moved_weights for record in records):
            cut_off += "; weights change all the same, by the KL or the entropy term, weight decay or momentum alone"
        value = common_reward(records)
        if value is None:
            num_groups = sum(record.num_groups - record.num_too_small for record in records)
            return (
                f"in each of {num_groups:,} groups all answers got the same reward, though not in all groups the "
                f"same one: --judge {self.judge} looks at nothing but the prompt, or the model always answers a prompt "
                f"alike (raise --samples-per-prompt or --temperature){cut_off}"
            )
        if passes(value):
            why = (
                f"the model has nothing left to learn from these prompts, or --judge {self.judge} takes every answer "
                f"for right"
            )
        else:
            why = f"--judge {self.judge} gives all answers the same reward, or the model gets no prompt right"
        num_judged = _num_answers(records) - sum(record.num_failed for record in records)
        return f"every one of {num_judged:,} answers got reward {value:g}: {why}{cut_off}"

    def _cut_off(self) -> str:
        limit = f"was cut off at --max-response-length {self.max_response_length}"
        if self.has_stop_tokens:
            return f"{limit}: raise it"
        return f"{limit}, as no token ends an answer: name an eos_token_id in the model's generation_config.json"

    def _see(self, record: RolloutRecord) -> str:
        return f"see {self.trajectory(record.rollout_id)}"


def no_stop_token(model: Path) -> str:
    """Said at the start of a run whose answers cannot end."""
    return (
        f"no token ends an answer, so every answer runs to --max-response-length: neither generation_config.json, "
        f"config.json nor the tokenizer in {model} names an end-of-text token (eos_token_id); name one there, or say "
        f"--ignore-eos where this is meant"
    )


def what_is_left(folder: RunFolder, *, has_moved: bool) -> str:
    """Where a run is that ends as it learns nothing, and which weights it has saved.

    Args:
        has_moved: whether the weights are others than those of the start.
    """
    newest = folder.newest_checkpoint
    if newest is None:
        return f"run folder {folder.path}, without a checkpoint, as the weights are still those of the start"
    weights = "the weights that it came to are in" if has_moved else "the weights are still those of the start, also in"
    return f"run folder {folder.path}; {weights} {newest.name}"


def common_reward(records: Sequence[RolloutRecord]) -> float | None:
    """The reward that every answer got; None where they differ."""
    mean = records[-1].reward_mean
    if all(record.equal_rewards and math.isclose(record.reward_mean, mean, abs_tol=1e-9) for record in records):
        return mean
    return None


def _too_small(records: Sequence[RolloutRecord]) -> str:
    num_failed = sum(record.num_failed for record in records)
    return (
        f"no group had two answers left to compare, as {num_failed:,} of {_num_answers(records):,} answers failed: the "
        f"logs of the rollout workers and the judge's first failure above say why"
    )


def _num_answers(records: Sequence[RolloutRecord]) -> int:
    return sum(record.num_answers for record in records)
