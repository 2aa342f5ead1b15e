"""Statistics of rows of logits in one read of them: entropy, confidence, the likeliest tokens, labels."""

# Triton's language is not typed: a kernel's parameters are not what a launch gives.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from functools import cache, partial
from math import inf, log
from typing import Literal, NamedTuple

import torch
import triton
from torch import Tensor

from sglang_dynasor_kernels.row_kernels import merge_kernel, row_kernel, split_kernel

Path = Literal["ref", "split", "row"]

# Measured on an H200 (NOTES.md).
GROUP = 128  # neighbouring ids of which the reading keeps the largest logit
CHUNK = 8192  # logits that a program reads at once and holds in registers
NUM_WARPS = 8
MAX_REGISTERS = 64  # of the "row" kernel: four programs on a multiprocessor
ROWS_PER_SM = 4  # from which on a row is one program's
PARTS_PER_SM = 16  # that rows are split into, as far as they have as many chunks

MAX_TOP_K = 64


class RowStats(NamedTuple):
    """Statistics of N rows, float32 but for the ids.

    A row that holds NaN or +inf, or nothing but -inf, has NaN in every float and -1 in every id.
    """

    lse: Tensor  # [N] log-sum-exp
    entropy: Tensor  # [N] nats, at least 0
    max_prob: Tensor  # [N] in (0, 1]
    confidence: Tensor  # [N] minus the mean of the finite top_logprobs, at least 0; high = peaked
    top_ids: Tensor  # [N, top_k] int32, likeliest first, lowest id first among equals; -1 where there are fewer
    top_logprobs: Tensor  # [N, top_k] descending; -inf where there are fewer
    label_logprobs: Tensor  # [N, L]; -inf for label id -1
    path: Path  # what ran: "ref" is torch; "split" gives a row to many programs, "row" to one


def choose_path(num_rows: int, vocab_size: int, num_sms: int) -> Path:
    """How the kernels share out the rows: split each one until whole rows fill the GPU."""
    return "row" if vocab_size <= CHUNK or num_rows >= ROWS_PER_SM * num_sms else "split"


