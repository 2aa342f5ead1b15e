"""What counts as the same answer: the key under which an answer is counted.

Everything here runs in the scheduler's loop on every finished branch: linear in the answer, nothing symbolic, and the same
on every rank. Where it is in doubt it keeps two answers apart: that costs tokens, a wrong merge costs the answer.
docs/answers.md has the table of what is equal.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
import warnings
from collections.abc import Iterator
from dis import opmap
from fractions import Fraction
from functools import lru_cache
from types import CodeType
from typing import Any

COMPARERS = ("symbolic", "model", "embedding")  # new answers are compared beside the loop (comparison.py)
EQUALS = ("math", "text", *COMPARERS)
_CANONICAL = ("math", "symbolic")  # counted by their canonical form; the others as text
MATH_CHARS = 256  # a longer answer is compared as text
CODE_CHARS = 1500  # longer Python is compared as text
MAX_KEY_CHARS = 256  # a longer canonical form is counted by its digest
MAX_DIGITS = 40  # beyond this a number is compared as text
MAX_DEPTH = 24  # of braces
MAX_PASSES = 6  # until a form must no longer change
_NOP = opmap["NOP"]
KEPT = "\0"  # begins a form that is kept as it is

_VULGAR = re.compile("[¼-¾⅐-⅞↉](?=(\\s*[A-Za-z\\\\(])?)")
_SUPER = re.compile("[⁰¹²³⁴-⁹⁻⁺ⁿⁱ]+")
_SUB = re.compile("[₀-₉₋₊]+")
_SIGNS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "⁄": "/", "∕": "/",
    "≤": "<=", "≥": ">=", "⩽": "<=", "⩾": ">=", "≠": r"\ne ", "≈": r"\approx ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
    "∞": r"\infty ", "π": r"\pi ", "±": r"\pm ", "°": r"^\circ ", "℃": r"^\circ C", "℉": r"^\circ F", "∅": r"\emptyset ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ",
    "→": r"\to ", "∧": r"\land ", "∨": r"\lor ", "¬": r"\neg ", "ℝ": r"\R ", "ℤ": r"\Z ", "ℕ": r"\N ", "ℚ": r"\Q ", "ℂ": r"\C ",
    "‘": "'", "’": "'", "“": '"', "”": '"', "′": "'", "″": "''", "。": ".", "،": ",", "٬": ",", "٫": ".", "、": ",",
    "\b": "\\b", "\f": "\\f",  # a JSON string that was read once too often: \boxed, \frac
}  # fmt: skip
_SIGN_TABLE = str.maketrans(_SIGNS)
_COMMANDS = {
    r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\cfrac": r"\frac", r"\ge": ">=", r"\geq": ">=", r"\geqslant": ">=", r"\le": "<=", r"\leq": "<=", r"\leqslant": "<=",
    r"\gt": ">", r"\lt": "<", r"\neq": r"\ne", r"\times": "*", r"\cdot": "*", r"\ast": "*", r"\lbrace": r"\{", r"\rbrace": r"\}", r"\div": "/",
    r"\lbrack": "[", r"\rbrack": "]", r"\lvert": "|", r"\rvert": "|", r"\vert": "|", r"\mid": "|", r"\varnothing": r"\emptyset", r"\degree": r"^\circ",
    r"\wedge": r"\land", r"\vee": r"\lor", r"\rightarrow": r"\to", r"\dots": "...", r"\ldots": "...", r"\cdots": "...", r"\prime": "'", r"\colon": ":",
    r"\quad": " ", r"\qquad": " ", r"\,": " ", r"\;": " ", r"\:": " ", r"\>": " ", r"\ ": " ", r"\!": "", r"\$": "$", r"\%": "%", r"\_": "_", r"\#": "#", r"\&": "&",
    r"\left": "", r"\right": "", r"\displaystyle": "", r"\textstyle": "", r"\limits": "", r"\(": "", r"\)": "", r"\[": "", r"\]": "", "~": " ",
}  # fmt: skip
_SIZES = re.compile(r"\\(?:[bB]igg?[lrm]?|left|right|middle)(?![A-Za-z])\s*\.?")
_WRAPPERS = frozenset(
    r"\text \textrm \textbf \textit \texttt \textsf \textnormal \mathrm \mathbf \mathit \mathsf \mathtt \mathnormal \operatorname \mbox \hbox "
    r"\boxed \fbox \framebox \underline \emph \boldsymbol \bm \ensuremath".split()
)
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|\d+(?:\.\d+)?|[^\W\d_]+|\s+|.", re.S)
_UNITS = (
    "degrees?|radians?|dollars?|euros?|pounds?|usd|eur|seconds?|secs?|minutes?|mins?|hours?|hrs?|days?|weeks?|months?|years?|"
    "inch(?:es)?|feet|foot|ft|yards?|miles?|mph|millimeters?|centimeters?|meters?|metres?|kilometers?|kilometres?|mm|cm|dm|km|m|"
    "grams?|kilograms?|kg|g|mg|lbs?|ounces?|oz|liters?|litres?|ml|units?|square units?|cubic units?|"
    "(?:square|cubic) (?:inches|feet|yards|miles|meters|metres|centimeters|kilometers|cm|m|km)|(?:km|m|miles|meters|feet|ft)/(?:h|s|hr|hour|second)|(?:miles|meters|feet|kilometers) per (?:hour|second)"
)
_UNIT = re.compile(rf"(?:{_UNITS})(?:\^\{{[23]\}})?", re.I)
_COUNTED = re.compile(r"[a-z]{2,}s|people")  # 12 \text{ apples}
_LETTER_UNIT = re.compile(r"[A-Za-z](?:\^.*)?")  # next to a number it is a variable
_WORD_START = re.compile(r"(?<=[\d .)}])[A-Za-z]")
MAX_UNIT_CHARS = 32
_CURRENCY = re.compile(r"([-+]?) ?(?:US ?)?[$€£¥₹] ?([-+]?[\d.].*)")
_WHOLE = r"(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d{0,2}(?:_\d{3})+|[1-9]\d{0,2}(?: \d{3})+|0|[1-9]\d*)"
_VALUE = rf"(?:{_WHOLE}(?:\.\d*)?|\.\d+)"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)(?:(?P<mixed>[1-9]\d{{0,39}}) (?=\d+/))?(?P<top>{_VALUE})(?:[eE](?P<e>[-+]?\d{{1,2}})|\*10\^\{{?\(?(?P<power>[-+]?\d{{1,2}})\)?\}}?)?"
    rf"(?:/(?P<bottom>-?{_VALUE}))?(?: ?(?P<scale>thousand|million|billion|trillion))?(?P<percent>%| ?percent)?",
    re.I,
)
_TEN = re.compile(r"(-?)10\^\{?\(?([-+]?\d{1,2})\)?\}?")
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_MATH_SPACE = re.compile(r" *([-+*/=<>:^]) *")
_TIMES_TEN = re.compile(r"(?<=\d) ?[xX*] ?(?=10\^)")
_NAME = re.compile(r"(?:[A-Za-z]|\\[a-z]+|[A-Za-z]_\{?\w\}?|[A-Za-z]\([A-Za-z]\))(?:=|\\approx ?)(.+)")
_NAMED = re.compile(r"([^=]*?)(?:=|\\approx)")
_SPLIT = re.compile(r"(\\[{}]|[()\[\],;|])")
_SET = re.compile(
    r"\\\{((?:[^\\()\[\]|:{}\"]|\\[A-Za-z]|(?<=\^|_){[^{}]*})*+)\\\}"
)  # without what has an order of its own
_OR = re.compile(r" ?(?:,|;)? ?\b(?:and|or)\b ?", re.I)
_WORD = re.compile(r"[^\W\d_]{2,}")
_ARTICLE = re.compile(r"(?:the|an?) (?=[^\W\d_]{2})", re.I)
_HYPHEN = re.compile(r"(?<=[^\W\d_]{3})-(?=[^\W\d_]{3})")
_EXCLAIMED = re.compile(r"(?:.*[^\w\\])?(?:[^\W\d_]{3,}|no)!", re.I)
_OPTION = re.compile(r"(?:option|choice|answer):? \(?([A-Z])\)?", re.I)
_LOOSE = re.compile(r" (?![\w.])|(?<![\w.]) |(?<=\d) (?=[^\W\d_])")
_COMMAND_SPACE = re.compile(r"(\\[A-Za-z]+) (?![A-Za-z])")


class _Unreadable(Exception):
    """Braces that do not match, or more inside each other than anyone writes."""


def answer_key(answer: str, equal: str = "math", extractor: str = "auto") -> str:
    """The string under which an answer is counted; equal answers have equal keys.

    Args:
        answer: as `read_answer` gave it.
        equal: one of EQUALS, with its level if it has one. What is compared beside the loop (comparison.py) has the key by which it
            is counted until then.
        extractor: that gave it. What `json` and `tool_call` give is canonical already; `code:python` is equal where it compiles
            to the same.

    Returns:
        At most MAX_KEY_CHARS characters; a longer form is there by its digest, so that all of it counts. Empty only for "".
    """
    kind = extractor.partition(":")[0]
    if extractor == "code:python":
        return _short(python_form(answer))
    if kind == "code":
        return _short("\n".join(line.rstrip() for line in answer.strip().splitlines()))
    if extractor == "json" or kind == "tool_call":
        return _short(answer)
    return _short(canonical(answer) if equal in _CANONICAL else text_form(answer))


def _short(form: str) -> str:
    if len(form) <= MAX_KEY_CHARS:
        return form
    return f"{form[:32]}...{hashlib.blake2b(form.encode('utf-8', 'surrogatepass'), digest_size=16).hexdigest()}"


def text_form(text: str) -> str:
    """The text with white space of any kind as one space, in Unicode's composed form; nothing else is taken away."""
    return " ".join(unicodedata.normalize("NFC", text).split()) or text


