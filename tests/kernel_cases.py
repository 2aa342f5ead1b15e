"""The kernels against their float64 twins. Not collected by itself: test_kernels.py runs it where Triton runs kernels.

Triton decides when it is imported whether kernels are compiled or interpreted, so these tests need a process of their
own: with TRITON_INTERPRET=1 on a CPU, without on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from importlib import import_module
from math import log
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import JITFunction

from sglang_dynasor.policy.certaindex import entropy_certaindex
from sglang_dynasor_kernels import program_stats, program_stats_ref, row_stats, row_stats_ref

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
PATHS = ["split", "row"]


def deep(*values: Any) -> Any:
    """A case beside which others take the same paths: run by `make test-deep`."""
    return pytest.param(*values, marks=pytest.mark.deep)


# kernels/README.md, "Tolerances": absolute, and relative to the value.
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5, equal_nan=True)
row_stats_module = import_module("sglang_dynasor_kernels.row_stats")
# What numpy warns of in the interpreter where arithmetic on infinities is meant.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(invalid value encountered in (subtract|divide)|All-NaN slice):RuntimeWarning"
)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel does not write is NaN or -7, not what happened to be there."""
    real = torch.empty

    def empty(*size: Any, **options: Any) -> Tensor:
        tensor = real(*size, **options)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -7)

    monkeypatch.setattr(torch, "empty", empty)


