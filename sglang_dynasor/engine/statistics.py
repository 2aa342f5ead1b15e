"""Statistics of program rows, computed next to the sampler and read with the step's own results.

SGLang's sampling observer gives the logits (full vocabulary, float32, after the all-gather) of every step. What is computed
there is one tensor that SGLang copies to the host with the sampled tokens: no synchronisation is added. The first
tensor-parallel rank computes, the others take its numbers, so every rank decides on the same. Where no program asked,
the observer is not active and nothing runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import nan
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.runtime_context import get_parallel
from torch import Tensor

from sglang_dynasor.answers import answer_marks
from sglang_dynasor.engine.branch import BranchTag, tag_of
from sglang_dynasor.mixture import Distribution
from sglang_dynasor.reward import sigmoid
from sglang_dynasor_kernels import row_stats

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

    from sglang_dynasor.engine.controller import Controller

TOP_K = 20  # DeepConf's (arXiv 2508.15260, section 3.1)
TAIL_TOKENS = 8  # decoded to see whether an answer begins
# The columns of the tensor that goes to the host; then TOP_K log-probabilities and as many token ids.
CONFIDENCE, GOOD, BAD, NUM_COLUMNS = 0, 1, 2, 3


@dataclass(frozen=True, slots=True)
class Watched:
    """Rows of a step that somebody asked about."""

    rows: list[int]
    reqs: list[Req]
    labels: list[tuple[int, int]] | None  # of a judge's rows; -1 elsewhere
    is_whole: bool  # every row of the batch


class Observer:
    """SGLang's SamplingObserver for programs. The scheduler says before each step which rows are watched."""

    def __init__(self, controller: Controller):
        self.controller = controller
        self.watched: Watched | None = None
        self.num_steps = 0  # with a watched row

    def watch(self, batch: ScheduleBatch) -> None:
        """Take note of the rows of `batch` that somebody asked about."""
        self.watched = None
        if not self.controller.num_watched:
            return
        rows, labels, has_judges = list[int](), list[tuple[int, int]](), False
        for row, req in enumerate(batch.reqs):
            tag = tag_of(req)
            if tag is not None and tag.is_watched:
                rows.append(row)
                labels.append(tag.labels)
                has_judges |= tag.is_judge
        if rows:
            self.num_steps += 1
            reqs = [batch.reqs[row] for row in rows]
            self.watched = Watched(rows, reqs, labels if has_judges else None, len(rows) == len(batch.reqs))

    def is_active(self, sampling_info: Any) -> bool:
        return self.watched is not None

    def before_grammar(self, logits: Tensor, sampling_info: Any) -> DeviceStatistics | None:
        watched = self.watched
        if watched is None or watched.rows[-1] >= logits.shape[0]:  # not a step that samples a token for each request
            return None
        group = get_parallel().tp_group
        if group.rank_in_group == 0:
            try:
                table = compute(logits, watched)
            except Exception as error:  # the other ranks wait for a table
                self.controller.fall_back("statistics", error)
                table = torch.full((len(watched.rows), NUM_COLUMNS + 2 * TOP_K), nan, device=logits.device)
        else:
            shape = (len(watched.rows), NUM_COLUMNS + 2 * TOP_K)
            table = torch.empty(shape, dtype=torch.float32, device=logits.device)
        return DeviceStatistics(group.broadcast(table), watched, self.controller)

    def after_sample(self, state: DeviceStatistics, token_ids: Tensor) -> DeviceStatistics:
        return state


def compute(logits: Tensor, watched: Watched) -> Tensor:
    """The table [rows, NUM_COLUMNS + 2 TOP_K] float32 of the watched rows."""
    rows = None if watched.is_whole else _to_device(watched.rows, logits.device)
    labels = None if watched.labels is None else _to_device(watched.labels, logits.device)
    stats = row_stats(logits[: watched.rows[-1] + 1], labels, rows=rows, top_k=TOP_K)
    of_labels = stats.label_logprobs if labels is not None else stats.confidence[:, None].expand(-1, 2)
    # Token ids are exact in float32: no vocabulary has 2**24 tokens.
    return torch.cat([stats.confidence[:, None], of_labels, stats.top_logprobs, stats.top_ids.float()], dim=1)


def _to_device(values: Sequence[Any], device: torch.device) -> Tensor:
    tensor = torch.tensor(values, pin_memory=device.type == "cuda")
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class DeviceStatistics:
    """SGLang's DeviceAuxiliaryOutput."""

    table: Tensor
    watched: Watched
    controller: Controller

    def copy_to_host(self, copy_tensor: Callable[[Tensor], Tensor]) -> HostStatistics:
        return HostStatistics(copy_tensor(self.table), self.watched, self.controller)


@dataclass(frozen=True, slots=True)
class HostStatistics:
    """SGLang's HostAuxiliaryOutput: a step's table, read once its tokens are known."""

    table: Tensor
    watched: Watched
    controller: Controller

    def consume(self, batch: ScheduleBatch, commits: Sequence[Any]) -> None:
        watched = self.watched
        columns = self.table[:, :NUM_COLUMNS].tolist()
        for i, (row, req) in enumerate(zip(watched.rows, watched.reqs, strict=True)):
            commit, tag = commits[row], tag_of(req)
            if commit is None or tag is None:  # a chunk of a prompt, or a branch that had ended
                continue
            if tag.is_judge:
                tag.reward = reward(columns[i][GOOD], columns[i][BAD])
            else:
                self.controller.see(req, tag, columns[i][CONFIDENCE], commit.token_ids[-1], partial(self._answer, i))

    def _answer(self, i: int) -> Distribution:
        """The most likely tokens of a row."""
        logprobs = self.table[i, NUM_COLUMNS : NUM_COLUMNS + TOP_K].tolist()
        ids = self.table[i, NUM_COLUMNS + TOP_K :].tolist()
        return {int(token): logprob for token, logprob in zip(ids, logprobs, strict=True) if token >= 0}


def reward(good_logprob: float, bad_logprob: float) -> float | None:
    """p(good) / (p(good) + p(bad)) in [0, 1]; None where the model gives neither any chance."""
    difference = good_logprob - bad_logprob
    return None if difference != difference else sigmoid(difference)


class AnswerReader:
    """Finds where a running branch's answer begins, from its tokens as they come."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        # Looking closer is for tokens that could end a mark; a space may belong to the same token.
        self.ends = {i for token, i in vocabulary(tokenizer) if token.rstrip("\u0120\u2581 ").endswith(("#", "{"))}

    def begins(self, req: Req, tag: BranchTag, token: int) -> bool:
        """Whether the distribution that `token` was drawn from is that of the answer's first token."""
        if tag.is_at_answer:
            if not self.tokenizer.decode([token]).strip():
                return False  # a space before the answer
            tag.is_at_answer = False
            return True
        if token in self.ends:
            text = self.tokenizer.decode(list(req.output_ids[-TAIL_TOKENS:])).rstrip()
            tag.is_at_answer = text.endswith(answer_marks(tag.live.program.spec.answer))
        return False


def vocabulary(tokenizer: Any) -> Iterator[tuple[str, int]]:
    """Tokens with their ids; none where a tokenizer does not list them, some list bytes."""
    for token, i in getattr(tokenizer, "get_vocab", dict)().items():
        yield token.decode(errors="replace") if isinstance(token, bytes) else token, i