@lru_cache(maxsize=4096)
def canonical(answer: str) -> str:
    """The one form of all answers that `math` takes for the same; a form is its own form."""
    if answer.startswith(KEPT):
        return answer
    if len(answer) > MATH_CHARS:
        return KEPT + text_form(answer)
    form = answer
    try:
        for _ in range(MAX_PASSES):
            before, form = form, _simplify(form) or text_form(form)
            if form == before:
                return form
    except _Unreadable:
        pass
    return KEPT + text_form(answer)


def as_number(text: str) -> Fraction | None:
    r"""The exact rational that `text` writes; None if it is none, or is several numbers.

    It may have commas, spaces or `_` between thousands, a point, an exponent (`1.5*10^{3}`), a scale ("million"), per cent, be a
    fraction (`-3/4`, `\frac{3}{4}`) or mixed (`3 1/2`). "007" is none: it is a string of digits.
    """
    try:
        return _number(_plain(_braced(_signs(text))))
    except _Unreadable:
        return None


def _number(text: str) -> Fraction | None:
    """As `as_number`, of a text without LaTeX."""
    if not text or not (text[-1].isalnum() or text[-1] in ")}.%") or len(text) > 4 * MAX_DIGITS:
        return None
    text = _TIMES_TEN.sub("*", _MATH_SPACE.sub(r"\1", text.strip()))
    if ten := _TEN.fullmatch(text):
        return _signed(ten[1], Fraction(10) ** int(ten[2])) if abs(int(ten[2])) <= MAX_DIGITS else None
    found = _NUMBER.fullmatch(text)
    if found is None or sum(c.isdigit() for c in text) > MAX_DIGITS:
        return None
    bottom = _decimal(found["bottom"] or "1")
    if not bottom or (found["mixed"] and not (found["bottom"] or "").isdigit()):
        return None
    value = int(found["mixed"] or 0) + _decimal(found["top"]) / bottom
    value *= Fraction(10) ** int(found["e"] or found["power"] or 0) * _SCALES.get((found["scale"] or "").lower(), 1)
    return _signed(found["sign"], value / 100 if found["percent"] else value)


