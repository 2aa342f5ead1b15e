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
    if not _is_first(backend, "_dynasor_warned"):
        return
    warnings.warn(
        f"{backend.name} does not run --scheduler dynasor: branches are counted by this process, with the same answers, and "
        "end a little later than they could",
        stacklevel=4,
    )


def abort_all(backend: Backend, rids: Iterable[str]) -> None:
    """End requests, each whatever becomes of the others. One that cannot be ended runs to its own end; the first is logged."""
    for rid in rids:
        try:
            backend.abort(rid)
        except Exception as error:
            if _is_first(backend, "_dynasor_abort_failed"):
                logger.warning(
                    "dynasor: request %s of %s was not ended (%s) and runs on, as others may; a server with an admin key wants it: "
                    "Endpoint(url, api_key=..., admin_api_key=...)",
                    rid, backend.name, error,
                )  # fmt: skip


def _is_first(backend: Any, flag: str) -> bool:
    """Whether nobody has asked for this flag of the backend before."""
    with _warning_lock:
        is_first = not getattr(backend, flag, False)
        setattr(backend, flag, True)
        return is_first
