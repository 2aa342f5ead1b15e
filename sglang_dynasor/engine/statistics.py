"""Statistics of program rows, computed next to the sampler and read with the step's own results.

SGLang's sampling observer gives the logits (full vocabulary, float32, after the all-gather) of every step. What is computed
there is one tensor that SGLang copies to the host with the sampled tokens: no synchronisation is added. The first
tensor-parallel rank computes, the others take its numbers, so every rank decides on the same. Where no program asked,
the observer is not active and nothing runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import inf, nan
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.runtime_context import get_parallel
from torch import Tensor

from sglang_dynasor.engine.live import BranchTag, JudgeTag, ProbeTag, Tag, tag_of
from sglang_dynasor.engine.reward_model import sigmoid
from sglang_dynasor.engine.watch import Watch
from sglang_dynasor.policy.mixture import Distribution
from sglang_dynasor_kernels import row_confidence, row_stats

if TYPE_CHECKING:
    from sglang.srt.distributed.parallel_state import GroupCoordinator
    from sglang.srt.managers.auxiliary_output import CommittedTokens
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

TOP_K = 20  # DeepConf's (arXiv 2508.15260, section 3.1)
# The columns of the tensor that a device sends; then TOP_K log-probabilities and as many token ids.
CONFIDENCE, GOOD, BAD, NUM_COLUMNS = 0, 1, 2, 3


@dataclass(frozen=True, slots=True)
class Watched:
    """Rows of a step that somebody asked about."""

    rows: list[int]
    reqs: list[Req]
    tags: list[Tag]
    labels: list[tuple[int, int]] | None  # of a judge's rows; -1 elsewhere
    is_whole: bool  # every row of the batch


class Observer:
    """SGLang's SamplingObserver for programs. The scheduler says before each step which rows are watched."""

    def __init__(self, watch: Watch):
        self._watch = watch
        self.watched: Watched | None = None
        self.num_steps = 0  # with a watched row
        self._reqs: list[Req] = []  # of the step that `watched` was found for

    @cached_property
    def group(self) -> GroupCoordinator:
        """The tensor-parallel ranks, known once the model is there; looked up once: it is asked for in every step."""
        return get_parallel().tp_group

    def warm_up(self, vocab_size: int, device: torch.device) -> None:
        """Let Triton compile, at the start, whatever `compute` may launch, so that no request waits for it."""
        try:
            padded = torch.zeros(2, vocab_size + -vocab_size % 64, device=device)[:, :vocab_size]
            pairs = torch.zeros(2, 2, dtype=torch.int64, device=device)
            # SGLang hands out logits as they are, or cut from a padded vocabulary.
            for logits, path, labels, rows in product(
                (padded.contiguous(), padded), ("split", "row"), (None, pairs), (None, pairs[0])
            ):
                row_stats(logits, labels, rows=rows, top_k=TOP_K, path=path)
        except Exception as error:
            self._watch.faults.fall_back("statistics", error)

    def watch(self, batch: ScheduleBatch) -> None:
        """Take note of the rows of `batch` that somebody asked about."""
        if not self._watch.inside.num_watched:
            self.watched, self._reqs = None, []
            return
        if batch.reqs != self._reqs:  # a step mostly has the requests of the one before
            self._reqs = list(batch.reqs)
            self.watched = _watched(self._reqs)
        self.num_steps += self.watched is not None

    def is_active(self, sampling_info: Any) -> bool:
        return self.watched is not None

    def before_grammar(self, logits: Tensor, sampling_info: Any) -> DeviceStatistics | None:
        watched = self.watched
        if watched is None or watched.rows[-1] >= logits.shape[0]:  # not a step that samples a token for each request
            return None
        group = self.group
        if logits.is_cpu and group.world_size == 1:
            try:
                return DeviceStatistics(compute_on_cpu(logits, watched), watched, self._watch)
            except Exception as error:
                self._watch.faults.fall_back("statistics", error)
                return None
        shape = (len(watched.rows), NUM_COLUMNS + 2 * TOP_K)
        if group.rank_in_group == 0:
            try:
                table = compute(logits, watched)
            except Exception as error:  # the other ranks wait for a table
                self._watch.faults.fall_back("statistics", error)
                table = torch.full(shape, nan, device=logits.device)
        else:
            table = torch.empty(shape, dtype=torch.float32, device=logits.device)
        return DeviceStatistics(group.broadcast(table), watched, self._watch)

    def after_sample(self, state: DeviceStatistics, token_ids: Tensor) -> DeviceStatistics:
        return state