def _signed(sign: str, value: Fraction) -> Fraction:
    return -value if sign == "-" else value


def _decimal(text: str) -> Fraction:
    return Fraction(re.sub("[, _]", "", text).removesuffix("."))


def _signs(text: str) -> str:
    """Characters that mean the same become one: digits of all scripts, wide and joined letters, signs, fractions, powers."""
    if not text.isascii():
        text = _VULGAR.sub(_vulgar, text)
        text = _SUPER.sub(lambda m: "^{" + unicodedata.normalize("NFKC", m[0]) + "}", text)
        text = _SUB.sub(lambda m: "_{" + unicodedata.normalize("NFKC", m[0]) + "}", text)
        text = re.sub(r"√\s*(\d+|[A-Za-z])", r"\\sqrt{\1}", text).replace("√", r"\sqrt ")
    text = text.translate(_SIGN_TABLE)
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).translate(_SIGN_TABLE)
        text = "".join(c if c.isascii() or not c.isdecimal() else str(unicodedata.decimal(c)) for c in text)
    return " ".join(text.split())


def _vulgar(found: re.Match[str]) -> str:
    """A fraction sign: in brackets where something would be read into its denominator."""
    form = unicodedata.normalize("NFKC", found[0]).replace("⁄", "/")
    return f"({form})" if found[1] else f" {form}"


