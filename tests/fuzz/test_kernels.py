"""Every argument of every public kernel made wrong in turn: refused with a name, or computed as in plain PyTorch.

`make test-sanitized` runs the same under the address sanitizer, which sees what is read beyond a tensor's end.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.fuzz.conftest import Fuzz
from tests.fuzz.kernel_operations import OPERATIONS, Arguments, Operation
from xrl.kernels import matmul
from xrl.kernels.native import native_module

HUGE = 2**31 - 1
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.bool)
every_operation = pytest.mark.parametrize("name", OPERATIONS)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["compiled", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The compiled kernels, and then what runs where there are none."""
    if request.param == "compiled":
        yield
        return
    monkeypatch.setenv("XRL_KERNEL_BACKEND", "reference")
    remembered = (native_module, matmul._has_vectors)
    for each in remembered:
        each.cache_clear()
    yield
    monkeypatch.undo()
    for each in remembered:
        each.cache_clear()


def skip_without_products(name: str) -> None:
    """What PyTorch computes instead has second derivatives, and looks at the memory of one operation at a time."""
    if name in ("linear", "train_layer", "decode_layers") and not matmul.has_matmul(torch.ones(1, 1)):
        pytest.skip("no compiled products for this machine")


def copies(arguments: Arguments) -> Arguments:
    return {name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in arguments.items()}


def as_list(found: object) -> list[Tensor]:
    return [each.detach() for each in (found if isinstance(found, (list, tuple)) else [found])]


def must_refuse(operation: Operation, arguments: Arguments, changed: str, what: str) -> None:
    """The call fails with the name of an argument, and everything else is as it was."""
    before = copies({name: value for name, value in arguments.items() if name != changed})
    try:
        operation.call(**arguments)
    except (ValueError, TypeError) as error:
        names = "|".join([*arguments, "products", "heads", "query columns"])
        assert re.search(rf"\b({names})\b", str(error)), f"{changed} {what}: the refusal names nothing: {error}"
    else:
        pytest.fail(f"{changed} {what}: the call returned")
    for name, value in before.items():
        if isinstance(value, Tensor):
            assert torch.equal(arguments[name], value), f"{changed} {what}: {name} was written to"


