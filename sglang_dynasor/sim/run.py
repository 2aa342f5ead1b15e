"""One simulation: questions come, an engine serves them in one way, and what that took is counted."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from math import inf

from sglang_dynasor.config import DynasorConfig
from sglang_dynasor.errors import ConfigError, FieldError
from sglang_dynasor.policy.spec import ProgramSpec, parse_field
from sglang_dynasor.sim.costs import Costs
from sglang_dynasor.sim.engine import Engine
from sglang_dynasor.sim.peers import PEERS, Peer
from sglang_dynasor.sim.request import Size
from sglang_dynasor.sim.samples import Question
from sglang_dynasor.sim.solving import Client, Programs, Solved

PROGRAM = "program"  # begins a way that is a program: "program stop=predictive:0.05 width=3"


@dataclass(frozen=True, slots=True)
class Way:
    """How questions are solved: by a client's own loop, or as programs of the server's."""

    name: str
    how: Peer | ProgramSpec


def parse_way(text: str, cap: int, config: DynasorConfig) -> Way:
    """A peer's name, or `program` with keys of the field, as in "program stop=predictive:0.05 width=3".

    Raises:
        ConfigError: it is neither, or asks for what recorded samples cannot show.
    """
    first, *pairs = text.split() or [""]
    if first in PEERS and not pairs:
        return Way(text, PEERS[first])
    if first != PROGRAM:
        raise ConfigError(f"--ways {text!r} is no way; use one of {', '.join(PEERS)}, or '{PROGRAM} KEY=VALUE ...'")
    field: dict[str, object] = {"branches": cap}
    for pair in pairs:
        key, sep, value = pair.partition("=")
        if not sep:
            raise ConfigError(f"--ways {text!r}: {pair!r} is no KEY=VALUE")
        field[key] = int(value) if value.isdecimal() else value
    try:
        spec = parse_field(field, config.dynasor_max_branches)
    except FieldError as error:
        raise ConfigError(f"--ways {text!r}: {error}") from None
    unseen = {
        "a judge": spec.judge is not None,
        "statistics of the logits": spec.needs_statistics,
        "probes of a thought": spec.thought is not None,
        "a deadline": spec.deadline_s is not None,
        "branches that clients send": spec.program is not None,
        "a budget": spec.budget is not None,
    }
    if wanted := [name for name, is_wanted in unseen.items() if is_wanted]:
        raise ConfigError(f"--ways {text!r} needs {wanted[0]}, which the simulator does not model; leave it out")
    return Way(text, spec)


@dataclass(frozen=True, slots=True)
class Load:
    """When questions come: at fixed times, or so many at once, each followed by the next when it is answered."""

    times_s: tuple[float, ...] = ()
    num_at_once: int = 0

    def __post_init__(self) -> None:
        if bool(self.times_s) == (self.num_at_once > 0):
            raise ConfigError("a load is either times or a number at once; give one of the two")


@dataclass(frozen=True, slots=True)
class Run:
    """What came of one simulation, and what the engine counted."""

    solved: tuple[Solved, ...]  # in the order of the questions
    wall_s: float
    num_generated: int  # tokens
    num_wasted: int  # tokens of those: after an end
    num_computed: int  # tokens of prefill passes
    num_steps: int  # decode
    num_passes: int
    num_retracted: int
    most_kv_tokens: int
    kv_left_tokens: int
    max_overtaken_tokens: int


class _Agenda:
    """What happens when; of equal times in the order in which it was entered."""

    def __init__(self) -> None:
        self.entries: list[tuple[float, int, Callable[[], None]]] = []
        self.numbers = count()

    def add(self, at_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self.entries, (at_s, next(self.numbers), action))


def simulate(
    way: Way, questions: Sequence[Question], load: Load, size: Size, costs: Costs, config: DynasorConfig
) -> Run:
    """Serve `questions` one way. The same arguments give the same result in every process.

    Args:
        questions: with the samples that their branches take, in order; as many as `load.times_s` where it has times.

    Raises:
        ConfigError: a request that the engine can never hold, or no greedy sample where one is asked for.
    """
    engine, agenda = Engine(size, costs, config), _Agenda()
    programs = Programs(engine, agenda.add)
    solved: dict[int, Solved] = {}
    coming = iter(range(len(questions)))

    def ask(index: int, at_s: float) -> None:
        question = questions[index]

        def tell(what: Solved) -> None:
            solved[index] = what
            if load.num_at_once:
                ask_next(what.answered_s)

        if isinstance(way.how, Peer):
            if way.how.is_greedy:
                question = _greedy(question)
            agenda.add(at_s, Client(engine, agenda.add, way.how, question, at_s, tell).begin)
        else:
            spec = way.how
            agenda.add(at_s + costs.request_s, lambda: programs.take(question, spec, at_s, tell))

    def ask_next(at_s: float) -> None:
        index = next(coming, None)
        if index is not None:
            ask(index, at_s)

    if load.num_at_once:
        for _ in range(load.num_at_once):
            ask_next(0.0)
    else:
        for index, at_s in enumerate(load.times_s):
            ask(index, at_s)
    _run(engine, agenda)
    if len(solved) != len(questions):
        raise AssertionError(f"{len(questions) - len(solved)} questions were never answered")
    return Run(
        tuple(solved[index] for index in range(len(questions))),
        max((one.answered_s for one in solved.values()), default=0.0),
        engine.num_generated,
        engine.num_wasted,
        engine.num_computed,
        engine.num_steps,
        engine.num_passes,
        engine.num_retracted,
        engine.pool.most_used,
        engine.pool.used,
        engine.admission.max_overtaken_tokens,
    )


def _run(engine: Engine, agenda: _Agenda) -> None:
    entries = agenda.entries
    while True:
        between_s = engine.now_s  # what happened during the step is done as of when it happened
        while entries and entries[0][0] <= between_s:
            engine.now_s, _, action = heapq.heappop(entries)
            action()
        engine.now_s = between_s
        if not engine.step(entries[0][0] if entries else inf):
            if not entries:
                return
            engine.now_s = max(engine.now_s, entries[0][0])


def _greedy(question: Question) -> Question:
    if question.greedy is None:
        raise ConfigError(f"question {question.id} has no greedy sample; leave the way 'greedy' out")
    return replace(question, samples=(question.greedy,))
