"""The newest programs that finished, in order, and what all since the start spent and saved, by algorithm and tenant."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import asdict, dataclass
from typing import Any

from sglang_dynasor.observe.savings import saved_branches, saved_tokens

NEWEST = 200  # kept for who opens the page
MOST_TENANTS = 100  # with sums of their own; the others share one line
OTHERS = "(others)"
MOST_MOMENTS = 50  # of a list that grows with a program's tokens


@dataclass(slots=True)
class Sum:
    """Of the programs of one algorithm and tenant: those answered, and what all of them took, those that were given up too."""

    algorithm: str
    tenant: str
    num_programs: int = 0
    num_branches: int = 0
    num_branches_saved: int = 0
    num_tokens: int = 0
    num_saved_tokens: int = 0  # see savings.py, as the branches


class Recent:
    """What is remembered of finished programs; bounded, whatever clients send."""

    def __init__(self, size: int = NEWEST):
        self.size = size
        # By owner and program: its number, its row.
        self._newest: OrderedDict[tuple[str, str], tuple[int, dict[str, Any]]] = OrderedDict()
        self._num = 0
        self._sums: dict[tuple[str, str], Sum] = {}
        self._tenants: set[str] = set()

    def add(self, record: dict[str, Any], *, time_s: float, latency_s: float, owner: str = "") -> None:
        """Take in the record of a program that was answered. One of the client's own branches tells again of its program."""
        self._num += 1
        saved = saved_tokens(record)
        row = {**record, "time_s": time_s, "latency_s": latency_s, "num_saved_tokens": saved, "owner": owner or None}
        key = owner, record["program"]
        self._newest[key] = self._num, row
        self._newest.move_to_end(key)
        while len(self._newest) > self.size:
            self._newest.popitem(last=False)
        if "num_tokens" in record and "index" not in record:
            self._count(record, saved)

    def _count(self, record: dict[str, Any], num_saved_tokens: int) -> None:
        tenant = record.get("tenant", "")
        if tenant not in self._tenants:
            if len(self._tenants) < MOST_TENANTS:
                self._tenants.add(tenant)
            else:
                tenant = OTHERS
        algorithm = record["algorithm"]
        sums = self._sums.setdefault((algorithm, tenant), Sum(algorithm, tenant))
        sums.num_programs += record["stop_reason"] != "aborted"
        sums.num_branches += record["num_branches"]
        sums.num_branches_saved += saved_branches(record)
        sums.num_tokens += record["num_tokens"]
        sums.num_saved_tokens += num_saved_tokens

    def sums(self) -> list[dict[str, Any]]:
        """One for each algorithm and tenant."""
        return [asdict(sums) for sums in self._sums.values()]

    def since(self, number: int) -> tuple[int, list[dict[str, Any]]]:
        """The number of the newest, and the rows of those kept that came after `number`, the newest last; 0: all."""
        rows: list[dict[str, Any]] = []
        for num, row in reversed(self._newest.values()):
            if num <= number:
                break
            rows.append(_short(row))
        return self._num, rows[::-1]


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """Without what grows with a program's tokens."""
    short = {key: value for key, value in row.items() if key != "asked_at_tokens"}
    return short | {key: short[key][-MOST_MOMENTS:] for key in ("trials", "shares") if key in short}
