"""When questions come: Poisson streams, and pieces of recorded ones."""

from __future__ import annotations

import csv
import gzip
import random
from itertools import accumulate, pairwise
from pathlib import Path

from sglang_dynasor.errors import ConfigError

COLUMN = "t_s"  # of a recorded stream: seconds from its begin


def poisson(rate: float, num: int, seed: int) -> list[float]:
    """Times of `num` arrivals in seconds, the first at 0, stretched so that their own mean rate is `rate`."""
    rng = random.Random(seed)
    return _stretched([rng.expovariate(1) for _ in range(num - 1)], rate)


def recorded(rate: float, num: int, seed: int, trace: Path) -> list[float]:
    """A piece of a recorded stream, stretched so that its own mean rate is `rate`.

    Args:
        trace: CSV, or CSV in gzip, with a column `t_s` that never falls.

    Raises:
        ConfigError: the file is not that, or has fewer than `num` arrivals.
    """
    times = _read_times(trace)
    if len(times) < num:
        raise ConfigError(f"{trace} has {len(times)} arrivals; ask for at most as many questions, not {num}")
    first = random.Random(seed).randrange(len(times) - num + 1)
    return _stretched([later - earlier for earlier, later in pairwise(times[first : first + num])], rate)


def _read_times(trace: Path) -> list[float]:
    times: list[float] = []
    try:
        with gzip.open(trace, "rt") if trace.suffix == ".gz" else trace.open() as file:
            rows = csv.DictReader(file)
            if COLUMN not in (rows.fieldnames or ()):
                raise ConfigError(f"{trace} has no column {COLUMN}; its first line must name one, in seconds")
            for row in rows:
                text = row[COLUMN]
                try:
                    times.append(float(text))
                except (TypeError, ValueError):
                    raise ConfigError(
                        f"{trace}, line {rows.line_num}: {COLUMN}={text!r} is no number; give seconds"
                    ) from None
                if times[-1] != times[-1] or (len(times) > 1 and times[-1] < times[-2]):
                    raise ConfigError(
                        f"{trace}, line {rows.line_num}: {COLUMN}={text} comes after {times[-2]}; sort it"
                    )
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{trace} cannot be read as CSV: {error}") from None
    return times


def _stretched(gaps: list[float], rate: float) -> list[float]:
    stretch = len(gaps) / rate / sum(gaps) if sum(gaps) else 0.0
    return [0.0, *accumulate(gap * stretch for gap in gaps)]
