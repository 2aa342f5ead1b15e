"""Admission on an engine of tokens: gangs, width, plain requests, and the bound of docs/waiting.md under adversaries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang_dynasor.policy.admission import LOOK_EVERY, THOUGHTS_PER_ROW, Admission, Gang, Waiting
from sglang_dynasor.policy.forecast import Forecast
from sglang_dynasor.policy.gang import Cost, Room
from sglang_dynasor.policy.program import Program, StopReason
from sglang_dynasor.policy.spec import parse_field

FOREVER = 10**9


@dataclass(eq=False)
class Job:
    """A program, or (no width) a plain request, and what the engine really did for it."""

    arrives: int
    prompt: int
    lengths: list[int]  # of its branches, as they start
    width: int
    forecast: int  # said of its remaining tokens: may lie; of a plain request its place in the engine's own order
    expected: int  # charged for a branch at its start: may lie
    stops_after: int = 99  # branches finished, after which the others end
    tenant: str = ""
    came: int = 0  # the how manieth arrival it was
    arrival: int = 0  # of a plain request, as admission was told
    served: int = 0
    served_later: int = 0  # to later arrivals, when it began to wait
    running: list[Run] = field(default_factory=list)
    gang: Gang | None = None
    waits: list[int] = field(default_factory=list)  # service that later arrivals got in each wait
    is_over: bool = False


@dataclass(eq=False)
class Run:
    """A branch, or a plain request, that runs."""

    index: int
    left: int
    done: int = 0


class TokenEngine:
    """`admission.Engine` that generates a token a step for everybody; each may need `longest` tokens of its pool."""

    def __init__(self, rows: int, pool: int, longest: int):
        self.whole = Room(rows, pool)
        self.shares_prompts = True
        self.longest = longest
        self.jobs: list[Job] = []
        self.queue: list[Job] = []  # plain requests that wait
        self.admission: Admission

    @property
    def num_running(self) -> int:
        return sum(len(job.running) for job in self.jobs)

    @property
    def is_empty(self) -> bool:
        return not self.num_running

    @property
    def free_rows(self) -> int:
        return self.whole.rows - self.num_running

    @property
    def free_tokens(self) -> int:
        return self.whole.tokens - self.num_running * self.longest

    @property
    def num_branches(self) -> int:
        return sum(len(job.running) for job in self.jobs if job.gang is not None)

    @property
    def num_plain_waiting(self) -> int:
        return len(self.queue)

    def has_adapter_room(self, gang: Gang) -> bool:
        return True

    def waiting(self, num: int) -> Iterator[Waiting]:
        return (Waiting(job.arrival, 4.0, Cost(0, self.longest)) for job in islice(self.queue, num))

    def progress_tokens(self, gang: Gang) -> int:
        return sum(run.done for run in gang.owner.running)

    def start(self, gang: Gang, num_branches: int) -> None:
        for _ in range(num_branches):
            index = gang.program.start_branch()
            gang.owner.running.append(Run(index, gang.owner.lengths[index]))
            self.admission.charge(gang, gang.owner.expected)

    # What the engine's own code does

    def arrive(self, job: Job) -> None:
        self.jobs.append(job)
        job.came = len(self.jobs)
        if not job.width:
            job.arrival = self.admission.note_arrival()
            self.queue.append(job)
            self.queue.sort(key=lambda job: job.forecast)
            return
        wants: dict[str, Any] = {
            "branches": len(job.lengths),
            "width": min(job.width, len(job.lengths)),
            "stop": "never",
        }
        if job.tenant:
            wants["tenant"] = job.tenant
        program = Program(str(job.came), parse_field(wants, 64))
        job.gang = Gang(program, job.prompt, Cost(0, self.longest), job)
        self.admission.arrive(job.gang)
        self.admission.advance(job.gang)

    def step(self) -> None:
        """A look, then the engine's own pass over the plain requests."""
        self.admission.look()
        left = self.admission.plain_rows
        while self.queue and self.free_rows > 0 and left != 0 and self.queue[0].arrival <= self.admission.latest_plain:
            job = self.queue.pop(0)
            job.served += job.prompt
            job.running.append(Run(0, job.lengths[0]))
            left = None if left is None else left - 1

    def run(self, num_steps: int) -> None:
        """Generate so many tokens for everybody, which are no more than the first to end has left."""
        running = [job for job in self.jobs if job.running]
        for job in running:
            for run in list(job.running):
                run.done, run.left = run.done + num_steps, run.left - num_steps
                job.served += num_steps
                if not run.left:
                    self._end(job, run)
        for job in running:
            if job.gang is not None and not job.is_over:
                self._advance(job, job.gang)

    def _end(self, job: Job, run: Run) -> None:
        job.running.remove(run)
        if job.gang is None:
            job.is_over = True
            self.admission.note_departure(job.arrival, job.prompt + run.done)
            return
        self.admission.charge(job.gang, run.done - job.expected)
        self.admission.note_change()
        program = job.gang.program
        if program.reason is None:
            program.finish(run.index, "", run.done)
            if len(program.finished_tokens) >= job.stops_after:
                program.reason = StopReason.CERTAIN
        else:
            program.end(run.index, run.done)

    def _advance(self, job: Job, gang: Gang) -> None:
        gang.is_prompt_cached = True
        if gang.program.reason is None:
            self.admission.advance(gang)
            return
        for run in list(job.running):
            self._end(job, run)
        self.admission.leave(gang)
        job.is_over = True


