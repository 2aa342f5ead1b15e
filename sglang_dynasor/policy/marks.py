"""Answers that a mark announces: a box, `####`, "the answer is"."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from sglang_dynasor.policy.found import Found
from sglang_dynasor.policy.sentence import STARTER, sentence_end

MAX_BOXES = 8  # that are one answer together
MAX_PHRASE_CHARS = 200
MAX_LEAD_CHARS = 60  # on a line before a mark whose value is below
MAX_MARKS = 16  # of a kind that are looked at, the last ones
_BOX = re.compile(
    r"(?:\\|\x08|\\b)(?:boxed|oxed|fbox|framebox)(?:\[[^\]\n]{0,20}\]){0,2}\s{0,3}(?:\{|(-?[\w./%]+|\\[A-Za-z]+(?:\{[\w ]*\}){0,2}))|(?<=\\)[{}]|[{}]"
)
_JOINT = re.compile(
    r"[\s$.\\()\[\]]*(?:,|;|&|and|or|\\text\{\s*(?:and|or)\s*\})[\s$,\\()\[\]]*(?:and|or)?[\s$\\()\[\]]*"
)
_HASH = re.compile(r"(?<!#)####(?!#)")
_HEADINGS = frozenset(
    "conclusion conclusions solution explanation summary final result results verification check note notes approach analysis reasoning method given introduction "
    "overview proof discussion interpretation calculation calculations step steps part case phase section problem question example answer key background strategy".split()
)
_ANSWER_HEADING = re.compile(r"[*_\s]*(?:the\s)?(?:final\s)?(?:answer|result)(?:\sis)?[*_\s]*[:：=]?[*_\s]*(.*)", re.I)
_LABELLED = re.compile(r"[*_\s]*[A-Za-z]+(?: [A-Za-z]+){0,3}[*_]*:[*_]*\s+(\S.*)")
_PHRASE = re.compile(
    r"(?:(?<![^\W_])(?:answer|réponse|reponse|antwort|respuesta|risposta|resposta|ответ)(?![^\W_])|答案|答え|正解|정답)[*_\s]{0,4}"
    r"(?:(?P<says>(?:is|are|was|would be|should be|must be|will be|est|ist|es|è|é)\b(?:[ \t]*(?:therefore|thus|then|simply|indeed|exactly)\b,?)?[ \t]*[:：]?|[是为は])|[:：=]|\n)[*_ \t]*",
    re.I,
)
# What of its sentence may stand before a mark whose value is below. "To find the answer:" leads to the working, and not to the value.
_BEFORE_MARK = re.compile(
    r"[\W\d_]*(?:(?:so|thus|therefore|hence|then|now|finally|and|in conclusion|in summary|here is|here's|here’s|this is|that is|below is),? ){0,2}"
    r"(?:(?:the|my|our|your|an?|la|el|le|il|die) )?(?:(?:final|correct|best|right|short|exact|full|complete|numerical|numeric|simplified|direct|brief|possible|sample|model|"
    r"endgültige|окончательный) ){0,2}(?:最终|最終|正确|因此|所以|최종)?[*_\s]*",
    re.I,
)
_CLAUSE = re.compile(r"[.!?:][*_]*\s")
_NO_VALUE = re.compile(
    r"(?:not|that|because|obvious|clear|unclear|given|found|therefore|correct|wrong|incorrect|right|in|as|to|one of|likely|probably|unknown|which|what|whether|when|how|if|of|"
    r"simple|easy|based|still|also|going|supposed|expected|should|must|will|would|could|can|cannot|i|we|it|this|let|so|now|then|first)\b",
    re.I,
)
_LAYOUT = re.compile(r"(?:[\s_>]|\*(?! )|-{2,}(?=\s)|(?:\\?\[|\${1,2})(?=[ \t]*\n))*")
_ITEM = re.compile(r"[ \t]*(?:[-*•]|[*_]*(?:(step )\d{1,2}[*_]*[.):]?|\d{1,2}[.)])[*_]*)[ \t]+(?=\S)", re.I)
_NUMBERED = re.compile(
    rf"(?:[1-9]|10)\. [*_]*(?!{STARTER}\b)[A-Z][\w'-]*(?: [\w'-]+){{0,3}}[*_]*"
)  # "1. Paris", in few words


class Box(NamedTuple):
    """A box's contents, where the box begins and ends in the text, and whether that is its end: without braces more may follow."""

    text: str
    start: int
    end: int
    is_whole: bool = True


