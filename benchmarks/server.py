"""The server as an operator starts it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

CHECKPOINT = Path(__file__).parents[1] / "examples" / "tiny_reasoner" / "checkpoint"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """`sglang serve` in a process of its own; everything it prints goes to `log`."""

    def __init__(self, log: Path, *args: str, environment: dict[str, str] | None = None, checkpoint: Path = CHECKPOINT):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        options = ["serve", "--model-path", str(checkpoint), "--port", str(self.port), *args]
        self.process = self._start(options, {**os.environ, **(environment or {})})

    def _start(self, options: list[str], environment: dict[str, str]) -> Any:
        """`sglang` with these options, in a session of its own."""
        with self.log.open("w") as out:
            return subprocess.Popen(
                [str(Path(sys.executable).parent / "sglang"), *options],
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )

    def wait(self, timeout_s: float = 300) -> None:
        """Return once the server answers a request.

        Raises:
            RuntimeError: it ended instead.
            TimeoutError: it does not answer.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.log.read_text()[-2000:]}")
            try:
                if httpx.get(f"{self.url}/health_generate", timeout=10).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        raise TimeoutError(self.log.read_text()[-2000:])

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(30)

    def status(self) -> dict[str, Any]:
        """The counters of the first scheduler."""
        return httpx.get(f"{self.url}/dynasor/status", timeout=30).json()[0]