def _braced(text: str) -> str:
    """LaTeX read: wrappers, sizes and spacing gone, fractions as `a/b`, powers, indices and roots with braces."""
    if not any(c in text for c in "\\{}^_~"):
        return text
    text = _SIZES.sub("", text)
    text = rf"\approx {text[1:]}" if text.startswith("~") else text
    # One character may stand for a group: x^2, \frac12. "^10" is taken whole, as people write it outside LaTeX.
    text = text.replace("**", "^") if re.search(r"\w\*\*\w", text) else text
    return " ".join(_Reader(text).group(0).split())


class _Reader:
    """Reads tokens once, from left to right."""

    def __init__(self, text: str):
        self.tokens = _TOKEN.findall(text)
        self.at = 0

    def group(self, depth: int, ends: str = "") -> str:
        """What stands up to the closing `ends`, or to the end."""
        if depth > MAX_DEPTH:
            raise _Unreadable
        pieces: list[str] = []
        while self.at < len(self.tokens):
            token = self.tokens[self.at]
            self.at += 1
            if token == ends:
                return "".join(pieces)
            self.piece(token, pieces, depth)
        if ends == "}":
            raise _Unreadable
        return "".join(pieces)

    def piece(self, token: str, pieces: list[str], depth: int) -> None:
        """Read one token and what belongs to it."""
        token = _COMMANDS.get(token, token)
        if token in _WRAPPERS:
            inner = self.wrapped(depth)
            is_counted = (
                not self.peek() and _COUNTED.fullmatch(inner.strip()) and "".join(pieces).strip()[-1:].isdigit()
            )
            pieces.append("" if is_counted else inner)
        elif token == r"\frac":
            self.fraction(pieces, depth)
        elif token == r"\sqrt":
            root = self.index(depth) if self.peek() == "[" else ""
            pieces.append(rf"\sqrt{root}{{{self.argument(depth)}}}")
        elif token in ("^", "_") and self.peek().strip():
            pieces.append(self.script(token, depth))
        elif token == r"^\circ":
            pieces.append(r"^{\circ}")
        elif token == "{":
            pieces.append(self.braces(depth))
        elif token == "sqrt" and self.peek() == "(":
            self.at += 1
            pieces.append(rf"\sqrt{{{self.group(depth + 1, ')')}}}")
        else:
            pieces.append(token)
            if token[:1] == "\\" and token[1:].isalpha():
                while self.peek() == "{":
                    self.at += 1
                    pieces[-1] += f"{{{self.group(depth + 1, '}')}}}"
                if pieces[-1] == token and self.peek()[:1].isalpha():
                    pieces.append(" ")

    def peek(self) -> str:
        """The next token; "" at the end."""
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def wrapped(self, depth: int) -> str:
        r"""The contents of `\text{...}`; a space where they are words next to something else."""
        self.skip_space()
        if self.peek() != "{":
            return " "
        self.at += 1
        return " " + self.group(depth + 1, "}") + (" " if self.peek()[:1].isalnum() else "")

    def braces(self, depth: int) -> str:
        """A group's contents; a plain set keeps its braces."""
        is_first = self.at == 1
        inner = self.group(depth + 1, "}")
        if is_first and self.at == len(self.tokens):
            return rf"\{{{inner}\}}"  # all there is: a set
        if inner.strip() == ",":
            return inner.strip()
        return rf"\{{{inner}\}}" if re.search('[,;:"]', inner) else inner

    def skip_space(self) -> None:
        while self.peek().isspace():
            self.at += 1

    def index(self, depth: int) -> str:
        self.at += 1
        return f"[{self.group(depth + 1, ']')}]"

    def argument(self, depth: int) -> str:
        """One argument of a command: a group, a command with its own, or one character."""
        self.skip_space()
        token = self.peek()
        if not token:
            return ""
        self.at += 1
        if token == "{":
            return self.group(depth + 1, "}").strip()
        if token.startswith("\\"):
            pieces: list[str] = []
            if depth > MAX_DEPTH:
                raise _Unreadable
            self.piece(token, pieces, depth + 1)
            return "".join(pieces).strip()
        if len(token) > 1:
            self.at -= 1
            self.tokens[self.at] = token[1:]
        return token[0]

    def script(self, mark: str, depth: int) -> str:
        """A power or an index."""
        token = self.peek()
        if token == "-" and self.at + 1 < len(self.tokens) and self.tokens[self.at + 1].isdigit():
            self.at += 2
            return f"{mark}{{-{self.tokens[self.at - 1]}}}"
        if mark == "^" and token.isdigit():
            self.at += 1
            return f"^{{{token}}}"
        if (mark == "_" and token.isdigit() and len(token) > 1) or (mark == "_" and len(token) > 1 and token.isalpha()):
            return mark
        if token in ("^", "_", "}", ")", "]") or (len(token) == 1 and not token.isalnum() and token != "{"):
            return mark
        inner = self.argument(depth)
        if inner in ("\\circ", "'"):
            return r"^{\circ}" if inner == "\\circ" else "'"
        return f"{mark}{{{inner}}}"

    def fraction(self, pieces: list[str], depth: int) -> None:
        """`a/b`, in brackets where what stands beside it would read it otherwise; `3\\frac12` is mixed."""
        top, bottom = self.argument(depth).strip(), self.argument(depth).strip()
        top = top if not re.search(r".[-+]|[,=<>;]", top) else f"({top})"
        bottom = bottom if re.fullmatch(r"-?\d+(?:\.\d+)?|[A-Za-z]|\\[A-Za-z]+", bottom) else f"({bottom})"
        before = "".join(pieces[-2:]).rstrip()[-1:]
        after = next((t for t in self.tokens[self.at : self.at + 2] if not t.isspace()), "")
        form = f"{top}/{bottom}"
        if before.isdigit() and top.isdigit() and bottom.isdigit() and not after[:1].isalpha():
            form = f" {form}"
        elif before not in _BEFORE or (after and not _is_apart(after)):
            form = f"({form})"
        pieces.append(form)


