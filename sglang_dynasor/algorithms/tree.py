"""What every algorithm works on: a tree of sampled texts, and the shape that all of them share."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

ROOT = 0


class Reason(StrEnum):
    """Why a search is over; the first four are a record's `stop_reason` in the engine too."""

    CERTAIN = "certain"  # the stopping rule fired
    CAP = "cap"  # the budget is used up
    BUDGET = "budget"  # the tokens that it shares with others are used up
    FAILED = "failed"  # nothing came back that could answer
    HOPELESS = "hopeless"  # abandoned: everything sampled is worth less than the author's level (opt-in)


class Expansion(NamedTuple):
    """What to sample now: `num` children of a node."""

    node: int
    num: int


class Sample(NamedTuple):
    """What was sampled after a node's text."""

    text: str
    num_tokens: int
    is_terminal: bool  # the model came to its end, or may not go on
    reward: float | None = None  # in [0, 1]; None where nobody judged
    answer: str | None = None  # as written; read only where terminal
    key: str | None = None  # as counted; None: by what `answer_key` says of the answer
    is_cut: bool = False  # it ended by its length


class Choice(NamedTuple):
    """What a search answers."""

    answer: str | None
    node: int | None  # the terminal node whose path gave the answer; None where nothing finished


@dataclass(slots=True)
class Node:
    """One sampled text. The root is the question and has none."""

    parent: int | None
    depth: int
    text: str = ""
    num_tokens: int = 0
    reward: float | None = None
    is_terminal: bool = False
    answer: str | None = None
    key: str | None = None
    is_cut: bool = False
    children: list[int] = field(default_factory=list[int])


@dataclass(slots=True)
class Tree:
    """Nodes by index, in the order in which they came; the root is 0."""

    nodes: list[Node] = field(default_factory=lambda: [Node(None, 0)])

    def __getitem__(self, index: int) -> Node:
        return self.nodes[index]

    def __len__(self) -> int:
        return len(self.nodes)

    def add(self, parent: int, sample: Sample) -> int:
        """Put a sample under `parent`; returns its index."""
        node = Node(
            parent, self.nodes[parent].depth + 1, sample.text, sample.num_tokens, sample.reward,
            sample.is_terminal, sample.answer if sample.is_terminal else None, sample.key, sample.is_cut,
        )  # fmt: skip
        self.nodes.append(node)
        self.nodes[parent].children.append(len(self.nodes) - 1)
        return len(self.nodes) - 1

    def path(self, index: int) -> list[int]:
        """Nodes from the root to `index`, both included."""
        found = [index]
        while (parent := self.nodes[found[-1]].parent) is not None:
            found.append(parent)
        return found[::-1]

    def text(self, index: int) -> str:
        """Everything sampled from the question to the end of node `index`."""
        return "".join(self.nodes[i].text for i in self.path(index))


class Algorithm(Protocol):
    """What a driver needs of an algorithm, and an author of what it found.

    Whatever `expand` asks for is in flight until it was reported or lost; children of one node may be reported in any
    order. After the end `expand` asks for nothing and reports are only counted.
    """

    is_stepwise: bool  # samples end at the author's step mark; else they run to their end
    is_judged: bool  # each sample needs a reward

    @property
    def state(self) -> Tree:
        """All that was sampled."""
        ...

    @property
    def certaindex(self) -> float:
        """How sure it is, in [0, 1], as the paper defines it for this algorithm."""
        ...

    @property
    def budget(self) -> int:
        """What may still be asked for, in the algorithm's own unit."""
        ...

    @property
    def reason(self) -> Reason | None:
        """Why it is over; None while it goes on."""
        ...

    def expand(self, room: int) -> list[Expansion]:
        """What to sample now where the load allows `room` samples more; empty while it waits, and at the end."""
        ...

    def report(self, node: int, sample: Sample) -> None:
        """A child of `node` was sampled."""
        ...

    def lose(self, node: int, num_tokens: int = 0) -> None:
        """A child of `node` was asked for and will not come, though `num_tokens` were generated for it."""
        ...

    def aggregate(self) -> Choice:
        """The answer so far."""
        ...

    def record(self) -> dict[str, Any]:
        """What the author is told; JSON, with the keys of docs/reference.md where they mean the same."""
        ...
