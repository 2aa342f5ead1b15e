"""The tiny reasoner's questions: right answers, honest splits, what the repository ships."""

from __future__ import annotations

import json
import random
import re

from engines import CHECKPOINT, REASONER
from questions import MAX_STEPS, MAX_VALUE, draw, draw_split, held_out, is_held_out, line, prompt


def test_answers_follow_from_the_question_alone() -> None:
    """Solving a question from its text, step by step, gives its answer."""
    rng = random.Random(3)
    for _ in range(300):
        question = draw(rng, rng.randint(1, MAX_STEPS))
        (name, start), *_ = re.findall(r"(\w+) (\d+)\.", question.text)
        values = {name: int(start)}
        for step, value, written in zip(question.steps, question.values, question.lines, strict=True):
            assert f"{step.tell(step.ref)}." in question.text
            values[step.name] = step.value(values[step.ref])
            assert values[step.name] == value
            assert 1 <= value <= MAX_VALUE
            assert written == line(step, values[step.ref], value)
        assert question.text.endswith(f"does {question.steps[-1].name} get?")
        assert values[question.steps[-1].name] == question.answer


def test_the_splits_are_disjoint() -> None:
    """A question's own text says which split it is in, so no seed can leak one into the other."""
    rng = random.Random(1)
    training = {draw_split(rng, 1 + i % MAX_STEPS, held_out=False).text for i in range(4000)}
    held = {q.text for q in held_out(600)}
    assert len(held) == 600
    assert not training & held
    assert all(map(is_held_out, held))
    assert not any(map(is_held_out, training))


def test_the_shipped_questions_are_the_held_out_ones() -> None:
    """held_out.jsonl is what the generator gives, prompt and answer."""
    rows = [json.loads(row) for row in (REASONER / "held_out.jsonl").read_text().splitlines()]
    questions = held_out(len(rows))
    assert len(rows) >= 300
    assert [row["prompt"] for row in rows] == [prompt(q.text) for q in questions]
    assert [row["answer"] for row in rows] == [q.answer for q in questions]


def test_the_checkpoint_is_small_and_complete() -> None:
    """At most 12 MB in all; every number of the task is one token."""
    from tokens import Encoder

    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= 12 * 10**6
    encode = Encoder(CHECKPOINT)
    assert all(len(encode(f" {n}")) == 1 for n in range(MAX_VALUE + 1))
    text = prompt(held_out(1)[0].text, think=True) + "".join(held_out(1)[0].lines) + "#### 7<judge> good"
    assert encode(text) == encode.tokenizer.encode(text).ids
