"""What waits to be read: a step reads so much and no more, whoever else is served meanwhile (policy/reading.py)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from sglang_dynasor.engine.live import LiveProgram
from sglang_dynasor.policy.reading import STEP_CHARS


class Reading(NamedTuple):
    """One text that waits: whose it is, what it is worth in characters, and what is done with it."""

    live: LiveProgram
    num_chars: int
    read: Callable[[LiveProgram], None]


class Readings:
    """Reads at once while the step has room, else in the steps that follow, in the order in which texts came.

    Args:
        guarded: does what concerns one program, whatever that raises (`Ends.guarded`).
    """

    def __init__(self, guarded: Callable[[LiveProgram, Callable[[LiveProgram], None]], None]):
        self._guarded = guarded
        self.waiting: deque[Reading] = deque()
        self._left = STEP_CHARS

    def __len__(self) -> int:
        return len(self.waiting)

    def add(self, live: LiveProgram, num_chars: int, read: Callable[[LiveProgram], None]) -> bool:
        """Read now, or later. Returns whether it was now; then what `read` raises is the caller's."""
        if self.waiting or not self._has_room(num_chars):
            self.waiting.append(Reading(live, num_chars, read))
            return False
        self._left -= num_chars
        read(live)
        return True

    def add_later(self, live: LiveProgram, do: Callable[[LiveProgram], None]) -> None:
        """Have something done when the next step begins, after what waits."""
        self.waiting.append(Reading(live, 0, do))

    def open_step(self, *, has_bound: bool = True) -> None:
        """Read what waits, as far as this step goes; without a bound all of it."""
        self._left = STEP_CHARS
        while self.waiting and (not has_bound or self._has_room(self.waiting[0].num_chars)):
            reading = self.waiting.popleft()
            self._left -= reading.num_chars
            self._guarded(reading.live, reading.read)

    def _has_room(self, num_chars: int) -> bool:
        """A step that has read nothing yet reads a text of any size."""
        return num_chars <= self._left or self._left == STEP_CHARS
