"""Samples from rank 0 to every rank, as a few flat tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from xrl.types import Sample


def broadcast_samples(samples: Sequence[Sample] | None, group: ProcessGroup) -> list[Sample]:
    """Give every rank the samples that rank 0 holds; the others pass None.

    A prompt is sent once for all the samples that share it.
    """
    is_root = dist.get_rank(group) == 0
    if dist.get_world_size(group) == 1:
        assert samples is not None
        return list(samples)
    if is_root:
        assert samples is not None
        prompts = {sample.group_id: sample.prompt_ids for sample in samples}
        tables: list[Tensor] | None = [
            _ints([[group_id, len(ids)] for group_id, ids in prompts.items()], width=2),
            _ints([[sample.group_id, len(sample.response_ids)] for sample in samples], width=2),
            torch.tensor([sample.advantage for sample in samples], dtype=torch.float64),
            torch.tensor([token for ids in prompts.values() for token in ids], dtype=torch.long),
            torch.tensor([token for sample in samples for token in sample.response_ids], dtype=torch.long),
            torch.tensor([value for sample in samples for value in sample.rollout_logprobs], dtype=torch.float64),
        ]
    else:
        tables = None
    prompt_table, sample_table, advantages, prompt_tokens, response_tokens, logprobs = _broadcast(tables, group)
    prompt_parts = _split(prompt_tokens, prompt_table)
    prompt_ids = {int(group_id): part for (group_id, _), part in zip(prompt_table, prompt_parts, strict=True)}
    return [
        Sample(
            prompt_ids=prompt_ids[group_id],
            response_ids=response,
            rollout_logprobs=values,
            advantage=advantage,
            group_id=group_id,
        )
        for group_id, response, values, advantage in zip(
            sample_table[:, 0].tolist(),
            _split(response_tokens, sample_table),
            _split(logprobs, sample_table),
            advantages.tolist(),
            strict=True,
        )
    ]


def _ints(rows: list[list[int]], *, width: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.long).view(len(rows), width)


def _broadcast(tables: list[Tensor] | None, group: ProcessGroup) -> list[Tensor]:
    dtypes = [torch.long, torch.long, torch.float64, torch.long, torch.long, torch.float64]
    widths = [2, 2, 0, 0, 0, 0]
    lengths = torch.tensor([len(table) for table in tables] if tables else [0] * len(dtypes))
    dist.broadcast(lengths, group_src=0, group=group)
    received = []
    for place, (length, dtype, width) in enumerate(zip(lengths.tolist(), dtypes, widths, strict=True)):
        shape = (length, width) if width else (length,)
        table = tables[place] if tables else torch.empty(shape, dtype=dtype)
        if length:
            dist.broadcast(table, group_src=0, group=group)
        received.append(table)
    return received


def _split(values: Tensor, table: Tensor) -> list[list]:  # type: ignore[type-arg]
    flat = values.tolist()
    stops = table[:, 1].cumsum(0).tolist()
    return [flat[stop - length : stop] for stop, length in zip(stops, table[:, 1].tolist(), strict=True)]
