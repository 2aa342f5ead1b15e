"""Statistics of program rows, computed next to the sampler and read with the step's own results.

SGLang's sampling observer gives the logits (full vocabulary, float32, after the all-gather) of every step. What is computed
there is one tensor that SGLang copies to the host with the sampled tokens: no synchronisation is added. The first
tensor-parallel rank computes, the others take its numbers, so every rank decides on the same. Where no program asked,
the observer is not active and nothing runs.

With overlap the host does not know the last token that a row has read when its step is launched. So the device proposes which rows
stand at an answer, by that token, and keeps their distributions; once the host has heard what was sampled it lets the next
step add the right ones to the slots of their programs (slots.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, product
from math import inf, nan
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils.rank_consensus_checker import assert_same
from torch import Tensor

from sglang_dynasor.engine.fence import FENCE, guarded
from sglang_dynasor.engine.live import BranchTag, JudgeTag, ProbeTag, Tag, tag_of
from sglang_dynasor.engine.reward_model import sigmoid
from sglang_dynasor.engine.slots import Added, Memory
from sglang_dynasor.engine.watch import Watch
from sglang_dynasor.policy.answers import answer_marks
from sglang_dynasor.policy.mixture import Distribution
from sglang_dynasor_kernels import (
    BEGUN,
    ENDS_MARK,
    IS_MARK,
    SAYING,
    Addition,
    add_rows,
    keep_rows,
    row_confidence,
    row_stats,
)

if TYPE_CHECKING:
    from sglang.srt.distributed.parallel_state import GroupCoordinator
    from sglang.srt.managers.auxiliary_output import CommittedTokens
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

LEAST = np.finfo(np.float32).min
TOP_K = 20  # DeepConf's (arXiv 2508.15260, section 3.1)
# The columns of the tensor that a device sends; then TOP_K log-probabilities and as many token ids.
CONFIDENCE, GOOD, BAD, ENTROPY, PLACE, NUM_COLUMNS = 0, 1, 2, 3, 4, 5


@dataclass(frozen=True)
class Watched:
    """Rows of a step that somebody asked about; a step mostly has those of the one before."""

    rows: list[int]
    reqs: list[Req]
    tags: list[Tag]
    labels: list[tuple[int, int]] | None  # of a judge's rows; -1 elsewhere
    is_whole: bool  # every row of the batch
    followed: list[BranchTag | None] | None = None  # where a mark says that an answer begins; None: nowhere
    _there: list[Tensor | None] = field(default_factory=list[Tensor | None])

    def on(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """The rows, None for all, and the labels, sent there once."""
        if not self._there:
            self._there.append(None if self.is_whole else _to_device(self.rows, device))
            self._there.append(None if self.labels is None else _to_device(self.labels, device))
        rows, labels = self._there
        return rows, labels


class Sums(NamedTuple):
    """What the device holds of answers."""

    kept: Tensor  # [2 num_kept, V] distributions of rows that may stand at one
    total: Tensor  # [num_slots, V]
    marks: Tensor  # [V] int8: which tokens make a mark


class Step(NamedTuple):
    """What a step does with answers."""

    sums: Sums
    added: list[Added]
    standing: list[int] | None  # of each watched row; None: none stands at an answer
    tokens: Tensor | None  # [B] that the rows have read last; None without `standing`
    first: int  # places for rows that are kept
    end: int


class Observer:
    """SGLang's SamplingObserver for programs. The scheduler says before each step which rows are watched."""

    def __init__(self, watch: Watch, memory: Memory, vocab_size: int):
        self._watch = watch
        self._memory = memory
        self._vocab_size = vocab_size
        self._sums: Sums | None = None  # made when they are first needed
        self._num_kept = 0  # steps in which rows were kept
        self._batch: ScheduleBatch | None = None
        self.watched: Watched | None = None
        self.num_steps = 0  # with a watched row
        self._reqs: list[Req] = []  # of the step that this was found for
        self._found: Watched | None = None

    @cached_property
    def group(self) -> GroupCoordinator:
        """The tensor-parallel ranks, known once the model is there; looked up once: it is asked for in every step."""
        return get_parallel().tp_group

    @guarded("warm_up")
    def warm_up(self, device: torch.device) -> None:
        """Let Triton compile, at the start, whatever `compute` may launch, so that no request waits for it, and take the memory.

        On the first rank: the others launch nothing.
        """
        if self.group.rank_in_group:
            return
        vocab_size, sums = self._vocab_size, self._sums_on(device)
        padded = torch.zeros(2, vocab_size + -vocab_size % 64, device=device)[:, :vocab_size]
        pairs = torch.zeros(2, 2, dtype=torch.int64, device=device)
        # SGLang hands out logits as they are, or cut from a padded vocabulary.
        for logits, path, labels, rows in product(
            (padded.contiguous(), padded), ("split", "row"), (None, pairs), (None, pairs[0])
        ):
            lse = row_stats(logits, labels, rows=rows, top_k=TOP_K, path=path).lse
            standing = torch.tensor([SAYING, BEGUN], dtype=torch.int32, device=device)
            keep_rows(sums.kept, logits, lse, pairs[0], standing, sums.marks, 0, 1, rows=rows, path="kernel")
        add_rows(sums.total, sums.kept, [Addition(0, 1, [0])], path="kernel")

    def _sums_on(self, device: torch.device) -> Sums:
        if self._sums is None:
            num_slots, num_kept = self._memory
            marks, reader = torch.zeros(self._vocab_size, dtype=torch.int8), self._watch.reader
            for kind, tokens in ((ENDS_MARK, reader.ends), (IS_MARK, reader.marks)):
                marks[[i for i in tokens if i < self._vocab_size]] = kind
            kept, total = (torch.empty(num, self._vocab_size, device=device) for num in (2 * num_kept, num_slots))
            self._sums = Sums(kept, total, marks.to(device))
        return self._sums

    def inherit(self, old: Observer) -> None:
        """Take the memory of one that goes: a device may not have as much again. What is in it is nobody's."""
        self._sums = old._sums

    def watch(self, batch: ScheduleBatch) -> None:
        """Take note of the rows of `batch` that somebody asked about."""
        if not self._watch.inside.num_watched:
            self.watched, self._reqs, self._found, self._batch = None, [], None, None
            return
        self._batch = batch
        if batch.reqs != self._reqs:  # a step mostly has the requests of the one before
            self._found, self._reqs = _watched(batch.reqs), list(batch.reqs)
        self.watched = self._found
        self.num_steps += self.watched is not None

    @guarded("is_active")
    def is_active(self, sampling_info: Any) -> bool:
        return self.watched is not None

    @guarded("before_grammar")
    def before_grammar(self, logits: Tensor, sampling_info: Any) -> DeviceStatistics | None:
        watched = self.watched
        if watched is None or watched.rows[-1] >= logits.shape[0]:  # not a step that samples a token for each request
            return None
        group = self.group
        standing = None
        if watched.followed is not None:
            standing = list(map(self._watch.reader.standing, watched.reqs, watched.followed))
        first = self._num_kept % 2 * self._memory.num_kept
        self._num_kept += standing is not None
        added = self._watch.slots.take_due()
        if added:
            assert_same("dynasor adds to slots %s", [of.addition for of in added])
        shape = len(watched.rows) * (NUM_COLUMNS + 2 * TOP_K) + len(added)
        if group.rank_in_group == 0:
            try:
                step = self._step(logits, added, standing, first)
                if logits.is_cpu and group.world_size == 1:
                    return DeviceStatistics(compute_on_cpu(logits, watched, step), watched, added, self._watch)
                table = compute(logits, watched, step)
            except Exception as error:  # the other ranks wait for a table
                FENCE.fall_back("statistics", error)
                table = torch.full((shape,), nan, device=logits.device)
        else:
            table = torch.empty(shape, dtype=torch.float32, device=logits.device)
        return DeviceStatistics(group.broadcast(table), watched, added, self._watch)

    def _step(self, logits: Tensor, added: list[Added], standing: list[int] | None, first: int) -> Step | None:
        """What the step does with answers; None: nothing."""
        if standing is None and not added:
            return None
        tokens = None if standing is None else last_tokens(self._batch, logits.device)
        return Step(self._sums_on(logits.device), added, standing, tokens, first, first + self._memory.num_kept)

    @guarded("after_sample")
    def after_sample(self, state: DeviceStatistics, token_ids: Tensor) -> DeviceStatistics:
        return state


