"""What programs spent and saved: running totals, and the newest records by id."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(slots=True)
class Totals:
    """Counters of one scheduler since it started."""

    num_programs: int = 0
    num_certain: int = 0  # ended early by their rule
    num_expired: int = 0  # answered at their deadline
    num_aborted: int = 0
    num_branches: int = 0
    num_branches_saved: int = 0  # allowed by the caps, not used
    num_tokens: int = 0
    num_policy_errors: int = 0  # exceptions in our code that fell back to stock behaviour

    def add(self, record: dict[str, Any]) -> None:
        """Count a program that was answered."""
        self.num_programs += 1
        self.num_certain += record["stop_reason"] == "certain"
        self.num_expired += record["stop_reason"] == "deadline"
        self.num_branches += record["num_branches"]
        self.num_branches_saved += record["cap"] - record["num_branches"]
        self.num_tokens += record["num_tokens"]

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


class RecordBook:
    """The newest `size` records, found by request id or program id; older ones are forgotten."""

    def __init__(self, size: int = 10_000):
        self.size = size
        self._records: OrderedDict[str, dict[str, Any]] = OrderedDict()

    def keep(self, key: str, record: dict[str, Any]) -> None:
        """Store `record` under `key`, as the newest."""
        self._records[key] = record
        self._records.move_to_end(key)
        while len(self._records) > self.size:
            self._records.popitem(last=False)

    def find(self, key: str) -> dict[str, Any] | None:
        return self._records.get(key)

    def __len__(self) -> int:
        return len(self._records)
