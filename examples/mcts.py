"""Monte Carlo tree search: iterations go where rewards and curiosity send them, several at once.

    python examples/mcts.py

It stops when the solutions agree (certain), and gives up where all of them are worthless (`hopeless`, which one must ask for).
"""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

from sglang_dynasor import solve
from sglang_dynasor.demo import read_questions, start_engine

REASONER = Path(__file__).parent / "tiny_reasoner"
FIELD: dict[str, Any] = {
    "branches": 16,  # iterations at most
    "width": 4,  # at once
    "branching": 4,
    "hopeless": 0.02,
    "answer": "hash",
    "judge": "self",
    "judge_suffix": "<judge>",
    "judge_good": " good",
    "judge_bad": " bad",
}


def main() -> None:
    questions = read_questions(REASONER, 6)
    prompts = [question["prompt"] for question in questions]
    engine = start_engine(REASONER)
    try:
        results = solve(
            engine, prompts, "mcts", sampling={"temperature": 1.0, "max_new_tokens": 200}, progress=False, **FIELD
        )
        for question, result in zip(questions, results, strict=True):
            print(f"{question['num_steps']} steps, the answer is {question['answer']}: MCTS says {result.answer}")
            print(
                f"  {result.num_branches} iterations, mean reward {result.certaindex:.2f}, entropy certaindex "
                f"{result.record['entropy_certaindex']:.2f}"
            )
    finally:
        engine.shutdown()


if __name__ == "__main__":
    multiprocessing.freeze_support()
    main()
