"""Statistics next to the logits: kernels in a process of their own, twins against definitions, the package itself."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from functools import partial
from math import exp, inf, nan
from pathlib import Path
from statistics import mean, pvariance
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import ROOT
from torch import Tensor
from torch.distributions import Categorical
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from sglang_dynasor.engine import statistics
from sglang_dynasor.engine.statistics import Observer, Watched, compute
from sglang_dynasor.policy.certaindex import answer_entropy, entropy_certaindex
from sglang_dynasor_kernels import (
    choose_path,
    program_stats,
    program_stats_ref,
    row_confidence,
    row_stats,
    row_stats_ref,
)

VOCAB_SIZE = 20_001  # no multiple of anything: SGLang pads it, and may hand out rows cut from the padded ones
PACKAGE = ROOT / "kernels" / "sglang_dynasor_kernels"


def normal(*shape: int) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("cases", ["not deep", pytest.param("deep", marks=pytest.mark.deep)])
@pytest.mark.parametrize("mode", ["interpreter", "gpu"] if torch.cuda.is_available() else ["interpreter"])
def test_kernels_equal_their_twins(mode: str, cases: str) -> None:
    """kernel_cases.py, and no warning: with the kernels interpreted, and compiled where there is a GPU."""
    environment = {**os.environ, "TRITON_INTERPRET": "1" if mode == "interpreter" else "0"}
    options = ["--noconftest", "-p", "no:cacheprovider", "-W", "error", "-m", cases]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "tests/kernel_cases.py"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def test_the_benchmark_s_gate_passes(tmp_path: Path) -> None:
    """Without a GPU the harness runs its gate on the interpreter, times nothing and writes no table."""
    if torch.cuda.is_available():
        return
    csv = tmp_path / "kernels.csv"
    done = subprocess.run(
        [sys.executable, "benchmarks/bench_kernels.py", "--csv", str(csv)],
        cwd=ROOT, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "gate passed on cpu" in done.stdout
    assert "no table written" in done.stdout
    assert not csv.exists()


def compile_only(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Have launches compiled for an H100 and not run; returns a list that grows by (kernel, hash of what was compiled)."""
    h100 = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    launch, compiled = JITFunction.run, list[tuple[str, str]]()

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        made = launch(kernel, *args, grid=grid, warmup=True, **options)
        assert "cubin" in made.asm
        compiled.append((kernel.__name__, made.hash))

    monkeypatch.setattr(driver, "_active", h100)
    monkeypatch.setattr(JITFunction, "run", run)
    return compiled