class Lies(Forecast):
    """Says of programs what the adversary wants."""

    def __init__(self, engine: TokenEngine):
        super().__init__()
        self.engine = engine

    def remaining_tokens(self, program: Program, progress_tokens: int) -> float:
        return self.engine.jobs[int(program.id) - 1].forecast


class Recorded(Admission):
    """Admission that writes down what later arrivals were given in each wait, and how far ahead tenants were let in."""

    def __init__(self, engine: TokenEngine, patience_tokens: int, width: int = 0):
        super().__init__(engine, patience_tokens, {"a": 2.0}, width)
        self.tokens = engine
        self.forecast = Lies(engine)
        self.furthest = 0.0  # that a tenant let in was ahead of one that went on waiting, in the latter's tokens
        self.let_in: list[Job] = []

    def served_later(self, job: Job) -> int:
        return sum(other.served for other in self.tokens.jobs if other.tenant == job.tenant and other.came > job.came)

    def wait(self, gang: Gang) -> None:
        if not gang.ticket.is_waiting:
            gang.owner.served_later = self.served_later(gang.owner)
        super().wait(gang)

    def look(self) -> Gang | None:
        self.let_in = []
        counters = {tenant: line.counter for tenant, line in self.order.lines.items()}
        head = super().look()
        for job in self.let_in:
            for line in self.order.lines.values():
                if line.num_waiting and line.tenant != job.tenant:
                    self.furthest = max(self.furthest, (counters[job.tenant] - line.counter) * line.weight)
        return head

    def _admit(self, gang: Gang, num: int) -> None:
        job = gang.owner
        self.let_in.append(job)
        job.waits.append(self.served_later(job) - job.served_later)
        if not gang.ticket.is_started:
            job.served += job.prompt
        super()._admit(gang, num)


def engine_of(rows: int, pool: int, longest: int, patience: int = FOREVER, width: int = 0) -> TokenEngine:
    engine = TokenEngine(rows, pool, longest)
    engine.admission = Recorded(engine, patience, width)
    return engine


def recorded(engine: TokenEngine) -> Recorded:
    assert isinstance(engine.admission, Recorded)
    return engine.admission


def run_all(engine: TokenEngine, jobs: list[Job]) -> None:
    """Run all to their end, from event to event: an arrival, the first end of a branch, a prompt that is cached."""
    coming = sorted(jobs, key=lambda job: job.arrives)
    now = 0
    while not all(job.is_over for job in jobs):
        while coming and coming[0].arrives <= now:
            engine.arrive(coming.pop(0))
        engine.step()
        running = [job for job in jobs if job.running]
        if not running:
            assert coming, "nothing runs, nothing comes, somebody waits for ever"
            now = coming[0].arrives
            continue
        num = min(run.left for job in running for run in job.running)
        if coming:
            num = min(num, coming[0].arrives - now)
        if engine.admission.promised:
            num = 1
        now += num
        engine.run(num)


# Gangs, width, plain requests


def program(width: int = 4, num_branches: int = 4, length: int = 5, **more: Any) -> Job:
    return Job(0, 1, [length] * num_branches, width, forecast=1, expected=length, **more)


def plain(place: int = 0, length: int = 5) -> Job:
    return Job(0, 0, [length], 0, forecast=place, expected=0)


