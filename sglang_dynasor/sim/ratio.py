"""How much of its limit a request is thought to generate: SGLang's NewTokenRatioTracker."""

from __future__ import annotations

FIRST = 0.7
LEAST = FIRST * 0.14
DECAY = (FIRST - LEAST) / 600
RETRACT_STEPS = 20  # that those left should have before the next retraction


class TokenRatio:
    """Falls with each decode step; is learned anew when requests were retracted; begins anew when the engine is idle."""

    def __init__(self) -> None:
        self.value = FIRST

    def reset(self) -> None:
        self.value = FIRST

    def decay(self) -> None:
        """One decode step went well."""
        self.value = max(self.value - DECAY, LEAST)

    def learn(self, num_generated: int, num_rows: int, max_new_tokens: int) -> None:
        """Requests were retracted, and those left have generated so much together."""
        self.value = min(1.0, (num_generated + RETRACT_STEPS * num_rows) / (max_new_tokens * num_rows + 1))