def boxes(text: str) -> list[Box]:
    r"""Complete boxes that are not empty, by where their contents begin: `\boxed{...}`, `\fbox`, `\framebox`, `\boxed 5`."""
    return list(_boxes(text)[0])


@lru_cache(maxsize=8)  # several readers ask for those of one text
def _boxes(text: str) -> tuple[tuple[Box, ...], bool]:
    """Complete boxes, and whether one was opened and never closed."""
    if "box" not in text and "oxed" not in text:
        return (), False
    opened: list[tuple[int, int] | None] = []  # where each open box and its contents begin; None: a brace of no box
    found: list[Box] = []
    for brace in _BOX.finditer(text):
        mark = brace[0]
        if brace[1]:
            is_whole = text[brace.end() : brace.end() + 1] not in ("", "{")
            found.append(Box(brace[1].rstrip("."), brace.start(), brace.end(), is_whole))
        elif len(mark) > 1:
            opened.append((brace.start(), brace.end()))
        elif text[brace.start() - 1 : brace.start()] == "\\":
            continue  # `\{` is a sign, not a group
        elif mark == "{":
            opened.append(None)
        elif opened and (start := opened.pop()) is not None and (inner := text[start[1] : brace.start()].strip()):
            found.append(Box(inner, start[0], brace.end()))
    is_open = any(start is not None for start in opened)
    found.sort(key=lambda box: box.start)
    return tuple(found), is_open


def is_box_open(text: str) -> bool:
    """Whether a box was opened after the last complete one, and never closed."""
    found, is_open = _boxes(text)
    return is_open and not found


def find_boxed(text: str) -> Found | None:
    r"""The last box that is not empty; boxes with only "and", "or" or a comma between them are one list."""
    found = boxes(text)
    if not found:
        return None
    last = found[-1]
    parts, start = [last.text], last.start
    for box in reversed(found[-MAX_BOXES:-1]):
        if box.end > start or len(between := text[box.end : start]) > 40 or not _JOINT.fullmatch(between):
            break
        if box.text not in parts:
            parts.insert(0, box.text)
        start = box.start
    return Found(", ".join(parts), last.is_whole)


def find_hash(text: str) -> Found | None:
    """What follows the last `####` to the end of its line, or on the next line where nothing does; a heading is none."""
    for mark in reversed(list(_HASH.finditer(text))[-MAX_MARKS:]):
        line, new_line, rest = text[mark.end() : mark.end() + 2 * MAX_PHRASE_CHARS * 10].partition("\n")
        is_whole = bool(new_line)
        if (named := _ANSWER_HEADING.fullmatch(line)) is not None:
            line = named[1]
        if not line.strip("*_ \t:"):
            line, new_line, rest = rest.lstrip().partition("\n")
            is_whole = bool(new_line)
            if line.startswith("#") or not line.strip():
                continue
        value = _unlabelled(line, rest)
        if value is not None and (value := bare(value)):
            return Found(value, is_whole)
    return None


def _unlabelled(line: str, rest: str) -> str | None:
    """What a line after `####` answers; None where it is a heading of what follows."""
    words = re.findall(r"[^\W\d_]+", line[:200])
    if not words:
        return line if any(c.isalnum() for c in line) or not rest.strip() else None
    first = words[0].lower()
    if first in ("step", "part", "case", "phase", "section", "problem", "question", "example"):
        return None
    if labelled := _LABELLED.fullmatch(line):
        return labelled[1] if first in _HEADINGS else line
    if first in _HEADINGS or line.rstrip(" *_").endswith(":"):
        return None
    has_more = any(c.isalnum() for c in rest.partition("####")[0])
    if has_more and re.match(r"\s*[*_]*\d{1,2}[.)]\s+[*_]*[A-Za-z]", line):
        return None
    is_prose = len(words) > 1 and not re.search(r"[\d\\$=]", line) and (len(words) > 2 or first.endswith("ing"))
    return None if has_more and is_prose else line


