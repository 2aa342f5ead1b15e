"""Open-loop streams: when requests arrive, whatever the server does, and sending them at those times."""

from __future__ import annotations

import asyncio
import csv
import gzip
import io
import random
import time
from collections.abc import Awaitable, Callable
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
TRACE = "arrivals_azure2023_code.csv.gz"  # the gaps between its arrivals vary 13 times as much as their mean


def poisson(rate: float, num: int, seed: int) -> list[float]:
    """Times of `num` arrivals in seconds, the first at 0, stretched so that their own mean rate is `rate`."""
    rng = random.Random(seed)
    return _stretched([rng.expovariate(1) for _ in range(num - 1)], rate)


def recorded(rate: float, num: int, seed: int, trace: Path) -> list[float]:
    """A piece of a recorded stream, stretched so that its own mean rate is `rate`."""
    with gzip.open(trace) as raw:
        times = [float(row["t_s"]) for row in csv.DictReader(io.TextIOWrapper(raw))]
    first = random.Random(seed).randrange(len(times) - num + 1)
    return _stretched([later - earlier for earlier, later in pairwise(times[first : first + num])], rate)


def _stretched(gaps: list[float], rate: float) -> list[float]:
    stretch = len(gaps) / rate / sum(gaps) if gaps else 0.0
    return [0.0, *accumulate(gap * stretch for gap in gaps)]


async def play(times_s: list[float], send: Callable[[int, float], Awaitable[T]]) -> list[T]:
    """Call `send(index, due)` at each time; `due` is that time on the perf_counter clock, so latency counts from it."""
    started = time.perf_counter()

    async def one(index: int, at_s: float) -> T:
        await asyncio.sleep(started + at_s - time.perf_counter())
        return await send(index, started + at_s)

    return await asyncio.gather(*(one(index, at_s) for index, at_s in enumerate(times_s)))


async def in_turn(num: int, num_outstanding: int, send: Callable[[int, float], Awaitable[T]]) -> list[T]:
    """Closed loop: `num` calls of `send`, never more than `num_outstanding` at once."""
    free = asyncio.Semaphore(num_outstanding)

    async def one(index: int) -> T:
        async with free:
            return await send(index, time.perf_counter())

    return await asyncio.gather(*(one(index) for index in range(num)))
