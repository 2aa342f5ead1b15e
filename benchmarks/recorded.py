"""Recorded samples of real models, in sets. They are not part of this repository: DIR is a folder with the traces.

A set has one question per line with its samples' answers, tokens and whether they are right. A sample without an answer
abstains: it costs tokens and casts no vote.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import zstandard

from sglang_dynasor.policy.equal import answer_key


class Sample(NamedTuple):
    key: str | None  # None: an abstention
    num_tokens: int
    is_correct: bool


class Question(NamedTuple):
    id: str  # the same for runs of several models on one question
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True)
class Recorded:
    """One set of questions. `has_lengths`: whether tokens are those of each sample, so that it is known which ends first."""

    name: str
    questions: list[Question]
    caps: tuple[int, ...]
    has_lengths: bool = True

    @property
    def mean_tokens(self) -> float:
        return mean(sample.num_tokens for question in self.questions for sample in question.samples)


def read_questions(path: Path) -> Iterator[dict[str, Any]]:
    """The questions of a trace."""
    with path.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
        for line in io.TextIOWrapper(stream, encoding="utf-8"):
            yield json.loads(line)


def question_of(raw: dict[str, Any]) -> Question:
    """A question with its samples; equal answers are right together, as most of them are labelled."""
    keys = [
        None if sample["answer"] is None else answer_key(str(sample["answer"]), "math", "last_line")
        for sample in raw["samples"]
    ]
    labels: dict[str | None, list[bool]] = {}
    for key, sample in zip(keys, raw["samples"], strict=True):
        labels.setdefault(key, []).append(bool(sample["correct"]))
    is_right = {key: key is not None and 2 * sum(said) > len(said) for key, said in labels.items()}
    samples = (
        Sample(key, int(sample["n_tokens"] or 1), is_right[key])
        for key, sample in zip(keys, raw["samples"], strict=True)
    )
    return Question(str(raw["qid"]), tuple(samples))


# Name, file, which of its questions, caps, and whether tokens are those of each sample.
SETS: list[tuple[str, str, Callable[[dict[str, Any]], bool], tuple[int, ...], bool]] = [
    ("MATH-500, R1-Llama-8B x32", "math500_r1_llama8b", lambda q: q["dataset"].endswith("v2sys_x32"), (16, 32), True),
    ("MATH-500, R1-Llama-8B x16", "math500_r1_llama8b", lambda q: q["dataset"].endswith("_x16"), (16,), True),
    ("MATH, AMC, AIME, R1-Qwen-7B x8", "r1_qwen7b_x8", lambda q: True, (8,), False),
    ("MATH-100, Qwen2.5-Math x8", "qwen25math_math100_rm", lambda q: True, (8,), True),
    ("MMLU-Pro, GPQA, Gemma-12B x10", "gemma4_12b_seeds10", lambda q: True, (10,), True),
    ("GPQA-diamond, strong models x8", "gpqa_diamond_dev", lambda q: q["n_tokens_kind"].startswith("api_usage"), (8,), True),
    ("GPQA-diamond, older models x8", "gpqa_diamond_dev", lambda q: q["n_tokens_kind"].startswith("chars") and len(q["samples"]) < 16, (8,), True),
    ("GPQA-diamond, Claude-2 x16", "gpqa_diamond_dev", lambda q: q["n_tokens_kind"].startswith("chars") and len(q["samples"]) == 16, (16,), True),
    ("GPQA-diamond, GPT-3.5 x16", "gpqa_diamond_dev", lambda q: q["n_tokens_kind"] == "none", (16,), False),
    ("last letters, GPT-3.5 x40", "esc_last_letters_gpt35", lambda q: True, (16, 40), True),
    ("dates, GPT-3.5 x10", "verifycot_date_gpt35", lambda q: True, (10,), True),
    ("game of 24, GPT-4 x100", "tot_gpt4_samples", lambda q: "game24" in q["dataset"], (16, 100), True),
]  # fmt: skip


def read_sets(traces: Path) -> Iterator[Recorded]:
    """The sets whose file is in the folder.

    Raises:
        ValueError: the folder has none of them.
    """
    found = [made for made in SETS if (traces / f"{made[1]}.jsonl.zst").exists()]
    if not found:
        raise ValueError(f"--traces={str(traces)!r} has no recorded samples; name a folder with NAME.jsonl.zst files")
    for name, file, is_in, caps, has_lengths in found:
        questions = [question_of(q) for q in read_questions(traces / f"{file}.jsonl.zst") if is_in(q)]
        yield Recorded(name, questions, caps, has_lengths)
