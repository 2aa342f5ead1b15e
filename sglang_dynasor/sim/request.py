"""A request in the modelled engine, whose it is, and how large the engine is."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol

from sglang_dynasor.errors import ConfigError
from sglang_dynasor.policy.admission import Gang


@dataclass(frozen=True, slots=True)
class Size:
    """What an engine was given."""

    rows: int = 64  # --max-running-requests
    pool_tokens: int = 131_072  # --max-total-tokens
    pass_tokens: int = 8192  # --chunked-prefill-size
    max_new_tokens: int = 32_768  # that each request allows

    def __post_init__(self) -> None:
        for name, least in (("rows", 1), ("pool_tokens", 2), ("pass_tokens", 1), ("max_new_tokens", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} is below {least}; choose {least} or more")


class Owner(Protocol):
    """Whose a request is."""

    def has_output(self, request: Request) -> None:
        """Its prompt has been computed, and it goes on."""
        ...

    def has_ended(self, request: Request) -> None:
        """It has left the engine: by itself, or a step after it was told to."""
        ...


@dataclass(slots=True, eq=False)
class Request:
    """One request: a branch, or a client's sample."""

    prompt: Hashable
    prompt_tokens: int
    length: int  # tokens that it generates if nobody ends it; 0: it only computes its prompt
    index: int  # of the sample
    owner: Owner
    gang: Gang | None = None  # of a program's branch
    number: int = 0  # of the program, by arrival; 0: a plain request
    arrival: int = 0  # of a plain request, as admission counts them
    charged_tokens: int = 0  # service charged for it so far
    is_running: bool = False
    is_over: bool = False
    is_ending: bool = False  # its last token is there, or it was told to end; a step may still carry it
    # What follows is of the moment when it began to run; `Engine.generated` and `Engine.own_tokens` say what is now.
    done: int = 0
    own: int = 0
    since: int = 0  # decode steps of the engine
    computed: int = 0  # tokens of a prompt half computed
    holds_prompt: bool = False
    turn: int = 0  # of its newest entry among the ends; older ones are void
