r"""The number a text says, whole or not at all.

A text says a number only if, taken as a whole, it is one number and what is written around numbers: currency, a unit,
a percent sign, Markdown, LaTeX, a remark in parentheses. `\sqrt{7}`, `1, 2`, `5!` and `Step 2` say none.

    read_number    of a ground truth: nothing but the number and its unit
    parse_number   of an answer: words around it too, "The answer is 72."

Every step looks at each character a bounded number of times: no text makes it slow.
"""

from __future__ import annotations

import re
from fractions import Fraction

from xrl.rewards.number_words import (
    CURRENCY_WORDS,
    MONTHS,
    SCALES,
    SHORT_UNITS,
    changes_after,
    changes_before,
    changes_in_remark,
    names_a_label,
)
from xrl.rewards.plain_text import plain_text

# Longer digit strings are no answer to anything, and slow to convert.
MAX_DIGITS = 200

_NUMBER = re.compile(
    rf"""
      (?P<whole>\d{{1,{MAX_DIGITS}}})\ (?P<part>\d{{1,{MAX_DIGITS}}})\ ?/\ ?(?P<of>\d{{1,{MAX_DIGITS}}})
    | (?P<top>\d{{1,{MAX_DIGITS}}})\ ?/\ ?(?P<bottom>\d{{1,{MAX_DIGITS}}})
    | (?P<decimal>\d{{1,{MAX_DIGITS}}}(?:\.\d{{1,{MAX_DIGITS}}})?|\.\d{{1,{MAX_DIGITS}}})
      (?:[eE](?P<exponent>[+-]?\d{{1,2}})(?!\d) | \ ?[xX×·*]\ ?10\^(?P<power>[+-]?\d{{1,2}})(?!\d))?
    """,
    re.VERBOSE,
)
# The first digit that is not in the middle of a word, as in H2O, or of a number.
# Chinese, Japanese and Korean put no space before it.
_START = re.compile(r"(?<![^\W\d\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af])(?<!\d)(?<!\d\.)(?:\d|(?<!\.)\.\d)")
_FORMULA_OF_ONE = re.compile(
    r"(?:(?!\\(?:text|q?quad|in|le|leq|ge|geq|ne|neq|pm|to)(?![a-zA-Z])|\\\\)[^,;\n])*(?<![!<>≠~/±\\])="
)
_EQUATION_A_LINE = re.compile(r"=[^=\n]*\n\s*[^=\s][^=\n]*=")
_SIDES = re.compile(r"=>|[=≈⇒]")
_LISTED = re.compile(r"\d\s*(?:[,;]|\b(?:or|and|vs)\b)")
_ARITHMETIC = re.compile(r"[\d\s.+\-*/×÷·()]*")
_SYMBOL = re.compile(r"(?:[^\W\d_](?:_?\w)?|[^\W\d_]{2,}(?: [^\W\d_]+){0,3}) ?")
# In words around a number these are a formula, a comparison or a set.
_MATHS = re.compile(r"[+*/^<>≤≥≠≡±∓√∛∈∉∪∩∞∑∫∏∝→←|\\%{}\[\]_#№§@&÷×·\u0370-\u03ff]")
_TOKEN = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*|\d+|\S")
_POWER_OF_UNIT = re.compile(r"(?<=[a-z])(?:\^[23]|[²³])(?!\w)|(?<= m|[kcdm]m|ft|in|yd)[23](?!\w)")
_PLACE_OF_UNIT = re.compile(r"(?<=[a-z]) (?:in|for|per|every|after|within) \d{1,9}(?= [a-z])")
_UNIT = re.compile(r"(?: ?[/-] ?| )?[^\W\d_]+\.?(?:(?: ?[/-] ?| )[^\W\d_]+\.?){0,4}")
_BRACKETS = {")": "(", "]": "[", "}": "{"}


def read_number(text: str) -> Fraction | None:
    r"""The number that a text is, a unit aside: `\$1{,}000`, `3\frac{1}{2}`, `x = 72`, `72 \text{ cm}`; else None."""
    return _read(text, with_words=False)


def parse_number(text: str) -> Fraction | None:
    """The one number that an answer says, exactly; None if it says none, several, or one that is not worked out.

    Units, currency, percent signs, Markdown, LaTeX and words around the number do not matter; of an equation the
    last side counts.
    """
    return _read(text, with_words=True)


