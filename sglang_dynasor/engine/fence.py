"""The one guard between SGLang and our code: what we raise is counted, logged once by kind, and SGLang goes on as stock does.

A fault may leave something half done: before the next step it is looked at (audit.py), and what is not true ends (aside.py). This
module and aside.py are what is left when the rest fails: they call nothing of ours without a guard.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

logger = logging.getLogger(__name__)

MOST_IN_A_ROW = 32  # faults of one kind without a program answered in between; then we step aside

Args = ParamSpec("Args")
Result = TypeVar("Result")


class Fence:
    """What fell back to stock behaviour in this process.

    Args:
        is_strict: let an exception fail the engine, for tests.
    """

    def __init__(self, is_strict: bool = False):
        self.begin(is_strict)

    def begin(self, is_strict: bool) -> None:
        """Count from nothing: a process that was forked has what the one before it counted."""
        self.is_strict = is_strict
        self.num = 0
        self.num_fresh_starts = 0  # faults that left something half done (aside.py)
        self.is_in_doubt = False  # since the last look something may have been left half done
        self.is_leaving = False  # every rank was told to step aside, before its next step
        self.is_aside = False
        self.orphans: dict[Any, None] = {}  # Reqs that SGLang still ends, of programs that are over for us
        # Of what was served before we stepped aside: the totals (observe/ledger.py), and who shows them (meter.py).
        self.totals: Any = None
        self.meter: Any = None
        self._in_a_row: dict[str, int] = {}  # faults, by kind
        self._is_over = False  # one of them came too often
        self._logged: set[str] = set()

    def fall_back(self, where: str, error: Exception, *, is_contained: bool = False) -> None:
        """Take note of an exception; the caller then does what stock SGLang would.

        Args:
            is_contained: one branch of one program is all that it costs: however often it comes, others are served.
        """
        self.num += 1
        if self.is_strict:
            raise error
        self.is_in_doubt = True
        kind = f"{where}: {type(error).__name__}"
        if not is_contained:
            self._in_a_row[kind] = num = self._in_a_row.get(kind, 0) + 1
            self._is_over |= num >= MOST_IN_A_ROW
        if kind not in self._logged:
            self._logged.add(kind)
            logger.error("dynasor fell back to stock behaviour (%s); logged once", kind, exc_info=error)

    def note_answer(self) -> None:
        """A program was answered as it should be: what failed before was not all that there is."""
        self._in_a_row.clear()

    @property
    def is_to_leave(self) -> bool:
        """Whether one kind of fault has come again and again: programs are better served by nobody."""
        return self._is_over and not self.is_aside


FENCE = Fence()  # of this process


def guarded(
    where: str, passes: type[Exception] | tuple[()] = ()
) -> Callable[[Callable[Args, Result]], Callable[Args, Result | None]]:
    """A function that returns None where ours raises, which to its caller says: go on as stock.

    Args:
        where: how the log calls it.
        passes: what is raised on purpose, and is for SGLang to see.
    """

    def guard(ours: Callable[Args, Result]) -> Callable[Args, Result | None]:
        @wraps(ours)
        def fenced(*args: Args.args, **kwargs: Args.kwargs) -> Result | None:
            try:
                return ours(*args, **kwargs)
            except passes:
                raise
            except Exception as error:
                FENCE.fall_back(where, error)
                return None

        return fenced

    return guard


class _Original:
    """SGLang's own function, as a hook around it is given it: what became of it."""

    __slots__ = ("error", "function", "is_done", "result")

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.is_done = False
        self.result: Any = None
        self.error: BaseException | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.is_done = True
        try:
            self.result = self.function(*args, **kwargs)
        except BaseException as error:
            self.error = error
            raise
        return self.result


def around(
    where: str, stock: Callable[..., Any] | None = None, passes: type[Exception] | tuple[()] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A hook around a function of SGLang's, which runs by itself where the hook raises; what it raises itself is not ours.

    Args:
        where: how the log calls it.
        stock: what is done instead, called as the hook is; None: the function itself, unless it has run.
        passes: what is raised on purpose, and is for SGLang to see.
    """

    def guard(ours: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(ours)
        def fenced(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            called = _Original(original)
            try:
                return ours(called, *args, **kwargs)
            except passes:
                raise
            except Exception as error:
                if called.error is None:
                    FENCE.fall_back(where, error)
            if called.error is not None:
                raise called.error
            if called.is_done:
                return called.result
            return original(*args, **kwargs) if stock is None else stock(original, *args, **kwargs)

        return fenced

    return guard


def override(
    method: Callable[..., Any], ours: Callable[..., Any], stock: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """A method for a subclass of one of SGLang's classes: ours around `method`, that of its base, behind the guard."""
    fenced = around(ours.__name__, stock)(ours)

    @wraps(method)
    def overriding(*args: Any, **kwargs: Any) -> Any:
        return fenced(method, *args, **kwargs)

    return overriding


def hook(kind: str, ours: Callable[..., Any], passes: type[Exception] | tuple[()] = ()) -> Callable[..., Any]:
    """Our function for a hook of SGLang's (`before`, `after`, `around`), behind the guard."""
    return around(ours.__name__, passes=passes)(ours) if kind == "around" else guarded(ours.__name__, passes)(ours)
