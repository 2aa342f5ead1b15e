"""The device that would serve, or the command that gets one."""

from __future__ import annotations

import os
import shlex
import sys
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

CPU_PLATFORM = "torch_cpu"


def cpu_platform_folder() -> Path:
    """The source of the CPU platform, a distribution of its own: beside our modules in a wheel, in examples/ in a checkout."""
    package = Path(__file__).parents[1]
    folders = (package / "cpu_platform", package.parent / "examples" / "cpu_platform")
    return next((folder for folder in folders if (folder / "pyproject.toml").is_file()), folders[0])


def cpu_platform_command() -> str:
    """The shell command that installs the CPU platform into this environment."""
    python = shlex.quote(sys.executable)
    installer = f"{python} -m pip install" if has_pip() else f"uv pip install --python {python}"
    return f"{installer} {shlex.quote(str(cpu_platform_folder()))}"


def has_pip() -> bool:
    """Whether pip is installed here. Not by looking for its module: setuptools takes that for pip at work, and gives up its distutils."""
    try:
        version("pip")
    except PackageNotFoundError:
        return False
    return True


def missing_device() -> str | None:
    """Why SGLang could serve on no device here, with the remedy; None where it could on one."""
    from sglang.srt.utils import get_device

    try:
        get_device()
    except RuntimeError:
        pass
    else:
        return None
    if any(entry.name == CPU_PLATFORM for entry in entry_points(group="sglang.srt.platforms")):
        chosen = {name: os.environ.get(name) for name in ("SGLANG_PLUGINS", "SGLANG_PLATFORM")}
        return (
            f"PyTorch sees no accelerator, and the CPU platform {CPU_PLATFORM} is installed but not chosen: "
            + ", ".join(f"{name}={value!r}" for name, value in chosen.items() if value)
            + f"; add {CPU_PLATFORM}, or unset it"
        )
    return (
        "PyTorch sees no accelerator, and no SGLang platform is installed; to serve on this CPU: "
        + cpu_platform_command()
    )


def serving_device() -> str:
    """The device that SGLang would serve on, and by which platform. Only where `missing_device` is None."""
    import torch
    from sglang.srt.platforms import current_platform
    from sglang.srt.utils import get_device

    kind = get_device()
    if kind == "cuda":
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        return f"{torch.cuda.device_count()} x {', '.join(sorted(names))}"
    platform = type(current_platform)
    by = platform.__module__.partition(".")[0] if not platform.__module__.startswith("sglang.") else "SGLang itself"
    return f"{kind}, served by {by}"
