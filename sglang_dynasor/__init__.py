"""Reasoning programs as first-class citizens of SGLang's scheduler."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang_dynasor.offline import solve

__version__ = "0.1.0"
__all__ = ["__version__", "solve"]


def __getattr__(name: str) -> Any:
    """`solve`, imported when it is first asked for: every process of the engine imports this package."""
    if name == "solve":
        from sglang_dynasor.offline import solve

        return solve
    raise AttributeError(f"module 'sglang_dynasor' has no attribute {name!r}")
