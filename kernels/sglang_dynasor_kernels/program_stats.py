"""Statistics of programs from the rows of their branches: votes, certaindex, rewards, disagreement."""

# Triton's language is not typed: what its functions take and return inside a kernel is not what they declare.
# pyright: reportMissingParameterType=false, reportUntypedFunctionDecorator=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

Path = Literal["ref", "kernel"]

BLOCK_V = 4096  # logits of a row that a program of _mixture_kernel holds in registers; an estimate: NOTES.md

LEAST_TEMPERATURE = 1e-30  # of which float32 still has the inverse


class ProgramStats(NamedTuple):
    """Statistics of P programs and of the B rows given, float32 but for the counts."""

    num_votes: Tensor  # [P] int32
    vote_entropy: Tensor  # [P] nats; 0 without votes
    certaindex: Tensor  # [P] in [0, 1]: 1 - entropy / log(votes), 1 = unanimous; 0 below two votes
    reward_mean: Tensor  # [P]; these three are NaN where no row has a reward
    reward_max: Tensor  # [P]
    reward_variance: Tensor  # [P] of the population
    reward_weight: Tensor  # [B] softmax(reward / temperature) inside the program; 0 for rows without a reward
    # From logits, of the rows standing at an answer, in nats; None without logits, NaN where no row stands there.
    mixture_entropy: Tensor | None  # [P] of the mean of their distributions
    mean_entropy: Tensor | None  # [P]
    disagreement: Tensor | None  # [P] mixture_entropy - mean_entropy, at least 0: the Jensen-Shannon divergence
    path: Path  # what ran: torch or the kernels


