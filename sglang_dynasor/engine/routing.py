"""Data parallelism: the branches of a program that a client sends one by one land on one replica."""

from __future__ import annotations

import zlib
from typing import Any


def route_program(controller: Any, req: Any) -> None:
    """Choose the replica of a request that names a program, by the id alone; others go where SGLang sends them."""
    params = getattr(req, "sampling_params", None)
    custom = getattr(params, "custom_params", None)
    field = custom.get("dynasor") if isinstance(custom, dict) else None
    program = field.get("program") if isinstance(field, dict) else None
    if isinstance(program, str) and req.routed_dp_rank is None:
        ranks = sorted(controller._active_workers)
        req.routed_dp_rank = ranks[zlib.crc32(program.encode()) % len(ranks)]
