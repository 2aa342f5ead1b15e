"""What the observer finds in a step, and who is told; without an engine."""

from __future__ import annotations

from math import inf, nan
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.auxiliary_output import CommittedTokens, CompositeHostAuxiliaryOutput

from sglang_dynasor.engine.hooks import consume
from sglang_dynasor.engine.live import BranchTag, JudgeTag, LiveProgram, ProbeTag, Tag, set_tag
from sglang_dynasor.engine.slots import Memory
from sglang_dynasor.engine.statistics import (
    HostStatistics,
    Logprobs,
    Observer,
    Table,
    Watched,
    compute,
    compute_on_cpu,
)
from sglang_dynasor.policy.confidence import Confidence
from sglang_dynasor.policy.program import Program
from sglang_dynasor.policy.spec import parse_field

VOCAB_SIZE = 552
LABELS = [(-1, -1), (3, 5), (-1, -1), (3, 5)]


def watched(rows: list[int], reqs: list[Any], tags: list[Any], num_rows: int) -> Watched:
    labels = [getattr(tag, "labels", (-1, -1)) for tag in tags]
    labels = labels if any(isinstance(tag, JudgeTag) for tag in tags) else None
    return Watched(rows, reqs, tags, labels, is_whole=len(rows) == num_rows)


LIVE = LiveProgram(Program("p", parse_field({"statistics": True}, 64)), None)
KEEPER: Any = SimpleNamespace()


def judge(labels: tuple[int, int]) -> JudgeTag:
    return JudgeTag(LIVE, 0, KEEPER, labels=labels)


def branch(confidence: Confidence | None = None) -> BranchTag:
    tag = BranchTag(LIVE, LIVE.program.start_branch(), KEEPER)
    tag.confidence = confidence or tag.confidence
    return tag


def req(num_tokens: int, finished_len: int | None = None, tag: Tag | None = None) -> Any:
    made: Any = SimpleNamespace(output_ids=list(range(100, 100 + num_tokens)), finished_len=finished_len)
    if tag is not None:
        set_tag(made, tag)
    return made


def logits(num_rows: int) -> torch.Tensor:
    return 3 * torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(num_rows))


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [1, 2, 4, 6]])
def test_a_device_s_table_says_what_the_host_s_logprobs_say(rows: list[int]) -> None:
    """Of whole batches and of some rows: confidences, labels, the likeliest token, the answer's distribution."""
    tags = [judge(labels) if labels[0] >= 0 else branch() for labels in LABELS]
    num_rows = max(rows) + 1
    which = watched(rows, [req(1)] * 4, tags, num_rows)
    values = logits(num_rows)
    values[rows[2], 7:] = -inf  # fewer tokens than TOP_K
    table, logprobs = Table.of(compute(values, which), 4), compute_on_cpu(values, which)
    assert table.confidences == pytest.approx(logprobs.confidences, rel=1e-5)
    expected = values[rows].double().log_softmax(1)
    for i, labels in enumerate(LABELS):
        assert table.top_logprob(i) == pytest.approx(logprobs.top_logprob(i), rel=1e-5)
        if labels[0] >= 0:
            assert logprobs.label_logprobs(i, labels) == pytest.approx(expected[i, list(labels)].tolist(), rel=1e-5)
            assert table.label_logprobs(i, labels) == pytest.approx(expected[i, list(labels)].tolist(), rel=1e-5)
        assert logprobs.distribution(i) == pytest.approx(table.distribution(i), rel=1e-5)
        entropy = torch.distributions.Categorical(logits=expected[i]).entropy().item()
        assert table.entropy(i) == pytest.approx(logprobs.entropy(i), rel=1e-5) == pytest.approx(entropy, rel=1e-5)
        assert len(table.distribution(i)) == (7 if i == 2 else 20)


