"""Whether two formulas are the same, found by sympy in a process of its own: it may take for ever, or all memory.

The process is this module run by itself, and imports neither torch nor SGLang. It reads pairs and writes findings, a line of JSON
each; it ends when nobody writes to it any more, and is ended by the kernel where it computes longer than it may.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Sequence
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any

from sglang_dynasor.errors import FieldError
from sglang_dynasor.policy.formula import read_formula

PAIR_S = 2.0  # for one comparison
START_S = 30.0  # for the process to import what it needs
MEMORY_BYTES = 2 << 30  # of address space
_PARSER = "latex2sympy2_extended"  # math-verify's own


def check_installed() -> None:
    """Raise FieldError where what is needed is not installed."""
    if find_spec(_PARSER) is None:
        raise FieldError(
            "dynasor.equal='symbolic' needs math-verify, which is not installed; run pip install 'sglang-dynasor[symbolic]' where the server "
            "runs, or use equal 'math'"
        )


class SymbolicWorker:
    """The process, started when first asked and again after it has ended. Thread-safe: one pair at a time."""

    def __init__(self, pair_s: float | None = None):
        self.pair_s = PAIR_S if pair_s is None else pair_s
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def first_same(self, form: str, others: Sequence[str]) -> int | None:
        """Which of `others` is the first that is the same as `form`, all canonical forms; None where none is.

        Raises:
            TimeoutError: a comparison took too long.
            OSError: the process could not be started, or has died.
        """
        with self._lock:
            return next((i for i, other in enumerate(others) if self._compare(form, other)), None)

    def close(self) -> None:
        """End the process. No harm if there is none."""
        with self._lock:
            self._end()

    @property
    def pid(self) -> int | None:
        """Of the process, while there is one."""
        return None if self._process is None else self._process.pid

    def _compare(self, one: str, other: str) -> bool:
        process = self._process or self._start()
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps([one, other, self.pair_s]).encode() + b"\n")
            process.stdin.flush()
            return bool(self._read(process, self.pair_s))
        except BaseException:
            self._end()
            raise

    def _start(self) -> subprocess.Popen[bytes]:
        process = self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        try:
            self._read(process, START_S)
        except BaseException:
            self._end()
            raise
        return process

    def _read(self, process: subprocess.Popen[bytes], limit_s: float) -> Any:
        """The next line that the process writes: one is all it ever has written, so that none is left in a buffer."""
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], limit_s)[0]:
            raise TimeoutError(f"it has not answered in {limit_s:g} s")
        line = process.stdout.readline()
        if not line:
            raise BrokenPipeError(f"it has ended with status {process.wait(1)}")
        return json.loads(line)

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(OSError):  # what was to be written
                    pipe.close()


def shared_worker() -> SymbolicWorker:
    """That of this process; one that was forked off another has its own."""
    return _worker_of(os.getpid())


@cache
def _worker_of(pid: int) -> SymbolicWorker:
    return SymbolicWorker()


# In the process


def is_same(one: str, other: str) -> bool:
    """Whether two canonical forms are formulas of one value. False where it cannot be proved."""
    first, second = read_formula(one), read_formula(other)
    if first is None or second is None or first.frame != second.frame or len(first.parts) != len(second.parts):
        return False
    return all(_is_equal(a, b) for a, b in zip(first.parts, second.parts, strict=True))


def _is_equal(one: str, other: str) -> bool:
    if one == other or not one or not other:
        return one == other
    difference = _expression(one) - _expression(other)
    return difference.doit().equals(0) is True


@lru_cache(maxsize=1024)
def _expression(text: str) -> Any:
    from latex2sympy2_extended import latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig

    return latex2sympy(
        text, conversion_config=ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)
    )


def main() -> None:
    """Compare until standard input ends."""
    import resource
    import signal

    for limit, value in ((resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):  # not on every system
            resource.setrlimit(limit, (value, value))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: whoever started it ends it
    out, sys.stdout = sys.stdout, sys.stderr
    _expression("2k+2")  # imports, and the parser's first word, which is slow
    _answer(out, None)
    for line in sys.stdin:
        one, other, limit_s = json.loads(line)
        # By default an alarm ends the process, wherever it is: nobody else would, once its parent has died.
        signal.setitimer(signal.ITIMER_REAL, limit_s + 1)
        try:
            same = is_same(one, other)
        except Exception:  # what sympy cannot read or decide
            same = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        _answer(out, same)


def _answer(out: Any, value: object) -> None:
    out.write(json.dumps(value) + "\n")
    out.flush()


if __name__ == "__main__":
    main()
