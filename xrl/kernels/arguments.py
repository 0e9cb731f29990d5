"""What a kernel may be given, checked at its border.

Kernels read addresses. A tensor that is shorter than told, of another type, on another device or laid out otherwise is
read as something else, or beyond its end. Each check here names the argument, what it must be and what it is.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Shape = Sequence[int | None]  # None: any length

_LARGEST = torch.finfo(torch.float32).max


def check_floats(name: str, tensor: object, shape: Shape | None = None) -> None:
    """Raise unless it is a tensor of floating point numbers.

    Args:
        shape: left out: anything with a last dimension.

    Raises:
        TypeError: it is no tensor.
        ValueError: a tensor of another shape or type.
    """
    if not isinstance(tensor, Tensor):
        raise _no_tensor(name, tensor)
    fits = tensor.ndim >= 1 if shape is None else _fits(tensor, shape)
    if not (fits and tensor.is_floating_point() and _is_plain(tensor)):
        wanted = "[..., *]" if shape is None else _words(shape)
        raise ValueError(f"{name} must be floating point {wanted}, got {_describe(tensor)}")


def check_tensor(name: str, tensor: object, shape: Shape, *, like: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raise unless it is a tensor of this shape on the device of `like`.

    Args:
        dtype: left out: that of `like`.

    Raises:
        TypeError: it is no tensor.
        ValueError: a tensor of another shape, type or device.
    """
    if not isinstance(tensor, Tensor):
        raise _no_tensor(name, tensor)
    dtype = like.dtype if dtype is None else dtype
    fits = tensor.shape == shape or _fits(tensor, shape)
    if not fits or tensor.dtype != dtype or tensor.device != like.device or not _is_plain(tensor):
        raise ValueError(f"{name} must be {dtype} {_words(shape)} on {like.device}, got {_describe(tensor)}")


def check_index(name: str, index: object, shape: Shape, *, device: torch.device) -> None:
    """Raise unless it is an int32 tensor of this shape on `device` with adjacent columns; rows may be further apart."""
    if not isinstance(index, Tensor):
        raise _no_tensor(name, index)
    fits = index.shape == shape or _fits(index, shape)
    is_index = fits and index.dtype == torch.int32 and index.device == device and _is_plain(index)
    if not is_index or (index.shape[-1] > 1 and index.stride(-1) != 1):
        wanted = f"int32 {_words(shape)} on {device} with adjacent columns"
        strides = f" with strides {list(index.stride())}" if is_index else ""
        raise ValueError(f"{name} must be {wanted}, got {_describe(index)}{strides}")


def check_range(name: str, index: Tensor, lowest: int, end: int) -> None:
    """Raises ValueError unless lowest <= index < end; on the CPU only, as elsewhere looking would wait for the device.

    For the plain PyTorch ways: kernels look themselves, see csrc/index_checks.h.
    """
    if not index.is_cpu or not index.numel():
        return
    least, most = (int(value) for value in index.aminmax())
    if least < lowest or most >= end:
        raise ValueError(f"{name} must be in [{lowest}, {end}), got {least if least < lowest else most}")


def check_apart(written: Mapping[str, Tensor], read: Mapping[str, Tensor | None]) -> None:
    """Raises ValueError where an element that is written stands for several, or for one of another tensor."""
    spans = {name: _span(tensor) for name, tensor in {**written, **read}.items() if tensor is not None}
    for name, tensor in written.items():
        if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
            raise ValueError(f"{name} is written and must have an element for each place, got an expanded tensor")
        start, end = spans[name]
        for other, (other_start, other_end) in spans.items():
            if other != name and start < other_end and other_start < end:
                raise ValueError(f"{name} is written and must not share memory with {other}")


def check_no_gradient(operation: str, **tensors: Tensor | None) -> None:
    """Raises ValueError where a gradient would be recorded: the operation has no backward pass for these tensors."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name} must need no gradient, as {operation} gives it none: pass it detached")


def check_number(name: str, value: object, *, lowest: float = -_LARGEST) -> None:
    """Raise unless it is a number that fp32 can hold, at least `lowest`.

    Raises:
        TypeError: it is no number.
        ValueError: it is another one.
    """
    if not isinstance(value, (float, int, numbers.Real)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    number: Any = value
    if not lowest <= number <= _LARGEST:
        bounds = f"finite and >= {lowest:g}" if lowest > -_LARGEST else "finite"
        raise ValueError(f"{name} must be {bounds}, got {value}")


def check_count(name: str, value: object, *, lowest: int = 1) -> None:
    """Raise unless it is a whole number in [lowest, 2^63). Errors as for `check_number`."""
    if not isinstance(value, (int, numbers.Integral)):
        raise TypeError(f"{name} must be a whole number, got {type(value).__name__}")
    number: Any = value
    if number < lowest:
        raise ValueError(f"{name} must be >= {lowest}, got {value}")
    if number >= 2**63:
        raise ValueError(f"{name} must be below 2^63, got {value}")


def check_instance(name: str, value: object, kind: type) -> None:
    """Raise TypeError unless it is of this type."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be of type {kind.__name__}, got {type(value).__name__}")


def address(tensor: Tensor | None) -> int:
    """Where a tensor's elements begin, as the compiled kernels take it; 0 for none.

    Raises:
        ValueError: its memory was given back, or is not aligned to its elements.
    """
    if tensor is None:
        return 0
    found = tensor.data_ptr()
    if found and not found & 7:  # as nearly always: aligned to the largest element
        return found
    if (found == 0 and tensor.numel()) or found % tensor.element_size():
        raise ValueError(f"{_describe(tensor)} has no memory, or memory that its elements are not aligned in")
    return found


def _no_tensor(name: str, value: object) -> TypeError:
    return TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def _fits(tensor: Tensor, shape: Shape) -> bool:
    if tensor.ndim != len(shape):
        return False
    for size, wanted in zip(tensor.shape, shape, strict=True):  # noqa: SIM110  (all() takes twice as long)
        if size != wanted and wanted is not None:
            return False
    return True


def _is_plain(tensor: Tensor) -> bool:
    # A view may say that its elements are those in memory with another sign.
    return tensor.layout is torch.strided and not tensor.is_neg()


def _span(tensor: Tensor) -> tuple[int, int]:
    """First byte and the one behind the last; of a tensor with gaps only of its first element, as between its elements
    there may be another's."""
    start = tensor.data_ptr()
    size = tensor.numel() if tensor.is_contiguous() else min(1, tensor.numel())
    return start, start + size * tensor.element_size()


def _words(shape: Shape) -> str:
    return f"[{', '.join('*' if size is None else str(size) for size in shape)}]"


def _describe(tensor: Tensor) -> str:
    kind = "" if tensor.layout == torch.strided else f" {tensor.layout}"
    kind += " with the sign turned over" if not kind and tensor.is_neg() else ""
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}{kind}"
