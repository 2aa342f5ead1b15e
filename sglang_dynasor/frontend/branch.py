"""A branch of an author's own: a fork of the state, told when it may generate."""

from __future__ import annotations

from typing import Any, Protocol

from sglang.lang.interpreter import ProgramState

from sglang_dynasor.policy.answers import read_answer
from sglang_dynasor.policy.branch import Ending
from sglang_dynasor.policy.spec import ProgramSpec, is_greedy


class Counter(Protocol):
    """Whoever counts a program's branches (counting.py)."""

    id: str
    spec: ProgramSpec

    def admit(self, branch: Branch, name: str | None, *, is_greedy: bool) -> dict[str, Any] | None:
        """What to send with the generation `name` of a branch, once its turn has come; None: it is not needed."""
        ...

    def take(self, branch: Branch, text: str, meta_info: dict[str, Any]) -> None:
        """A branch's generation has come to its end, or was ended."""
        ...

    def lose(self, branch: Branch, error: Exception) -> bool:
        """A branch's request has failed. Returns whether the program goes on without it."""
        ...


class Branch(ProgramState):
    """A fork of the state, one branch of its program.

    Use it as any state: append to it, generate in it. The generation that answers is the first, or the one named `final`
    in the declaration. After the program has decided it generates nothing any more.
    """

    def __init__(self, executor: Any, program: Counter, number: int):
        super().__init__(executor)
        self.program = program
        self.number = number
        self.ended = False  # early: the program did not need it, its text is partial or empty
        self.reward: float | None = None
        self.num_tokens = 0
        self.index: int | None = None  # in the policy's program; None: never started
        self.served_index: int | None = None  # in the engine's, where that counts; known once it has answered
        self.lead = self.said = ""  # before the generation that answers, and what it has generated
        self.ending = Ending()  # of that generation
        self.is_finished = False  # its answer is there
        self.is_counted = False  # it has voted or abstained
        self.is_answering = False

    @property
    def output(self) -> str:
        """What was written and generated since the fork; waits for it."""
        return self.text()[self.stream_executor.fork_start_text_pos :]

    @property
    def is_idle(self) -> bool:
        """Whether it has begun and generates nothing now, but may yet vote."""
        return self._is_open and not self.is_under_way

    @property
    def is_under_way(self) -> bool:
        """Whether its executor has something to do, and will do it."""
        return bool(self.stream_executor.queue.unfinished_tasks) and not self.stream_executor.is_finished

    @property
    def has_failed(self) -> bool:
        """Whether it will never vote, by something else than a generation: that is told by `fail`."""
        return self._is_open and self.stream_executor.error_ is not None

    @property
    def _is_open(self) -> bool:
        return self.index is not None and not self.is_counted and not self.ended

    @property
    def answer(self) -> str | None:
        """What the program's extractor finds in the generation that answers; None: an abstention. Waits for it."""
        self.sync()
        return read_answer(self.lead, self.said, self.program.spec.answer, is_cut=self.ending.is_cut)

    @property
    def rid(self) -> str:
        return f"dynasor-{self.program.id}-{self.number}."

    # Called by the executor's thread (seat.py).

    def start(self, executor: Any, sampling: Any) -> dict[str, Any] | None:
        self.lead = executor.text_
        is_alike = is_greedy({"temperature": sampling.temperature, "top_k": sampling.top_k})
        return self.program.admit(self, _current_name(executor), is_greedy=is_alike)

    def finish(self, text: str, meta_info: dict[str, Any]) -> None:
        self.program.take(self, text, meta_info)

    def fail(self, error: Exception) -> bool:
        return self.program.lose(self, error)


def _current_name(executor: Any) -> str | None:
    """The variable that an executor is generating: the first that has no value yet, in order of submission."""
    for name, event in executor.variable_event.items():
        # A scope under way has a position for a value until it is closed.
        if not event.is_set() and not isinstance(executor.variables.get(name), int):
            return name
    return None
