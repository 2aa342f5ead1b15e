"""A program inside the engine, and what each Req is to it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from sglang.srt.managers.schedule_batch import Req
from sglang.srt.runtime_context import get_serving
from sglang.srt.utils.weight_versions import record_weight_version_events

from sglang_dynasor.engine.mould import Mould
from sglang_dynasor.policy.admission import Gang
from sglang_dynasor.policy.mixture import Said
from sglang_dynasor.policy.program import BranchState, Program

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import AbortReq

    from sglang_dynasor.policy.confidence import Confidence


@dataclass(slots=True)
class Times:
    """Of a branch, in seconds of `time.perf_counter`; 0: not yet."""

    queued: float
    first_token: float = 0.0
    ended: float = 0.0


@dataclass(slots=True, eq=False)
class LiveProgram:
    """A program and the Reqs it needs: those in flight, and one finished Req for each answer."""

    program: Program
    parent: Req | None  # the client's own request, held until the answer; None where clients send the branches
    number: int = 0  # by arrival
    reqs: dict[int, Req] = field(default_factory=dict[int, Req])
    judges: dict[int, Req | None] = field(
        default_factory=dict[int, Req | None]
    )  # by branch judged; None: the reward model
    comparisons: dict[int, Req | None] = field(
        default_factory=dict[int, Req | None]
    )  # by branch whose answer is compared; None: beside the loop
    probes: dict[int, Req] = field(default_factory=dict[int, Req])  # by branch asked
    mould: Mould | None = None  # of its branches, once the first was made
    lead: str | None = None  # the end of its prompt, once somebody asked
    failure: dict[str, Any] | None = None  # why the last branch failed, told if none finishes
    is_closing: bool = False  # it was told to answer with what it has
    is_answered: bool = False  # its client has what it will get
    times: dict[int, Times] = field(default_factory=dict[int, Times])  # of its branches, where it is traced
    gang: Gang = field(init=False)  # programs whose branches clients send have none

    @property
    def is_traced(self) -> bool:
        """Whether SGLang traces its request."""
        times: Any = None if self.parent is None else self.parent.time_stats
        return times is not None and times.trace_ctx.tracing_enable

    def in_flight(self) -> Iterator[Req]:
        """Its branches that have not left."""
        branches = self.program.branches
        return (req for index, req in self.reqs.items() if branches[index].state is BranchState.IN_FLIGHT)


class Keeper(Protocol):
    """Who looks after the Reqs of one kind: branches, judges or probes. `tag` is of that kind."""

    def has_output(self, req: Req, tag: Any) -> None:
        """It has generated a token and goes on."""
        ...

    def has_ended(self, req: Req, tag: Any) -> None:
        """It has come to its end, by itself or by force."""
        ...

    def is_lost(self, req: Req, tag: Any, abort: AbortReq) -> None:
        """SGLang gave it up outside a step's output: a time-out, a full queue."""
        ...

    def has_left(self, tag: Any) -> None:
        """SGLang no longer holds it. Before `has_ended` and `is_lost`, and once."""
        ...


class BranchKeeper(Keeper, Protocol):
    """Who looks after branches."""

    def go_on(self, live: LiveProgram) -> None:
        """Do what follows from a change that no branch's end has brought."""
        ...


@dataclass(slots=True)
class Tag:
    """What a Req is to its program; one kind for each keeper."""

    live: LiveProgram
    index: int  # of the branch that it is, judges or asks
    keeper: Keeper
    is_inside: bool = field(default=True, init=False)  # SGLang holds it, or will presently
    charged_tokens: int = field(default=0, init=False)  # service its program was charged for it so far
    # What every step asks, found once:
    is_watched: bool = field(default=True, init=False)  # somebody reads the logits of this Req
    confidence: Confidence | None = field(default=None, init=False)  # of the branch that it is, where somebody asked

    def own_tokens(self, num_tokens: int) -> int:
        """Tokens that this Req itself has generated, `num_tokens` being in its output."""
        return num_tokens


@dataclass(slots=True)
class Asking:
    """When a running thought is asked next what it would answer, and what that has cost."""

    at_tokens: int = 0
    num_tokens: int = 0  # of the thought when it was asked last
    is_called: bool = False  # with others of its program: it is asked at its next place
    costs: list[int] = field(default_factory=list[int])  # tokens computed each time
    is_stale: bool = False  # `at_tokens` was found before the last of these was known


