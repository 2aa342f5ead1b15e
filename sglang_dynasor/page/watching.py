"""One look at the schedulers for all who watch. While nobody does, nothing runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable

from sglang_dynasor.page.stream import event

EVERY_S = 0.5
MOST_FRAC = 0.005  # of a scheduler's time that looks may take: with very many programs there are fewer
LONGEST_S = 30.0  # between two looks all the same
LEAST_PAUSE_S = 0.25  # schedulers that answer late are not asked all the time
SILENT_S = 5.0  # after which a viewer is told that the server is still there
MOST_VIEWERS = 64
STILL_HERE = b": still here\n\n"


class Watching:
    """Who watches, and the newest frame.

    Args:
        look: the frame as an event, and the seconds that it took of the scheduler that it took most of.
        is_over: whether the server goes down; then every stream ends, or the server would wait for its viewers.
    """

    def __init__(self, look: Callable[[], Awaitable[tuple[bytes, float]]], is_over: Callable[[], bool] = lambda: False):
        self.look = look
        self.is_over = is_over
        self.num_viewers = 0
        self.poller: asyncio.Task[None] | None = None
        self._frame = b""
        self._num_frames = 0
        self._next = asyncio.Event()

    @property
    def is_full(self) -> bool:
        """Whether one more viewer would be too many."""
        return self.num_viewers >= MOST_VIEWERS

    async def frames(self) -> AsyncGenerator[bytes]:
        """The newest frame whenever the viewer asks for one: who asks late misses those between."""
        self.num_viewers += 1
        seen = 0
        try:
            if self.poller is None:
                self._num_frames = 0
                self.poller = asyncio.create_task(self._poll())
            while not self.is_over():
                if self._num_frames in (0, seen):
                    try:
                        async with asyncio.timeout(SILENT_S):
                            await self._next.wait()
                    except TimeoutError:
                        yield STILL_HERE
                        continue
                seen = self._num_frames
                yield self._frame
        finally:
            self.num_viewers -= 1

    async def _poll(self) -> None:
        try:
            while self.num_viewers:  # a look under way is never cut off: SGLang waits for each answer that it asked for
                started, took_s = time.monotonic(), 0.0
                try:
                    frame, took_s = await self.look()
                except Exception as error:
                    frame = event("trouble", {"error": f"the schedulers cannot be asked: {type(error).__name__}"})
                self._frame, self._num_frames = frame, self._num_frames + 1
                told, self._next = self._next, asyncio.Event()
                told.set()
                await asyncio.sleep(max(pause_s(took_s) - (time.monotonic() - started), LEAST_PAUSE_S))
        finally:
            self.poller = None


def pause_s(took_s: float) -> float:
    """From one look to the next, where one takes `took_s` of a scheduler's time."""
    return min(max(EVERY_S, took_s / MOST_FRAC), LONGEST_S)
