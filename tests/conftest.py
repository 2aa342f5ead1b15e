"""The real engine for tests: SGLang on the tiny reasoner."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from engines import ENGINE_ARGS
from forked import forked_engine


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
