"""What the checks at the border of the kernels let through, and what they say of the rest."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from xrl.kernels.arguments import (
    address,
    check_apart,
    check_count,
    check_floats,
    check_index,
    check_no_gradient,
    check_number,
    check_range,
    check_tensor,
)

CPU = torch.device("cpu")


def test_a_sentence_says_what_was_needed_and_what_was_found() -> None:
    with pytest.raises(
        ValueError,
        match=r"^weight must be torch.float32 \[\*, 8\] on cpu, got torch.bfloat16 \[4, 8\] on cpu$",
    ):
        check_tensor("weight", torch.ones(4, 8).bfloat16(), (None, 8), like=torch.ones(1))
    with pytest.raises(TypeError, match=r"^x must be a tensor, got list$"):
        check_floats("x", [1.0])


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(3, 7),
        torch.ones(8),
        torch.ones(3, 8, dtype=torch.float64),
        torch.ones(3, 8, device="meta"),
        torch.ones(3, 8).to_sparse(),
        torch._neg_view(torch.ones(3, 8)),
    ],
    ids=["shape", "rank", "type", "device", "sparse", "negated"],
)
def test_another_tensor_than_the_one_needed_is_refused(tensor: Tensor) -> None:
    like = torch.ones(1)
    check_tensor("x", torch.ones(3, 8), (None, 8), like=like)
    with pytest.raises(ValueError, match="x must be"):
        check_tensor("x", tensor, (None, 8), like=like)


def test_tables_of_indices_may_have_rows_that_are_apart() -> None:
    table = torch.zeros(3, 8, dtype=torch.int32)
    check_index("blocks", table[:, :4], (3, None), device=CPU)
    with pytest.raises(ValueError, match=r"blocks must be int32 \[3, \*\] on cpu with adjacent columns"):
        check_index("blocks", table[:, ::2], (3, None), device=CPU)
    with pytest.raises(ValueError, match="blocks must be int32"):
        check_index("blocks", table.long(), (3, None), device=CPU)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 1e39, 10**400])
def test_numbers_that_fp32_cannot_hold_are_refused(value: float) -> None:
    check_number("eps", 1e-6, lowest=0.0)
    check_number("eps", 0, lowest=0.0)
    with pytest.raises(ValueError, match="eps must be finite and >= 0"):
        check_number("eps", value, lowest=0.0)


@pytest.mark.parametrize("value", [1.0, "1", None, torch.ones(2)])
def test_counts_are_whole_numbers(value: object) -> None:
    check_count("heads", 2**63 - 1)
    with pytest.raises(TypeError, match="heads must be a whole number"):
        check_count("heads", value)


def test_indices_out_of_range_are_named_with_the_worst() -> None:
    index = torch.tensor([4, -1, 9], dtype=torch.int32)
    check_range("slots", index, -1, 10)
    check_range("slots", index[:0], 0, 0)
    with pytest.raises(ValueError, match=r"slots must be in \[0, 10\), got -1"):
        check_range("slots", index, 0, 10)
    with pytest.raises(ValueError, match=r"slots must be in \[-1, 9\), got 9"):
        check_range("slots", index, -1, 9)


def test_what_is_written_lies_apart_from_what_is_read() -> None:
    room = torch.zeros(20)
    check_apart({"out": room[:10]}, {"x": room[10:], "bias": None})
    check_apart({"keys": room.view(10, 2)[:, 0], "values": room.view(10, 2)[:, 1]}, {})
    for name, other in {"the same": room[:10], "its end": room[9:]}.items():
        with pytest.raises(ValueError, match="out is written and must not share memory with x"):
            check_apart({"out": room[:10]}, {"x": other})
            pytest.fail(name)
    with pytest.raises(ValueError, match="out is written .* expanded"):
        check_apart({"out": torch.zeros(1).expand(4)}, {})


def test_a_gradient_that_there_will_be_none_of_is_refused_where_one_is_recorded() -> None:
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="x must need no gradient, as rms_norm gives it none"):
        check_no_gradient("rms_norm", y=None, x=x)
    with torch.no_grad():
        check_no_gradient("rms_norm", x=x)


def test_memory_that_was_given_back_has_no_address() -> None:
    tensor = torch.ones(4)
    assert address(tensor) == tensor.data_ptr()
    assert address(None) == 0
    tensor.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="has no memory"):
        address(tensor)


def test_elements_that_no_load_may_be_aligned_to_have_no_address() -> None:
    odd = torch.frombuffer(bytearray(17), dtype=torch.float32, count=4, offset=1)
    with pytest.raises(ValueError, match="aligned"):
        address(odd)
