"""Which waiting programs start now, how wide, what is promised to their siblings, and when plain requests go.

Pure policy over what an engine answers: the scheduler, a simulator and the adversaries in tests/test_admission.py run the same.
Programs wait here, not in the engine's queue: only branches that fit are started.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import ceil, inf
from typing import Any, NamedTuple, Protocol

from sglang_dynasor.policy.forecast import Forecast
from sglang_dynasor.policy.gang import Cost, Room
from sglang_dynasor.policy.line import Need, Ticket
from sglang_dynasor.policy.look import Offer, look
from sglang_dynasor.policy.order import Order, Plain
from sglang_dynasor.policy.pace import USUAL_ROWS
from sglang_dynasor.policy.program import Program
from sglang_dynasor.policy.shared_budget import SharedBudgets
from sglang_dynasor.policy.width import Load, best_width

THOUGHTS_PER_ROW = 8
LOOK_EVERY = 16  # steps after which waiting programs are looked at though nothing finished: estimates of room change


@dataclass(slots=True, eq=False)
class Gang:
    """A program as admission sees it: its place in line, and what its branches take together."""

    program: Program
    prompt_tokens: int  # computed once for all of them
    cost: Cost  # of a gang whose prompt nobody holds
    owner: Any  # what the engine knows it by
    rank: int = 0  # of its priority: the least goes first
    is_prompt_cached: bool = False  # until then only the first branch runs, so that siblings hit the cache
    ticket: Ticket = field(init=False)


class Waiting(NamedTuple):
    """A request that is no program and waits in the engine's own queue."""

    arrival: int  # as `Admission.note_arrival` gave it; 0: before any program that is there now
    most_tokens: float  # that it may generate
    cost: Cost
    rank: int = 0  # of its priority


class Engine(Protocol):
    """What admission asks of an engine. Rows are requests that run at once, tokens those of the KV pool."""

    @property
    def whole(self) -> Room:
        """What it has when it is empty."""
        ...

    @property
    def shares_prompts(self) -> bool:
        """Whether a prompt that one branch has computed is found by the next."""
        ...

    @property
    def is_empty(self) -> bool:
        """Whether nothing runs and no branch is queued, so that nothing will leave it either."""
        ...

    @property
    def free_rows(self) -> int:
        """Rows that no running request and no queued branch has; may be negative."""
        ...

    @property
    def free_tokens(self) -> int:
        """Tokens that no running request and no queued branch has or may still need; may be negative."""
        ...

    @property
    def num_branches(self) -> int:
        """Branches that run or are queued."""
        ...

    @property
    def num_plain_waiting(self) -> int:
        """Requests that wait and are no programs."""
        ...

    def has_adapter_room(self, gang: Gang) -> bool:
        """Whether what runs leaves room for the gang's adapter, of which an engine takes only so many at once."""
        ...

    def waiting(self, num: int) -> Iterable[Waiting]:
        """The first so many requests that wait and are no programs, in the order in which the engine would admit them."""
        ...

    def progress_tokens(self, gang: Gang) -> int:
        """What the gang's branches in flight have generated so far."""
        ...

    def start(self, gang: Gang, num_branches: int) -> None:
        """Make so many branches and queue them before everything else."""
        ...


