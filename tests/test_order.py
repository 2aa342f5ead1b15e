"""The line of waiting programs: its order, and the bound of docs/waiting_proof.md under adversarial arrivals."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang_dynasor.policy.gang import Cost, Room
from sglang_dynasor.policy.look import Offer, look
from sglang_dynasor.policy.order import MOST_IDLE, MOST_SKIPPED, Order, Plain, Service, Ticket

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


@settings(max_examples=300, deadline=None, derandomize=True)
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
        start = time.perf_counter()
        for _ in range(300):
            ticket = tickets[chance.randrange(num_waiting)]
            order.wait(ticket, chance.random())
            order.charge(ticket, 1)
            next(order.candidates())
        best = min(best, time.perf_counter() - start)
    return best / 300


def test_cost_grows_no_faster_than_the_logarithm() -> None:
    """10,000 waiting against 100: log n doubles; a scan would cost a hundred times as much."""
    assert seconds_per_change(10_000) < 6 * seconds_per_change(100)


# The bound. A token-level engine that admits as engine/admission.py does, with arrivals, lengths, gangs and forecasts
# chosen by an adversary, and the service that was really given counted beside it.


@dataclass(eq=False)
class Job:
    """A program, or (no width) a plain request, and what the engine really did for it."""

    arrives: int
    prompt: int
    lengths: list[int]  # of its branches, as they start
    width: int
    forecast: int  # said of its remaining tokens: may lie; of a plain request its place in SGLang's own order
    expected: int  # charged for a branch at its start: may lie
    stops_after: int = 99  # branches finished, after which the others end
    tenant: str = ""
    served: int = 0
    served_later: int = 0  # to later arrivals, when it began to wait
    num_started: int = 0
    num_finished: int = 0
    num_promised: int = 0
    running: list[list[int]] = field(default_factory=list)  # tokens done and left, of branches in flight
    is_cached: bool = False
    ticket: Ticket | None = None
    arrival: int = 0
    waits: list[int] = field(default_factory=list)  # service that later arrivals got in each wait

    @property
    def wanted(self) -> int:
        return max(0, min(self.width - len(self.running), len(self.lengths) - self.num_started))

    @property
    def is_over(self) -> bool:
        unused = self.num_started < len(self.lengths) and self.num_finished < self.stops_after
        return self.arrival > 0 and not unused and not self.running


def served_later(job: Job, jobs: list[Job]) -> int:
    return sum(other.served for other in jobs if other.tenant == job.tenant and other.arrival > job.arrival)


def start_branches(order: Order, job: Job, num: int) -> None:
    """As controller.py `_make`."""
    for _ in range(num):
        job.running.append([0, job.lengths[job.num_started]])
        job.num_started += 1
        if job.ticket is not None:
            order.charge(job.ticket, job.expected)


def begin_waiting(order: Order, job: Job, jobs: list[Job]) -> None:
    assert job.ticket is not None
    if not job.ticket.is_waiting:
        job.served_later = served_later(job, jobs)
    order.wait(job.ticket, job.forecast)


def leave_branch(order: Order, job: Job, branch: list[int]) -> None:
    """As controller.py `_left`; plain requests as admission.py `note_finish`."""
    job.running.remove(branch)
    if job.ticket is not None:
        order.charge(job.ticket, branch[0] - job.expected)
    else:
        order.charge_arrival(order.line(job.tenant), job.arrival, job.prompt + branch[0])


def advance(order: Order, job: Job, jobs: list[Job]) -> None:
    """As controller.py `_advance`."""
    if job.num_finished >= job.stops_after:
        job.num_promised, job.num_started = 0, len(job.lengths)
        for branch in list(job.running):
            leave_branch(order, job, branch)
    if job.is_cached and job.num_promised:
        start_branches(order, job, job.num_promised)
        job.num_promised = 0
    if job.is_over:
        if job.ticket is not None:
            order.end(job.ticket)
    elif job.ticket is not None and job.num_started < len(job.lengths) and not job.num_promised:
        begin_waiting(order, job, jobs)


def step(order: Order, jobs: list[Job], queue: list[Job], rows: int, pool: int, longest: int) -> list[Job]:
    """A look, as admission.py has it, then SGLang's own pass over the plain requests. Returns the programs admitted."""
    busy = sum(len(job.running) + job.num_promised for job in jobs)
    held = sum((len(job.running) + job.num_promised) * longest for job in jobs)
    admitted: list[Job] = []

    def offer(ticket: Ticket) -> Offer:
        job = ticket.owner
        return Offer(job.wanted, 1 if job.running else job.wanted, Cost(0, longest))

    def start(ticket: Ticket, num: int) -> None:
        job = ticket.owner
        admitted.append(job)
        job.waits.append(served_later(job, jobs) - job.served_later)
        if not ticket.is_started:
            ticket.is_started = True
            job.served += job.prompt
            order.charge(ticket, job.prompt)
        job.num_promised = 0 if job.is_cached else num - 1
        start_branches(order, job, num if job.is_cached else 1)

    def set_aside_plain(room: Room) -> None:
        for _ in queue[: max(0, room.rows)]:
            room.take(Cost(0, longest), 1)

    is_plain_due, _ = look(
        order, Room(rows - busy, pool - held), Room(rows, pool),
        plain=Plain(order.line(""), queue[0].arrival, 4.0) if queue else None, is_empty=not busy,
        offer=offer, start=start, set_aside_plain=set_aside_plain,
    )  # fmt: skip
    oldest = order.line("").oldest()
    before = oldest.arrival if oldest is not None and order.is_overdue(oldest) else FOREVER
    if not is_plain_due:
        before = 0
    busy = sum(len(job.running) + job.num_promised for job in jobs)
    while queue and busy < rows and queue[0].arrival < before:
        job = queue.pop(0)
        job.served += job.prompt
        start_branches(order, job, 1)
        busy += 1
    return admitted


