"""What every result states: machine, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path


def _cpu_name() -> str:
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return names[0] if names else platform.machine()


def commit() -> str:
    """The commit checked out, with a + where tracked files differ from it."""
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    changes = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")


def machine() -> dict[str, str]:
    """The columns that close every row of a CSV."""
    return {
        "machine": f"{_cpu_name()}, {len(os.sched_getaffinity(0))} cores",
        "sglang": version("sglang"),
        "torch": version("torch"),
        "commit": commit(),
    }
