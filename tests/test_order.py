"""The line of waiting programs: its order, and the bound of docs/waiting_proof.md under adversarial arrivals."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_dynasor.policy.line import Need, Service, Ticket
from sglang_dynasor.policy.order import MOST_IDLE, MOST_SKIPPED, Order, Plain

FOREVER = 10**9


def stand(order: Order, *lengths: float, tenant: str = "") -> list[Ticket]:
    """Let programs with these remaining tokens arrive and wait, in this order."""
    tickets = [order.arrive(tenant, None) for _ in lengths]
    for ticket, length in zip(tickets, lengths, strict=True):
        order.wait(ticket, length)
    return tickets


def admit_all(order: Order, plain: Plain | None = None, charge: int = 0) -> list[Ticket | None]:
    """Everything fits: what is admitted, in order (None: the plain requests)."""
    admitted: list[Ticket | None] = []
    for ticket in order.candidates(plain):
        admitted.append(ticket)
        if ticket is not None:
            order.stop_waiting(ticket)
            order.charge(ticket, charge)
    return admitted


def plain_of(order: Order, expected_tokens: float = 10.0, tenant: str = "") -> Plain:
    """A plain request that comes now."""
    line = order.line(tenant)
    return Plain(line, line.arrive(), expected_tokens)


# The order inside a tenant


def test_the_shortest_goes_first() -> None:
    """By remaining tokens; equals in order of arrival."""
    order = Order(FOREVER)
    a, b, c, d = stand(order, 30, 10, 20, 10)
    assert admit_all(order) == [b, d, c, a]
    assert order.num_waiting == 0
    assert admit_all(order) == []


def test_without_patience_it_is_the_order_of_arrival() -> None:
    """Patience 0: nobody is overtaken, and room is saved for the first."""
    order = Order(0)
    a, b, c = stand(order, 30, 10, 20)
    assert order.saves_room(a)
    assert admit_all(order) == [a, b, c]


def test_the_oldest_goes_first_when_it_was_overtaken_enough() -> None:
    """At patience exactly; not one token before."""
    order = Order(100)
    long, short, shorter = stand(order, 1000, 20, 10)
    order.charge(short, 60)
    order.charge(shorter, 39)
    assert not order.is_overdue(long)
    assert not order.saves_room(long)
    assert next(order.candidates()) is shorter
    order.charge(short, 1)
    assert order.is_overdue(long)
    assert order.saves_room(long)
    assert next(order.candidates()) is long
    assert not order.is_overdue(short)
    assert admit_all(order) == [long, shorter, short]


def test_a_correction_takes_patience_back() -> None:
    """A branch that was charged too much at its start does not make anybody overdue for good."""
    order = Order(100)
    long, short = stand(order, 1000, 10)
    order.charge(short, 100)
    assert order.is_overdue(long)
    order.charge(short, -1)
    assert not order.is_overdue(long)


def test_service_to_earlier_arrivals_does_not_count() -> None:
    """Nor one's own."""
    order = Order(100)
    early, late = stand(order, 10, 1000)
    order.charge(early, 10_000)
    order.charge(late, 10_000)
    assert order.overtaken_tokens(late) == 0
    assert order.overtaken_tokens(early) == 10_000


def test_moving_in_line() -> None:
    """A program that waits again has its new place only, and waits once."""
    order = Order(FOREVER)
    a, b = stand(order, 10, 20)
    order.wait(a, 30)
    assert order.num_waiting == 2
    assert admit_all(order) == [b, a]


def test_leaving_the_line_and_ending() -> None:
    """Idempotent; who is gone is not a candidate."""
    order = Order(FOREVER)
    a, b = stand(order, 10, 20)
    order.stop_waiting(a)
    order.stop_waiting(a)
    assert (order.num_waiting, order.num_alive) == (1, 2)
    order.end(b)
    order.end(b)
    assert (order.num_waiting, order.num_alive) == (0, 1)
    assert admit_all(order) == []
    order.wait(a, 5)
    assert admit_all(order) == [a]


def test_a_look_leaves_the_line_as_it_was() -> None:
    """Who was tried and not admitted is tried again, in the same order, also if the look is broken off."""
    order = Order(FOREVER)
    tickets = stand(order, 30, 10, 20)
    assert next(order.candidates()) is tickets[1]
    for _ in range(3):
        assert list(order.candidates()) == [tickets[1], tickets[2], tickets[0]]


