"""Rebase: step by step, the better a step's reward the more continuations it gets.

    python examples/rebase.py

Rewards come from the model's own judge token after each line.
"""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import sglang as sgl

from sglang_dynasor.demo import read_questions, start_engine
from sglang_dynasor.frontend import LocalEngine, reason

REASONER = Path(__file__).parent / "tiny_reasoner"
JUDGE = {"judge": "self", "judge_suffix": "<judge>", "judge_good": " good", "judge_bad": " bad"}


@sgl.function
def solve(s: Any, prompt: str) -> Any:
    s += prompt
    with reason(s, "rebase", branches=16, answer="hash", step="\n", **JUDGE) as p:
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
                print(f"{question['num_steps']} steps, the answer is {question['answer']}: Rebase says {p.answer}")
                record = p.record
                print(f"  {record['num_branches']} of 16 solutions in {record['num_rounds']} rounds, ", end="")
                print(f"{record['num_nodes']} steps sampled, certaindex {p.certaindex:.2f}")
    finally:
        engine.shutdown()


if __name__ == "__main__":
    multiprocessing.freeze_support()
    main()
