"""What a user gets: the wheel, built from the sdist, works beside SGLang in an environment that has never seen the checkout."""

from __future__ import annotations

import email
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from engines import CHECKPOINT, ROOT

PACKAGES = {
    "sglang_dynasor": ROOT / "sglang_dynasor",
    "sglang_dynasor_kernels": ROOT / "kernels" / "sglang_dynasor_kernels",
    "sglang_dynasor_patches": ROOT / "patches" / "sglang_dynasor_patches",
    "sglang_dynasor/cpu_platform": ROOT / "examples" / "cpu_platform",
}
# Of the project's environment, what the new one must not see.
OURS = re.compile(r"_?(sglang_dynasor|sglang_torch_cpu|editable_impl_sglang)", re.IGNORECASE)


def run(*command: str, cwd: Path, timeout_s: float = 500) -> subprocess.CompletedProcess[str]:
    """Run a command from `cwd` with nothing of this checkout in its environment."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SGLANG_"))}
    return subprocess.run(
        command, cwd=cwd, env={**env, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the sdist and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    done = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT), cwd=folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


def wheel_of(dist: Path) -> Path:
    (wheel,) = dist.glob("sglang_dynasor-*.whl")
    return wheel


def test_the_wheel_holds_every_module(dist: Path) -> None:
    """All modules of all packages, their py.typed and the CPU platform's source, and no other top-level folder."""
    names = set(zipfile.ZipFile(wheel_of(dist)).namelist())
    for package, folder in PACKAGES.items():
        expected = {f"{package}/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*.py")}
        assert expected
        assert expected <= names, f"not in the wheel: {sorted(expected - names)}"
    assert {f"{package}/py.typed" for package in list(PACKAGES)[:3]} <= names
    assert "sglang_dynasor/cpu_platform/pyproject.toml" in names
    assert {
        f"sglang_dynasor/page/static/{path.name}" for path in (ROOT / "sglang_dynasor/page/static").iterdir()
    } <= names
    tops = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"sglang_dynasor", "sglang_dynasor_kernels", "sglang_dynasor_patches"}


def test_the_metadata_is_what_an_index_shows(dist: Path) -> None:
    """twine finds nothing wrong, the Python range is the one that `check` names, and every picture has a whole address."""
    done = run(sys.executable, "-m", "twine", "check", "--strict", *map(str, dist.iterdir()), cwd=dist)
    assert done.returncode == 0, done.stdout + done.stderr
    wheel = zipfile.ZipFile(wheel_of(dist))
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(wheel.read(name))
    assert set(metadata["Requires-Python"].split(",")) == {">=3.11", "<3.13"}
    assert any("arxiv.org/abs/2412.20993" in url for url in metadata.get_all("Project-URL", []))
    pictures = re.findall(r"!\[[^\]]*\]\(([^)\s]+)|<img[^>]+src=[\"']([^\"']+)", metadata.get_payload())
    assert all(markdown.startswith("https://") or html.startswith("https://") for markdown, html in pictures), pictures


PROGRAMS = """
import json, sys
import sglang as sgl
import sglang_dynasor
from sglang_dynasor.frontend import LocalEngine, reason

QUESTION = "Q: Coins: Ann 12. Bob gets 7 more than Ann. How many coins does Bob get?\\nA:\\n"
SAMPLING = {"temperature": 0.3, "max_new_tokens": 200}  # hotter, now and then most of eight are wrong


@sgl.function
def solve(s, question):
    s += question
    with reason(s, branches=8, answer="hash") as p:
        for branch in p.fork():
            branch += sgl.gen("steps", max_tokens=200, temperature=0.3)
    return p


if __name__ == "__main__":
    engine = sgl.Engine(
        model_path=sys.argv[1], scheduler="dynasor", dtype="float32", max_total_tokens=20_000, log_level="error"
    )
    field = {"dynasor": {"branches": 8, "answer": "hash"}}
    record = engine.generate(QUESTION, {**SAMPLING, "custom_params": field})["meta_info"]["dynasor"]
    with LocalEngine(engine) as backend:
        p = solve.run(question=QUESTION, backend=backend).ret_value
    engine.shutdown()
    engine_says = {"answer": record["answer"], "branches": record["num_branches"]}
    frontend_says = {"answer": p.answer, "stop": p.stop_reason}
    print(json.dumps({"from": sglang_dynasor.__file__, "engine": engine_says, "frontend": frontend_says}))
"""


@pytest.mark.engine
def test_the_wheel_works_beside_sglang(dist: Path, tmp_path: Path) -> None:
    """Installed outside the checkout: the server says how to get the CPU platform, and with it all of it works."""
    python = new_environment(tmp_path / "env")
    away = tmp_path / "away"
    away.mkdir()
    install = ("-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation")
    done = run(str(python), *install, str(wheel_of(dist)), cwd=away)
    assert done.returncode == 0, done.stderr

    serve = ("-m", "sglang.launch_server", "--model-path", str(CHECKPOINT), "--port", "1", "--scheduler", "dynasor")
    if not has_accelerator():
        done = run(str(python), *serve, cwd=away)
        assert done.returncode != 0
        (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
        assert "no SGLang platform is installed" in line
        command = shlex.split(line.rpartition("to serve on this CPU: ")[2])
        assert command[:4] == [str(python), *install[:3]]
        done = run(str(python), *install, command[-1], cwd=away)  # as told, but from no index
        assert done.returncode == 0, done.stderr

    done = run(str(python.parent / "sglang-dynasor"), "check", "--json", cwd=away)
    rows = json.loads(done.stdout)
    assert done.returncode == 0, [row for row in rows if not row["is_met"]]
    assert done.stderr == ""

    (away / "programs.py").write_text(PROGRAMS)
    done = run(str(python), "programs.py", str(CHECKPOINT), cwd=away)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.strip().rpartition("\n")[2])
    assert Path(told["from"]).is_relative_to(tmp_path)
    assert told["engine"]["answer"] == told["frontend"]["answer"] == "19"
    assert told["engine"]["branches"] <= 8
    assert told["frontend"]["stop"] in ("certain", "cap")


def new_environment(folder: Path) -> Path:
    """The Python of a new environment that sees every package of the project's but ours."""
    done = run(sys.executable, "-m", "venv", "--without-pip", str(folder), cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    shared = folder / "shared"
    shared.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not OURS.match(entry.name):
            (shared / entry.name).symlink_to(entry)
    python = folder / "bin" / "python"
    site = run(
        str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=folder
    ).stdout.strip()
    (Path(site) / "shared.pth").write_text(f"import site; site.addsitedir({str(shared)!r})\n")
    return python


def has_accelerator() -> bool:
    import torch

    return torch.accelerator.current_accelerator(check_available=True) is not None
