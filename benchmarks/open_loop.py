"""Sending requests at the times of a stream, whatever the server does, or so many at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")
TRACE = "arrivals_azure2023_code.csv.gz"  # the gaps between its arrivals vary 13 times as much as their mean


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
