"""Answers with a form of their own: JSON, calls of tools, tags, blocks of code."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, cast

from sglang_dynasor.policy.found import Found

READ_CHARS = 16_384  # of a text that are read for JSON, a call or code
MAX_DEPTH = 48  # of JSON
MAX_MARKS = 6144  # brackets, quotes and the like that are looked at for JSON, about; what JSON of READ_CHARS may have
MAX_VALUES = 8  # JSON values of a text that are looked at, the last ones
MAX_PATH_CHARS = 128
_BRACKET = re.compile(r"[{}\[\]]")
_MARKS = '"\\{}[]\n'
_DEFINES = re.compile(r"^(?:export )?(?:async )?(?:def|class|function|fn|func)[ \t]+\w", re.M)
_FENCE = re.compile(r"^[ \t]*(```+|~~~+)[ \t]*([\w+#.-]*)[^\n`]*$", re.M)
_TAG_NAME = re.compile(r"[A-Za-z][\w.-]{0,63}")
_ARGUMENTS = ("arguments", "parameters", "args", "input")


def is_tag(name: str) -> bool:
    """Whether a tag may be called so."""
    return _TAG_NAME.fullmatch(name) is not None


def find_tag(text: str, name: str) -> Found | None:
    """What stands in the last `<NAME>...</NAME>` that is not empty."""
    found = None
    for match in re.finditer(
        rf"<{re.escape(name)}(?:\s[^<>]*)?>([^<]*+(?:<(?!/?{re.escape(name)}[\s>])[^<]*+)*+)</{re.escape(name)}\s*>",
        text,
        re.I,
    ):
        found = match[1].strip() or found
    return None if found is None else Found(found, True)


@lru_cache(maxsize=8)  # several readers ask for those of one text
def blocks(text: str) -> tuple[tuple[str, str, int], ...]:
    """Fenced blocks in order: language, contents, and where each ends; one that is never closed is none."""
    found: list[tuple[str, str, int]] = []
    opened: re.Match[str] | None = None
    for fence in _FENCE.finditer(text):
        if opened is None:
            opened = fence
        elif fence[1].startswith(opened[1]) and not fence[2]:
            found.append((opened[2].lower(), text[opened.end() + 1 : fence.start()], fence.end()))
            opened = None
    return tuple(found)


def find_code(text: str, language: str = "") -> Found | None:
    """The last fenced block that defines a function or class, else the last that is not empty; with `language`, of that or of none.

    After a function models show how it is called, or what it prints.
    """
    names = {"": None, "python": ("", "python", "py", "python3")}[language]
    codes = [code for name, code, _ in blocks(text[-READ_CHARS:]) if code.strip() and (names is None or name in names)]
    defining = next((code for code in reversed(codes) if _DEFINES.search(code)), None)
    code = defining or next(reversed(codes), None)
    return None if code is None else Found(code.strip("\n").rstrip(), True)


def parse(text: str) -> Any:
    """The JSON value that is all of `text`.

    Raises:
        ValueError: it is none, or is too deep.
    """
    try:
        return json.loads(text, parse_float=_float)
    except RecursionError:
        raise ValueError("too deep") from None


def _float(text: str) -> float | int:
    value = float(text)
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def values(text: str) -> Iterator[tuple[Any, int]]:
    """JSON objects and arrays in `text` with where they end, the last one first: all of it, or fenced, or between words."""
    tail = text[-READ_CHARS:]
    if (num_marks := sum(map(tail.count, _MARKS))) > MAX_MARKS:
        tail = tail[-(len(tail) * MAX_MARKS // num_marks) :]
    lead = len(text) - len(tail)
    for start, end in reversed(_regions(tail)[-MAX_VALUES:]):
        try:
            yield parse(tail[start:end]), lead + end
        except ValueError:
            continue


def _regions(text: str) -> list[tuple[int, int]]:
    """Where brackets open and close, the outermost ones."""
    depth = start = 0
    is_text = False
    found: list[tuple[int, int]] = []
    for bracket in re.finditer(r'\\.|["{}\[\]\n]', text, re.S):
        mark = bracket[0]
        if mark == "\n":
            is_text = False  # no string of JSON goes over a line: a quote in prose does not hide what follows
        elif mark == '"':
            is_text = not is_text and depth > 0
        elif is_text or mark[0] == "\\":
            continue
        elif mark in "{[":
            start = start if depth else bracket.start()
            depth += 1
        elif depth:
            depth -= 1
            if not depth:
                found.append((start, bracket.end()))
    return found


def dump(value: Any) -> str:
    """The canonical JSON of a value: keys in order, no white space; a string is itself."""
    if isinstance(value, str):
        return value
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def find_json(text: str, path: str = "") -> Found | None:
    """The last JSON object or array, canonical; with `path`, what stands there in the last that has it."""
    try:
        whole = parse(text)
    except ValueError:
        pass
    else:
        if isinstance(whole, dict | list) or not path:
            value = at_path(whole, path)
            is_number = isinstance(whole, int | float) and not isinstance(whole, bool)  # digits may follow digits
            return None if value is None else Found(dump(value), not is_number or text[-1:].isspace())
    for value, _ in values(text):
        if (inner := at_path(value, path)) is not None:
            return Found(dump(inner), True)
    return None


def at_path(value: Any, path: str) -> Any:
    """What stands at `path`, keys and places in arrays with points between them; None where nothing does."""
    for key in path.split(".") if path else ():
        if isinstance(value, dict):
            value = cast("dict[str, Any]", value).get(key)
        elif isinstance(value, list) and key.isdigit() and len(key) < 6 and int(key) < len(cast("list[Any]", value)):
            value = cast("list[Any]", value)[int(key)]
        else:
            return None
    return value


def find_calls(text: str, left_out: frozenset[str] = frozenset()) -> Found | None:
    """The calls of tools, canonical: name and arguments, without the arguments called as in `left_out`."""
    calls = [
        _call(name, dict(_named(inner, "parameter")), left_out)
        for name, inner in _named(text[-READ_CHARS:], "function")
    ]
    for value, _ in reversed(list(values(text))) if not calls else ():
        items = cast("list[Any]", value) if isinstance(value, list) else [value]
        calls += [call for item in items if (call := _read_call(item, left_out)) is not None]
    if not calls:
        return None
    return Found(dump(calls[0] if len(calls) == 1 else calls), True)


def _named(text: str, kind: str) -> Iterator[tuple[str, str]]:
    """Names and contents of `<KIND=NAME>...</KIND>`, as some models write a call."""
    at = 0
    while (start := text.find(f"<{kind}=", at)) >= 0 and (end := text.find(f"</{kind}>", start)) >= 0:
        name, closes, inner = text[start + len(kind) + 2 : end].partition(">")
        at = end + len(kind) + 3
        if closes and 0 < len(name) <= MAX_PATH_CHARS:
            yield name, inner.strip("\n")


def _read_call(value: Any, left_out: frozenset[str]) -> dict[str, Any] | None:
    """A call in one of the ways that models write it: {"name", "arguments"}, or that under "function"."""
    if not isinstance(value, dict):
        return None
    call = cast("dict[str, Any]", value)
    if isinstance(call.get("function"), dict):
        call = call["function"]
    key = next((key for key in _ARGUMENTS if key in call), None)
    if not isinstance(call.get("name"), str) or key is None:
        return None
    arguments = call[key]
    if isinstance(arguments, str):
        try:
            arguments = parse(arguments)
        except ValueError:
            return None
    return _call(call["name"], arguments, left_out)


def _call(name: str, arguments: Any, left_out: frozenset[str]) -> dict[str, Any]:
    if isinstance(arguments, dict):
        arguments = {key: value for key, value in cast("dict[str, Any]", arguments).items() if key not in left_out}
    return {"name": name, "arguments": arguments}
