"""Rewards from a reward model that another server runs, asked for over HTTP beside the scheduler's loop."""

from __future__ import annotations

import json
import logging
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from math import exp
from typing import Any

logger = logging.getLogger(__name__)

# The operator's own server: never through a proxy that the environment names.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
Key = tuple[int, int]  # a program's number and its branch
MOST_AT_ONCE = 16


class RewardModel:
    """A server with a reward model: SGLang's `/classify`.

    Of several texts (the steps of a branch, for a process reward model) the least reward counts. Whatever goes wrong costs that branch its reward and nothing else: counted, and logged once per kind. The time-out
    counts from `ask`, also while others are before it.
    """

    def __init__(self, url: str, timeout_s: float):
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        self.num_errors = 0
        self._asked: dict[Key, float] = {}  # when
        self._given: dict[Key, float | None] = {}
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._logged: set[str] = set()

    def ask(self, key: Key, make_texts: Callable[[], list[str]]) -> None:
        """Have texts (each of prompt and branch, 1 or more) rewarded; the result is among `given` within the time-out."""
        self._asked[key] = time.monotonic()
        try:
            texts = make_texts()
            if self._pool is None:
                self._pool = ThreadPoolExecutor(MOST_AT_ONCE, thread_name_prefix="dynasor-reward")
            self._pool.submit(self._run, key, texts)
        except Exception as error:  # of threads, of the tokenizer: this rank must not take another path than the others
            self._log(error)
            self._give(key, None)

    def given(self) -> Iterator[tuple[Key, float | None]]:
        """Rewards that have come, None for those that will not in time, until they are forgotten."""
        if not self._asked:
            return iter(())
        latest = time.monotonic() - self.timeout_s
        for key, asked in self._asked.items():  # in order of asking
            if asked > latest:
                break
            if key not in self._given:
                self._log(TimeoutError("no answer in time"))
                self._give(key, None)
        with self._lock:
            return iter(list(self._given.items()))

    def forget(self, key: Key) -> None:
        """The reward has been used, or is no longer wanted."""
        self._asked.pop(key, None)
        with self._lock:
            self._given.pop(key, None)

    def _give(self, key: Key, reward: float | None) -> None:
        with self._lock:
            if key in self._asked and key not in self._given:
                self.num_errors += reward is None
                self._given[key] = reward

    def _run(self, key: Key, texts: list[str]) -> None:
        if key not in self._asked:
            return
        reward = None
        try:
            reward = min(rewards_of(self._post(texts)))
        except Exception as error:
            self._log(error)
        self._give(key, reward)

    def _post(self, texts: list[str]) -> Any:
        request = urllib.request.Request(
            f"{self.url}/classify", json.dumps({"text": texts}).encode(), {"Content-Type": "application/json"}
        )
        try:
            with _opener.open(request, timeout=self.timeout_s) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise ValueError(f"{error}: {error.read(200).decode(errors='replace')}") from error

    def _log(self, error: Exception) -> None:
        kind = type(error).__name__
        if kind not in self._logged:
            self._logged.add(kind)
            logger.error(
                "dynasor: the reward model at --dynasor-reward-url=%s gave no reward (%s: %s); the branch votes without one. "
                "Check that it runs SGLang with a reward head and answers within --dynasor-reward-timeout-s=%g. Logged once",
                self.url, kind, error, self.timeout_s,
            )  # fmt: skip


def rewards_of(answer: Any) -> list[float]:
    """The rewards in [0, 1] that a `/classify` answer holds, one for each text.

    A scalar head's number x is 1 / (1 + exp(-x)); of two numbers, the logits of bad and good, the softmax of the second.

    Raises:
        ValueError: anything else.
    """
    answers = answer if isinstance(answer, list) else [answer]
    if not answers:
        raise ValueError("its answer is empty")
    return [_reward_of(one) for one in answers]


def _reward_of(answer: Any) -> float:
    numbers = answer.get("embedding") if isinstance(answer, dict) else None
    if isinstance(numbers, int | float):
        numbers = [numbers]
    if not isinstance(numbers, list) or not numbers or not all(isinstance(x, int | float) and x == x for x in numbers):
        raise ValueError(f"its answer has no numbers under 'embedding': {str(answer)[:200]}")
    if len(numbers) > 2:
        raise ValueError(
            f"its head gives {len(numbers)} numbers: {str(numbers)[:100]}; serve a model with one (a reward), or two (bad, good)"
        )
    return sigmoid(numbers[0] if len(numbers) == 1 else numbers[1] - numbers[0])


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), in [0, 1] for any x, infinite ones too."""
    return 1.0 / (1.0 + exp(-max(-700.0, min(700.0, x))))