def program_stats(
    program_index: Tensor,
    answer_index: Tensor,
    rewards: Tensor,
    num_programs: int,
    *,
    logits: Tensor | None = None,
    lse: Tensor | None = None,
    entropy: Tensor | None = None,
    at_answer: Tensor | None = None,
    temperature: float = 0.2,
    path: Path | None = None,
) -> ProgramStats:
    """Statistics of programs, in float32, without synchronising; the same bits in every run.

    Args:
        program_index: [B] int: the program of each row, 0 to num_programs - 1; any other number is no program.
        answer_index: [B] int: rows of a program with the same number gave the same answer; -1 is no answer yet.
        rewards: [B] float, finite; NaN is no reward. An infinite one makes the reward statistics of its program meaningless.
        num_programs: P.
        logits: [B, V] float32, bfloat16 or float16, contiguous along V; with `lse` and `entropy`.
        lse: [B] float32, of `row_stats`.
        entropy: [B] float32, of `row_stats`.
        at_answer: [B] bool: the rows whose next token is an answer's; None for all.
        temperature: of the reward weights, at least LEAST_TEMPERATURE.
        path: for tests and timings. None: "ref" on the CPU, else "kernel".

    Returns:
        Statistics of P programs; without rows those of programs without votes and rewards.

    Raises:
        ValueError: an argument is not as above.

    A row that `row_stats` reports makes the last three statistics of its own program NaN, and no other's.
    Error: README.md, "Tolerances". Source: Dynasor, arXiv 2412.20993 (certaindex); Rebase, arXiv 2408.00724 (weights).
    """
    if path == "ref" or (path is None and program_index.device.type == "cpu"):
        stats = program_stats_ref(
            program_index, answer_index, rewards, num_programs,
            logits=logits, lse=lse, entropy=entropy, at_answer=at_answer, temperature=temperature,
        )  # fmt: skip
        return ProgramStats(*(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in stats))

    _check(program_index, answer_index, rewards, logits, lse, entropy, at_answer, temperature)
    num_rows = len(program_index)
    new = partial(torch.empty, dtype=torch.float32, device=program_index.device)
    num_votes = new(num_programs, dtype=torch.int32)
    votes = new(2, num_programs)
    reward = new(3, num_programs)
    reward_weight = torch.zeros_like(program_index, dtype=torch.float32)
    mixture = new(3, num_programs) if logits is not None else None
    if num_programs:
        block_b = max(16, triton.next_power_of_2(num_rows))
        parts, num_splits = None, 0
        if logits is not None:
            num_splits = triton.cdiv(logits.shape[1], BLOCK_V)
            parts = new(num_programs, num_splits)
            _mixture_kernel[(num_programs, num_splits)](
                logits, logits.shape[1], logits.stride(0), lse, program_index, at_answer, num_rows, parts,
                BLOCK_B=block_b, BLOCK_V=BLOCK_V, num_warps=8,
            )  # fmt: skip
        _program_stats_kernel[(num_programs,)](
            program_index, answer_index, rewards, num_rows, 1 / temperature, num_votes, votes, reward, reward_weight,
            entropy, at_answer, parts, num_splits, mixture,
            BLOCK_B=block_b, BLOCK_J=max(1, 4096 // block_b), BLOCK_S=max(1, triton.next_power_of_2(num_splits)),
            num_warps=8,
        )  # fmt: skip
    no_mixture = (None, None, None)
    return ProgramStats(
        num_votes, *votes, *reward, reward_weight, *(no_mixture if mixture is None else mixture), "kernel"
    )


def program_stats_ref(
    program_index: Tensor,
    answer_index: Tensor,
    rewards: Tensor,
    num_programs: int,
    *,
    logits: Tensor | None = None,
    lse: Tensor | None = None,
    entropy: Tensor | None = None,
    at_answer: Tensor | None = None,
    temperature: float = 0.2,
) -> ProgramStats:
    """`program_stats` in plain torch, computed and returned in float64."""
    _check(program_index, answer_index, rewards, logits, lse, entropy, at_answer, temperature)
    programs = torch.arange(num_programs, device=program_index.device)
    of_program = program_index == programs[:, None]  # [P, B]
    rewards = rewards.double()

    voted = of_program & (answer_index >= 0)
    num_votes = voted.sum(1).double()
    is_same = (program_index == program_index[:, None]) & (answer_index == answer_index[:, None])
    share = is_same.sum(1) / num_votes.clamp_min(1)[:, None]  # [P, B] of the votes, for the row's answer
    vote_entropy = -share.log().where(voted, 0).sum(1) / num_votes.clamp_min(1)
    certaindex = (1 - vote_entropy / num_votes.clamp_min(2).log()).clamp_min(0).where(num_votes > 1, 0)

    rewarded = of_program & ~rewards.isnan()
    num_rewards = rewarded.sum(1)
    reward_mean = rewards.where(rewarded, 0).sum(1) / num_rewards
    reward_variance = (rewards - reward_mean[:, None]).square().where(rewarded, 0).sum(1) / num_rewards
    best = rewards.where(rewarded, -torch.inf).amax(1) if len(rewards) else reward_mean
    weight = ((rewards - best[:, None]) / temperature).exp().where(rewarded, 0)  # [P, B]
    reward_weight = (weight / weight.sum(1, keepdim=True)).where(rewarded, 0).sum(0)

    mixture_entropy = mean_entropy = disagreement = None
    if logits is not None and lse is not None and entropy is not None:
        standing = of_program if at_answer is None else of_program & at_answer
        num_standing = standing.sum(1)
        mixture_entropy = torch.full((num_programs,), torch.nan, dtype=torch.float64, device=logits.device)
        for program, rows in enumerate(standing):
            if rows.any():
                mean = (logits[rows].double() - lse[rows, None].double()).exp().mean(0)
                mixture_entropy[program] = -torch.special.xlogy(mean, mean).sum()
        mean_entropy = entropy.double().where(standing, 0).sum(1) / num_standing
        disagreement = (mixture_entropy - mean_entropy).clamp_min(0)
    return ProgramStats(
        num_votes.int(), vote_entropy, certaindex, reward_mean, best.where(num_rewards > 0, torch.nan), reward_variance,
        reward_weight, mixture_entropy, mean_entropy, disagreement, "ref",
    )  # fmt: skip


def _check(
    program_index: Tensor,
    answer_index: Tensor,
    rewards: Tensor,
    logits: Tensor | None,
    lse: Tensor | None,
    entropy: Tensor | None,
    at_answer: Tensor | None,
    temperature: float,
) -> None:
    """Raise ValueError for what can be seen without waiting for a GPU."""
    num_rows = len(program_index)
    given = {"program_index": program_index, "answer_index": answer_index, "rewards": rewards}
    if logits is not None:
        if logits.ndim != 2 or len(logits) != num_rows or logits.stride(1) != 1:
            shape, strides = tuple(logits.shape), logits.stride()
            raise ValueError(f"logits of shape {shape}, strides {strides}: give [{num_rows}, V], contiguous along V")
        if lse is None or entropy is None:
            raise ValueError("logits without lse or entropy: give those of row_stats(logits)")
        given |= {"lse": lse, "entropy": entropy}
    if at_answer is not None:
        given["at_answer"] = at_answer
    for name, tensor in given.items():
        if tensor.shape != (num_rows,) or not tensor.is_contiguous():
            raise ValueError(f"{name} of shape {tuple(tensor.shape)}: give [{num_rows}], contiguous")
    if not temperature >= LEAST_TEMPERATURE:
        raise ValueError(f"temperature={temperature} must be at least {LEAST_TEMPERATURE:g}")


@triton.jit(do_not_specialize=["num_rows"])  # or it would be compiled for batches of one and of sixteens by themselves
def _mixture_kernel(
    logits_ptr, vocab_size, stride_row, lse_ptr, program_index_ptr, at_answer_ptr, num_rows, parts_ptr,
    BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program per (program, BLOCK_V ids): the ids' part of the entropy of the mean distribution [P, S]."""
    program = tl.program_id(0)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_v = offs_v < vocab_size
    offs_b = tl.arange(0, BLOCK_B)
    is_standing = _is_of(program, program_index_ptr, at_answer_ptr, offs_b, num_rows)  # [B]
    total = tl.zeros([BLOCK_V], tl.float32)
    row = tl.min(tl.where(is_standing, offs_b, BLOCK_B))
    while row < num_rows:
        x = tl.load(logits_ptr + tl.cast(row, tl.int64) * stride_row + offs_v, mask_v, other=float("-inf"))  # [BLOCK_V]
        total += tl.exp(x.to(tl.float32) - tl.load(lse_ptr + row))
        row = tl.min(tl.where(is_standing & (offs_b > row), offs_b, BLOCK_B))
    mean = total / tl.maximum(tl.sum(is_standing.to(tl.int32)), 1)
    part = -tl.sum(mean * tl.log(tl.where(mean == 0, 1.0, mean)))
    tl.store(parts_ptr + program * tl.num_programs(1) + tl.program_id(1), part)


@triton.jit(do_not_specialize=["num_rows"])
def _program_stats_kernel(
    program_index_ptr, answer_index_ptr, rewards_ptr, num_rows, inverse_temperature,
    num_votes_ptr, votes_ptr, reward_ptr, reward_weight_ptr,
    entropy_ptr, at_answer_ptr, parts_ptr, num_splits, mixture_ptr,
    BLOCK_B: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program per program looks at all rows."""
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    offs_b = tl.arange(0, BLOCK_B)
    mask_b = offs_b < num_rows
    is_mine = _is_of(program, program_index_ptr, None, offs_b, num_rows)  # [B]

    answer = tl.load(answer_index_ptr + offs_b, mask_b, other=-1)  # [B]
    has_voted = is_mine & (answer >= 0)
    num_same = tl.zeros([BLOCK_B], tl.int32)  # votes for the answer of each row
    for first in range(0, num_rows, BLOCK_J):
        offs_j = first + tl.arange(0, BLOCK_J)
        is_other = _is_of(program, program_index_ptr, None, offs_j, num_rows)
        other = tl.load(answer_index_ptr + offs_j, offs_j < num_rows, other=-1)  # [BLOCK_J]
        num_same += tl.sum(((answer[:, None] == other[None, :]) & is_other[None, :]).to(tl.int32), axis=1)
    num_votes = tl.sum(has_voted.to(tl.int32))
    share = num_same.to(tl.float32) / tl.maximum(num_votes, 1).to(tl.float32)
    vote_entropy = 0.0 - tl.sum(tl.log(tl.where(has_voted, share, 1.0))) / tl.maximum(num_votes, 1).to(tl.float32)
    certaindex = tl.maximum(1.0 - vote_entropy / tl.log(tl.maximum(num_votes, 2).to(tl.float32)), 0.0)
    tl.store(num_votes_ptr + program, num_votes)
    tl.store(votes_ptr + program, vote_entropy)
    tl.store(votes_ptr + num_programs + program, tl.where(num_votes > 1, certaindex, 0.0))

    reward = tl.load(rewards_ptr + offs_b, mask_b, other=float("nan")).to(tl.float32)  # [B]
    has_reward = is_mine & (reward == reward)
    best = tl.max(tl.where(has_reward, reward, float("-inf")))
    mean = _mean(reward, has_reward)
    distance = tl.where(has_reward, reward - mean, 0.0)
    weight = tl.where(has_reward, tl.exp(tl.where(has_reward, reward - best, 0.0) * inverse_temperature), 0.0)
    tl.store(reward_ptr + program, mean)
    tl.store(reward_ptr + num_programs + program, tl.where(best > float("-inf"), best, float("nan")))
    tl.store(reward_ptr + 2 * num_programs + program, _mean(distance * distance, has_reward))
    tl.store(reward_weight_ptr + offs_b, weight / tl.maximum(tl.sum(weight), 1.0), has_reward)  # of the best: 1

    if parts_ptr is not None:
        is_standing = _is_of(program, program_index_ptr, at_answer_ptr, offs_b, num_rows)
        row_entropy = tl.load(entropy_ptr + offs_b, mask_b, other=0.0)  # [B]
        offs_s = tl.arange(0, BLOCK_S)
        parts = tl.load(parts_ptr + program * num_splits + offs_s, offs_s < num_splits, other=0.0)  # [S]
        mean_entropy = _mean(row_entropy, is_standing)
        mixture_entropy = tl.where(mean_entropy == mean_entropy, tl.sum(parts), float("nan"))
        disagreement = mixture_entropy - mean_entropy
        tl.store(mixture_ptr + program, mixture_entropy)
        tl.store(mixture_ptr + num_programs + program, mean_entropy)
        tl.store(mixture_ptr + 2 * num_programs + program, tl.where(disagreement < 0, 0.0, disagreement))


@triton.jit
def _is_of(program, program_index_ptr, at_answer_ptr, offs_b, num_rows):
    """[B]: which rows are of the program, and stand at an answer if that is asked."""
    mask_b = offs_b < num_rows
    is_of = tl.load(program_index_ptr + offs_b, mask_b, other=-1) == program
    if at_answer_ptr is not None:
        is_of = is_of & (tl.load(at_answer_ptr + offs_b, mask_b, other=0) != 0)
    return is_of


@triton.jit
def _mean(values, mask):
    """The mean of the values under the mask; NaN where there are none."""
    num = tl.sum(mask.to(tl.int32))
    total = tl.sum(tl.where(mask, values, 0.0))
    return tl.where(num > 0, total / tl.maximum(num, 1).to(tl.float32), float("nan"))
