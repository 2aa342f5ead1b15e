"""The ledger of patches against the installed SGLang, and what happens when it does not fit."""

from __future__ import annotations

import inspect
import pkgutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from engines import CHECKPOINT, ROOT
from warm import run_python

from sglang_dynasor.config import DynasorConfig
from sglang_dynasor.engine.front import check_schedulers
from sglang_dynasor.engine.hooks import observe
from sglang_dynasor.errors import PatchError
from sglang_dynasor_patches import install
from sglang_dynasor_patches.records import PATCHES
from sglang_dynasor_patches.table import README, ledger


def test_every_target_is_as_expected() -> None:
    """Preflight finds nothing wrong with the SGLang installed here."""
    assert install.preflight() == []


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.target.rpartition(".")[2])
def test_every_hook_fits_its_target(patch: install.Patch) -> None:
    """Our function takes what the hook hands it, and each record says why and until when."""
    hook = pkgutil.resolve_name(patch.hook)
    extra = {"before": 0, "after": 1, "around": 1}[patch.kind]
    names = [f"arg{i}" for i in range(extra + len(patch.params))]
    inspect.signature(hook).bind(*names)
    assert patch.why
    assert patch.remove_when


def test_a_changed_signature_is_named_with_a_remedy() -> None:
    """The message names the patch, the SGLang version and what to do."""
    wrong = install.check_patch(replace(PATCHES[0], params=("parser", "extra")))
    assert wrong is not None
    assert PATCHES[0].target in wrong
    assert install.sglang_version in wrong
    assert "install one in" in wrong


def test_a_missing_target_is_named() -> None:
    """A target that is gone is a problem, not a crash."""
    wrong = install.check_patch(replace(PATCHES[0], target="sglang.srt.server_args.Gone.method"))
    assert wrong is not None
    assert "not found" in wrong


@pytest.mark.parametrize(
    ("version", "is_fine"), [("0.5.22", False), ("0.5.23", True), ("0.5.24", False), ("0.6.0", False)]
)
def test_the_supported_range(version: str, is_fine: bool) -> None:
    """Versions outside the range are refused with the remedy."""
    wrong = install.check_version(version)
    assert (wrong is None) == is_fine
    assert is_fine or (wrong is not None and "pip install" in wrong)


def test_an_engine_is_refused_where_hooks_do_not_fit() -> None:
    """Also `sgl.Engine`, which knows no such argument itself."""
    code = (
        "from sglang_dynasor_patches import install; install.check_version = lambda *version: 'SGLang 9 is not supported'\n"
        "install.register()\n"
        "from sglang.srt.entrypoints.engine import Engine\n"
        "Engine.server_args_class(model_path='x', scheduler='dynasor')"
    )
    done = run_python(["-c", code])
    assert done.returncode != 0
    assert f"{PatchError.__name__}: " in done.stderr
    assert "SGLang 9 is not supported" in done.stderr


def test_hooks_that_are_not_live_are_refused() -> None:
    """Nothing is applied in this process, so the proof must fail and say which patch."""
    done = run_python(["-c", "from sglang_dynasor_patches.install import require_live; require_live(('scheduler',))"])
    assert done.returncode != 0
    assert PatchError.__name__ in done.stderr
    assert "Scheduler._add_request_to_queue: not live" in done.stderr


@pytest.mark.parametrize(
    ("scheduler", "infos", "is_refused"),
    [
        ("dynasor", [{"dynasor": "0.1.0"}], False),
        ("dynasor", [{"status": "ready"}], True),
        ("dynasor", [], True),
        (None, [{"status": "ready"}], False),
    ],
)
def test_the_handshake(scheduler: str | None, infos: list[dict[str, str]], is_refused: bool) -> None:
    """A scheduler that came up without the hooks stops the start; a good one, or no flag, does not."""
    args = SimpleNamespace(_dynasor=DynasorConfig(scheduler), dp_size=1)
    result = (None, SimpleNamespace(scheduler_infos=infos))
    if is_refused:
        with pytest.raises(PatchError, match="without the hooks"):
            check_schedulers(result, object, args)
    else:
        check_schedulers(result, object, args)


# Run like `sglang`, but with something broken first.
BROKEN = """
import sys
{breakage}
from sglang.cli.main import main
sys.argv = ["sglang", "serve", "--model-path", {model!r}, "--port", "1", *{args!r}]
main()
"""


def run_broken(breakage: str, *args: str) -> subprocess.CompletedProcess[str]:
    code = BROKEN.format(breakage=breakage, model=str(CHECKPOINT), args=args)
    return run_python(["-c", code])