def normal(*shape: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def integers(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(sum(shape)))


def assert_equal_stats(got: Any, expected: Any, path: str) -> None:
    """All fields within the tolerances, ids and counts exactly; types as promised; the path that was asked for."""
    assert got.path == path
    for name, tensor, other in zip(got._fields[:-1], got, expected, strict=False):
        if other is None:
            assert tensor is None, name
        elif other.is_floating_point():
            assert tensor.dtype == torch.float32, name
            close(tensor.cpu().double(), other.cpu().double(), msg=lambda text, name=name: f"{name}: {text}")
        else:
            assert tensor.dtype == torch.int32, name
            assert torch.equal(tensor.cpu(), other.cpu()), f"{name}: {tensor} instead of {other}"


def check_rows(logits: Tensor, path: Any, label_ids: Tensor | None = None, **options: Any) -> Any:
    """The kernels' statistics of `logits`, once they are equal to the twin's."""
    got = row_stats(
        logits.to(DEVICE), None if label_ids is None else label_ids.to(DEVICE), path=path,
        **{key: value.to(DEVICE) if isinstance(value, Tensor) else value for key, value in options.items()},
    )  # fmt: skip
    assert_equal_stats(got, row_stats_ref(logits, label_ids, **options), path)
    return got


def test_what_runs() -> None:
    """On a GPU the compiled kernels, without being asked for; interpreted ones on a CPU."""
    kernels = [getattr(row_stats_module, name) for name in dir(row_stats_module) if name.endswith("_kernel")]
    assert kernels
    assert all(isinstance(kernel, JITFunction) == (DEVICE == "cuda") for kernel in kernels)
    got = row_stats(normal(2, 508).to(DEVICE))
    assert got.lse.device.type == DEVICE
    assert (got.path == "ref") == (DEVICE == "cpu")


def peaked(num_rows: int, vocab_size: int) -> Tensor:
    logits = normal(num_rows, vocab_size)
    logits[:, vocab_size // 2] = 60.0
    return logits


def masked(num_rows: int, vocab_size: int) -> Tensor:
    """Nine tokens of ten cannot be sampled; in the first row all but one."""
    logits = normal(num_rows, vocab_size)
    logits[integers(0, 10, num_rows, vocab_size) > 0] = -torch.inf
    logits[0] = -torch.inf
    logits[:, vocab_size - 1] = 1.5
    return logits


def same_column(num_rows: int, vocab_size: int) -> Tensor:
    """The largest ones meet in one column of the tile that bounds them: far more than are wanted reach the bound."""
    logits = normal(num_rows, vocab_size)
    logits[:, :512] += 100.0  # four groups
    return logits


def same_group(num_rows: int, vocab_size: int) -> Tensor:
    """The largest ones are neighbours."""
    logits = normal(num_rows, vocab_size)
    logits[:, vocab_size // 2 : vocab_size // 2 + 20] += 100.0
    return logits


def large(num_rows: int, vocab_size: int) -> Tensor:
    """Exponentials that would overflow without subtracting the maximum; in the first row differences near the limit."""
    logits = normal(num_rows, vocab_size, scale=1e4)
    logits[0, 0], logits[0, 1] = -1e36, 1e36
    return logits


ROWS: dict[str, Callable[[int, int], Tensor]] = {
    "random": normal,
    "peaked": peaked,
    "flat": torch.zeros,
    "ties": lambda *shape: integers(0, 3, *shape).float(),
    "zeros of both signs": lambda *shape: -0.0 * integers(-1, 2, *shape),
    "masked": masked,
    "same column": same_column,
    "same group": same_group,
    "large": large,
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("vocab_size", [2, deep(3), deep(63), 508, 8193])
@pytest.mark.parametrize("kind", ROWS)
def test_rows(kind: str, vocab_size: int, path: str) -> None:
    """Statistics of all kinds of rows equal the twin's, with one chunk and one element more than a chunk."""
    check_rows(ROWS[kind](2, vocab_size), path, torch.tensor([1, -1, 0]))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("kind", "vocab_size"), [("random", 40_009), ("masked", 40_009), ("same column", 40_009), ("random", 262_144)]
)
def test_many_chunks(kind: str, vocab_size: int, path: str) -> None:
    check_rows(ROWS[kind](2, vocab_size), path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["random", "masked", "ties"])
def test_narrow_types(kind: str, dtype: torch.dtype, path: str) -> None:
    """bfloat16 and float16 are widened before anything is computed: ties are those of the narrow type."""
    check_rows(ROWS[kind](3, 8200).to(dtype), path, torch.tensor([5, 8199]))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("vocab_size", [deep(5), 8193])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_row_is_reported_and_does_not_spread(bad: float, vocab_size: int, path: str) -> None:
    """One NaN or +inf, or nothing else or -inf: every float of the row is NaN, every id -1; others are as alone."""
    logits = normal(5, vocab_size)
    logits[1] = bad
    if bad != -torch.inf:
        logits[3, vocab_size - 2] = bad
    labels = torch.tensor([0, -1])
    got = check_rows(logits, path, labels, top_k=3)
    for i in [1] if bad == -torch.inf else [1, 3]:
        assert all(part[i].isnan().all() for part in got[:-1] if part.is_floating_point())
        assert (got.top_ids[i] == -1).all()
    alone = check_rows(logits[[0, 2, 4]], path, labels, top_k=3)
    assert all(torch.equal(part[[0, 2, 4]], other) for part, other in zip(got[:-1], alone, strict=False))


@pytest.mark.parametrize("path", PATHS)
def test_rows_asked_for(path: str) -> None:
    """Only the rows given are looked at, in their order, one of them twice; labels are those of the rows given."""
    logits = normal(6, 508)
    logits[[1, 3, 5]] = torch.nan
    labels = torch.tensor([[1, -1], [2, 507], [-1, -1], [0, 3]], dtype=torch.int32)
    got = check_rows(logits, path, labels, rows=torch.tensor([4, 0, 4, 2]))
    assert not got.lse.isnan().any()
    check_rows(logits, path, labels[:, 0], rows=torch.tensor([2], dtype=torch.int32))
    check_rows(logits, path, labels, rows=torch.tensor([4, 1, 0, 1, 4, 1, 2, 1])[::2])  # strided


@pytest.mark.parametrize("path", PATHS)
def test_ids_that_nobody_could_check(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without synchronising, a row outside the batch is one of NaN, and a label outside the vocabulary counts as -1."""
    monkeypatch.setattr(row_stats_module, "_check", lambda *args: None)
    logits, labels, rows = normal(3, 508), torch.tensor([0, 508, -2]), torch.tensor([-1, 1, 3])
    got = row_stats(logits.to(DEVICE), labels.to(DEVICE), rows=rows.to(DEVICE), path=path)
    assert got.entropy.isnan().tolist() == [True, False, True]
    assert got.label_logprobs[1].isneginf().tolist() == [False, True, True]


@pytest.mark.parametrize("path", PATHS)
def test_rows_with_a_stride(path: str) -> None:
    """A slice of a wider tensor, which starts where no vector load could; labels with strides, too."""
    logits = normal(4, 1200)[::2, 3:511]
    check_rows(logits, path, torch.tensor([[1, 9, 2, 9], [3, 9, -1, 9]])[:, ::2])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("top_k", [1, 2, 33, 64])
def test_top_k(top_k: int, path: str) -> None:
    check_rows(normal(2, 508), path, top_k=top_k)
    check_rows(ROWS["ties"](2, 40), path, top_k=top_k)


@pytest.mark.parametrize("path", PATHS)
def test_no_rows(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty batch, or none of its rows: empty tensors of the right shapes, and no launch."""
    for name in ("row_kernel", "split_kernel", "merge_kernel"):
        monkeypatch.setattr(row_stats_module, name, None)
    check_rows(normal(0, 508), path, torch.tensor([1, 2]))
    got = check_rows(normal(3, 508), path, torch.zeros(0, 2, dtype=torch.int64), rows=torch.zeros(0, dtype=torch.int64))
    assert got.top_ids.shape == (0, 20)
    assert got.label_logprobs.shape == (0, 2)


def programs(num_rows: int, num_programs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Programs, answers and rewards of rows; some have none."""
    rewards = normal(num_rows)
    rewards[::4] = torch.nan
    return integers(-1, num_programs, num_rows), integers(-1, 4, num_rows, 1)[:, 0], rewards


def check_programs(num_programs: int, *columns: Tensor, **options: Any) -> Any:
    """The kernels' statistics of programs, once they are equal to the twin's."""
    got = program_stats(
        *(column.to(DEVICE) for column in columns), num_programs, path="kernel",
        **{key: value.to(DEVICE) if isinstance(value, Tensor) else value for key, value in options.items()},
    )  # fmt: skip
    assert_equal_stats(got, program_stats_ref(*columns, num_programs, **options), "kernel")
    return got


@pytest.mark.parametrize("num_programs", [1, deep(3), 9])
@pytest.mark.parametrize("num_rows", [0, 1, deep(5), 33, deep(150)])
def test_programs(num_rows: int, num_programs: int) -> None:
    """Votes, rewards and weights of programs, also of those without rows; rows of no program count nowhere."""
    columns = programs(num_rows, num_programs)
    got = check_programs(num_programs, *columns, temperature=0.5)
    program, answer, rewards = columns
    for i in range(num_programs):
        counts = answer[(program == i) & (answer >= 0)].bincount().tolist()
        assert got.certaindex[i].item() == pytest.approx(entropy_certaindex(counts), abs=1e-6)
    has_reward = (program >= 0) & ~rewards.isnan()
    assert (got.reward_weight.cpu() > 0).tolist() == has_reward.tolist()
    assert got.reward_weight.sum().item() == pytest.approx(len(program[has_reward].unique()), abs=1e-5)


def test_certaindex_at_its_ends() -> None:
    """Unanimous is exactly 1, all different 0 but for rounding; a single vote, and none, exactly 0."""
    program = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 2, 3])
    answer = torch.tensor([5, 5, 5, 0, 1, 2, 3, 4, 7, -1])
    got = check_programs(5, program, answer, torch.full((10,), torch.nan))
    assert got.certaindex[[0, 2, 3, 4]].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert got.certaindex[1].item() == pytest.approx(0.0, abs=1e-6)
    assert got.num_votes.tolist() == [3, 5, 1, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [2, 508, 9001])
def test_mixture(vocab_size: int, dtype: torch.dtype) -> None:
    """Entropy of the mixture and its two parts, of the rows at an answer or of all, with masked vocabularies."""
    columns = programs(12, 3)
    logits = masked(12, vocab_size).to(dtype)
    stats = row_stats_ref(logits)
    options = {"logits": logits, "lse": stats.lse.float(), "entropy": stats.entropy.float()}
    check_programs(3, *columns, **options)
    got = check_programs(4, *columns, **options, at_answer=integers(0, 2, 12).bool())
    assert got.mixture_entropy[3].isnan()  # a program without rows


def test_disagreement_at_its_ends() -> None:
    """Rows that are alike do not disagree; rows that exclude each other disagree by log n."""
    logits = torch.full((5, 508), -torch.inf)
    logits[[0, 1, 2, 3, 4], [3, 3, 70, 80, 90]] = 2.0
    program = torch.tensor([0, 0, 1, 1, 1])
    stats = row_stats_ref(logits)
    got = check_programs(
        2, program, program, torch.zeros(5), logits=logits, lse=stats.lse.float(), entropy=stats.entropy.float()
    )
    close(got.disagreement.cpu(), torch.tensor([0.0, log(3)]))


def test_a_bad_row_spoils_its_own_program_only() -> None:
    """NaN in a row at an answer is NaN in its own program's mixture only; away from answers it does not count."""
    logits = normal(6, 508)
    logits[1, 5] = logits[4, 5] = torch.nan
    program = torch.tensor([0, 0, 1, 1, 2, 2])
    stats = row_stats_ref(logits)
    got = check_programs(
        3, program, program, torch.zeros(6), logits=logits, lse=stats.lse.float(), entropy=stats.entropy.float(),
        at_answer=torch.tensor([True, True, True, True, False, True]),
    )  # fmt: skip
    for part in (got.mixture_entropy, got.mean_entropy, got.disagreement):
        assert part.isnan().tolist() == [True, False, False]


def test_no_programs() -> None:
    got = check_programs(0, *programs(5, 0))
    assert got.reward_weight.tolist() == [0.0] * 5