def last_tokens(batch: Any, device: torch.device) -> Tensor:
    """The token [B] that each row of a step has read last."""
    if batch.input_ids is None:  # SGLang samples after the last step was read: the host knows all tokens
        return _to_device([(req.output_ids or req.origin_input_ids)[-1] for req in batch.reqs], device)
    if batch.forward_mode.is_decode():
        return batch.input_ids
    return batch.input_ids[_to_device([end - 1 for end in accumulate(batch.extend_lens)], device)]


def _watched(reqs: Sequence[Req]) -> Watched | None:
    seen = [(row, req, tag) for row, req in enumerate(reqs) if (tag := tag_of(req)) and tag.is_watched]
    if not seen:
        return None
    rows, watched, tags = (list(column) for column in zip(*seen, strict=True))
    is_judged = any(isinstance(tag, JudgeTag) for tag in tags)
    labels = [tag.labels if isinstance(tag, JudgeTag) else (-1, -1) for tag in tags] if is_judged else None
    followed = [tag if isinstance(tag, BranchTag) and _has_marks(tag) else None for tag in tags]
    return Watched(rows, watched, tags, labels, len(rows) == len(reqs), followed if any(followed) else None)


def _has_marks(tag: BranchTag) -> bool:
    return tag.confidence is not None and bool(answer_marks(tag.live.program.spec.answer))