def row_stats(
    logits: Tensor,
    label_ids: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    top_k: int = 20,
    path: Path | None = None,
) -> RowStats:
    """Statistics of rows of logits, from one read of them and without synchronising; the same bits in every run.

    Args:
        logits: [B, V] float32, bfloat16 or float16, contiguous along V. -inf is a token that cannot be sampled.
        label_ids: [N, L] or [L] int: tokens whose log-probabilities are wanted, of each row or of all; -1 for none.
        rows: [N] int: the rows to look at; None for all B. The others are not read, and nothing is copied.
        top_k: 1 to 64.
        path: for tests and timings. None: "ref" on the CPU, else what `choose_path` says.

    Returns:
        Statistics in the order of `rows`. No rows: empty tensors, no launch.

    Raises:
        ValueError: an argument is not as above. On the CPU also for a label id outside [-1, V).
        IndexError: on the CPU, `rows` outside [0, B).

    A GPU would have to synchronise to check ids: there such a label counts as -1, such a row as a row of NaN.
    Error: README.md, "Tolerances". Source: DeepConf, arXiv 2508.15260 (confidence).
    """
    if path == "ref" or (path is None and logits.device.type == "cpu"):
        return row_stats_ref(logits, label_ids, rows=rows, top_k=top_k, dtype=torch.float32)
    _check(logits, label_ids, rows, top_k)
    batch_size, vocab_size = logits.shape
    num_rows = batch_size if rows is None else len(rows)
    path = path or choose_path(num_rows, vocab_size, _num_sms(logits.device))

    if rows is not None:
        rows = rows.contiguous()
    num_labels, stride_label = 0, 0
    if label_ids is not None:
        label_ids = label_ids.contiguous()
        num_labels = label_ids.shape[-1]
        stride_label = num_labels if label_ids.ndim == 2 else 0
    new = partial(torch.empty, dtype=torch.float32, device=logits.device)
    stats = new(4, num_rows)
    top_ids = new(num_rows, top_k, dtype=torch.int32)
    top_logprobs = new(num_rows, top_k)
    label_logprobs = new(num_rows, num_labels)
    if num_rows:
        num_chunks = triton.cdiv(vocab_size, CHUNK)
        num_groups = num_chunks * (CHUNK // GROUP)
        block_c = max(16, triton.next_power_of_2(top_k + top_k // 4 + 4))  # mostly a few more than top_k are candidates
        groups = new(num_rows, num_groups, dtype=torch.int32)
        scratch = new(num_rows, 2, block_c, dtype=torch.int64)
        num_threads = 32 * NUM_WARPS
        source = (logits, rows, batch_size, vocab_size, logits.stride(0), groups)
        results = (label_ids, stride_label, stats, top_ids, top_logprobs, label_logprobs)
        tile = {
            "CHUNK": CHUNK,
            "GROUP": GROUP,
            "VECTOR": 16 // logits.element_size(),  # logits of a load
            "NUM_THREADS": num_threads,
            "num_warps": NUM_WARPS,
        }
        sizes = tile | {
            "NUM_LABELS": num_labels,
            "BLOCK_L": triton.next_power_of_2(max(1, num_labels)),
            "TOP_K": top_k,
            "BLOCK_C": block_c,
            "NUM_COLUMNS": max(16, 2 * triton.next_power_of_2(top_k)),
            "BLOCK_G": max(128, triton.next_power_of_2(num_groups)),
        }
        if path == "row":
            row_kernel[(num_rows,)](*source, scratch, *results, **sizes, maxnreg=MAX_REGISTERS)
        else:
            num_parts = max(1, min(num_chunks, PARTS_PER_SM * _num_sms(logits.device) // num_rows))
            sums = new(num_rows, 3, num_parts)
            split_kernel[(num_rows * num_parts,)](*source, sums, num_parts, **tile)
            block_p = triton.next_power_of_2(num_chunks)
            merge_kernel[(num_rows,)](*source, scratch, sums, num_parts, *results, **sizes, BLOCK_P=block_p)
    return RowStats(*stats, top_ids, top_logprobs, label_logprobs, path)


def row_stats_ref(
    logits: Tensor,
    label_ids: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    top_k: int = 20,
    dtype: torch.dtype = torch.float64,
) -> RowStats:
    """`row_stats` in plain torch, computed and returned in `dtype`."""
    _check(logits, label_ids, rows, top_k)
    vocab_size = logits.shape[1]
    if rows is not None:
        logits = logits.index_select(0, rows)
    if top_k > vocab_size:
        logits = torch.nn.functional.pad(logits, (0, top_k - vocab_size), value=float("-inf"))

    logprobs = logits.to(dtype).log_softmax(1)  # NaN throughout a row that is reported
    probs = (logprobs / log(2)).exp2()  # torch.exp takes 4 times as long on a CPU
    entropy = -(probs * logprobs.clamp_min(torch.finfo(dtype).min)).sum(1)

    top_ids = _top_ids(logits, top_k)
    top_logprobs = logprobs.gather(1, top_ids)
    is_token = top_logprobs > float("-inf")
    confidence = -top_logprobs.nan_to_num(neginf=0.0).sum(1) / is_token.sum(1)
    lse = logits.gather(1, top_ids[:, :1]).squeeze(1) - top_logprobs[:, 0]

    label_logprobs = logprobs[:, :0]
    if label_ids is not None:
        label_ids = label_ids.long().expand(len(logits), -1)
        known = label_ids.clamp(0, vocab_size - 1)
        absent = lse[:, None] - float("inf")  # -inf, but NaN in a row that is reported
        label_logprobs = logprobs.gather(1, known).where(label_ids == known, absent)
    return RowStats(
        lse, entropy, top_logprobs[:, 0].exp(), confidence, top_ids.int().where(is_token, -1), top_logprobs,
        label_logprobs, "ref",
    )  # fmt: skip


def row_confidence(logits: Tensor, *, top_k: int = 20) -> tuple[list[float], Tensor]:
    """What a CPU engine needs in every step: the confidence of each row, and the log-probabilities [B, V] float32.

    As `row_stats` defines them, in a fifth of its time: what else it tells is wanted of few rows, and can be read from
    the log-probabilities then. On a GPU `row_stats` is one read and writes no [B, V].

    Raises:
        ValueError: logits that are not [B, V] on the CPU, or `top_k` outside 1 to 64.
    """
    _check(logits, None, None, top_k)
    if logits.device.type != "cpu":
        raise ValueError(f"logits are on {logits.device}: row_confidence is for the CPU; use row_stats")
    logprobs = logits.float().log_softmax(1)
    num_top = min(top_k, logits.shape[1])
    scratch = logprobs.numpy().copy()  # numpy: its calls cost a third of torch's
    scratch.partition(scratch.shape[1] - num_top, axis=1)  # NaN goes last: such a row stays NaN
    top = scratch[:, -num_top:]
    confidence: list[float] = top.dot(_minus_mean(num_top).numpy()).tolist()  # a third of what top.sum(1) takes
    if inf in confidence:  # masked tokens have no part in the mean
        is_token = top != -inf
        confidence = (top.sum(1, where=is_token) / -is_token.sum(1)).tolist()
    return confidence, logprobs


@cache
def _minus_mean(num: int) -> Tensor:
    """The weights [num] of minus a mean."""
    return torch.full((num,), -1 / num, dtype=torch.float32)


def _top_ids(logits: Tensor, k: int) -> Tensor:
    """[N, k] int64: the ids of the k largest logits of each row, descending, the lowest id first among equals."""
    bits = (0.0 - logits.float()).view(torch.int32)  # ascending from here on; -0.0 and 0.0 become the same
    order = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)  # integers that sort like the floats
    ids = torch.arange(logits.shape[1], device=logits.device)
    keys = order.long().bitwise_left_shift_(32).bitwise_or_(ids)
    if keys.device.type == "cpu":  # numpy takes a quarter of the time of torch.topk
        keys.numpy().partition(k - 1, axis=1)
        keys = keys[:, :k]
        keys.numpy().sort(axis=1)
    else:
        keys = keys.topk(k, largest=False).values
    return keys & 0xFFFFFFFF


def _check(logits: Tensor, label_ids: Tensor | None, rows: Tensor | None, top_k: int) -> None:
    """Raise ValueError for what can be seen without waiting for a GPU."""
    if logits.ndim != 2 or logits.shape[1] == 0 or logits.stride(1) != 1:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)}, strides {logits.stride()}: give [B, V], contiguous along V"
        )
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"logits are {logits.dtype}: give float32, bfloat16 or float16")
    if not 1 <= top_k <= MAX_TOP_K:
        raise ValueError(f"top_k={top_k} is outside 1 to {MAX_TOP_K}")
    if rows is not None and rows.ndim != 1:
        raise ValueError(f"rows of shape {tuple(rows.shape)}: give [N]")
    if label_ids is None:
        return
    num_rows = len(logits if rows is None else rows)
    if label_ids.ndim not in (1, 2) or (label_ids.ndim == 2 and len(label_ids) != num_rows):
        raise ValueError(f"label_ids of shape {tuple(label_ids.shape)}: give [L] or [{num_rows}, L]")
    if label_ids.device.type == "cpu" and label_ids.numel():
        low, high = (int(bound) for bound in label_ids.aminmax())
        if low < -1 or high >= logits.shape[1]:
            raise ValueError(f"label_ids from {low} to {high} are outside -1 to {logits.shape[1] - 1}")


@cache
def _num_sms(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for the CPU, on which Triton interprets kernels."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