def _watched(reqs: Sequence[Req]) -> Watched | None:
    seen = [(row, req, tag) for row, req in enumerate(reqs) if (tag := tag_of(req)) and tag.is_watched]
    if not seen:
        return None
    rows, watched, tags = (list(column) for column in zip(*seen, strict=True))
    is_judged = any(isinstance(tag, JudgeTag) for tag in tags)
    labels = [tag.labels if isinstance(tag, JudgeTag) else (-1, -1) for tag in tags] if is_judged else None
    return Watched(rows, watched, tags, labels, is_whole=len(rows) == len(reqs))


def compute(logits: Tensor, watched: Watched) -> Tensor:
    """The table [rows, NUM_COLUMNS + 2 TOP_K] float32 of the watched rows."""
    rows = None if watched.is_whole else _to_device(watched.rows, logits.device)
    labels = None if watched.labels is None else _to_device(watched.labels, logits.device)
    stats = row_stats(logits[: watched.rows[-1] + 1], labels, rows=rows, top_k=TOP_K)
    of_labels = stats.label_logprobs if labels is not None else stats.confidence[:, None].expand(-1, 2)
    # Token ids are exact in float32: no vocabulary has 2**24 tokens.
    return torch.cat([stats.confidence[:, None], of_labels, stats.top_logprobs, stats.top_ids.float()], dim=1)


def compute_on_cpu(logits: Tensor, watched: Watched) -> Logprobs:
    """The log-probabilities of the watched rows: from them the rest can be read of the few that want it."""
    if not watched.is_whole:
        logits = logits[torch.tensor(watched.rows)]
    return Logprobs(*row_confidence(logits, top_k=TOP_K))


def _to_device(values: Sequence[Any], device: torch.device) -> Tensor:
    tensor = torch.tensor(values, pin_memory=device.type == "cuda")
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class Table:
    """What `compute` found, copied to the host."""

    rows: Tensor

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


@dataclass(frozen=True, slots=True)
class Logprobs:
    """What `compute_on_cpu` found: all log-probabilities [rows, V], float32, on the host already."""

    confidences: list[float]
    rows: Tensor

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


@dataclass(frozen=True, slots=True)
class DeviceStatistics:
    """SGLang's DeviceAuxiliaryOutput."""

    found: Tensor | Logprobs
    watched: Watched
    watch: Watch

    def copy_to_host(self, copy_tensor: Callable[[Tensor], Tensor]) -> HostStatistics:
        found = Table(copy_tensor(self.found)) if isinstance(self.found, Tensor) else self.found
        return HostStatistics(found, self.watched, self.watch)


@dataclass(frozen=True, slots=True)
class HostStatistics:
    """SGLang's HostAuxiliaryOutput: what a step found, read once its tokens are known."""

    found: Table | Logprobs
    watched: Watched
    watch: Watch

    def consume(self, batch: ScheduleBatch, commits: Sequence[CommittedTokens | None]) -> None:
        """SGLang's own way to `read`."""
        self.read([inf if commit is None else commit.output_index for commit in commits])

    def read(self, starts: Sequence[float]) -> None:
        """Hand out what was found. A request of the batch had `starts` tokens before the step, as far as its client sees."""
        # Once per row and step: what is rarely wanted, `see` is called for.
        watched, found, watch = self.watched, self.found, self.watch
        ends = watch.reader.ends
        try:
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
                    if tag.may_be_weak or tag.is_at_answer or token in ends:
                        watch.see(req, tag, token, lambda i=i: found.distribution(i))
                elif isinstance(tag, ProbeTag):
                    tag.logprobs.append(found.top_logprob(i))
                elif isinstance(tag, JudgeTag):
                    tag.reward = reward(*found.label_logprobs(i, tag.labels))
        except Exception as error:
            watch.faults.fall_back("statistics", error)


def reward(good_logprob: float, bad_logprob: float) -> float | None:
    """p(good) / (p(good) + p(bad)) in [0, 1]; None where the model gives neither any chance."""
    difference = good_logprob - bad_logprob
    return None if difference != difference else sigmoid(difference)