def must_agree(operation: Operation, arguments: Arguments, changed: str, what: str) -> None:
    """The call gives what the reference does on plain copies, or is refused."""
    plain = {
        name: value.detach().resolve_neg().contiguous().clone() if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    try:
        found = as_list(operation.call(**arguments))
    except (ValueError, TypeError):
        return
    for left, right in zip(found, as_list(operation.reference(**plain)), strict=False):
        torch.testing.assert_close(
            left.double(), right.double(), rtol=2e-2, atol=2e-2, msg=lambda text: f"{changed} {what}: {text}"
        )


def other_lengths(tensor: Tensor, kinds: str, rng: random.Random) -> Iterator[tuple[str, Tensor, bool]]:
    """(what, the tensor longer or shorter in one dimension, whether that is wrong)."""
    for dim, kind in enumerate(kinds):
        size = tensor.shape[dim]
        step = rng.choice([1, 1, 2, size])
        yield f"shorter in dimension {dim}", tensor.narrow(dim, 0, max(0, size - step)).contiguous(), kind in "bl"
        longer = torch.cat([tensor, tensor.narrow(dim, 0, min(step, size))], dim=dim)
        yield f"longer in dimension {dim}", longer, kind == "b"


def other_kinds(tensor: Tensor) -> Iterator[tuple[str, object]]:
    """What is never right."""
    yield "without dimensions", torch.zeros((), dtype=tensor.dtype)
    yield "as a list", tensor.tolist()
    yield "as an array of numpy", tensor.numpy()
    yield "as a number", 3
    yield "as text", "x"
    if tensor.ndim == 2:
        yield "sparse", tensor.to_sparse()
    if tensor.is_floating_point():
        yield "of complex numbers", tensor.to(torch.complex64)
    else:
        yield "of floats", tensor.float()


def other_ranks(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "with one dimension more", tensor[None]
    if tensor.ndim > 1:
        yield "flat", tensor.flatten()


def other_layouts(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Right or refused: the same numbers elsewhere in memory."""
    wide = torch.zeros(*tensor.shape, 3, dtype=tensor.dtype)
    wide[..., 1] = tensor
    yield "a column of a matrix", wide[..., 1]
    if tensor.ndim > 1:
        yield "transposed in memory", tensor.mT.contiguous().mT
        yield "every second row", tensor.repeat_interleave(2, dim=0)[::2]
    yield "expanded", tensor[:1].expand_as(tensor)
    shifted = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    yield "not at a multiple of a vector", shifted.copy_(tensor)
    if tensor.is_floating_point():
        yield "with the sign turned over", torch._neg_view(-tensor)


@every_operation
def test_arguments_that_fit_give_what_the_reference_does(name: str, fuzz: Fuzz) -> None:
    operation = OPERATIONS[name]
    for seed in range(fuzz.num_cases(1)):
        torch.manual_seed(fuzz.seed + seed)
        arguments = operation.arguments()
        found, expected = as_list(operation.call(**copies(arguments))), as_list(operation.reference(**arguments))
        for left, right in zip(found, expected, strict=False):
            torch.testing.assert_close(left, right.to(left.dtype), rtol=1e-3, atol=1e-3)


@every_operation
@pytest.mark.usefixtures("way")
def test_tensors_that_do_not_fit_are_refused_by_name(name: str, fuzz: Fuzz) -> None:
    operation, rng = OPERATIONS[name], fuzz.random()
    for _ in range(fuzz.num_cases(1)):
        for tensor, kinds in operation.shapes.items():
            torch.manual_seed(rng.randrange(2**31))
            arguments = operation.arguments()
            given = arguments[tensor]
            for what, changed, is_wrong in other_lengths(given, kinds, rng):
                check = must_refuse if is_wrong else must_agree
                check(operation, copies(arguments) | {tensor: changed}, tensor, what)
            for what, value in other_kinds(given):
                must_refuse(operation, copies(arguments) | {tensor: value}, tensor, what)
            for what, changed in other_ranks(given):
                check = must_agree if tensor in operation.of_any_rank else must_refuse
                check(operation, copies(arguments) | {tensor: changed}, tensor, what)
            if len(operation.shapes) > 1:  # one alone may be anywhere
                must_refuse(operation, copies(arguments) | {tensor: given.to("meta")}, tensor, "on no device")
            if tensor not in operation.may_be_none:
                must_refuse(operation, copies(arguments) | {tensor: None}, tensor, "None")


@every_operation
def test_other_types_are_refused_by_name(name: str) -> None:
    operation = OPERATIONS[name]
    arguments = operation.arguments()
    for tensor in operation.shapes:
        given = arguments[tensor]
        for dtype in DTYPES:
            allowed = (given.dtype, *operation.dtypes.get(tensor, ()))
            # What all other tensors follow may be of another type alone.
            if dtype in allowed or (dtype.is_floating_point and len(operation.shapes) == 1):
                continue
            must_refuse(operation, copies(arguments) | {tensor: given.to(dtype)}, tensor, f"of {dtype}")


@every_operation
def test_tensors_laid_out_otherwise_are_right_or_refused(name: str) -> None:
    operation = OPERATIONS[name]
    torch.manual_seed(0)
    arguments = operation.arguments()
    for tensor in operation.shapes:
        for what, changed in other_layouts(arguments[tensor]):
            must_agree(operation, copies(arguments) | {tensor: changed}, tensor, what)


@every_operation
@pytest.mark.usefixtures("way")
def test_indices_that_lead_nowhere_are_refused_by_name(name: str, fuzz: Fuzz) -> None:
    operation, rng = OPERATIONS[name], fuzz.random()
    arguments = operation.arguments()
    for tensor in operation.indices:
        wrong = [HUGE, -2, -HUGE - 1, rng.randrange(100, HUGE), -rng.randrange(2, HUGE)]
        for value in wrong if tensor in operation.may_be_minus_1 else [-1, *wrong]:
            for place in range(arguments[tensor].shape[0]):
                changed = arguments[tensor].clone()
                changed.view(len(changed), -1)[place, 0] = value
                must_refuse(operation, copies(arguments) | {tensor: changed}, tensor, f"with {value} at {place}")


@every_operation
def test_numbers_that_are_none_are_refused_by_name(name: str) -> None:
    operation = OPERATIONS[name]
    arguments = operation.arguments()
    for number, value in arguments.items():
        if isinstance(value, (int, float)):
            wrong: list[object] = [float("nan"), float("inf"), 10**400, None, "1", [1], np.zeros(2)]
            wrong += [-1, -(2**70)] if number != "scale" else []
            wrong += [2**70, 1.0] if isinstance(value, int) else []
            for other in wrong:
                must_refuse(operation, arguments | {number: other}, number, f"of {type(other).__name__}")


@every_operation
def test_gradients_that_there_are_none_of_are_refused(name: str) -> None:
    operation = OPERATIONS[name]
    arguments = operation.arguments()
    for tensor in operation.shapes:
        if arguments[tensor].is_floating_point() and tensor not in operation.differentiable:
            changed = arguments[tensor].clone().requires_grad_()
            must_refuse(operation, copies(arguments) | {tensor: changed}, tensor, "with a gradient")
            with torch.no_grad():
                operation.call(**copies(arguments) | {tensor: changed.clone()})


@every_operation
def test_second_derivatives_are_refused(name: str) -> None:
    skip_without_products(name)
    operation = OPERATIONS[name]
    if not operation.differentiable:
        return
    arguments = copies(operation.arguments())
    leaf = arguments[operation.differentiable[0]].requires_grad_()
    out = operation.call(**arguments)
    assert isinstance(out, Tensor)
    (gradient,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.square().sum().backward()


@every_operation
@pytest.mark.parametrize("part", ["all", "half"])
def test_what_is_written_must_be_memory_of_its_own(name: str, part: str) -> None:
    skip_without_products(name)
    written = {
        "rope_cache": ["qkv", "key_cache", "value_cache"],
        "decode_layers": ["keys", "values"],
        "matmul_into": ["out"],
        "swiglu_into": ["out"],
        "swiglu_gradient_into": ["grad_x", "out"],
    }.get(name, [])
    allowed = {("grad_x", "x"), ("x", "grad_x"), ("out", "grad"), ("grad", "out"), ("out", "addend")}
    operation = OPERATIONS[name]
    for target in written:
        for other, kinds in operation.shapes.items():
            arguments = operation.arguments()
            into, of = arguments[target], arguments[other]
            if other == target or of.dtype != into.dtype or (len(kinds) != into.ndim and part == "half"):
                continue
            if part == "all" and (target, other) in allowed:
                continue
            room = torch.zeros(into.numel() + of.numel(), dtype=of.dtype)
            start = 0 if part == "all" else into.numel() // 2
            arguments[target] = room[: into.numel()].view(into.shape).copy_(into)
            arguments[other] = room[start : start + of.numel()].view(of.shape)
            must_refuse_quietly(operation.call, arguments, f"{target} over {other}")


def must_refuse_quietly(call: Callable[..., object], arguments: Arguments, what: str) -> None:
    with pytest.raises(ValueError, match="must not share memory with"):
        call(**arguments)
        pytest.fail(f"{what}: the call returned")