def compute(logits: Tensor, watched: Watched, step: Step | None = None) -> Tensor:
    """One tensor of float32: NUM_COLUMNS + 2 TOP_K numbers of each watched row, then the entropies of the slots that were added to."""
    rows, labels = watched.on(logits.device)
    logits = logits[: watched.rows[-1] + 1]
    stats = row_stats(logits, labels, rows=rows, top_k=TOP_K)
    of_labels = stats.label_logprobs if labels is not None else stats.confidence[:, None].expand(-1, 2)
    mixed, places = answer(logits, rows, stats.lse, step)
    places = torch.full_like(stats.entropy, -1) if places is None else places
    # Token ids are exact in float32: no vocabulary has 2**24 tokens.
    columns = (stats.confidence[:, None], of_labels, stats.entropy[:, None], places[:, None].float())
    table = torch.cat([*columns, stats.top_logprobs, stats.top_ids.float()], dim=1).flatten()
    return table if mixed is None else torch.cat([table, mixed])


def compute_on_cpu(logits: Tensor, watched: Watched, step: Step | None = None) -> Logprobs:
    """The log-probabilities of the watched rows: from them the rest can be read of the few that want it."""
    rows, _ = watched.on(logits.device)
    confidences, logprobs = row_confidence(logits if rows is None else logits[rows], top_k=TOP_K)
    if step is not None and step.tokens is not None and rows is not None:
        step = step._replace(tokens=step.tokens[rows])
    mixed, places = answer(logprobs, None, None, step)
    return Logprobs(confidences, logprobs, places, [] if mixed is None else mixed.tolist())


def answer(
    logits: Tensor, rows: Tensor | None, lse: Tensor | None, step: Step | None
) -> tuple[Tensor | None, Tensor | None]:
    """The entropies of the slots that the step adds to, and where it keeps rows; None: it does not."""
    if step is None:
        return None, None
    sums, mixed, places = step.sums, None, None
    if step.added:  # first: where these were kept, others will be
        mixed = add_rows(sums.total, sums.kept, [added.addition for added in step.added]).entropy
    if step.standing is not None and step.tokens is not None:
        standing = _to_device(step.standing, logits.device, torch.int32)
        tokens = step.tokens[: len(logits)]
        places = keep_rows(
            sums.kept, logits, lse, tokens, standing, sums.marks, step.first, step.end, rows=rows
        ).places  # fmt: skip
    return mixed, places