def test_every_launch_compiles_for_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter accepts what the compiler does not: each launch is compiled for an H100, and not run."""
    compiled = compile_only(monkeypatch)
    for dtype, path in ((torch.float32, "split"), (torch.bfloat16, "row")):
        logits = normal(3, 20_000).to(dtype)
        row_stats(logits, torch.tensor([0, 1]), rows=torch.tensor([0, 1]), path=path)
        row_stats(logits[:1, :501], path=path)
        stats = row_stats_ref(logits, dtype=torch.float32)
        columns = torch.tensor([0, 0, 1]), torch.tensor([0, 0, 1]), torch.zeros(3)
        program_stats(
            *columns, 2, path="kernel", logits=logits, lse=stats.lse, entropy=stats.entropy,
            at_answer=torch.ones(3, dtype=torch.bool),
        )  # fmt: skip
        program_stats(*columns, 1, path="kernel")
    row_kernels = ["split_kernel", "merge_kernel"] * 2, ["row_kernel"] * 2
    program_kernels = ["_mixture_kernel", "_program_stats_kernel", "_program_stats_kernel"]
    assert [name for name, _ in compiled] == row_kernels[0] + program_kernels + row_kernels[1] + program_kernels


def test_after_the_warm_up_no_step_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """At start the engine compiles what it may launch; then no number of rows, of watched rows or of judges brings another."""
    compiled = compile_only(monkeypatch)
    watch = SimpleNamespace(faults=SimpleNamespace(fall_back=lambda where, error: pytest.fail(f"{where}: {error}")))
    Observer(watch).warm_up(VOCAB_SIZE, torch.device("cpu"))  # type: ignore[arg-type]
    warm = set(compiled)
    assert {name for name, _ in warm} == {"row_kernel", "split_kernel", "merge_kernel"}
    for path in ("split", "row"):
        monkeypatch.setattr(statistics, "row_stats", partial(row_stats, path=path))
        for num_rows in (1, 2, 3, 16, 33):
            for rows in (list(range(num_rows)), [num_rows - 1]):
                for labels in (None, [(0, 1)] * len(rows)):
                    watched = Watched(rows, [], [], labels, is_whole=len(rows) == num_rows)
                    compute(torch.zeros(num_rows, VOCAB_SIZE), watched)
                    compute(torch.zeros(num_rows, 20_032)[:, :VOCAB_SIZE], watched)
    assert set(compiled) == warm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [2, 19, 20, 21, 768, 5003])
def test_row_confidence_equals_the_twin(vocab_size: int, dtype: torch.dtype) -> None:
    """On random, masked, flat and broken rows; rows short of top_k tokens too."""
    logits = normal(9, vocab_size)
    logits[1, 1:] = -inf
    logits[2, ::2] = -inf
    logits[3] = 0.0
    logits[4] = -inf
    logits[5, 0] = nan
    logits[6, 1] = inf
    logits = logits.to(dtype)
    before = logits.clone()
    confidence, logprobs = row_confidence(logits)
    twin = row_stats_ref(logits)
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())
    expected = twin.confidence.tolist()
    assert confidence == pytest.approx(expected, rel=1e-5, abs=1e-5, nan_ok=True)
    torch.testing.assert_close(logprobs.double(), logits.double().log_softmax(1), rtol=1e-5, atol=1e-5, equal_nan=True)
    assert row_confidence(logits[:0])[0] == []
    with pytest.raises(ValueError, match="is for the CPU"):
        row_confidence(torch.empty(1, 2, device="meta"))


def test_row_stats_by_definition() -> None:
    """The twin says what log-softmax, the entropy of a distribution and a sort by hand say."""
    logits = normal(8, 97).round()  # many ties
    logits[3, ::2] = -inf
    stats = row_stats_ref(logits, torch.tensor([2, -1, 96]), top_k=5)
    assert {part.dtype for part in stats[:-1]} == {torch.float64, torch.int32}
    expected = Categorical(logits=logits.double())
    logprobs = logits.double().log_softmax(1)
    torch.testing.assert_close(stats.lse, logits.double().logsumexp(1))
    torch.testing.assert_close(stats.entropy, expected.entropy())
    torch.testing.assert_close(stats.max_prob, expected.probs.amax(1))
    for i, row in enumerate(logits.tolist()):
        ids = sorted(range(97), key=lambda token: (-row[token], token))[:5]
        assert stats.top_ids[i].tolist() == ids
        torch.testing.assert_close(stats.top_logprobs[i], logprobs[i, ids])
        assert stats.confidence[i].item() == pytest.approx(-mean(logprobs[i, ids].tolist()))
        assert stats.label_logprobs[i].tolist() == pytest.approx([logprobs[i, 2].item(), -inf, logprobs[i, 96].item()])


def test_the_cpu_runs_the_twin_in_float32() -> None:
    """Tensors on the CPU take the path "ref", within the kernels' tolerances, and all floats are float32."""
    logits, labels = normal(64, 508), torch.tensor([3, 5])
    got, expected = row_stats(logits, labels), row_stats_ref(logits, labels)
    for part, other in zip(got[:-1], expected[:-1], strict=True):
        torch.testing.assert_close(part, other.to(part.dtype), rtol=1e-5, atol=1e-5)
        assert part.dtype in (torch.float32, torch.int32)
    columns = torch.zeros(64, dtype=torch.int64), torch.arange(64) % 3, torch.ones(64)
    programs = program_stats(*columns, 2, logits=logits, lse=got.lse, entropy=got.entropy)
    assert all(part.dtype in (torch.float32, torch.int32) for part in programs[:-1])
    assert got.path == programs.path == "ref"


