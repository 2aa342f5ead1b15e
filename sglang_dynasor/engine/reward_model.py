"""Rewards from a reward model that another server runs, asked for over HTTP beside the scheduler's loop."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from math import exp
from typing import Any

from sglang_dynasor.engine.beside import Beside, Key
from sglang_dynasor.engine.fence import guarded

# The operator's own server: never through a proxy that the environment names.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class RewardModel(Beside[float]):
    """A server with a reward model: SGLang's `/classify`.

    Of several texts (the steps of a branch, for a process reward model) the least reward counts. Without its word in time a branch
    goes on without a reward.
    """

    def __init__(self, url: str, timeout_s: float):
        self.url = url.rstrip("/")
        self.lost: dict[Key, None] = {}  # that could not be asked about: told as no reward
        super().__init__(
            timeout_s,
            "reward",
            f"the reward model at --dynasor-reward-url={self.url} gave no reward",
            "the branch votes without one. Check that it runs SGLang with a reward head and answers within "
            f"--dynasor-reward-timeout-s={timeout_s:g}",
        )

    @guarded("ask_about")  # on the first rank only: the others go on, and so does it
    def ask_about(self, key: Key, make_texts: Callable[[], list[str]]) -> bool:
        """Have texts (each of prompt and branch, 1 or more) rewarded; the result is among `given` within the time-out.

        Returns:
            True; anything else means that it was not asked about.
        """
        self.ask(key, lambda: partial(self._reward, make_texts()))
        return True

    def given(self) -> Iterator[tuple[Key, float | None]]:
        return chain(((key, None) for key in self.lost), super().given())

    def forget(self, key: Key) -> None:
        self.lost.pop(key, None)
        super().forget(key)

    def _reward(self, texts: list[str]) -> float:
        return min(rewards_of(post(f"{self.url}/classify", {"text": texts}, self.timeout_s)))


def post(url: str, body: dict[str, Any], timeout_s: float) -> Any:
    """What a server of the operator's answers, as JSON.

    Raises:
        ValueError: an HTTP error, or no JSON.
        OSError: no answer.
    """
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with _opener.open(request, timeout=timeout_s) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise ValueError(f"{error}: {error.read(200).decode(errors='replace')}") from error


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
