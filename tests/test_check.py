"""`sglang-dynasor check`: one row per requirement, and how to get a device where none is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engines import ROOT

from sglang_dynasor import check
from sglang_dynasor.config import DynasorConfig
from sglang_dynasor.engine import device, flag
from sglang_dynasor.errors import ConfigError
from sglang_dynasor_patches.records import PATCHES


def run_cli(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sglang_dynasor.cli", *args],
        capture_output=True, text=True, check=False, timeout=500, env={**os.environ, **env},
    )  # fmt: skip


def test_check_prints_one_row_per_requirement() -> None:
    """`sglang-dynasor check` is green here, names every patch and the device, and prints nothing else."""
    done = run_cli("check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(patch.target.removeprefix("sglang.srt.") in done.stdout for patch in PATCHES)
    assert "FAIL" not in done.stdout
    assert any(line.startswith("ok    device") for line in done.stdout.splitlines())
    assert done.stderr == ""


def test_check_fails_with_the_remedy() -> None:
    """A filtered plugin is a row that fails, and exit code 1; as JSON too."""
    done = run_cli("check", "--json", SGLANG_PLUGINS="torch_cpu")
    assert done.returncode == 1
    assert done.stderr == ""
    (failed,) = (row for row in json.loads(done.stdout) if not row["is_met"])
    assert failed["name"] == "plugin is not filtered out"
    assert failed["detail"] == "SGLANG_PLUGINS='torch_cpu'; add dynasor"


def test_an_sglang_that_cannot_be_imported_is_a_row(tmp_path: Path) -> None:
    """What it died of and the remedy, no traceback."""
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "__init__.py").write_text("raise ImportError('libcudart.so.99 is missing')")
    done = run_cli("check", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("FAIL"))
    assert "libcudart.so.99 is missing; install it with pip install 'sglang" in line
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("hook", "wrong"),
    [
        (PATCHES[0].hook, None),
        ("sglang_dynasor.gone.f", "No module named 'sglang_dynasor.gone'; reinstall sglang-dynasor"),
        ("sglang_dynasor.check.gone", "has no attribute 'gone'; reinstall sglang-dynasor"),
    ],
    ids=["there", "module gone", "function gone"],
)
def test_a_hook_that_cannot_be_loaded_is_named(hook: str, wrong: str | None) -> None:
    """SGLang would log it and go on: an installation that misses a module must not look fine."""
    found = check.check_hook(hook)
    assert found is None if wrong is None else found is not None and found.endswith(wrong)


@pytest.mark.parametrize(
    ("python", "is_met"),
    [((3, 10, 14), False), ((3, 11, 0), True), ((3, 12, 9), True), ((3, 13, 0), False), ((4, 0, 0), False)],
)
def test_the_range_of_python(python: tuple[int, int, int], is_met: bool) -> None:
    """The one that SGLang's wheels need; outside, the row says which to use."""
    row = check.check_python(python)
    assert row.is_met == is_met
    assert ("use 3.11 or 3.12" in row.detail) == (not is_met)


def test_every_place_names_the_same_range_of_python() -> None:
    """Both distributions, and the script behind `make install`."""
    assert check.PYTHONS == ((3, 11), (3, 12))
    for file in (ROOT / "pyproject.toml", ROOT / "examples" / "cpu_platform" / "pyproject.toml"):
        assert tomllib.loads(file.read_text())["project"]["requires-python"] == ">=3.11,<3.13"
    assert "(3, 11) <= sys.version_info[:2] <= (3, 12)" in (ROOT / ".ci" / "install.sh").read_text()


def test_the_version() -> None:
    """The command line and the installed distribution agree."""
    done = run_cli("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == f"sglang-dynasor {version('sglang-dynasor')}"


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As SGLang finds it on a machine without an accelerator or platform."""

    def get_device() -> str:
        raise RuntimeError("No accelerator")

    monkeypatch.setattr("sglang.srt.utils.get_device", get_device)


def test_a_device_that_is_there_is_not_missing() -> None:
    """Here one serves: an accelerator, or the CPU platform."""
    assert device.missing_device() is None


@pytest.mark.usefixtures("no_device")
def test_a_missing_device_comes_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command installs the CPU platform from where its source lies, with the installer that there is."""
    monkeypatch.setattr(device, "entry_points", lambda group: ())
    wrong = device.missing_device()
    assert wrong is not None
    folder = ROOT / "examples" / "cpu_platform"
    assert wrong.endswith(f"to serve on this CPU: {sys.executable} -m pip install {folder}")
    monkeypatch.setattr(device, "has_pip", lambda: False)
    assert device.cpu_platform_command() == f"uv pip install --python {sys.executable} {folder}"


@pytest.mark.usefixtures("no_device")
def test_a_platform_that_is_installed_but_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then no install helps: the message names the variable that leaves it out."""
    monkeypatch.setattr(device, "entry_points", lambda group: (SimpleNamespace(name="torch_cpu"),))
    monkeypatch.setenv("SGLANG_PLUGINS", "dynasor")
    wrong = device.missing_device()
    assert wrong is not None
    assert "SGLANG_PLUGINS='dynasor'; add torch_cpu" in wrong
    assert "pip install" not in wrong


@pytest.mark.parametrize(
    ("scheduler", "options", "is_refused"),
    [("dynasor", {}, True), ("dynasor", {"device": "cpu"}, False), (None, {}, False)],
    ids=["no device", "named", "off"],
)
def test_a_server_without_a_device_is_refused(
    scheduler: str | None, options: dict[str, Any], is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With our flag, and only where SGLang has to look for one."""
    monkeypatch.setattr(flag, "missing_device", lambda: "there is none; to serve on this CPU: COMMAND")
    config = DynasorConfig(scheduler)
    if is_refused:
        with pytest.raises(ConfigError, match=r"--scheduler dynasor cannot be served: .* COMMAND"):
            flag.refuse_without_device(config, options.get("device"))
    else:
        flag.refuse_without_device(config, options.get("device"))


def test_the_command_leaves_setuptools_alone() -> None:
    """Looking for pip's module would switch the process to the other distutils, and torch.compile fails there."""
    code = (
        "from sglang_dynasor.engine.device import cpu_platform_command\n"
        "assert ' install ' in cpu_platform_command()\n"
        "import distutils.core, setuptools"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