def test_fewer_tokens_than_asked_for() -> None:
    """Of a row with one token that can be sampled, and of a vocabulary of two, the rest of the top is -1 and -inf."""
    stats = row_stats(torch.tensor([[-inf, 1.0], [0.0, 0.0]]), top_k=3)
    assert stats.top_ids.tolist() == [[1, -1, -1], [0, 1, -1]]
    assert stats.top_logprobs[0].tolist() == [0.0, -inf, -inf]
    assert stats.confidence.tolist() == pytest.approx([0.0, 0.693147], abs=1e-6)


@pytest.mark.parametrize("rows", [None, [1, 0]])
def test_a_bad_row_on_the_cpu(rows: list[int] | None) -> None:
    """NaN and -1 throughout, as from the kernels, also for what the row does not have."""
    logits = torch.tensor([[0.0, 0.0, 1.0], [inf, 0.0, 0.0]])
    stats = row_stats(logits, torch.tensor([0, -1]), rows=None if rows is None else torch.tensor(rows), top_k=4)
    bad = 1 if rows is None else 0
    assert all(part[bad].isnan().all() for part in stats[:-1] if part.is_floating_point())
    assert stats.top_ids[bad].tolist() == [-1] * 4
    assert stats.top_ids[1 - bad].tolist() == [2, 0, 1, -1]


def test_program_stats_by_definition() -> None:
    """The twin says what counting by hand and the policy's certaindex say."""
    program = torch.tensor([0, 1, 0, -1, 0, 1, 0, 7, 2])
    answer = torch.tensor([4, 1, 4, 4, 9, 2, -1, 4, -1])
    rewards = torch.tensor([0.2, nan, 0.9, 5.0, nan, 0.4, 0.3, 5.0, nan])
    at_answer = torch.tensor([1, 1, 1, 1, 0, 1, 0, 1, 0]).bool()
    logits = normal(9, 50)
    rows = row_stats_ref(logits)
    stats = program_stats_ref(
        program, answer, rewards, 3, logits=logits, lse=rows.lse, entropy=rows.entropy, at_answer=at_answer
    )
    assert {part.dtype for part in stats[:-1]} == {torch.float64, torch.int32}
    counts = [[2, 1], [1, 1], []]
    assert stats.num_votes.tolist() == [3, 2, 0]
    assert stats.vote_entropy.tolist() == pytest.approx([answer_entropy(c) for c in counts])
    assert stats.certaindex.tolist() == pytest.approx([entropy_certaindex(c) for c in counts])
    values = [[0.2, 0.9, 0.3], [0.4]]
    assert stats.reward_mean.tolist() == pytest.approx([mean(v) for v in values] + [nan], nan_ok=True)
    assert stats.reward_max.tolist() == pytest.approx([0.9, 0.4, nan], nan_ok=True)
    assert stats.reward_variance.tolist() == pytest.approx([pvariance(values[0]), 0.0, nan], nan_ok=True, abs=1e-7)
    total = sum(exp(v / 0.2) for v in values[0])
    weights = [exp(v / 0.2) / total for v in values[0]]
    assert stats.reward_weight.tolist() == pytest.approx(
        [weights[0], 0, weights[1], 0, 0, 1, weights[2], 0, 0], abs=1e-6
    )
    for i, members in enumerate(([0, 2], [1, 5])):
        probs = logits[members].double().softmax(1)
        mixture, alone = Categorical(probs=probs.mean(0)).entropy(), Categorical(probs=probs).entropy().mean()
        torch.testing.assert_close(stats.mixture_entropy[i], mixture)
        torch.testing.assert_close(stats.mean_entropy[i], alone)
        torch.testing.assert_close(stats.disagreement[i], mixture - alone)
    assert stats.disagreement[2].isnan()


