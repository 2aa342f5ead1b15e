"""What drivers and declared programs need of a backend: a server over HTTP, or an engine in this process."""

from __future__ import annotations

from typing import Any, Protocol


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

    def abort(self, rid: str) -> None:
        """End a request; it is answered with what it has."""
        ...
