"""The decoder's weights: what is refused, when a part counts as arrived, and what becomes of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.rollout.embedded.parts import CPU
from tests.weights.shapes import SHAPES, random_tensors
from xrl.models.shape import ModelShape
from xrl.rollout.embedded.mlp import Experts
from xrl.rollout.embedded.weights import EMBEDDING, DecoderWeights
from xrl.rollout.engine import WrongWeights
from xrl.weights.plan import part_names, tensor_shapes

SHAPE = SHAPES["qwen3"]
TIED = replace(SHAPE, tied_embeddings=True)


def parts(shape: ModelShape = SHAPE, *, dtype: torch.dtype = torch.float32) -> dict[str, dict[str, Tensor]]:
    tensors = random_tensors(shape, dtype)
    return {part: {name: tensors[name] for name in tensor_shapes(shape, part)} for part in part_names(shape)}


def weights(shape: ModelShape = SHAPE, dtype: torch.dtype = torch.float32) -> DecoderWeights:
    return DecoderWeights(shape, dtype, CPU)


def load(found: DecoderWeights, tensors: dict[str, dict[str, Tensor]], *, version: int = 0) -> None:
    """A whole update."""
    for each in tensors.values():
        found.load(each, version=version)
    found.finish()


def test_what_is_not_the_model_s_is_refused_by_name_and_source() -> None:
    found = weights()
    found.check(parts()["layers.1"], source="layers.1")
    with pytest.raises(WrongWeights, match=r"weight update, layers\.9: the model has no tensor 'model\.layers\.9\.x'"):
        found.check({"model.layers.9.x": torch.ones(1)}, source="layers.9")
    with pytest.raises(
        WrongWeights, match=r"weight update, final: model\.norm\.weight must be of size \[8\], got \[9\]"
    ):
        found.check({"model.norm.weight": torch.ones(9)}, source="final")


def test_of_a_tied_model_no_head_is_taken() -> None:
    with pytest.raises(WrongWeights, match=r"the model has no tensor 'lm_head\.weight'"):
        weights(TIED).check({"lm_head.weight": torch.ones(13, 8)}, source="final")


def test_a_part_is_in_use_with_its_last_tensor_whatever_the_others_are_at() -> None:
    found, tensors = weights(), parts()
    (first, *others) = tensors["layers.2"].items()
    found.load(dict(others), version=0)
    assert 2 not in found.layers
    found.load(dict([first]), version=0)
    assert list(found.layers) == [2]


def test_queries_keys_and_values_are_one_product() -> None:
    found, tensors = weights(SHAPES["qwen2"]), parts(SHAPES["qwen2"])
    load(found, tensors)
    x = torch.randn(3, SHAPE.hidden_size, generator=torch.Generator().manual_seed(1))
    layer = {name.removeprefix("model.layers.1.self_attn."): tensor for name, tensor in tensors["layers.1"].items()}
    expected = [x @ layer[f"{name}.weight"].t() + layer[f"{name}.bias"] for name in ("q_proj", "k_proj", "v_proj")]
    torch.testing.assert_close(found.layers[1].qkv(x), torch.cat(expected, dim=1), rtol=1e-5, atol=1e-5)
    assert found.layers[1].q_norm is None and found.layers[1].k_norm is None


@pytest.mark.parametrize("shape", [SHAPE, TIED], ids=["untied", "tied"])
def test_the_head_is_the_embeddings_where_they_are_tied(shape: ModelShape) -> None:
    found, tensors = weights(shape), parts(shape)
    load(found, tensors)
    x = torch.randn(3, SHAPE.hidden_size, generator=torch.Generator().manual_seed(1))
    matrix = tensors["embeddings"][EMBEDDING] if shape is TIED else tensors["final"]["lm_head.weight"]
    assert found.head is not None
    torch.testing.assert_close(found.head(x), x @ matrix.t(), rtol=1e-5, atol=1e-5)


def test_a_mixture_has_all_its_experts() -> None:
    shape = SHAPES["qwen3_moe"]
    found, tensors = weights(shape), parts(shape)
    load(found, tensors)
    mlp = found.layers[0].mlp
    assert isinstance(mlp, Experts) and shape.experts is not None
    assert len(mlp.experts) == shape.experts.num_experts
    assert torch.equal(mlp.router, tensors["layers.0"]["model.layers.0.mlp.gate.weight"])


def test_weights_come_to_the_engine_s_number_format_and_are_its_own() -> None:
    found, tensors = weights(dtype=torch.bfloat16), parts()
    load(found, tensors)
    assert {found.embedding.dtype, found.final_norm.dtype, found.layers[0].input_norm.dtype} == {torch.bfloat16}
    before = found.final_norm.clone()
    tensors["final"]["model.norm.weight"].fill_(7)
    assert torch.equal(found.final_norm, before)


def test_memory_of_a_part_that_comes_in_pieces_may_be_used_again() -> None:
    whole, pieces = weights(), weights()
    load(whole, parts())
    for tensors in parts().values():
        for name, tensor in tensors.items():
            pieces.load({name: tensor}, version=0)
            tensor.fill_(torch.nan)
    pieces.finish()
    assert torch.equal(pieces.embedding, whole.embedding)
    for index in range(SHAPE.num_layers):
        assert torch.equal(pieces.layers[index].mlp_norm, whole.layers[index].mlp_norm)
        x = torch.ones(2, SHAPE.hidden_size)
        assert torch.equal(pieces.layers[index].qkv(x), whole.layers[index].qkv(x))


def test_what_has_not_come_is_named_and_may_come_later() -> None:
    found, tensors = weights(), parts()
    name = "model.layers.3.self_attn.q_norm.weight"
    late = tensors["layers.3"].pop(name)
    for each in tensors.values():
        found.load(each, version=5)
    with pytest.raises(
        WrongWeights, match=r"weight update is incomplete: missing model\.layers\.3\.self_attn\.q_norm\."
    ):
        found.finish()
    found.load({name: late}, version=5)
    found.finish()


def test_of_much_that_is_missing_eight_are_named_and_the_rest_counted() -> None:
    found, tensors = weights(), parts()
    found.load(tensors["embeddings"], version=0)
    num_missing = sum(map(len, tensors.values())) - 1
    with pytest.raises(WrongWeights, match=f"and {num_missing - 8} more$") as caught:
        found.finish()
    assert str(caught.value).count("model.") == 8


def test_parts_of_an_update_that_was_given_up_count_for_no_other() -> None:
    found, tensors = weights(), parts()
    load(found, tensors, version=0)
    found.load(tensors["embeddings"], version=1)
    some = dict(list(tensors["layers.0"].items())[:2])
    found.load(some, version=1)
    for part, each in tensors.items():
        if part not in ("embeddings", "layers.0"):
            found.load(each, version=2)
    found.load({name: tensor for name, tensor in tensors["layers.0"].items() if name not in some}, version=2)
    with pytest.raises(WrongWeights) as caught:
        found.finish()
    assert all(name in str(caught.value) for name in (EMBEDDING, *some))


def test_a_finished_update_counts_for_no_other_of_the_same_version() -> None:
    found, tensors = weights(), parts()
    load(found, tensors)
    with pytest.raises(WrongWeights, match="incomplete"):
        found.finish()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_that_are_written_where_they_stay_are_not_copied(dtype: torch.dtype) -> None:
    found, tensors = weights(TIED, dtype), parts(TIED, dtype=dtype)
    assert found.destinations("layers.0") == found.destinations("final") == {}
    destinations = found.destinations("embeddings")
    assert list(destinations) == [EMBEDDING] and destinations[EMBEDDING].dtype == dtype
    destinations[EMBEDDING].copy_(tensors["embeddings"][EMBEDDING])
    load(found, {**tensors, "embeddings": destinations})
    assert found.embedding.data_ptr() == destinations[EMBEDDING].data_ptr()
    assert found.destinations("embeddings")[EMBEDDING].data_ptr() == found.embedding.data_ptr()
    # Those that come in memory of their own go elsewhere, as ever.
    load(found, tensors, version=1)
    assert found.embedding.data_ptr() != tensors["embeddings"][EMBEDDING].data_ptr()


def test_on_the_cpu_there_is_nothing_to_move_away() -> None:
    found = weights()
    load(found, parts())
    before = found.embedding.data_ptr(), found.layers[0].input_norm.data_ptr()
    found.offload()
    found.restore()
    assert (found.embedding.data_ptr(), found.layers[0].input_norm.data_ptr()) == before


def test_cleared_weights_hold_nothing() -> None:
    found = weights()
    load(found, parts())
    found.load(parts()["final"], version=1)
    found.clear()
    assert (found.embedding.numel(), found.final_norm.numel(), found.head, found.layers) == (0, 0, None, {})
    with pytest.raises(WrongWeights, match=r"lm_head|and \d+ more"):
        found.finish()
