"""The real engine for tests: SGLang on the tiny reasoner."""

from __future__ import annotations

import gc
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from functools import cache
from pathlib import PurePath
from typing import Any

import pytest
import zmq
from engines import ENGINE_ARGS, assert_nothing_left
from forked import forked_engine, processes
from hypothesis import settings

from sglang_dynasor import symbolic

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported; more threads decode many times slower

# SGLang leaves its contexts to the garbage collector. Terminated there, one waits for ever where a socket with something unsent goes in the
# same collection.
zmq.Context.__del__ = lambda self: None

# A stall of a shared machine is no failure, and the same cases run everywhere.
symbolic.PAIR_S, symbolic.START_S = 60.0, 240.0  # also in engines that fork from here
settings.register_profile("shared", deadline=None, derandomize=True)
settings.register_profile("deep", settings.get_profile("shared"), max_examples=10_000)
settings.load_profile("shared")


@cache
def import_sglang() -> None:
    """Once, and what it made is left out of garbage collections, which would look through it and copy its memory."""
    import sglang  # noqa: F401

    gc.collect()
    gc.freeze()


def new_engine(options: dict[str, Any]) -> AbstractContextManager[Any]:
    """An engine of its own while the context lasts."""
    import_sglang()
    return forked_engine(**{**ENGINE_ARGS, **options})


# The modules that need `warm.py`'s Python or a server of their own: one test process makes these for all of them.
TOGETHER = {"test_examples", "test_fault_matrix", "test_http", "test_metrics", "test_patches", "test_router"}
WHOLE = {"test_control"}  # modules with a server of their own: each goes to one test process


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each test goes to the test process that is free, but for those of `TOGETHER`, which one gets whole and first, and of `WHOLE`.

    xdist's own groups do not work with pytest 9.2, which lets no plugin change a test's id.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module = PurePath(nodeid.split("::")[0]).stem
            return "together" if module in TOGETHER else module if module in WHOLE else nodeid

    return Scheduling(config, log)


class EnginePool:
    """Engines that live as long as the run, one for each set of options, started when first asked for.

    An idle scheduler polls at the cost of a whole core, so those that no test uses are stopped by a signal.
    """

    def __init__(self) -> None:
        self._engines: dict[str, tuple[Any, ExitStack]] = {}

    def take(self, options: dict[str, Any]) -> Any:
        """The engine with these options, running, with empty caches."""
        key = json.dumps(options, sort_keys=True)
        if key in self._engines:
            engine, _ = self._engines[key]
            _signal(engine, signal.SIGCONT)
            _publish(engine)
        else:
            stack = ExitStack()
            engine = stack.enter_context(new_engine(options))
            self._engines[key] = engine, stack
        return engine

    def give_back(self, engine: Any) -> None:
        """Stop it until it is asked for again. An engine in which something is left is ended instead.

        Raises:
            AssertionError: something is left.
        """
        try:
            assert_nothing_left(engine)
        except BaseException:
            key, stack = next((key, stack) for key, (one, stack) in self._engines.items() if one is engine)
            del self._engines[key]
            stack.close()
            raise
        _signal(engine, signal.SIGSTOP)

    def close(self) -> None:
        for _, stack in self._engines.values():
            stack.close()
        self._engines.clear()


def _signal(engine: Any, number: signal.Signals) -> None:
    for process in processes(engine):
        os.kill(process.pid, number)


def _publish(engine: Any) -> None:
    """SGLang keeps the options of the last engine started where all of the process read them: make them this one's."""
    from sglang.srt.runtime_context import get_context

    get_context().set_server_args(engine.server_args)


@pytest.fixture(scope="session")
def engine_pool() -> Iterator[EnginePool]:
    pool = EnginePool()
    yield pool
    pool.close()


@pytest.fixture
def shared_engine(engine_pool: EnginePool) -> Iterator[Callable[..., Any]]:
    """The run's engine with these options: `shared_engine(scheduler="dynasor", ...)`. Nothing may be left in it afterwards."""
    taken: list[Any] = []

    def take(**options: Any) -> Any:
        engine = engine_pool.take(options)
        if engine not in taken:
            taken.append(engine)
        return engine

    yield take
    with ExitStack() as stack:
        for engine in taken:
            stack.callback(engine_pool.give_back, engine)


@pytest.fixture
def start_engine() -> Iterator[Callable[..., Any]]:
    """Start engines of a test's own, patched as this process is now, one after the other: a start ends the one before."""
    with ExitStack() as stack:

        def start(**options: Any) -> Any:
            stack.close()
            return stack.enter_context(new_engine(options))

        yield start
