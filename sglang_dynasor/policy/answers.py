"""What a branch answered: extraction from its text.

Everything here runs in the scheduler's loop on every finished branch, so the work is bounded: at most TAIL_CHARS characters
are read (JSON and code: structured.READ_CHARS), expressions are linear, and a client's pattern has a bound of its own
(pattern.py). docs/answers.md says what each extractor reads and when it abstains.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

from sglang_dynasor.errors import FieldError, quoted
from sglang_dynasor.policy.choice import find_choice, find_yes_no
from sglang_dynasor.policy.found import TAIL_CHARS, Found
from sglang_dynasor.policy.marks import find_boxed, find_hash, find_phrase, is_box_open
from sglang_dynasor.policy.number import find_number, first_number
from sglang_dynasor.policy.pattern import check_pattern, find_pattern
from sglang_dynasor.policy.structured import (
    MAX_PATH_CHARS,
    READ_CHARS,
    blocks,
    dump,
    find_calls,
    find_code,
    find_json,
    find_tag,
    is_tag,
    values,
)

MAX_SHOWN_CHARS = 256  # of an answer in a record
MAX_LEAD_CHARS = 256
BEGUN_CHARS = 256  # of a text that are read behind the prompt's line, for an answer that begins there
MAX_RUNS = 4  # questions of its own that a branch goes on with
THINK_ENDS = ("</think>", "</thinking>", "[/THINK]", "<|end_of_thought|>", "</seed:think>")
THINK_STARTS = ("<think>", "<thinking>", "[THINK]", "<|begin_of_thought|>", "<seed:think>")
_SPECIAL = r"(?:<[|｜][^|｜<>\s]{1,40}[|｜]>|</?s>|<[be]os>|<pad>|<(?:start|end)_of_turn>|\[/?INST\])"
_FINAL_SPECIAL = re.compile(f"{_SPECIAL}$")
_LAST_SPECIAL = re.compile(f".*{_SPECIAL}")
_RUN_ON = re.compile(r"\n[ \t]*\n[ \t]*(?:Q|Question|Problem|Human|User)[ \t]*\d{0,4}[ \t]*:", re.I)
_PLEASANTRY = re.compile(
    r"[\s*_>]*(?:let me know|(?:i )?hope (?:this|that|it)|i hope|feel free|if you (?:have|need|want|would|'d)|please (?:let|feel)|thank(?:s| you)|happy to|glad to|good luck|is there anything|"
    r"do you (?:have|need|want)|would you like|have a (?:great|nice|good)|you(?:'|’)re welcome|enjoy|best regards|cheers|any (?:other|more|further) questions)\b",
    re.I,
)
_NO_ANSWER = re.compile(r"[ \t]*(?:#{1,6}[ \t].*|```.*|~~~.*|</?[A-Za-z][\w-]*>|\\(?:begin|end)\{[a-z*]*\})[ \t]*")
_ITEM = re.compile(r"^(?:[-*•>]\s+)+")
_TAG_END = re.compile(r"</[A-Za-z][\w-]{0,40}>$")


def _last_line(text: str) -> Found | None:
    """The last line with a letter or digit."""
    return _line(text, is_plain=True)


def _line(text: str, *, is_plain: bool) -> Found | None:
    """The last line that could be an answer; of a plain text any with a letter or digit."""
    end = len(text)
    for line in reversed(text.split("\n")):
        is_whole, end = end < len(text), end - len(line) - 1
        if not any(c.isalnum() for c in line):
            continue
        if is_plain:
            return Found(line.strip(), is_whole)
        if not _NO_ANSWER.fullmatch(line) and not _PLEASANTRY.match(line):
            value = _ITEM.sub("", line.strip())
            while tag := _TAG_END.search(value, max(0, len(value) - 48)):
                value = value[: tag.start()].rstrip()
            if value.rstrip("*_ ").endswith((":", "：")):
                return None  # it announces what did not come
            if any(c.isalnum() for c in value):
                return Found(value, is_whole)
    return None


def _auto(text: str) -> Found | None:
    """The first that is there of: box, `####`, `<answer>`, JSON at the end, "the answer is", code at the end, last line."""
    return _marked(text) or _unmarked(text)


def _marked(text: str) -> Found | None:
    """What a mark announces."""
    if found := find_boxed(text) or find_hash(text):
        return found
    if is_box_open(text):
        return None
    return find_tag(text, "answer") or _final_json(text) or find_phrase(text) or _final_code(text)


def _unmarked(text: str) -> Found | None:
    """The last line, unless the text ends in the middle of a box, of a block of code or of JSON."""
    if is_box_open(text) or _is_block_open(text) or re.match(r"\s*(?:```\w*\s*)?\{\s*\"", text):
        return None
    found = _line(text, is_plain=False)
    return None if found is None else Found(found.text, False)


def _is_block_open(text: str) -> bool:
    closed = blocks(text)
    return "\n```" in f"\n{text[closed[-1][2] if closed else 0 :]}"


def _is_end(text: str, end: int) -> bool:
    """Whether after `end` nothing is said: fences, tags and closing lines only."""
    return all(
        not any(c.isalnum() for c in line) or _NO_ANSWER.fullmatch(line) or _PLEASANTRY.match(line)
        for line in text[end:].split("\n")
    )


def _final_json(text: str) -> Found | None:
    """The object that the text ends in: what stands at its key `answer` or `final_answer`, else all of it."""
    if "{" not in text:
        return None
    for value, end in values(text):
        if not isinstance(value, dict) or not _is_end(text, end):
            return None
        answer = next(
            (
                inner
                for key, inner in value.items()
                if key.lower() in ("answer", "final_answer", "final answer") and inner is not None
            ),
            value,
        )  # pyright: ignore
        return Found(dump(answer), True)
    return None


def _final_code(text: str) -> Found | None:
    """The block of code that the text ends in."""
    closed = blocks(text)
    if closed and closed[-1][1].strip() and _is_end(text, closed[-1][2]):
        return Found(closed[-1][1].strip("\n").rstrip(), True)
    return None


def _code(text: str) -> Found | None:
    """The last block of code between fences that defines something, else the last."""
    return find_code(text)


def _json(text: str) -> Found | None:
    """The last JSON object or array, fenced or not; keys in any order."""
    return find_json(text)


def _calls(text: str) -> Found | None:
    """The calls of tools: name and arguments, keys in any order."""
    return find_calls(text)


EXTRACTORS: dict[str, Callable[[str], Found | None]] = {
    "auto": _auto,
    "hash": find_hash,
    "boxed": find_boxed,
    "choice": find_choice,
    "number": find_number,
    "last_line": _last_line,
    "yes_no": find_yes_no,
    "json": _json,
    "tool_call": _calls,
    "code": _code,
}
# Those that take something after a colon.
FORMS = {
    "json:PATH": "What stands at PATH in the last JSON value that has it: keys and places with points between them, such as `items.0.name`.",
    "tool_call:-KEY,-KEY": "The calls of tools without the arguments of these names.",
    "tag:NAME": "What stands in the last `<NAME>...</NAME>` that is not empty.",
    "code:python": "The last block of Python between fences that defines something, else the last; equal where it compiles to the same.",
    "regex:PATTERN": "Of the line that matches last, the last match's first group, or the whole match. RE2 syntax, up to 256 characters.",
}
_LONG = ("json", "tool_call", "code")
_OPENINGS = ("{", "[", "<", "```", "~~~")  # of what those read
_SHORT = ("choice", "number", "yes_no", "last_line")
_RUNNING = ("hash", "boxed", "choice", "number")
_MARKS = {"hash": ("####",), "boxed": ("\\boxed{",), "auto": ("####", "\\boxed{")}


def check_extractor(extractor: str) -> None:
    """Raise FieldError unless `extractor` is a name in EXTRACTORS, or one of FORMS with a value that is allowed."""
    if extractor in EXTRACTORS:
        return
    kind, sep, rest = extractor.partition(":")
    form = next((form for form in FORMS if form.startswith(f"{kind}:")), None) if sep else None
    if form is None:
        raise FieldError(
            f"dynasor.answer={quoted(extractor)} is not an extractor; use one of {', '.join(EXTRACTORS)}, "
            + ", ".join(f"'{form}'" for form in FORMS)
        )
    if kind == "regex":
        check_pattern(rest)
        return
    keys = _left_out(rest)
    is_right = {
        "json": 0 < len(rest) <= MAX_PATH_CHARS and all(rest.split(".")),
        "tool_call": len(rest) <= MAX_PATH_CHARS and bool(keys) and all(keys),
        "tag": is_tag(rest),
        "code": rest == "python",
    }[kind]
    if not is_right:
        raise FieldError(
            f"dynasor.answer={quoted(extractor)} is no '{form}'; write it as there, such as {_EXAMPLES[kind]!r}"
        )


_EXAMPLES = {"json": "json:answer", "tool_call": "tool_call:-id", "tag": "tag:answer", "code": "code:python"}


def _left_out(rest: str) -> frozenset[str]:
    return frozenset(part.strip()[1:] if part.strip()[:1] == "-" else "" for part in rest.split(","))


def answer_marks(extractor: str) -> tuple[str, ...]:
    """What stands right before an answer that `extractor` finds; empty where nothing tells that an answer begins."""
    return _MARKS.get(extractor, ())


def _may_think(text: str) -> bool:
    """Whether a mark of a thought could be in a text: mostly none is, and each is looked for often."""
    return "<" in text or "[" in text


def opens_thought(lead: str) -> bool:
    """Whether what comes after `lead` is a thought: some chat templates begin it."""
    return lead.rstrip().endswith(THINK_STARTS)


def is_thinking(lead: str, text: str) -> bool:
    """Whether `text`, after `lead`, ends inside a thought."""
    end = _thought_end(text)
    return (not end and opens_thought(lead)) or _reopens(text, end)


def _reopens(text: str, end: int) -> bool:
    """Whether a thought begins at `end` or later."""
    return _may_think(text) and any(text.rfind(mark) >= end for mark in THINK_STARTS)


def thinks_on(text: str, end: str = "") -> bool:
    """Whether a text goes on thinking after its first thought was closed, by `end` or a known mark: another begins or ends."""
    ends = (end,) if end else THINK_ENDS
    first = min((text.find(mark) + len(mark) for mark in ends if mark in text), default=0)
    return first > 0 and any(mark in text[first:] for mark in (*THINK_STARTS, *THINK_ENDS, *ends))


def _thought_end(text: str) -> int:
    """Where what was said after the last thought begins; 0 where none was closed."""
    if not _may_think(text):
        return 0
    return max(text.rfind(mark) + len(mark) if mark in text else 0 for mark in THINK_ENDS)


def _said(text: str) -> str:
    """What was said after the last thought; nothing where a thought goes on. Special tokens at the end are left out."""
    end = _thought_end(text)
    if _reopens(text, end):
        return ""
    said = text[max(end, len(text) - READ_CHARS) :].rstrip()
    while special := _FINAL_SPECIAL.search(said, max(0, len(said) - 48)):
        said = said[: special.start()].rstrip()
    return said if len(said) < len(text[end:].rstrip()) else text[max(end, len(text) - READ_CHARS) :]


def _find(text: str, extractor: str) -> Found | None:
    kind, _, rest = extractor.partition(":")
    text = text if kind in _LONG else text[-TAIL_CHARS:]
    if kind in _RUNNING or kind == "auto":
        find = _marked if kind == "auto" else EXTRACTORS[kind]
        for run in list(_RUN_ON.finditer(text))[:MAX_RUNS]:
            if found := find(text[: run.start()]):
                return Found(found.text, True)
    if not rest:
        return EXTRACTORS[kind](text)
    match kind:
        case "json":
            return find_json(text, rest)
        case "tool_call":
            return find_calls(text, _left_out(rest))
        case "tag":
            return find_tag(text, rest)
        case "code":
            return find_code(text, rest)
        case _:
            return find_pattern(text, rest)


def extract_answer(text: str, extractor: str, *, is_cut: bool = False) -> str | None:
    """The answer in `text`, as written; None where there is none (an abstention).

    Args:
        text: what a branch generated. What stands before the end of a thought is no answer.
        extractor: as `check_extractor` takes it.
        is_cut: whether the branch ended by its length: then only an answer counts whose end a mark tells.

    Returns:
        The answer without surrounding white space, all of it; None if empty or not found.
    """
    said = _said(text)
    if is_cut and extractor == "number":  # the last number of what goes on is any number: only a marked one counts
        marked = _find(said, "auto")
        said = marked.text if marked is not None and marked.is_whole else ""
        is_cut = False
    found = _find(said, extractor) if said.strip() else None
    if found is None or (is_cut and not found.is_whole):
        return None
    return found.text.strip() or None


def read_answer(lead: str, text: str, extractor: str, *, is_cut: bool = False) -> str | None:
    r"""The answer in `text`, or else one that begins on the line before it: a prompt may end with `\boxed{`.

    Args:
        lead: what stands before `text`. Of it only the end of the last line is read, after any special token, and no answer of
            its own counts. Where it begins a thought, `text` has an answer only after that was closed.
        is_cut: as in `extract_answer`.
    """
    if is_thinking(lead, text):
        return None
    begun = _begun_line(lead)
    if extractor == "auto" and begun:  # its last line is there in any text
        return (
            _begun(begun, text, "boxed", is_cut) or _begun(begun, text, "hash", is_cut) or _phrased(begun, text, is_cut)
        )
    return _begun(begun, text, extractor, is_cut)


@lru_cache(maxsize=64)
def _begun_line(lead: str) -> str:
    """What of the line that `lead` ends in may begin an answer. All branches of a program have one lead."""
    return "" if opens_thought(lead) else _LAST_SPECIAL.sub("", lead.rpartition("\n")[2][-MAX_LEAD_CHARS:])


def _begun(begun: str, text: str, extractor: str, is_cut: bool) -> str | None:
    found = extract_answer(text, extractor, is_cut=is_cut)
    is_long = extractor.partition(":")[0] in _LONG
    may_begin = any(mark in begun for mark in _OPENINGS) if is_long else bool(begun)
    if found is None and may_begin and not any(mark in text for mark in THINK_ENDS):
        first = text[:BEGUN_CHARS] if extractor in _SHORT else text
        whole = extract_answer(begun + first, extractor, is_cut=is_cut)
        found = None if whole == extract_answer(begun, extractor) else whole
    return found


def _phrased(begun: str, text: str, is_cut: bool) -> str | None:
    found = _marked(begun + text[:BEGUN_CHARS]) if not any(mark in text for mark in THINK_ENDS) else None
    if (
        found is not None
        and not (is_cut and not found.is_whole)
        and found != _marked(begun)
        and _marked(text[-TAIL_CHARS:]) is None
    ):
        return found.text.strip() or None
    return extract_answer(text, "auto", is_cut=is_cut)


def shown(answer: str | None) -> str | None:
    """An answer as a record has it: the first MAX_SHOWN_CHARS characters."""
    return answer if answer is None or len(answer) <= MAX_SHOWN_CHARS else answer[: MAX_SHOWN_CHARS - 3] + "..."


def is_complete(lead: str, text: str, extractor: str) -> bool:
    """Whether the answer that `text` gives after `lead` has come to its end: its mark is closed, its number or its line is over."""
    kind = extractor.partition(":")[0]
    if kind == "boxed" or (kind == "auto" and "\\boxed{" in lead + text):
        return (box := find_boxed(lead + text)) is not None and box.is_whole
    if kind in ("choice", "yes_no", "tag", "code", "json", "tool_call"):
        return _find(lead + text, extractor) is not None
    if kind == "number" and (number := first_number(lead + text, len(lead))) is not None and number.is_whole:
        return True
    return "\n" in text.lstrip()
