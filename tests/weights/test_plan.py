"""Plans: Hugging Face -> Megatron -> Hugging Face, bit for bit, for every family at every layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.weights.shapes import SHAPES, layouts, load, places, random_tensors, reader, with_layers
from xrl.config import SettingsError
from xrl.parallel.layout import Layout, Place
from xrl.weights.export import share_of
from xrl.weights.families import TABLES
from xrl.weights.plan import plan
from xrl.weights.slices import in_parameter, in_tensor

SINGLE = Layout(tensor_size=1, pipeline_size=1)


def test_every_family_has_a_shape_here() -> None:
    assert {shape.architecture for shape in SHAPES.values()} == set(TABLES)


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
@pytest.mark.parametrize("family", SHAPES)
def test_round_trip_is_bitwise_at_every_layout(family: str, tied: bool) -> None:
    """One layer more than the chunks divide evenly; no parameter is left unfilled, no tensor unwritten."""
    for layout in layouts(SHAPES[family]):
        num_layers = layout.pipeline_size * layout.virtual_pipeline_size + 1
        shape = with_layers(SHAPES[family], num_layers, tied=tied)
        # transformer-engine's layers hold some of DeepSeek's matrices whole: those of tied models, here.
        planned = plan(shape, layout, transformer_engine=tied)
        source = random_tensors(shape)
        ranks = {place: load(planned, place, reader(source)) for place in places(planned)}
        for stages in ranks.values():
            for weights in stages:
                assert not any(tensor.isnan().any() for tensor in weights.values()), layout
        found = {name: torch.full_like(tensor, torch.nan) for name, tensor in source.items()}
        for part in planned.parts:
            for place in planned.holders(part):
                for piece, parameter in share_of(ranks[place], planned, place, part):
                    in_tensor(piece, found[piece.tensor]).copy_(in_parameter(piece, parameter))
        for name, tensor in source.items():
            assert torch.equal(found[name], tensor), f"{layout}: {name}"


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_no_two_ranks_write_the_same_rows(family: str) -> None:
    """Ranks of one host write into shared memory side by side."""
    shape = with_layers(SHAPES[family], 5, tied=True)
    layout = Layout(tensor_size=2, pipeline_size=2, expert_size=2, data_size=4, context_size=2)
    planned = plan(shape, layout)
    rows = {name: torch.zeros(tensor.shape) for name, tensor in random_tensors(shape).items()}
    for rank in range(layout.world_size):
        place = layout.place(rank)
        for part in planned.parts:
            if place not in planned.holders(part):
                continue
            for parameter in planned.part_parameters(part, place):
                for piece in parameter.slices if parameter.is_exported else ():
                    rows[piece.tensor].narrow(piece.dim, piece.source, piece.source_stop - piece.source).add_(1)
    assert all((count == 1).all() for count in rows.values())


def test_heads_are_grouped_by_key_head_on_each_rank() -> None:
    shape = replace(SHAPES["qwen2"], num_heads=8, num_kv_heads=4, head_dim=1, hidden_size=1)
    source = random_tensors(shape)
    prefix = "model.layers.0.self_attn."
    for kind, size in (("weight", (8, 1)), ("bias", (8,))):
        source[f"{prefix}q_proj.{kind}"] = torch.arange(8.0).view(size)
        for name, start in (("k", 100.0), ("v", 200.0)):
            source[f"{prefix}{name}_proj.{kind}"] = torch.arange(start, start + 4).view(4, *size[1:])
    planned = plan(shape, Layout(tensor_size=2, pipeline_size=1))
    for rank, expected in enumerate([[0, 1, 100, 200, 2, 3, 101, 201], [4, 5, 102, 202, 6, 7, 103, 203]]):
        [weights] = load(planned, Place(tensor=rank), reader(source))
        for kind in ("weight", "bias"):
            found = weights[f"decoder.layers.0.self_attention.linear_qkv.{kind}"]
            assert found.flatten().tolist() == expected


def test_parameters_are_made_of_the_right_slices() -> None:
    """Spelled out by hand, so that an error that loading and export share shows."""
    shape = with_layers(SHAPES["qwen3_moe"], 3, tied=True)
    source = random_tensors(shape)
    layout = Layout(tensor_size=2, pipeline_size=2, expert_size=2, data_size=2)
    planned = plan(shape, layout)
    place = Place(tensor=1, pipeline=1, data=1, expert=1)
    [weights] = load(planned, place, reader(source))
    hf = "model.layers.2."  # the second stage's only layer
    ours = "decoder.layers.0."
    o_proj, router = source[f"{hf}self_attn.o_proj.weight"], source[f"{hf}mlp.gate.weight"]
    gate, up, down = (source[f"{hf}mlp.experts.3.{name}_proj.weight"] for name in ("gate", "up", "down"))
    embedding = source["model.embed_tokens.weight"]
    expected = {
        f"{ours}self_attention.linear_proj.weight": o_proj[:, 8:],
        f"{ours}mlp.router.weight": router,
        f"{ours}mlp.experts.local_experts.1.linear_fc1.weight": torch.cat([gate[2:], up[2:]]),
        f"{ours}mlp.experts.local_experts.1.linear_fc2.weight": down[:, 2:],
        f"{ours}pre_mlp_layernorm.weight": source[f"{hf}post_attention_layernorm.weight"],
        "output_layer.weight": torch.cat([embedding[7:], torch.zeros(1, 8)]),
        "decoder.final_layernorm.weight": source["model.norm.weight"],
    }
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name
    assert {name for name in weights if "experts" in name} == {
        f"{ours}mlp.experts.local_experts.{local}.linear_fc{number}.weight" for local in (0, 1) for number in (1, 2)
    }


def test_tied_head_is_a_parameter_only_away_from_the_embedding() -> None:
    shape = with_layers(SHAPES["llama"], 4, tied=True)
    for pipeline, has_head in ((1, False), (2, True)):
        planned = plan(shape, Layout(tensor_size=1, pipeline_size=pipeline))
        names = [name for parameter in planned.parameters(Place(pipeline=pipeline - 1)) for name in parameter.names]
        assert ("output_layer.weight" in names) is has_head
        assert "lm_head.weight" not in planned.tensors("final")


def test_names_of_transformer_engine_are_planned_too() -> None:
    names = [parameter.names for parameter in plan(SHAPES["qwen3_moe"], SINGLE).parameters(Place())]
    prefix = "decoder.layers.1."
    for own, engine in (
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        ("mlp.experts.local_experts.3.linear_fc1.weight", "mlp.experts.linear_fc1.weight3"),
    ):
        assert (prefix + own, prefix + engine) in names
    dense = [parameter.names for parameter in plan(SHAPES["qwen2"], SINGLE).parameters(Place())]
    assert (f"{prefix}pre_mlp_layernorm.weight", f"{prefix}mlp.linear_fc1.layer_norm_weight") in dense


@pytest.mark.parametrize(
    ("family", "layout", "message"),
    [
        (
            "qwen2",
            {"tensor_size": 8, "pipeline_size": 1},
            "tensor-parallel size 8 does not divide the model's 4 key/value heads: these sizes would work: 1, 2, 4",
        ),
        ("llama", {"tensor_size": 3, "pipeline_size": 1}, "these sizes would work: 1, 2, 4"),
        ("deepseek_v3", {"tensor_size": 8, "pipeline_size": 1}, "sizes would work: 1, 2, 4"),
        ("llama", {"tensor_size": 1, "pipeline_size": 1, "expert_size": 2, "data_size": 2}, "this one has none"),
        (
            "qwen3_moe",
            {"tensor_size": 1, "pipeline_size": 1, "expert_size": 3, "data_size": 3},
            "expert-parallel size 3 does not divide the model's 4 experts",
        ),
        ("llama", {"tensor_size": 1, "pipeline_size": 8}, "4 layers are too few for 8 pipeline chunks"),
    ],
)
def test_layout_that_does_not_divide_the_model_is_refused(family: str, layout: dict[str, int], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        plan(SHAPES[family], Layout(**layout))


def test_unknown_architecture_is_refused_by_name() -> None:
    with pytest.raises(SettingsError, match="no mapping table for GPT2LMHeadModel, known are: Qwen2ForCausalLM"):
        plan(replace(SHAPES["llama"], architecture="GPT2LMHeadModel"), SINGLE)
