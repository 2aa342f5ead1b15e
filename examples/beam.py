"""Beam search over steps (the breadth-first tree of thoughts), with a reward of the author's own.

    python examples/beam.py

The reward checks each line's arithmetic, as a unit test or a verifier would: it knows what the model gets wrong, not the answer.
"""

from __future__ import annotations

import multiprocessing
import re
from pathlib import Path
from typing import Any

import sglang as sgl

from sglang_dynasor.demo import read_questions, start_engine
from sglang_dynasor.frontend import LocalEngine, reason

REASONER = Path(__file__).parent / "tiny_reasoner"
LINE = re.compile(r"gets (\d+) (more|less) than \w+ (\d+): \w+ (\d+)$", re.M)


def arithmetic(question: str, text: str) -> float:
    """The share of additions and subtractions that are right, in [0, 1]; 1 where there are none, 0 for a bare guess."""
    if "gets" not in text:
        return 0.0
    lines = LINE.findall(text)
    right = [int(c) == int(b) + (int(a) if how == "more" else -int(a)) for a, how, b, c in lines]
    return sum(right) / len(right) if right else 1.0


@sgl.function
def solve(s: Any, prompt: str) -> Any:
    s += prompt
    with reason(s, "beam", branches=8, beams=4, answer="hash", reward=arithmetic) as p:
        p.gen("steps", max_tokens=200, temperature=1.0)
    return p


def main() -> None:
    questions = read_questions(REASONER, 6)
    engine = start_engine(REASONER)
    try:
        with LocalEngine(engine) as backend:
            states = solve.run_batch([{"prompt": q["prompt"]} for q in questions], backend=backend)
            for question, state in zip(questions, states, strict=True):
                p = state.ret_value
                print(f"{question['num_steps']} steps, the answer is {question['answer']}: beam search says {p.answer}")
                record = p.record
                print(f"  {record['num_branches']} of {record['beams']} solutions, {record['num_nodes']} steps sampled")
    finally:
        engine.shutdown()


if __name__ == "__main__":
    multiprocessing.freeze_support()
    main()
