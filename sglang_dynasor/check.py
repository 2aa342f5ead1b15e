"""`sglang-dynasor check`: whether `--scheduler dynasor` can be served here, one row per requirement."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from importlib.metadata import entry_points
from typing import NamedTuple

from sglang_dynasor.config import SGLANG_RANGE

PYTHONS = ((3, 11), (3, 12))


class Row(NamedTuple):
    """One requirement."""

    name: str
    is_met: bool
    detail: str


def check_python(version: tuple[int, int, int]) -> Row:
    """Whether this Python is in the range that SGLang's dependencies have wheels for."""
    is_met = PYTHONS[0] <= version[:2] <= PYTHONS[1]
    detail = ".".join(map(str, version))
    if not is_met:
        detail += "; use 3.11 or 3.12: outlines-core, which SGLang depends on, has wheels for no other"
    return Row("Python 3.11 to 3.12", is_met, detail)


def check_rows() -> list[Row]:
    """One row per requirement of `--scheduler dynasor` on this machine."""
    return [check_python(sys.version_info[:3]), *probed_sglang(), *plugin_rows(), probed_kernels()]


def plugin_rows() -> list[Row]:
    """Whether SGLang will find our plugin, and load it."""
    names = [entry.name for entry in entry_points(group="sglang.srt.plugins")]
    allowed = os.environ.get("SGLANG_PLUGINS", "")
    is_allowed = not allowed or "dynasor" in map(str.strip, allowed.split(","))
    return [
        Row("plugin is registered", "dynasor" in names, ", ".join(names) or "none; reinstall sglang-dynasor"),
        Row(
            "plugin is not filtered out",
            is_allowed,
            f"SGLANG_PLUGINS={allowed!r}" + ("" if is_allowed else "; add dynasor"),
        ),
    ]


def sglang_rows() -> list[Row]:
    """SGLang's version, the device that would serve, and one row per patch. Imports SGLang, which prints warnings.

    Raises:
        ImportError: SGLang, or what it needs, is not there.
    """
    from sglang.version import __version__ as sglang_version

    from sglang_dynasor.engine.device import missing_device, serving_device
    from sglang_dynasor_patches.install import check_patch, check_version
    from sglang_dynasor_patches.records import PATCHES
    from sglang_dynasor_patches.uses import installed_problems

    wrong = check_version()
    rows = [Row(f"SGLang {SGLANG_RANGE}", wrong is None, wrong or sglang_version)]
    missing = missing_device()
    rows.append(Row("device", missing is None, missing or serving_device()))
    for patch in PATCHES:
        wrong = check_patch(patch) or check_hook(patch.hook)
        rows.append(Row(f"patch {patch.target.removeprefix('sglang.srt.')}", wrong is None, wrong or patch.kind))
    num, lacking = installed_problems()
    rows.append(Row("names of SGLang that are used", not lacking, "; ".join(lacking) or f"all {num} are there"))
    return rows


def check_hook(hook: str) -> str | None:
    """Why our function behind a patch cannot be loaded, which SGLang would only log, or None."""
    module, _, name = hook.rpartition(".")
    try:
        getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        return f"our {hook} cannot be loaded: {error}; reinstall sglang-dynasor"
    return None


def probed_sglang() -> list[Row]:
    """`sglang_rows` from a process of its own, so that what SGLang prints at its import, or dies of, stays there."""
    done = _python("-P", "-m", "sglang_dynasor.check")
    if done.returncode == 0:
        return [Row(*row) for row in json.loads(done.stdout.strip().rpartition("\n")[2])]
    reason = done.stderr.strip().rpartition("\n")[2] or f"its import ended with exit code {done.returncode}"
    return [Row(f"SGLang {SGLANG_RANGE}", False, f"{reason}; install it with pip install 'sglang{SGLANG_RANGE}'")]


def probed_kernels() -> Row:
    """SGLang does `from kernels import get_kernel` inside try/except: a shadowed package costs speed in silence."""
    done = _python("-c", "from kernels import get_kernel")
    last = done.stderr.strip().rpartition("\n")[2]
    return Row("Hugging Face kernels is not shadowed", done.returncode == 0, last or "importable from here")


def _python(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, check=False)


def run_check(as_json: bool) -> int:
    """Print the rows; 0 if every requirement is met, else 1."""
    rows = check_rows()
    if as_json:
        print(json.dumps([row._asdict() for row in rows], indent=1))
    else:
        width = max(len(row.name) for row in rows)
        for row in rows:
            print(f"{'ok  ' if row.is_met else 'FAIL'}  {row.name:<{width}}  {row.detail}")
    return 0 if all(row.is_met for row in rows) else 1


if __name__ == "__main__":
    print(json.dumps(sglang_rows()))
