"""What the checksum of a layer notices, and what it must not depend on."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from xrl.weights import checksum
from xrl.weights.checksum import (
    ROW_BYTES,
    SummedTensor,
    SummingCopy,
    bucket_checksum,
    checksum_from_sums,
    joined_checksum,
    partial_checksum,
    take_bucket,
    tensor_checksum,
)

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
    found = {bucket_checksum({name: tensors[name] for name in names}) for names in itertools.permutations(tensors)}
    assert len(found) == 1


def test_checksum_may_be_computed_in_parts() -> None:
    tensors = layer()
    parts = [partial_checksum({name: tensor}) for name, tensor in tensors.items()]
    assert joined_checksum(reversed(parts)) == bucket_checksum(tensors)


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
    assert len({bucket_checksum(each) for each in (tensors, swapped, renamed, other_shape, other_dtype, missing)}) == 6


@pytest.mark.parametrize("num_bytes", [0, 1, 8, ROW_BYTES - 1, ROW_BYTES, 3 * ROW_BYTES + 5, 200 * ROW_BYTES + 17])
def test_accelerators_compute_the_same(num_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8)
    expected = tensor_checksum(tensor)
    monkeypatch.setattr(checksum, "native_module", lambda: None)
    monkeypatch.setattr(checksum, "_sums", checksum._device_sums)
    assert tensor_checksum(tensor) == expected


def test_a_view_has_the_checksum_of_its_copy() -> None:
    tensor = torch.randn(300, 200)
    assert tensor_checksum(tensor.T) == tensor_checksum(tensor.T.contiguous())
    assert tensor_checksum(torch.tensor(1.5)) == tensor_checksum(torch.tensor([1.5]))


NUM_BYTES = [0, 1, 8, 63, 64, 4864, ROW_BYTES - 1, ROW_BYTES, 3 * ROW_BYTES + 5, 200 * ROW_BYTES + 17]


@pytest.mark.parametrize("num_bytes", NUM_BYTES)
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_the_kernel_computes_the_same_and_copies(
    num_bytes: int, num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = torch.randint(0, 256, (num_bytes + 3,), dtype=torch.uint8)[3:]
    native = checksum.native_module()
    assert native is not None
    room = torch.zeros(num_bytes + 64, dtype=torch.uint8)
    address = tensor.data_ptr() if num_bytes else 0
    found = [native.tensor_checksum(address, num_bytes, 0, num_threads)]
    for start in (0, 1, 8):  # stores past the cache need an aligned place, others do not
        room.zero_()
        found.append(native.tensor_checksum(address, num_bytes, room.data_ptr() + start, num_threads))
        assert torch.equal(room[start : start + num_bytes], tensor)
        assert not room[:start].any() and not room[start + num_bytes :].any()
    monkeypatch.setattr(checksum, "native_module", lambda: None)
    assert set(found) == {int(tensor_checksum(tensor)[0])}


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_every_instruction_set_computes_the_same(isa: str) -> None:
    program = (
        "import torch; from xrl.weights.checksum import SummingCopy, SummedTensor, checksum_from_sums, tensor_checksum;"
        "t = (torch.arange(300 * 200) % 251).to(torch.uint8).view(300, 200); whole = torch.zeros_like(t);"
        "summed = SummedTensor.of('w', t.dtype, t.shape, start=0);"
        "sums = torch.zeros(summed.num_sums, dtype=torch.long);"
        "[SummingCopy(t[:, c], whole[:, c], whole, sums).run() for c in (slice(0, 72), slice(72, 200))];"
        "assert torch.equal(t, whole); print(int(tensor_checksum(t)[0]), checksum_from_sums([sums], [summed]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "XRL_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=True,
    )
    tensor = (torch.arange(300 * 200) % 251).to(torch.uint8).view(300, 200)
    expected = int(tensor_checksum(tensor)[0]), partial_checksum({"w": tensor}) % 2**64
    assert result.stdout.split() == [str(number) for number in expected]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "cuts",
    [
        [(slice(0, 3), slice(None)), (slice(3, 96), slice(None))],
        [(slice(None), slice(0, 64)), (slice(None), slice(64, 100))],
        [(slice(None), slice(0, 4)), (slice(None), slice(4, 100))],
        [(slice(start, start + 24), slice(None)) for start in range(0, 96, 24)],
    ],
    ids=["rows", "columns", "few columns", "heads"],
)
def test_sums_of_pieces_are_those_of_the_whole(cuts: list[tuple[slice, slice]], dtype: torch.dtype) -> None:
    source = torch.randn(96, 100).to(dtype)
    whole = torch.full_like(source, torch.nan)
    summed = SummedTensor.of("w", dtype, whole.shape, start=5)
    shares = [torch.zeros(5 + summed.num_sums, dtype=torch.long) for _ in range(2)]
    for number, cut in enumerate(cuts):
        # A parameter holds its rows apart, as where queries, keys and values take turns.
        parameter = torch.stack([source[cut], torch.zeros_like(source[cut])], dim=1)[:, 0]
        SummingCopy(parameter, whole[cut], whole, summed.in_share(shares[number % 2])).run()
    assert torch.equal(whole, source)
    assert joined_checksum([checksum_from_sums(shares, [summed])]) == bucket_checksum({"w": source})
    assert not any(share[:5].any() for share in shares)


def test_pieces_that_do_not_fit_are_refused() -> None:
    whole, sums = torch.zeros(6, 10), torch.zeros(2000, dtype=torch.long)
    with pytest.raises(ValueError, match="cannot be copied"):
        SummingCopy(torch.zeros(2, 10, dtype=torch.bfloat16), whole[:2], whole, sums)
    with pytest.raises(ValueError, match="multiples of 8 bytes"):
        SummingCopy(torch.zeros(6, 3), whole[:, :3], whole, sums).run()


def test_tensors_are_copied_to_their_destinations_where_they_fit() -> None:
    tensors = layer() | {"bias": torch.ones(3)}
    destinations = {
        "up.weight": torch.zeros_like(tensors["up.weight"]),
        "down.weight": torch.zeros(130, 100),  # another dtype
        "bias": torch.zeros(3, 2)[:, 0],  # not contiguous
        "other": torch.zeros(3),
    }
    found, taken = take_bucket(tensors, destinations)
    assert found == bucket_checksum(tensors)
    assert taken["up.weight"] is destinations["up.weight"]
    assert torch.equal(destinations["up.weight"], tensors["up.weight"])
    assert all(taken[name] is tensors[name] for name in ("norm.weight", "down.weight", "bias"))
    assert list(taken) == list(tensors)


@pytest.mark.gpu
def test_gpu_computes_the_same() -> None:
    tensors = layer() | {"big": torch.randn(5000, 1000)}
    assert bucket_checksum({name: tensor.cuda() for name, tensor in tensors.items()}) == bucket_checksum(tensors)
