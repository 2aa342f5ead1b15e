"""Functions that a model writes: candidates run, vote by what they do, and are rewarded by unit tests. The answer is the code.

    python examples/code.py                                   # SmolLM2-135M-Instruct, as in pretrained.py
    python examples/code.py --model PATH_OR_NAME              # a larger one writes better functions
    python examples/code.py --model http://127.0.0.1:30000    # one that is served

A candidate runs in a process of its own with limits (`LIMITS`), without network, files to write or processes to start.
That is against accidents: an endless loop, a list without end, a stray `os.remove`. It is no jail. Whoever does not trust the
model at all runs this in a container.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMITS = {"cpu_s": 2, "memory_bytes": 512 << 20, "wall_s": 5.0, "outcome_chars": 4096}
BRANCHES, WIDTH, MAX_TOKENS = 8, 4, 120

# What the candidate's process runs: it reads a job, lets go of its output and its powers, and says what each call gave.
RUNNER = r'''
import ast, hashlib, json, os, resource, sys

job = json.load(sys.stdin)
result = os.fdopen(os.dup(1), "w")
nowhere = os.open(os.devnull, os.O_RDWR)
for stream in (0, 1, 2):  # what it prints is not its answer
    os.dup2(nowhere, stream)
for limit, most in (("AS", job["memory_bytes"]), ("CPU", job["cpu_s"]), ("FSIZE", 0), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + limit), (most, most))
sys.setrecursionlimit(2000)


def written(value, depth=20):
    """The same text for equal values, whatever their order in memory; other objects by their type alone."""
    if depth == 0:
        raise RecursionError("too deep")
    if isinstance(value, bool) or value is None or isinstance(value, (str, bytes)):
        return repr(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else format(value, ".9g")
    if isinstance(value, (list, tuple)):
        inner = ", ".join(written(item, depth - 1) for item in value)
        return "[" + inner + "]" if isinstance(value, list) else "(" + inner + ",)"
    if isinstance(value, (set, frozenset)):
        return "{" + ", ".join(sorted(written(item, depth - 1) for item in value)) + "}"
    if isinstance(value, dict):
        pairs = sorted(written(key, depth - 1) + ": " + written(item, depth - 1) for key, item in value.items())
        return "dict{" + ", ".join(pairs) + "}"
    return "<" + type(value).__name__ + ">"


FORBIDDEN = ("socket.", "subprocess.", "shutil.", "ctypes.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.kill",
             "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown",
             "resource.setrlimit")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def guard(event, args):
    writes = event == "open" and (set(args[1] or "") & set("wax+") or (args[2] or 0) & WRITES)
    if writes or event.startswith(FORBIDDEN):
        raise PermissionError(event + " is not for candidates")


sys.addaudithook(guard)
outcomes = []
try:
    scope = {"__name__": "candidate"}
    exec(compile(job["code"], "candidate", "exec"), scope)
    function = scope[job["name"]]
    for inputs in job["inputs"]:
        try:
            text = written(function(*ast.literal_eval(inputs)))
            is_long = len(text) > job["outcome_chars"]
            outcomes.append("= " + (hashlib.sha256(text.encode()).hexdigest() if is_long else text))
        except Exception as error:
            outcomes.append("! " + type(error).__name__)
except BaseException:  # SystemExit too: it does not run
    outcomes = []
json.dump(outcomes, result)
result.flush()
os._exit(0)  # whatever it has left behind does not run any more
'''


@dataclass(frozen=True, slots=True)
class Task:
    """A function to write."""

    name: str
    text: str
    tests: tuple[tuple[tuple[Any, ...], Any], ...]  # arguments, and what they must give
    inputs: tuple[
        tuple[Any, ...], ...
    ] = ()  # more arguments, of which nobody knows what they give: they tell candidates apart

    @property
    def prompt(self) -> str:
        return f"Write a Python function `{self.name}` that {self.text}. Answer with one Python code block."

    @property
    def calls(self) -> list[tuple[Any, ...]]:
        return [arguments for arguments, _ in self.tests] + list(self.inputs)


TASKS = (
    Task(
        "is_even", "takes an integer `n` and returns whether it is even", (((4,), True), ((7,), False)), ((0,), (-3,))
    ),
    Task(
        "count_vowels",
        "takes a string `text` and returns how many vowels (a, e, i, o, u) it has",
        ((("banana",), 3), (("",), 0), (("xyz",), 0)),
        (("AEIOU",), ("Queue up",)),
    ),
)


def run(code: str, name: str, calls: Sequence[tuple[Any, ...]]) -> list[str] | None:
    """What `name` of `code` gave for each of `calls`, as text; None where it does not run.

    It does not run where it does not compile, defines no such function, ends the process, is ended by a limit, or raises at
    every call. A single error is an outcome like any other.
    """
    job = {"code": code, "name": name, "inputs": [repr(arguments) for arguments in calls], **LIMITS}
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-S", "-s", "-P", "-c", RUNNER],
                input=json.dumps(job), capture_output=True, text=True, timeout=LIMITS["wall_s"], check=False, cwd=folder,
                env={"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return None
    try:
        outcomes = json.loads(done.stdout)
    except ValueError:  # a limit ended it before it could say anything
        return None
    return outcomes if any(outcome.startswith("=") for outcome in outcomes) else None


def cluster_of(outcomes: list[str]) -> str:
    """The name of a behaviour: that of every function that does the same."""
    return "does_" + hashlib.sha256(json.dumps(outcomes).encode()).hexdigest()[:16]


def expected_of(task: Task) -> list[str]:
    """What the tests ask for, written as outcomes are."""
    values = [value for _, value in task.tests]
    told = run(f"def value(index): return {values!r}[index]", "value", [(index,) for index in range(len(values))])
    assert told is not None, f"{task.name}: its tests ask for nothing that can be written"
    return told


def reward_of(outcomes: list[str], expected: list[str]) -> float:
    """The share of the unit tests that pass, in [0, 1]."""
    return sum(map(str.__eq__, outcomes, expected)) / len(expected)


def write(s: Any, prompt: str, task: Task) -> Any:
    """The frontend program: candidates as branches, judged as they finish."""
    import sglang as sgl

    from sglang_dynasor.frontend import reason

    expected = expected_of(task)
    s += prompt + "```python\n"
    # The best reward decides; of behaviours that pass as many tests the one that most candidates have. It ends once one
    # passes all and the others are not likely to outvote it.
    rule = "best:1 and predictive:0.1"
    with reason(s, branches=BRANCHES, width=WIDTH, equal="text", vote="best", stop=rule, reports=True) as p:
        for branch in p.fork():
            branch += sgl.gen("code", max_tokens=MAX_TOKENS, temperature=0.8, stop="```")
        for branch in p.as_completed():
            outcomes = run(branch["code"], task.name, task.calls)
            if outcomes is None:
                p.report(branch, abstains=True)
            else:
                p.report(branch, cluster=cluster_of(outcomes), reward=reward_of(outcomes, expected))
    s["code"] = None if p.answer is None or p.winner is None else p.winner["code"]
    return p


def tell(task: Task, p: Any, code: str | None) -> None:
    """Print what came of one task."""
    num_ran = sum(p.votes.values())
    print(f"{task.name}: {num_ran + p.record['num_abstentions']} candidates, {num_ran} of them ran; ", end="")
    if code is None:
        print("no answer")
        return
    passed = round(max(reward for reward in p.record["rewards"] if reward is not None) * len(task.tests))
    print(f"behaviours: {len(p.votes)}, votes for the answer: {p.votes[p.answer]}, ", end="")
    print(f"tests passed: {passed} of {len(task.tests)}")
    print("\n".join(f"    {line}" for line in code.strip().splitlines()))


def start(model: str | None) -> Any:
    """A backend for an address, a model's path or name, or the pretrained example's model."""
    from sglang_dynasor.frontend import Endpoint, LocalEngine

    if model is not None and model.startswith(("http://", "https://")):
        return Endpoint(model)
    if model is None:
        from pretrained import CHECKPOINT, make_checkpoint

        model = str(CHECKPOINT)
        if not (CHECKPOINT / "config.json").exists():
            print("dequantising SmolLM2-135M-Instruct once ...", flush=True)
            make_checkpoint(CHECKPOINT)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from sglang_dynasor.demo import quiet_start

    with quiet_start():
        import sglang as sgl

        engine = sgl.Engine(
            model_path=model, scheduler="dynasor", max_total_tokens=8192, max_running_requests=8, log_level="error"
        )
    return LocalEngine(engine)


def main() -> None:
    import sglang as sgl

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="a model's path or name, or the address of a server")
    backend = start(parser.parse_args().model)
    try:
        prompts = [backend.render([{"role": "user", "content": task.prompt}]) for task in TASKS]
        arguments = [{"prompt": prompt, "task": task} for prompt, task in zip(prompts, TASKS, strict=True)]
        program: Any = sgl.function(write)
        states = program.run_batch(arguments, backend=backend)
        for task, state in zip(TASKS, states, strict=True):
            tell(task, state.ret_value, state["code"])
    finally:
        backend.close()
        if (engine := getattr(backend, "engine", None)) is not None:
            engine.shutdown()


# A script has its folder first on its path: whoever asks for the standard library's `code` here, as pdb does, is given that.
if __name__ == "code":
    exec(compile((Path(os.__file__).parent / "code.py").read_text(), "code.py", "exec"))

if __name__ == "__main__":
    multiprocessing.freeze_support()
    main()
