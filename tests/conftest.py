"""The real engine for tests: SGLang on the tiny reasoner, started by fork after one import (3 s instead of 30)."""

from __future__ import annotations

import multiprocessing as mp
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from engines import ENGINE_ARGS

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def start_engine() -> Iterator[Callable[..., Any]]:
    """Start engines that live until the module's tests are done: `start_engine(scheduler="dynasor", ...)`."""
    import sglang as sgl

    real = mp.set_start_method
    engines: list[Any] = []

    def start(**kwargs: Any) -> Any:
        # SGLang asks for "spawn", for CUDA's sake; children forked from here need no second import.
        mp.set_start_method = lambda method, force=False: real("fork", force=True)
        try:
            engine = sgl.Engine(**{**ENGINE_ARGS, **kwargs})
        finally:
            mp.set_start_method = real
        engines.append(engine)
        return engine

    yield start
    for engine in engines:
        engine.shutdown()
