r"""Numbers as typography, LaTeX and Markdown write them, in plain characters: `1{,}000\,\text{kg}` is `1000 kg`."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable

_CHARACTERS = str.maketrans(
    dict.fromkeys(
        "\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000\t\n\r", " "
    )
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d\u207b", "-")
    | dict.fromkeys("\u200b\u200c\u200d\u200e\u200f\u2060\ufeff\u00ad\ufe0e\ufe0f", None)
    | dict.fromkeys("\u2044\u2215\uff0f", "/")
    | dict.fromkeys("\u00ab\u00bb\u300a\u300b\u300c\u300d\u300e\u300f\u3010\u3011", '"')
    | dict.fromkeys("\u2018\u2019", "'")
    | {"\uff0c": ",", "\uff0e": ".", "\uff05": "%", "\uff1d": "=", "\uff08": "(", "\uff09": ")", "\uff1a": ":"}
    | {"\u3002": ". ", "\u066b": ".", "\u066c": ",", "\u2103": "°C", "\u2109": "°F"}
)
_VULGAR = {
    character: unicodedata.normalize("NFKC", character).replace("\u2044", "/") for character in "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
}
_DIGITS_GROUPED = [
    # One separator throughout, groups of three, and no other digit or separator at either end.
    re.compile(rf"(?<![\d.,'])(?<!\d )[1-9]\d{{0,2}}(?:{separator}\d{{3}})+(?!\d)(?! ?/)")
    for separator in (",", "'", " ", "_")
] + [re.compile(r"(?<![\d.,'])(?<!\d )[1-9]\d{0,2}(?:,\d{3})+(?= ?/)")]
_ARGUMENT = r"(?:\{ {0,3}(-?\d+) {0,3}\}| ?(\d))"
_WORDS = r"\{  ([a-zA-Z ]{1,40})\}"  # they were those of a \text
_REWRITES: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(r"\\(?:left|right|displaystyle|textstyle|limits|[bB]igg?[lr]?)(?![a-zA-Z])"), ""),
    (re.compile(r"\\(?:tiny|small|large|Large|LARGE|huge|Huge|bf|rm|it|bfseries)(?![a-zA-Z])"), ""),
    (re.compile(r"\\(?:textcolor|color) ?\{\w{1,20}\}"), ""),
    (re.compile(r"\\(?:textdollar|dollar|pounds|euro|yen)(?![a-zA-Z])"), ""),
    (re.compile(r"(?<![\s\\])\s{0,3}\\\\\s*\Z"), ""),  # the end of a line
    (re.compile(r"<(?:s|del|strike)>[^<>]*</(?:s|del|strike)>"), r"\\\\"),  # crossed out: not to be read
    (re.compile(r"<sup>([^<>]*)</sup>"), r"^\1"),
    (re.compile(r"<sub>([^<>]*)</sub>"), r"_\1"),
    (re.compile(r"<<[^<>]*>>|<\|[^<>|]{1,30}\|>"), ""),  # of GSM8K's calculator; a token that ends a text
    (re.compile(r"</?[a-zA-Z][\w-]{0,20}(?: [^<>]{0,99})?/?>"), "  "),
    (re.compile(r"\\!"), ""),
    (re.compile(r"\{\.\}"), "."),
    (re.compile(r"\\_"), "_"),
    (re.compile(r"\{,\}"), ","),
    (
        re.compile(
            r"\\(?:[,;:> ]|q?quad(?![a-zA-Z])|(?:thinspace|enspace)(?![a-zA-Z]) ?)"
            r"|(?<=\d)~(?=\d{3}(?!\d)| {0,3}[a-zA-Z\\])"
        ),
        " ",
    ),
    (re.compile(r"\\[()\[\]]"), "  "),
    (re.compile(r"\\([$%&])"), r"\1"),
    (re.compile(r"\b(?:US|USD|A|AU|C|CA|HK|NZ|SG|R|S)(?= ?\$ ?\.?\d)"), ""),
    (re.compile(r"\^ ?(?:\{ ?\\circ ?\}|\\circ)(?![a-zA-Z])|\\degree(?![a-zA-Z])"), "°"),
    (re.compile(r"\^ ?\{ {0,3}\\?(?:text|mathrm)? ?\{? ?(?:o|st|nd|rd|th) ?\}? {0,3}\}"), ""),
    (re.compile(r"\\Omega(?![a-zA-Z])"), "Ω"),
    (re.compile(r"\\sim(?![a-zA-Z])"), "~"),
    (re.compile(r"\\times(?![a-zA-Z])"), "×"),
    (re.compile(r"\\cdot(?![a-zA-Z])"), "·"),
    (re.compile(r"\\div(?![a-zA-Z])"), "÷"),
    (re.compile(r"\\(?:approx|simeq)(?![a-zA-Z])"), "≈"),
    (re.compile(r"\\(?:Rightarrow|implies)(?![a-zA-Z])"), "⇒"),
    (re.compile(r"\^\{ ?([+-]?\d+) ?\}"), r"^\1"),
    (re.compile(r"(?<=10)\*\*(?=[+-]?\d)"), "^"),
    (re.compile(r"(?<=10)-?[⁰¹²³⁴-⁹]{1,3}"), lambda found: "^" + unicodedata.normalize("NFKC", found[0])),
    (re.compile(rf"\\[cdt]?frac ?{_WORDS} ?{_WORDS}"), r" \1/\2"),
    (re.compile(r"\{? ?(?<!\d)(-?\d{1,20}) ?\\over(?![a-zA-Z]) ?(\d{1,20}) ?\}?"), r" \1/\2 "),
    (re.compile(rf"\\[cdt]?frac{_ARGUMENT}{_ARGUMENT}"), lambda found: _fraction(found)),
    (re.compile(r"(?<![a-zA-Z^_}\d\])])\{ ?(\d{1,20}) ?\}(?![{\d])"), r"\1"),
    (re.compile(r"~~[^~]*~~"), "\\\\"),  # crossed out: not to be read
    (re.compile(r"(?<![\w*])(\*{1,3})(?=[^\s*])([^*]*[^\s*])\1(?![\w*])"), r"  \2  "),
    (re.compile(r"(?<![\w_])(_{1,3})(?=[^\s_])([^_]*[^\s_])\1(?![\w_])"), r"  \2  "),
    (re.compile(r"[$€£¥₹] ?\d[\d.,]*[kKmMbB](?![a-zA-Z])"), "\\\\"),  # thousands or millions, who knows
    (re.compile(r"(?<=\d)[$€£¥₹￥₩₽₫₱¢](?=\d)"), "\\\\"),
    (re.compile(r"[$€£¥₹￥₩₽₫₱¢]+"), ""),
]
_COMMAND_WITH_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf)|mbox|hbox|boxed|fbox|bm|boldsymbol|emph|underline)"
    r" ?\{([^{}]*)\}"
)


def plain_text(text: str) -> str | None:
    """The text in plain characters, one space where there were several; None where a command of LaTeX is left."""
    if "&" in text:
        text = re.sub(r"&#?\w{1,10};", lambda found: html.unescape(found[0]), text)
    text = re.sub(r"(?![0-9])\d", lambda found: str(unicodedata.decimal(found[0])), text.translate(_CHARACTERS))
    for character, fraction in _VULGAR.items():
        if character in text:
            text = re.sub(rf"(?<=\d) ?{character}", f" {fraction} ", text).replace(character, f"{fraction} ")
    text = _without_commands(re.sub(r"\\text\{([.,])\}", r"\1", text))
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = re.sub(r"(?<=[a-zA-Z]) {1,3}(?=\^)", "", _without_commands(text))  # \text{cm}^2
    if "\\" in text:
        return None
    for pattern in _DIGITS_GROUPED:
        text = pattern.sub(lambda found: re.sub(r"[, '_]", "", found[0]), text)
    text = re.sub(r"[\"”']\.? ?$", "", re.sub(r" +", " ", text)).strip(" *_`\"“”'")
    return text.lstrip("→➡⇒👉•✅✔✓ ").rstrip("✅✔✓🎉 ")


def _without_commands(text: str) -> str:
    for _ in range(3):  # one in the other
        text = _COMMAND_WITH_TEXT.sub(r"  \1  ", text)
    return text


def _fraction(found: re.Match[str]) -> str:
    top, bottom = found[1] or found[2], found[3] or found[4]
    if bottom.startswith("-"):
        top, bottom = (top[1:] if top.startswith("-") else f"-{top}"), bottom[1:]
    # Behind a digit it is the rest of a mixed number; a digit behind it is not one of its own.
    space = " " if found.string[: found.start()].rstrip()[-1:].isdigit() else ""
    return f"{space}{top}/{bottom} "