def _read(text: str, *, with_words: bool) -> Fraction | None:
    if _EQUATION_A_LINE.search(text):
        return None
    plain = plain_text(text)
    if plain is None and with_words:
        plain = _solved(text)
    if plain is None:
        return None
    without_remark = _without_remark(plain)
    if without_remark is None:
        return None
    side = _last_side(without_remark, with_words=with_words)
    return None if side is None else _number_of(side, after_equals=side != without_remark, with_words=with_words)


def _solved(text: str) -> str | None:
    r"""The right side of one equation whose left is LaTeX that is no number's: `\theta = 72^\circ`."""
    left = _FORMULA_OF_ONE.match(text)
    right = text[left.end() :] if left else ""
    plain = plain_text(right) if right.count("{") == right.count("}") else None
    return None if plain is None else f"={plain}"


def _without_remark(text: str) -> str | None:
    """Without a remark in parentheses behind a number: `18 dollars (16-3-4=9 eggs sold)`; None if that changes it."""
    body = text.rstrip(" .")
    start = _opening(body) if body.endswith(")") else None
    if not start or body[start - 1] != " " or not _START.search(body, 0, start):
        return text
    remark, before = body[start + 1 : -1], body[: start - 1].rstrip()
    words = [word.lower() for word in re.findall(r"[^\W\d_]+", remark)]
    if not words and not re.search(r"\d ?[-+*/×·÷] ?\d", remark):
        return text  # (3), (1, 2): more numbers, not a remark
    if words and (max(map(len, words)) < 2 or changes_in_remark(words)):
        return None  # (x + 1), (mod 3), (in thousands)
    return before if before[-1].isalnum() or before[-1] in ".%°" else None


def _opening(text: str) -> int | None:
    """Where the bracket that the last character closes was opened."""
    depth = 0
    for index in range(len(text) - 1, -1, -1):
        depth += {text[-1]: 1, _BRACKETS[text[-1]]: -1}.get(text[index], 0)
        if depth == 0:
            return index
    return None


def _last_side(text: str, *, with_words: bool) -> str | None:
    """What is behind the last equals sign; None where that is not what the whole says: `x = 1, y = 2`, `x <= 2`."""
    *sides, last = _SIDES.split(text)
    for side in sides:
        # An answer's equation may be any; a ground truth's gives a name to a number, or works one out.
        is_named = _SYMBOL.fullmatch(side.strip() + " ") or _ARITHMETIC.fullmatch(side)
        if side.rstrip()[-1:] in tuple("!<>≠~/±") or _LISTED.search(side) or not (with_words or is_named):
            return None
    return last


def _number_of(text: str, *, after_equals: bool, with_words: bool) -> Fraction | None:
    text = re.sub(r"^\( ?(-?\d{1,99}) ?\) ?/ ?\(? ?(\d{1,99}) ?\)?$", r"\1/\2", _peeled(text))
    text = re.sub(r"^- ?\(([^()-]*)\)$", r"-\1", text)
    if with_words:
        text = re.sub(r" is (?:the|my) (?:final |correct |right )?(?:answer|result|total)$", "", text)
    start = _START.search(text)
    found = _NUMBER.match(text, start.start()) if start else None
    if found is None:
        return None
    before = text[: found.start()]
    sign = 1
    if before.endswith(("-", "+")) and not before[:-1].endswith(("-", "+")) and before[-2:-1] in ("", " ", "(", ":"):
        sign, before = (-1 if before[-1] == "-" else 1), before[:-1]
    elif before.strip() == "-" and (after_equals or not with_words or found.end() == len(text)):
        sign, before = -1, ""  # "- 5 apples" may be an item of a list
    elif before.strip().lower() == "minus" or re.search(r"(?<![\w-])negative $", before, re.IGNORECASE):
        sign, before = -1, before.rstrip()[:-8]
    if not _leaves_it_whole(before, with_words=with_words):
        return None
    value, after = _value(found), text[found.end() :]
    if after.startswith(")") and re.search(r"[^\W\d_]{2} \($", before):
        after = after[1:]  # "five (5)"
    if value is None or (found["decimal"] and "." in found["decimal"] and after.startswith(("..", "…"))):
        return None
    scale = re.match(r" ?([a-z]+\b|[万萬만亿億억])", after)
    if scale and scale[1] in SCALES:
        value, after = value * SCALES[scale[1]], after[scale.end() :]
    return sign * value if _is_unit(after, with_words=with_words) else None


