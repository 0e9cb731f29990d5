"""Words around a number: those that are its unit, and those that make it another number, or part of a name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


SCALES: Mapping[str, int] = MappingProxyType(
    {
        "hundred": 100,
        "thousand": 1000,
        "million": 10**6,
        "billion": 10**9,
        "trillion": 10**12,
        "dozen": 12,
        "dozens": 12,
        "score": 20,
    }
)
CURRENCY_WORDS = _words("usd eur gbp jpy cny rmb inr rs cad aud chf")
MONTHS = _words(
    "January February March April May June July August September October November December "
    "Jan Feb Mar Apr Jun Jul Aug Sep Sept Oct Nov Dec"
)
# Of up to three letters; a longer word is a unit where nothing speaks against it.
SHORT_UNITS = _words(
    "m g s h l L N J W V C F K cm mm km dm nm kg mg lb lbs oz ft in yd mi mph kph hr hrs min sec ms ml mL dl cl gal qt "
    "pt pts pct sq cu st nd rd th kW kWh Wh MW Hz kHz MHz GHz kB KB MB GB TB Pa kPa cal mol deg pcs yr yrs wk wks mo "
    "usd eur gbp jpy cny rmb inr"
)
_NUMBER_WORDS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety"
)
# "5 squared", "3 quarters", "2 pi", "7 mod 3", "5 and a half", "5 hundred thousand".
_OPERATIONS = _words(
    "squared cubed factorial times plus minus over divided multiplied mod modulo remainder choose pi root sqrt log ln "
    "sin cos tan exp half halves third thirds quarter quarters fourths fifths sixths sevenths eighths ninths tenths "
    "tenth hundredth hundredths thousandth thousandths millionth millionths base binary hexadecimal point below above "
    "hundreds thousands millions billions bn tn abc power"
)
_CHANGES_BEFORE = re.compile(
    r"\b(?:sqrt|root|log|ln|lg|sin|cos|tan|exp|minus|negative|plus|times|over|under|above|below|than|least|most|half"
    r"|twice|double|triple|thrice|and|or|nor|base|mod|modulo|up to|exceeds|exceeding|between|from|without|except"
    r"|(?:root|half|halves|third|quarter|factorial|power|square|cube|multiple|double|twice|percent|logarithm"
    r"|reciprocal|inverse|opposite)s? of)[(: ]*$",
    re.IGNORECASE,
)
_DENIAL = re.compile(r"\b(?:not|never|neither|cannot|\w+n['’]t)\b", re.IGNORECASE)
_LABEL = re.compile(
    r"\b(?:steps?|parts?|problem|question|case|method|option|choice|approach|solution|example|exercise|section|chapter"
    r"|figure|fig|equation|eq|table|line|item|stage|phase|attempt|scenario|rule|task|page|version|q|no)\.? ?[#(]?$",
    re.IGNORECASE,
)


def changes_after(word: str) -> bool:
    """Whether a (lower-case) word behind a number makes it part of another number or of a formula."""
    return word in _OPERATIONS or word in _NUMBER_WORDS or word in SCALES


def changes_in_remark(words: Sequence[str]) -> bool:
    """Whether a remark of these words takes back or scales the number before it: "or 73", "mod 3", "in thousands"."""
    scales = (*SCALES, *(f"{scale}s" for scale in SCALES))
    return words[0] in _OPERATIONS or words[0] in ("or", "and", "not") or any(word in scales for word in words)


def changes_before(text: str) -> bool:
    """Whether words before a number make it another, or deny it: "square root of", "at least", "is not"."""
    last = re.findall(r"[^\W\d_]+", text)[-1:]
    is_counting = bool(last) and (last[0].lower() in _NUMBER_WORDS | SCALES.keys() or last[0] in MONTHS)
    return is_counting or bool(_CHANGES_BEFORE.search(text) or _DENIAL.search(text))


def names_a_label(text: str) -> bool:
    """Whether a number behind these words is part of a name: "Step", "Problem"."""
    return _LABEL.search(text) is not None
