"""What only the first rank finds out, with its clock and over the network, and tells the other ranks.

It rides SGLang's next broadcast of requests, and every rank's controller acts on it in the same iteration.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator
from typing import Any

from sglang_dynasor.config import DynasorConfig
from sglang_dynasor.engine.fence import guarded
from sglang_dynasor.engine.findings import Finding, Findings
from sglang_dynasor.engine.messages import Told
from sglang_dynasor.engine.reward_model import RewardModel
from sglang_dynasor.policy.pace import Pace

FEWEST_SWEPT = 64  # deadlines, before those are looked for whose programs are over


class Teller:
    """The first rank's clock: deadlines, rewards and findings that have come, and what a row costs."""

    def __init__(self, scheduler: Any, config: DynasorConfig):
        self.scheduler = scheduler
        self.rewards = RewardModel(config.dynasor_reward_url, config.dynasor_reward_timeout_s)
        self.findings = Findings(config.dynasor_embedding_url, config.dynasor_equal_timeout_s)
        self._undated: list[tuple[int, float]] = []  # program, seconds: those that the clock has not been read for
        self._deadlines: list[tuple[float, int]] = []  # heap: when, program
        self._most_deadlines = FEWEST_SWEPT  # from which on those of programs that are over are dropped
        self._pace = Pace()
        self._last_step = (-1, 0.0)  # forward_ct and time when time was last looked at

    @guarded("date")
    def date(self, number: int, deadline_s: float) -> None:
        """Tell when program `number` has been there for so many seconds."""
        self._undated.append((number, deadline_s))

    def due(self, is_held: Callable[[int], bool], fixed_rows: int) -> Iterator[Told]:
        """What is to be told now. What has not been heard is told again: SGLang may drop what a poll returns.

        Args:
            is_held: whether a program is still there to hear of its deadline.
            fixed_rows: as told last.
        """
        now = time.monotonic()
        for number, deadline_s in self._undated:
            heapq.heappush(self._deadlines, (now + deadline_s, number))
        self._undated.clear()
        self._sweep(is_held)
        reached: list[tuple[float, int]] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            entry = heapq.heappop(self._deadlines)
            if is_held(entry[1]):
                reached.append(entry)
                yield Told(what="deadline", parts=(entry[1],))
        for entry in reached:
            heapq.heappush(self._deadlines, entry)
        for (number, index), reward in self.rewards.given():
            yield Told(what="reward", parts=(number, index, reward))
        for (number, index), finding in self.findings.given():
            yield Told(what="same", parts=(number, index, *(finding or Finding(None))))
        if self._see_step(now) and (rows := self._pace.news(fixed_rows)) is not None:
            yield Told(what="fixed_rows", parts=(rows,))

    def _sweep(self, is_held: Callable[[int], bool]) -> None:
        """Drop deadlines of programs that are over, whenever there are twice as many as the last time: most never come to theirs."""
        if len(self._deadlines) >= self._most_deadlines:
            self._deadlines = [entry for entry in self._deadlines if is_held(entry[1])]
            heapq.heapify(self._deadlines)
            self._most_deadlines = max(FEWEST_SWEPT, 2 * len(self._deadlines))

    def _see_step(self, now: float) -> bool:
        """Time the step that has just been run. Returns whether there was one."""
        scheduler, (last_step, last_time) = self.scheduler, self._last_step
        self._last_step = scheduler.forward_ct, now
        batch = scheduler.last_batch
        if batch is None or not batch.forward_mode.is_decode() or scheduler.forward_ct != last_step + 1:
            return False
        self._pace.see(len(batch.reqs), now - last_time)
        return True
