"""The reader's questions: files as GSM8K, MATH and GPQA are published, or with keys of their own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from sglang_dynasor.bench.files import Row, read_rows
from sglang_dynasor.errors import ConfigError
from sglang_dynasor.policy.marks import find_boxed, find_hash

QUESTION_KEYS = ("question", "problem", "prompt")  # the first that a row has; capital letters count as small ones
GOLD_KEYS = ("gold", "answer", "correct answer", "solution")
CHOICE_KEYS = ("choices", "options")
LETTERS = "ABCDEFGHIJ"  # that the extractor `choice` reads


@dataclass(frozen=True, slots=True)
class Question:
    """One question as it is asked."""

    id: str  # where it stands in the file
    text: str
    gold: str | None = None  # the right answer, of choices its letter; None: not known
    choices: tuple[str, ...] = ()

    def prompt(self, instruction: str) -> str:
        """What is sent: the question, its choices by letter, and what the model is told to do."""
        choices = "\n".join(f"{LETTERS[i]}) {choice}" for i, choice in enumerate(self.choices))
        return "\n\n".join(part for part in (self.text, choices, instruction) if part)


def read_questions(path: Path, seed: int) -> list[Question]:
    """The questions of a file, in an order drawn by `seed`: a run that has no time for all of them asks a fair sample.

    Choices that come as a right and wrong ones (GPQA) are put in an order drawn by `seed` and the question.

    Raises:
        ConfigError: a row is wrong, or there is none; the message names line and column.
    """
    questions = [_question(row, seed) for row in read_rows(path)]
    if not questions:
        raise ConfigError(f"--questions={path} has no questions; give one JSON object a line, or a CSV with a header")
    random.Random(f"order:{seed}").shuffle(questions)  # a seed that is a text is hashed by SHA-512: the same everywhere
    return questions


def _question(row: Row, seed: int) -> Question:
    names = {name.strip().lower(): name for name in reversed(list(row.values))}
    asked = next((names[key] for key in QUESTION_KEYS if key in names), None)
    if asked is None:
        raise ConfigError(
            f"{row.place()}: no question; name it {' or '.join(QUESTION_KEYS)}. It has {', '.join(row.values) or 'nothing'}"
        )
    text = row.values[asked]
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"{row.place(asked)}: {asked!r} is {text!r}; write the question as a text")
    line, _ = row.start
    about = {"id": f"line {line}", "text": text.strip()}
    wrong = [
        name for name, value in row.values.items() if name.strip().lower().startswith("incorrect answer") and value
    ]
    if wrong and "correct answer" in names:
        choices = [_text(row, name) for name in (names["correct answer"], *wrong)]
        order = random.Random(f"choices:{seed}:{text}").sample(range(len(choices)), len(choices))
        return Question(**about, gold=LETTERS[order.index(0)], choices=tuple(choices[i] for i in order))
    key = next((names[key] for key in CHOICE_KEYS if key in names and row.values[names[key]]), None)
    choices = () if key is None else _choices(row, key)
    return Question(**about, gold=_gold(row, names, choices), choices=choices)


def _text(row: Row, name: str) -> str:
    value = row.values[name]
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{row.place(name)}: {name!r} is {value!r}; write a text")
    return value.strip()


def _choices(row: Row, name: str) -> tuple[str, ...]:
    value = row.values[name]
    if not isinstance(value, list) or not 2 <= len(cast("list[Any]", value)) <= len(LETTERS):
        raise ConfigError(f"{row.place(name)}: {name!r} is {value!r}; give a list of 2 to {len(LETTERS)} texts")
    return tuple(str(choice).strip() for choice in cast("list[Any]", value))


def _gold(row: Row, names: dict[str, str], choices: Sequence[str]) -> str | None:
    for key in GOLD_KEYS:
        name = names.get(key)
        value = None if name is None else row.values[name]
        if name is None or value is None or value == "":
            continue
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ConfigError(f"{row.place(name)}: {name!r} is {value!r}; give the right answer as a text or number")
        if choices:
            return _letter(row, name, value, choices)
        text = str(value).strip()
        found = find_hash(text) if "####" in text else find_boxed(text) if key == "solution" else None
        if key == "solution" and found is None:
            raise ConfigError(
                f"{row.place(name)}: {name!r} has no \\boxed{{...}} and no ####, so the right answer is not known; give it as 'gold'"
            )
        return text if found is None else found.text.strip()
    return None


def _letter(row: Row, name: str, value: str | int | float, choices: Sequence[str]) -> str:
    """Of the right choice, which is given by its place from 0, its text or its letter."""
    if isinstance(value, int) and 0 <= value < len(choices):
        return LETTERS[value]
    text = str(value).strip()
    if text in choices:
        return LETTERS[choices.index(text)]
    if len(text) == 1 and text.upper() in LETTERS[: len(choices)]:
        return text.upper()
    raise ConfigError(
        f"{row.place(name)}: {name!r} is {value!r}, which is none of the {len(choices)} choices; give its text, its letter "
        "or, as a number, its place from 0"
    )