def bare(value: str) -> str:
    """A value without the marks of emphasis around it, or the box."""
    value = value.strip()
    while len(value) > 4 and value[:2] == value[-2:] and value[:2] in ("**", "__") and value[:2] not in value[2:-2]:
        value = value[2:-2].strip()
    box = boxes(value)
    return box[-1].text if box and box[-1].end == len(value) and not value[: box[-1].start].strip("$ ") else value


def _number(item: re.Match[str]) -> int:
    """The number of an item of a list; 0 of a bullet."""
    return int(re.sub(r"\D", "", item[0]) or 0)


def _goes_on(text: str, item: re.Match[str]) -> bool:
    """Whether on the next line that says something the list goes on."""
    line_end = text.find("\n", item.end(), item.end() + MAX_PHRASE_CHARS)
    second = _ITEM.match(text[line_end : line_end + 40].lstrip("\n")) if line_end >= 0 else None
    return second is not None and _number(second) == (_number(item) + 1 if _number(item) else 0)


def _items(text: str) -> list[str]:
    """What the lines of a list say, to the end of the text; nothing where other words follow, or they are long."""
    lines = [line for line in text[: MAX_PHRASE_CHARS + 1].split("\n") if any(c.isalnum() for c in line)]
    items = [bare(line[item.end() :]) for line in lines if (item := _ITEM.match(line))]
    return items if len(items) == len(lines) and len(text.strip()) <= MAX_PHRASE_CHARS else []


def _is_alone(text: str, start: int) -> bool:
    """Whether a mark that begins at `start` is all that its line says, or the last sentence on it."""
    line_start = text.rfind("\n", max(0, start - MAX_LEAD_CHARS), start) + 1
    before = text[line_start or max(0, start - MAX_LEAD_CHARS - 1) : start]
    clause = _CLAUSE.split(before)
    is_begun = len(before) <= MAX_LEAD_CHARS or len(clause) > 1
    return is_begun and _BEFORE_MARK.fullmatch(clause[-1]) is not None


def find_phrase(text: str) -> Found | None:
    """What follows the last "the answer is", "Answer:" or the like, to the end of its sentence or line.

    On the lines below it counts where the mark has its line for itself. A list there is the answer, all of it, where the text ends
    in it; else it is the working.
    """
    for lead in reversed(list(_PHRASE.finditer(text))[-MAX_MARKS:]):
        at = lead.end()
        is_below = text[at : at + 1] in ("\n", "") or ("\n" in lead[0] and not lead["says"])
        if is_below:
            if not lead["says"] and not _is_alone(text, lead.start()):
                continue
            at = _LAYOUT.match(text, at).end()  # pyright: ignore[reportOptionalMemberAccess]
        item = _ITEM.match(text, at)
        if item and (is_below or _number(item)):
            if _goes_on(text, item):
                if items := _items(text[at:]):
                    return Found(", ".join(items), False)
                continue
            if _number(item) == 1 or item[1]:
                if is_below:
                    continue
            elif not _number(item):
                at = item.end()
        line = text[at : at + MAX_PHRASE_CHARS].partition("\n")[0]
        if not any(c.isalnum() for c in line) or line.startswith(("```", "~~~", "#")) or _NO_VALUE.match(line):
            continue
        is_option = not lead["says"] and _NUMBERED.fullmatch(line.rstrip())
        end = None if is_option else sentence_end(line)
        value = line[:end]
        value = re.sub(r"</?[A-Za-z][\w-]{0,40}>$", "", value.strip()).strip()
        for mark in ("**", "__"):
            value = value.removesuffix(mark).strip() if value.count(mark) % 2 else value
        if any(c.isalnum() for c in value) and len(line) < MAX_PHRASE_CHARS:
            return Found(bare(value), at + len(line) < len(text) or end is not None)
    return None