def test_a_look_tries_so_many_and_no_more() -> None:
    """Programs that do not fit bound the work; those admitted do not count."""
    order = Order(FOREVER)
    tickets = stand(order, *range(50))
    assert list(order.candidates()) == tickets[:MOST_SKIPPED]
    tried = []
    for turn, ticket in enumerate(order.candidates()):
        assert ticket is not None
        if turn % 2:
            order.stop_waiting(ticket)
        else:
            tried.append(ticket)
    assert len(tried) == MOST_SKIPPED
    assert admit_all(order)[:MOST_SKIPPED] == tried


def test_a_program_that_waits_again_during_a_look_is_not_lost() -> None:
    """Its old place is void, the new one stays."""
    order = Order(FOREVER)
    a, b = stand(order, 10, 20)
    for ticket in order.candidates():
        if ticket is a:
            order.wait(a, 30)
    assert admit_all(order) == [b, a]


# Plain requests


def test_plain_requests_go_before_fresh_programs() -> None:
    """Once, however short the programs are."""
    order = Order(FOREVER)
    (a,) = stand(order, 1)
    assert admit_all(order, plain_of(order)) == [None, a]


def test_plain_requests_without_programs_go() -> None:
    """Nobody else waits."""
    order = Order(FOREVER)
    assert admit_all(order, plain_of(order)) == [None]


def test_plain_requests_follow_started_programs_that_need_less() -> None:
    """Only those: not a started longer one, not an equal one, not a fresh shorter one."""
    order = Order(FOREVER)
    fresh, started, long, equal = stand(order, 9, 9.9, 11, 10)
    for ticket in (started, long, equal):
        ticket.is_started = True
    order.stop_waiting(fresh)
    assert admit_all(order, plain_of(order)) == [started, None, equal, long]
    order.wait(fresh, 9)
    assert admit_all(order, plain_of(order)) == [None, fresh]


def test_plain_requests_follow_overdue_programs_that_came_earlier() -> None:
    """Not those that are overdue and came later, nor earlier ones that are not overdue."""
    order = Order(100)
    between = plain_of(order)
    (old,) = stand(order, 1000)
    late = plain_of(order)
    assert next(order.candidates(late)) is None
    order.charge_arrival(late.line, late.first_arrival, 100)
    assert next(order.candidates(late)) is old
    assert next(order.candidates(between)) is None
    assert admit_all(order, between) == [None, old]


def test_plain_requests_stand_in_their_tenant_s_line() -> None:
    """A tenant served less goes before them, one served more after."""
    order = Order(FOREVER)
    (less,), (more,) = stand(order, 50, tenant="less"), stand(order, 5, tenant="more")
    plain = plain_of(order)
    order.charge_arrival(plain.line, plain.first_arrival, 10)
    order.charge(more, 20)
    assert admit_all(order, plain) == [less, None, more]


# Tenants


def shares(order: Order, tenants: dict[str, int], num_admitted: int) -> dict[str, int]:
    """Tokens each tenant gets where all have always work waiting, one program of `tokens` after the other."""
    given = dict.fromkeys(tenants, 0)
    for tenant, tokens in tenants.items():
        stand(order, *[tokens] * 3, tenant=tenant)
    for _ in range(num_admitted):
        ticket = next(order.candidates())
        assert ticket is not None
        tenant = ticket.line.tenant
        order.stop_waiting(ticket)
        order.charge(ticket, tenants[tenant])
        order.end(ticket)
        given[tenant] += tenants[tenant]
        stand(order, tenants[tenant], tenant=tenant)
    return given


def test_tenants_share_by_weight() -> None:
    """Whatever the sizes of their programs; within one program of each."""
    given = shares(Order(FOREVER, {"gold": 4, "half": 0.5}), {"gold": 100, "one": 10, "half": 400}, 2000)
    assert given["gold"] / 4 == pytest.approx(given["one"], abs=900)
    assert given["half"] / 0.5 == pytest.approx(given["one"], abs=900)
    assert given["one"] > 9000


