"""Every example runs as its reader would run it, and prints what was recorded."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from engines import ROOT
from warm import run_python

pytestmark = pytest.mark.engine
OUTPUT = ROOT / "examples" / "output"
# Sampled hot: which branch ends first depends on the machine's load, so numbers are compared in kind, not in value.
# Right answers of six: half by vote; one where rewards pick a single solution of hot samples (the first question has one
# step); none by the tiny reasoner's own judge, which is worse than chance at that (its model card says so).
FEWEST_RIGHT = {"self_consistency": 3, "rebase": 2, "mcts": 2, "beam": 1, "best_of_n": 0}
SAMPLED = tuple(FEWEST_RIGHT)
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def shape(text: str) -> list[str]:
    """The lines with every number left open, and the answer, which a hot sample may write in words."""
    return [NUMBER.sub("N", re.sub(r"says .*", "says A", line)) for line in text.strip().splitlines()]


def facts(text: str) -> list[str]:
    """What must be equal all the same: the questions, with their true answers."""
    return re.findall(r"\d+ steps, the answer is \d+", text)


def num_right(text: str) -> int:
    answers = re.findall(r"the answer is (\d+): .* says (\w+)", text)
    assert answers
    return sum(true == said for true, said in answers)


def run(name: str) -> str:
    """What an example prints; the first in the README from a Python that has imported nothing before."""
    script = str(ROOT / "examples" / f"{name}.py")
    if name == "self_consistency":
        done = subprocess.run(
            [sys.executable, script], capture_output=True, text=True, timeout=400, check=False, cwd=ROOT
        )
    else:
        done = run_python([script], cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("name", SAMPLED)
def test_an_example_prints_what_was_recorded(name: str) -> None:
    """The same lines about the same questions, and in one of two runs as many right answers as nearly all have (`FEWEST_RIGHT`)."""
    printed = run(name)
    recorded = (OUTPUT / f"{name}.txt").read_text()
    assert shape(printed) == shape(recorded)
    assert facts(printed) == facts(recorded)
    if num_right(printed) < FEWEST_RIGHT[name]:  # now and then a run is; two in a row are none of chance
        assert num_right(run(name)) >= FEWEST_RIGHT[name]


def test_the_long_thought_example() -> None:
    """Greedy: the same questions with the same answers as recorded, and most thoughts are closed early."""
    printed = run("long_cot")
    assert facts(printed) == facts((OUTPUT / "long_cot.txt").read_text())
    pairs = re.findall(r"whole thought +(\d+) tokens: #### (\d+)\n +long_cot +(\d+) tokens: #### (\d+)", printed)
    assert len(pairs) == 5
    assert sum(whole_answer == answer for _, whole_answer, _, answer in pairs) >= 4
    assert sum(int(tokens) < int(whole_tokens) for whole_tokens, _, tokens, _ in pairs) >= 3


def test_the_pretrained_example() -> None:
    """A public model through its chat template: it knows the capital of France, and its branches vote."""
    printed = run("pretrained")
    assert "Paris" in printed  # among the votes; in which words the winner says it is for the samples to decide
    assert "of 8 branches" in printed


def test_the_code_example() -> None:
    """The same model writes functions: what it writes is for the samples to decide, but some of it runs, and code is the answer."""
    printed = run("code")
    told = re.findall(r"^(\w+): (\d+) candidates, (\d+) of them ran; ", printed, re.M)
    assert [name for name, _, _ in told] == ["is_even", "count_vowels"]
    assert all(int(ran) <= int(num) <= 8 for _, num, ran in told)
    assert re.search(r"tests passed: \d of \d\n(?: {4}.*\n)*? {4}def ", printed)


def test_every_example_has_its_record() -> None:
    """No example without one, but for those of the pretrained model, which is sampled in its own words."""
    names = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert {path.stem for path in OUTPUT.glob("*.txt")} == names - {"code", "pretrained"}
    assert names == {*SAMPLED, "code", "long_cot", "pretrained"}
