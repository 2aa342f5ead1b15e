"""What is done with a question on an engine: as a program of the server's, or by a client that samples and votes itself."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import lru_cache

from sglang_dynasor.policy.admission import Gang
from sglang_dynasor.policy.branch import BranchState
from sglang_dynasor.policy.equal import answer_key
from sglang_dynasor.policy.program import Program
from sglang_dynasor.policy.spec import ProgramSpec
from sglang_dynasor.policy.votes import Votes
from sglang_dynasor.sim.engine import Engine
from sglang_dynasor.sim.peers import Peer
from sglang_dynasor.sim.request import Request
from sglang_dynasor.sim.samples import Question


@dataclass(frozen=True, slots=True)
class Solved:
    """A question that was answered, and what that took."""

    question: str
    answer: str | None
    is_right: bool | None  # None: nobody knows
    num_tokens: int  # of all its branches; of those that were ended, until then
    num_branches: int
    arrived_s: float
    answered_s: float

    @property
    def latency_s(self) -> float:
        return self.answered_s - self.arrived_s


Later = Callable[[float, Callable[[], None]], None]  # do something at a time
Tell = Callable[[Solved], None]


@lru_cache(maxsize=65_536)
def _key(answer: str) -> str:
    return answer_key(answer)


@dataclass(slots=True, eq=False)
class Held:
    """A program that the server holds: what `engine/live.py` is inside SGLang."""

    program: Program
    question: Question
    prompt: Hashable
    number: int  # by arrival
    arrived_s: float
    tell: Tell
    requests: dict[int, Request] = field(default_factory=dict[int, Request])  # in flight, by branch
    gang: Gang = field(init=False)
    is_held: bool = True  # not yet answered


class Programs:
    """The server's programs: what happens to a branch is told to its program, and what that decides is done.

    As `engine/intake.py`, `branches.py`, `voting.py` and `ends.py` do inside SGLang.
    """

    def __init__(self, engine: Engine, later: Later):
        self.engine = engine
        self.admission = engine.admission
        self.later = later
        self.num_arrived = 0
        engine.make_branches = self._make

    def take(self, question: Question, spec: ProgramSpec, arrived_s: float, tell: Tell) -> None:
        """A client's request for a program has come to the scheduler."""
        self.num_arrived += 1
        program = Program(str(self.num_arrived), spec)
        held = Held(program, question, question.id, self.num_arrived, arrived_s, tell)
        held.gang = Gang(program, question.prompt_tokens, self.engine.gang_cost(question.prompt_tokens), held)
        self.admission.arrive(held.gang)
        self.admission.advance(held.gang)

    def _make(self, gang: Gang, num_branches: int) -> None:
        held: Held = gang.owner
        expected_tokens = int(self.admission.forecast.length_tokens(gang.program))
        for _ in range(num_branches):
            index = gang.program.start_branch()
            question = held.question
            request = Request(
                held.prompt, question.prompt_tokens, question.samples[index].num_tokens, index, self, gang, held.number
            )
            held.requests[index] = request
            self._charge(request, gang, expected_tokens)
            self.engine.put(request)

    def _charge(self, request: Request, gang: Gang, tokens: int) -> None:
        self.admission.charge(gang, tokens - request.charged_tokens)
        request.charged_tokens = tokens

    def has_output(self, request: Request) -> None:
        """Its prompt is there: siblings follow."""
        assert request.gang is not None
        if not request.gang.is_prompt_cached:
            request.gang.is_prompt_cached = True
            if request.gang.owner.is_held:
                self.admission.follow(request.gang)

    def has_ended(self, request: Request) -> None:
        """It votes, unless its program no longer needs it."""
        gang = request.gang
        assert gang is not None
        held, program, index = gang.owner, gang.program, request.index
        self.admission.note_change()
        self._charge(request, gang, request.done)
        held.requests.pop(index, None)
        if program.branches[index].state is not BranchState.IN_FLIGHT:
            return
        self.admission.forecast.branch_tokens.learn(request.done)
        program.count(index, held.question.samples[index].answer, request.done)
        if held.is_held:
            gang.is_prompt_cached = True
            self.admission.end_if_dear(gang)
            if program.reason is not None:
                self._answer(held)
            else:
                self.admission.advance(gang)

    def _answer(self, held: Held) -> None:
        program, question = held.program, held.question
        held.is_held = False
        for index, request in list(held.requests.items()):
            if program.branches[index].state is BranchState.IN_FLIGHT:
                program.end(index, self.engine.generated(request))
                self.engine.end(request)
        winner = program.winner
        if winner is not None:
            self.admission.forecast.learn(program)
        self.admission.leave(held.gang)
        answer = None if winner is None else program.branches[winner].answer
        solved = Solved(
            question.id,
            answer,
            False if winner is None or answer is None else question.samples[winner].is_correct,
            sum(branch.num_tokens for branch in program.branches),
            len(program.branches),
            held.arrived_s,
            self.engine.now_s + self.engine.costs.request_s,
        )
        self.later(solved.answered_s, lambda: held.tell(solved))


