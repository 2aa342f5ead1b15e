"""The main job runs from the command line."""

from __future__ import annotations

import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engines import REASONER

from sglang_dynasor import demo
from sglang_dynasor.errors import ConfigError
from sglang_dynasor.outcome import Outcome, Solved, accuracies, cheapest, comparison, hardest, savings
from sglang_dynasor.picture import FORMATS, draw

DEMO = [sys.executable, "-m", "sglang_dynasor.cli", "demo", "--reasoner"]


@pytest.mark.engine
def test_the_demo_compares_and_draws(tmp_path: Path) -> None:
    """A table of both ways, the cheapest and hardest questions, one picture, a last line; on stderr its two bars alone."""
    picture, table = tmp_path / "demo.png", tmp_path / "demo.csv"
    done = subprocess.run(
        [*DEMO, str(REASONER), "--num-questions", "16", "--picture", str(picture), "--csv", str(table)],
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert picture.read_bytes().startswith(b"\x89PNG")
    greedy, stock, program = csv.DictReader(table.open())
    assert float(stock["branches_per_question"]) == 16
    assert int(program["tokens"]) < int(stock["tokens"])
    assert float(program["accuracy_percent"]) > float(greedy["accuracy_percent"])
    assert "cheapest:" in done.stdout
    assert "hardest:" in done.stdout
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("saved ")
    assert "of the answers right" in last
    printed = [line.strip() for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()]
    assert [line for line in printed if not line.startswith(("greedy", "stock, 16 samples", "program, cap 16"))] == []


def test_the_demo_says_what_it_misses(tmp_path: Path) -> None:
    """Without a checkpoint: one line with the remedy."""
    done = subprocess.run([*DEMO, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0
    assert "holds no checkpoint" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: --reasoner=")


def asked(folder: Path, **changes: Any) -> demo.Demo:
    return replace(demo.Demo(REASONER, 100, 16, folder / "demo.png"), **changes)


def test_what_can_be_done_is_not_refused(tmp_path: Path) -> None:
    """The defaults, the ends of every range, and files that are there already."""
    (tmp_path / "there.csv").touch()
    for changes in ({}, {"num_questions": 1}, {"num_questions": 600}, {"cap": 2}, {"cap": 64}):
        demo.check_demo(asked(tmp_path, **changes))
    for suffix in FORMATS:
        demo.check_demo(asked(tmp_path, picture=tmp_path / f"demo{suffix}", csv=tmp_path / "there.csv"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_questions": 0}, r"--num-questions=0 is outside \[1, 600\]; choose"),
        ({"num_questions": 601}, r"--num-questions=601 is outside \[1, 600\]; choose"),
        ({"cap": 1}, r"--branches=1 is outside \[2, 64\]; choose"),
        ({"cap": 65}, r"--branches=65 is outside \[2, 64\]; choose"),
        ({"picture": Path("demo.bmpp")}, r"--picture=demo.bmpp is no picture; let it end with one of .png, .pdf, .svg"),
        ({"picture": Path("nowhere/demo.png")}, "--picture=nowhere/demo.png: there is no folder nowhere; make it"),
        ({"csv": Path("nowhere/demo.csv")}, "--csv=nowhere/demo.csv: there is no folder nowhere; make it"),
        ({"csv": REASONER}, "--csv=.* is a folder; give the path of a file"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_work(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Each message names the option, the value got, what is allowed and what to do."""
    with pytest.raises(ConfigError, match=message):
        demo.check_demo(asked(tmp_path, **changes))


def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is not ours: `os.access` says so, also to root on a disk mounted read-only."""
    monkeypatch.setattr(demo.os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(ConfigError, match=r"--picture=.*demo.png cannot be written; choose"):
        demo.check_demo(asked(tmp_path))


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the extra that brings them."""
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs matplotlib and tqdm, .*pip install 'sglang-dynasor\[demo\]'"):
        demo.check_demo(asked(tmp_path))


def outcome(name: str, tokens: list[int], wall_s: float, wrong: tuple[int, ...] = (), **same: Any) -> Outcome:
    """A way of solving: what each question cost, and which of them it got wrong."""
    one = Solved("1", True, 0, 4, 1.0, 0.99)
    solved = [replace(one, num_tokens=n, is_right=i not in wrong, **same) for i, n in enumerate(tokens)]
    return Outcome(name, solved, wall_s)


@pytest.mark.parametrize(
    ("tokens", "wall_s", "line"),
    [
        ([40, 20], 5.0, "saved 40 % of the tokens and 50 % of the wall-clock"),
        ([40, 20], 11.0, "saved 40 % of the tokens (wall-clock 10 % above stock)"),
        ([60, 50], 5.0, "saved 50 % of the wall-clock (tokens 10 % above stock)"),
        ([60, 50], 11.0, "nothing was saved (tokens 10 % above stock, wall-clock 10 % above stock)"),
    ],
)
def test_the_last_line_says_what_was_saved(tokens: list[int], wall_s: float, line: str) -> None:
    """Also where it was nothing, or cost more."""
    assert savings(outcome("stock", [50, 50], 10.0), outcome("program", tokens, wall_s)) == line


def test_the_last_line_says_at_which_accuracies() -> None:
    """And what one question weighs, so that nobody reads a point of noise as a loss."""
    stock, program = outcome("stock", [50] * 4, 10.0, wrong=(1,)), outcome("program", [20] * 4, 5.0, wrong=(1, 3))
    greedy = outcome("greedy", [50] * 4, 10.0, wrong=(0, 1, 3))
    assert accuracies(greedy, stock, program) == (
        "50.0 % of the answers right, 75.0 % with stock, 25.0 % greedy (of 4 questions; one is 25.0 points)"
    )


def test_the_table_fits_a_terminal() -> None:
    """80 columns, with a row of what was saved below."""
    rows = comparison(
        outcome("greedy", [900] * 9, 10.0),
        outcome("stock, 16 samples", [100_000] * 9, 1000.0),
        outcome("program, cap 16", [60_000] * 9, 900.0),
    )
    assert sum(max(len(key), *(len(row[key]) for row in rows)) + 2 for key in rows[0]) - 2 <= 80
    assert rows[-1] == {
        "": "saved", "right": "", "tokens": "40 %", "wall-clock": "10 %", "mean latency": "0 %", "branches each": "0 %"
    }  # fmt: skip


def test_cheapest_and_hardest() -> None:
    """Cheapest by its part of stock's tokens, hardest by certaindex, then by tokens; not known counts as not certain."""
    stock = outcome("stock", [100, 400, 100, 100], 10.0)
    program = outcome("program", [50, 100, 90, 100], 10.0)
    indices = [0.99, 0.99, 0.5, None]
    program = replace(program, solved=[replace(s, certaindex=c) for s, c in zip(program.solved, indices, strict=True)])
    assert cheapest(stock, program) == [1, 0, 2, 3]
    assert hardest(program) == [3, 2, 1, 0]


def test_the_picture_is_drawn_of_any_outcome(tmp_path: Path) -> None:
    """Of one question as of many, also where the programs took more than stock and every answer is wrong."""
    for num_questions in (1, 9):
        steps = [1 + i % 8 for i in range(num_questions)]
        stock = outcome("stock", [100] * num_questions, 1.0, wrong=tuple(range(9)), num_branches=16)
        program = outcome("program", [120] * num_questions, 2.0, wrong=tuple(range(9)))
        greedy = outcome("greedy", [20] * num_questions, 1.0)
        draw(steps, greedy, stock, program, tmp_path / "demo.png")
        assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