class Admission:
    """The line of one engine, and who may enter.

    Args:
        patience_tokens: service that later arrivals may get before a waiting program is head of the line.
        weights: of tenants that differ from 1.
        width: branches in flight of every program, whatever the load; 0: the load decides.
        max_price: what a branch must be worth under the heaviest load (`end_if_dear`); 0: nothing.
    """

    def __init__(
        self, engine: Engine, patience_tokens: int, weights: Mapping[str, float], width: int = 0, max_price: float = 0.0
    ):  # fmt: skip
        self.engine = engine
        self.max_price = max_price
        self.budgets = SharedBudgets()
        self.fixed_width = width
        self.order = Order(patience_tokens, weights)
        self.forecast = Forecast()
        self.fixed_rows = USUAL_ROWS  # that take as long as a step's fixed part (pace.py)
        self.promised: dict[Gang, int] = {}  # siblings that follow once their leader has cached the prompt
        self.is_plain_due = True  # whether plain requests may start as far as room goes, after the last look
        self.num_thoughts = 0  # running branches that are asked for their answer now and then
        self.num_probes = 0  # that ask one now
        self.max_overtaken_tokens = 0
        self.price = 0.0  # of a branch when a program was last asked about it
        self._is_stale = False
        self._num_steps = 0  # since the last look
        self._num_kept = 0  # programs that still waited after that
        self._kept_need = self.order.needed  # by them

    # The line

    def arrive(self, gang: Gang) -> None:
        """A program has come. It does not wait yet."""
        gang.is_prompt_cached = not self.engine.shares_prompts
        gang.ticket = self.order.arrive(gang.program.spec.tenant, gang, gang.rank)

    def wait(self, gang: Gang) -> None:
        """Let a program that wants branches stand in line, or move in it."""
        progress = self.engine.progress_tokens(gang)
        self.order.wait(gang.ticket, self.forecast.remaining_tokens(gang.program, progress), self._need(gang))
        self._is_stale = True

    def _need(self, gang: Gang) -> Need:
        """At least one branch: it would start one if there were room."""
        program = gang.program
        num_there = program.num_in_flight + self.promised.get(gang, 0)
        num = max(1, min(ceil(self.forecast.branches(program)) - num_there, program.num_unused))
        prompt_tokens = num * gang.prompt_tokens
        if not self.engine.shares_prompts:
            return Need(num, prompt_tokens, prompt_tokens)
        return Need(num, prompt_tokens, 0 if gang.ticket.is_started else gang.prompt_tokens)

    @property
    def queued(self) -> Need:
        """What the engine's own queue does not show: waiting programs' branches, and those that follow their leader."""
        needed = self.order.needed
        if self._is_stale:  # some stand in line until the next look only, which finds that they want nothing now
            needed = Need(*map(min, needed, self._kept_need))
        following_tokens = sum(num * gang.prompt_tokens for gang, num in self.promised.items())
        return Need(
            needed.num_branches + self._num_promised, needed.prompt_tokens + following_tokens, needed.new_tokens
        )

    def follow(self, gang: Gang) -> None:
        """Start the siblings that were promised to follow their leader."""
        num_branches = min(self.promised.pop(gang, 0), gang.program.num_unused)
        if num_branches:
            self.engine.start(gang, num_branches)

    def advance(self, gang: Gang) -> None:
        """Something has changed about a program that goes on: its siblings follow, and it stands in line for more."""
        if gang.is_prompt_cached:
            self.follow(gang)
        if gang.program.num_unused and gang not in self.promised:
            self.wait(gang)

    def stop_waiting(self, gang: Gang) -> None:
        """The program starts by another way."""
        self.order.stop_waiting(gang.ticket)

    def leave(self, gang: Gang) -> None:
        """The program is over."""
        self.promised.pop(gang, None)
        self.order.end(gang.ticket)
        self.budgets.leave(gang.program)
        self._is_stale = True

    def charge(self, gang: Gang, tokens: int) -> None:
        """The program was given `tokens` of service (negative: a correction)."""
        self.order.charge(gang.ticket, tokens)

    def note_change(self) -> None:
        """Something has left the engine: look at the line in the next step."""
        self._is_stale = True

    # What branches cost

    def share_out(self) -> list[Gang]:
        """Let programs start what their budgets give them now. Called once per step, before `look`.

        Returns:
            Programs that have come to their end: their budget is used up.
        """
        ended: list[Gang] = []
        for budget in list(self.budgets.due):
            shares = budget.share_out(self.engine.whole.rows, self.engine.progress_tokens)
            for gang in shares.granted:
                self.advance(gang)
            ended += shares.ended
        return ended

    def load_frac(self, gang: Gang) -> float:
        """Programs and requests that others have here and that wait, over those and the rows that run, in [0, 1).

        0 where nobody waits for room. Those of the last look count: who has just come may start in the next.
        """
        num_kept = min(self._num_kept, self.order.num_waiting - gang.ticket.is_waiting)
        num_waiting = num_kept + self.engine.num_plain_waiting
        num_running = self.engine.whole.rows - self.engine.free_rows
        return num_waiting / (num_waiting + max(1, num_running)) if num_waiting > 0 else 0.0

    def end_if_dear(self, gang: Gang) -> None:
        """End a program of which one more branch is not worth its price: the operator's, times the load."""
        program = gang.program
        if self.max_price and program.has_price:
            self.price = self.max_price * self.load_frac(gang)
            program.end_if_dear(self.price)

    # Requests that are no programs

    def note_arrival(self, rank: int = 0) -> int:
        """The arrival of a request that is no program; 0 where no programs are there to compare with."""
        if not self.order.num_alive:
            return 0
        self._is_stale |= not self.is_plain_due  # it may be its turn, though it was nobody's at the last look
        return self.order.line("", rank).arrive()

    def note_departure(self, arrival: int, num_tokens: int, rank: int = 0) -> None:
        """A request that is no program has left, whatever came of it; it was served `num_tokens`, its prompt included."""
        self._is_stale = True
        if arrival:
            self.order.charge_arrival(self.order.line("", rank), arrival, num_tokens)

    @property
    def plain_rows(self) -> int | None:
        """Requests that are no programs and may start in this step; None: as many as the engine finds room for."""
        if not self.is_plain_due:
            return 0
        if not (self.promised or self.probe_rows):
            return None
        return max(0, self.engine.free_rows - self._num_promised - self.probe_rows)

    @property
    def latest_plain(self) -> float:
        """The arrival up to which plain requests of the last rank may start: that of the program they would overtake beyond patience."""
        order, rank = self.order, self.last_rank
        oldest = order.line("", int(rank)).oldest() if rank < inf else None
        return oldest.arrival if oldest is not None and order.is_overdue(oldest) else inf

    @property
    def last_rank(self) -> float:
        """The rank up to which plain requests may start: that of the most urgent program that waits; infinite where none does."""
        return self.order.urgent_rank

    # What is spoken for

    @property
    def probe_rows(self) -> int:
        """Rows kept free for probes, which would starve in a full batch: one for every THOUGHTS_PER_ROW thoughts."""
        return max(0, -(-self.num_thoughts // THOUGHTS_PER_ROW) - self.num_probes)

    @property
    def promised_tokens(self) -> int:
        return sum(num * gang.cost.branch_tokens for gang, num in self.promised.items())

    @property
    def _num_promised(self) -> int:
        return sum(self.promised.values())

    # One look

    def look(self) -> Gang | None:
        """Start the waiting programs that fit, in order. Called once per step, before the engine admits others.

        Returns:
            The program that room is saved for, if any: its prompt is used next.
        """
        if not self.order.num_waiting:
            self.is_plain_due = True
            self._note_kept()
            return None
        engine = self.engine
        self._num_steps += 1
        is_empty = engine.is_empty
        if not (self._is_stale or is_empty or self._num_steps >= LOOK_EVERY):
            return None
        self._is_stale, self._num_steps = False, 0
        rows = engine.free_rows - self._num_promised - self.probe_rows
        if rows <= 0:
            self._note_kept()
            return None
        room = Room(rows, engine.free_tokens - self.promised_tokens)
        self.is_plain_due, head = look(
            self.order,
            room,
            engine.whole,
            plain=self._plain(),
            is_empty=is_empty,
            offer=lambda ticket: self._offer(ticket.owner),
            start=lambda ticket, num: self._admit(ticket.owner, num),
            set_aside_plain=self._set_aside_plain,
        )
        self._note_kept()
        return None if head is None else head.owner

    def _note_kept(self) -> None:
        self._num_kept, self._kept_need = self.order.num_waiting, self.order.needed

    def _offer(self, gang: Gang) -> Offer:
        program = gang.program
        wanted, least = program.num_to_start(self._width(gang), is_fixed=self.fixed_width > 0)
        if self._takes_all(program):
            wanted = self._all_wanted(gang)
        is_there = gang.is_prompt_cached and program.num_in_flight > 0
        cost = Cost(0, gang.cost.branch_tokens) if is_there else gang.cost
        return Offer(wanted, least, cost, self.engine.has_adapter_room(gang))

    def _admit(self, gang: Gang, num: int) -> None:
        program, ticket = gang.program, gang.ticket
        program.overtaken_tokens = self.order.overtaken_tokens(ticket)
        self.max_overtaken_tokens = max(self.max_overtaken_tokens, program.overtaken_tokens)
        if not ticket.is_started:
            ticket.is_started, program.gang = True, num
            self.order.charge(ticket, gang.prompt_tokens)
        if self.engine.shares_prompts and not program.num_in_flight:
            gang.is_prompt_cached = False  # nobody holds its KV: it may have been evicted since
        if gang.is_prompt_cached:
            self.engine.start(gang, num)
        else:  # one computes the prompt, the others find it in the cache
            num_leaders = 0 if program.num_in_flight else 1
            if num_following := num - num_leaders:
                self.promised[gang] = self.promised.get(gang, 0) + num_following
            if num_leaders:
                self.engine.start(gang, num_leaders)
        if self._takes_all(program) and self._all_wanted(gang):
            self.wait(gang)  # for the others

    def _takes_all(self, program: Program) -> bool:
        """Whether load does not narrow it: no branch can be saved, so each is started as soon as there is room.

        Not thoughts: they end early whatever the vote, and leave rows to their probes.
        """
        return program.needs_all and program.spec.thought is None and not self.fixed_width

    def _all_wanted(self, gang: Gang) -> int:
        """Branches that the program would start now if the load narrowed nothing, besides those promised to it."""
        return max(0, gang.program.num_to_start(gang.program.spec.branches)[0] - self.promised.get(gang, 0))

    def _width(self, gang: Gang) -> int:
        """Branches that one program may have in flight under the present load."""
        if self.fixed_width:
            return self.fixed_width
        engine, forecast, program = self.engine, self.forecast, gang.program
        whole, evidence = engine.whole, program.evidence
        num_rows = whole.rows - engine.free_rows
        num_plain = max(0, num_rows - engine.num_branches) + engine.num_plain_waiting
        num_others = self.order.num_alive - 1 + num_plain
        load = Load(self.fixed_rows, max(0, num_rows - program.num_in_flight), num_others)
        decides_together = program.chains is not None and program.chains.decide_together
        width = best_width(
            evidence, program.spec.stop, forecast.drift(evidence), load, decides_together=decides_together
        )
        most = min(whole.rows, int(whole.tokens / max(1.0, forecast.length_tokens(program))))
        if program.spec.thought is not None:  # some rows are left for its probes
            most = most * THOUGHTS_PER_ROW // (THOUGHTS_PER_ROW + 1)
        return max(1, min(width, most))

    def _plain(self) -> Plain | None:
        first = next(iter(self.engine.waiting(1)), None)
        if first is None:
            return None
        line = self.order.line("", first.rank)
        return Plain(line, first.arrival, min(self.forecast.plain_tokens.value, first.most_tokens))

    def _set_aside_plain(self, room: Room) -> None:
        last = self.last_rank
        for waiting in self.engine.waiting(max(0, room.rows)):
            if waiting.rank > last:
                break
            room.take(waiting.cost, 1)
