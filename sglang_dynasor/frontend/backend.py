"""What drivers and declared programs need of a backend: a server over HTTP, or an engine in this process."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

logger = logging.getLogger(__name__)
_warning_lock = threading.Lock()


class Backend(Protocol):
    """Thread-safe."""

    @property
    def has_scheduler(self) -> bool:
        """Whether our scheduler runs there; else it is plain SGLang."""
        ...

    @property
    def name(self) -> str:
        """For messages."""
        ...

    def post(self, data: dict[str, Any]) -> dict[str, Any] | None:
        """What SGLang's `/generate` answers to one request, with `text` and `meta_info`; None where the server gave it up.

        Raises:
            FieldError: the `dynasor` field is wrong.
            RefusedError: anything else about the request is.
        """
        ...

    def tokenize(self, text: str) -> list[int]:
        """Token ids of `text`, none added."""
        ...

    def render(self, messages: Sequence[Mapping[str, object]]) -> str:
        """A chat as the model reads it, without the tokens that its tokenizer adds to every prompt.

        Raises:
            RefusedError: the model has no chat template, or its template takes no such chat.
        """
        ...

    def abort(self, rid: str) -> None:
        """End a request; it is answered with what it has."""
        ...


def warn_once(backend: Any) -> None:
    """Tell the author, once per backend, that it does not run our scheduler."""
    with _warning_lock:
        if getattr(backend, "_dynasor_warned", False):
            return
        backend._dynasor_warned = True
    warnings.warn(
        f"{backend.name} does not run --scheduler dynasor: branches are counted by this process, with the same answers, and "
        "end a little later than they could",
        stacklevel=4,
    )


def abort_all(backend: Backend, rids: Iterable[str]) -> None:
    """End requests, each whatever becomes of the others. One that cannot be ended runs to its own end, which is logged."""
    for rid in rids:
        try:
            backend.abort(rid)
        except Exception as error:
            logger.warning("dynasor: request %s of %s was not ended (%s) and runs on", rid, backend.name, error)
