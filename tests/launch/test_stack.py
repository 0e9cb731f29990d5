"""Where the main thread is."""

from __future__ import annotations

import threading

from xrl.launch.stack import main_thread_frames


def in_another_thread() -> tuple[str, str]:
    found: list[tuple[str, str]] = []
    thread = threading.Thread(target=lambda: found.append(main_thread_frames()))
    thread.start()
    thread.join()
    return found[0]


def test_the_line_that_the_main_thread_is_at_is_found_by_another() -> None:
    own, innermost = in_another_thread()
    assert own.startswith("tests/launch/test_stack.py:") and own.endswith(" in_another_thread")
    # It waits for the thread, within the standard library.
    assert innermost.startswith("threading.py:")


def test_our_package_is_named_by_its_own_path() -> None:
    own, innermost = main_thread_frames()
    assert own == innermost and own.startswith("xrl/launch/stack.py:")
