"""Episodes as rows to train on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from xrl.types import Completion, Episode, Sample, Turn

if TYPE_CHECKING:
    from xrl.types import BoolArray, FloatArray, IntArray


def samples_of(episode: Episode, *, advantage: float, group_id: int, episode_id: int) -> list[Sample]:
    """Make a row of each path from the prompt to a turn that no other continues.

    Every token that the model sampled is trained once, with the same advantage: a turn that several paths share is
    trained in the first of their rows, and context in the others. So a loss does not depend on how often an episode
    forked.

    Raises:
        ValueError: a turn does not have one log-prob a token, was drawn greedily or at another temperature than those
            of its row, or continues one that comes later.
    """
    for index, turn in enumerate(episode.turns):
        if turn.parent is not None and not 0 <= turn.parent < index:
            raise ValueError(f"turn {index} continues turn {turn.parent}, which does not come before it")
    parents = {turn.parent for turn in episode.turns}
    learned: set[int] = set()
    samples = []
    for leaf in range(len(episode.turns)):
        if leaf in parents:
            continue
        path = _path_to(leaf, episode.turns)
        pieces = [_piece_of(episode.turns[index], trained=index not in learned) for index in path]
        learned.update(path)
        samples.append(
            _row(episode.prompt.token_ids, pieces, advantage=advantage, group_id=group_id, episode_id=episode_id)
        )
    return samples


def sample_of(
    prompt_ids: Sequence[int],
    completion: Completion,
    *,
    advantage: float,
    group_id: int,
    episode_id: int,
    temperature: float,
) -> Sample:
    """Make a row of a prompt and its answer. Every token of the answer is trained, with the same advantage.

    Args:
        temperature: that the answer was drawn at.

    Raises:
        ValueError: the answer does not have one log-prob a token, or it was drawn greedily.
    """
    piece = _piece_of(Turn(completion=completion, text="", temperature=temperature))
    return _row(prompt_ids, [piece], advantage=advantage, group_id=group_id, episode_id=episode_id)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Piece:
    """A turn's context and completion, C + L tokens."""

    token_ids: IntArray
    trained: BoolArray
    logprobs: FloatArray  # 0 where not sampled
    versions: IntArray  # -1 where not sampled
    temperature: float


def _path_to(leaf: int, turns: Sequence[Turn]) -> list[int]:
    """Turns from the one that follows the prompt to `leaf`."""
    path = [leaf]
    while (parent := turns[path[-1]].parent) is not None:
        path.append(parent)
    return path[::-1]


def _piece_of(turn: Turn, *, trained: bool = True) -> _Piece:
    completion = turn.completion
    if not turn.temperature > 0:
        raise ValueError(
            f"an answer was drawn at temperature {turn.temperature:g}, where every token has probability 1 or 0: there "
            f"is nothing to learn from it, training needs a temperature > 0"
        )
    before, length = len(turn.context_ids), len(completion.token_ids)
    if len(completion.logprobs) != length:
        raise ValueError(
            f"an answer has {length} tokens and {len(completion.logprobs)} log-probs, the rollout engine must return "
            f"one for each"
        )
    parts = completion.parts or ((completion.weights_version, length),)
    versions = np.repeat([version for version, _ in parts], [count for _, count in parts])
    return _Piece(
        token_ids=np.concatenate([np.array(turn.context_ids, np.int32), completion.token_ids]),
        trained=np.repeat([False, trained], [before, length]),
        logprobs=np.concatenate([np.zeros(before, np.float32), completion.logprobs]),
        versions=np.concatenate([np.full(before, -1, np.int32), versions.astype(np.int32)]),
        temperature=turn.temperature,
    )


def _row(
    prompt_ids: Sequence[int], pieces: Sequence[_Piece], *, advantage: float, group_id: int, episode_id: int
) -> Sample:
    temperatures = sorted({piece.temperature for piece in pieces})
    if len(temperatures) > 1:
        raise ValueError(
            f"turns of one row were drawn at temperatures {temperatures[0]:g} and {temperatures[-1]:g}, "
            f"log-probs are of one"
        )
    before = len(prompt_ids)
    trained = np.concatenate([np.zeros(before, np.bool_), *(piece.trained for piece in pieces)])
    return Sample(
        token_ids=np.concatenate([np.array(prompt_ids, np.int32), *(piece.token_ids for piece in pieces)]),
        trained=trained,
        rollout_logprobs=np.concatenate([np.zeros(before, np.float32), *(piece.logprobs for piece in pieces)]),
        advantages=np.where(trained, np.float32(advantage), np.float32(0)),
        versions=np.concatenate([np.full(before, -1, np.int32), *(piece.versions for piece in pieces)]),
        prompt_length=before,
        group_id=group_id,
        episode_id=episode_id,
        temperature=temperatures[0],
    )