def _peeled(text: str) -> str:
    """Without brackets around the whole: `(7)`, `[7]`, and without a full stop."""
    text = text.strip(" ,;")
    for _ in range(3):
        text = text.rstrip(" .,;") if not text.endswith("..") else text
        if text[-1:] not in _BRACKETS or _opening(text) != 0:
            break
        text = text[1:-1].strip(" ")
    return text


def _value(found: re.Match[str]) -> Fraction | None:
    if found["decimal"]:
        return Fraction(found["decimal"]) * Fraction(10) ** int(found["exponent"] or found["power"] or 0)
    top, bottom = int(found["part"] or found["top"]), int(found["of"] or found["bottom"])
    if bottom == 0 or (found["whole"] and top >= bottom):  # 3 7/2 is no mixed number
        return None
    return int(found["whole"] or 0) + Fraction(top, bottom)


def _leaves_it_whole(before: str, *, with_words: bool) -> bool:
    """Whether what is written before a number leaves it that number: "The answer is", not "log" or "Step"."""
    before = before.strip()
    if not before or before.lower().rstrip(".") in CURRENCY_WORDS:
        return True
    if not with_words:
        return False
    before = before.removesuffix("~").rstrip()
    if _MATHS.search(before) or "~" in before or before.endswith(("-", "!!")) or re.search(r"\w\($", before):
        return False
    if re.search(r"\b[b-hj-zB-HJ-Z],|^\(?[a-zA-Z],$", before):
        return False  # (x, 2)
    return not (changes_before(before) or names_a_label(before))


def _is_unit(after: str, *, with_words: bool) -> bool:
    """Whether what is written behind a number leaves it that number: a unit and, of an answer, words."""
    after = re.sub(r"^ ?%|^ ?°", "", after)
    if re.match(r" ?[ap]\.? ?m\b|, ?(?:\.\.|…|etc|and so on)", after, re.IGNORECASE):
        return False  # a time of day, a list that goes on
    after = _POWER_OF_UNIT.sub("", after).rstrip(" .,;*" if with_words else " .")
    if with_words:
        after = _PLACE_OF_UNIT.sub("", re.sub(r"^ of (?:the|them|those|these|all|his|her|their)\b", " each", after))
    if not after:
        return True
    tokens: list[str] = _TOKEN.findall(after)
    words = [token for token in tokens if token[0].isalpha()]
    if not words or any(token[0].isdigit() for token in tokens):
        return False
    first = words[1] if with_words and words[0] in ("a", "an") and len(words) > 1 else words[0]  # "$18 a day"
    is_stuck = after[0].isalpha()
    if not _can_be_unit(first, is_stuck=is_stuck) or (first == "K" and len(words) > 1):
        return False
    if changes_after([first.lower(), *map(str.lower, words[1:])], [token.lower() for token in tokens]):
        return False
    if re.search(r"\b(?:or|and) (?:more|less|fewer|greater|above|below|higher|lower)\b", after):
        return False
    if not with_words:
        return _UNIT.fullmatch(after) is not None
    if any(token[0] not in ",.;:!?()\"”“’'‘-/…*" for token in tokens if not token[0].isalpha()):
        return False
    # "2. Add them", "1) Add", "2: result" are labels; "5(x)", "5!" and "5'" are formulas.
    return is_stuck or re.match(r" ?/ ?[a-zA-Z]|-[^\W\d_]{3}|[ ,;](?![:!])", after) is not None


def _can_be_unit(word: str, *, is_stuck: bool) -> bool:
    """Not a variable or a product of them: `2x`, `3ab`, `4i`."""
    if word in MONTHS or word in ("MM", "月", "点", "點") or (is_stuck and word == "K"):
        return False
    if word[0] in "千百兆천백조" and word[:2] not in ("千克", "千米", "千瓦", "千卡"):
        return False
    if word in SHORT_UNITS or (len(word) > 1 and word.lower() in SHORT_UNITS):
        return True
    if not word.isascii():
        return not re.search(r"[\u0370-\u03ff\u2100-\u214f\U0001d400-\U0001d7ff]", word)
    return len(word) >= (4 if is_stuck else 3) and re.search(r"[aeiouyAEIOUY]", word) is not None
