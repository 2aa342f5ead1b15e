"""How well answers are read and compared: recorded cases, and endings of a real model against math-verify.

    python benchmarks/replay_answers.py --cases DIR --traces DIR

The records are not in this repository. `--cases` has answer_pairs.jsonl and extraction.jsonl, `--traces`
r1_llama8b_endings_dev.jsonl.zst. What is judged otherwise than expected is printed, one a line, then the shares.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import zstandard
from math_verify import parse, verify  # pyright: ignore[reportMissingImports]

from sglang_dynasor.policy.answers import extract_answer
from sglang_dynasor.policy.equal import answer_key

AGREE = 2  # graders of three: fewer mark a contested case


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file."""
    data = path.read_bytes()
    text = zstandard.ZstdDecompressor().stream_reader(data).read() if path.suffix == ".zst" else data
    yield from map(json.loads, text.decode().splitlines())


def pairs(path: Path) -> None:
    """Pairs of answers: those that differ must be apart, the others as most graders say."""
    judged: dict[str, list[bool]] = {"differ": [], "agreed": [], "contested": []}
    for case in lines(path):
        is_equal = answer_key(case["a"]) == answer_key(case["b"])
        is_differ = case["kind"].startswith("differ")
        kind = "differ" if is_differ else "agreed" if case["graders_that_agree"] >= AGREE else "contested"
        judged[kind].append(is_equal == case["equal"])
        if is_equal != case["equal"]:
            print(f"{kind}: {case['a']!r} and {case['b']!r} are {'equal' if is_equal else 'different'} here")
    for kind, found in judged.items():
        print(f"{kind} pairs as expected: {sum(found)} of {len(found)}")


def extraction(path: Path) -> None:
    """Texts and the answers that are expected of them."""
    judged: list[bool] = []
    for case in lines(path):
        found, expected = extract_answer(case["text"], case["extractor"]), case["expected"]
        judged.append(
            found == expected or (None not in (found, expected) and answer_key(found or "") == answer_key(expected))
        )
        if not judged[-1]:
            print(f"{case['extractor']}: {case['text']!r} gives {found!r}, not {expected!r}")
    print(f"texts read as expected: {sum(judged)} of {len(judged)}")


@cache
def is_same(one: str, other: str) -> bool:
    """What math-verify says of two boxes' contents."""
    values = [parse(rf"\boxed{{{text}}}", parsing_timeout=None) for text in (one, other)]
    return verify(values[0], values[1], timeout_seconds=None) or verify(values[1], values[0], timeout_seconds=None)


def endings(path: Path) -> None:
    """Pairs of boxed answers to one question, judged here and by math-verify."""
    num_pairs = num_alike = num_merged = num_cut = num_texts = 0
    for question in lines(path):
        found = [extract_answer(text, "boxed") for text in question["endings"]]
        num_texts += len(found)
        num_cut += sum(extract_answer(text, "auto", is_cut=True) is None for text in question["endings"])
        for one, other in itertools.combinations([answer for answer in found if answer], 2):
            ours, theirs = answer_key(one) == answer_key(other), one == other or is_same(one, other)
            num_pairs, num_alike = num_pairs + 1, num_alike + (ours == theirs)
            num_merged += ours and not theirs
            if ours != theirs:
                print(f"{one!r} and {other!r} are {'equal' if ours else 'different'} here only")
    print(
        f"pairs judged alike: {num_alike} of {num_pairs}; merged here only: {num_merged}; texts without a marked answer: {num_cut} of {num_texts}"
    )


def main() -> None:
    """Print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=Path, required=True)
    parser.add_argument("--traces", type=Path, required=True)
    args = parser.parse_args()
    pairs(args.cases / "answer_pairs.jsonl")
    extraction(args.cases / "extraction.jsonl")
    endings(args.traces / "r1_llama8b_endings_dev.jsonl.zst")


if __name__ == "__main__":
    main()
