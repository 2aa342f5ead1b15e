"""One look at the line: which waiting programs start now, and with how many branches.

Pure policy, a part of admission.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from sglang_dynasor.policy.gang import Cost, Room, gang_size
from sglang_dynasor.policy.line import Ticket
from sglang_dynasor.policy.order import Order, Plain


class Offer(NamedTuple):
    """What a waiting program would start, and what that takes (`Program.num_to_start`)."""

    wanted: int
    least: int
    cost: Cost
    is_possible: bool = True  # whether what it needs besides rows and tokens is free


class Seen(NamedTuple):
    """What a look has found besides the programs it started."""

    is_plain_due: bool  # plain requests may start as far as room goes, until the next look
    head: Ticket | None  # the program that room is saved for


def look(
    order: Order,
    room: Room,
    engine: Room,
    *,
    plain: Plain | None,
    is_empty: bool,
    offer: Callable[[Ticket], Offer],
    start: Callable[[Ticket, int], None],
    set_aside_plain: Callable[[Room], None],
) -> Seen:
    """Start the waiting programs that fit, in order.

    Args:
        room: what is free; what is started is taken from it.
        engine: what an empty engine has.
        plain: plain requests that wait, if any; `set_aside_plain` takes their room where it is their turn.
        is_empty: whether nothing is in the engine, so that nothing will leave it either.
        start: called for each program started, which by then no longer waits, with its number of branches.
    """
    is_plain_due = plain is None
    for ticket in order.candidates(plain):
        if room.rows <= 0:
            break
        if ticket is None:
            is_plain_due, is_empty = True, False
            set_aside_plain(room)
            continue
        wanted, least, cost, is_possible = offer(ticket)
        num = gang_size(wanted, least, room, engine, cost) if is_possible else 0
        if not num and is_empty and is_possible:
            num = min(wanted, 1)  # nothing will leave: the engine takes one request if it is empty
        if num:
            room.take(cost, num)
            is_empty = False
            order.stop_waiting(ticket)
            start(ticket, num)
        elif not wanted:
            order.stop_waiting(ticket)
        elif order.saves_room(ticket, plain):
            return Seen(is_plain_due and plain is not None, ticket)
    return Seen(is_plain_due, None)
