"""Statistics next to the logits: kernels in a process of their own, twins against definitions, the package itself."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from functools import partial
from math import inf, nan
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import ROOT
from torch import Tensor
from torch.distributions import Categorical
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

import sglang_dynasor_kernels
from sglang_dynasor.engine import statistics
from sglang_dynasor.engine.slots import Added, Memory
from sglang_dynasor.engine.statistics import Observer, Step, Watched, compute
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
    row_confidence,
    row_stats,
)
from sglang_dynasor_kernels.program_stats import add_rows_ref, keep_rows_ref
from sglang_dynasor_kernels.row_stats import choose_path, row_stats_ref

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
        kept, tokens, marks = (
            torch.empty(4, 20_000),
            torch.zeros(3, dtype=torch.int64),
            torch.zeros(20_000).to(torch.int8),
        )
        standing = torch.tensor([NEVER, BEGUN, SAYING], dtype=torch.int32)
        for lse, rows in ((torch.zeros(3), None), (None, tokens)):
            keep_rows(kept, logits, lse, tokens, standing, marks, 0, 2, rows=rows, path="kernel")
        add_rows(kept, kept.clone(), [Addition(3, 2, [0])], path="kernel")
    row_kernels = ["split_kernel", "merge_kernel"] * 2, ["row_kernel"] * 2
    program_kernels = ["keep_kernel", "keep_kernel", "add_kernel", "entropy_kernel"]
    assert [name for name, _ in compiled] == row_kernels[0] + program_kernels + row_kernels[1] + program_kernels


def test_after_the_warm_up_no_step_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """At start the engine compiles what it may launch; then no number of rows, of watched rows or of judges brings another."""
    compiled = compile_only(monkeypatch)
    watch: Any = SimpleNamespace(reader=SimpleNamespace(ends={1}, marks={2}))
    observer = Observer(watch, Memory(40, 33), VOCAB_SIZE)
    observer.__dict__["group"] = SimpleNamespace(rank_in_group=0)
    observer.warm_up(torch.device("cpu"))
    warm = set(compiled)
    row_kernels, program_kernels = (
        {"row_kernel", "split_kernel", "merge_kernel"},
        {"keep_kernel", "add_kernel", "entropy_kernel"},
    )
    assert {name for name, _ in warm} == row_kernels | program_kernels
    assert observer._sums is not None
    monkeypatch.setattr(statistics, "keep_rows", partial(keep_rows, path="kernel"))
    monkeypatch.setattr(statistics, "add_rows", partial(add_rows, path="kernel"))
    slot: Any = None
    for path in ("split", "row"):
        monkeypatch.setattr(statistics, "row_stats", partial(row_stats, path=path))
        for num_rows in (1, 2, 3, 16, 33):
            added = [Added(slot, Addition(i, num_rows, [0] * num_rows)) for i in range(num_rows)]
            for rows in (list(range(num_rows)), [num_rows - 1]):
                tokens = torch.zeros(num_rows, dtype=torch.int64)
                step = Step(observer._sums, added, [SAYING] * len(rows), tokens, num_rows, 66)
                for labels in (None, [(0, 1)] * len(rows)):
                    watched = Watched(rows, [], [], labels, is_whole=len(rows) == num_rows)
                    compute(torch.zeros(num_rows, VOCAB_SIZE), watched, step)
                    compute(torch.zeros(num_rows, 20_032)[:, :VOCAB_SIZE], watched, step)
    assert set(compiled) == warm


def test_every_exported_name_has_a_caller_in_the_engine() -> None:
    """What nobody in the engine uses is not exported, nor kept beside it: but for twins, every function of the modules is called."""
    engine = "\n".join(path.read_text() for path in (ROOT / "sglang_dynasor" / "engine").glob("*.py"))
    imported = {
        alias.name
        for node in ast.walk(ast.parse(engine.replace("from __future__ import annotations", "")))
        if isinstance(node, ast.ImportFrom) and node.module == "sglang_dynasor_kernels"
        for alias in node.names
    }
    assert imported == set(sglang_dynasor_kernels.__all__)
    for name in imported:
        assert engine.count(f"{name}(") or engine.count(f" {name}"), name
    sources = {path: path.read_text() for path in PACKAGE.glob("*.py")}
    everything = engine + "\n".join(sources.values())
    for path, source in sources.items():
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                assert everything.count(node.name) > 1, f"{path.name}: nobody uses {node.name}"


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
    kept, total, tokens = torch.empty(2, 508), torch.empty(1, 508), torch.zeros(64, dtype=torch.int64)
    standing = torch.full((64,), SAYING, dtype=torch.int32)
    rows = keep_rows(kept, logits, got.lse, tokens, standing, torch.zeros(508).to(torch.int8), 0, 2)
    mixed = add_rows(total, kept, [Addition(0, 2, [0, 1])])
    assert (rows.places.dtype, mixed.entropy.dtype) == (torch.int32, torch.float32)
    assert got.path == rows.path == mixed.path == "ref"


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


def test_slots_by_definition() -> None:
    """The twins keep softmax and say what the entropy of a mean is, over several steps."""
    logits = normal(6, 50)
    kept, total = torch.empty(6, 50).double(), torch.full((2, 50), nan).double()
    standing = torch.tensor([FRESH, BEGUN, FRESH, NEVER, SAYING, BEGUN], dtype=torch.int32)
    marks = torch.zeros(50, dtype=torch.int8)
    marks[7], marks[8] = ENDS_MARK, IS_MARK
    tokens = torch.tensor([8, 7, 7, 8, 9, 8])
    places = keep_rows_ref(kept, logits, row_stats_ref(logits).lse, tokens, standing, marks, 0, 6).places
    assert places.tolist() == [1, 2, -1, -1, 0, 3]
    probs = logits.double().softmax(1)
    torch.testing.assert_close(kept[:4], probs[[4, 0, 1, 5]])
    add_rows_ref(total, kept, [Addition(1, 1, [0])])
    mixed = add_rows_ref(total, kept, [Addition(1, 3, [2, 1]), Addition(0, 1, [3])]).entropy
    torch.testing.assert_close(mixed[0], Categorical(probs=probs[[0, 1, 4]].mean(0)).entropy())
    torch.testing.assert_close(mixed[1], Categorical(probs=probs[5]).entropy())


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


def test_slot_errors() -> None:
    """What is wrong is said, with what to give; nothing is written."""
    kept, tokens, standing = torch.zeros(4, 10), torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int32)
    marks = torch.zeros(10).to(torch.int8)
    for path in ("ref", "kernel"):
        keep = partial(keep_rows, kept, LOGITS, path=path)
        with pytest.raises(ValueError, match="tokens of shape \\(3,\\): give \\[4\\]"):
            keep(None, tokens[:3], standing, marks, 0, 4)
        with pytest.raises(ValueError, match="marks of shape \\(9,\\): give \\[10\\]"):
            keep(None, tokens, standing, marks[:9], 0, 4)
        with pytest.raises(ValueError, match="places from 2 to 5 are outside 0 to 4"):
            keep(None, tokens, standing, marks, 2, 5)
        for additions, message in (
            ([Addition(4, 1, [0])], "from 0 to 3"),
            ([Addition(1, 1, [0]), Addition(1, 2, [0])], "give each once"),
            ([Addition(1, 1, [])], "give 1 to 1"),
            ([Addition(1, 1, [0, 1])], "slot 1 of 1 rows with places \\[0, 1\\]"),
            ([Addition(1, 1, [4])], "from 0 to 3"),
        ):
            with pytest.raises(ValueError, match=message):
                add_rows(kept, kept, additions, path=path)


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
