"""What only the first rank finds out, with its clock and over the network, and tells the other ranks.

It rides SGLang's next broadcast of requests, as an abort of a rid that no request has: SGLang ignores it, and every rank's
controller acts on it in the same iteration.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator
from typing import Any

from sglang.srt.managers.io_struct import AbortReq

from sglang_dynasor.config import DynasorConfig
from sglang_dynasor.engine.findings import Finding, Findings
from sglang_dynasor.engine.reward_model import RewardModel
from sglang_dynasor.policy.pace import Pace

TOLD_RID = "\0dynasor-told-"  # then what is told, and of what, parted by colons


def told(*parts: object) -> AbortReq:
    """The message, as SGLang broadcasts it."""
    return AbortReq(rid=TOLD_RID + ":".join(map(str, parts)))


class Teller:
    """The first rank's clock: deadlines, rewards and findings that have come, and what a row costs."""

    def __init__(self, scheduler: Any, config: DynasorConfig):
        self.scheduler = scheduler
        self.rewards = RewardModel(config.dynasor_reward_url, config.dynasor_reward_timeout_s)
        self.findings = Findings(config.dynasor_embedding_url, config.dynasor_equal_timeout_s)
        self._undated: list[tuple[int, float]] = []  # program, seconds: those that the clock has not been read for
        self._deadlines: list[tuple[float, int]] = []  # when, program
        self._pace = Pace()
        self._last_step = (-1, 0.0)  # forward_ct and time when time was last looked at

    def date(self, number: int, deadline_s: float) -> None:
        """Tell when program `number` has been there for so many seconds."""
        self._undated.append((number, deadline_s))

    def due(self, is_held: Callable[[int], bool], fixed_rows: int) -> Iterator[AbortReq]:
        """What is to be told now. What has not been heard is told again: SGLang may drop what a poll returns.

        Args:
            is_held: whether a program is still there to hear of its deadline.
            fixed_rows: as told last.
        """
        now = time.monotonic()
        for number, deadline_s in self._undated:
            heapq.heappush(self._deadlines, (now + deadline_s, number))
        self._undated.clear()
        reached: list[tuple[float, int]] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            entry = heapq.heappop(self._deadlines)
            if is_held(entry[1]):
                reached.append(entry)
                yield told("deadline", entry[1])
        for entry in reached:
            heapq.heappush(self._deadlines, entry)
        for (number, index), reward in self.rewards.given():
            yield told("reward", number, index, "" if reward is None else reward.hex())
        for (number, index), finding in self.findings.given():
            into, score = finding or Finding(None)
            yield told("same", number, index, "" if into is None else into, "" if score is None else score.hex())
        if self._see_step(now) and (rows := self._pace.news(fixed_rows)) is not None:
            yield told("fixed-rows", rows)

    def _see_step(self, now: float) -> bool:
        """Time the step that has just been run. Returns whether there was one."""
        scheduler, (last_step, last_time) = self.scheduler, self._last_step
        self._last_step = scheduler.forward_ct, now
        batch = scheduler.last_batch
        if batch is None or not batch.forward_mode.is_decode() or scheduler.forward_ct != last_step + 1:
            return False
        self._pace.see(len(batch.reqs), now - last_time)
        return True
