"""A run: every question is asked in every way, and what came back is kept whatever happens next."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from sglang_dynasor.bench.chat import Chat, GoneError, RefusedError
from sglang_dynasor.bench.questions import Question
from sglang_dynasor.bench.ways import Asking, Solved
from sglang_dynasor.errors import ConfigError

BLOCK_ROUNDS = 2  # questions of a block, for each that is under way at once
MOST_REFUSED = 3  # questions in a row that the server refuses, after which the run ends
TRIAL_TOKENS = 16


@dataclass(slots=True)
class Measured:
    """What has been measured so far."""

    ways: tuple[str, ...]
    solved: dict[str, dict[str, Solved]] = field(default_factory=dict[str, dict[str, Solved]])  # by question, by way
    questions: dict[str, Question] = field(default_factory=dict[str, Question])
    refused: dict[str, str] = field(default_factory=dict[str, str])  # by question: what the server said
    elapsed_s: float = 0.0
    ended: str = ""  # why it ended before its time and questions did

    def keep(self, question: Question, way: str, solved: Solved) -> None:
        self.questions[question.id] = question
        self.solved.setdefault(question.id, {})[way] = solved

    def shared(self) -> tuple[tuple[str, ...], list[str]]:
        """The ways that are compared, and the questions answered in all of them.

        Where no question was answered in all ways, those that have fewest are left out until one was.
        """
        asked = {id: by_way for id, by_way in self.solved.items() if id not in self.refused}
        num = Counter(way for by_way in asked.values() for way in by_way)
        ways = [way for way in self.ways if num[way]]
        while ways:
            both = [id for id, by_way in asked.items() if all(way in by_way for way in ways)]
            if both:
                return tuple(ways), both
            ways.remove(min(reversed(ways), key=lambda way: num[way]))
        return (), []


def blocks(questions: Sequence[Question], concurrency: int) -> list[Sequence[Question]]:
    """Questions that are asked in one way before they are asked in the next.

    One by one where one is under way at a time. Else several, so that what runs beside a question is asked in its way, too.
    """
    size = 1 if concurrency == 1 else BLOCK_ROUNDS * concurrency
    return [questions[first : first + size] for first in range(0, len(questions), size)]


async def check(chat: Chat, asking: Asking, question: Question, ways: Sequence[str]) -> None:
    """Ask one question in each way, shortly: it warms the server up, and what cannot work is found before the run.

    Raises:
        ConfigError: the server does not do it.
    """
    short = replace(asking, max_tokens=min(TRIAL_TOKENS, asking.max_tokens))
    for way in ways:
        try:
            short.read(way, question, await chat.ask(short.body(way, question)))
        except (GoneError, RefusedError) as error:
            raise ConfigError(f"the server does not answer {way!r}: {error}") from None


async def measure(
    measured: Measured,
    chat: Chat,
    asking: Asking,
    questions: Sequence[Question],
    limit_s: float,
    concurrency: int,
    tell: Callable[[], None],
    rest: Callable[[], None],
) -> None:
    """Ask until the questions or the time are used up, or the server is gone. What comes back is in `measured`.

    Ways take turns, block by block, and in turn which goes first. A block that would not be done in time is not begun. What is
    kept of a block in one way is all or nothing: those that came back first would be the short ones.

    Args:
        limit_s: seconds.
        concurrency: requests under way at once.
        tell: called after each answer.
        rest: called where no request is under way.
    """
    began_s = time.monotonic()
    try:
        async with asyncio.timeout(limit_s):
            for number, block in enumerate(blocks(questions, concurrency)):
                measured.elapsed_s = time.monotonic() - began_s
                if number and measured.elapsed_s * (number + 1) / number > limit_s:
                    return
                turn = number % len(measured.ways)
                for way in (*measured.ways[turn:], *measured.ways[:turn]):
                    await _ask_all(measured, chat, asking, way, block, concurrency, tell)
                    rest()
    except TimeoutError:
        pass  # with what there is
    except ExceptionGroup as group:  # of a task group: the first error ends the others
        error = group.exceptions[0]
        if not isinstance(error, GoneError | RefusedError | ConfigError):
            raise error from None
        measured.ended = f"the server {'is gone' if isinstance(error, GoneError) else 'refuses'}: {error}"
    finally:
        measured.elapsed_s = time.monotonic() - began_s


async def _ask_all(
    measured: Measured,
    chat: Chat,
    asking: Asking,
    way: str,
    block: Sequence[Question],
    concurrency: int,
    tell: Callable[[], None],
) -> None:
    room, found = asyncio.Semaphore(concurrency), list[tuple[Question, Solved]]()

    async def ask(question: Question) -> None:
        async with room:
            if question.id in measured.refused:
                return
            try:
                reply = await chat.ask(asking.body(way, question))
            except RefusedError as error:
                _refuse(measured, question, error)
                return
            found.append((question, asking.read(way, question, reply)))
            tell()

    async with asyncio.TaskGroup() as group:
        for question in block:
            group.create_task(ask(question))
    for question, solved in found:
        measured.keep(question, way, solved)


def _refuse(measured: Measured, question: Question, error: RefusedError) -> None:
    """Leave one question out, as its prompt may be too long; but not one after another."""
    if not error.is_about_one:
        raise error
    measured.refused[question.id] = str(error)
    if len(measured.refused) >= MOST_REFUSED and not any(id not in measured.refused for id in measured.solved):
        raise error
