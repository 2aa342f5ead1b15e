"""Word problems with a known answer: what the tiny reasoner is trained on and measured with.

A question is a chain of 1 to 8 steps over people who get coins, pens, ...; every value stays in 1..60, so that
each number is one token. A question belongs to the held-out split if and only if its text says so
(`is_held_out`), so no seed can leak one split into the other.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

MAX_STEPS = 8
MAX_VALUE = 60

NAMES = (
    "Ann Bob Cid Dan Eve Fay Gus Hal Ida Jim Kay Leo Mia Ned Ola Pam Ray Sue Tom Uma Val Wes Xia Yan Zoe Abe "
    "Bea Cal Dot Eli"
).split()
ITEMS = "coins pens books apples cards shells stamps beads".split()
FRACTIONS = {2: "half", 3: "third", 4: "quarter", 5: "fifth"}
KINDS = {"plus": 0.26, "minus": 0.26, "times": 0.12, "part": 0.10, "sum": 0.14, "difference": 0.12}  # chance of each


@dataclass(frozen=True, slots=True)
class Step:
    """What one person gets, told in terms of people named before."""

    name: str
    kind: str  # a key of KINDS
    refs: tuple[str, ...]  # the people it is told in terms of
    constants: tuple[int, ...]

    def tell(self, refs: tuple[str, ...]) -> str:
        """What this person gets, in the given words for the people it is told in terms of."""
        ref, c = refs[0], self.constants
        match self.kind:
            case "plus":
                return f"{self.name} gets {c[0]} more than {ref}"
            case "minus":
                return f"{self.name} gets {c[0]} less than {ref}"
            case "times":
                return f"{self.name} gets {c[0]} times {ref}"
            case "part":
                return f"{self.name} gets {FRACTIONS[c[0]]} of {ref}"
            case "sum":
                return f"{self.name} gets the sum of {ref} and {refs[1]}"
            case _:
                return f"{self.name} gets {ref} minus {refs[1]}"

    def value(self, operands: tuple[int, ...]) -> int:
        """The step's result; 0 where it is no whole number in 1..60, which no question has."""
        a, c = operands[0], self.constants
        match self.kind:
            case "plus":
                result = a + c[0]
            case "minus":
                result = a - c[0]
            case "times":
                result = a * c[0]
            case "part":
                result = a // c[0] if a % c[0] == 0 else 0
            case "sum":
                result = a + operands[1]
            case _:
                result = a - operands[1]
        return result if 1 <= result <= MAX_VALUE else 0


@dataclass(frozen=True, slots=True)
class Question:
    """A word problem, its steps in order and its answer."""

    text: str
    givens: dict[str, int]  # people whose holding the question states
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
        known = dict(self.givens)
        lines: list[str] = []
        for step, value in zip(self.steps, self.values, strict=True):
            lines.append(line(step, tuple(known[ref] for ref in step.refs), value))
            known[step.name] = value
        return lines


def line(step: Step, operands: tuple[int, ...], result: int) -> str:
    """How a solution writes one step: the sentence again with the values put in, and what follows.

    A value stands right after its person's name, in the question as in the solution: the easiest place for a small model
    to find it. What it gets wrong is then mostly arithmetic, which is what voting can mend.
    """
    refs = tuple(f"{ref} {value}" for ref, value in zip(step.refs, operands, strict=True))
    return f"{step.tell(refs)}: {step.name} {result}\n"


def opening(item: str, shown: list[tuple[str, int]]) -> str:
    """The sentence that says what people have."""
    return f"{item.capitalize()}: " + ", ".join(f"{name} {value}" for name, value in shown) + "."


def prompt(text: str, *, think: bool = False) -> str:
    """What the model is asked; `think` asks for the long mode, which drafts and checks before it answers."""
    return f"Q: {text}\nA:\n" + ("<think>\n" if think else "")


def draw_step(rng: random.Random, name: str, known: dict[str, int], last: str) -> tuple[Step, int] | None:
    """A random step for `name` and its value, told most often in terms of `last`; None where it leads outside 1..60."""
    kind = rng.choices(list(KINDS), weights=list(KINDS.values()))[0]
    others = [other for other in known if other != last]
    ref = last if not others or rng.random() < 0.6 else rng.choice(others)
    refs: tuple[str, ...] = (ref,)
    constants: tuple[int, ...] = ()
    if kind in ("plus", "minus"):
        constants = (rng.randint(2, 40),)
    elif kind == "times":
        constants = (rng.randint(2, 9),)
    elif kind == "part":
        constants = (rng.randint(2, 5),)
    else:
        rest = [other for other in known if other != ref]
        if not rest:
            return None
        refs = (ref, rng.choice(rest))
    step = Step(name, kind, refs, constants)
    value = step.value(tuple(known[r] for r in refs))
    return (step, value) if value else None


def draw(rng: random.Random, num_steps: int) -> Question:
    """A random question with `num_steps` steps (1..8), of either split."""
    names = rng.sample(NAMES, num_steps + 4)
    item = rng.choice(ITEMS)
    num_givens = rng.choice((1, 2))
    givens = {name: rng.randint(2, MAX_VALUE) for name in names[:num_givens]}
    known, last = dict(givens), names[num_givens - 1]
    steps: list[Step] = []
    values: list[int] = []
    while len(steps) < num_steps:
        name = names[num_givens + len(steps)]
        drawn = draw_step(rng, name, known, last)
        if drawn is None:
            continue
        step, value = drawn
        steps.append(step)
        values.append(value)
        known[name], last = value, name
    shown = list(givens.items())
    for name in names[num_givens + num_steps :][: rng.choice((0, 0, 1, 2))]:  # people who do not matter
        shown.insert(rng.randint(0, len(shown)), (name, rng.randint(2, MAX_VALUE)))
    sentences = [opening(item, shown), *(f"{step.tell(step.refs)}." for step in steps)]
    sentences.append(f"How many {item} does {last} get?")
    return Question(" ".join(sentences), givens, tuple(steps), tuple(values))


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
