"""`sglang-dynasor`: check this installation, or see it work."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from sglang_dynasor.config import SGLANG_RANGE


class Row(NamedTuple):
    """One requirement."""

    name: str
    is_met: bool
    detail: str


def check_rows() -> list[Row]:
    """One row per requirement of `--scheduler dynasor` on this machine."""
    rows: list[Row] = []
    version = sys.version_info
    rows.append(Row("Python 3.11 or newer", version >= (3, 11), f"{version.major}.{version.minor}.{version.micro}"))
    try:
        from sglang_dynasor_patches.install import check_patch, check_version
        from sglang_dynasor_patches.records import PATCHES
    except ImportError as error:
        return [
            *rows,
            Row(f"SGLang {SGLANG_RANGE}", False, f"{error}; install it with pip install 'sglang{SGLANG_RANGE}'"),
        ]
    wrong = check_version()
    from sglang.version import __version__ as sglang_version

    rows.append(Row(f"SGLang {SGLANG_RANGE}", wrong is None, wrong or sglang_version))
    for patch in PATCHES:
        wrong = check_patch(patch)
        rows.append(Row(f"patch {patch.target.removeprefix('sglang.srt.')}", wrong is None, wrong or patch.kind))
    from importlib.metadata import entry_points

    names = [entry.name for entry in entry_points(group="sglang.srt.plugins")]
    rows.append(Row("plugin is registered", "dynasor" in names, ", ".join(names) or "none; reinstall sglang-dynasor"))
    allowed = os.environ.get("SGLANG_PLUGINS", "")
    is_allowed = not allowed or "dynasor" in map(str.strip, allowed.split(","))
    rows.append(
        Row(
            "plugin is not filtered out",
            is_allowed,
            f"SGLANG_PLUGINS={allowed!r}" + ("" if is_allowed else "; add dynasor"),
        )
    )
    # SGLang does `from kernels import get_kernel` inside try/except: a shadowed package costs speed in silence.
    probe = subprocess.run(
        [sys.executable, "-c", "from kernels import get_kernel"], capture_output=True, text=True, check=False
    )
    last = probe.stderr.strip().rpartition("\n")[2]
    rows.append(Row("Hugging Face kernels is not shadowed", probe.returncode == 0, last or "importable from here"))
    return rows


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


def main() -> None:
    """Entry point of the `sglang-dynasor` command."""
    parser = argparse.ArgumentParser(prog="sglang-dynasor", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="one row per requirement; exit code 1 if one is not met")
    check.add_argument("--json", action="store_true", help="print JSON")
    demo = commands.add_parser("demo", help="solve questions with stock sampling and as programs, side by side")
    demo.add_argument(
        "--reasoner", type=Path, default=Path("examples/tiny_reasoner"), help="folder of the tiny reasoner"
    )
    demo.add_argument("--num-questions", type=int, default=100, help="held-out questions to solve (default 100)")
    demo.add_argument("--branches", type=int, default=16, help="samples per question, and the programs' cap")
    demo.add_argument("--picture", type=Path, default=Path("demo.png"), help="where the picture goes")
    demo.add_argument("--csv", type=Path, help="also write the table as CSV")
    args = parser.parse_args()
    if args.command == "check":
        raise SystemExit(run_check(args.json))
    from sglang_dynasor.demo import run_demo

    if not (args.reasoner / "checkpoint" / "config.json").exists():
        raise SystemExit(
            f"error: --reasoner={args.reasoner} holds no checkpoint; run this in a checkout of sglang-dynasor, "
            "or give the path of its examples/tiny_reasoner"
        )
    columns = shutil.get_terminal_size().columns
    run_demo(args.reasoner, args.num_questions, args.branches, args.picture, args.csv, columns)


if __name__ == "__main__":
    main()