def test_a_row_without_numbers_has_no_distribution() -> None:
    """NaN is told as no confidence and no token, not as some."""
    values = logits(2)
    values[0, 0] = nan
    found = compute_on_cpu(values, watched([0, 1], [req(1)] * 2, [branch(), branch()], 2))
    assert found.confidences[0] != found.confidences[0]
    assert found.distribution(0) == {}
    assert found.entropy(0) != found.entropy(0)
    assert len(found.distribution(1)) == 20


class Told:
    """A watch that writes down what it was asked to see."""

    def __init__(self) -> None:
        self.reader = SimpleNamespace(ends={104})
        self.seen: list[tuple[Any, int, Any]] = []
        self.told: list[tuple[Any, float]] = []

    def see(self, req: Any, tag: Any, token: int, found: Any, i: int) -> None:
        self.seen.append((req, token, found.distribution(i)))

    def mixed(self, added: Any, entropy: float) -> None:
        self.told.append((added, entropy))


@pytest.mark.parametrize("way", ["hook", "SGLang's", "composite"])
def test_only_new_tokens_are_told(way: str) -> None:
    """A branch that had ended, or whose prompt is not whole yet, is told nothing; whoever reads, the rest is the same."""
    confidences = [Confidence(4) for _ in range(4)]
    probe, judged = ProbeTag(LIVE, 0, KEEPER), judge((3, 5))
    tags: list[Any] = [*map(branch, confidences), probe, judged]
    # Went on; drew a mark's end; had ended at 3 tokens though one more was sampled; a chunk of a prompt; probe; judge.
    reqs = [req(3), req(5), req(4, finished_len=3), req(0), req(1), req(1)]
    starts = [2, 4, 3, 0, 0, 0]
    found = compute_on_cpu(logits(6), watched(list(range(6)), reqs, tags, 6))
    assert isinstance(found, Logprobs)
    told = Told()
    statistics = HostStatistics(found, watched(list(range(6)), reqs, tags, 6), [], told)  # type: ignore[arg-type]
    commits = [
        CommittedTokens(start, tuple(r.output_ids[start:end])) if end > start else None
        for r, start in zip(reqs, starts, strict=True)
        for end in [len(r.output_ids) if r.finished_len is None else r.finished_len]
    ]
    batch = SimpleNamespace(reqs=reqs)

    def original(cls: type, batch: Any, output: Any, starts: list[int]) -> None:
        assert way == "composite"
        output.consume(batch, commits)

    if way == "SGLang's":
        statistics.consume(batch, commits)  # type: ignore[arg-type]
    else:
        output = statistics if way == "hook" else CompositeHostAuxiliaryOutput((statistics,))
        consume(original, object, batch, output, starts)
    assert [c.lowest for c in confidences] == pytest.approx([*found.confidences[:2], 0, 0])
    assert told.seen == [(reqs[1], 104, found.distribution(1))]
    assert probe.logprobs == [found.top_logprob(4)]
    assert judged.reward is not None
    assert 0 < judged.reward < 1


def test_rows_are_found_again_only_when_the_requests_change() -> None:
    """The same requests keep what was found; others, a longer list of them, or nobody who asks do not."""
    inside = SimpleNamespace(num_watched=2)
    observer = Observer(SimpleNamespace(inside=inside), Memory(1, 1), VOCAB_SIZE)  # type: ignore[arg-type]
    asked, plain = req(1, tag=branch()), req(1)
    batch: Any = SimpleNamespace(reqs=[plain, asked])
    observer.watch(batch)
    first = observer.watched
    assert first is not None
    assert first.rows == [1]
    observer.watch(SimpleNamespace(reqs=[plain, asked]))  # type: ignore[arg-type]
    assert observer.watched is first
    batch.reqs.append(req(1, tag=branch()))  # SGLang lengthens a batch's own list
    observer.watch(batch)
    assert observer.watched is not None
    assert observer.watched.rows == [1, 2]
    observer.watch(SimpleNamespace(reqs=[plain]))  # type: ignore[arg-type]
    assert observer.watched is None
    assert observer.num_steps == 3
    inside.num_watched = 0
    observer.watch(batch)
    assert observer.watched is None
