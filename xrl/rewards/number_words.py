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
        "lakh": 10**5,
        "lakhs": 10**5,
        "crore": 10**7,
        "crores": 10**7,
        **dict.fromkeys("万萬만", 10**4),
        **dict.fromkeys("亿億억", 10**8),
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
    "bpm rpm fps wpm tbsp tsp tbs ha dB px kJ kN mA mV kV Ω kΩ MΩ µm μm µg μg µs μs µL μL "
    "usd eur gbp jpy cny rmb inr"
)
_NUMBER_WORDS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety"
)
# Directly behind a number: "5 squared", "3 quarters", "2 pi", "7 mod 3", "5 and more", "5 hundreds", "5 o'clock".
_OPERATIONS = _words(
    "squared cubed factorial plus minus over divided multiplied mod modulo remainder choose pi root sqrt log ln "
    "sin cos tan exp half halves third thirds quarter quarters fourths fifths sixths sevenths eighths ninths tenths "
    "tenth hundredth hundredths thousandth thousandths millionth millionths base binary hexadecimal point below above "
    "hundreds thousands millions billions bn tn abc power score grand mm or nor o'clock repeating recurring "
    "does did cannot can't won't would raised etc "
    "mil mille millón millones millionen millions milliard milliards milliarden mio mrd milhão milhões "
    "тыс тысяча тысячи тысяч млн миллион миллиона миллионов млрд"
)
# Anywhere behind it.
_OPERATIONS_LATER = _words("plus minus multiplied mod modulo remainder etc repeating recurring")
# "72 pages in one day", while "5 feet six inches" is not 5.
_LEADS_ELSEWHERE = _words(
    "in for at on of over after within by during to with among per every each the these those all"
)
# What "5 times" may be followed by, if it is not a product.
_GOES_ON_TIMES = _words(
    "a an per each every as more less fewer larger bigger greater longer older faster heavier taller higher in during "
    "daily weekly total altogether"
)
_CJK_BEFORE = re.compile(
    "(?:[第步题一二三四五六七八九十百千万亿和或到至的之、不]"
    "|步骤|步驟|至少|至多|最多|最少|[大小多少等]于|超过|不是)[ :]?$"
)
_CHANGES_BEFORE = re.compile(
    r"\b(?:sqrt|root|log|ln|lg|sin|cos|tan|exp|minus|negative|plus|times|over|under|above|below|than|least|most|half"
    r"|all but|m[áa]s de|menos|plus de|moins|mehr als|mindestens|(?:than|or) equal to"
    r"|twice|double|triple|thrice|and|or|nor|base|mod|modulo|up to|exceeds|exceeding|between|from|without|except"
    r"|(?:root|half|halves|third|quarter|factorial|power|square|cube|fourth|fifth|sixth|seventh|eighth"
    r"|ninth|tenth|multiple|double|twice|percent|logarithm|reciprocal|inverse|opposite)s? of)[(: ]*$",
    re.IGNORECASE,
)
_DENIAL = re.compile(r"\b(?:not|never|neither|cannot|nicht|kein|no es|не|\w+n['’]t)\b", re.IGNORECASE)
_LABEL = re.compile(
    r"\b(?:steps?|parts?|problem|question|case|method|option|choice|approach|solution|example|exercise|section|chapter"
    r"|figure|fig|equation|eq|table|line|item|stage|phase|attempt|scenario|rule|task|page|version"
    r"|calculation|operation|iteration|statement|formula|claim|note|hint|schritt|paso|étape|шаг|q|no)\.? ?[#(]?$",
    re.IGNORECASE,
)


def changes_after(words: Sequence[str], tokens: Sequence[str]) -> bool:
    """Whether lower-case words behind a number make it part of another number or of a formula.

    Args:
        words: those of the tokens that are words.
        tokens: with what is between them, "/" for one.
    """
    if words[0] in _OPERATIONS or (words[0] == "times" and len(words) > 1 and words[1] not in _GOES_ON_TIMES):
        return True
    if words[0] in ("st", "nd", "rd", "th") and any(word.capitalize() in MONTHS for word in words):
        return True
    leads = ("", *tokens)
    for lead, word in zip(leads, tokens, strict=False):
        is_variable = len(word) == 1 and "b" <= word <= "z" and lead not in ("", "/", "per", "a", "an")
        is_counting = word in SCALES or (word in _NUMBER_WORDS and lead not in _LEADS_ELSEWHERE)
        if is_variable or is_counting or word in _OPERATIONS_LATER:
            return True
    return re.search(r"\band (?:a|one) (?:half|third|quarter|fourth|fifth)\b", " ".join(words)) is not None


def changes_in_remark(words: Sequence[str]) -> bool:
    """Whether a remark of these words takes back or scales the number before it: "or 73", "mod 3", "in thousands"."""
    scales = (*SCALES, *(f"{scale}s" for scale in SCALES))
    return words[0] in _OPERATIONS or words[0] in ("or", "and", "not") or any(word in scales for word in words)


def changes_before(text: str) -> bool:
    """Whether words before a number make it another, or deny it: "square root of", "at least", "is not"."""
    last = re.findall(r"[^\W\d_]+", text)[-1:]
    # "one hundred 5", "May 5", while "Clips in May: 72" says 72.
    is_counting = bool(last) and text.endswith(last[0])
    is_counting = is_counting and (last[0].lower() in _NUMBER_WORDS | SCALES.keys() or last[0] in MONTHS)
    return is_counting or any(pattern.search(text) for pattern in (_CHANGES_BEFORE, _CJK_BEFORE, _DENIAL))


def names_a_label(text: str) -> bool:
    """Whether a number behind these words is part of a name: "Step", "Problem"."""
    return _LABEL.search(text) is not None