def overtaken(order: Order, jobs: list[Job], rows: int, pool: int) -> tuple[list[int], float]:
    """Run all to their end.

    Returns:
        For each wait of a program, the service that later arrivals of its tenant got in it. And the furthest that a
        tenant was ahead, before a look that admitted it, of one that waited and went on waiting: in the latter's tokens.
    """
    longest = max(job.prompt + max(job.lengths) for job in jobs)
    queue: list[Job] = []
    coming = sorted(jobs, key=lambda job: job.arrives)
    furthest, now = 0.0, 0
    while not all(job.is_over for job in jobs):
        while coming and coming[0].arrives <= now:
            job = coming.pop(0)
            if job.width:
                job.ticket = order.arrive(job.tenant, job)
                job.arrival = job.ticket.arrival
                begin_waiting(order, job, jobs)
            else:
                job.arrival = order.line(job.tenant).arrive()
                queue.append(job)
                queue.sort(key=lambda job: job.forecast)
        counters = {tenant: line.counter for tenant, line in order.lines.items()}
        for job in step(order, jobs, queue, rows, pool, longest):
            for line in order.lines.values():
                if line.num_waiting and line.tenant != job.tenant:
                    furthest = max(furthest, (counters[job.tenant] - line.counter) * line.weight)
        # On to the next event: an arrival, the first end of a branch, or a prompt that is cached.
        running = [job for job in jobs if job.running]
        if not running:
            assert coming, "nothing runs, nothing comes, somebody waits for ever"
            now = coming[0].arrives
            continue
        num = min(left for job in running for _, left in job.running)
        if coming:
            num = min(num, coming[0].arrives - now)
        if any(job.num_promised for job in running):
            num = 1
        now += num
        for job in running:
            job.is_cached = True
            for branch in list(job.running):
                branch[0], branch[1] = branch[0] + num, branch[1] - num
                job.served += num
                if not branch[1]:
                    leave_branch(order, job, branch)
                    job.num_finished += 1
            advance(order, job, jobs)
    return [wait for job in jobs for wait in job.waits], furthest


LONGEST = 8  # of a branch in the simulation, with its prompt
PROGRAM = st.builds(
    Job,
    arrives=st.integers(0, 40),
    prompt=st.integers(0, 3),
    lengths=st.lists(st.integers(1, LONGEST - 3), min_size=1, max_size=5),
    width=st.integers(1, 4),
    forecast=st.integers(0, 4),
    expected=st.integers(0, 9),
    stops_after=st.sampled_from([99, 1, 2]),
    tenant=st.sampled_from(["", "", "a", "b"]),
)
PLAIN = st.builds(
    Job,
    arrives=st.integers(0, 40),
    prompt=st.integers(0, 3),
    lengths=st.lists(st.integers(1, LONGEST - 3), min_size=1, max_size=1),
    width=st.just(0),
    forecast=st.integers(0, 9),
    expected=st.just(0),
)


@settings(max_examples=10_000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.one_of(PROGRAM, PROGRAM, PLAIN), min_size=2, max_size=9),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 20),
)
def test_nobody_is_overtaken_by_more_than_the_bound(jobs: list[Job], rows: int, fit: int, patience: int) -> None:
    """10,000 adversaries: arrivals, lengths, gangs, early stops, and forecasts and charges that lie; all come to an end.

    Nor is a tenant admitted that is ahead of one that waits by more than patience.
    """
    longest = max(job.prompt + max(job.lengths) for job in jobs)
    order = Order(patience, {"a": 2.0})
    waits, furthest = overtaken(order, jobs, rows, fit * longest)
    assert max(waits, default=0) <= patience + rows * longest
    assert furthest <= patience


def stream_of_short_programs(patience: int) -> int:
    """A gang of four among four rows, and short programs that come all the time: what is the gang overtaken by?"""
    jobs = [Job(1, 2, [6] * 4, width=4, forecast=50, expected=4)]
    jobs += [Job(now, 1, [3], width=1, forecast=1, expected=4) for now in range(400) for _ in range(2)]
    return max(overtaken(Order(patience), jobs, 4, 4 * LONGEST)[0])


def test_later_plain_requests_do_not_pass_in_the_shadow_of_earlier_ones() -> None:
    """SGLang's own order mixes both. An overdue gang lets the earlier ones go first, and only those."""
    jobs = [Job(0, 0, [8], 0, 10 * number, 0) for number in range(5)]
    jobs += [Job(1, 0, [6] * 4, width=4, forecast=1, expected=6)]
    jobs += [Job(2, 0, [8], 0, 10 * number + place, 0) for number in range(5) for place in range(1, 4)]
    jobs += [Job(0, 0, [3], 0, -1, 0) for _ in range(4)]  # these run first
    assert max(overtaken(Order(0), jobs, 4, 4 * LONGEST)[0]) <= 4 * LONGEST


def test_without_the_bound_the_same_check_fails() -> None:
    """The simulation can starve a program: with patience it does not, without it does."""
    assert 100 <= stream_of_short_programs(100) <= 100 + 4 * LONGEST
    assert stream_of_short_programs(FOREVER) > 1000
