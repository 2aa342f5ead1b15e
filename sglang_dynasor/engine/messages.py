"""What our processes say to each other beside requests: types of their own on SGLang's channels, which nothing a client sends becomes."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers import tokenizer_control_mixin
from sglang.srt.managers.io_struct import BaseReq, hook_custom_types


class Told(BaseReq, kw_only=True):
    """From the first rank to all of a group, with SGLang's next broadcast (teller.py). No channel between processes decodes it."""

    what: str
    parts: tuple[Any, ...] = ()


class Ask(BaseReq, kw_only=True):
    """From the front process to every scheduler (control.py). SGLang broadcasts it, so that all ranks act on it in one iteration."""

    what: str
    arguments: dict[str, str | int | float | bool | None]


class Answer(BaseReq, kw_only=True):
    """What one scheduler answers."""

    found: dict[str, Any]


def register() -> None:
    """Let SGLang carry these in this process. Harmless where nobody sends one."""
    hook_custom_types(Ask, Answer)
    specs: list[Any] = tokenizer_control_mixin._COMMUNICATOR_SPECS
    if ("dynasor", Answer) not in specs:
        specs.append(("dynasor", Answer))


async def ask(tokenizer_manager: Any, what: str, **arguments: str | float | bool | None) -> list[dict[str, Any]]:
    """What each scheduler answers, by data-parallel rank."""
    tokenizer_manager.auto_create_handle_loop()
    answers = await tokenizer_manager.dynasor_communicator(Ask(what=what, arguments=arguments))
    return [answer.found for answer in answers]