@dataclass(slots=True)
class Answering:
    """The answer of a running branch, as far as it is said (reader.py)."""

    num_open: int  # braces that are open; 0: it ends with its line
    is_escaped: bool = False  # the next character is a sign
    said: Said = ()


@dataclass(slots=True)
class BranchTag(Tag):
    """A branch. One that goes on for another, whose thought was closed, begins with that one's tokens."""

    keeper: BranchKeeper  # pyright: ignore[reportIncompatibleVariableOverride]  # never assigned again
    given_tokens: int = 0  # it began with
    spent_tokens: int = 0  # that the Req before it generated
    asking: Asking | None = None  # of a thought that is asked now and then
    answering: Answering | None = field(default=None, init=False)  # it says its answer, or will next
    num_answer_tokens: int = field(default=0, init=False)  # that were followed
    may_be_weak: bool = field(init=False)

    def __post_init__(self) -> None:
        program = self.live.program
        self.confidence = program.branches[self.index].confidence
        self.is_watched = self.confidence is not None
        self.may_be_weak = self.is_watched and program.spec.weak_frac > 0

    def own_tokens(self, num_tokens: int) -> int:
        return num_tokens - self.given_tokens

    def generated(self, num_tokens: int) -> int:
        """Tokens that the model generated for the branch, `num_tokens` being in its output."""
        return self.own_tokens(num_tokens) + self.spent_tokens


@dataclass(slots=True)
class SentTag(BranchTag):
    """A branch that a client sent: it goes to that client by itself, and stands in SGLang's queue like any request."""


@dataclass(slots=True)
class JudgeTag(Tag):
    """What asks the model by one token whether a finished branch is good, or its answer that of another branch."""

    labels: tuple[int, int] = (-1, -1)  # its tokens for good and bad, or yes and no
    reward: float | None = field(default=None, init=False)  # what it found


@dataclass(slots=True)
class ProbeTag(Tag):
    """What asks a running thought for its answer."""

    num_thought_tokens: int = 0  # that it reads
    logprobs: list[float] = field(default_factory=list[float], init=False)  # of its tokens, each the likeliest


def tag_of(req: Req) -> Tag | None:
    """What `req` is to a program, or None for a plain request."""
    return getattr(req, "dynasor_tag", None)


def set_tag(req: Req, tag: Tag) -> None:
    req.dynasor_tag = tag  # type: ignore[attr-defined]  # Req has no slot for us and takes new attributes


def internal_tag_of(req: Req) -> Tag | None:
    """The same, of what the server made itself; None also for a branch that a client sent."""
    tag = tag_of(req)
    return None if isinstance(tag, SentTag) else tag


def branch_tag_of(req: Req) -> BranchTag:
    """The tag of a Req that is a branch."""
    tag = tag_of(req)
    assert isinstance(tag, BranchTag)
    return tag


def generated_tokens(req: Req, num_tokens: int) -> int:
    """Tokens that the model generated for what `req` is, `num_tokens` being in its output."""
    tag = tag_of(req)
    return tag.generated(num_tokens) if isinstance(tag, BranchTag) else num_tokens


def note_end(live: LiveProgram, index: int, req: Req) -> None:
    """What is known of a branch from the Req that ends: found in the cache, generated in its thought, and when.

    And by which weights: SGLang notes a change of them in what it holds, and this Req may wait here to speak.
    """
    record_weight_version_events([req], get_serving().weight_version)
    branch = live.program.branches[index]
    branch.num_cached_tokens = min(req.cached_tokens, len(req.origin_input_ids))
    branch.num_reasoning_tokens = generated_tokens(req, req.reasoning_tokens) if req.require_reasoning else 0
    if (times := live.times.get(index)) is not None:
        times.first_token = times.first_token or getattr(req.time_stats, "prefill_finished_time", 0.0)
        times.ended = time.perf_counter()


def arrival_of(req: Req) -> int:
    """When a request that is no program came, as its line counts arrivals; 0: before any program that is there now."""
    return getattr(req, "dynasor_arrival", 0)


def set_arrival(req: Req, arrival: int) -> None:
    req.dynasor_arrival = arrival  # type: ignore[attr-defined]


def record_of(req: Req) -> dict[str, Any] | None:
    """The record to send with a request's last output, or None."""
    return getattr(req, "dynasor_record", None)


def set_record(req: Req, record: dict[str, Any]) -> None:
    req.dynasor_record = record  # type: ignore[attr-defined]


def hide(req: Any) -> None:
    """Mark a finished Req as already told, so that SGLang's streamer passes it over."""
    req.finished_output = True
