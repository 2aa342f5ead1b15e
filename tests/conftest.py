"""The real engine for tests: SGLang on the tiny reasoner."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from engines import ENGINE_ARGS
from forked import forked_engine
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported; more threads decode many times slower

# A stall of a shared machine is no failure, and the same cases run everywhere.
settings.register_profile("shared", deadline=None, derandomize=True)
settings.load_profile("shared")


@contextmanager
def engines() -> Iterator[Callable[..., Any]]:
    """Yield a function that starts engines, which live until the context ends."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(forked_engine(**{**ENGINE_ARGS, **options}))


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