def test_a_leader_computes_the_prompt_and_its_siblings_follow() -> None:
    """One branch at first; rows and tokens are kept for the others, also from plain requests."""
    engine = engine_of(4, 100, 10)
    job = program()
    engine.arrive(job)
    for place in range(4):
        engine.arrive(plain(place))
    engine.admission.is_plain_due = True
    engine.admission.look()
    # Plain requests go first (they are one branch each); what is left is not enough for four.
    assert (len(job.running), engine.admission.promised) == (0, {})
    engine.queue.clear()
    engine.admission.note_change()
    engine.admission.look()
    assert job.gang is not None
    assert (len(job.running), engine.admission.promised) == (1, {job.gang: 3})
    assert (engine.admission.plain_rows, engine.admission.promised_tokens) == (0, 30)
    engine.run(1)
    assert (len(job.running), engine.admission.promised) == (4, {})


def test_what_waits_is_queued_as_it_would_stand_in_the_engine_s_queue() -> None:
    """Branches that follow their leader, and those that programs need for which there was no room."""
    engine = engine_of(4, 100, 10)
    for _ in range(2):
        engine.arrive(replace(program(), prompt=7))
    assert engine.admission.queued == (0, 0, 0)  # nobody has looked yet
    engine.step()
    assert engine.admission.queued == (3 + 4, 49, 7)  # one leads, three follow it, four wait; a prompt is computed once
    engine.run(1)
    assert engine.admission.queued == (4, 28, 7)
    engine.run(4)
    engine.run(1)
    engine.step()
    assert engine.admission.queued == (3, 21, 0)  # its followers: the prompt is being computed
    engine.run(1)
    assert engine.admission.queued == (0, 0, 0)


def test_who_waits_for_nothing_is_not_queued() -> None:
    """A program whose branches of its own width are in flight stands in line until the next look; one without room stays."""
    engine = engine_of(5, 1000, 10)
    engine.arrive(job := program(width=4, num_branches=8))
    engine.step()
    engine.run(1)
    assert job.gang is not None
    assert (len(job.running), job.gang.ticket.is_waiting) == (4, True)
    assert engine.admission.queued == (0, 0, 0)
    engine.step()
    assert engine.admission.queued == (0, 0, 0)
    engine.arrive(program(width=8, num_branches=8))
    engine.step()
    assert engine.admission.queued == (8, 8, 1)
    engine.admission.leave(job.gang)  # nobody has looked since: it is not counted any more all the same
    assert engine.admission.queued == (8, 8, 1)


def test_where_prompts_are_not_shared_nobody_leads() -> None:
    """All start at once."""
    engine = engine_of(4, 100, 10)
    engine.shares_prompts = False
    engine.arrive(job := program())
    engine.step()
    assert (len(job.running), engine.admission.promised) == (4, {})


@pytest.mark.parametrize(("rows", "pool", "expected"), [(4, 40, 4), (3, 40, 3), (4, 25, 2), (4, 5, 1)])
def test_a_gang_that_the_engine_never_holds_shrinks(rows: int, pool: int, expected: int) -> None:
    """To what an empty engine holds, to one branch at worst."""
    engine = engine_of(rows, pool, 10)
    engine.arrive(job := program())
    engine.step()
    assert len(job.running) + sum(engine.admission.promised.values()) == expected


def test_nothing_starts_where_no_row_is_free() -> None:
    """And it does once one is."""
    engine = engine_of(1, 100, 10)
    engine.arrive(first := program(1, 1))
    engine.step()
    engine.arrive(second := program(1, 1))
    engine.step()
    assert (len(first.running), len(second.running)) == (1, 0)
    engine.run(5)
    engine.step()
    assert (first.is_over, len(second.running)) == (True, 1)


@pytest.mark.parametrize("width", [0, 2])
def test_a_fixed_width_holds_whatever_the_load(width: int) -> None:
    """Without one a program that needs all takes all that the engine has."""
    engine = engine_of(16, 1000, 10, width=width)
    engine.arrive(job := program(width=8, num_branches=8))
    engine.step()
    engine.run(1)
    assert len(job.running) == (width or 8)


def started(engine: TokenEngine, num_programs: int, branches: int, **field: Any) -> Program:
    """The first of some programs that come together, after one look at what may start."""
    admission = engine.admission = Admission(engine, FOREVER, {})
    made = [Program(str(number), parse_field({"branches": branches, **field}, 64)) for number in range(num_programs)]
    for program in made:
        job = Job(0, 1, [5] * branches, branches, 0, 5)
        job.gang = Gang(program, 1, Cost(0, 10), job)
        engine.jobs.append(job)
        admission.arrive(job.gang)
        admission.advance(job.gang)
    admission.look()
    return made[0]


