"""Rank arithmetic, and Megatron's own as the measure of it."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import pytest
from megatron.core.parallel_state import RankGenerator
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from xrl.parallel.layout import Layout


def test_every_place_of_the_grid_has_its_own_rank() -> None:
    layout = Layout.of_world(24, tensor_size=2, pipeline_size=3)
    assert layout.data_size == 4
    ranks = [
        layout.rank(tensor=tensor, pipeline=pipeline, data=data)
        for pipeline in range(3)
        for data in range(4)
        for tensor in range(2)
    ]
    assert ranks == list(range(24))
    assert str(layout) == "TP2 x PP3 x DP4"


def test_places_are_those_of_megatrons_groups() -> None:
    layout = Layout.of_world(48, tensor_size=2, context_size=2, pipeline_size=3, expert_size=4)
    assert str(layout) == "TP2 x PP3 x DP4 x EP4 x CP2"
    places = [layout.place(rank) for rank in range(48)]
    for rank, place in enumerate(places):
        assert rank == layout.rank(tensor=place.tensor, pipeline=place.pipeline, data=place.data, context=place.context)
    order = "tp-cp-ep-dp-pp"
    dense = RankGenerator(tp=2, ep=1, dp=4, pp=3, cp=2, order=order)
    sparse = RankGenerator(tp=2, ep=4, dp=2, pp=3, cp=1, order=order)
    for generator, token, field in (
        (dense, "tp", "tensor"),
        (dense, "cp", "context"),
        (dense, "dp", "data"),
        (dense, "pp", "pipeline"),
        (sparse, "ep", "expert"),
    ):
        for group in generator.get_ranks(token):
            assert [getattr(places[rank], field) for rank in group] == list(range(len(group)))


def test_stages_hold_consecutive_layers() -> None:
    layout = Layout.of_world(4, tensor_size=1, pipeline_size=4)
    assert [list(layout.layers(stage, 8)) for stage in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert layout.is_even(8)


def test_left_over_layers_go_to_the_middle_then_to_the_first_stage() -> None:
    layout = Layout(tensor_size=1, pipeline_size=4)
    sizes = [[len(chunk) for chunk in layout.chunks(num_layers)] for num_layers in (4, 5, 6, 7)]
    assert sizes == [[1, 1, 1, 1], [1, 2, 1, 1], [1, 2, 2, 1], [2, 2, 2, 1]]
    assert not layout.is_even(5)
    assert [len(chunk) for chunk in Layout(tensor_size=1, pipeline_size=2).chunks(5)] == [3, 2]
    assert layout.pipeline_layout(5) == [
        ["embedding", "decoder"],
        ["decoder", "decoder"],
        ["decoder"],
        ["decoder", "loss"],
    ]


@pytest.mark.parametrize("virtual", [1, 2])
@pytest.mark.parametrize(("first", "last"), [(None, None), (2, None), (None, 2), (2, 6)])
def test_even_and_given_stages_are_megatrons(virtual: int, first: int | None, last: int | None) -> None:
    for stages in (3, 4):  # megatron-core divides by zero where no stage is in between
        num_layers = 4 * (stages - sum(size is not None for size in (first, last))) + (first or 0) + (last or 0)
        layout = Layout(
            tensor_size=1,
            pipeline_size=stages,
            virtual_pipeline_size=virtual,
            first_stage_layers=first,
            last_stage_layers=last,
        )
        config = SimpleNamespace(
            num_layers=num_layers,
            pipeline_model_parallel_size=stages,
            virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
            num_layers_in_first_pipeline_stage=first,
            num_layers_in_last_pipeline_stage=last,
            pipeline_model_parallel_layout=None,
            account_for_embedding_in_pipeline_split=False,
            account_for_loss_in_pipeline_split=False,
        )
        for stage, chunk in product(range(stages), range(virtual)):
            layers = layout.layers(stage, num_layers, chunk)
            assert len(layers) == get_num_layers_to_build(config, chunk, stage)
            assert layers.start == get_transformer_layer_offset(config, chunk, stage)


@pytest.mark.parametrize(
    ("sizes", "num_layers", "message"),
    [
        ({"pipeline_size": 4}, 3, "3 layers are too few for 4 pipeline chunks"),
        (
            {"pipeline_size": 3, "first_stage_layers": 2},
            7,
            "7 layers with 2 in the first pipeline stage leave 5, which 2 other stages cannot share evenly",
        ),
        ({"pipeline_size": 2, "first_stage_layers": 2, "last_stage_layers": 3}, 6, "leave 1, which 0 other stages"),
        (
            {"pipeline_size": 2, "virtual_pipeline_size": 2, "first_stage_layers": 3},
            5,
            "a pipeline stage of 3 layers cannot be cut into 2 equal chunks",
        ),
    ],
)
def test_layers_that_do_not_fit_are_refused(sizes: dict[str, int], num_layers: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout(tensor_size=1, **sizes).chunks(num_layers)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor_size": 2, "pipeline_size": 2}, "world size 6 is not divisible by 2 x 2 = 4"),
        ({"tensor_size": 0, "pipeline_size": 1}, "tensor_size must be >= 1, got 0"),
        ({"tensor_size": 1, "pipeline_size": 1, "expert_size": 4}, "expert_size 4 does not divide the 1 x 6 ranks"),
        ({"tensor_size": 1, "pipeline_size": 1, "virtual_pipeline_size": 2}, "needs pipeline_size > 1"),
        ({"tensor_size": 1, "pipeline_size": 1, "last_stage_layers": 2}, "needs pipeline_size > 1"),
    ],
)
def test_world_that_the_layout_does_not_divide_is_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout.of_world(6, **sizes)
