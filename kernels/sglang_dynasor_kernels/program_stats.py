"""What the branches of a program say together at their answers: sums of their distributions in slots, and the entropy of the mean."""

# Triton's language is not typed: what its functions take and return inside a kernel is not what they declare.
# pyright: reportMissingParameterType=false, reportUntypedFunctionDecorator=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

Path = Literal["ref", "kernel"]

# Estimates: NOTES.md.
BLOCK_V = 4096  # probabilities of a row that a program keeps
BLOCK_S = 1024  # of a slot: few slots are added to in a step, and their rows one after another
BLOCK_B = 128  # rows that are counted at once

# Of a row, what it has said but for its last token: it cannot stand at an answer, nothing of a mark, the beginning of one, a mark and more.
NEVER, FRESH, BEGUN, SAYING = 0, 1, 2, 3
ENDS_MARK, IS_MARK = 1, 2  # of a token: it may be the end of a mark that was begun; a mark is in it


class Kept(NamedTuple):
    """Where rows are kept."""

    places: Tensor  # [N] int32; -1: not kept
    path: Path  # what ran: torch or the kernels


class Addition(NamedTuple):
    """What is added to a slot."""

    slot: int
    num_rows: int  # in the slot then, at least as many as `places`; as many: what was in it before is forgotten
    places: Sequence[int]  # of the rows kept, at least one


class Mixed(NamedTuple):
    """What slots hold now."""

    entropy: Tensor  # [T] float32, nats: of the mean of the distributions in the slot
    path: Path


def keep_rows(
    kept: Tensor,
    logits: Tensor,
    lse: Tensor | None,
    tokens: Tensor,
    standing: Tensor,
    marks: Tensor,
    first: int,
    end: int,
    *,
    rows: Tensor | None = None,
    path: Path | None = None,
) -> Kept:
    """Keep the distributions of the rows that may stand at an answer, until the host knows whether they do. Nothing synchronises.

    Those are the rows that are SAYING; then those FRESH or BEGUN whose last token makes it a mark: `standing` and its `marks` are SAYING
    or more together. In this order, and within it in that of the rows, they get the places from `first` on; those for which there is none before `end`
    are not kept. Of other rows nothing is read.

    Args:
        kept: [K, V] float32, where they are put.
        logits: [B, V] float32, bfloat16 or float16, contiguous along V.
        lse: [N] float32, of `row_stats`; None: `logits` are log-probabilities.
        tokens: [B] int: the last token that each row of logits has read.
        standing: [N] int32: NEVER, FRESH, BEGUN or SAYING.
        marks: [V] int8: 0, ENDS_MARK or IS_MARK.
        first: the first place, 0 or more.
        end: the last place and one, at most K.
        rows: [N] int: the rows to look at; None for all B.
        path: for tests and timings. None: "ref" on the CPU, else "kernel".

    Raises:
        ValueError: an argument is not as above.

    A row that `row_stats` reports is kept as NaN.
    """
    if path == "ref" or (path is None and logits.device.type == "cpu"):
        return keep_rows_ref(kept, logits, lse, tokens, standing, marks, first, end, rows=rows)
    _check_keep(kept, logits, lse, tokens, standing, marks, first, end, rows)
    num_rows, vocab_size = len(standing), logits.shape[1]
    places = torch.empty_like(standing)
    if num_rows:
        keep_kernel[(max(1, min(num_rows, end - first)), triton.cdiv(vocab_size, BLOCK_V))](
            kept, logits, vocab_size, logits.stride(0), lse, tokens, standing, marks, rows, places, num_rows, first, end,
            BLOCK_B=BLOCK_B, BLOCK_V=BLOCK_V, num_warps=8,
        )  # fmt: skip
    return Kept(places, "kernel")


def keep_rows_ref(
    kept: Tensor,
    logits: Tensor,
    lse: Tensor | None,
    tokens: Tensor,
    standing: Tensor,
    marks: Tensor,
    first: int,
    end: int,
    *,
    rows: Tensor | None = None,
) -> Kept:
    """`keep_rows` in plain torch, in the type of `kept`."""
    _check_keep(kept, logits, lse, tokens, standing, marks, first, end, rows)
    places = torch.full_like(standing, -1)
    # numpy: it runs in every step of a CPU engine, mostly to find nobody, and torch's calls cost ten times as much.
    given = standing.cpu().numpy()
    read = (tokens if rows is None else tokens[rows]).cpu().numpy()
    is_known = (read >= 0) & (read < len(marks))
    stands = given + marks.cpu().numpy()[read * is_known] * is_known >= SAYING
    if stands.any():
        says = given == SAYING
        ranked = [*says.nonzero()[0].tolist(), *(stands & ~says).nonzero()[0].tolist()]
        order = torch.tensor(ranked[: end - first], dtype=torch.int64, device=places.device)
        places[order] = torch.arange(first, first + len(order), dtype=places.dtype, device=places.device)
        x = logits[order if rows is None else rows[order]].to(kept.dtype)
        kept[first : first + len(order)] = (x if lse is None else x - lse[order, None]).exp()
    return Kept(places, "ref")


