"""LaTeX and its signs as people write answers in them, read once from left to right into one plain form."""

from __future__ import annotations

import re
import unicodedata

MAX_DEPTH = 24  # of braces
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
# 12 \text{ apples}; a scale is no such word: 5 millions are not 5, 3 halves not 3.
_SCALE = r"(?:tens|dozens|pairs|hundreds|thousands|millions|billions|trillions|percents|halves|thirds|quarters|(?:four|fif|six|seven|eigh|nin|ten|twelf|twentie|hundred|thousand|million)ths)"
_COUNTED = re.compile(rf"(?!{_SCALE}$)[a-z]{{2,}}s|people")


class Unreadable(Exception):
    """Braces that do not match, or more inside each other than anyone writes."""


def signs(text: str) -> str:
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


def braced(text: str) -> str:
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
            raise Unreadable
        pieces: list[str] = []
        while self.at < len(self.tokens):
            token = self.tokens[self.at]
            self.at += 1
            if token == ends:
                return "".join(pieces)
            self.piece(token, pieces, depth)
        if ends == "}":
            raise Unreadable
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
                raise Unreadable
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
