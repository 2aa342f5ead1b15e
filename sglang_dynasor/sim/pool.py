"""The KV pool and what it keeps: prompts that requests share, and what nobody uses any more."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(slots=True)
class _Prompt:
    num_tokens: int
    num_users: int


class Pool:
    """Tokens of KV: those of running requests, the prompts they share, and a cache of what was left, oldest first."""

    def __init__(self, num_tokens: int):
        self.num_tokens = num_tokens
        self.own = 0  # that one request alone uses: what it generated, and a prompt half computed
        self.shared = 0  # prompts in use, each counted once
        self.spare = 0  # used by nobody; given up when room is needed
        self.most_used = 0
        self._prompts: dict[Hashable, _Prompt] = {}  # in use
        self._spare: OrderedDict[Hashable, int] = OrderedDict()  # by when it was used last
        self._num_outputs = 0

    @property
    def available(self) -> int:
        """Tokens that a request could have: free ones and spare ones."""
        return self.num_tokens - self.own - self.shared

    @property
    def used(self) -> int:
        return self.own + self.shared

    def holds(self, prompt: Hashable) -> bool:
        """Whether a request would find this prompt."""
        return prompt in self._prompts or prompt in self._spare

    def hold(self, prompt: Hashable, num_tokens: int) -> None:
        """One request more uses a prompt, which is computed where it is not there."""
        if (held := self._prompts.get(prompt)) is not None:
            held.num_users += 1
            return
        self.spare -= self._spare.pop(prompt, 0)
        self._prompts[prompt] = _Prompt(num_tokens, 1)
        self.shared += num_tokens
        self._evict()

    def let_go(self, prompt: Hashable) -> None:
        """One request less uses it."""
        held = self._prompts[prompt]
        held.num_users -= 1
        if not held.num_users:
            del self._prompts[prompt]
            self.shared -= held.num_tokens
            self._keep(prompt, held.num_tokens)

    def take(self, num_tokens: int) -> None:
        """Tokens for one request alone."""
        self.own += num_tokens
        self._evict()

    def give_back(self, num_tokens: int, *, is_kept: bool) -> None:
        """The opposite of `take`. With `is_kept` they stay as long as there is room, though nobody will ask for them."""
        self.own -= num_tokens
        if is_kept and num_tokens:
            self._num_outputs += 1
            self._keep(("output", self._num_outputs), num_tokens)

    def touch(self, prompt: Hashable) -> None:
        """This prompt is used next: others are given up first."""
        if prompt in self._spare:
            self._spare.move_to_end(prompt)

    def _keep(self, what: Hashable, num_tokens: int) -> None:
        self._spare[what] = num_tokens
        self.spare += num_tokens
        self._evict()

    def _evict(self) -> None:
        self.most_used = max(self.most_used, self.used)
        while self.used + self.spare > self.num_tokens and self._spare:
            self.spare -= self._spare.popitem(last=False)[1]