def add_rows(total: Tensor, kept: Tensor, additions: Sequence[Addition], *, path: Path | None = None) -> Mixed:
    """Add rows that were kept to slots, in order, and say what each slot holds then. The same bits in every run, nothing synchronises.

    Args:
        total: [S, V] float32: the sums.
        kept: [K, V] float32, of `keep_rows`.
        additions: T of them, each of another slot.
        path: for tests and timings. None: "ref" on the CPU, else "kernel".

    Returns:
        The slots' entropies in the order of `additions`. No additions: an empty tensor, no launch.

    Raises:
        ValueError: an argument is not as above.

    A row of NaN makes its own slot NaN, and no other. Error: README.md, "Tolerances".
    """
    if path == "ref" or (path is None and total.device.type == "cpu"):
        return add_rows_ref(total, kept, additions)
    _check_add(total, kept, additions)
    num_slots, vocab_size = len(additions), total.shape[1]
    num_splits = triton.cdiv(vocab_size, BLOCK_S)
    entropy, parts = total.new_empty(num_slots), total.new_empty(num_slots, num_splits)
    if num_slots:
        plan = _plan(additions, total.device)
        add_kernel[(num_slots, num_splits)](
            total, kept, vocab_size, plan, num_slots, parts, BLOCK_V=BLOCK_S, num_warps=4
        )
        block_p = max(16, triton.next_power_of_2(num_splits))
        entropy_kernel[(num_slots,)](parts, num_splits, entropy, BLOCK_P=block_p, num_warps=1)
    return Mixed(entropy, "kernel")


def add_rows_ref(total: Tensor, kept: Tensor, additions: Sequence[Addition]) -> Mixed:
    """`add_rows` in plain torch, in the type of `total`."""
    _check_add(total, kept, additions)
    if not additions:
        return Mixed(total.new_empty(0), "ref")
    for slot, num_rows, places in additions:
        row = total[slot]
        if num_rows == len(places):
            row.zero_()
        for place in places:
            row += kept[place]
    slots, nums, _ = zip(*additions, strict=True)
    mean = total[list(slots)] / total.new_tensor(nums)[:, None]
    entropy = -torch.special.xlogy(mean, mean).sum(1)
    return Mixed(entropy, "ref")


def _plan(additions: Sequence[Addition], device: torch.device) -> Tensor:
    """Additions as one tensor of int32: the T slots, their T numbers of rows, where the places of each begin (T + 1), the places."""
    slots, nums, places = zip(*additions, strict=True)
    starts = accumulate(map(len, places), initial=0)
    values = [*slots, *nums, *starts, *chain.from_iterable(places)]
    plan = torch.tensor(values, dtype=torch.int32, pin_memory=device.type == "cuda")
    return plan.to(device, non_blocking=True)


