"""`sglang-dynasor report`: its options, and one run from logs to a page and a few lines."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

from sglang_dynasor.errors import ConfigError, quoted
from sglang_dynasor.observe.report import Report, lines_of, with_older
from sglang_dynasor.observe.report_page import page, summary


def add_report_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `sglang-dynasor report`."""
    parser.add_argument(
        "logs", nargs="+", type=Path, metavar="LOG", help="file of --dynasor-log; LOG.1 and so on are read with it"
    )
    parser.add_argument(
        "--html", type=Path, default=Path("report.html"), metavar="FILE", help="where the page goes (default report.html)"
    )  # fmt: skip


def run_report(args: argparse.Namespace) -> list[str]:
    """Read, and write the page; what is said of it.

    Raises:
        ConfigError: a log cannot be read, or the page not be written.
    """
    files: dict[str, Path] = {}  # once each, however it is called
    for log in args.logs:
        for file in with_older(log):
            files.setdefault(os.path.realpath(file), file)
    report = Report()
    opened: list[Iterator[bytes]] = []
    for file in files.values():
        try:
            opened.append(lines_of(file))
        except OSError as error:
            raise ConfigError(
                f"{quoted(str(file))} cannot be read ({error.strerror}); name a file of --dynasor-log"
            ) from None
    for lines in opened:
        report.read(lines)
    report.close()
    try:
        args.html.write_text(page(report, [str(file) for file in files.values()]), encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(
            f"--html={args.html} cannot be written ({error.strerror}); choose a file in a folder that is there and can"
        ) from None
    return [*summary(report), f"the page is in {args.html}"]
