"""Best-of-N: the branch that the judge likes best, until one is good enough.

    python examples/best_of_n.py

One request per question: the server makes the branches, and the model judges each finished one by a token of its own.
"""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import sglang_dynasor
from sglang_dynasor.demo import read_questions, start_engine

REASONER = Path(__file__).parent / "tiny_reasoner"


def main() -> None:
    questions = read_questions(REASONER, 6)
    engine = start_engine(REASONER)
    try:
        results = sglang_dynasor.solve(
            engine,
            [question["prompt"] for question in questions],
            "best_of_n",
            sampling={"temperature": 1.0, "max_new_tokens": 200},
            progress=False,
            branches=8,
            answer="hash",
            judge="self",
            judge_suffix="<judge>",
            judge_good=" good",
            judge_bad=" bad",
        )
        for question, result in zip(questions, results, strict=True):
            rewards = [round(reward, 2) for reward in result.record["rewards"] if reward is not None]
            print(f"{question['num_steps']} steps, the answer is {question['answer']}: best-of-N says {result.answer}")
            print(f"  best of {len(rewards)} rewards: {max(rewards)}")
    finally:
        engine.shutdown()


if __name__ == "__main__":
    multiprocessing.freeze_support()
    main()