def _check_keep(
    kept: Tensor,
    logits: Tensor,
    lse: Tensor | None,
    tokens: Tensor,
    standing: Tensor,
    marks: Tensor,
    first: int,
    end: int,
    rows: Tensor | None,
) -> None:
    """Raise ValueError for what can be seen without waiting for a GPU."""
    num_rows, (batch_size, vocab_size) = len(standing), logits.shape
    wanted = {
        "kept": (kept, (len(kept), vocab_size)),
        "lse": (lse, (num_rows,)),
        "tokens": (tokens, (batch_size,)),
        "standing": (standing, (batch_size if rows is None else len(rows),)),
        "marks": (marks, (vocab_size,)),
        "rows": (rows, (num_rows,)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and not (tensor.shape == shape and tensor.is_contiguous()):
            raise ValueError(f"{name} of shape {tuple(tensor.shape)}: give {list(shape)}, contiguous")
    if logits.stride(1) != 1:
        raise ValueError(f"logits with strides {logits.stride()}: give them contiguous along V")
    if not 0 <= first <= end <= len(kept):
        raise ValueError(f"places from {first} to {end} are outside 0 to {len(kept)}")


def _check_add(total: Tensor, kept: Tensor, additions: Sequence[Addition]) -> None:
    if total.shape[1:] != kept.shape[1:] or not (total.is_contiguous() and kept.is_contiguous()):
        raise ValueError(f"total of shape {tuple(total.shape)}, kept {tuple(kept.shape)}: give [S, V] and [K, V]")
    slots = [addition.slot for addition in additions]
    if len({*slots}) < len(slots) or not all(0 <= slot < len(total) for slot in slots):
        raise ValueError(f"slots {slots}: give each once, from 0 to {len(total) - 1}")
    for slot, num_rows, places in additions:
        if not 0 < len(places) <= num_rows or not all(0 <= place < len(kept) for place in places):
            raise ValueError(
                f"slot {slot} of {num_rows} rows with places {list(places)}: give 1 to {num_rows}, from 0 to {len(kept) - 1}"
            )


@triton.jit(do_not_specialize=["num_rows", "first", "end"])  # they change from step to step
def keep_kernel(
    kept_ptr, logits_ptr, vocab_size, stride_row, lse_ptr, tokens_ptr, standing_ptr, marks_ptr, rows_ptr, places_ptr,
    num_rows, first, end, BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program per (place, BLOCK_V ids) looks for the row that is kept there; with none it reads no logits. The first says which is where."""
    rank = tl.program_id(0)
    is_first = rank + tl.program_id(1) == 0
    num_before = 0  # of those that only may stand at an answer: all that do
    for start in range(0, num_rows, BLOCK_B):
        offs_b = start + tl.arange(0, BLOCK_B)
        num_before += tl.sum((tl.load(standing_ptr + offs_b, offs_b < num_rows, other=0) == 3).to(tl.int32))
    num_saying, i = 0, -1
    for start in range(0, num_rows, BLOCK_B):
        offs_b = start + tl.arange(0, BLOCK_B)
        mask_b = offs_b < num_rows
        standing = tl.load(standing_ptr + offs_b, mask_b, other=0)  # [BLOCK_B]
        row = tl.load(rows_ptr + offs_b, mask_b, other=0) if rows_ptr is not None else offs_b
        may = (standing == 1) | (standing == 2)
        token = tl.load(tokens_ptr + row, may, other=-1)
        mark = tl.load(marks_ptr + token, (token >= 0) & (token < vocab_size), other=0)
        says = (standing == 3).to(tl.int32)
        stands = (may & (standing + mark >= 3)).to(tl.int32)
        ranks = tl.where(says != 0, num_saying + tl.cumsum(says) - 1, -1)
        ranks = tl.where(stands != 0, num_before + tl.cumsum(stands) - 1, ranks)
        i = tl.maximum(i, tl.max(tl.where(ranks == rank, offs_b, -1)))
        if is_first:
            places = tl.where((ranks >= 0) & (ranks < end - first), first + ranks, -1)
            tl.store(places_ptr + offs_b, places, mask_b)
        num_saying += tl.sum(says)
        num_before += tl.sum(stands)
    if (i >= 0) & (rank < end - first):
        offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
        mask_v = offs_v < vocab_size
        kept_row = tl.cast(tl.load(rows_ptr + i) if rows_ptr is not None else i, tl.int64)
        x = tl.load(logits_ptr + kept_row * stride_row + offs_v, mask_v, other=float("-inf")).to(
            tl.float32
        )  # [BLOCK_V]
        if lse_ptr is not None:
            x -= tl.load(lse_ptr + i)
        tl.store(kept_ptr + tl.cast(first + rank, tl.int64) * vocab_size + offs_v, tl.exp(x), mask_v)


@triton.jit(do_not_specialize=["num_slots"])
def add_kernel(total_ptr, kept_ptr, vocab_size, plan_ptr, num_slots, parts_ptr, BLOCK_V: tl.constexpr):
    """One program per (slot, BLOCK_V ids) adds the rows in their order, and leaves the ids' part of the entropy [T, splits]."""
    i = tl.program_id(0)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_v = offs_v < vocab_size
    slot = tl.load(plan_ptr + i).to(tl.int64)
    num_rows = tl.load(plan_ptr + num_slots + i)
    start = tl.load(plan_ptr + 2 * num_slots + i)
    end = tl.load(plan_ptr + 2 * num_slots + i + 1)
    places_ptr = plan_ptr + 3 * num_slots + 1
    total_ptr += slot * vocab_size + offs_v
    total = tl.load(total_ptr, mask_v & (num_rows > end - start), other=0.0)  # [BLOCK_V]
    for j in range(start, end):
        place = tl.load(places_ptr + j).to(tl.int64)
        total += tl.load(kept_ptr + place * vocab_size + offs_v, mask_v, other=0.0)
    tl.store(total_ptr, total, mask_v)
    mean = total / num_rows.to(tl.float32)
    part = 0.0 - tl.sum(mean * tl.log(tl.where(mean == 0, 1.0, mean)))
    tl.store(parts_ptr + i * tl.num_programs(1) + tl.program_id(1), part)


@triton.jit
def entropy_kernel(parts_ptr, num_splits, entropy_ptr, BLOCK_P: tl.constexpr):
    """One program per slot adds up its parts."""
    i = tl.program_id(0)
    offs_p = tl.arange(0, BLOCK_P)
    parts = tl.load(parts_ptr + i * num_splits + offs_p, offs_p < num_splits, other=0.0)  # [BLOCK_P]
    tl.store(entropy_ptr + i, tl.sum(parts))
