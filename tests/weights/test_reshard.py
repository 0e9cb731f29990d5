"""Weights go from one layout to another without a whole tensor in between."""

from __future__ import annotations

import pytest
import torch

from tests.weights.shapes import SHAPES, load, places, random_tensors, reader, with_layers
from xrl.parallel.layout import Layout
from xrl.weights.plan import plan
from xrl.weights.reshard import reshard, rows_of
from xrl.weights.slices import in_parameter

LAYOUTS = [
    Layout(tensor_size=1, pipeline_size=1),
    Layout(tensor_size=2, pipeline_size=4),
    Layout(tensor_size=4, pipeline_size=2, virtual_pipeline_size=2),
    Layout(tensor_size=2, pipeline_size=2, first_stage_layers=1, last_stage_layers=4),
]
WITH_EXPERTS = [
    Layout(tensor_size=2, pipeline_size=2, expert_size=4, data_size=4),
    Layout(tensor_size=1, pipeline_size=4, expert_size=2, data_size=1, context_size=2),
]


@pytest.mark.parametrize("family", SHAPES)
def test_copies_between_layouts_give_what_loading_gives(family: str) -> None:
    shape = with_layers(SHAPES[family], 5, tied=family == "qwen2")
    source = random_tensors(shape)
    layouts = LAYOUTS + (WITH_EXPERTS if shape.experts else [])
    # transformer-engine's layers hold some of DeepSeek's matrices whole, ours cut them: every second one is theirs.
    plans = [plan(shape, layout, transformer_engine=bool(number % 2)) for number, layout in enumerate(layouts)]
    loaded = [{place: load(planned, place, reader(source)) for place in places(planned)} for planned in plans]
    for old, old_ranks in zip(plans, loaded, strict=True):
        for new, new_ranks in zip(plans, loaded, strict=True):
            for place, expected in new_ranks.items():
                found = [{name: torch.zeros_like(tensor) for name, tensor in stage.items()} for stage in expected]
                for copy in reshard(old, new, place):
                    held, needed = copy.source_parameter, copy.target_parameter
                    tensor = old_ranks[copy.source][held.virtual_stage][held.names[0]]
                    into = found[needed.virtual_stage][needed.names[0]]
                    in_parameter(copy.target_slice, into).copy_(in_parameter(copy.source_slice, tensor))
                for stage, wanted in zip(found, expected, strict=True):
                    for name, tensor in wanted.items():
                        assert torch.equal(stage[name], tensor), f"{old.layout} -> {new.layout}: {name}"


def test_plans_of_two_models_are_refused() -> None:
    left, right = (plan(SHAPES[family], LAYOUTS[0]) for family in ("qwen2", "llama"))
    with pytest.raises(ValueError, match="of one model only"):
        next(reshard(left, right, LAYOUTS[0].place(0)))


def test_a_head_is_never_cut() -> None:
    [piece] = [
        piece
        for parameter in plan(SHAPES["qwen2"], LAYOUTS[0]).parameters(LAYOUTS[0].place(0))
        for piece in parameter.slices
        if piece.tensor == "model.layers.0.self_attn.q_proj.weight"
    ]
    assert (piece.block, piece.count) == (4, 4)
    with pytest.raises(ValueError, match="cut a block of 4 rows"):
        rows_of(piece, 2, 8)
