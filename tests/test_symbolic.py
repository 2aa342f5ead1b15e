"""Formulas that are compared in a process of its own: what is the same, what is not, and what happens when the process fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from sglang_dynasor import symbolic
from sglang_dynasor.errors import FieldError
from sglang_dynasor.policy.equal import canonical
from sglang_dynasor.policy.formula import read_formula
from sglang_dynasor.symbolic import SymbolicWorker, check_installed, shared_worker

# A tower of powers: sympy computes it until memory or patience is used up.
ENDLESS = "9^{9^{9^{9}}}", "9^{9^{9^{8}}}+1"


@pytest.fixture(scope="module")
def worker() -> Iterator[SymbolicWorker]:
    worker = SymbolicWorker(pair_s=60.0)  # machines of tests stall
    yield worker
    worker.close()


def same(worker: SymbolicWorker, one: str, other: str) -> bool:
    return worker.first_same(canonical(one), [canonical(other)]) is not None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("2k+2", "2+2k"),
        ("7!", "5040"),
        (r"2(k+1)", "2k+2"),
        (r"\sqrt{8}", r"2\sqrt2"),
        (r"\frac{1}{\sqrt2}", r"\frac{\sqrt2}{2}"),
        (r"\sin^2 x+\cos^2 x", "1"),
        (r"(x+1)^2", "x^2+2x+1"),
        (r"\binom{5}{2}", "10"),
        (r"\log_2 8", "3"),
        (r"\left(2k+2, 7!\right)", r"(2+2k,5040)"),
        (r"x \geq 2k+2", r"x \ge 2(k+1)"),
        (r"\frac{n(n+1)}{2}", r"\frac{n^2+n}{2}"),
        ("-x+3", "3-x"),
        (r"2^{10}", "1024"),
        (r"\sqrt[3]{27}", "3"),
        (r"\pi r^2", r"r^2\pi"),
        ("xy+1", "1+yx"),
    ],
)
def test_what_is_the_same(worker: SymbolicWorker, one: str, other: str) -> None:
    """Two answers to `math`, one to `symbolic`."""
    assert canonical(one) != canonical(other)
    assert same(worker, one, other)
    assert same(worker, other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("listen", "silent"),  # not a product of letters
        ("AB", "BA"),
        ("xy", "yx"),
        ("(0,1)", "[0,1]"),
        ("(0,1]", "(0,1)"),
        (r"\{0,1\}", "(0,1)"),
        ("(1,2)", "(2,1)"),
        ("1,2", "12"),
        ("7!", "7"),
        ("f'", "f"),
        ("T", "t"),
        ("007", "7"),
        ("0.333", "1/3"),
        ("0.333333333333333", "1/3"),
        ("1:2", "1/2"),
        ("<5", "5"),
        ("x<5", "x>5"),
        (r"x\le5", "x<5"),
        ("x+1=y", "y"),
        ("5+", "5"),
        ("½x", "1/2x"),  # read in two ways
        ("1/2x", "x/2"),
        ("2-3", "-1"),  # a score
        ("x2", "2x"),
        (r"\sin xy", r"y\sin x"),
        (r"\log 100", "2"),  # of which base
        ("5m", "5"),
        (r"10\%", "10"),
        ("x", "y"),
        ("x^2", "2x"),
        (r"\sqrt{x^2}", "x"),
        ("Paris", "Lyon"),
        ("", "x"),
    ],
)
def test_what_is_not(worker: SymbolicWorker, one: str, other: str) -> None:
    """Where it is in doubt answers stay apart."""
    assert not same(worker, one, other)
    assert not same(worker, other, one)


@pytest.mark.parametrize(
    "text",
    [
        "", "Paris", "a b", "2 3", "x'", "0.5.1", "2x3", "x!!", "!", "(1", "1)", "1/xy", "1/2(x)", r"1/\sin x", r"\text{x}", r"\frac12",
        r"\begin{pmatrix}1\end{pmatrix}", "x^{2", "1..2", r"\pm2", "x" * 129, "5%", "a_n?", "2-3", ",", ";", "()", r"\{\}",
    ],
)  # fmt: skip
def test_what_is_no_formula(text: str) -> None:
    """Words, what is read in two ways, and what a parser might read at will."""
    assert read_formula(text) is None


def test_the_first_that_is_the_same(worker: SymbolicWorker) -> None:
    """Of several that one; none where none is."""
    assert worker.first_same("2k+2", ["2k", "2+2k", "2(k+1)"]) == 1
    assert worker.first_same("2k+2", ["2k", "k"]) is None
    assert worker.first_same("2k+2", []) is None


def test_a_comparison_that_takes_too_long_ends_the_process() -> None:
    """The next one has a process of its own, and is right."""
    worker = SymbolicWorker(pair_s=60.0)
    assert worker.first_same("2k+2", ["2+2k"]) == 0
    first = worker.pid
    worker.pair_s = 1.0
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        worker.first_same(ENDLESS[0], [ENDLESS[1]])
    assert time.monotonic() - started < 30
    worker.pair_s = 60.0
    assert worker.pid is None
    assert_gone(first)
    assert worker.first_same("2k+2", ["2+2k"]) == 0
    worker.close()


def test_a_process_that_dies_is_started_again() -> None:
    """It costs the comparison under way, no other."""
    worker = SymbolicWorker(pair_s=60.0)
    assert worker.first_same("7!", ["5040"]) == 0
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(OSError, match=r"ended|pipe"):
        worker.first_same("7!", ["5040"])
    assert worker.first_same("7!", ["5040"]) == 0
    worker.close()


def test_a_process_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an error like any other."""
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(OSError, match="nowhere"):
        SymbolicWorker().first_same("7!", ["5040"])


def test_a_fork_has_a_process_of_its_own() -> None:
    """Two that wrote to one would read each other's findings."""
    mine = shared_worker()
    mine.pair_s = 60.0
    assert shared_worker() is mine
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        assert pool.submit(_is_fresh, mine.first_same("7!", ["5040"])).result()
    mine.close()


def _is_fresh(place: int | None) -> bool:
    return place == 0 and shared_worker().pid is None


def test_the_process_is_light() -> None:
    """It imports neither torch nor SGLang, which would take seconds and gigabytes."""
    code = (
        "import sys; from sglang_dynasor.symbolic import is_same; assert is_same('2k+2', '2+2k'); "
        "print(sorted({'torch', 'sglang', 'transformers'} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("is_busy", [False, True])
def test_the_process_ends_with_who_started_it(is_busy: bool) -> None:
    """Also where that one is killed: at once, or with the comparison under way."""
    pair = ENDLESS if is_busy else ("2k+2", "2+2k")
    code = (
        "import threading, time; from sglang_dynasor.symbolic import SymbolicWorker\n"
        "worker = SymbolicWorker(pair_s=60.0); worker.first_same('x', ['y']); pid, worker.pair_s = worker.pid, 2.0\n"
        f"threading.Thread(target=worker.first_same, args=({pair[0]!r}, [{pair[1]!r}]), daemon=True).start()\n"
        "time.sleep(0.5); print(pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    assert_gone(pid)


def assert_gone(pid: int | None) -> None:
    """Its process ends within a minute."""
    deadline = time.monotonic() + 60
    while runs(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def runs(pid: int | None) -> bool:
    """Also where it ends while it is looked at."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_without_math_verify_it_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for where it is missing; not where it is there."""
    check_installed()
    monkeypatch.setattr(symbolic, "find_spec", lambda name: None)
    with pytest.raises(FieldError, match=r"pip install 'sglang-dynasor\[symbolic\]'"):
        check_installed()
