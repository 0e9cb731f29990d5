r"""The final answer in a response: what is said after its thinking, behind the last `####` or in the last `\boxed{}`.

Every step looks at each character a bounded number of times: no answer makes it slow.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from xrl.rewards.number import parse_number, read_number
from xrl.types import Prompt

__all__ = ["final_answer", "parse_number", "without_thinking"]

MARKER = "####"

# Qwen and DeepSeek; Gemma; Seed; Mistral; Kimi.
_THINKING_BEGINS = re.compile(r"<(?:seed:)?(?:think|thinking|thought)\s?>|\[think\]|◁think▷", re.IGNORECASE)
_THINKING_ENDS = re.compile(r"</(?:seed:)?(?:think|thinking|thought)\s?>|\[/think\]|◁/think▷", re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s{0,9}")
_UNBRACED = re.compile(r"[-+]?[$]?\d[\d,./]*")
# Letters that are no command of LaTeX.
_WORD = re.compile(r"(?<![\\a-zA-Z])[^\W\d_]{2,}")
_NAMES_THE_ANSWER = re.compile(r"\b(?:answer|result|solution|conclusion)\b", re.IGNORECASE)


def final_answer(response: str, prompt: Prompt | None = None) -> str | None:
    r"""The text of the final answer: after the last `####`, else in the last `\boxed{}`; None without one.

    A marker with nothing behind it does not count, so `#### 72 ####` says 72. Nor does a heading of Markdown, which
    begins alike: `#### Step 2: add` is none, and a number among words ("#### That makes 5") gives way to a box behind.

    Args:
        prompt: where it ends with `<think>`, the response begins within the thinking.
    """
    said = without_thinking(response, prompt)
    if said is None:
        return None
    box_start, boxed = _last_box(said)
    heading: str | None = None
    for start, line, below in _marked(said):
        if read_number(line) is None and _WORD.search(line):
            answer = _answer_under(line, below)
            if answer is None:
                heading = heading or line
                continue
            gives_way = True
        else:
            answer, gives_way = line, heading is not None
        return boxed if gives_way and boxed is not None and box_start > start else answer
    return heading if boxed is None else boxed


def without_thinking(response: str, prompt: Prompt | None = None) -> str | None:
    """What is said after the last `</think>`; None where the thinking has not ended."""
    *_, said = _THINKING_ENDS.split(response)
    is_open = said == response and prompt is not None and prompt.text.rstrip().endswith(("<think>", "<thinking>"))
    return None if is_open or _THINKING_BEGINS.search(said) else said


def _marked(text: str) -> Iterator[tuple[int, str, list[str]]]:
    """What is behind each marker, from the last to the first: its start, its first line, the other lines."""
    end = len(text)
    while (start := text.rfind(MARKER, 0, end)) >= 0:
        lines = [line.strip() for line in text[start:end].strip(" \t\r\n#").splitlines()]
        if lines:
            yield start, lines[0], [line for line in lines[1:] if line]
        end = start


def _answer_under(heading: str, below: list[str]) -> str | None:
    """The answer that a line of words gives or, as a heading, has below it; None if neither."""
    if parse_number(heading) is not None:
        return heading
    if len(below) == 1 and (parse_number(below[0]) is not None or _NAMES_THE_ANSWER.search(heading)):
        return below[0]
    return None


def _last_box(text: str) -> tuple[int, str | None]:
    r"""Where the last box begins, and what it holds: `\boxed{7}`, `\boxed {7}`, `\fbox{7}`, `\boxed 7`."""
    start = max(text.rfind(r"\boxed"), text.rfind(r"\fbox"))
    box = _BOX.match(text, start) if start >= 0 else None
    if box is None:
        return -1, None
    inside = box.end()
    if text[inside : inside + 1] != "{":
        bare = _UNBRACED.match(text, inside)
        return start, bare[0].rstrip(".,/") if bare else None
    depth = 0
    for end in range(inside, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return start, text[inside + 1 : end].strip() or None
    return start, None
