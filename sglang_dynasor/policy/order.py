"""The line that waiting programs stand in: shortest remaining first, within a bound on being overtaken.

Pure policy: it knows no engine. The bound is in docs/waiting.md, its proof in docs/waiting_proof.md.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from itertools import count
from math import inf
from typing import Any, NamedTuple

from sglang_dynasor.policy.line import ONE_BRANCH, Line, Need, Ticket

MOST_IDLE = 4096  # tenants remembered while they have nothing here
MOST_SKIPPED = 8  # programs tried in one look that do not fit: bounds the look, not the wait (docs/waiting_proof.md)


Entry = tuple[int, float, int, Line]  # of a heap of lines: by rank, then by counter; ties by number


class Plain(NamedTuple):
    """Requests waiting that are no programs: SGLang orders them among themselves, here they are one party."""

    line: Line
    first_arrival: int  # of the one that SGLang would admit first
    expected_tokens: float


class Order:
    """Every tenant's line. Tenants share service by weight; within a tenant the shortest remaining program goes first,
    unless later arrivals of that tenant have got `patience_tokens` while the oldest waits: then the oldest does.

    Where requests have priorities each rank has lines of its own, and nobody goes while one of a lesser rank waits.

    Source of the counters between tenants: VTC, https://arxiv.org/abs/2401.00588.
    """

    def __init__(self, patience_tokens: int, weights: Mapping[str, float] | None = None):
        self.patience_tokens = patience_tokens
        self.weights = dict(weights or {})
        self.lines: dict[str | tuple[int, str], Line] = {}  # by tenant; but for rank 0 by rank and tenant
        self.least_served: list[Entry] = []  # heap of lines that wait; stale entries are void
        self.most_served: list[Entry] = []  # the same by falling counter
        self.floors: dict[int, float] = {}  # by rank: the least-served tenant's counter at the last look; never falls
        self._num_forgotten = 0  # arrivals that lines had given out which are forgotten
        self.num_waiting = 0
        self.needed = Need(0)  # by all who wait
        self.num_alive = 0
        self._turns = count(1)
        self._numbers = count()

    def line(self, tenant: str, rank: int = 0) -> Line:
        """The tenant's line. A tenant that was idle starts level with the least-served one: idling saves up nothing."""
        name = (rank, tenant) if rank else tenant
        line = self.lines.get(name)
        if line is None:
            self._forget_idle()
            line = self.lines[name] = Line(tenant, self.weights.get(tenant, 1.0), next(self._numbers), rank)
            line.num_arrivals = self._num_forgotten
        if not line.alive:
            line.counter = max(line.counter, self.floors.get(rank, 0.0))
        return line

    @property
    def urgent_rank(self) -> float:
        """The least rank of a program that waits; infinite where none does."""
        line = _first_valid(self.least_served, 1)
        return inf if line is None else line.rank

    def arrive(self, tenant: str, owner: Any, rank: int = 0) -> Ticket:
        """A program has come. It does not wait yet."""
        line = self.line(tenant, rank)
        ticket = Ticket(line, line.arrive(), owner)
        line.alive[ticket.arrival] = ticket
        self.num_alive += 1
        return ticket

    def wait(self, ticket: Ticket, remaining_tokens: float, need: Need = ONE_BRANCH) -> None:
        """Stand in line, or move to another place in it. O(log n)."""
        line = ticket.line
        if ticket.is_waiting:
            self._need(ticket.need, -1)
        else:
            ticket.is_waiting = True
            line.num_waiting += 1
            self.num_waiting += 1
            if line.num_waiting == 1:
                self._push_line(line)
        ticket.turn = next(self._turns)
        ticket.remaining_tokens, ticket.need = remaining_tokens, need
        self._need(need, 1)
        line.stand(ticket)

    def stop_waiting(self, ticket: Ticket) -> None:
        """Leave the line: admitted, or no longer in need. No harm if it does not wait."""
        if ticket.is_waiting:
            ticket.is_waiting = False
            ticket.line.num_waiting -= 1
            self.num_waiting -= 1
            self._need(ticket.need, -1)

    def _need(self, need: Need, sign: int) -> None:
        branches, prompts, new = self.needed
        self.needed = Need(
            branches + sign * need.num_branches, prompts + sign * need.prompt_tokens, new + sign * need.new_tokens
        )

    def end(self, ticket: Ticket) -> None:
        """The program is over. No harm if it was before."""
        self.stop_waiting(ticket)
        if ticket.line.alive.pop(ticket.arrival, None) is not None:
            self.num_alive -= 1

    def charge(self, ticket: Ticket, tokens: int) -> None:
        """The program was given `tokens` of service (negative: a correction)."""
        self.charge_arrival(ticket.line, ticket.arrival, tokens)

    def charge_arrival(self, line: Line, arrival: int, tokens: int) -> None:
        """As `charge`, for a request that is no program and has no ticket: `arrival` is what `line.arrive` gave."""
        line.counter += tokens / line.weight
        if line.alive:
            line.service.charge(arrival, tokens, next(iter(line.alive)))
        if line.num_waiting:
            self._push_line(line)

    def overtaken_tokens(self, ticket: Ticket) -> int:
        """Service given to later arrivals of the same tenant so far."""
        return ticket.line.service.after(ticket.arrival)

    def is_overdue(self, ticket: Ticket) -> bool:
        """Whether it was overtaken as far as patience goes: nobody of its tenant who came later may start before it."""
        return self.overtaken_tokens(ticket) >= self.patience_tokens

    def candidates(self, plain: Plain | None = None) -> Iterator[Ticket | None]:
        """Waiting programs in the order in which they should be admitted.

        The caller admits the one it got (`stop_waiting`) or leaves it; asking for the next means that others go ahead
        of it, which the caller must not do where `saves_room` says so.

        Args:
            plain: if some wait: None is yielded, once, where they go first. That is before every program of their
                tenant but those that came earlier and are overdue, and those started that need less than a plain one.
        """
        tried: list[Ticket] = []
        popped: list[tuple[Ticket, int]] = []
        passed: list[Line] = []  # nobody left to try
        line = self._least_served(plain)
        if line is not None:
            self.floors[line.rank] = max(self.floors.get(line.rank, 0.0), line.counter)
        try:
            while len(tried) < MOST_SKIPPED:
                line = self._least_served(plain)
                if line is None or (tried and line.rank > tried[0].line.rank):
                    return
                ticket = line.oldest()
                if ticket is None or ticket in tried or not self.is_overdue(ticket):
                    ticket = line.pop_shortest()
                    if ticket is not None:
                        popped.append((ticket, ticket.turn))
                if plain is not None and line is plain.line and not self._goes_before(plain, ticket):
                    if popped and popped[-1][0] is ticket:
                        line.push(popped.pop()[0])
                    plain = None
                    yield None
                elif ticket is None:
                    passed.append(line)
                    heapq.heappop(self.least_served)
                elif ticket not in tried:
                    tried.append(ticket)
                    yield ticket
                    if not ticket.is_waiting:
                        tried.pop()
        finally:
            for ticket, turn in popped:
                if ticket.is_waiting and ticket.turn == turn:
                    ticket.line.push(ticket)
            for line in passed:
                self._push_line(line)

    def saves_room(self, ticket: Ticket, plain: Plain | None = None) -> bool:
        """Whether nobody else may be admitted before `ticket`, though it does not fit yet.

        Args:
            plain: as for `candidates`.
        """
        return self.is_overdue(ticket) or self._lag_tokens(ticket.line, plain) >= self.patience_tokens

    def is_sound(self) -> bool:
        """Whether what is counted and what stands in the heaps is what the lines hold: asked after a fault."""
        lines = self.lines.values()
        if self.num_alive != sum(len(line.alive) for line in lines):
            return False
        if self.num_waiting != sum(line.num_waiting for line in lines):
            return False
        needs = [ticket.need for line in lines for ticket in line.alive.values() if ticket.is_waiting]
        if self.needed != tuple(map(sum, zip(Need(0), *needs, strict=True))):
            return False
        for line in lines:
            waiting = {(ticket.turn, ticket) for ticket in line.alive.values() if ticket.is_waiting}
            in_heaps = [{entry[-2:] for entry in heap} for heap in (line.by_length, line.by_age)]
            if line.num_waiting != len(waiting) or not all(waiting <= entries for entries in in_heaps):
                return False
            entries = _entries(line)
            if waiting and not (entries[0] in self.least_served and entries[1] in self.most_served):
                return False
        return True

    def _goes_before(self, plain: Plain, ticket: Ticket | None) -> bool:
        if ticket is None:
            return False
        if ticket.is_started and ticket.remaining_tokens < plain.expected_tokens:
            return True
        return ticket.arrival < plain.first_arrival and self.is_overdue(ticket)

    def _least_served(self, plain: Plain | None) -> Line | None:
        line = _first_valid(self.least_served, 1)
        if plain is not None and (line is None or _is_behind(plain.line, line)):
            return plain.line
        return line

    def _lag_tokens(self, line: Line, plain: Plain | None) -> float:
        """Service by which a tenant is behind the most-served one that waits, in its own tokens."""
        most = _first_valid(self.most_served, -1)
        others = (most, plain and plain.line)
        counters = [other.counter for other in others if other is not None and other.rank == line.rank]
        return (max(counters, default=line.counter) - line.counter) * line.weight

    def _push_line(self, line: Line) -> None:
        if len(self.least_served) + len(self.most_served) > 8 * len(self.lines) + 128:  # drop what is stale
            waiting = [_entries(line) for line in self.lines.values() if line.num_waiting]
            self.least_served = [least for least, _ in waiting]
            self.most_served = [most for _, most in waiting]
            heapq.heapify(self.least_served)
            heapq.heapify(self.most_served)
        least, most = _entries(line)
        heapq.heappush(self.least_served, least)
        heapq.heappush(self.most_served, most)

    def _forget_idle(self) -> None:
        """Drop idle tenants, whenever the number of tenants reaches a power of two.

        Up to MOST_IDLE only those that would start at the floor anyway. Never the nameless one: its plain requests hold
        numbers that its line has given out. Nobody is given a number again that a line had given out which is forgotten.
        """
        num = len(self.lines)
        if num >= 64 and not num & (num - 1):
            lines, self.lines = self.lines, {}
            for name, line in lines.items():
                floor = self.floors.get(line.rank, 0.0) if num < MOST_IDLE else inf
                if not name or line.alive or line.counter > floor:
                    self.lines[name] = line
                else:
                    self._num_forgotten = max(self._num_forgotten, line.num_arrivals)
            ranks = {line.rank for line in self.lines.values()}
            self.floors = {rank: floor for rank, floor in self.floors.items() if rank in ranks}


def _entries(line: Line) -> tuple[Entry, Entry]:
    """Its places in the heaps of the least and the most served."""
    return (line.rank, line.counter, line.number, line), (line.rank, -line.counter, line.number, line)


def _first_valid(heap: list[Entry], sign: int) -> Line | None:
    while heap:
        _, counter, _, line = heap[0]
        if line.num_waiting and counter == sign * line.counter:
            return line
        heapq.heappop(heap)
    return None


def _is_behind(line: Line, other: Line) -> bool:
    return (line.rank, line.counter, line.number) <= (other.rank, other.counter, other.number)