LOGITS = torch.zeros(4, 10)
ROW_ERRORS = {
    "shape": ((torch.zeros(10),), {}, "give \\[B, V\\]"),
    "stride": ((torch.zeros(10, 4).T,), {}, "contiguous along V"),
    "type": ((LOGITS.double(),), {}, "give float32, bfloat16 or float16"),
    "top_k": ((LOGITS,), {"top_k": 65}, "top_k=65 is outside 1 to 64"),
    "rows": ((LOGITS,), {"rows": torch.zeros(2, 2, dtype=torch.int64)}, "rows of shape"),
    "labels": ((LOGITS, torch.zeros(3, 2, dtype=torch.int64)), {}, "give \\[L\\] or \\[4, L\\]"),
    "large label": ((LOGITS, torch.tensor([0, 10])), {}, "label_ids from 0 to 10 are outside -1 to 9"),
    "small label": ((LOGITS, torch.tensor([-2])), {}, "outside -1 to 9"),
}


@pytest.mark.parametrize("case", ROW_ERRORS)
def test_row_errors(case: str) -> None:
    """What can be seen without a GPU's answer is a ValueError that says what to give."""
    args, options, message = ROW_ERRORS[case]
    for path in ("ref", "split", "row"):
        with pytest.raises(ValueError, match=message):
            row_stats(*args, **options, path=path)


def test_program_errors() -> None:
    index, rewards = torch.zeros(4, dtype=torch.int64), torch.zeros(4)
    with pytest.raises(ValueError, match="answer_index of shape \\(3,\\): give \\[4\\]"):
        program_stats(index, index[:3], rewards, 2)
    with pytest.raises(ValueError, match="give those of row_stats"):
        program_stats(index, index, rewards, 2, logits=LOGITS)
    with pytest.raises(ValueError, match="give \\[4, V\\]"):
        program_stats(index, index, rewards, 2, logits=LOGITS[:2], lse=rewards, entropy=rewards)
    with pytest.raises(ValueError, match="temperature=0 must be at least 1e-30"):
        program_stats(index, index, rewards, 2, temperature=0)


@pytest.mark.parametrize(
    ("num_rows", "vocab_size", "path"),
    [(1, 151_936, "split"), (527, 151_936, "split"), (528, 151_936, "row"), (1, 8192, "row"), (1, 8193, "split")],
)
def test_choose_path(num_rows: int, vocab_size: int, path: str) -> None:
    """On 132 multiprocessors: whole rows once four for each are at hand, or where a row is one chunk."""
    assert choose_path(num_rows, vocab_size, num_sms=132) == path


def test_the_package_imports_torch_and_triton_only() -> None:
    """Neither SGLang nor the policy: in its source, and in a process that imports it."""
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert name.partition(".")[0] in {"torch", "triton", "sglang_dynasor_kernels", *sys.stdlib_module_names}
    code = "import sys, sglang_dynasor_kernels; print({name.partition('.')[0] for name in sys.modules})"
    out = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True).stdout
    assert not {"sglang", "sglang_dynasor"} & ast.literal_eval(out)


def test_hugging_face_kernels_is_the_same_everywhere(tmp_path: Path) -> None:
    """Our folder `kernels/` does not shadow the package of that name: at the root Python finds the same one."""
    code = "import inspect; from kernels import get_kernel; print(inspect.getfile(get_kernel))"
    found = [
        subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True).stdout
        for cwd in (ROOT, tmp_path)
    ]
    assert found[0] == found[1]
    assert not (ROOT / "kernels" / "__init__.py").exists()
