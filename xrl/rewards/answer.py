"""The final answer in a response, and the number it says.

Every step looks at a bounded stretch of text, or at each character once: no answer makes it slow.
"""

from __future__ import annotations

import re
from fractions import Fraction

MARKER = "####"
BOX = r"\boxed{"
# Longer than any number worth reading.
MAX_ANSWER_CHARS = 200

# What LaTeX and typography put between the digits and around them.
_REWRITES = [
    (re.compile(r"[\u00a0\u2007\u2009\u202f]"), " "),
    (re.compile(r"[\u2212\ufe63\uff0d]"), "-"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[,;:! ]"), " "),
    (re.compile(r"(?<=\d) ?\\[dt]?frac"), r" \\frac"),  # a mixed number
    (re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}"), r"\1/\2"),
    (re.compile(r"\\(?=[$%])"), ""),
    (re.compile(r"(?<=\d)[, '](?=\d{3}(?!\d))"), ""),  # thousands
]
_NUMBER = re.compile(
    r"""
    (?<![^\W_])(?<!\.)              # not the end of a word or of another number; _72_ is Markdown
    (?P<sign>-[$€£¥₹]?|[$€£¥₹]-)?
    (?:
        (?:(?P<whole>\d+)[ ])?(?P<top>\d+)/(?P<bottom>\d+)
      | (?P<decimal>\d+(?:\.\d+)?|\.\d+)(?:[eE](?P<exponent>[+-]?\d{1,2})(?!\d))?
    )
    """,
    re.VERBOSE,
)
# After the number: more digits that it would have to take in, or an operation that is still to be done.
_UNFINISHED = re.compile(r"[.,:/eE][+-]?\d|[²³½¼¾⅓⅔]|\s*(?:\*{1,2}|[-+/^×÷·xX]|\\times|\\cdot|\\div)\s*[\d($]")


def final_answer(response: str) -> str | None:
    r"""The text of the final answer: after the last `####`, else in the last `\boxed{}`; None without one.

    A marker with nothing behind it does not count, so `#### 72 ####` says 72.
    """
    *before, last = response.split(MARKER)
    for part in [last, *reversed(before[1:])] if before else []:
        if stripped := part.strip(" \t\r\n#"):
            return stripped.splitlines()[0].strip()
    return _last_boxed(response)


def parse_number(text: str) -> Fraction | None:
    """The one number an answer says, exactly; None if it says none or is not worked out.

    Units, currency, percent signs, Markdown, LaTeX and words around the number do not matter. Of several
    numbers the first counts, or the first after the last equals sign: a list of guesses is one guess.
    """
    text = text[:MAX_ANSWER_CHARS]
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = re.split(r"[=≈]", text)[-1]
    match = _NUMBER.search(text)
    if match is None or _UNFINISHED.match(text, match.end()):
        return None
    if match["bottom"]:
        if int(match["bottom"]) == 0:
            return None
        value = int(match["whole"] or 0) + Fraction(int(match["top"]), int(match["bottom"]))
    else:
        value = Fraction(match["decimal"]) * Fraction(10) ** int(match["exponent"] or 0)
    return -value if "-" in (match["sign"] or "") else value


def _last_boxed(response: str) -> str | None:
    start = response.rfind(BOX)
    if start < 0:
        return None
    depth = 1
    for place in range(start + len(BOX), len(response)):
        depth += {"{": 1, "}": -1}.get(response[place], 0)
        if depth == 0:
            return response[start + len(BOX) : place].strip() or None
    return None
