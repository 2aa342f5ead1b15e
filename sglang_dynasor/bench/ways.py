"""The ways in which a question is asked, and what is read of what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sglang_dynasor.bench.chat import Choice, Reply
from sglang_dynasor.bench.questions import Question
from sglang_dynasor.errors import ConfigError
from sglang_dynasor.policy.answers import THINK_ENDS, THINK_STARTS, read_answer
from sglang_dynasor.policy.branch import Ending
from sglang_dynasor.policy.equal import answer_key
from sglang_dynasor.policy.program import Program
from sglang_dynasor.policy.spec import ProgramSpec, parse_field

MOST_BRANCHES = 256
MARKED = "Think step by step, and put the final answer in \\boxed{}."
LETTERED = "Think step by step, and end with the letter of the right choice in \\boxed{}."
GREEDY, STOCK = "greedy", "stock"


@dataclass(frozen=True, slots=True)
class Asking:
    """What all questions of a run have in common."""

    cap: int = 16  # samples of stock, and the programs' cap
    stops: tuple[str, ...] = ()  # of the programs
    temperature: float = 0.8
    max_tokens: int = 4096
    answer: str | None = None  # an extractor; None: `choice` where there are choices, else `auto`
    instruction: str | None = None  # None: MARKED, or LETTERED where there are choices

    def extractor(self, question: Question) -> str:
        return self.answer or ("choice" if question.choices else "auto")

    def gold_key(self, question: Question) -> str | None:
        """The right answer as votes are counted; None: not known."""
        return None if question.gold is None else answer_key(question.gold, "math", self.extractor(question))

    def spec(self, question: Question, stop: str) -> ProgramSpec:
        """The program that is asked for, or replayed.

        Raises:
            FieldError: there is no such rule or extractor.
        """
        field = {"branches": self.cap, "stop": stop, "answer": self.extractor(question)}
        return parse_field(field, MOST_BRANCHES)

    def body(self, way: str, question: Question) -> dict[str, Any]:
        """The request. A way is `GREEDY`, `STOCK`, or the rule by which a program stops."""
        told = self.instruction if self.instruction is not None else LETTERED if question.choices else MARKED
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": question.prompt(told)}],
            "max_tokens": self.max_tokens,
            "temperature": 0.0 if way == GREEDY else self.temperature,
        }
        if way == STOCK:
            body["n"] = self.cap
        elif way != GREEDY:
            field = {"branches": self.cap, "stop": way, "answer": self.extractor(question)}
            body["custom_params"] = {"dynasor": field}
        return body

    def read(self, way: str, question: Question, reply: Reply) -> Solved:
        """What came of it.

        Raises:
            ConfigError: other choices came back than were asked for, or no record of a program.
        """
        wanted = self.cap if way == STOCK else 1
        if len(reply.choices) != wanted:
            raise ConfigError(
                f"the server returned {len(reply.choices)} of {wanted} choices: its chat endpoint has no `n`, with which stock "
                "sampling is measured"
            )
        extractor = self.extractor(question)
        if way not in (GREEDY, STOCK):
            return _read_record(reply, extractor)
        samples = read_samples(reply.choices, extractor)
        voted = vote(samples, self.spec(question, "never")) if way == STOCK else samples[0].key
        return Solved(
            (voted,),
            float(reply.num_tokens),
            reply.latency_s,
            float(wanted),
            reply.num_requests,
            samples,
            reply.is_estimated,
        )


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample, as a vote counts it."""

    answer: str | None  # as written; None: it abstains
    key: str | None  # as counted
    num_tokens: int
    is_cut: bool = False


@dataclass(frozen=True, slots=True)
class Solved:
    """What one way made of one question."""

    keys: tuple[str | None, ...]  # of its answer; of a replay, in each of several orders of the samples
    num_tokens: float
    latency_s: float | None  # None: not known
    num_branches: float
    num_requests: int = 1
    samples: tuple[Sample, ...] = ()
    is_estimated: bool = False  # the tokens of each sample

    def share(self, key: str | None) -> float:
        """How often its answer is this one."""
        return self.keys.count(key) / len(self.keys)


def read_samples(choices: Sequence[Choice], extractor: str) -> tuple[Sample, ...]:
    """What these texts answer. Where a thought is closed that none of them opened, the chat template did: it opens all of them."""
    opens = any(
        any(end in choice.text for end in THINK_ENDS) and not any(start in choice.text for start in THINK_STARTS)
        for choice in choices
    )
    lead = THINK_STARTS[0] if opens else ""
    return tuple(_sample(choice, lead, extractor) for choice in choices)


def _sample(choice: Choice, lead: str, extractor: str) -> Sample:
    answer = read_answer(lead, choice.text, extractor, is_cut=choice.is_cut)
    key = None if answer is None else answer_key(answer, "math", extractor)
    return Sample(answer, key, choice.num_tokens, choice.is_cut)


def vote(samples: Sequence[Sample], spec: ProgramSpec) -> str | None:
    """The answer that most give, as a program that hears all of them decides it."""
    program = Program("vote", spec)
    for _ in samples:
        program.start_branch()
    for index, sample in enumerate(samples):
        program.count(index, sample.answer, sample.num_tokens, ending=Ending(sample.is_cut))
    winner = program.winner
    return None if winner is None else program.branches[winner].key


def _read_record(reply: Reply, extractor: str) -> Solved:
    record = reply.choices[0].record
    if record is None or "num_tokens" not in record:
        raise ConfigError(f"the server sent no record of a program: {record}; was it started with --scheduler dynasor?")
    key = None if record["answer"] is None else answer_key(record["answer"], "math", extractor)
    tokens = sum(record.get(name, 0) for name in ("num_tokens", "num_judge_tokens", "num_probe_tokens"))
    return Solved((key,), float(tokens), reply.latency_s, float(record["num_branches"]), reply.num_requests)