_BEFORE = ("", *"+-*=<>,;:([{&~")
_APART = frozenset(r"\cup \cap \to \in \ne \approx \pm \lor \land \circ \right".split())


def _is_apart(after: str) -> bool:
    """Whether what follows a fraction could not be read into it."""
    after = _COMMANDS.get(after, after)
    if after[:1] == "\\":
        return after in _APART or after in _WRAPPERS or not after[1:].isalpha()
    return not after or not (after[0].isalnum() or after[0] in "([{^_!'|")


def _plain(text: str) -> str:
    """The text without what only surrounds an answer: marks of emphasis, quotes, `$`, a full stop, one pair of brackets."""
    while True:
        before, text = text, text.strip()
        text = text.replace("$$", "$")
        if len(text) > 1 and text[0] == "$" and (text[-1] == "$" or "$" not in text[1:]):
            text = text[1:].removesuffix("$")
        elif text[-1:] == "$" or (text[-1:] in (".", ",", ";", ":") and text[-2:] != ".." and len(text) > 1):
            text = text[:-1]
        elif (
            len(text) > 2
            and text[0] == text[-1]
            and text[0] in "*_`\"'"
            and (text[0] == "*" or text[0] not in text[1:-1])
        ) or (len(text) > 2 and text[0] == "(" and text[-1] == ")" and not re.search("[(),;]", text[1:-1])):
            text = text[1:-1]
        elif re.match(r"-\((\d[\d./]*)\)$", text):
            text = "-" + text[2:-1]
        if text == before:
            return text


