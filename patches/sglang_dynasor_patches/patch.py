"""What a patch is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Where a patch is needed. "flag": the process that reads the command line, whatever SGLang it meets.
Role = Literal["flag", "main", "scheduler", "router"]


@dataclass(frozen=True, slots=True)
class Patch:
    """One hook on one function of SGLang."""

    target: str  # dotted path in SGLang
    kind: Literal["before", "after", "around"]
    params: tuple[str, ...]  # the target's parameter names, in order
    hook: str  # dotted path of our function
    role: Role
    why: str
    remove_when: str  # what SGLang would have to offer
    is_fenced: bool = True  # what it raises does not reach SGLang; False: it runs at the start, which must stop then
