"""What ties a generation of SGLang's frontend to a declared program: the one seam through which a field is sent."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any, Protocol

from sglang.lang.interpreter import StreamExecutor

from sglang_dynasor.errors import FieldError

POLL_S = 0.2
_SEAT = "_dynasor_seat"
_EXTRA = "_dynasor_extra"

_SPREAD = 0x9E3779B1  # 2^32 over the golden ratio: the samples of neighbouring seeds do not overlap

Said = tuple[str, dict[str, Any]]  # text and meta_info of one generation


class Seat(Protocol):
    """A branch's place in its program, told what its executor generates."""

    def start(self, executor: Any, sampling: Any) -> dict[str, Any] | None:
        """What to send with the generation that begins; None: nothing is to be generated any more. May wait.

        Raises:
            FieldError: the branch may not generate this.
        """
        ...

    def finish(self, text: str, meta_info: dict[str, Any]) -> None:
        """The generation has come to an end."""
        ...

    def fail(self, error: Exception) -> bool:
        """The generation has failed. Returns whether the branch goes on all the same, without its text."""
        ...


def check_seed(seed: Any) -> None:
    """Raise FieldError unless `seed` is a whole number or None."""
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise FieldError(f"seed={seed!r} is a {type(seed).__name__}; send a whole number, or none")


def sample_seed(seed: int | None, program_id: str, number: int) -> int:
    """The seed of a program's sample `number`, in [0, 2^31).

    Also without a seed of the author's: an engine that reads seeds gives all requests without one the same, and branches
    would all be equal.
    """
    base = int(program_id[:8], 16) if seed is None else seed
    return (base * _SPREAD + number) % 2**31


class Executor(StreamExecutor):
    """SGLang's executor, mended where branches need it (`mend`)."""

    def submit(self, expr: Any) -> None:
        """As SGLang's; one that has failed raises its error: nobody would ever do what it is asked."""
        raise_failure(self)
        super().submit(expr)

    def sync(self) -> None:
        """Wait for its work, or its failure: SGLang's own waits for ever for what was asked after that."""
        if self.use_thread:
            with self.queue.all_tasks_done:
                while self.queue.unfinished_tasks and not self.is_finished:
                    self.queue.all_tasks_done.wait(POLL_S)

    def end(self) -> None:
        """As SGLang's, safe in the garbage collector, which finds the executors of branches in reference cycles.

        SGLang asks the thread `is_alive`, which takes a lock that the collecting thread holds already if it is just being
        started (CPython 3.11, `_set_tstate_lock`): it would wait for itself for ever.
        """
        if self.use_thread and self.worker in threading.enumerate():  # under a lock that may be taken again
            self.queue.put(None)
        self.backend.end_program(self)


def mend(executor: Any) -> None:
    """Make an executor that SGLang has made one of ours."""
    if type(executor) is StreamExecutor:  # not one that only traces a program
        executor.__class__ = Executor


def raise_failure(executor: Any) -> None:
    """Raise what an executor has failed by, if it has."""
    if executor.error_ is not None:
        raise executor.error_


def let_go(executor: Any) -> None:
    """End an executor's thread once its work is done: else a branch that somebody keeps would keep the process alive.

    What is asked of the executor afterwards runs in the caller's thread.
    """
    if executor.use_thread:
        executor.sync()
        executor.end()
        executor.use_thread = False


def take_seat(executor: Any, seat: Seat) -> None:
    """Let what `executor` generates belong to a branch."""
    mend(executor)
    setattr(executor, _SEAT, seat)


def set_extra(executor: Any, extra: dict[str, Any] | None) -> None:
    """Send `extra` with the next generation of `executor` (None: no longer), as no branch."""
    setattr(executor, _EXTRA, extra)


def attach(executor: Any, data: dict[str, Any]) -> None:
    """Put what is to be sent into the payload of a request; nothing for a warm-up of the cache."""
    extra: dict[str, Any] | None = getattr(executor, _EXTRA, None)
    if extra is None or data["sampling_params"].get("max_new_tokens") == 0:
        return
    data.update({key: value for key, value in extra.items() if key != "sampling_params"})
    data["sampling_params"] = {**data["sampling_params"], **extra.get("sampling_params", {})}


def generate(executor: Any, sampling: Any, send: Callable[[], Said]) -> Said:
    """Generate by `send`, as the branch's seat allows; an empty text where the program no longer needs it."""
    seat: Seat | None = getattr(executor, _SEAT, None)
    if seat is None or getattr(executor, _EXTRA, None) is not None:
        return send()
    extra = seat.start(executor, sampling)
    if extra is None:
        return "", {}
    set_extra(executor, extra)
    try:
        text, meta_info = send()
    except Exception as error:
        if seat.fail(error):
            return "", {}
        raise
    finally:
        set_extra(executor, None)
    seat.finish(text, meta_info)
    return text, meta_info


def generate_stream(executor: Any, sampling: Any, send: Callable[[], Iterator[Said]]) -> Generator[Said, Any, None]:
    """As `generate`, in pieces."""
    seat: Seat | None = getattr(executor, _SEAT, None)
    if seat is None or getattr(executor, _EXTRA, None) is not None:
        yield from send()
        return
    extra = seat.start(executor, sampling)
    if extra is None:
        yield "", {}
        return
    set_extra(executor, extra)
    said, meta_info = "", {}
    try:
        for text, meta_info in send():
            said += text
            yield text, meta_info
    except Exception as error:
        if seat.fail(error):
            yield "", {}
            return
        raise
    finally:
        set_extra(executor, None)
    seat.finish(said, meta_info)
