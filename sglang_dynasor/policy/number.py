"""The number that a text answers: its last, or of a trial its first."""

from __future__ import annotations

import re

from sglang_dynasor.policy.found import Found

# Commas and spaces stand between thousands only: "1,2" is no 12. Possessive, with what may not stand before: linear.
_WHOLE = r"(?:(?<![\d,])\d{1,3}(?:(?:,|\{,\}|,\\!)\d{3})++(?!,?\d)|(?<![\d,])(?<!\d )\d{1,3}(?:[ \u00a0\u2009\u202f]\d{3})++(?![\d])|\d++)"
_FRACTIONS = "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
# Thousands as they are written elsewhere: 12,34,567 and 1'000.
_GROUPED = r"(?:(?<![\d,.(\[{])[1-9]\d?(?:,\d\d(?!\d))++,\d{3}(?![\d,])|(?<![\d'’_.,])[1-9]\d{0,2}(?:['’_]\d{3})++(?!\d))(?:\.\d++)?"
_POWER = r"\s?(?:\^|\*\*)\s?\{?[-+−]?\d{1,2}\}?|[⁻⁺]?[⁰¹²³⁴-⁹]{1,4}"
_VALUE = rf"(?:{_WHOLE}(?:\.\d++)?|\.\d++)"
_DECIMAL_COMMA = re.compile(r"(?![1-9]\d{0,2},\d{3}(?!\d))(\d+),(\d+)( [a-z]+)?", re.I)
_NUMBER = re.compile(
    rf"(?=[\d.\\{_FRACTIONS}])(?<![A-Za-z_\d])(?:"  # not within a word
    rf"(?:\d++\s?)?\\[dtc]?frac\s?(?:\{{\s?-?{_VALUE}\s?\}}|\d)\s?(?:\{{\s?-?{_VALUE}\s?\}}|\d)"  # a fraction, mixed or not
    r"|\d{1,4}(?::\d{1,4})++(?!\d)"  # a time, a ratio
    r"|(?<![\d.,])\d{1,4} \d{1,4}/\d{1,4}(?![\d/])"
    r"|(?<![\d,.(\[{])(?:[1-9]\d{0,2}(?:\.\d{3})++|[1-9]\d{0,2}(?: \d{3})++),\d\d?(?![\d,.])"  # thousands and a decimal comma
    r"|(?<![\d,.(\[{])(?<!\d, )(?:\d{1,12},(?:\d\d?|\d{4,12})|0,\d{3})(?![\d,.)\]}]|\s?,\s?\d)(?:\s(?:million|billion|trillion)\b)?"  # a decimal comma
    rf"|{_GROUPED}"
    rf"|(?:(?:\d{{1,4}}\s?)?[{_FRACTIONS}]"  # 3½
    rf"|{_VALUE}(?:[eE][-+]?\d{{1,2}}(?!\d)|\s?(?:[×x*·⋅]|\\times|\\cdot)\s?\{{?10\}}?(?:{_POWER})"
    r"|(?:\^|\*\*)\{?[-+−]?\d{1,4}\}?|[⁻⁺]?[⁰¹²³⁴-⁹]{1,4})?"
    rf"(?:\s?[/⁄]\s?{_VALUE})?)(?:\s(?:thousand|million|billion|trillion)\b)?(?:\s?(?:\\?[%％]|percent\b))?)"
)
NEAR_CHARS = 1024  # at the end: read first, as most texts have a number there
MAX_CHARS = 64  # that a number is taken to have; it is looked for in all of the text where it may have more
MAX_TRIAL_CHARS = 256  # in which a trial's number is looked for
_MINUS = re.compile(r"(?:minus|negative)\s{1,3}$", re.I)
_NAME = re.compile(r"[A-Za-z]{2}-$")  # COVID-19
_PART = re.compile(r"\d\.$")
_MORE = re.compile(rf"\.\d|[{_FRACTIONS}]")  # 1.2.3
_POINTED = re.compile(r"\d{1,3}(?:[. ]\d{3})+,\d+")
_CURRENCY = re.compile(r"\\?[$€£¥₹]\s?$")
_THOUSANDS = re.compile(_GROUPED)
_SAYS = re.compile(r"\b(?:is|are|was|be|equals?|gives?|gets?|to|than|of|and|or)$", re.I)  # what a number is said after
_RECKONED = re.compile(
    r"[ \t]*(?:[=≈]|[+*/×÷·⋅^−–-][ \t]?[\d(\\.]|\\(?:times|cdot|div|approx)|[xX][ \t]?(?:[\d(\\.]|$)|(?:times|plus|minus|divided|multiplied|over|mod|choose|squared|cubed|to the)\b|(?:is|equals|makes|gives) [$\\-]{0,2}\d)"
)
_FOLLOWED = re.compile(
    r"[*_$\"'`)\]}]*(?:[.;:!?][*_$\"'`)\]}]*\s|,\s+[^\W\d]|[ \t]*\n|\s+[^\W\d_]+\W)"
)  # a sentence's end, the line's, or a word
_OPERATOR = re.compile(
    r"(?:[\d)\]}%!]\s?|(?<![^\W\d_])[^\W\d_]\s|[^\W\d_])$"
)  # before a sign: it adds or takes away, or is a hyphen


