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

from sglang_dynasor_kernels import (
    BEGUN,
    ENDS_MARK,
    FRESH,
    IS_MARK,
    NEVER,
    SAYING,
    Addition,
    add_rows,
    keep_rows,
    row_stats,
)
from sglang_dynasor_kernels.program_stats import add_rows_ref, keep_rows_ref
from sglang_dynasor_kernels.row_stats import row_stats_ref

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
PATHS = ["split", "row"]


def deep(*values: Any) -> Any:
    """A case beside which others take the same paths: run by `make test-deep`."""
    return pytest.param(*values, marks=pytest.mark.deep)


# kernels/README.md, "Tolerances": absolute, and relative to the value.
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5, equal_nan=True)
row_stats_module = import_module("sglang_dynasor_kernels.row_stats")
program_stats_module = import_module("sglang_dynasor_kernels.program_stats")
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


def kept_case(num_rows: int, vocab_size: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Rows of all standings, and a vocabulary of which a third may end a mark, and a third is one."""
    logits = (masked if num_rows else normal)(num_rows, vocab_size).to(dtype)
    return {
        "logits": logits,
        "lse": row_stats_ref(logits).lse.float(),
        "tokens": integers(0, vocab_size, num_rows),
        "standing": integers(NEVER, SAYING + 1, num_rows, 1)[:, 0].int(),
        "marks": integers(0, IS_MARK + 1, vocab_size).to(torch.int8),
    }


def check_kept(num_kept: int, first: int, end: int, rows: Tensor | None = None, **case: Any) -> tuple[Tensor, Tensor]:
    """What the kernel keeps, once it is what the twin keeps; the rest of the memory is left alone."""
    vocab_size = case["logits"].shape[1]
    kept, expected = torch.full((num_kept, vocab_size), 7.0), torch.full((num_kept, vocab_size), 7.0).double()
    there = {name: None if value is None else value.to(DEVICE) for name, value in case.items()}
    kept = kept.to(DEVICE)
    got = keep_rows(kept, **there, first=first, end=end, rows=None if rows is None else rows.to(DEVICE), path="kernel")
    twin = keep_rows_ref(expected, **case, first=first, end=end, rows=rows)
    assert (got.path, twin.path) == ("kernel", "ref")
    assert torch.equal(got.places.cpu(), twin.places)
    close(kept.cpu().double(), expected)
    return got.places.cpu(), kept.cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_rows", "vocab_size"), [(1, 2), (7, 508), (3, 9001), deep(300, 40)])
def test_rows_that_may_stand_at_an_answer_are_kept(num_rows: int, vocab_size: int, dtype: torch.dtype) -> None:
    """By standing and by token, those first that do; also without lse, of log-probabilities."""
    case = kept_case(num_rows, vocab_size, dtype)
    places, kept = check_kept(num_rows + 2, 2, num_rows + 2, **case)
    standing, mark = case["standing"], case["marks"][case["tokens"]]
    says, may = standing == SAYING, ((standing == FRESH) & (mark == IS_MARK)) | ((standing == BEGUN) & (mark > 0))
    stands = says | may
    assert (places >= 0).tolist() == stands.tolist()
    assert [*places[says].tolist(), *places[may].tolist()] == list(range(2, 2 + int(stands.sum())))
    close(kept[places[stands].long()], case["logits"].float().softmax(1)[stands])
    logprobs = case["logits"].float().log_softmax(1)
    check_kept(num_rows + 2, 2, num_rows + 2, **case | {"logits": logprobs, "lse": None})


def test_more_rows_than_places() -> None:
    """The first ones are kept, more rows than are counted at once, but for those that only may stand at an answer; none where there is no place."""
    case = kept_case(300, 40) | {"standing": torch.full((300,), SAYING, dtype=torch.int32)}
    assert check_kept(9, 3, 8, **case)[0].tolist() == [3, 4, 5, 6, 7, *[-1] * 295]
    assert check_kept(9, 3, 3, **case)[0].tolist() == [-1] * 300
    case["standing"][:] = BEGUN
    case["standing"][[150, 299]] = SAYING
    case["marks"][:] = ENDS_MARK
    assert check_kept(9, 3, 8, **case)[0].tolist() == [5, 6, 7, *[-1] * 147, 3, *[-1] * 148, 4]
    assert check_kept(4, 0, 4, **kept_case(0, 40))[0].tolist() == []


def test_rows_of_a_larger_batch_are_kept() -> None:
    """Only the rows given are looked at, with a stride; a token outside the vocabulary ends no mark."""
    case = kept_case(9, 508)
    rows = torch.tensor([7, 1, 4])
    case["standing"], case["lse"] = torch.tensor([BEGUN] * 3, dtype=torch.int32), case["lse"][rows]
    case["tokens"][7] = int(case["marks"].argmax())
    case["tokens"][[1, 4]] = torch.tensor([int(case["marks"].argmin()), 508])
    case["logits"] = torch.cat([case["logits"], torch.full((9, 4), torch.nan)], dim=1)[:, :508]
    assert check_kept(4, 0, 4, rows, **case)[0].tolist() == [0, -1, -1]


def check_added(total: Tensor, kept: Tensor, additions: list[Addition]) -> tuple[Tensor, Tensor]:
    """What the kernels add and say, once it is what the twin says; the same bits in a second run."""
    sums, again, expected = (total.clone().to(DEVICE), total.clone().to(DEVICE), total.double())
    got = add_rows(sums, kept.to(DEVICE), additions, path="kernel")
    twin = add_rows_ref(expected, kept.double(), additions)
    assert (got.path, twin.path) == ("kernel", "ref")
    close(sums.cpu().double(), expected)
    close(got.entropy.cpu().double(), twin.entropy)
    second = add_rows(again, kept.to(DEVICE), additions, path="kernel")
    assert torch.equal(got.entropy.nan_to_num(), second.entropy.nan_to_num())
    assert torch.equal(sums.nan_to_num(), again.nan_to_num())
    return got.entropy.cpu(), sums.cpu()


@pytest.mark.parametrize("vocab_size", [2, 508, 9001])
def test_slots_are_added_to(vocab_size: int) -> None:
    """To fresh slots, whatever was in them, and to held ones; the others are left alone. The entropy is that of the mean."""
    kept = masked(8, vocab_size).softmax(1)
    total = torch.full((5, vocab_size), torch.nan)
    first, total = check_added(total, kept, [Addition(3, 2, [1, 2]), Addition(0, 1, [7])])
    close(first[0], torch.distributions.Categorical(probs=kept[[1, 2]].mean(0)).entropy())
    assert total[[1, 2, 4]].isnan().all()
    second, _ = check_added(total, kept, [Addition(3, 5, [0, 5, 6])])
    close(second[0], torch.distributions.Categorical(probs=kept[[1, 2, 0, 5, 6]].mean(0)).entropy())


def test_disagreement_at_its_ends() -> None:
    """The entropy of distributions that are alike is theirs; of such that exclude each other it is log n."""
    kept = torch.eye(508)[[3, 3, 70, 80, 90]]
    entropy, _ = check_added(torch.zeros(2, 508), kept, [Addition(0, 2, [0, 1]), Addition(1, 3, [2, 3, 4])])
    close(entropy, torch.tensor([0.0, log(3)]))


def test_a_bad_row_spoils_its_own_slot_only() -> None:
    """NaN from the logits on: kept as NaN, and its slot says NaN; the one beside it does not."""
    case = kept_case(4, 508) | {"standing": torch.full((4,), SAYING, dtype=torch.int32)}
    case["logits"][1, 5] = torch.nan
    case["lse"] = row_stats_ref(case["logits"]).lse.float()
    _, kept = check_kept(4, 0, 4, **case)
    assert kept.isnan().all(1).tolist() == [False, True, False, False]
    entropy, total = check_added(torch.zeros(2, 508), kept, [Addition(0, 2, [0, 1]), Addition(1, 2, [2, 3])])
    assert entropy.isnan().tolist() == total.isnan().any(1).tolist() == [True, False]


def test_nothing_to_add(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launch."""
    for name in ("add_kernel", "entropy_kernel", "keep_kernel"):
        monkeypatch.setattr(program_stats_module, name, None)
    assert check_added(torch.zeros(2, 508), torch.zeros(2, 508), [])[0].shape == (0,)
    check_kept(4, 0, 4, **kept_case(0, 40))
