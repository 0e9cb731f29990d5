"""Whether a run learns anything, and if not: since when. Pure: a record a rollout in, sentences out.

Nothing is learned from a rollout if no update was made, if no group has two rewards that differ (then at most the KL or
the entropy term, weight decay or momentum change weights), or if every update had lr 0 or gradient 0 or left each of
the weights as it was. That is said after WARN_AFTER such rollouts in a row and ends the run after STOP_AFTER. What is
only odd (answers that are all cut off or all empty while weights do change) is said, and never ends a run.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

STOP_AFTER = 10
WARN_AFTER = 3

Cause = Literal["empty", "too small", "flat", "lr", "gradient", "unchanged"]
Oddity = Literal["truncated", "empty"]


@dataclass(frozen=True, kw_only=True)
class RolloutRecord:
    """What one rollout and its updates came to."""

    rollout_id: int
    num_answers: int
    num_failed: int  # of these: without a reward to compare
    num_empty: int  # of these: without text, but for white space
    truncated_fraction: float  # of the answers that did not fail; NaN where all did
    reward_mean: float  # of the same
    reward_std: float
    num_groups: int
    num_too_small: int  # of these: fewer than two answers left to compare
    num_flat: int  # of these: all its rewards are equal
    num_updates: int
    lr: float  # the highest of the updates; 0 without any
    grad_norm: float | None  # likewise; None where no norm is taken (gradients are not clipped)
    weights_changed: bool  # whether any weight has other bits than before

    @property
    def cause(self) -> Cause | None:
        """Why nothing was learned; None where something was."""
        if self.num_updates == 0 or self.num_too_small + self.num_flat == self.num_groups:
            if self.all_empty:
                return "empty"
            return "too small" if self.num_too_small == self.num_groups else "flat"
        if self.lr == 0:
            return "lr"
        if self.grad_norm == 0:
            return "gradient"
        return None if self.weights_changed else "unchanged"

    @property
    def moved_weights(self) -> bool:
        """Whether the updates changed weights, be it by weight decay or momentum where nothing was learned."""
        return self.num_updates > 0 and self.lr > 0 and self.weights_changed

    @property
    def all_empty(self) -> bool:
        """Whether no answer has any text."""
        return 0 < self.num_answers == self.num_empty

    @property
    def all_truncated(self) -> bool:
        """Whether every answer was cut off at its longest length."""
        return self.truncated_fraction == 1

    @property
    def equal_rewards(self) -> bool:
        """Whether all answers of the rollout got the same reward; the mean of equal floats may be off by a rounding."""
        return self.reward_std <= 1e-9 * max(1.0, abs(self.reward_mean))


def record_of(
    rollout_id: int, metrics: Mapping[str, float], *, lr: float, grad_norm: float | None, weights_changed: bool
) -> RolloutRecord:
    """The record of a rollout: from its row of metrics, and what that does not tell of its updates."""
    return RolloutRecord(
        rollout_id=rollout_id,
        num_answers=int(metrics.get("samples/total", 0)),
        num_failed=int(metrics.get("samples/failed", 0)),
        num_empty=int(metrics.get("samples/empty", 0)),
        truncated_fraction=metrics.get("truncated_fraction", math.nan),
        reward_mean=metrics.get("reward/mean", math.nan),
        reward_std=metrics.get("reward/std", math.nan),
        num_groups=int(metrics.get("groups/total", 0)),
        num_too_small=int(metrics.get("groups/too_small", 0)),
        num_flat=int(metrics.get("groups/flat", 0)),
        num_updates=int(metrics.get("updates", 0)),
        lr=lr,
        grad_norm=grad_norm,
        weights_changed=weights_changed,
    )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is to be said of the run's learning, and whether the run has failed by it."""

    sentence: str
    has_failed: bool


class Words(Protocol):
    """The sentences (learning_words.py)."""

    @property
    def ignore_eos(self) -> bool: ...

    def nothing_learned(self, idle: Sequence[RolloutRecord]) -> str: ...

    def odd(self, oddity: Oddity, num_rollouts: int, record: RolloutRecord) -> str: ...


class LearningWatch:
    """Counts rollouts from which nothing was learned, and says so in time."""

    def __init__(self, words: Words, *, stops: bool) -> None:
        """
        Args:
            stops: whether a run that learns nothing is to end, and to have failed.
        """
        self.has_moved = False  # whether the weights are others than those of the start
        self._has_learned = False  # from any rollout so far
        self._words = words
        self._stops = stops
        self._num_seen = 0
        self._num_idle = 0  # rollouts in a row, up to the newest, from which nothing was learned
        self._idle: list[RolloutRecord] = []  # the last STOP_AFTER of these
        self._odd: Counter[Oddity] = Counter()  # rollouts in a row, up to the newest

    def state_dict(self) -> dict[str, Any]:
        """What it has counted; NaN, which JSON does not have, is null."""
        return {
            "has_moved": self.has_moved,
            "has_learned": self._has_learned,
            "num_seen": self._num_seen,
            "num_idle": self._num_idle,
            "idle": [{name: _json(value) for name, value in asdict(record).items()} for record in self._idle],
            "odd": dict(self._odd),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting."""
        self.has_moved, self._has_learned = state["has_moved"], state["has_learned"]
        self._num_seen, self._num_idle = state["num_seen"], state["num_idle"]
        self._idle = [_record(said) for said in state["idle"]]
        self._odd = Counter(state["odd"])

    def see(self, record: RolloutRecord) -> list[str]:
        """Take in a rollout; returns the warnings that are due now."""
        self._num_seen += 1
        self.has_moved |= record.moved_weights
        if record.cause is None:
            self._has_learned = True
            self._num_idle, self._idle = 0, []
            return self._odd_ones(record)
        self._odd.clear()
        self._num_idle += 1
        self._idle = [*self._idle, record][-STOP_AFTER:]
        goes_on = not self._stops and self._num_idle % STOP_AFTER == 0
        return [self._words.nothing_learned(self._idle)] if self._num_idle == WARN_AFTER or goes_on else []

    @property
    def must_stop(self) -> str | None:
        """Why the run must end now; None if it may go on."""
        return self._words.nothing_learned(self._idle) if self._stops and self._num_idle >= STOP_AFTER else None

    def at_end(self) -> Verdict | None:
        """The verdict on a run that has made all its rollouts; None if it learned.

        A run of fewer than WARN_AFTER rollouts may have found nothing to learn by chance, and has not failed.
        """
        reason = self.must_stop
        if reason is not None:
            return Verdict(sentence=reason, has_failed=True)
        if self._has_learned or not self._idle:
            return None
        sentence = self._words.nothing_learned(self._idle)
        return Verdict(sentence=sentence, has_failed=self._stops and self._num_seen >= WARN_AFTER)

    def _odd_ones(self, record: RolloutRecord) -> list[str]:
        found: dict[Oddity, bool] = {
            "truncated": record.all_truncated and not self._words.ignore_eos,
            "empty": record.all_empty,
        }
        warnings = []
        for oddity, is_there in found.items():
            self._odd[oddity] = self._odd[oddity] + 1 if is_there else 0
            if self._odd[oddity] == WARN_AFTER:
                warnings.append(self._words.odd(oddity, WARN_AFTER, record))
        return warnings


def _record(said: Mapping[str, Any]) -> RolloutRecord:
    """What `state_dict` told of one."""
    nan = {name: math.nan for name in ("truncated_fraction", "reward_mean", "reward_std") if said[name] is None}
    return RolloutRecord(**{**said, **nan})


def _json(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value