def find_number(text: str) -> Found | None:
    r"""The last number with its sign and per cent; `\frac{1}{4}`, `3 1/2`, `3:30`, `12 500`, `1.5*10^3`, `1.5 million`, `2,74` too.

    A digit that belongs to a word, an index or a power is none: "CO2", `x_2`, `x^2`. "5-3" ends in 3, not in -3.
    """
    last = next((i for i in reversed(range(len(text))) if text[i].isnumeric()), None)
    if last is None:
        return None
    near = max(0, last - NEAR_CHARS)
    return (_find(text, near) if near else None) or _find(text, 0)


def first_number(text: str, begin: int) -> Found | None:
    """The first number from `begin` on that nothing is reckoned with ("5 + 3 = 8"); whole where what follows could not belong to it."""
    text = text[: begin + MAX_TRIAL_CHARS]
    for found in _NUMBER.finditer(text, begin):
        if not _RECKONED.match(text, found.end()) and (number := _read(text, found)) is not None:
            return Found(number, _FOLLOWED.match(text, found.end()) is not None)
    return None


def _find(text: str, begin: int) -> Found | None:
    for found in reversed(list(_NUMBER.finditer(text, begin))):
        if begin and found.start() < begin + MAX_CHARS:
            return None  # it may have begun before
        if (number := _read(text, found)) is not None:
            return Found(number, False)
    return None


def _read(text: str, found: re.Match[str]) -> str | None:
    """A number with its sign; None where it belongs to a word, an index, a power or a version."""
    before = text[max(0, found.start() - 24) : found.start()]
    if (before[-1:].isascii() and before[-1:].isalpha() and not before.endswith("\\")) or before.endswith(
        ("_", "^", "_{", "^{", "^{-", "^-")
    ):
        return None
    number = found[0]
    if _NAME.search(before) or _PART.search(before) or _MORE.match(text, found.end()):
        return None
    if _POINTED.fullmatch(number):
        number = number.replace(".", "").replace(" ", "")
    if _THOUSANDS.fullmatch(number):
        number = re.sub("[,'’_]", "", number)
    if _DECIMAL_COMMA.fullmatch(number):
        number = number.replace(",", ".")
    return _sign(before) + number.replace("**", "^")


def _sign(before: str) -> str:
    """The sign that a number has after `before`: "-" or nothing."""
    before = _CURRENCY.sub("", before)
    if _MINUS.search(before):
        return "-"
    if before.endswith((" - ", " − ", " – ")):
        word = before[:-3].strip()
        if before[-2] != "–" and _SAYS.search(word):
            return "-"
        return "" if _OPERATOR.search(before[:-2]) or word[-1:].isalpha() else "-"
    if not before.endswith(("-", "−", "–")):
        return ""
    return "" if _OPERATOR.search(before[:-1]) else "-"
