"""The kernels of `row_stats`: reading a row, and choosing the likeliest tokens. Design and measurements: NOTES.md."""

# Triton's language is not typed: what its functions take and return inside a kernel is not what they declare.
# pyright: reportMissingParameterType=false, reportUntypedFunctionDecorator=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-2139095040)  # `_order` of the least finite float32
NOTHING = tl.constexpr(-(2**31))  # below the order of anything
EMPTY = tl.constexpr(-(2**63) + 4096)  # below the key of anything, with room for keys below it


@triton.jit(do_not_specialize=["batch_size"])  # it changes from step to step
def row_kernel(
    logits_ptr, rows_ptr, batch_size, vocab_size, stride_row, groups_ptr, scratch_ptr,
    label_ids_ptr, stride_label, stats_ptr, top_ids_ptr, top_logprobs_ptr, label_logprobs_ptr,
    NUM_LABELS: tl.constexpr, BLOCK_L: tl.constexpr, TOP_K: tl.constexpr, BLOCK_C: tl.constexpr,
    NUM_COLUMNS: tl.constexpr, BLOCK_G: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, VECTOR: tl.constexpr,
    NUM_THREADS: tl.constexpr,
):  # fmt: skip
    """One program per row reads it and chooses."""
    i = tl.program_id(0).to(tl.int64)
    row_ptr, num_ids = _find_row(i, logits_ptr, rows_ptr, batch_size, vocab_size, stride_row)
    num_chunks = tl.cdiv(vocab_size, CHUNK)
    num_groups = num_chunks * (CHUNK // GROUP)
    groups_ptr += i * num_groups
    m, s, t = _read(row_ptr, num_ids, groups_ptr, 0, num_chunks, CHUNK, GROUP, VECTOR, NUM_THREADS)
    tl.debug_barrier()  # every thread sees what all have stored
    _choose(
        i, tl.num_programs(0), row_ptr, num_ids, m, s, t, groups_ptr, num_groups, scratch_ptr,
        label_ids_ptr, stride_label, stats_ptr, top_ids_ptr, top_logprobs_ptr, label_logprobs_ptr,
        NUM_LABELS, BLOCK_L, TOP_K, BLOCK_C, NUM_COLUMNS, BLOCK_G, GROUP, VECTOR, NUM_THREADS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["batch_size", "num_parts"])
def split_kernel(
    logits_ptr, rows_ptr, batch_size, vocab_size, stride_row, groups_ptr, sums_ptr, num_parts,
    CHUNK: tl.constexpr, GROUP: tl.constexpr, VECTOR: tl.constexpr, NUM_THREADS: tl.constexpr,
):  # fmt: skip
    """One program per (row, part of it) leaves the part's sums [N, 3, S] and its groups' largest logits."""
    i = (tl.program_id(0) // num_parts).to(tl.int64)
    part = tl.program_id(0) % num_parts
    row_ptr, num_ids = _find_row(i, logits_ptr, rows_ptr, batch_size, vocab_size, stride_row)
    num_chunks = tl.cdiv(vocab_size, CHUNK)
    groups_ptr += i * num_chunks * (CHUNK // GROUP)
    first, end = part * num_chunks // num_parts, (part + 1) * num_chunks // num_parts
    m, s, t = _read(row_ptr, num_ids, groups_ptr, first, end, CHUNK, GROUP, VECTOR, NUM_THREADS)
    sums_ptr += i * 3 * num_parts + part
    tl.store(sums_ptr, m)
    tl.store(sums_ptr + num_parts, s)
    tl.store(sums_ptr + 2 * num_parts, t)


@triton.jit(do_not_specialize=["batch_size", "num_parts"])
def merge_kernel(
    logits_ptr, rows_ptr, batch_size, vocab_size, stride_row, groups_ptr, scratch_ptr, sums_ptr, num_parts,
    label_ids_ptr, stride_label, stats_ptr, top_ids_ptr, top_logprobs_ptr, label_logprobs_ptr,
    NUM_LABELS: tl.constexpr, BLOCK_L: tl.constexpr, TOP_K: tl.constexpr, BLOCK_C: tl.constexpr,
    NUM_COLUMNS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr, CHUNK: tl.constexpr,
    GROUP: tl.constexpr, VECTOR: tl.constexpr, NUM_THREADS: tl.constexpr,
):  # fmt: skip
    """One program per row merges what its parts left and chooses."""
    i = tl.program_id(0).to(tl.int64)
    row_ptr, num_ids = _find_row(i, logits_ptr, rows_ptr, batch_size, vocab_size, stride_row)
    num_groups = tl.cdiv(vocab_size, CHUNK) * (CHUNK // GROUP)
    offs_p = tl.arange(0, BLOCK_P)
    mask_p = offs_p < num_parts
    sums_ptr += i * 3 * num_parts + offs_p
    m = tl.load(sums_ptr, mask_p, other=float("-inf"))
    s = tl.load(sums_ptr + num_parts, mask_p, other=0.0)
    t = tl.load(sums_ptr + 2 * num_parts, mask_p, other=0.0)
    m, s, t = _merge(m, s, t)
    _choose(
        i, tl.num_programs(0), row_ptr, num_ids, m, s, t, groups_ptr + i * num_groups, num_groups, scratch_ptr,
        label_ids_ptr, stride_label, stats_ptr, top_ids_ptr, top_logprobs_ptr, label_logprobs_ptr,
        NUM_LABELS, BLOCK_L, TOP_K, BLOCK_C, NUM_COLUMNS, BLOCK_G, GROUP, VECTOR, NUM_THREADS,
    )  # fmt: skip


@triton.jit
def _find_row(i, logits_ptr, rows_ptr, batch_size, vocab_size, stride_row):
    """Where the i-th row to look at starts and how many ids it has: none if it is outside the batch."""
    row = i
    num_ids = vocab_size
    if rows_ptr is not None:
        row = tl.load(rows_ptr + i).to(tl.int64)
        is_row = (row >= 0) & (row < batch_size)
        row = tl.where(is_row, row, 0)
        num_ids = tl.where(is_row, vocab_size, 0)
    return logits_ptr + row * stride_row, num_ids


@triton.jit
def _read(
    row_ptr, num_ids, groups_ptr, first, end,
    CHUNK: tl.constexpr, GROUP: tl.constexpr, VECTOR: tl.constexpr, NUM_THREADS: tl.constexpr,
):  # fmt: skip
    """m = max(x), the sums of exp(x - m) and of exp(x - m) * (x - m) of some chunks; their groups' orders are stored.

    The first sum is NaN if there is NaN or +inf, and 0 if there is nothing but -inf. Every thread keeps sums of its own,
    so that no thread waits for another before the end.
    """
    width: tl.constexpr = NUM_THREADS * VECTOR
    height: tl.constexpr = CHUNK // width
    lanes: tl.constexpr = GROUP // VECTOR
    offs = tl.arange(0, height)[:, None] * width + tl.arange(0, width)[None, :]
    offs_g = tl.arange(0, height)[:, None] * (width // GROUP) + tl.arange(0, width // GROUP)[None, :]
    m = tl.full([NUM_THREADS], float("-inf"), tl.float32)
    s = tl.full([NUM_THREADS], 0.0, tl.float32)
    t = tl.full([NUM_THREADS], 0.0, tl.float32)
    for chunk in range(first, end):
        ids = chunk * CHUNK + offs
        if (chunk + 1) * CHUNK <= num_ids:  # masks would cost an instruction per logit
            x = tl.load(row_ptr + ids)
        else:
            x = tl.load(row_ptr + ids, ids < num_ids, other=float("-inf"))
        x = tl.reshape(x.to(tl.float32), [height, NUM_THREADS, VECTOR])
        largest = tl.max(x, axis=2)
        groups = tl.max(tl.reshape(_order(largest), [height, NUM_THREADS // lanes, lanes]), axis=2)
        tl.store(groups_ptr + chunk * (CHUNK // GROUP) + offs_g, groups)
        new = tl.maximum(m, tl.max(largest, axis=0))
        s, t = _rescaled(m, s, t, new)
        m = new
        e, ed = _exp_terms(x, new[None, :, None])
        s += tl.sum(tl.sum(e, axis=2), axis=0)
        t += tl.sum(tl.sum(ed, axis=2), axis=0)
    return _merge(m, s, t)


@triton.jit
def _merge(m, s, t):
    """The sums of several as one, relative to the largest m."""
    new = tl.max(m)
    s, t = tl.reduce(_rescaled(m, s, t, new), 0, _add)
    return new, s, t


@triton.jit
def _add(s, t, other_s, other_t):
    return s + other_s, t + other_t


@triton.jit
def _rescaled(m, s, t, new):
    """Sums relative to m as sums relative to `new`."""
    scale, scaled = _exp_terms(m, new)
    return s * scale, t * scale + s * scaled


@triton.jit
def _exp_terms(x, m):
    """e = exp(x - m) and e * (x - m); both 0 for -inf."""
    d = x - tl.where(m > float("-inf"), m, 0.0)
    e = tl.exp2(d * LOG2_E)  # exp would care for denormals, with three instructions more
    return e, e * tl.maximum(d, -100.0)  # e is as good as 0 below that


@triton.jit
def _choose(
    i, num_rows, row_ptr, num_ids, m, s, t, groups_ptr, num_groups, scratch_ptr,
    label_ids_ptr, stride_label, stats_ptr, top_ids_ptr, top_logprobs_ptr, label_logprobs_ptr,
    NUM_LABELS: tl.constexpr, BLOCK_L: tl.constexpr, TOP_K: tl.constexpr, BLOCK_C: tl.constexpr,
    NUM_COLUMNS: tl.constexpr, BLOCK_G: tl.constexpr, GROUP: tl.constexpr, VECTOR: tl.constexpr,
    NUM_THREADS: tl.constexpr,
):  # fmt: skip
    """Find the top k in the groups whose largest logits are the largest, and write the row's statistics.

    What may be of the top k goes through scratch [N, 2, BLOCK_C] int64: first the groups, then the keys of logits.
    """
    is_good = s > 0
    s = tl.where(is_good, s, float("nan"))  # reported: through s in every float below
    log_s = tl.log(s)
    offs_c = tl.arange(0, BLOCK_C)
    scratch_ptr += i * 2 * BLOCK_C

    group = tl.arange(0, BLOCK_G // 128)[:, None] * 128 + tl.arange(0, 128)[None, :]
    order = tl.load(groups_ptr + group, group < tl.where(is_good, num_groups, 0), other=NOTHING)
    if BLOCK_G > NUM_THREADS * 4:  # a column is what four threads hold: less goes from thread to thread
        columns = tl.reshape(order, [BLOCK_G // (NUM_THREADS * 4), NUM_THREADS, 4])
        columns = tl.reshape(tl.max(tl.max(columns, axis=2), axis=0), [NUM_COLUMNS, NUM_THREADS // NUM_COLUMNS])
    else:
        columns = tl.reshape(order, [NUM_COLUMNS, BLOCK_G // NUM_COLUMNS])
    columns = tl.max(columns, axis=1)
    low, high = _lower_bound(columns, TOP_K), tl.max(columns)
    is_in, num = _candidates(order, group, low, high, TOP_K, BLOCK_C)
    tl.store(scratch_ptr + _places(is_in), group, is_in)
    tl.debug_barrier()

    group = tl.load(scratch_ptr + offs_c, offs_c < num, other=0).to(tl.int32)
    ids = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(row_ptr + ids, (offs_c < num)[:, None] & (ids < num_ids), other=float("-inf"))
    order = _order(x.to(tl.float32))
    columns = tl.reshape(order, [BLOCK_C * GROUP // (NUM_THREADS * VECTOR), NUM_THREADS, VECTOR])
    columns = tl.reshape(tl.max(tl.max(columns, axis=2), axis=0), [NUM_COLUMNS, NUM_THREADS // NUM_COLUMNS])
    low = tl.maximum(low, _lower_bound(tl.max(columns, axis=1), TOP_K))
    is_in, num = _candidates(order, ids, low, high, TOP_K, BLOCK_C)
    tl.store(scratch_ptr + BLOCK_C + _places(is_in), _keys(order, ids), is_in)
    tl.debug_barrier()

    is_token = offs_c < num
    keys = tl.load(scratch_ptr + BLOCK_C + offs_c, is_token, other=0)
    keys = tl.where(is_token, keys, EMPTY - offs_c.to(tl.int64))
    rank = tl.sum((keys[None, :] > keys[:, None]).to(tl.int32), axis=1)
    ids = 0x7FFFFFFF - keys.to(tl.int32)
    logprobs = _value((keys >> 32).to(tl.int32)) - m - log_s
    logprobs = tl.where(is_token, logprobs, tl.where(is_good, float("-inf"), float("nan")))
    is_top = rank < TOP_K
    tl.store(top_ids_ptr + i * TOP_K + rank, tl.where(is_token, ids, -1), is_top)
    tl.store(top_logprobs_ptr + i * TOP_K + rank, logprobs, is_top)

    is_top = is_top & is_token
    confidence = -tl.sum(tl.where(is_top, logprobs, 0.0)) / tl.sum(is_top.to(tl.float32))
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
def _lower_bound(columns, TOP_K: tl.constexpr):
    """An order that the TOP_K largest reach: that of the TOP_K-th largest of the columns' maxima [C]."""
    num = tl.sum((columns[None, :] >= columns[:, None]).to(tl.int32), axis=1)
    return tl.maximum(tl.max(tl.where(num >= TOP_K, columns, NOTHING)), LOWEST)


@triton.jit
def _candidates(order, ids, low, high, TOP_K: tl.constexpr, BLOCK_C: tl.constexpr):
    """[A, B]: what may be of the top k, and how many: TOP_K if there are as many, and no more than BLOCK_C.

    Those are the ones that reach `low`: mostly a few more than TOP_K. Only where they are too many is a higher bound looked
    for, by halving, among the keys up to `high`.
    """
    is_in = order >= low
    num = _num(is_in)
    if num > BLOCK_C:
        keys = _keys(order, ids)
        least = low.to(tl.int64) << 32
        most = (high.to(tl.int64) + 1) << 32
        while num > BLOCK_C:
            middle = (least & most) + ((least ^ most) >> 1)  # their mean: the sum could overflow
            num_above = _num(keys >= middle)
            if num_above >= TOP_K:
                least = middle
                num = num_above
            else:
                most = middle
        is_in = keys >= least
    return is_in, num


@triton.jit
def _num(mask):
    return tl.sum(tl.sum(mask.to(tl.int32), axis=1), axis=0)


@triton.jit
def _places(is_in):
    """[A, B]: of each that is in, how many are before it."""
    is_in = is_in.to(tl.int32)
    num = tl.sum(is_in, axis=1)
    return tl.cumsum(is_in, axis=1) - is_in + (tl.cumsum(num, axis=0) - num)[:, None]


@triton.jit
def _keys(order, ids):
    """int64 that sort like (order, -id)."""
    return (order.to(tl.int64) << 32) | (0x7FFFFFFF - ids)


@triton.jit
def _order(x):
    """int32 that sort like the float32, of which -0.0 equals 0.0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(order):
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
