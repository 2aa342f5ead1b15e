"""`sglang-dynasor`: check this installation, see it work, watch it, read its log, measure it on a server of your own, or simulate it."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from sglang_dynasor import __version__
from sglang_dynasor.bench.command import add_bench_options, run_bench
from sglang_dynasor.check import run_check
from sglang_dynasor.errors import ConfigError, DynasorError
from sglang_dynasor.observe.command import add_report_options, run_report
from sglang_dynasor.outcome import show
from sglang_dynasor.page.dashboard import add_dashboard_options, run_dashboard
from sglang_dynasor.sim.command import add_simulate_options, run_simulate, shown
from sglang_dynasor.top import run_top

WRONG = 2  # the exit code of a log that cannot be read, as of a wrong option


def make_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(prog="sglang-dynasor", description=__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
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
    simulate = commands.add_parser("simulate", help="ways of solving questions, side by side on a modelled engine")
    add_simulate_options(simulate)
    bench = commands.add_parser("bench", help="your own questions on a running server: greedy, n samples, programs")
    add_bench_options(bench)
    top = commands.add_parser("top", help="the programs in flight on a server, in this terminal")
    top.add_argument("--url", default="http://127.0.0.1:30000", help="the server (default %(default)s)")
    top.add_argument(
        "--api-key",
        default=os.environ.get("DYNASOR_API_KEY", ""),
        help="its admin key, if it has one, else its API key (default: what $DYNASOR_API_KEY says)",
    )
    top.add_argument("--once", action="store_true", help="print and end")
    dashboard = commands.add_parser("dashboard", help="the live page of several servers, on this machine")
    add_dashboard_options(dashboard)
    report = commands.add_parser("report", help="what a log of programs says: where tokens went, and what to change")
    add_report_options(report)
    return parser


def _run_demo(args: argparse.Namespace) -> None:
    from sglang_dynasor.demo import Demo, run_demo

    demo = Demo(args.reasoner, args.num_questions, args.branches, args.picture, args.csv)
    run_demo(demo, shutil.get_terminal_size().columns)


def _run_bench(args: argparse.Namespace) -> int:
    report = run_bench(args)
    show(report.rows)
    print("\n".join(report.lines))
    return report.exit_code


def _run_report(args: argparse.Namespace) -> int:
    try:
        print("\n".join(run_report(args)))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG
    return 0


def main() -> None:
    """Entry point of the `sglang-dynasor` command."""
    args = make_parser().parse_args()
    if args.command == "check":
        raise SystemExit(run_check(args.json))
    try:
        if args.command == "demo":
            _run_demo(args)
        elif args.command == "bench":
            raise SystemExit(_run_bench(args))
        elif args.command == "report":
            raise SystemExit(_run_report(args))
        elif args.command == "top":
            run_top(args.url, args.api_key, once=args.once)
        elif args.command == "dashboard":
            run_dashboard(args)
        else:
            show([shown(row) for row in run_simulate(args)])
    except DynasorError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