@pytest.mark.parametrize(
    ("breakage", "args", "message"),
    [
        ("import sglang.version; sglang.version.__version__ = '0.4.1'", (), "SGLang 0.4.1 is not supported"),
        (
            "import sglang_dynasor_patches.records as r, dataclasses\n"
            "r.PATCHES = tuple(dataclasses.replace(p, params=('self',)) if p.target.endswith('abort_request') else p for p in r.PATCHES)",
            (),
            "patch sglang.srt.managers.scheduler.Scheduler.abort_request: parameters are self, recv_req; expected self",
        ),
        ("", ("--dynasor-max-branches", "0"), "--dynasor-max-branches=0 is outside [1, 256]"),
        ("import os; os.environ['SGLANG_RUST_SERVER'] = '1'", (), "SGLANG_RUST_SERVER"),
    ],
    ids=["version", "signature", "range", "rust"],
)
def test_what_cannot_be_served_stops_the_start_with_one_line(
    breakage: str, args: tuple[str, ...], message: str
) -> None:
    """With the flag a mismatch is exit code != 0 and one clear line, no traceback."""
    done = run_broken(breakage, "--scheduler", "dynasor", *args)
    assert done.returncode not in (0, None)
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert message in line
    assert "Traceback" not in done.stderr


def test_launch_server_takes_the_flag_too() -> None:
    """`python -m sglang.launch_server` reads the same options and refuses the same."""
    done = run_python(
        [
            *("-m", "sglang.launch_server", "--model-path", str(CHECKPOINT), "--port", "1"),
            *("--scheduler", "dynasor", "--dynasor-max-branches", "999"),
        ]
    )
    assert done.returncode != 0
    assert "error: --dynasor-max-branches=999 is outside [1, 256]" in done.stderr


def test_an_unknown_scheduler_is_refused() -> None:
    """argparse names what is allowed."""
    done = run_broken("", "--scheduler", "fancy")
    assert done.returncode != 0
    assert "invalid choice: 'fancy'" in done.stderr


def test_without_the_flag_a_mismatch_leaves_sglang_alone() -> None:
    """An unsupported version registers nothing but the option itself."""
    code = (
        "import sglang.version; sglang.version.__version__ = '0.4.1'\n"
        "from sglang.srt.plugins import load_plugins; load_plugins()\n"
        "from sglang.srt.plugins.hook_registry import HookRegistry\n"
        "print(sorted(t for t, hooks in HookRegistry._hooks.items() if any('sglang_dynasor' in h[1].__module__ for h in hooks)))"
    )
    done = run_python(["-c", code])
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-1] == str(
        ["sglang.srt.server_args.ServerArgs.add_cli_args", "sglang.srt.server_args.ServerArgs.from_cli_args"]
    )


def test_the_ledger_is_up_to_date() -> None:
    """patches/README.md is what the records say (`make readme`)."""
    assert README.read_text() == ledger()


def test_hugging_face_kernels_is_not_shadowed() -> None:
    """From the repository's root, `kernels` must be Hugging Face's package: SGLang falls back in silence otherwise."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    subprocess.run([sys.executable, "-c", "from kernels import get_kernel"], cwd=ROOT, check=True)


def test_another_plugin_s_observer_is_not_overwritten() -> None:
    """SGLang has room for one sampling observer: ours goes where none is, and refuses to push one out."""
    observer = object()
    free, taken = (SimpleNamespace(sampling_observer=there, device="cpu") for there in (None, "theirs"))
    observe(free, observer)  # type: ignore[arg-type]
    assert free.sampling_observer is observer
    with pytest.raises(PatchError, match="another plugin's sampling observer"):
        observe(taken, observer)  # type: ignore[arg-type]
    assert taken.sampling_observer == "theirs"


CONFIGURED = """
import sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import prepare_server_args
from sglang_dynasor.engine.flag import config_of
print(config_of(prepare_server_args(["--config", sys.argv[1], "--dynasor-width", "3"])))
"""


def test_a_config_file_carries_our_options(tmp_path: Path) -> None:
    """SGLang's `--config` YAML: ours are read like SGLang's own, and the command line wins."""
    config = tmp_path / "server.yaml"
    config.write_text(
        f"model-path: {CHECKPOINT}\nscheduler: dynasor\ndynasor-width: 5\ndynasor-strict: true\n"
        "dynasor-tenant-weights: gold=4\n"
    )
    done = run_python(["-c", CONFIGURED, str(config)])
    assert done.returncode == 0, done.stderr[-2000:]
    for part in ("scheduler='dynasor'", "dynasor_width=3", "dynasor_strict=True", "dynasor_tenant_weights='gold=4'"):
        assert part in done.stdout