def _to_device(values: Sequence[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    tensor = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class Table:
    """What `compute` found, copied to the host."""

    rows: Tensor
    mixed: list[float]

    @classmethod
    def of(cls, found: Tensor, num_rows: int) -> Table:
        end = num_rows * (NUM_COLUMNS + 2 * TOP_K)
        return cls(found[:end].view(num_rows, -1), found[end:].tolist())

    @property
    def confidences(self) -> list[float]:
        return self.rows[:, CONFIDENCE].tolist()

    def top_logprob(self, i: int) -> float:
        return float(self.rows[i, NUM_COLUMNS])

    def label_logprobs(self, i: int, labels: tuple[int, int]) -> tuple[float, float]:
        return float(self.rows[i, GOOD]), float(self.rows[i, BAD])

    def distribution(self, i: int) -> Distribution:
        logprobs, ids = self.rows[i, NUM_COLUMNS:].view(2, TOP_K).tolist()
        return {int(token): logprob for token, logprob in zip(ids, logprobs, strict=True) if logprob > -inf}

    def entropy(self, i: int) -> float:
        return float(self.rows[i, ENTROPY])

    def place(self, i: int) -> int:
        place = float(self.rows[i, PLACE])
        return int(place) if place >= 0 else -1


@dataclass(frozen=True, slots=True)
class Logprobs:
    """What `compute_on_cpu` found: all log-probabilities [rows, V], float32, on the host already."""

    confidences: list[float]
    rows: Tensor
    places: Tensor | None
    mixed: list[float]

    def top_logprob(self, i: int) -> float:
        return float(self.rows[i].amax())

    def label_logprobs(self, i: int, labels: tuple[int, int]) -> tuple[float, float]:
        good, bad = labels
        return float(self.rows[i, good]), float(self.rows[i, bad])

    def distribution(self, i: int) -> Distribution:
        row = self.rows[i].numpy()
        ids = row.argpartition(-min(TOP_K, len(row)))[-TOP_K:]
        pairs = zip(ids.tolist(), row[ids].tolist(), strict=True)
        return {token: logprob for token, logprob in pairs if logprob > -inf}

    def entropy(self, i: int) -> float:
        row = self.rows[i].numpy()
        return -float(np.exp(row).dot(np.maximum(row, LEAST)))

    def place(self, i: int) -> int:
        return -1 if self.places is None else int(self.places[i])


@dataclass(frozen=True, slots=True)
class DeviceStatistics:
    """SGLang's DeviceAuxiliaryOutput."""

    found: Tensor | Logprobs
    watched: Watched
    added: list[Added]
    watch: Watch

    @guarded("copy_to_host")
    def copy_to_host(self, copy_tensor: Callable[[Tensor], Tensor]) -> HostStatistics:
        found = self.found
        return HostStatistics(
            copy_tensor(found) if isinstance(found, Tensor) else found, self.watched, self.added, self.watch
        )


@dataclass(frozen=True, slots=True)
class HostStatistics:
    """SGLang's HostAuxiliaryOutput: what a step found, read once its tokens are known."""

    found: Tensor | Logprobs
    watched: Watched
    added: list[Added]
    watch: Watch

    @guarded("consume")
    def consume(self, batch: ScheduleBatch, commits: Sequence[CommittedTokens | None]) -> None:
        """SGLang's own way to `read`."""
        self.read([inf if commit is None else commit.output_index for commit in commits])

    @guarded("read")  # here, not by the hook: that would have SGLang call `consume`, and rows would be read twice
    def read(self, starts: Sequence[float]) -> None:
        """Hand out what was found. A request of the batch had `starts` tokens before the step, as far as its client sees."""
        # Once per row and step: what is rarely wanted, `see` is called for.
        watched, watch = self.watched, self.watch
        found = Table.of(self.found, len(watched.rows)) if isinstance(self.found, Tensor) else self.found
        for added, entropy in zip(self.added, found.mixed, strict=True):
            watch.mixed(added, entropy)
        ends = watch.reader.ends
        confidences = found.confidences
        for i, (row, req, tag) in enumerate(zip(watched.rows, watched.reqs, watched.tags, strict=True)):
            num_tokens = len(req.output_ids) if req.finished_len is None else req.finished_len
            if num_tokens <= starts[row]:  # a chunk of a prompt, or a branch that had ended
                continue
            if isinstance(tag, BranchTag):
                if tag.confidence is None:
                    continue
                tag.confidence.add(confidences[i])
                token = req.output_ids[num_tokens - 1]
                if tag.may_be_weak or tag.answering is not None or token in ends:
                    watch.see(req, tag, token, found, i)
            elif isinstance(tag, ProbeTag):
                tag.logprobs.append(found.top_logprob(i))
            elif isinstance(tag, JudgeTag):
                tag.reward = reward(*found.label_logprobs(i, tag.labels))


def reward(good_logprob: float, bad_logprob: float) -> float | None:
    """p(good) / (p(good) + p(bad)) in [0, 1]; None where the model gives neither any chance."""
    difference = good_logprob - bad_logprob
    return None if difference != difference else sigmoid(difference)
