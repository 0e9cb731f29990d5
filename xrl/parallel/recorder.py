"""Collectives that have begun and not ended, from torch's flight recorder: for the report of a hang.

The recorder notes every collective of every backend, gloo's too, in a ring in memory: 2 microseconds of a collective's
13 on one rank. Reading it takes milliseconds, and is done for a rank that gets nothing done.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from torch._C import _distributed_c10d
from torch.distributed import distributed_c10d

from xrl.launch.hang import Pending

# Collectives that are remembered. One that has not ended is the last of its group: torch's own 2,000 would only take
# longer to read.
BUFFER_SIZE = 500
VARIABLE, OLDER_VARIABLE = "TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"
# Torch ends a collective so much later than --distributed-timeout-minutes: until then the watch has ended the run, and
# said who waits for whom, which torch does not.
TORCH_GRACE_S = 90.0
# gloo and NCCL have a recorder each.
_DUMPS = ("_dump_fr_trace_json", "_dump_nccl_trace_json")
# torch names groups of which it was not told what they are for so.
_NO_PURPOSE = ("", "undefined")


def switch_on(environment: MutableMapping[str, str]) -> None:
    """Have collectives recorded; before the first group is made. Whoever has set the variable is left alone."""
    if OLDER_VARIABLE not in environment:
        environment.setdefault(VARIABLE, str(BUFFER_SIZE))


def pending_collectives() -> list[Pending]:
    """Of this process, the oldest first; none where torch records none."""
    found: list[Pending] = []
    groups = _ranks_of_groups()
    for name in _DUMPS:
        dump: Callable[..., str] | None = getattr(_distributed_c10d, name, None)
        if dump is not None:
            with contextlib.suppress(RuntimeError, ValueError, KeyError, TypeError):  # of another torch
                found += pending_in(json.loads(dump(True, True)), groups, now_s=time.time())
    return sorted(found, key=lambda pending: -pending.waited_s)


def pending_in(trace: Mapping[str, Any], groups: Mapping[str, str], *, now_s: float) -> list[Pending]:
    """The same, of what the recorder gives.

    Args:
        groups: ranks of those groups that all ranks have made, by their names.
        now_s: since 1970.

    Raises:
        ValueError, KeyError, TypeError: its form is another one.
    """
    found = [_pending(entry, groups, now_s) for entry in trace.get("entries", []) if _is_pending(entry)]
    return sorted(found, key=lambda pending: -pending.waited_s)


def overdue_s(pending: Pending, *, limit_s: float) -> float:
    """How long a collective of one of our groups has waited, where that is longer than it may; else 0.

    Args:
        limit_s: --distributed-timeout-minutes, in seconds.
    """
    # Groups of a rank and a rollout worker, and the control group, have time-outs of other kinds; megatron-core rounds
    # ours up to whole minutes.
    is_limited = limit_s < pending.timeout_s < limit_s + TORCH_GRACE_S + 61.0
    return pending.waited_s if is_limited and pending.ranks and pending.waited_s > limit_s else 0.0


def _ranks_of_groups() -> dict[str, str]:
    """Not of those between a rank and a rollout worker, of which torch keeps no list."""
    world = distributed_c10d._world
    return {name: str(sorted(world.pg_group_ranks.get(group, ()))) for group, name in world.pg_names.items()}


def _is_pending(entry: Mapping[str, Any]) -> bool:
    # gloo never tells that a collective has completed, only that it is done with it.
    return not entry["retired"] and entry["state"] != "completed"


def _pending(entry: Mapping[str, Any], groups: Mapping[str, str], now_s: float) -> Pending:
    name, purpose = entry["process_group"]
    return Pending(
        name=entry["profiling_name"],
        number=entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"],
        group=name if purpose in _NO_PURPOSE else f"{name} ({purpose})",
        is_message=entry["is_p2p"],
        ranks=groups.get(name, ""),
        shapes=tuple(tuple(shape) for shape in entry["input_sizes"]),
        dtypes=tuple(entry["input_dtypes"]),
        waited_s=now_s - entry["time_created_ns"] / 1e9,
        timeout_s=entry["timeout_ms"] / 1e3,
    )
