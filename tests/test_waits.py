"""No wait without an end: calls that block are given a bound, or say why they need none."""

from __future__ import annotations

import ast
from pathlib import Path

import xrl

PACKAGE = Path(xrl.__file__).parent
# Methods that wait for another thread, process or host when they are called without a time-out.
WAITS = {"result", "get", "recv", "wait", "join", "communicate", "wait_for", "recv_bytes"}
# Functions of subprocess that wait for a process's end.
RUNS = {"run", "call", "check_call", "check_output"}
REASON = "# Unbounded: "


def test_every_wait_has_a_bound_or_a_reason() -> None:
    found = [
        f"{file.relative_to(PACKAGE.parent)}:{line}: {text}"
        for file in sorted(PACKAGE.rglob("*.py"))
        for line, text in unbounded_waits(file.read_text())
    ]
    assert not found, "waits without a bound, or a comment '# Unbounded: <reason>':\n" + "\n".join(found)


def test_a_wait_without_a_bound_is_found() -> None:
    assert unbounded_waits("future.result()\n") == [(1, "future.result()")]
    assert unbounded_waits("await changed.wait()\n") == [(1, "changed.wait()")]
    assert unbounded_waits("x = subprocess.run(words, check=True)\n") == [(1, "subprocess.run(words, check=True)")]
    assert unbounded_waits("changed.wait_for(ready)\n") == [(1, "changed.wait_for(ready)")]
    assert unbounded_waits("future.result(timeout=None)\n") == [(1, "future.result(timeout=None)")]


def test_a_wait_with_a_bound_or_a_reason_is_none() -> None:
    bounded = ["future.result(5)", "future.result(timeout=limit)", "process.wait(timeout_s)", "settings.get('name')"]
    bounded += ["', '.join(words)", "subprocess.run(words, timeout=10)", "changed.wait_for(ready, timeout=1.0)"]
    assert [wait for line in bounded for wait in unbounded_waits(line + "\n")] == []
    assert unbounded_waits("work.wait()  # Unbounded: the group has a time-out.\n") == []
    assert unbounded_waits("# Unbounded: the group has a time-out.\nwork.wait()\n") == []
    assert unbounded_waits("# Unbounded: the group has a time-out,\n# as all groups have.\nwork.wait()\n") == []


def unbounded_waits(source: str) -> list[tuple[int, str]]:
    """Line and text of each call that may wait for ever and gives no reason."""
    lines = source.split("\n")
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and _may_wait_for_ever(node)]
    return [(call.lineno, ast.unparse(call)) for call in calls if not _has_reason(lines, call)]


def _may_wait_for_ever(call: ast.Call) -> bool:
    if not isinstance(call.func, ast.Attribute):
        return False
    bound = [word.value for word in call.keywords if word.arg in ("timeout", "timeout_s")]
    if any(isinstance(value, ast.Constant) and value.value is None for value in bound):
        return call.func.attr in WAITS | RUNS
    if bound:
        return False
    if isinstance(call.func.value, ast.Name) and call.func.value.id == "subprocess":
        return call.func.attr in RUNS
    if call.func.attr == "wait_for":  # of a condition; the time-out comes second
        return len(call.args) == 1
    return call.func.attr in WAITS and not call.args


def _has_reason(lines: list[str], call: ast.Call) -> bool:
    here = lines[call.lineno - 1 : call.end_lineno]
    above = call.lineno - 2
    while above >= 0 and lines[above].lstrip().startswith("#"):
        here.append(lines[above])
        above -= 1
    return any(REASON in line for line in here)
