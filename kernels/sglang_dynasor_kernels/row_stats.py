"""Statistics of rows of logits in one read of them: entropy, confidence, the likeliest tokens, labels."""

# Triton's language is not typed: what its functions take and return inside a kernel is not what they declare.
# pyright: reportMissingParameterType=false, reportUntypedFunctionDecorator=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false

from __future__ import annotations

from functools import cache, partial
from math import inf, log
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

Path = Literal["ref", "split", "row"]

# Estimates until they are timed on a GPU: NOTES.md.
GROUP = 128  # neighbouring ids of which the first pass keeps the largest logit
NUM_GROUPS = 64  # of a chunk, which a program reads at once and holds in registers
CHUNK = NUM_GROUPS * GROUP
NUM_WARPS = 8
PROGRAMS_PER_SM = 4  # with the registers below
MAX_REGISTERS = 64  # of the "row" kernel: its end, once a row, would take twice as many

EMPTY = tl.constexpr(-(2**63))  # the key of no token


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
    return "row" if vocab_size <= CHUNK or num_rows >= PROGRAMS_PER_SM * num_sms else "split"


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
        source = (logits, rows, batch_size, vocab_size, logits.stride(0))
        results = (label_ids, stride_label, stats, top_ids, top_logprobs, label_logprobs)
        tile = {"NUM_GROUPS": NUM_GROUPS, "GROUP": GROUP, "num_warps": NUM_WARPS}
        sizes = tile | {
            "NUM_LABELS": num_labels,
            "BLOCK_L": triton.next_power_of_2(max(1, num_labels)),
            "TOP_K": top_k,
            "BLOCK_K": max(2, triton.next_power_of_2(top_k)),
            "BLOCK_S": triton.next_power_of_2(num_chunks),
        }
        if path == "row":
            _row_stats_kernel[(num_rows,)](*source, *results, **sizes, maxnreg=MAX_REGISTERS)
        else:
            sums = new(3, num_rows, num_chunks)
            groups = new(num_rows, num_chunks, NUM_GROUPS)
            _row_stats_split_kernel[(num_rows, num_chunks)](*source, sums, groups, **tile)
            _row_stats_merge_kernel[(num_rows,)](*source, sums, groups, *results, **sizes)
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
    if not 1 <= top_k <= NUM_GROUPS:
        raise ValueError(f"top_k={top_k} is outside 1 to {NUM_GROUPS}")
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
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit(do_not_specialize=["batch_size"])  # it changes from step to step
def _row_stats_kernel(
    logits_ptr, rows_ptr, batch_size, vocab_size, stride_row,
    label_ids_ptr, stride_label, stats_ptr, top_ids_ptr, top_logprobs_ptr, label_logprobs_ptr,
    NUM_LABELS: tl.constexpr, BLOCK_L: tl.constexpr, TOP_K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
    NUM_GROUPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program per row reads its chunks one after the other."""
    row_ptr, num_ids = _find_row(logits_ptr, rows_ptr, batch_size, vocab_size, stride_row)
    offs_s = tl.arange(0, BLOCK_S)
    m = tl.full([BLOCK_S], float("-inf"), tl.float32)
    s = tl.full([BLOCK_S], 0.0, tl.float32)
    t = tl.full([BLOCK_S], 0.0, tl.float32)
    groups = tl.full([BLOCK_S, NUM_GROUPS], float("-inf"), tl.float32)
    for chunk in range(tl.cdiv(vocab_size, NUM_GROUPS * GROUP)):
        chunk_m, chunk_s, chunk_t, chunk_groups = _read_chunk(row_ptr, num_ids, chunk, NUM_GROUPS, GROUP)
        m = tl.where(offs_s == chunk, chunk_m, m)
        s = tl.where(offs_s == chunk, chunk_s, s)
        t = tl.where(offs_s == chunk, chunk_t, t)
        groups = tl.where(offs_s[:, None] == chunk, chunk_groups[None, :], groups)
    _write_row(
        row_ptr, num_ids, m, s, t, groups,
        label_ids_ptr, stride_label, stats_ptr, top_ids_ptr, top_logprobs_ptr, label_logprobs_ptr,
        NUM_LABELS, BLOCK_L, TOP_K, BLOCK_K, BLOCK_S, NUM_GROUPS, GROUP,
    )  # fmt: skip


@triton.jit(do_not_specialize=["batch_size"])  # it changes from step to step
def _row_stats_split_kernel(
    logits_ptr, rows_ptr, batch_size, vocab_size, stride_row, sums_ptr, groups_ptr,
    NUM_GROUPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program per (row, chunk) leaves the chunk's sums [3, N, S] and its groups' largest logits [N, S, G]."""
    row_ptr, num_ids = _find_row(logits_ptr, rows_ptr, batch_size, vocab_size, stride_row)
    chunk = tl.program_id(1)
    m, s, t, groups = _read_chunk(row_ptr, num_ids, chunk, NUM_GROUPS, GROUP)
    out = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + chunk
    size = tl.num_programs(0) * tl.num_programs(1)
    tl.store(sums_ptr + out, m)
    tl.store(sums_ptr + size + out, s)
    tl.store(sums_ptr + 2 * size + out, t)
    tl.store(groups_ptr + out * NUM_GROUPS + tl.arange(0, NUM_GROUPS), groups)


@triton.jit(do_not_specialize=["batch_size"])  # it changes from step to step
def _row_stats_merge_kernel(
    logits_ptr, rows_ptr, batch_size, vocab_size, stride_row, sums_ptr, groups_ptr,
    label_ids_ptr, stride_label, stats_ptr, top_ids_ptr, top_logprobs_ptr, label_logprobs_ptr,
    NUM_LABELS: tl.constexpr, BLOCK_L: tl.constexpr, TOP_K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
    NUM_GROUPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program per row merges what its chunks left."""
    row_ptr, num_ids = _find_row(logits_ptr, rows_ptr, batch_size, vocab_size, stride_row)
    num_chunks = tl.cdiv(vocab_size, NUM_GROUPS * GROUP)
    first = tl.program_id(0).to(tl.int64) * num_chunks
    size = tl.num_programs(0) * num_chunks
    offs_s = tl.arange(0, BLOCK_S)
    mask_s = offs_s < num_chunks
    m = tl.load(sums_ptr + first + offs_s, mask_s, other=float("-inf"))  # [S]
    s = tl.load(sums_ptr + size + first + offs_s, mask_s, other=0.0)  # [S]
    t = tl.load(sums_ptr + 2 * size + first + offs_s, mask_s, other=0.0)  # [S]
    offs_g = tl.arange(0, NUM_GROUPS)
    offs = (first + offs_s[:, None]) * NUM_GROUPS + offs_g[None, :]
    groups = tl.load(groups_ptr + offs, mask_s[:, None], other=float("-inf"))  # [S, G]
    _write_row(
        row_ptr, num_ids, m, s, t, groups,
        label_ids_ptr, stride_label, stats_ptr, top_ids_ptr, top_logprobs_ptr, label_logprobs_ptr,
        NUM_LABELS, BLOCK_L, TOP_K, BLOCK_K, BLOCK_S, NUM_GROUPS, GROUP,
    )  # fmt: skip


@triton.jit
def _find_row(logits_ptr, rows_ptr, batch_size, vocab_size, stride_row):
    """Where this program's row starts and how many ids it has: none if it is outside the batch."""
    row = tl.program_id(0).to(tl.int64)
    num_ids = vocab_size
    if rows_ptr is not None:
        row = tl.load(rows_ptr + row).to(tl.int64)
        is_row = (row >= 0) & (row < batch_size)
        row = tl.where(is_row, row, 0)
        num_ids = tl.where(is_row, vocab_size, 0)
    return logits_ptr + row * stride_row, num_ids


@triton.jit
def _read_chunk(row_ptr, num_ids, chunk, NUM_GROUPS: tl.constexpr, GROUP: tl.constexpr):
    """m = max(x), the sums of exp(x - m) and of exp(x - m) * (x - m), and the largest x of each group [G].

    The first sum is NaN if there is NaN or +inf, and 0 if there is nothing but -inf.
    """
    offs_g = chunk * NUM_GROUPS + tl.arange(0, NUM_GROUPS)
    ids = offs_g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(row_ptr + ids, ids < num_ids, other=float("-inf")).to(tl.float32)  # [G, GROUP]
    groups = tl.max(x, axis=1)
    m = tl.max(groups)
    e, ed = _exp_terms(x, m)
    return m, tl.sum(e), tl.sum(ed), groups


@triton.jit
def _exp_terms(x, m):
    """e = exp(x - m) and e * (x - m); both 0 for -inf."""
    d = x - tl.where(m > float("-inf"), m, 0.0)
    e = tl.exp(d)
    return e, e * tl.maximum(d, -100.0)  # e is as good as 0 below that


@triton.jit
def _write_row(
    row_ptr, num_ids, chunk_m, chunk_s, chunk_t, groups,
    label_ids_ptr, stride_label, stats_ptr, top_ids_ptr, top_logprobs_ptr, label_logprobs_ptr,
    NUM_LABELS: tl.constexpr, BLOCK_L: tl.constexpr, TOP_K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
    NUM_GROUPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Merge a row's chunks [S] and find the top k in the k groups [S, G] with the largest logits."""
    i = tl.program_id(0).to(tl.int64)
    num_rows = tl.num_programs(0)
    m = tl.max(chunk_m)
    scale, scaled = _exp_terms(chunk_m, m)
    s = tl.sum(chunk_s * scale)
    t = tl.sum(chunk_t * scale + chunk_s * scaled)
    is_good = s > 0
    s = tl.where(is_good, s, float("nan"))  # reported: through s in every float below
    log_s = tl.log(s)

    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < TOP_K
    offs_group = tl.arange(0, BLOCK_S)[:, None] * NUM_GROUPS + tl.arange(0, NUM_GROUPS)[None, :]
    top = _top_keys(groups, offs_group, is_good, TOP_K, BLOCK_K)
    ids = _key_ids(top)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    mask = ((top != EMPTY) & mask_k)[:, None] & (ids < num_ids)
    x = tl.load(row_ptr + ids, mask, other=float("-inf")).to(tl.float32)  # [BLOCK_K, GROUP]
    square: tl.constexpr = [BLOCK_K * GROUP // NUM_GROUPS, NUM_GROUPS]
    top = _top_keys(tl.reshape(x, square), tl.reshape(ids, square), is_good, TOP_K, BLOCK_K)

    logprobs = _key_values(top) - m - log_s  # [BLOCK_K]
    is_token = (logprobs > float("-inf")) & mask_k
    confidence = -tl.sum(tl.where(is_token, logprobs, 0.0)) / tl.sum(is_token.to(tl.float32))
    tl.store(top_ids_ptr + i * TOP_K + offs_k, tl.where(is_token, _key_ids(top), -1), mask_k)
    tl.store(top_logprobs_ptr + i * TOP_K + offs_k, logprobs, mask_k)

    tl.store(stats_ptr + i, m + log_s)
    tl.store(stats_ptr + num_rows + i, log_s - t / s)
    tl.store(stats_ptr + 2 * num_rows + i, 1.0 / s)
    tl.store(stats_ptr + 3 * num_rows + i, confidence)

    if NUM_LABELS > 0:
        offs_l = tl.arange(0, BLOCK_L)
        mask_l = offs_l < NUM_LABELS
        label = tl.load(label_ids_ptr + i * stride_label + offs_l, mask_l, other=-1)
        is_label = (label >= 0) & (label < num_ids)
        logit = tl.load(row_ptr + label, is_label, other=float("-inf")).to(tl.float32)
        tl.store(label_logprobs_ptr + i * NUM_LABELS + offs_l, logit - m - log_s, mask_l)


@triton.jit
def _top_keys(x, ids, is_good, TOP_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_K] descending: the keys of the TOP_K largest x [R, C] or more, EMPTY at the end."""
    offs_k = tl.arange(0, BLOCK_K)
    top = tl.full([BLOCK_K], EMPTY, tl.int64)
    best, keys = _column_tops(x, ids)
    # One round takes the largest of each column. Another is needed only if a column holds two of the top k.
    while is_good & (tl.max(keys) > tl.sum(tl.where(offs_k == TOP_K - 1, top, 0))):
        rank_top = offs_k + _num_above(top, keys)
        rank_keys = _num_above(keys, keys) + _num_above(keys, top)
        top = tl.maximum(_at_ranks(top, rank_top, offs_k), _at_ranks(keys, rank_keys, offs_k))
        x = tl.where(ids == best[None, :], float("-inf"), x)
        best, keys = _column_tops(x, ids)
    return top


@triton.jit
def _num_above(keys, others):
    """How many of `others` are larger than each key."""
    return tl.sum((others[None, :] > keys[:, None]).to(tl.int32), axis=1)


@triton.jit
def _at_ranks(keys, ranks, offs_k):
    """The key of each rank in `offs_k`; EMPTY where there is none."""
    return tl.max(tl.where(ranks[None, :] == offs_k[:, None], keys[None, :], EMPTY), axis=1)


@triton.jit
def _column_tops(x, ids):
    """[C], [C]: the id of the largest x of each column, the lowest among equals, and its key.

    Keys are integers that sort like (x, -id); EMPTY for -inf.
    """
    value = tl.max(x, axis=0)
    best = tl.min(tl.where(x == value[None, :], ids, 0x7FFFFFFF), axis=0)
    bits = (value + 0.0).to(tl.int32, bitcast=True)  # + 0.0: -0.0 equals 0.0
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = (order.to(tl.int64) << 32) | (0x7FFFFFFF - best)
    return best, tl.where(value > float("-inf"), key, EMPTY)


@triton.jit
def _key_ids(keys):
    return 0x7FFFFFFF - keys.to(tl.int32)


@triton.jit
def _key_values(keys):
    order = (keys >> 32).to(tl.int32)
    value = (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return tl.where(keys != EMPTY, value, float("-inf"))
