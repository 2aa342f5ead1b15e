"""Time of row_stats on a GPU, against the time that one read of the logits must take and against other ways.

    python benchmarks/bench_kernels.py --csv benchmarks/results/kernels.csv

First the copy bandwidth of the card, then a correctness gate against the float64 twin: nothing is timed unless it
passes. Times are of CUDA graphs over as many buffers as it takes, each read once per replay, the L2 cache overwritten
before every replay; median of 50 replays, with the range for ours, and of 10 for the others. "GB/s" counts one read of
the logits, "of copy" is that over the copy bandwidth, which counts bytes read and written; "read" is a kernel that reads
the logits and does no more. All ways but flashinfer's softmax give entropies; "eager", "compile" (the same through
torch.compile) and ours also the 20 likeliest tokens and their mean. "with slots" is row_stats, then half of the rows kept and
added to the slots of programs of eight branches. What torch.compile takes seconds to make is timed for
some shapes only; empty means not timed. Without a GPU only the gate runs, on Triton's interpreter.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import warnings
from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import commit
from rows import spread, write_rows
from torch import Tensor

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of the gate's NaN
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from sglang_dynasor_kernels import (  # noqa: E402
    SAYING,
    Addition,
    add_rows,
    keep_rows,
    row_stats,
)
from sglang_dynasor_kernels.program_stats import add_rows_ref, keep_rows_ref  # noqa: E402
from sglang_dynasor_kernels.row_stats import RowStats, row_stats_ref  # noqa: E402

BATCH_SIZES = [1, 8, 32, 64, 256, 1024]
VOCAB_SIZES = [32_000, 128_256, 151_936, 262_144]  # Llama 2, Llama 3, Qwen 3, Gemma 3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
REPLAYS = 50
MIN_BYTES = 256 << 20  # of a graph's buffers: so that its time is long against an event's resolution
COMPILED = [(64, 151_936), (1024, 151_936)]  # rows and vocabulary that torch.compile takes seconds for
TOP_K = 20
TOLERANCE = 1e-5  # kernels/README.md


Shape = tuple[int, int, str]  # rows, vocabulary, type
Ways = dict[str, Callable[[Tensor], Any] | None]  # columns and what to time for them; None: not here


def gate(device: str, shapes: list[tuple[int, int]]) -> None:
    """End the program if a path differs from the twin, or from itself in a second run."""
    for (batch_size, vocab_size), dtype, path in product(shapes, DTYPES.values(), ("split", "row")):
        logits = (3 * torch.randn(batch_size, vocab_size)).to(dtype)
        logits[0, ::3] = -torch.inf
        logits[-1, vocab_size // 2] = torch.nan
        labels = torch.tensor([1, vocab_size - 1])
        got, again = (row_stats(logits.to(device), labels.to(device), path=path)[:-1] for _ in range(2))
        for i, expected in enumerate(row_stats_ref(logits, labels)[:-1]):
            what = f"{path} {batch_size}x{vocab_size} {dtype}: {RowStats._fields[i]}"
            if not torch.equal(got[i].nan_to_num(), again[i].nan_to_num()):
                raise SystemExit(f"{what} differs between two runs")
            if not is_close(got[i].cpu(), expected):
                raise SystemExit(f"{what} differs from the twin's")
        for name, a, b in zip(
            ("places", "kept", "total", "entropy"), slots(logits, device), slots(logits), strict=True
        ):
            if not is_close(a.cpu(), b):
                raise SystemExit(f"slots {batch_size}x{vocab_size} {dtype}: {name} differs from the twin's")
    print(f"gate passed on {device}: both paths at {shapes}, {list(DTYPES)}")


def slots(logits: Tensor, device: str = "") -> tuple[Tensor, ...]:
    """Half of the rows kept, and added to slots two by two; without a device by the twins, in float64."""
    num_rows, vocab_size = logits.shape
    kept, total = (torch.zeros(num_rows, vocab_size, dtype=torch.float64) for _ in range(2))
    tokens, standing, marks = (
        torch.zeros(num_rows, dtype=torch.int64),
        torch.arange(num_rows) % 2 * SAYING,
        torch.zeros(vocab_size),
    )
    given = logits, row_stats_ref(logits).lse.float(), tokens, standing.int(), marks.to(torch.int8)
    additions = [
        Addition(i // 2, len(both), both)
        for i in range(0, num_rows // 2, 2)
        if (both := [*range(i, min(i + 2, num_rows // 2))])
    ]
    if not device:
        places = keep_rows_ref(kept, *given, 0, num_rows).places
        return places, kept, total, add_rows_ref(total, kept, additions).entropy
    kept, total = kept.float().to(device), total.float().to(device)
    places = keep_rows(kept, *(x.to(device) for x in given), 0, num_rows, path="kernel").places
    return places, kept, total, add_rows(total, kept, additions, path="kernel").entropy


def is_close(got: Tensor, expected: Tensor) -> bool:
    """Floats within TOLERANCE, all else exactly."""
    if not expected.is_floating_point():
        return torch.equal(got, expected)
    return torch.allclose(got.to(expected.dtype), expected, TOLERANCE, TOLERANCE, equal_nan=True)


def replay_us(
    function: Callable[[Tensor], Any], buffers: Tensor, flush: Tensor, num_replays: int = REPLAYS
) -> list[float]:
    """Microseconds of a call, one value per replay of a graph that calls `function` on each of the buffers."""
    for _ in range(3):
        function(buffers[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for buffer in buffers:
            function(buffer)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times: list[float] = []
    for i in range(num_replays + 1):
        flush.fill_(i)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(buffers))
    return times[1:]


def copied_gb_s(flush: Tensor) -> float:
    """The copy bandwidth, read and written: by a kernel, for what a graph makes of `copy_` takes half as long again."""
    source = torch.randn(1, 512 << 20, device="cuda")
    target = torch.empty_like(source[0])
    times = replay_us(lambda buffer: torch.mul(buffer, 1.0, out=target), source, flush)
    return 2 * source.nbytes / median(times) / 1000


def log_softmax_reduce(logits: Tensor) -> Tensor:
    logprobs = logits.float().log_softmax(1)
    return -(logprobs.exp() * logprobs).sum(1)


def eager(logits: Tensor) -> tuple[Tensor, ...]:
    logprobs = logits.float().log_softmax(1)
    top = logprobs.topk(TOP_K)
    return -(logprobs.exp() * logprobs).sum(1), top.values, top.indices, -top.values.mean(1)


@cache
def memory(num_rows: int, vocab_size: int) -> tuple[Any, ...]:
    """What half of the rows need that say an answer, in programs of eight branches: all of it made before anything is timed."""
    num_kept = -(-num_rows // 2)
    kept, total = (torch.empty(num, vocab_size, device="cuda") for num in (num_kept, -(-num_kept // 4)))
    standing = (1 - torch.arange(num_rows, device="cuda") % 2).int() * SAYING
    tokens, marks = (
        torch.zeros(num_rows, dtype=torch.int64, device="cuda"),
        torch.zeros(vocab_size, device="cuda").to(torch.int8),
    )
    additions = [
        Addition(i // 4, len(four), four) for i in range(0, num_kept, 4) if (four := [*range(i, min(i + 4, num_kept))])
    ]
    return kept, total, tokens, standing, marks, additions


def with_slots(logits: Tensor) -> Any:
    kept, total, tokens, standing, marks, additions = memory(*logits.shape)
    lse = row_stats(logits, top_k=TOP_K).lse
    keep_rows(kept, logits, lse, tokens, standing, marks, 0, len(kept))
    return add_rows(total, kept, additions)


@cache
def has_flashinfer() -> bool:
    """Whether its softmax runs here: where it cannot be built, the other columns must not be lost."""
    if not find_spec("flashinfer"):
        return False
    from flashinfer.sampling import softmax

    try:
        softmax(torch.zeros(1, 8, device="cuda"))
    except Exception as error:
        print(f"without flashinfer's softmax: {error}", flush=True)
        return False
    return True


@triton.jit
def read_kernel(logits_ptr, num, out_ptr, BLOCK: tl.constexpr):
    """Each program reads BLOCK logits and writes the largest."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + offs, offs < num, other=float("-inf"))
    tl.store(out_ptr + tl.program_id(0), tl.max(x.to(tl.float32)))


