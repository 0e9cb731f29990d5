"""From one layout to another: which rows of which rank's parameters go where. Arithmetic, no processes, no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from xrl.parallel.layout import Place
from xrl.weights.plan import ParameterPlan, Plan, Slice


@dataclass(frozen=True, kw_only=True)
class Copy:
    """Rows that a rank of one layout has and a rank of another needs: the same rows of one Hugging Face tensor."""

    source: Place
    source_parameter: ParameterPlan
    source_slice: Slice
    target: Place
    target_parameter: ParameterPlan
    target_slice: Slice


def reshard(source: Plan, target: Plan, place: Place) -> Iterator[Copy]:
    """Everything that the rank at `place` of the target layout takes from ranks of the source layout.

    Rows that no copy covers are padding of the vocabulary: zero.

    Raises:
        ValueError: the plans are of different models.
    """
    if source.shape != target.shape:
        raise ValueError("weights can be resharded between layouts of one model only, got plans of two")
    for parameter in target.parameters(place):
        for piece in parameter.slices:
            for holder, held, held_slice in source.sources(piece.tensor):
                overlap = intersect(held_slice, piece)
                if overlap is not None:
                    yield Copy(
                        source=holder,
                        source_parameter=held,
                        source_slice=overlap[0],
                        target=place,
                        target_parameter=parameter,
                        target_slice=overlap[1],
                    )


def intersect(left: Slice, right: Slice) -> tuple[Slice, Slice] | None:
    """The rows of a tensor that two slices share, as a part of each; None where they share none."""
    start, stop = max(left.source, right.source), min(left.source_stop, right.source_stop)
    return (rows_of(left, start, stop), rows_of(right, start, stop)) if start < stop else None


def rows_of(piece: Slice, start: int, stop: int) -> Slice:
    """The part of a slice that is rows [start, stop) of its tensor.

    Raises:
        ValueError: the border cuts one of several blocks: no layout cuts a head.
    """
    skipped = start - piece.source
    if piece.count == 1:
        return replace(piece, source=start, target=piece.target + skipped, block=stop - start)
    if skipped % piece.block or (stop - start) % piece.block:
        raise ValueError(f"rows {start} to {stop} of {piece.tensor} cut a block of {piece.block} rows")
    return replace(
        piece,
        source=start,
        target=piece.target + skipped // piece.block * piece.stride,
        count=(stop - start) // piece.block,
    )
