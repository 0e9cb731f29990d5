"""Which rank writes which elements of which parameter: each element once, whatever ranks hold copies of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from xrl.parallel.layout import Place
from xrl.weights.plan import ParameterPlan, Plan

MAIN = "main"  # the weights at the precision that is trained
MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldParameter:
    """What a rank has of a parameter: elements [start, stop) of it, flattened."""

    name: str  # in the rank's GPTModel
    start: int
    stop: int
    tensors: Mapping[str, Tensor]  # MAIN, and after the first update MOMENTS: [stop - start] each
    is_shard: bool = False  # the other replicas have its other elements, not the same


def key(name: str, kind: str, start: int) -> str:
    """What a piece is called in a file."""
    return f"{name}/{kind}/{start}"


def writers(plan: Plan, place: Place) -> dict[str, bool]:
    """The parameters that the rank at `place` has to write, by their names in its model.

    Ranks that hold the same share the work, by bytes: true where this rank is the one that writes a parameter. Shards
    of a parameter are written by all who have one.
    """
    layout = plan.layout
    replicas = [
        layout.place(layout.rank(tensor=place.tensor, pipeline=place.pipeline, data=data, context=context))
        for data in range(layout.data_size)
        for context in range(layout.context_size)
    ]
    load: Counter[tuple[int, int, bool]] = Counter()
    found: dict[str, bool] = {}
    for parameter in plan.parameters(place):
        if not exported_at(plan, parameter, place):
            continue  # the first tensor rank writes it, or it is a copy
        dense = not parameter.is_expert
        holders = [(one.data, one.context, dense) for one in replicas if dense or one.expert == place.expert]
        writer = min(holders, key=load.__getitem__)  # the first of the least loaded: the same on all of them
        load[writer] += math.prod(parameter.shape)
        found |= dict.fromkeys(parameter.names, writer == (place.data, place.context, dense))
    return found


def pieces_to_write(held: Iterable[HeldParameter], writers: Mapping[str, bool]) -> dict[str, Tensor]:
    """The tensors of a rank's file by their names in it.

    Args:
        writers: of this rank.
    """
    return {
        key(one.name, kind, one.start): tensor
        for one in held
        if one.name in writers and (one.is_shard or writers[one.name])
        for kind, tensor in one.tensors.items()
    }


def exported_at(plan: Plan, parameter: ParameterPlan, place: Place) -> bool:
    """Whether a parameter is the one of those that hold the same at other tensor ranks, and no copy of another."""
    if parameter.is_expert or place.expert == 0:
        return parameter.is_exported
    first = plan.part_parameters(parameter.part, replace(place, expert=0))
    return any(other.names == parameter.names and other.is_exported for other in first)
