"""The line that waiting programs stand in: shortest remaining first, within a bound on being overtaken.

Pure policy: it knows no engine. The bound is in docs/waiting.md, its proof in docs/waiting_proof.md.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

MOST_IDLE = 4096  # tenants remembered while they have nothing here
MOST_SKIPPED = 8  # programs tried in one look that do not fit: bounds the look, not the wait (docs/waiting_proof.md)


class Service:
    """Tokens given to arrivals, by order of arrival: a Fenwick tree, O(log n) to charge and to ask.

    Arrivals before the oldest still alive are forgotten when the tree fills up.
    """

    def __init__(self) -> None:
        self.first = 0  # the arrival that index 0 stands for
        self.given = [0] * 64
        self.tree = [0] * 65
        self.total = 0

    def charge(self, arrival: int, tokens: int, oldest_alive: int) -> None:
        """Add `tokens` (negative: a correction) to what `arrival` was given."""
        index = arrival - self.first
        if index < 0:  # older than anyone who could ask
            return
        if index >= len(self.given):
            self._make_room(arrival, min(oldest_alive, arrival))
            index = arrival - self.first
        self.given[index] += tokens
        self.total += tokens
        self._add(index, tokens)

    def after(self, arrival: int) -> int:
        """Tokens given to arrivals later than `arrival`."""
        index, before = min(arrival - self.first + 1, len(self.given)), 0
        while index > 0:
            before += self.tree[index]
            index &= index - 1
        return self.total - before

    def _add(self, index: int, tokens: int) -> None:
        index += 1
        while index < len(self.tree):
            self.tree[index] += tokens
            index += index & -index

    def _make_room(self, arrival: int, oldest: int) -> None:
        kept = self.given[oldest - self.first :] if oldest > self.first else self.given
        self.first = max(oldest, self.first)
        size = 2 * max(64, len(kept), arrival - self.first + 1)
        self.given = kept + [0] * (size - len(kept))
        self.tree = [0] * (size + 1)
        self.total = sum(kept)
        for index, tokens in enumerate(kept):
            if tokens:
                self._add(index, tokens)


@dataclass(slots=True, eq=False)
class Ticket:
    """One program's place."""

    line: Line
    arrival: int
    owner: Any
    remaining_tokens: float = 0.0
    is_waiting: bool = False
    is_started: bool = False  # it has run branches before
    turn: int = 0  # of its newest entry in the heaps; older entries are void


@dataclass(slots=True, eq=False)
class Line:
    """One tenant's programs."""

    tenant: str
    weight: float
    number: int  # by first arrival: breaks ties
    service: Service = field(default_factory=Service)
    alive: dict[int, Ticket] = field(default_factory=dict[int, Ticket])  # by arrival, in order
    by_length: list[tuple[float, int, int, Ticket]] = field(default_factory=list[tuple[float, int, int, Ticket]])
    by_age: list[tuple[int, int, Ticket]] = field(default_factory=list[tuple[int, int, Ticket]])
    num_waiting: int = 0
    num_arrivals: int = 0
    counter: float = 0.0  # service received, by weight

    def arrive(self) -> int:
        self.num_arrivals += 1
        return self.num_arrivals

    def oldest(self) -> Ticket | None:
        """The waiting program that came first."""
        while self.by_age:
            _, turn, ticket = self.by_age[0]
            if ticket.is_waiting and ticket.turn == turn:
                return ticket
            heapq.heappop(self.by_age)
        return None

    def pop_shortest(self) -> Ticket | None:
        """Take the shortest waiting program out of the heap; `push` puts it back."""
        while self.by_length:
            _, _, turn, ticket = heapq.heappop(self.by_length)
            if ticket.is_waiting and ticket.turn == turn:
                return ticket
        return None

    def stand(self, ticket: Ticket) -> None:
        """Enter a waiting program in both heaps."""
        if len(self.by_length) + len(self.by_age) > 8 * self.num_waiting + 128:  # drop what is void
            self.by_length.clear()
            self.by_age.clear()
            waiting = [ticket for ticket in self.alive.values() if ticket.is_waiting]
        else:
            waiting = [ticket]
        for ticket in waiting:
            self.push(ticket)
            heapq.heappush(self.by_age, (ticket.arrival, ticket.turn, ticket))

    def push(self, ticket: Ticket) -> None:
        heapq.heappush(self.by_length, (ticket.remaining_tokens, ticket.arrival, ticket.turn, ticket))


