"""The real engine for tests: SGLang on the tiny reasoner, started by fork after one import (3 s instead of 30)."""

from __future__ import annotations

import multiprocessing as mp
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from engines import ENGINE_ARGS

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@contextmanager
def engines() -> Iterator[Callable[..., Any]]:
    """Yield a function that starts engines, which live until the context ends."""
    import sglang as sgl

    real = mp.set_start_method
    started: list[Any] = []

    def start(**kwargs: Any) -> Any:
        # SGLang asks for "spawn", for CUDA's sake; children forked from here need no second import.
        mp.set_start_method = lambda method, force=False: real("fork", force=True)
        try:
            engine = sgl.Engine(**{**ENGINE_ARGS, **kwargs})
        finally:
            mp.set_start_method = real
        started.append(engine)
        return engine

    try:
        yield start
    finally:
        for engine in started:
            engine.shutdown()


@pytest.fixture
def start_engine() -> Iterator[Callable[..., Any]]:
    """Start engines for one test: `start_engine(scheduler="dynasor", ...)`."""
    with engines() as start:
        yield start


@pytest.fixture(scope="module")
def start_shared_engine() -> Iterator[Callable[..., Any]]:
    """Start engines for all tests of a module."""
    with engines() as start:
        yield start
