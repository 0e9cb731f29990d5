"""How many arguments functions take: twelve in a row are a type that has not been written yet."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "xrl"
MOST_PARAMETERS = 11

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(source: str) -> Iterator[Function]:
    return (node for node in ast.walk(ast.parse(source)) if isinstance(node, Function))


def num_parameters(function: Function) -> int:
    """All that have a name, `self`, `*args` and `**kwargs` among them."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return len(named) + sum(each is not None for each in (arguments.vararg, arguments.kwarg))


def is_triton_kernel(function: Function) -> bool:
    """What Triton compiles takes pointers and numbers only: there is no type that could hold several."""
    decorators = (each.func if isinstance(each, ast.Call) else each for each in function.decorator_list)
    return any(ast.unparse(each) == "triton.jit" for each in decorators)


def too_long(source: str) -> list[str]:
    return [
        f"{function.name} takes {num_parameters(function)}, line {function.lineno}"
        for function in functions(source)
        if num_parameters(function) > MOST_PARAMETERS and not is_triton_kernel(function)
    ]


def test_no_function_takes_twelve_parameters_or_more() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 100
    found = {str(file.relative_to(PACKAGE)): too_long(file.read_text()) for file in files}
    assert not {name: each for name, each in found.items() if each}


TWELVE = ", ".join(f"a{index}" for index in range(12))


@pytest.mark.parametrize(
    ("source", "num_found"),
    [
        (f"def f({TWELVE}): ...", 1),
        (f"async def f(*, {TWELVE}): ...", 1),
        (f"class A:\n    def f(self, {TWELVE.removesuffix(', a11')}): ...", 1),
        (f"def f({TWELVE.removesuffix(', a11')}, **rest): ...", 1),
        (f"def f({TWELVE.removesuffix(', a11')}): ...", 0),
        (f"@triton.jit\ndef f({TWELVE}): ...", 0),
        (f"@triton.jit(do_not_specialize=['a0'])\ndef f({TWELVE}): ...", 0),
        (f"@torch.library.custom_op('xrl::f')\ndef f({TWELVE}): ...", 1),
    ],
)
def test_every_kind_of_parameter_counts_but_those_of_triton_kernels(source: str, num_found: int) -> None:
    assert len(too_long(source)) == num_found
