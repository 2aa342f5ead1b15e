"""Self-consistency as an SGLang frontend program: fork, generate, read the answer.

    python examples/self_consistency.py

Runs on the tiny reasoner that ships with the repository, on the CPU if need be.
"""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import sglang as sgl

from sglang_dynasor.demo import read_questions, start_engine
from sglang_dynasor.frontend import LocalEngine, reason

REASONER = Path(__file__).parent / "tiny_reasoner"


@sgl.function
def solve(s: Any, prompt: str) -> Any:
    s += prompt
    with reason(s, branches=16, answer="hash") as p:
        for branch in p.fork():
            branch += sgl.gen("steps", max_tokens=200, temperature=1.0)
    s["answer"] = p.answer
    return p


def main() -> None:
    questions = read_questions(REASONER, 8)
    engine = start_engine(REASONER)
    try:
        with LocalEngine(engine) as backend:
            states = solve.run_batch([{"prompt": q["prompt"]} for q in questions], backend=backend)
            for question, state in zip(questions, states, strict=True):
                p = state.ret_value
                print(
                    f"{question['num_steps']} steps, the answer is {question['answer']}: program says {state['answer']}"
                )
                num_done = sum(not branch.ended for branch in p.branches)
                print(f"  certaindex {p.certaindex:.2f}, {num_done} of 16 branches finished, {p.saved} tokens saved")
    finally:
        engine.shutdown()


if __name__ == "__main__":
    multiprocessing.freeze_support()
    main()