def test_an_idle_tenant_saves_up_nothing() -> None:
    """Coming back it is level but for one program: it is served in turn, not until it has caught up."""
    order = Order(FOREVER)
    (first,) = stand(order, 1, tenant="idle")
    admit_all(order)
    order.end(first)
    shares(order, {"busy": 10}, 100)
    stand(order, *[10] * 8, tenant="idle")
    turns: list[str] = []
    for _ in range(5):
        ticket = next(order.candidates())
        assert ticket is not None
        turns.append(ticket.line.tenant)
        order.stop_waiting(ticket)
        order.charge(ticket, 10)
    assert turns == ["idle", "idle", "busy", "idle", "busy"]


def test_a_tenant_that_waits_keeps_its_lag() -> None:
    """One that found no room is not lifted by looks that went past it, nor by new arrivals of its own."""
    order = Order(FOREVER)
    (waits,), (served,) = stand(order, 10, tenant="a"), stand(order, 10, tenant="b")
    order.charge(served, 500)
    assert list(order.candidates()) == [waits, served]
    stand(order, 10, tenant="a")
    assert order.line("a").counter == 0


def test_room_is_saved_for_a_tenant_that_lags() -> None:
    """From patience on, in its own tokens; not before, not where nobody else waits, not for who is ahead."""
    order = Order(100, {"heavy": 2})
    (behind,), (ahead,) = stand(order, 10, tenant="heavy"), stand(order, 10, tenant="b")
    order.charge(ahead, 49)
    assert not order.saves_room(behind)
    order.charge(ahead, 1)
    assert order.saves_room(behind)
    assert not order.saves_room(ahead)
    order.stop_waiting(ahead)
    assert not order.saves_room(behind)
    plain = plain_of(order, tenant="c")
    order.charge_arrival(plain.line, plain.first_arrival, 60)
    assert order.saves_room(behind, plain)


def test_room_is_saved_whatever_else_happened_to_the_counters() -> None:
    """Void entries of the heap hide nobody."""
    order = Order(100)
    others = [stand(order, 10, tenant=f"other{i}")[0] for i in range(5)]
    (behind,), (ahead,) = stand(order, 10, tenant="behind"), stand(order, 10, tenant="ahead")
    for other in others:
        order.charge(other, 1)
        order.charge(other, 1)
        order.stop_waiting(other)
    order.charge(ahead, 100)
    for _ in range(4):
        order.charge(behind, 0)
    assert order.saves_room(behind)


def test_two_tenants_that_lag_do_not_hide_each_other() -> None:
    """Both level, neither fits: room is saved against a third that runs away."""
    order = Order(100)
    (a,), (b,) = stand(order, 10, tenant="a"), stand(order, 10, tenant="b")
    (c,) = stand(order, 10, tenant="c")
    order.charge(b, 1)
    order.charge(c, 99)
    assert not order.saves_room(a)
    order.charge(c, 1)
    assert order.saves_room(a)


def test_a_new_tenant_starts_level_with_the_least_served() -> None:
    """Also where one look went past tenants that found no room."""
    order = Order(FOREVER)
    (behind,), (ahead,) = stand(order, 10, tenant="behind"), stand(order, 10, tenant="ahead")
    order.charge(behind, 5)
    order.charge(ahead, 50)
    assert list(order.candidates()) == [behind, ahead]
    assert order.line("new").counter == 5


# Memory and cost


def test_idle_tenants_are_forgotten() -> None:
    """A client that names a new tenant each time does not fill the memory; plain requests keep their count."""
    order = Order(100)
    plain = plain_of(order)
    for number in range(10_000):
        (ticket,) = stand(order, 1, tenant=f"t{number}")
        admit_all(order, charge=1)
        order.end(ticket)
        assert len(order.lines) <= MOST_IDLE
    assert order.line("").arrive() > plain.first_arrival


