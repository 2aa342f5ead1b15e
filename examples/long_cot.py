"""A long chain of thought, probed inside the engine and closed once its answer stands.

    python examples/long_cot.py

Greedy, so that it prints the same on every machine: each question with its whole thought, then with `long_cot`.
"""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

from sglang_dynasor.demo import read_questions, start_engine

REASONER = Path(__file__).parent / "tiny_reasoner"
FIELD: dict[str, Any] = {
    "algorithm": "long_cot",
    "answer": "hash",
    # This model's words, and the mark of its answer: it knows no other text after a thought. For a larger model both are
    # found by themselves, if its vocabulary or chat template has an end of thought.
    "think_end": "</think>\n####",
    "probe_suffix": "</think>\n####",
    # Its thoughts are short; the defaults are for thoughts of thousands of tokens.
    "probe_tokens": 24,
    "min_tokens": 24,
    "agree": 2,
    "exit": "trial:0.9",
}


def main() -> None:
    questions = [q for q in read_questions(REASONER, 60) if q["num_steps"] <= 4][:5]
    engine = start_engine(REASONER)
    greedy = {"temperature": 0.0, "max_new_tokens": 400}
    try:
        for question in questions:
            prompt = question["prompt"] + "<think>\n"
            whole = engine.generate(prompt, greedy)
            short = engine.generate(prompt, greedy | {"custom_params": {"dynasor": FIELD}})
            record = short["meta_info"]["dynasor"]
            print(f"{question['num_steps']} steps, the answer is {question['answer']}")
            print(f"  whole thought  {len(whole['output_ids'])} tokens: {whole['text'].splitlines()[-1]}")
            print(f"  long_cot       {record['num_tokens']} tokens: {short['text'].splitlines()[-1]}, ", end="")
            print(f"closed at {record['closed_at_tokens'][0]} after {record['num_probes']} probes")
            for trial in record["trials"]:
                print(f"    after {trial['tokens']} tokens it would say {trial['answer']}")
    finally:
        engine.shutdown()


if __name__ == "__main__":
    multiprocessing.freeze_support()
    main()