class Plain(NamedTuple):
    """Requests waiting that are no programs: SGLang orders them among themselves, here they are one party."""

    line: Line
    first_arrival: int  # of the one that SGLang would admit first
    expected_tokens: float


class Order:
    """Every tenant's line. Tenants share service by weight; within a tenant the shortest remaining program goes first,
    unless later arrivals of that tenant have got `patience_tokens` while the oldest waits: then the oldest does.

    Source of the counters between tenants: VTC, https://arxiv.org/abs/2401.00588.
    """

    def __init__(self, patience_tokens: int, weights: Mapping[str, float] | None = None):
        self.patience_tokens = patience_tokens
        self.weights = dict(weights or {})
        self.lines: dict[str, Line] = {}
        self.least_served: list[tuple[float, int, Line]] = []  # heap of lines that wait; stale entries are void
        self.most_served: list[tuple[float, int, Line]] = []  # the same by falling counter
        self.floor = 0.0  # the least-served tenant's counter at the last look; never falls
        self.num_waiting = 0
        self.num_alive = 0
        self._turns = count(1)
        self._numbers = count()

    def line(self, tenant: str) -> Line:
        """The tenant's line. A tenant that was idle starts level with the least-served one: idling saves up nothing."""
        line = self.lines.get(tenant)
        if line is None:
            self._forget_idle()
            line = self.lines[tenant] = Line(tenant, self.weights.get(tenant, 1.0), next(self._numbers))
        if not line.alive:
            line.counter = max(line.counter, self.floor)
        return line

    def arrive(self, tenant: str, owner: Any) -> Ticket:
        """A program has come. It does not wait yet."""
        line = self.line(tenant)
        ticket = Ticket(line, line.arrive(), owner)
        line.alive[ticket.arrival] = ticket
        self.num_alive += 1
        return ticket

    def wait(self, ticket: Ticket, remaining_tokens: float) -> None:
        """Stand in line, or move to another place in it. O(log n)."""
        line = ticket.line
        if not ticket.is_waiting:
            ticket.is_waiting = True
            line.num_waiting += 1
            self.num_waiting += 1
            if line.num_waiting == 1:
                self._push_line(line)
        ticket.turn = next(self._turns)
        ticket.remaining_tokens = remaining_tokens
        line.stand(ticket)

    def stop_waiting(self, ticket: Ticket) -> None:
        """Leave the line: admitted, or no longer in need. No harm if it does not wait."""
        if ticket.is_waiting:
            ticket.is_waiting = False
            ticket.line.num_waiting -= 1
            self.num_waiting -= 1

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
        self.floor = max(self.floor, line.counter if line else 0.0)
        try:
            while len(tried) < MOST_SKIPPED:
                line = self._least_served(plain)
                if line is None:
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
        counters = [other.counter for other in (most, plain and plain.line) if other is not None]
        return (max(counters, default=line.counter) - line.counter) * line.weight

    def _push_line(self, line: Line) -> None:
        if len(self.least_served) + len(self.most_served) > 8 * len(self.lines) + 128:  # drop what is stale
            waiting = [line for line in self.lines.values() if line.num_waiting]
            self.least_served = [(line.counter, line.number, line) for line in waiting]
            self.most_served = [(-line.counter, line.number, line) for line in waiting]
            heapq.heapify(self.least_served)
            heapq.heapify(self.most_served)
        heapq.heappush(self.least_served, (line.counter, line.number, line))
        heapq.heappush(self.most_served, (-line.counter, line.number, line))

    def _forget_idle(self) -> None:
        """Drop idle tenants, whenever the number of tenants reaches a power of two.

        Up to MOST_IDLE only those that would start at the floor anyway. Never the nameless one: its plain requests hold
        numbers that its line has given out.
        """
        num = len(self.lines)
        if num >= 64 and not num & (num - 1):
            floor = self.floor if num < MOST_IDLE else float("inf")
            self.lines = {
                name: line for name, line in self.lines.items() if not name or line.alive or line.counter > floor
            }


def _first_valid(heap: list[tuple[float, int, Line]], sign: int) -> Line | None:
    while heap:
        counter, _, line = heap[0]
        if line.num_waiting and counter == sign * line.counter:
            return line
        heapq.heappop(heap)
    return None


def _is_behind(line: Line, other: Line) -> bool:
    return (line.counter, line.number) <= (other.counter, other.number)