def read(logits: Tensor) -> None:
    """What no kernel that reads the logits can be faster than, but for luck."""
    num_programs = -(-logits.numel() // 8192)
    read_kernel[(num_programs,)](logits, logits.numel(), logits.new_empty(num_programs), BLOCK=8192, num_warps=8)


def ours(shape: Shape) -> Ways:
    return {
        "read us": read,
        "split us": partial(row_stats, top_k=TOP_K, path="split"),
        "row us": partial(row_stats, top_k=TOP_K, path="row"),
        "with slots us": with_slots,
    }


def peers(shape: Shape) -> Ways:
    ways: Ways = {"eager us": eager, "log-softmax us": log_softmax_reduce}
    if has_flashinfer():
        from flashinfer.sampling import softmax

        ways["flashinfer us"] = softmax
    return ways


def compiled(shape: Shape) -> Ways:
    if shape[:2] not in COMPILED:
        return {"compile us": None}
    torch.compiler.reset()  # else the ninth shape is not compiled any more
    return {"compile us": torch.compile(eager, dynamic=False)}


# Ours of every shape come first: a machine lent for minutes may go.
ROUNDS: dict[str, Callable[[Shape], Ways]] = {"ours": ours, "peers": peers, "compiled": compiled}


def measure(shape: Shape, name: str, copy_gb_s: float, flush: Tensor) -> dict[str, str]:
    """The columns of a round in a row of the table; with ours its first ones, too."""
    batch_size, vocab_size, dtype = shape
    row = {"B": str(batch_size), "V": str(vocab_size), "dtype": dtype}
    ways = ROUNDS[name](shape)
    if not any(ways.values()):
        return row | dict.fromkeys(ways, "")
    num_bytes = batch_size * vocab_size * DTYPES[dtype].itemsize
    num_buffers = min(64, max(4, MIN_BYTES // num_bytes))
    buffers = 3 * torch.randn(num_buffers, batch_size, vocab_size, dtype=DTYPES[dtype], device="cuda")
    num_replays = REPLAYS
    if name == "ours":
        times = replay_us(partial(row_stats, top_k=TOP_K), buffers, flush, num_replays)
        gb_s = num_bytes / median(times) / 1000
        row["path"] = row_stats(buffers[0]).path
        row |= {"us": spread(times, 1), "GB/s": f"{gb_s:.0f}", "of copy": f"{gb_s / copy_gb_s:.0%}"}
    else:
        num_replays //= 5
    for key, function in ways.items():
        row[key] = f"{median(replay_us(function, buffers, flush, num_replays)):.1f}" if function else ""
    return row


def facts(copy_gb_s: float, commit_name: str) -> dict[str, str]:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "copy GB/s": f"{copy_gb_s:.0f}",
        "gpu": torch.cuda.get_device_name(),
        "driver": subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0],
        "torch": torch.__version__,
        "triton": triton.__version__,
        "flashinfer": version("flashinfer-python") if find_spec("flashinfer") else "-",
        "repeats": str(REPLAYS),
        "commit": commit_name,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=BATCH_SIZES)
    parser.add_argument("--vocab-sizes", type=int, nargs="+", default=VOCAB_SIZES)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument(
        "--rounds", nargs="+", choices=list(ROUNDS), default=list(ROUNDS), help="what to time, in order"
    )
    parser.add_argument("--commit", help="what to write in the CSV, where the code is not in a git checkout")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    if not HAS_GPU:
        gate("cpu", [(2, 5), (2, 508), (2, 8193)])
        print("no GPU: nothing to time, no table written")
        return
    gc.freeze()  # every capture collects garbage: quick without what the imports left
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")  # several times the L2 cache
    copy_gb_s = copied_gb_s(flush)
    print(f"copy: {copy_gb_s:.0f} GB/s read and written")
    gate("cuda", [(3, 508), (8, 151_936), (600, 8193)])
    closing = facts(copy_gb_s, args.commit or commit())
    rows: dict[Shape, dict[str, str]] = {}
    for name, shape in product(args.rounds, product(args.batch_sizes, args.vocab_sizes, args.dtypes)):
        row = measure(shape, name, copy_gb_s, flush)
        before = {key: value for key, value in rows.get(shape, {}).items() if key not in closing}
        rows[shape] = before | row | closing
        print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
        if args.csv:
            write_rows(args.csv, list(rows.values()))


if __name__ == "__main__":
    main()
