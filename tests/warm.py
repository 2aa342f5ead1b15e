"""A Python that has imported SGLang before: what a test runs in a process of its own is forked from it, in 0.1 s, not 20.

Only SGLang is imported there: nothing of this project, no plugin. Engines that are started there fork as well. Tests of
what a start by an operator's hand does start a real process.
"""

from __future__ import annotations

import atexit
import json
import multiprocessing as mp
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from server import Server

_context = mp.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "sglang.cli.main",
        "sglang.lang.api",
        "sglang.srt.entrypoints.http_server",
        "sglang.srt.managers.detokenizer_manager",
        "sglang.srt.managers.scheduler",
    ]
)


class WarmPython:
    """`python *args` under way in a session of its own, with the parts of `subprocess.Popen` that tests need."""

    def __init__(self, args: list[str], stdout: Path, stderr: Path, env: Mapping[str, str], cwd: Path | None = None):
        folder = str(cwd or Path.cwd())
        self._process = _context.Process(
            target=_become, args=(args, str(stdout), str(stderr), dict(env), folder, _python_path())
        )
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout_s: float) -> int:
        """Its exit code.

        Raises:
            subprocess.TimeoutExpired: it still runs then.
        """
        self._process.join(timeout_s)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("python", timeout_s)
        return self._process.exitcode


def run_python(
    args: list[str], *, timeout_s: float = 400, env: Mapping[str, str] = os.environ, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run([sys.executable, *args], capture_output=True, text=True)` returns; args as of a script, -c or -m.

    Raises:
        subprocess.TimeoutExpired: it has not ended by then; it is ended, with all that it started.
    """
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder, "stdout"), Path(folder, "stderr")
        python = WarmPython(args, stdout, stderr, env, cwd)
        try:
            code = python.wait(timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(python.pid, signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(args, code, stdout.read_text(), stderr.read_text())


class WarmServer(Server):
    """A server that is up in seconds, where how it is started is not the point."""

    def _start(self, options: list[str], environment: dict[str, str]) -> Any:
        return WarmPython(["-c", "from sglang.cli.main import main; main()", *options], self.log, self.log, environment)


@cache
def _python_path() -> list[str]:
    """What a new Python finds in `sys.path`, without what pytest adds; the first is the script's folder."""
    code = "import json, sys; print(json.dumps(sys.path[1:]))"
    return json.loads(subprocess.check_output([sys.executable, "-c", code], text=True))


def _become(args: list[str], stdout: str, stderr: str, env: dict[str, str], cwd: str, path: list[str]) -> None:
    """Be that Python."""
    os.setsid()
    for file, number in ((stdout, 1), (stderr, 2)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    set_start_method = mp.set_start_method
    # SGLang asks for "spawn", for CUDA's sake.
    mp.set_start_method = lambda method, force=False: set_start_method("fork", force=True)
    try:
        match args:
            case ["-c", code, *rest]:
                sys.argv[:], sys.path[:] = ["-c", *rest], ["", *path]
                exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
            case ["-m", module, *rest]:
                sys.argv[:], sys.path[:] = [module, *rest], [cwd, *path]
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            case [script, *rest]:
                sys.argv[:], sys.path[:] = [script, *rest], [str(Path(script).parent), *path]
                runpy.run_path(script, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a process of multiprocessing leaves them out
