"""What a log says: read line by line and added up. Memory is bounded by what is shown, whatever the log is."""

from __future__ import annotations

import os
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from heapq import heappush, heappushpop
from pathlib import Path
from typing import BinaryIO

from sglang_dynasor.observe.advice import Advice, Kind, Seen, advice
from sglang_dynasor.observe.entry import Entry, entry_of
from sglang_dynasor.observe.line import VERSION, read_line
from sglang_dynasor.observe.log import NUM_OLDER
from sglang_dynasor.observe.spread import Spread

MOST_LINE_BYTES = 16 << 20
MOST_LABELS = 100  # of a group: templates, tenants, ...; the others share a line
MOST_KINDS = 200  # of settings that are looked at for suggestions
MOST_OPEN = 10_000  # programs whose branches a client sends, of which a line may still come
NUM_SHOWN = 20  # of the slowest, and of the least certain
OTHERS = "(others)"
NONE = "(none)"
GROUPS = ("algorithm", "template", "tenant", "owner", "model", "endpoint")


@dataclass(slots=True)
class Sum:
    """What the programs of one group took and saved."""

    outcomes: Counter[str] = field(default_factory=Counter[str])
    tokens: Counter[str] = field(default_factory=Counter[str])  # generated, by outcome
    num_branches: int = 0
    cap: int = 0
    num_branches_saved: int = 0
    num_tokens_saved: int = 0  # an estimate
    num_extra_tokens: int = 0
    num_prompt_tokens: int = 0
    num_client_s: int = 0  # programs whose branches clients send
    seconds: Spread = field(default_factory=Spread)
    certaindex: Spread = field(default_factory=Spread)  # of those that were answered

    @property
    def num_programs(self) -> int:
        return self.outcomes.total()

    @property
    def num_tokens(self) -> int:
        return self.tokens.total()

    def add(self, entry: Entry) -> None:
        self.outcomes[entry.outcome] += 1
        self.tokens[entry.outcome] += entry.num_tokens
        self.num_branches += entry.num_branches
        self.cap += entry.cap
        self.num_branches_saved += entry.saved_branches
        self.num_tokens_saved += entry.saved_tokens
        self.num_extra_tokens += entry.num_extra_tokens
        self.num_prompt_tokens += entry.prompt_tokens
        self.num_client_s += entry.is_client_s
        if entry.took_s is not None:
            self.seconds.add(entry.took_s)
        if entry.is_answered and entry.certaindex is not None:
            self.certaindex.add(entry.certaindex)


class Newest:
    """The entries of the largest keys, so many."""

    def __init__(self, size: int = NUM_SHOWN):
        self.size = size
        self._heap: list[tuple[tuple[float, ...], int, Entry]] = []
        self._num = 0

    def add(self, key: tuple[float, ...], entry: Entry) -> None:
        self._num += 1
        item = (key, -self._num, entry)  # of equal ones the first
        if len(self._heap) < self.size:
            heappush(self._heap, item)
        else:
            heappushpop(self._heap, item)

    def entries(self) -> list[Entry]:
        """The largest first."""
        return [entry for _, _, entry in sorted(self._heap, key=lambda item: item[:2], reverse=True)]


class Report:
    """All that is shown of a log."""

    def __init__(self) -> None:
        self.all = Sum()
        self.groups: dict[str, dict[str, Sum]] = {name: {} for name in GROUPS}
        self.slowest = Newest()
        self.unsurest = Newest()
        self.first_at = self.last_at = 0.0  # Unix time; 0: no line says any
        self.num_lines = 0
        self.num_unreadable = 0  # cut, or none of ours
        self.num_unknown = 0  # of a version that this program does not know
        self.num_unlooked = 0  # programs beyond MOST_KINDS
        self._kinds: dict[Kind, Seen] = {}
        self._open: OrderedDict[tuple[str, str, str], Entry] = OrderedDict()

    def read(self, lines: Iterable[bytes]) -> None:
        """Take in the lines of one file. One that is empty is none."""
        for text in lines:
            if not text.strip():
                continue
            self.num_lines += 1
            line = read_line(text)
            version = 0 if line is None else line.get("v", 0)
            if line is None:
                self.num_unreadable += 1
            elif isinstance(version, bool) or not isinstance(version, int) or not 0 <= version <= VERSION:
                self.num_unknown += 1
            else:
                try:
                    self.add(entry_of(line))
                except ValueError:
                    self.num_unreadable += 1

    def add(self, entry: Entry) -> None:
        """Take in one line. Of a program whose branches a client sends the last counts: it tells of all before."""
        if not entry.is_client_s:
            self._count(entry)
            return
        key = entry.program, entry.tenant, entry.owner
        before = self._open.pop(key, None)
        if before is not None and before.num_tokens > entry.num_tokens:  # the id has been used again
            self._count(before)
        elif before is not None and before.arrived_at is not None and entry.at is not None:
            entry.arrived_at = before.arrived_at
            entry.took_s = max(0.0, entry.at - before.arrived_at)
        self._open[key] = entry
        if len(self._open) > MOST_OPEN:
            self._count(self._open.popitem(last=False)[1])

    def close(self) -> None:
        """All has been read."""
        while self._open:
            self._count(self._open.popitem(last=False)[1])

    def _count(self, entry: Entry) -> None:
        self.all.add(entry)
        for name, group in self.groups.items():
            label: str = getattr(entry, name) or NONE
            if label not in group and len(group) >= MOST_LABELS:
                label = OTHERS
            group.setdefault(label, Sum()).add(entry)
        if entry.took_s is not None:
            self.slowest.add((entry.took_s,), entry)
        if entry.is_answered and entry.certaindex is not None:
            self.unsurest.add((-entry.certaindex, entry.num_tokens), entry)
        if entry.at is not None:
            self.first_at = min(self.first_at or entry.at, entry.at)
            self.last_at = max(self.last_at, entry.at)
        kind = Kind(entry.template, entry.algorithm, entry.stop_rule, entry.extractor, entry.equal, entry.cap)
        if kind in self._kinds or len(self._kinds) < MOST_KINDS:
            self._kinds.setdefault(kind, Seen()).add(entry)
        else:
            self.num_unlooked += 1

    def advice(self) -> list[Advice]:
        """What to change, what takes most tokens first."""
        found = [each for kind, seen in self._kinds.items() for each in advice(kind, seen)]
        return sorted(found, key=lambda each: -each.num_tokens)


def lines_of(path: Path) -> Iterator[bytes]:
    """The lines of a file; one that is longer than any of ours comes as its beginning, which is no line.

    Raises:
        OSError: the file is not there, or cannot be read.
    """
    return _lines(path.open("rb"))  # now: a log that is renamed meanwhile is still read once


def _lines(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while text := file.readline(MOST_LINE_BYTES):
            yield text
            while len(text) == MOST_LINE_BYTES and not text.endswith(b"\n"):
                text = file.readline(MOST_LINE_BYTES)


def with_older(path: Path) -> list[Path]:
    """A log and those that it became before (FILE.1, FILE.2, ...) where they are there, the oldest first."""
    base = os.path.realpath(path) if path.is_symlink() else path
    older = [Path(f"{base}.{number}") for number in range(NUM_OLDER, 0, -1)]
    return [*(file for file in older if file.is_file()), path]
