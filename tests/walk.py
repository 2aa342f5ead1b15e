"""Every function of ours that SGLang reaches, found by watching, and each made to raise in a running engine."""

from __future__ import annotations

import builtins
import gc
import inspect
import multiprocessing as mp
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

PACKAGES = ("sglang_dynasor.engine", "sglang_dynasor.policy")
# The guard itself, and what it does when all else has failed.
GUARD = {"sglang_dynasor.engine.fence", "sglang_dynasor.engine.aside"}
Name = tuple[str, str]  # of a function: its module, and what it is called there


class Injected(Exception):
    """What a function raises that was told to."""


def functions() -> dict[CodeType, FunctionType]:
    """The functions and methods of our modules, also behind decorators, by their code."""
    found: dict[CodeType, FunctionType] = {}

    def add(value: Any, module: str) -> None:
        while not isinstance(value, FunctionType) or hasattr(value, "__wrapped__"):
            match value:
                case property():
                    value = value.fget
                case cached_property():
                    value = value.func
                case _ if hasattr(value, "__wrapped__"):
                    value = value.__wrapped__
                case _ if hasattr(value, "__func__"):
                    value = value.__func__
                case _:
                    return
        if value.__module__ == module:
            found[value.__code__] = value

    for name, module in list(sys.modules.items()):
        if not name.startswith(PACKAGES) or name in GUARD or not isinstance(module, ModuleType):
            continue
        for value in list(vars(module).values()):
            add(value, name)
            if inspect.isclass(value) and value.__module__ == name:
                for method in list(vars(value).values()):
                    add(method, name)
    for value in gc.get_objects():  # those made by others, such as the methods of a subclass of SGLang's streamer
        if isinstance(value, FunctionType) and "<locals>" in value.__qualname__ and not hasattr(value, "__wrapped__"):
            module = value.__module__ or ""
            if module.startswith(PACKAGES) and module not in GUARD and value.__name__ != "<lambda>":
                found[value.__code__] = value
    return found


def name_of(function: FunctionType) -> Name:
    return function.__module__, function.__qualname__


class Faults:
    """Raises in one function at a time, of this process."""

    def __init__(self) -> None:
        self.functions = {name_of(function): function for function in functions().values()}
        self.num = 0  # times that the one raised
        self._undo: Callable[[], None] | None = None
        self._unseen: dict[Name, CodeType] = {}

    def watch(self) -> None:
        """Note from here on which functions run: each tells it the first time, and is as it was from then on."""
        self._unseen = {name: function.__code__ for name, function in self.functions.items()}

        def note(name: Name, args: Any, kwargs: Any) -> Any:
            function = self.functions[name]
            if (code := self._unseen.pop(name, None)) is not None:
                function.__code__ = code
            return function(*args, **kwargs)

        builtins.note = note  # type: ignore[attr-defined]
        for name, function in self.functions.items():
            consts = tuple(name if const == "name" else const for const in _noting.__code__.co_consts)
            function.__code__ = _noting.__code__.replace(co_consts=consts, co_freevars=function.__code__.co_freevars)

    def seen(self) -> list[Name]:
        """Those that ran since."""
        seen = sorted(self.functions.keys() - self._unseen.keys())
        for name, code in self._unseen.items():
            self.functions[name].__code__ = code
        return seen

    def arm(self, name: Name, *, always: bool) -> None:
        """Let the function raise, the next time or each time. Whoever holds it, holds it with this code."""
        function = self.functions[name]
        code, self.num = function.__code__, 0

        def undo() -> None:
            function.__code__ = code

        def strike() -> None:
            self.num += 1
            if not always:
                undo()
            raise Injected(".".join(name))

        builtins.strike = strike  # type: ignore[attr-defined]
        self._undo = undo
        function.__code__ = _striking.__code__.replace(co_freevars=code.co_freevars)

    def disarm(self) -> int:
        """Let it be as it was. Returns how often it raised."""
        if self._undo is not None:
            self._undo()
        return self.num


def _noting(*args: Any, **kwargs: Any) -> Any:
    return note("name", args, kwargs)  # type: ignore[name-defined]  # noqa: F821


def _striking(*args: Any, **kwargs: Any) -> Any:
    strike()  # type: ignore[name-defined]  # noqa: F821


class Remote:
    """The faults of an engine's scheduler, told from here between two of its steps."""

    def __init__(self, here: Any):
        self.num = 0
        self._here = here

    def __call__(self, what: str, *args: Any, **kwargs: Any) -> Any:
        self._here.send((what, args, kwargs))
        if not self._here.poll(120):
            raise AssertionError(f"the scheduler does not answer: {what} {args}")
        self.num = self._here.recv()
        return self.num


@contextmanager
def remote(monkeypatch: pytest.MonkeyPatch) -> Iterator[Remote]:
    """The faults of the engine that is started next: its scheduler forks from here."""
    from sglang.srt.managers.scheduler import Scheduler

    here, there = mp.Pipe()
    ingest, faults = Scheduler.ingest_requests, list[Faults]()

    def ingest_and_hear(self: Scheduler, *args: Any, **kwargs: Any) -> Any:
        while there.poll():
            if not faults:
                faults.append(Faults())
            what, given, named = there.recv()
            do = globals().get(what)
            there.send(do(self) if do is not None else getattr(faults[0], what)(*given, **named))
        return ingest(self, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "ingest_requests", ingest_and_hear)
    yield Remote(here)


# What a scheduler is asked besides


def renew(scheduler: Any) -> int:
    """Let a scheduler that has stepped aside serve programs again. Returns whether it had."""
    from sglang_dynasor.engine.controller import Controller
    from sglang_dynasor.engine.fence import FENCE
    from sglang_dynasor.engine.flag import config_of

    was_aside = FENCE.is_aside
    FENCE._is_over = FENCE.is_aside = False
    FENCE._in_a_row.clear()
    if was_aside:
        controller = Controller(scheduler, config_of(scheduler.server_args), FENCE)
        controller.ends.emit = scheduler.emit_of_tests
        scheduler._dynasor = scheduler.policy._dynasor = controller
        scheduler.tp_worker.model_runner.sampling_observer = controller.observer
    else:
        scheduler.emit_of_tests = scheduler._dynasor.ends.emit
    return was_aside


def audit(scheduler: Any) -> list[str]:
    """What is wrong between these two steps."""
    from sglang_dynasor.engine import aside
    from sglang_dynasor.engine import audit as looked

    return list(looked.wrong(scheduler._dynasor, aside.held_by_sglang(scheduler, scheduler.running_batch)))
