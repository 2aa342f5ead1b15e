"""One tenant's line of waiting programs, a program's place in it, and the service that was given to whom since."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import Any, NamedTuple


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


class Need(NamedTuple):
    """What a waiting program is expected to ask of the engine, as its branches would stand in the engine's own queue."""

    num_branches: int
    prompt_tokens: int = 0  # of all of them, each with its whole prompt
    new_tokens: int = 0  # of prompts that nobody has computed


ONE_BRANCH = Need(1)


@dataclass(slots=True, eq=False)
class Ticket:
    """One program's place."""

    line: Line
    arrival: int
    owner: Any
    remaining_tokens: float = 0.0
    need: Need = ONE_BRANCH
    is_waiting: bool = False
    is_started: bool = False  # it has run branches before
    turn: int = 0  # of its newest entry in the heaps; older entries are void


@dataclass(slots=True, eq=False)
class Line:
    """One tenant's programs, of one priority."""

    tenant: str
    weight: float
    number: int  # by first arrival: breaks ties
    rank: int = 0  # of its priority: the least goes first
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
