"""Rows of a JSONL or CSV file, each value with the line and column where it stands."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from sglang_dynasor.errors import ConfigError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv")
_QUOTED = re.compile(r'"((?:[^"]|"")*+)"')
_BARE = re.compile(r"[^,\r\n]*")
_LINE_END = re.compile(r"\r\n|\r|\n")


@dataclass(frozen=True, slots=True)
class Row:
    """One object of JSONL or one record of CSV. `start` is where it begins; `places` is where each value, or its key, begins."""

    path: Path
    values: Mapping[str, Any]
    start: tuple[int, int]  # line and column, from 1
    places: Mapping[str, tuple[int, int]]

    def place(self, key: str | None = None) -> str:
        """Where `key` stands, as errors say it; without one, or one that it has not, the row."""
        line, column = self.places.get(key or "", self.start)
        return f"{self.path}, line {line}, column {column}"


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file in UTF-8, empty lines left out.

    Raises:
        ConfigError: it cannot be read, or is malformed; the message names line and column.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--questions={path} is neither JSONL nor CSV; let its name end with .jsonl or .csv")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--questions={path} cannot be read: {error.strerror}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        newline, before = b"\n", data[: error.start]
        line, column = before.count(newline) + 1, error.start - before.rfind(newline)
        raise ConfigError(f"{path}, line {line}, column {column} is no UTF-8; save the file as UTF-8") from None
    yield from _csv_rows(path, text) if path.suffix.lower() == ".csv" else _json_rows(path, text)


def _json_rows(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):  # a line of JSON may have other ends of lines in its strings
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{path}, line {number}, column {error.colno} is no JSON: {error.msg}; write one object a line"
            ) from None
        if not isinstance(found, dict):
            column = len(line) - len(line.lstrip()) + 1
            raise ConfigError(f"{path}, line {number}, column {column} is no JSON object; write one object a line")
        values = cast("dict[str, Any]", found)
        places = {key: (number, line.find(json.dumps(key, ensure_ascii=False)) + 1) for key in values}
        yield Row(path, values, (number, 1), places)


def _csv_rows(path: Path, text: str) -> Iterator[Row]:
    records = _records(path, text)
    header = [cell for cell, _ in next(records, [])]
    for record in records:
        if len(record) == 1 and not record[0][0]:
            continue
        if len(record) != len(header):
            line, column = record[min(len(record), len(header)) - 1][1]
            raise ConfigError(
                f"{path}, line {line}, column {column}: this record has {len(record)} cells, the header has {len(header)}"
            )
        values = {name: cell for name, (cell, _) in zip(header, record, strict=True)}
        places = {name: place for name, (_, place) in zip(header, record, strict=True)}
        yield Row(path, values, record[0][1], places)


def _records(path: Path, text: str) -> Iterator[list[tuple[str, tuple[int, int]]]]:
    """Cells with their places, record by record (RFC 4180)."""
    at, line, line_start = 0, 1, 0
    record: list[tuple[str, tuple[int, int]]] = []
    while at < len(text) or record:
        place = line, at - line_start + 1
        found = _QUOTED.match(text, at)
        if found is None and text[at : at + 1] == '"':
            raise ConfigError(f"{path}, line {place[0]}, column {place[1]}: the quote that opens here is never closed")
        cell = _BARE.match(text, at)[0] if found is None else found[1].replace('""', '"')  # type: ignore[index]
        for end in _LINE_END.finditer(found[0] if found else ""):
            line, line_start = line + 1, at + end.end()
        at = at + len(cell) if found is None else found.end()
        record.append((cell, place))
        if text[at : at + 1] == ",":
            at += 1
            continue
        end = _LINE_END.match(text, at)
        if end is None and at < len(text):
            raise ConfigError(
                f"{path}, line {line}, column {at - line_start + 1}: a quoted cell goes on after its closing quote; write "
                'a quote inside as ""'
            )
        yield record
        record = []
        if end is not None:
            at, line, line_start = end.end(), line + 1, end.end()
