"""Every answer of a rollout, in a file a person or a program can read back: one JSON object per line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from xrl.config.printable import printable_json
from xrl.files.whole import write_whole
from xrl.types import Episode, FinishReason, Group

STATUS: Mapping[FinishReason, str] = {"stop": "completed", "length": "completed", "abort": "aborted", "error": "failed"}


def write_trajectory(
    path: Path,
    groups: Sequence[Group],
    *,
    rollout_id: int,
    advantages: Sequence[Sequence[float | None]] | None = None,
    metrics: Mapping[str, float] | None = None,
    task_name: str = "train",
) -> None:
    """Write a summary line, then a line per answer. The file appears whole or not at all.

    Args:
        path: where to; an existing file is replaced.
        groups: judged answers; their index is the `group_id`.
        rollout_id: number of the rollout.
        advantages: [groups][answers], None for an answer that is not trained on.
        metrics: more for the summary line, such as the rewards' mean.
        task_name: what the answers were for: "train", "eval", ...

    Raises:
        NotWritten: the disk is full, for example.
    """
    rows = [
        _summary(groups, rollout_id, task_name, metrics or {}),
        *_samples(groups, rollout_id, task_name, advantages),
    ]
    text = "".join(printable_json(json.dumps(row, ensure_ascii=False, allow_nan=False)) + "\n" for row in rows)
    # A lone surrogate in a response cannot be encoded; backslashreplace writes it as \udXXX, JSON's own escape.
    # Not flushed: a log is not worth the wait of each rollout for the disk.
    write_whole(path, text.encode(errors="backslashreplace"), flush=False)


def read_trajectory(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The summary and the answers of a trajectory file."""
    with path.open(encoding="utf-8") as file:
        summary, *samples = [json.loads(line) for line in file]
    return summary, samples


def _summary(groups: Sequence[Group], rollout_id: int, task_name: str, metrics: Mapping[str, float]) -> dict[str, Any]:
    episodes = [episode for group in groups for episode in group.episodes]
    return {
        "rollout_id": rollout_id,
        "task_name": task_name,
        "num_groups": len(groups),
        "num_samples": len(episodes),
        "num_tokens": sum(episode.num_tokens for episode in episodes),
        "weights_versions": sorted({turn.completion.weights_version for episode in episodes for turn in episode.turns}),
        **{name: _finite(value) for name, value in metrics.items()},
    }


def _samples(
    groups: Sequence[Group], rollout_id: int, task_name: str, advantages: Sequence[Sequence[float | None]] | None
) -> Iterator[dict[str, Any]]:
    for group_id, group in enumerate(groups):
        for index, episode in enumerate(group.episodes):
            yield {
                "rollout_id": rollout_id,
                "group_id": group_id,
                "task_name": task_name,
                **_answer(episode),
                "advantage": None if advantages is None else advantages[group_id][index],
            }


def _answer(episode: Episode) -> dict[str, Any]:
    prompt, completion, verdict = episode.prompt, episode.turns[-1].completion, episode.verdict
    return {
        "prompt_id": prompt.id,
        "data_source": prompt.data_source,
        "status": STATUS[completion.finish_reason],
        "finish_reason": completion.finish_reason,
        "error_msg": f"the judge failed: {verdict.error}" if verdict.failed else "",
        "prompt": prompt.text,
        "label": prompt.ground_truth,
        "response": episode.response,
        "reward": _finite(verdict.reward),
        "prompt_len": len(prompt.token_ids),
        "response_len": episode.num_tokens,
        "weights_version": completion.weights_version,
    }


def _finite(value: float | None) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if value is not None and math.isfinite(value) else None
