"""The logic of examples/code.py: what runs, what abstains, and which candidates do the same."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
from engines import ROOT

PATH = ROOT / "examples" / "code.py"
CALLS = [(0,), (3,)]


def load() -> ModuleType:
    """By its path: `code` is a name of the standard library's."""
    spec = importlib.util.spec_from_file_location("code_example", PATH)
    assert spec is not None
    assert spec.loader is not None
    sys.modules["code_example"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


example: Any = load()
example.LIMITS = example.LIMITS | {"wall_s": 60.0}  # of a shared machine that stalls; `cpu_s` holds


@pytest.mark.parametrize(
    "code",
    [
        "def f(n): return n * 2",
        "def f(n):\n    print('noise', flush=True)\n    return n + n",
        "import os\n\ndef f(n):\n    os.write(1, b'noise')\n    return n << 1",
        "import itertools, math\nprint(f'{math.pi}')\nf = lambda n: sum(itertools.repeat(n, 2))",
        "def f(n):\n    return float(n) * 2",
        "import os\n\ndef f(n):\n    open(os.__file__).close()\n    return n * 2",  # reading is no writing
    ],
)
def test_functions_that_do_the_same_are_one_cluster(code: str) -> None:
    """However they are written, and whatever they print; 6.0 equals 6."""
    outcomes = example.run(code, "f", CALLS)
    assert outcomes == ["= 0", "= 6"]
    assert example.cluster_of(outcomes) == example.cluster_of(["= 0", "= 6"])


@pytest.mark.parametrize(
    ("code", "outcomes"),
    [
        ("def f(n): return n ** 2", ["= 0", "= 9"]),  # right at the first call
        ("def f(n): return [n, n]", ["= [0, 0]", "= [3, 3]"]),
        ("def f(n): return (n, n)", ["= (0, 0,)", "= (3, 3,)"]),  # a tuple is no list
        ("def f(n): return str(n * 2)", ["= '0'", "= '6'"]),  # nor text a number
        ("def f(n): return n == 0", ["= True", "= False"]),
        ("def f(n): return 6 // n", ["! ZeroDivisionError", "= 2"]),  # one error is an outcome
        ("def f(n): return {n, 1, 2}", ["= {0, 1, 2}", "= {1, 2, 3}"]),
        ("def f(n): return dict([(n, 1), (9, 2)])", ["= dict{0: 1, 9: 2}", "= dict{3: 1, 9: 2}"]),
        ("def f(n): return object()", ["= <object>", "= <object>"]),  # not where it lies in memory
    ],
)
def test_a_function_that_does_something_else_is_of_another_cluster(code: str, outcomes: list[str]) -> None:
    """Each outcome is written the same in every process."""
    assert example.run(code, "f", CALLS) == outcomes
    assert example.cluster_of(outcomes) != example.cluster_of(["= 0", "= 6"])


def test_long_outcomes_differ_by_all_of_them() -> None:
    """They are kept by their digest."""
    one, other = (example.run(f"def f(n): return 'x' * 9999 + {end!r}", "f", CALLS) for end in "ab")
    assert one != other
    assert max(map(len, one)) < 100


@pytest.mark.parametrize(
    "code",
    [
        "def f(n) return n",  # a syntax error
        "def g(n): return n",  # no such function
        "def f(n): return undefined",  # raises at every call
        "raise ValueError",
        "import numpy\ndef f(n): return n",  # only the standard library is there
        "def f(n):\n    while True: pass",  # CPU time
        "import time\ndef f(n): time.sleep(60)",  # wall-clock time
        "def f(n): return len([0] * 10 ** 10)",  # memory
        "def f(n): return f(n)",
        "import sys\ndef f(n): sys.exit()",
        "import os\ndef f(n): os._exit(0)",
        "def f(n):\n    open('left', 'w').write('x')\n    return n",  # files
        "import os\ndef f(n):\n    os.remove('x')\n    return n",
        "import socket\ndef f(n):\n    socket.create_connection(('127.0.0.1', 1))\n    return n",  # the network
        "import subprocess\ndef f(n): return subprocess.run(['true'])",  # processes
        "import os\ndef f(n): return os.fork()",
    ],
    ids=range(16),
)
def test_a_candidate_that_does_not_run_abstains(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ends it, a limit or itself: it has no outcomes."""
    monkeypatch.setattr(example, "LIMITS", example.LIMITS | {"cpu_s": 1, "wall_s": 2.0})
    assert example.run(code, "f", CALLS) is None


def test_a_candidate_may_not_change_what_the_next_call_is_given() -> None:
    """Each call has arguments of its own."""
    assert example.run("def f(xs):\n    xs.append(1)\n    return len(xs)", "f", [([],), ([],)]) == ["= 1", "= 1"]


def test_rewards_are_shares_of_the_unit_tests() -> None:
    """Of those that are expected; more inputs tell behaviours apart and are worth nothing."""
    task = example.TASKS[0]
    expected = example.expected_of(task)
    right = example.run(f"def {task.name}(n): return n % 2 == 0", task.name, task.calls)
    always = example.run(f"def {task.name}(n): return True", task.name, task.calls)
    positive = example.run(f"def {task.name}(n): return n >= 0 and n % 2 == 0", task.name, task.calls)
    wrong = example.run(f"def {task.name}(n): return 'even'", task.name, task.calls)
    assert [example.reward_of(outcomes, expected) for outcomes in (right, always, positive, wrong)] == [1, 0.5, 1, 0]
    assert example.cluster_of(right) != example.cluster_of(always)
    assert example.cluster_of(right) == example.cluster_of(positive)  # nobody asked about negative even numbers


@pytest.mark.parametrize("task", example.TASKS, ids=lambda task: task.name)
def test_every_task_can_be_solved(task: Any) -> None:
    """Its tests hold for a function that does what its text says."""
    solutions = {
        "is_even": "def is_even(n): return n % 2 == 0",
        "count_vowels": "def count_vowels(text): return sum(c in 'aeiou' for c in text)",
    }
    outcomes = example.run(solutions[task.name], task.name, task.calls)
    assert example.reward_of(outcomes, example.expected_of(task)) == 1


def test_the_standard_library_s_code_is_found_beside_it() -> None:
    """A script in examples/ has that folder first on its path, and pdb asks for `code`."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import pdb, code; print(code.InteractiveConsole, code.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(PATH.parent)], capture_output=True, text=True, check=True)
    assert "InteractiveConsole" in done.stdout
