"""How much is read in one step: each finished branch costs the scheduler's loop some time, and all may end at once.

The work is counted in characters, the same on every rank: never by a clock.
"""

from __future__ import annotations

from sglang_dynasor.policy.found import TAIL_CHARS
from sglang_dynasor.policy.pattern import weight
from sglang_dynasor.policy.spec import ProgramSpec
from sglang_dynasor.policy.structured import READ_CHARS

STEP_CHARS = 12_288  # of one step, about 8 ms: two texts of a program of 64 branches, or one of JSON or code
TOKEN_CHARS = 4  # that a token is taken to have
VOTE_CHARS = 8  # that counting a vote is worth, for each branch of the program's cap


def reading_chars(spec: ProgramSpec, num_tokens: int) -> int:
    """What it is worth, in characters read, to read a text of `num_tokens` and to count its vote."""
    kind, _, rest = spec.answer.partition(":")
    num_chars = TOKEN_CHARS * num_tokens * (weight(rest) if kind == "regex" else 1)
    most_chars = READ_CHARS if kind in ("json", "tool_call", "code") else TAIL_CHARS
    return min(num_chars, most_chars) + VOTE_CHARS * spec.branches
