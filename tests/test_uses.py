"""What our code names of SGLang, looked up in sources: the installed one has all of it, a changed one is told apart."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import sglang
from engines import ROOT

from sglang_dynasor_patches.patch import Patch
from sglang_dynasor_patches.records import PATCHES
from sglang_dynasor_patches.uses import OBJECTS, Source, problems, uses

INSTALLED = Path(next(iter(sglang.__path__))).parent
OURS = ROOT / "sglang_dynasor"


def test_the_installed_sglang_has_all_of_it() -> None:
    num, wrong = problems(OURS, INSTALLED)
    assert wrong == []
    assert num > 150
    assert {use.target for use in uses(OURS)} >= {
        "sglang.srt.managers.scheduler.Scheduler.waiting_queue",
        "sglang.srt.managers.schedule_batch.Req.to_finish",
        "sglang.srt.mem_cache.common.release_kv_cache",
    }
    assert all(Source(INSTALLED).find(target) for target in OBJECTS.values())


def test_every_hook_fits_the_installed_sglang() -> None:
    """Also by its source alone, as another version's is looked at."""
    assert [Source(INSTALLED).changed(patch) for patch in PATCHES] == [None] * len(PATCHES)


SCHEDULER = """
from .base import Base
class Scheduler(Base):
    chunked_req = None
    def __init__(self): self.waiting_queue: list = []
    def send(self, req, *, extra=1): hidden = 1
"""
FILES = {
    "__init__.py": "", "srt/__init__.py": "", "srt/managers/__init__.py": "", "srt/managers/scheduler.py": SCHEDULER,
    "srt/managers/base.py": "class Base:\n    def __init__(self): self.tree_cache, self.policy = 1, 2\n",
    "srt/utils/__init__.py": "from .common import *\nfrom sglang.srt.utils.data import Record as Renamed\n",
    "srt/utils/common.py": "try:\n    import fast\nexcept ImportError:\n    def load(path, **rest): ...\n",
    "srt/utils/data.py": "class Record:\n    size: int\n    shape: tuple = ()\n",
}  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / "sglang" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("scheduler.waiting_queue", ""), ("self.scheduler.tree_cache", ""), ("scheduler.chunked_req.rid", ""), ("scheduler.policy", ""),
        ("scheduler._dynasor = 1", ""), ("scheduler.send(req, extra=2)", ""),
        ("from sglang.srt.utils import load\nload(1, anything=2)", ""), ("from sglang.srt.utils import Renamed\nRenamed(size=1, shape=2)", ""),
        ("import numpy\nnumpy.anything(x=1)", ""),
        ("scheduler.gone", "Scheduler.gone is not there (used in engine/x.py:1)"), ("scheduler.hidden", "Scheduler.hidden is not there"),
        ("scheduler.send(req, new=2)", "Scheduler.send takes no new"),
        ("from sglang.srt.utils import lost", "sglang.srt.utils.lost is not there"),
        ("from sglang.srt.gone import load", "sglang.srt.gone.load is not there"),
        ("from sglang.srt.utils import Renamed\nRenamed(size=1, weight=2)", "Renamed takes no weight"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_told(
    source: Path, tmp_path_factory: pytest.TempPathFactory, code: str, wrong: str
) -> None:
    """And nothing else: what is inherited, assigned to self, imported from elsewhere, or ours."""
    ours = tmp_path_factory.mktemp("ours")
    (ours / "engine").mkdir()
    (ours / "engine" / "x.py").write_text(code)
    _, told = problems(ours, source, patches=())
    assert [wrong in line for line in told] == ([True] if wrong else [])


def test_words_of_ours_elsewhere_are_no_sglang_s(source: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    ours = tmp_path_factory.mktemp("ours")
    (ours / "sim.py").write_text("scheduler.gone")
    assert problems(ours, source, patches=()) == (0, [])


def test_a_hook_s_target_that_changed_is_told(source: Path) -> None:
    target = "sglang.srt.managers.scheduler.Scheduler.send"
    hooks = [
        Patch(name, "after", params, "x", "scheduler", "x", "x")
        for name, params in ((target, ("self", "req", "extra")), (target, ("self",)), (f"{target}s", ()))
    ]
    assert [Source(source).changed(hook) for hook in hooks] == [
        None,
        f"patch {target}: parameters are self, req, extra; expected self",
        f"patch {target}s: not there",
    ]


def test_the_command_tells_what_would_break(source: Path) -> None:
    """Exit code 1, and one line each; 2 where there is no SGLang."""

    def run(folder: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sglang_dynasor_patches.uses", str(folder)]
        return subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)

    broken = run(source)
    assert broken.returncode == 1
    assert "patch sglang.srt.server_args.ServerArgs.add_cli_args: not there" in broken.stdout
    assert run(source / "sglang").returncode == 2