def test_void_entries_leave_no_memory() -> None:
    """100,000 operations on forty programs: what is kept is bounded by what is alive."""
    chance = random.Random(0)
    order = Order(1000)
    tickets: list[Ticket] = []
    for _ in range(100_000):
        what = chance.random()
        if len(tickets) < 40 and what < 0.2:
            tickets.append(order.arrive(chance.choice("abc"), None))
        elif tickets:
            ticket = chance.choice(tickets)
            if what < 0.5:
                order.wait(ticket, chance.randrange(100))
            elif what < 0.7:
                order.stop_waiting(ticket)
            elif what < 0.9:
                order.charge(ticket, chance.randrange(50))
            elif what < 0.95:
                next(order.candidates(), None)
            else:
                order.end(ticket)
                tickets.remove(ticket)
    assert len(order.lines) == 3
    for line in order.lines.values():
        assert len(line.by_length) + len(line.by_age) <= 8 * 40 + 130
        assert len(line.service.given) <= 20_000  # as many as arrived since the oldest came
    assert len(order.least_served) + len(order.most_served) <= 200


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 400), st.integers(-3, 50)), max_size=60))
def test_service_is_what_a_dictionary_says(steps: list[tuple[int, int, int]]) -> None:
    """Through growth and forgetting: whoever is alive reads the exact sum of what later arrivals were given."""
    service, given, alive, newest = Service(), dict[int, int](), list[int](), 0
    for num_gone, ahead, tokens in steps:
        newest += 1 + ahead // 4
        alive.append(newest)
        for arrival in (newest, alive[ahead % len(alive)]):
            given[arrival] = given.get(arrival, 0) + tokens
            service.charge(arrival, tokens, alive[0])
        for arrival in alive:
            assert service.after(arrival) == sum(t for a, t in given.items() if a > arrival)
        del alive[: min(num_gone, len(alive) - 1)]
        assert len(service.given) <= 4 * max(64, newest - service.first + 1)


def seconds_per_change(num_waiting: int) -> float:
    """One program moves in line and one look is broken off, among so many."""
    chance = random.Random(1)
    order = Order(FOREVER)
    tickets = stand(order, *(chance.random() for _ in range(num_waiting)))
    best = float("inf")
    for _ in range(7):
        start = time.thread_time()
        for _ in range(300):
            ticket = tickets[chance.randrange(num_waiting)]
            order.wait(ticket, chance.random())
            order.charge(ticket, 1)
            next(order.candidates())
        best = min(best, time.thread_time() - start)
    return best / 300


def test_cost_grows_no_faster_than_the_logarithm() -> None:
    """10,000 waiting against 100: log n doubles; a scan would cost a hundred times as much."""
    assert seconds_per_change(10_000) < 6 * seconds_per_change(100)


# What is needed by those who wait


@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from("wsed"), st.integers(1, 9)), max_size=60))
def test_what_is_needed_is_that_of_those_who_wait(events: list[tuple[int, str, int]]) -> None:
    """Whatever they do: wait again with another need, stop waiting twice, end while they wait."""
    order = Order(FOREVER)
    tickets = [order.arrive("", None) for _ in range(5)]
    for index, what, num in events:
        if what == "w":
            order.wait(tickets[index], num, Need(num, num * 10, num % 2))
        elif what == "e":
            order.end(tickets[index])
        else:
            order.stop_waiting(tickets[index])
    needs = [ticket.need for ticket in tickets if ticket.is_waiting]
    assert order.needed == tuple(sum(need[i] for need in needs) for i in range(3))


# After a fault


def test_a_sound_line_is_found_sound() -> None:
    """Whatever was done to it."""
    rng, order, tickets = random.Random(3), Order(50), list[Ticket]()
    assert order.is_sound()
    for _ in range(2000):
        what, ticket = rng.randrange(6), rng.choice(tickets) if tickets else None
        if what == 0 or ticket is None:
            tickets += stand(order, rng.randrange(100), tenant=rng.choice("abc"))
        elif what == 1:
            order.end(ticket)
            tickets.remove(ticket)
        elif what == 2:
            order.wait(ticket, rng.randrange(100))
        elif what == 3:
            order.charge(ticket, rng.randrange(-5, 20))
        elif what == 4:
            order.stop_waiting(ticket)
        else:
            for candidate in order.candidates():
                if candidate is not None and rng.random() < 0.3:
                    order.stop_waiting(candidate)
                    break
        assert order.is_sound()


@pytest.mark.parametrize(
    ("name", "of_line", "wrong"),
    [
        ("num_alive", False, 1), ("num_waiting", False, 3), ("num_waiting", True, 1), ("by_length", True, []),
        ("by_age", True, []), ("least_served", False, []), ("most_served", False, []), ("alive", True, {}),
    ],
)  # fmt: skip
def test_a_line_that_lies_is_found(name: str, of_line: bool, wrong: object) -> None:
    """Each count, and each heap that has lost somebody."""
    order = Order(50)
    stand(order, 5, 6)
    setattr(order.line("") if of_line else order, name, wrong)
    assert not order.is_sound()
