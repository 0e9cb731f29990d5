"""Tests mirror the house: each module of the rooms that a step goes through has a test file of its name."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("experience", "actor", "rollout")


def without_mirror(package: Path, tests: Path) -> list[str]:
    """Modules, by their path in the package, without tests in the file that mirrors them."""
    modules = (file.relative_to(package) for file in sorted(package.rglob("*.py")) if file.name != "__init__.py")
    return [str(module) for module in modules if not has_tests(tests / module.with_name(f"test_{module.name}"))]


def has_tests(file: Path) -> bool:
    if not file.is_file():
        return False
    functions = (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef))
    return any(function.name.startswith("test_") for function in functions)


@pytest.mark.parametrize("room", ROOMS)
def test_every_module_has_its_mirror(room: str) -> None:
    package = ROOT / "xrl" / room
    assert len(list(package.rglob("*.py"))) > 5
    missing = without_mirror(package, ROOT / "tests" / room)
    assert not missing, f"xrl/{room} has modules whose tests are not where they are looked for: {', '.join(missing)}"


def test_a_module_without_tests_of_its_own_is_found(tmp_path: Path) -> None:
    package, tests = tmp_path / "xrl", tmp_path / "tests"
    for name in ("__init__.py", "tested.py", "untested.py", "empty.py", "inner/tested.py", "inner/untested.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).touch()
    for name, text in (
        ("test_tested.py", "def test_it() -> None: ..."),
        ("test_empty.py", '"""To be written."""\n\n\ndef helper() -> None: ...'),
        ("inner/test_tested.py", "class TestIt:\n    def test_it(self) -> None: ..."),
    ):
        (tests / name).parent.mkdir(parents=True, exist_ok=True)
        (tests / name).write_text(text)
    assert without_mirror(package, tests) == ["empty.py", "inner/untested.py", "untested.py"]
