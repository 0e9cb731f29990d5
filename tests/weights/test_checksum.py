"""What the checksum of a layer notices, and what it must not depend on."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from xrl.weights import checksum
from xrl.weights.checksum import ROW_BYTES, joined_checksum, layer_checksum, partial_checksum, tensor_checksum

ROW_ELEMENTS = ROW_BYTES // 2  # of bf16


def layer() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "norm.weight": torch.ones(96, dtype=torch.bfloat16),
        "up.weight": torch.randn(130, 100, generator=generator).bfloat16(),
        "down.weight": torch.randn(130, 100, generator=generator).bfloat16(),
    }


def test_order_of_tensors_does_not_matter() -> None:
    tensors = layer()
    found = {layer_checksum({name: tensors[name] for name in names}) for names in itertools.permutations(tensors)}
    assert len(found) == 1


def test_checksum_may_be_computed_in_parts() -> None:
    tensors = layer()
    parts = [partial_checksum({name: tensor}) for name, tensor in tensors.items()]
    assert joined_checksum(reversed(parts)) == layer_checksum(tensors)


def test_every_flipped_bit_is_noticed() -> None:
    tensor = torch.randn(3, 7).bfloat16()
    seen = {int(tensor_checksum(tensor)[0])}
    for place in range(21):
        for bit in range(16):
            flipped = tensor.clone()
            flipped.view(torch.int16).view(-1)[place] ^= 1 << bit if bit < 15 else -(2**15)
            seen.add(int(tensor_checksum(flipped)[0]))
    assert len(seen) == 1 + 21 * 16


@pytest.mark.parametrize("distance", [1, 4, ROW_ELEMENTS, ROW_ELEMENTS + 4, 3 * ROW_ELEMENTS])
def test_numbers_of_opposite_sign_that_change_places_are_noticed(distance: int) -> None:
    # They differ in their highest bit alone: what a sum of products modulo 2^64 cannot tell apart.
    tensor = torch.ones(4 * ROW_ELEMENTS, dtype=torch.bfloat16)
    tensor[3] = -1
    swapped = torch.ones_like(tensor)
    swapped[3 + distance] = -1
    assert tensor_checksum(tensor) != tensor_checksum(swapped)


def test_rows_that_change_places_are_noticed() -> None:
    tensor = torch.randn(6, ROW_ELEMENTS).bfloat16()
    assert tensor_checksum(tensor) != tensor_checksum(tensor[[1, 0, 2, 3, 4, 5]])


def test_swapped_tensors_wrong_names_dtypes_and_shapes_are_noticed() -> None:
    tensors = layer()
    swapped = tensors | {"up.weight": tensors["down.weight"], "down.weight": tensors["up.weight"]}
    renamed = {name.replace("norm", "other_norm"): tensor for name, tensor in tensors.items()}
    other_shape = tensors | {"up.weight": tensors["up.weight"].view(100, 130)}
    other_dtype = tensors | {"norm.weight": tensors["norm.weight"].view(torch.int16)}
    missing = {name: tensors[name] for name in ("up.weight", "down.weight")}
    assert len({layer_checksum(each) for each in (tensors, swapped, renamed, other_shape, other_dtype, missing)}) == 6


@pytest.mark.parametrize("num_bytes", [0, 1, 8, ROW_BYTES - 1, ROW_BYTES, 3 * ROW_BYTES + 5, 200 * ROW_BYTES + 17])
def test_accelerators_compute_the_same(num_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8)
    expected = tensor_checksum(tensor)
    monkeypatch.setattr(checksum, "_sums", checksum._device_sums)
    assert tensor_checksum(tensor) == expected


def test_a_view_has_the_checksum_of_its_copy() -> None:
    tensor = torch.randn(300, 200)
    assert tensor_checksum(tensor.T) == tensor_checksum(tensor.T.contiguous())
    assert tensor_checksum(torch.tensor(1.5)) == tensor_checksum(torch.tensor([1.5]))


@pytest.mark.gpu
def test_gpu_computes_the_same() -> None:
    tensors = layer() | {"big": torch.randn(5000, 1000)}
    assert layer_checksum({name: tensor.cuda() for name, tensor in tensors.items()}) == layer_checksum(tensors)
