"""Recorded samples of a model: what a branch would say and how long it would be."""

from __future__ import annotations

import gzip
import io
import json
import random
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, cast

from sglang_dynasor.errors import ConfigError

CHARS_PER_TOKEN = 4  # of prompts of which only the text was recorded


@dataclass(frozen=True, slots=True)
class Sample:
    """One recorded branch."""

    answer: str | None  # None: it gave none
    num_tokens: int
    is_correct: bool | None  # None: nobody knows


@dataclass(frozen=True, slots=True)
class Question:
    """A question with what a model said to it, in the order in which branches take it."""

    id: str
    prompt_tokens: int
    samples: tuple[Sample, ...]
    greedy: Sample | None = None  # where it was recorded

    def drawn(self, seed: str, cap: int) -> Question:
        """The same with `cap` of its samples in an order of its own: branches are exchangeable, their order means nothing.

        Raises:
            ConfigError: it has fewer.
        """
        if cap > len(self.samples):
            raise ConfigError(f"question {self.id} has {len(self.samples)} samples; --cap={cap} needs {cap} of each")
        # A seed that is a text is hashed by SHA-512: the same in every process.
        order = random.Random(f"{seed}:{self.id}").sample(range(len(self.samples)), cap)
        return replace(self, samples=tuple(self.samples[index] for index in order))


def read_samples(path: Path, dataset: str | None, prompt_tokens: int) -> list[Question]:
    """The questions of a file with one JSON object a line: `qid`, `samples` (each `answer`, `n_tokens`, `correct`), and
    where known `prompt_tokens` or `question`, `dataset`, `greedy` (a sample).

    Args:
        path: .jsonl, .jsonl.gz, or .jsonl.zst where the package zstandard is installed.
        dataset: only questions whose `dataset` or `model` contains this; None: all.
        prompt_tokens: of questions that do not say.

    Raises:
        ConfigError: the file cannot be read, a line is wrong, or no question is left; it names the line.
    """
    questions: list[Question] = []
    seen: set[str] = set()
    for number, row in _rows(path):
        if dataset is not None and not any(dataset in str(row.get(key, "")) for key in ("dataset", "model")):
            continue
        question = _question(row, prompt_tokens, f"{path}, line {number}")
        if question.id in seen:  # another run's
            question = replace(question, id=f"{question.id}@{number}")
        seen.add(question.id)
        questions.append(question)
    if not questions:
        wanted = "questions" if dataset is None else f"questions whose dataset or model contains {dataset!r}"
        raise ConfigError(f"{path} has no {wanted}; choose another file or --dataset")
    return questions


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _object(line, f"{path}, line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def _object(line: str, place: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{place}, column {error.colno} is no JSON: {error.msg}; write one object a line") from None
    if not isinstance(row, dict):
        raise ConfigError(f"{place} is no JSON object; write one object a line")
    return cast("dict[str, Any]", row)


@contextmanager
def _opened(path: Path) -> Generator[IO[str]]:
    if path.suffix == ".zst":
        try:
            from zstandard import ZstdDecompressor
        except ImportError:
            raise ConfigError(f"{path} needs the package zstandard; pip install zstandard, or give the file unpacked") from None  # fmt: skip
        with path.open("rb") as raw, ZstdDecompressor().stream_reader(raw) as stream:
            yield io.TextIOWrapper(cast("IO[bytes]", stream), encoding="utf-8")
    else:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            yield cast("IO[str]", file)


def _question(row: Mapping[str, Any], prompt_tokens: int, place: str) -> Question:
    samples = row.get("samples")
    if not isinstance(samples, list) or not samples:
        raise ConfigError(f"{place}: no samples; give a list of at least one under `samples`")
    drawn = cast("list[Any]", samples)
    greedy = row.get("greedy")
    said = row.get("prompt_tokens")
    if not isinstance(said, int):
        first: Any = drawn[0]
        text = row.get("question")
        said = first.get("in_tokens") if isinstance(first, dict) else None  # pyright: ignore[reportUnknownVariableType]
        if not isinstance(said, int):
            said = len(text) // CHARS_PER_TOKEN if isinstance(text, str) else prompt_tokens
    return Question(
        str(row.get("qid", place)),
        max(1, said),
        tuple(_sample(sample, f"{place}, sample {index}") for index, sample in enumerate(drawn)),
        None if greedy is None else _sample(greedy, f"{place}, greedy"),
    )


def _sample(sample: Any, place: str) -> Sample:
    if not isinstance(sample, dict):
        raise ConfigError(f"{place} is no object; give answer, n_tokens and correct")
    given = cast("dict[str, Any]", sample)
    answer, tokens, correct = given.get("answer"), given.get("n_tokens"), given.get("correct")
    if isinstance(tokens, bool) or not isinstance(tokens, int | float) or not 1 <= tokens < 10**9:
        raise ConfigError(f"{place}: n_tokens={tokens!r} is no number of tokens; give 1 or more")
    return Sample(None if answer is None else str(answer), round(tokens), None if correct is None else bool(correct))
