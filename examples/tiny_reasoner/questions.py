"""Word problems with a known answer: what the tiny reasoner is trained on and measured with.

A question is a chain of 1 to 8 steps over people who get coins, pens, ...; every value stays in 1..99, so that
each number is one token. A question belongs to the held-out split if and only if its text says so
(`is_held_out`), so no seed can leak one split into the other.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from itertools import pairwise

MAX_STEPS = 8
MAX_VALUE = 99

NAMES = (
    "Ann Bob Cid Dan Eve Fay Gus Hal Ida Jim Kay Leo Mia Ned Ola Pam Ray Sue Tom Uma Val Wes Xia Yan Zoe Abe "
    "Bea Cal Dot Eli"
).split()
ITEMS = "coins pens books apples cards shells stamps beads".split()
FRACTIONS = {2: "half", 3: "third", 4: "quarter", 5: "fifth"}
KINDS = {"plus": 0.3, "minus": 0.3, "times": 0.12, "part": 0.1, "times plus": 0.18}  # chance of each


@dataclass(frozen=True, slots=True)
class Step:
    """What one person gets, told in terms of the person before."""

    name: str
    kind: str  # a key of KINDS
    ref: str  # the person before
    constants: tuple[int, ...]

    def tell(self, ref: str) -> str:
        """What this person gets, with `ref` for the person before."""
        c = self.constants
        match self.kind:
            case "plus":
                return f"{self.name} gets {c[0]} more than {ref}"
            case "minus":
                return f"{self.name} gets {c[0]} less than {ref}"
            case "times":
                return f"{self.name} gets {c[0]} times {ref}"
            case "part":
                return f"{self.name} gets {FRACTIONS[c[0]]} of {ref}"
            case _:
                return f"{self.name} gets {c[0]} times {ref} plus {c[1]}"

    def value(self, operand: int) -> int:
        """The step's result; 0 where it is no whole number in 1..99, which no question has."""
        c = self.constants
        match self.kind:
            case "plus":
                result = operand + c[0]
            case "minus":
                result = operand - c[0]
            case "times":
                result = operand * c[0]
            case "part":
                result = operand // c[0] if operand % c[0] == 0 else 0
            case _:
                result = operand * c[0] + c[1]
        return result if 1 <= result <= MAX_VALUE else 0


@dataclass(frozen=True, slots=True)
class Question:
    """A word problem, its steps in order and its answer."""

    text: str
    start: int  # what the first person has
    steps: tuple[Step, ...]
    values: tuple[int, ...]  # the right result of each step

    @property
    def answer(self) -> int:
        return self.values[-1]

    @property
    def num_steps(self) -> int:
        return len(self.steps)

    @property
    def lines(self) -> list[str]:
        """The right solution, a line per step."""
        operands = (self.start, *self.values)
        return [line(s, operand, value) for s, operand, value in zip(self.steps, operands, self.values, strict=False)]


def line(step: Step, operand: int, result: int) -> str:
    """How a solution writes one step: the sentence again with the value put in, and what follows.

    The value needed was written just before, where a small model finds it; what it gets wrong is arithmetic, and that is
    what voting can mend.
    """
    return f"{step.tell(f'{step.ref} {operand}')}: {step.name} {result}\n"


def prompt(text: str, *, think: bool = False) -> str:
    """What the model is asked; `think` asks for the long mode, which drafts and checks before it answers."""
    return f"Q: {text}\nA:\n" + ("<think>\n" if think else "")


def draw_step(rng: random.Random, name: str, ref: str, operand: int) -> tuple[Step, int]:
    """A random step for `name` in terms of `ref`, who has `operand`, and its result."""
    while True:
        kind = rng.choices(list(KINDS), weights=list(KINDS.values()))[0]
        if kind in ("plus", "minus"):
            constants: tuple[int, ...] = (rng.randint(2, 60),)
        elif kind == "times plus":
            constants = (rng.randint(2, 4), rng.randint(2, 30))
        else:
            constants = (rng.randint(2, 5 if kind == "part" else 9),)
        step = Step(name, kind, ref, constants)
        if value := step.value(operand):
            return step, value


def draw(rng: random.Random, num_steps: int) -> Question:
    """A random question with `num_steps` steps (1..8), of either split."""
    names = rng.sample(NAMES, num_steps + 1)
    item, start = rng.choice(ITEMS), rng.randint(2, MAX_VALUE)
    steps: list[Step] = []
    values = [start]
    for ref, name in pairwise(names):
        step, value = draw_step(rng, name, ref, values[-1])
        steps.append(step)
        values.append(value)
    sentences = [f"{item.capitalize()}: {names[0]} {start}.", *(f"{step.tell(step.ref)}." for step in steps)]
    sentences.append(f"How many {item} does {names[-1]} get?")
    return Question(" ".join(sentences), start, tuple(steps), tuple(values[1:]))


def is_held_out(text: str) -> bool:
    """Whether a question belongs to the held-out split: one in ten does, by a hash of its text."""
    return hashlib.sha256(text.encode()).digest()[0] % 10 == 0


def draw_split(rng: random.Random, num_steps: int, *, held_out: bool) -> Question:
    """A random question of the asked split."""
    while True:
        question = draw(rng, num_steps)
        if is_held_out(question.text) == held_out:
            return question


def held_out(num_questions: int, seed: int = 7) -> list[Question]:
    """`num_questions` distinct held-out questions, the step counts 1..8 in turn."""
    rng = random.Random(seed)
    found: dict[str, Question] = {}
    while len(found) < num_questions:
        question = draw_split(rng, 1 + len(found) % MAX_STEPS, held_out=True)
        found.setdefault(question.text, question)
    return list(found.values())
