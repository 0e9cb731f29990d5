"""Calls of the losses with flat keyword arguments, which cases of a test change one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from xrl.kernels.head.token_inputs import TokenInputs

_NAMES = tuple(field.name for field in fields(TokenInputs))  # torch.compile does not see through `fields`


def call_loss(loss: Callable[..., Any], **arguments: Any) -> Any:
    """`loss` with the fields of `TokenInputs` among the arguments gathered in one."""
    tokens = TokenInputs(**{name: arguments.pop(name) for name in _NAMES if name in arguments})
    return loss(**arguments, tokens=tokens)
