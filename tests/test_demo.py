"""The main job runs from the command line."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from engines import REASONER

DEMO = [sys.executable, "-m", "sglang_dynasor.cli", "demo", "--reasoner"]


@pytest.mark.engine
def test_the_demo_compares_and_draws(tmp_path: Path) -> None:
    """A table of both ways, the most certain and uncertain questions, one picture."""
    picture, table = tmp_path / "demo.png", tmp_path / "demo.csv"
    done = subprocess.run(
        [*DEMO, str(REASONER), "--num-questions", "16", "--picture", str(picture), "--csv", str(table)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert picture.read_bytes().startswith(b"\x89PNG")
    stock, program = csv.DictReader(table.open())
    assert float(stock["branches_per_question"]) == 16
    assert int(program["tokens"]) < int(stock["tokens"])
    assert "most certain" in done.stdout
    assert "most uncertain" in done.stdout


def test_the_demo_says_what_it_misses(tmp_path: Path) -> None:
    """Without a checkpoint: one line with the remedy."""
    done = subprocess.run([*DEMO, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "holds no checkpoint" in done.stderr
    assert "Traceback" not in done.stderr