def _simplify(text: str) -> str:
    """One pass towards the canonical form."""
    text = _plain(_braced(_plain(_signs(text))))
    if (number := _measure(text)) is not None:
        return number
    if (parts := _alternatives(text)) is not None:
        return ";".join(parts)
    if option := _OPTION.fullmatch(text):
        return option[1].upper()
    if _EXCLAIMED.fullmatch(text):
        text = text[:-1]
    text = _words(text)
    text = _COMMAND_SPACE.sub(r"\1", _LOOSE.sub("", text))
    text = re.sub(r"(?<=\d)\*(?=[A-Za-z\\(])", "", text).replace("!=", r"\ne ")
    if (name := _NAME.fullmatch(text)) and _is_value(name[1]):
        return name[1]
    return _elements(text)


def _measure(text: str) -> str | None:
    """A number as an exact rational, without its currency or unit; None where it is none."""
    if not any(c.isdigit() for c in text):
        return None
    if money := _CURRENCY.fullmatch(text):
        text = money[1] + money[2]
    for sign in "$€£¥₹":
        text = text.removesuffix(sign)
    number = _number(text.strip())
    if number is None:
        bare = text.removesuffix(r"^{\circ}").rstrip()
        unit = _unit_at(bare)
        number = _number(_plain(bare[:unit])) if unit < len(text) else None
    return None if number is None else str(number)


def _unit_at(text: str) -> int:
    """Where a unit at the end begins; the text's length where none is."""
    for found in _WORD_START.finditer(text, max(0, len(text) - MAX_UNIT_CHARS)):
        at = found.start()
        if _UNIT.fullmatch(text, at) and (text[at - 1] == " " or not _LETTER_UNIT.fullmatch(text, at)):
            return at
    return len(text)


def _words(text: str) -> str:
    """Words without article and, where the case tells nothing, in small letters."""
    if not any(c.isalpha() for c in text):
        return text
    text = _HYPHEN.sub(" ", _ARTICLE.sub("", text, count=1) if _ARTICLE.match(text) else text)
    return _WORD.sub(_small, text)