class Client:
    """One question of a client that sends plain requests, reads their answers and votes by itself."""

    def __init__(self, engine: Engine, later: Later, peer: Peer, question: Question, arrived_s: float, tell: Tell):
        self.engine, self.later, self.peer, self.question = engine, later, peer, question
        self.arrived_s, self.tell = arrived_s, tell
        # What SGLang copies itself does not come over the network one by one.
        self.copy_s = 0.0 if peer.is_one_request else engine.costs.request_s
        self.votes = Votes()
        self.num_asked = 0
        self.num_tokens = 0
        self.inside: dict[int, Request] = {}
        self.is_done = False
        self.is_settled = False  # what it cost is known

    def begin(self) -> None:
        """Send what comes first."""
        if self.peer.is_one_request:  # SGLang computes the prompt, and then queues n copies
            self._send(-1, 0, self.engine.costs.request_s)
        else:
            self._go_on()

    def _go_on(self) -> None:
        more = self.peer.more(self.votes.recent, self.num_asked, len(self.question.samples))
        if more is None:
            self._stop()
            return
        for _ in range(more):
            self.num_asked += 1
            self._send(self.num_asked - 1, self.question.samples[self.num_asked - 1].num_tokens, self.copy_s)

    def _send(self, index: int, length: int, delay_s: float) -> None:
        request = Request(self.question.id, self.question.prompt_tokens, length, index, self)
        self.later(self.engine.now_s + delay_s, lambda: self._enter(request))

    def _enter(self, request: Request) -> None:
        if not self.is_settled:
            self.inside[request.index] = request
            request.arrival = self.engine.admission.note_arrival()
            self.engine.put(request)

    def has_output(self, request: Request) -> None:
        """Nothing: only its end counts."""

    def has_ended(self, request: Request) -> None:
        """Its client hears of it, where it still listens."""
        admission, index = self.engine.admission, request.index
        admission.note_departure(request.arrival, request.prompt_tokens + request.done)
        self.inside.pop(index, None)
        if self.is_settled:
            return
        self.num_tokens += request.done
        if index < 0:
            self._go_on()
        else:
            admission.forecast.plain_tokens.learn(request.done)
            self.later(self.engine.now_s + self.copy_s, lambda: self._hear(index))

    def _hear(self, index: int) -> None:
        if not self.is_done:
            answer = self.question.samples[index].answer
            self.votes.cast(index, None if answer is None else _key(answer))
            self._go_on()

    def _stop(self) -> None:
        self.is_done = True
        now_s, request_s = self.engine.now_s, self.engine.costs.request_s
        answered_s = now_s + (request_s if self.peer.is_one_request else 0.0)
        if self.num_asked > len(self.votes.recent):
            self.later(now_s + request_s, lambda: self._cancel(answered_s))
        else:
            self.later(answered_s, lambda: self._cancel(answered_s))

    def _cancel(self, answered_s: float) -> None:
        """End what is still there: by then the server knows that nobody listens."""
        self.is_settled = True
        for request in list(self.inside.values()):
            self.num_tokens += self.engine.end(request)
        sample = None if not self.votes.voters else self.question.samples[min(self.votes.ranking[0])]
        self.tell(
            Solved(
                self.question.id,
                None if sample is None else sample.answer,
                False if sample is None else sample.is_correct,
                self.num_tokens,
                self.num_asked,
                self.arrived_s,
                answered_s,
            )
        )
