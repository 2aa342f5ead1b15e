"""What reading an answer costs at worst, in microseconds: each extractor, each equality and hostile patterns, at 4,096 characters.

    python benchmarks/bench_answers.py [--csv benchmarks/results/answers.csv]

No engine is started. Every row is the slowest text of its kind, the best of several runs: what the code needs, not what the
machine was busy with.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from sglang_dynasor.errors import FieldError
from sglang_dynasor.policy import marks
from sglang_dynasor.policy.answers import EXTRACTORS, check_extractor, extract_answer, read_answer
from sglang_dynasor.policy.equal import MATH_CHARS, answer_key, canonical
from sglang_dynasor.policy.python_code import CODE_CHARS, python_form
from sglang_dynasor.policy.structured import READ_CHARS, blocks

NUM_CHARS = 4096
LEAD = "1 + 1 = ?\nThe answer is "  # of a prompt that begins the answer: a text without one is read behind it, too
REPEATS = 9
PIECES = (
    "1", "1 ", "1,", "234,", "1 234 ", "1/", "12:", "-", "#", "####", "####\n", "#### Step\n", "\n", " ", "a", "a\n", "Answer: ", "answer is ", "Answer\n",
    "the answer is I think ", "no, ", "(A) ", "**A** ", "[A]", "A. x\n", "\\boxed{", "\\boxed{}", "\\boxed{1} and ", "\\boxed 5 ", "}", "{", "[", "[]", '{"a":1} ', '"', "\\",
    "```\n", "```a\n```\n", "~~~\n", "<answer>", "<answer>1</answer>", "</answer>", "<", "<function=f>", "<parameter=p>", "\n\nQ: ", "</think>", "<|a|>",
    "Let me know ", "x=1 or ", "\\frac{1}{2}", "\\frac", "é", "١", "🙂",
)  # fmt: skip
WHOLE = {
    "deep json": "[" * 2048 + "]" * 2048,
    "wide json": json.dumps({f"k{i}": i for i in range(400)}),
    "code": "```python\n" + "x = f(a, b) + 1  # c\n" * 190 + "```",
    "call": json.dumps({"name": "f", "arguments": {f"k{i}": [i, 0.5] for i in range(200)}}),
}
PATTERNS = (
    r"(?s)(?:.{0,100}){0,9}ж|.", r"(?s).*ж|.", r"(?s)(.*)(.*)(.*)(.*)ж|(.)", r"(?s)(?:a|b)*a(?:a|b){12}ж|.", r"(?s)(?:a|b)*a(?:a|b){60}ж|.",
    r"(?s)(?:.*a.{40}b.{40}ж)|.", r"(?s)a.{0,30}b.{0,30}ж|.", r"(a+)+$", r"(.*)*x", r"(a|b)*(a|b)*(a|b)*ж|b", r"\p{L}{0,20}ж|.", r"\d{1,1000}", r"(?i)answer is ([A-J])\b", r"\d+(?:\.\d+)?",
)  # fmt: skip


def texts(num_chars: int) -> Iterable[tuple[str, str]]:
    """Texts of so many characters that cost somebody much."""
    for piece in PIECES:
        yield piece, (piece * num_chars)[:num_chars]
    yield "a, b", "".join("ab"[i * i * 7 // 5 % 2] for i in range(num_chars))
    yield from ((name, text) for name, text in WHOLE.items())


def cost_us(work: Callable[[], object]) -> float:
    """The least time of several runs, in microseconds. Each begins without what a text was found to hold before."""
    least = float("inf")
    for _ in range(REPEATS):
        for found in (blocks, marks._boxes):
            found.cache_clear()
        started = time.thread_time()
        work()
        least = min(least, time.thread_time() - started)
    return least * 1e6


def slowest(read: Callable[[str], object], num_chars: int = NUM_CHARS) -> tuple[float, str]:
    """The most that a text costs, and which."""
    return max((cost_us(lambda text=text: read(text)), name) for name, text in texts(num_chars))


def rows() -> Iterable[dict[str, str]]:
    """One row per extractor, equality and pattern."""
    more = ("json:a.b", "tool_call:-k1", "tag:answer", "code:python")
    for extractor in (*EXTRACTORS, *more):
        yield row("extractor", extractor, *slowest(lambda text, e=extractor: extract_answer(text, e)))
    for extractor in EXTRACTORS:
        yield row("begun by the prompt", extractor, *slowest(lambda text, e=extractor: read_answer(LEAD, text, e)))
    for extractor in ("json", "tool_call", "code"):
        worst = slowest(lambda text, e=extractor: extract_answer(text, e), READ_CHARS)
        yield row("all that is read", f"{extractor}, {READ_CHARS:,} characters", *worst)
    # A form is kept: another answer is another form.
    yield row(
        "equal", f"math, {MATH_CHARS} characters", *slowest(lambda text: canonical.__wrapped__(text[:MATH_CHARS]))
    )
    yield row("equal", "math, 4,096 characters", *slowest(lambda text: canonical.__wrapped__(text)))
    yield row("equal", "text", *slowest(lambda text: answer_key(text, "text")))
    yield row(
        "equal",
        "code:python",
        *slowest(lambda text: python_form(text.removeprefix("```python\n").removesuffix("```")[:CODE_CHARS])),
    )
    for pattern in PATTERNS:
        extractor = f"regex:{pattern}"
        try:
            check_extractor(extractor)
        except FieldError:
            yield {"kind": "pattern", "what": f"`{pattern}`", "worst text": "refused", "us": ""}
            continue
        yield row("pattern", f"`{pattern}`", *slowest(lambda text, e=extractor: extract_answer(text, e)))


def row(kind: str, what: str, us: float, text: str) -> dict[str, str]:
    """A measured row."""
    return {"kind": kind, "what": what, "worst text": repr(text), "us": f"{us:.0f}"}


def main() -> None:
    """Measure, and write what was found as CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    found = list(rows())
    out = args.csv.open("w", newline="") if args.csv else sys.stdout
    writer = csv.DictWriter(out, list(found[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)


if __name__ == "__main__":
    main()