def test_a_program_alone_runs_wider_than_among_others() -> None:
    """Alone a program that may stop early runs wide, among others narrow, but never fewer than could decide."""
    widths: list[int] = []
    for num_programs in (1, 8):
        program = started(TokenEngine(16, 10_000, 10), num_programs, 16)
        widths.append(program.gang)
    assert widths == [10, 4]
    assert program.votes_needed == 3


@pytest.mark.parametrize(("stop", "expected"), [("careful or trials:0.8", 10), ("careful", 4)])
def test_chains_that_decide_together_start_together(stop: str, expected: int) -> None:
    """Few of them decide nothing while they think. Those that vote when they finish are fewer under load."""
    program = started(TokenEngine(32, 100_000, 10), 8, 10, algorithm="long_cot", stop=stop)
    assert program.gang == expected


def test_rows_are_kept_for_probes_of_running_thoughts() -> None:
    """One for every THOUGHTS_PER_ROW; none where no thought runs or as many are being asked."""
    engine = engine_of(8, 100, 10)
    admission = engine.admission
    assert (admission.probe_rows, admission.plain_rows) == (0, None)
    admission.num_thoughts = THOUGHTS_PER_ROW + 1
    assert (admission.probe_rows, admission.plain_rows) == (2, 6)
    admission.num_probes = 2
    assert (admission.probe_rows, admission.plain_rows) == (0, None)


def test_a_look_is_taken_when_something_changed() -> None:
    """Or every LOOK_EVERY steps, as what is free is an estimate; not in between."""
    engine = engine_of(2, 100, 10)
    engine.arrive(first := program(2, 2))
    engine.step()
    engine.run(1)
    engine.arrive(second := program(1, 1))
    engine.step()
    assert not second.running
    first.running.clear()  # rows are free, and nobody said so
    first.running.append(Run(0, 50))
    for _ in range(LOOK_EVERY - 1):
        engine.step()
        assert not second.running
    engine.step()
    assert second.running


# The bound, with arrivals, lengths, gangs and forecasts chosen by an adversary, and the service that was really given
# counted beside it.

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


@settings(suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.one_of(PROGRAM, PROGRAM, PLAIN), min_size=2, max_size=9),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 20),
)
def test_nobody_is_overtaken_by_more_than_the_bound(jobs: list[Job], rows: int, fit: int, patience: int) -> None:
    """Adversaries (10,000 in `make test-deep`): arrivals, lengths, gangs, early stops, and forecasts and charges that lie.

    All come to an end, and no tenant is admitted that is ahead of one that waits by more than patience.
    """
    longest = max(job.prompt + max(job.lengths) for job in jobs)
    engine = engine_of(rows, fit * longest, longest, patience)
    run_all(engine, jobs)
    assert max((wait for job in jobs for wait in job.waits), default=0) <= patience + rows * longest
    assert recorded(engine).furthest <= patience
    admission = engine.admission
    assert (admission.promised, admission.order.num_alive) == ({}, 0)


def stream_of_short_programs(patience: int) -> int:
    """A gang of four among four rows, and short programs that come all the time: what is the gang overtaken by?"""
    jobs = [Job(1, 2, [6] * 4, width=4, forecast=50, expected=4)]
    jobs += [Job(now, 1, [3], width=1, forecast=1, expected=4) for now in range(400) for _ in range(2)]
    engine = engine_of(4, 4 * LONGEST, LONGEST, patience)
    run_all(engine, jobs)
    return max(wait for job in jobs for wait in job.waits)


def test_later_plain_requests_do_not_pass_in_the_shadow_of_earlier_ones() -> None:
    """The engine's own order mixes both. An overdue gang lets the earlier ones go first, and only those."""
    jobs = [Job(0, 0, [8], 0, 10 * number, 0) for number in range(5)]
    jobs += [Job(1, 0, [6] * 4, width=4, forecast=1, expected=6)]
    jobs += [Job(2, 0, [8], 0, 10 * number + place, 0) for number in range(5) for place in range(1, 4)]
    jobs += [Job(0, 0, [3], 0, -1, 0) for _ in range(4)]  # these run first
    engine = engine_of(4, 4 * LONGEST, LONGEST, patience=0)
    run_all(engine, jobs)
    assert max(wait for job in jobs for wait in job.waits) <= 4 * LONGEST


def test_without_the_bound_the_same_check_fails() -> None:
    """The simulation can starve a program: with patience it does not, without it does."""
    assert 50 <= stream_of_short_programs(100) <= 100 + 4 * LONGEST
    assert stream_of_short_programs(FOREVER) > 1000