def _small(found: re.Match[str]) -> str:
    word = found[0]
    if found.start() and found.string[found.start() - 1] == "\\":
        return word
    is_told = (
        (word[1:].islower() and len(word) > 2) or (word.isupper() and len(word) > 4) or word in ("No", "YES", "TRUE")
    )
    return word.casefold() if is_told else word


def _is_value(text: str) -> bool:
    """Whether what `x =` is followed by is an answer by itself: not one more name, nor one more relation."""
    return not re.search(r"[=<>]|\\ne|\\approx|\bor\b|\band\b|,|;", text) and not re.fullmatch(r"[A-Za-z]", text)


def _elements(text: str) -> str:
    """A list, a tuple or a set with each of its elements in its own form; `;` between them."""
    pieces = _SPLIT.split(text)
    if len(pieces) == 1:
        return text
    is_named = len({name[1] for piece in pieces[::2] if (name := _NAMED.match(piece))}) > 1  # x=1,y=2 is no 1,2
    text = "".join(
        ";" if i % 2 and piece in (",", ";") else piece if i % 2 else piece if is_named else _element(piece)
        for i, piece in enumerate(pieces)
    )
    return _SET.sub(_sorted, text)


def _sorted(found: re.Match[str]) -> str:
    return rf"\{{{';'.join(sorted(found[1].split(';')))}\}}"


def _element(text: str) -> str:
    if text.isascii() and (text.isdigit() or text.isalpha()):
        return text
    if not any(c.isdigit() or c == "\\" for c in text):
        return text
    text = text.strip()
    text = text[1:] if re.match(r"\+[\w\\]", text) else text
    number = _number(text) if not re.match(r"\d* \d", text) else None
    if number is not None and not text.endswith("%"):
        return str(number)
    if (name := _NAME.fullmatch(text)) and _is_value(name[1]):
        return _measure(name[1]) or name[1]
    return text


def _alternatives(text: str) -> list[str] | None:
    """The parts of "1 or 2", "x=1 or x=2", "A and C": of numbers and names only."""
    parts = _OR.split(text)
    if len(parts) < 2 or any(not part for part in parts):
        return None
    found: list[str] = []
    if len({name[1] for part in parts if (name := _NAMED.match(part.strip()))}) > 1:
        return None
    for part in parts:
        for piece in re.split("[,;]", part):
            value = name[1] if (name := _NAME.fullmatch(piece.strip())) else piece.strip()
            number = _measure(value)
            if number is None and not (re.fullmatch("[A-Z]", value) and " or " not in text):
                return None
            found.append(number or value)
    return found


def python_form(code: str) -> str:
    """What Python compiles `code` to, without the places of its lines: comments, layout and docstrings do not count.

    Code that is no Python, or longer than CODE_CHARS, is compared as text.
    """
    plain = "\n".join(line.rstrip() for line in code.strip().splitlines())
    if len(plain) > CODE_CHARS:
        return plain
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Optimised twice, docstrings are gone; so are assertions, which count.
            compiled = compile(plain, "", "exec", dont_inherit=True, optimize=0 if "assert" in plain else 2)
            form = repr(_shape(compiled))
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        return plain
    return "python:" + hashlib.blake2b(form.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _shape(code: CodeType) -> tuple[Any, ...]:
    # What is left of a docstring, and of a `try`: the exception table tells the latter.
    steps = b"".join(code.co_code[i : i + 2] for i in range(0, len(code.co_code), 2) if code.co_code[i] != _NOP)
    return (
        steps, code.co_exceptiontable, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, code.co_flags,
        code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, tuple(map(_constant, code.co_consts)),
    )  # fmt: skip


def _constant(value: object) -> object:
    if isinstance(value, CodeType):
        return _shape(value)
    if isinstance(value, frozenset):  # its order is another in each process
        return ("set", *sorted(map(repr, _each(value))))
    if isinstance(value, tuple):
        return tuple(map(_constant, _each(value)))
    return type(value).__name__, repr(value)


def _each(values: Any) -> Iterator[object]:
    yield from values
