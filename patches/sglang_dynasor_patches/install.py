"""Preflight, registration and proof of the patches.

SGLang logs and swallows what a plugin raises, and skips a hook it cannot apply. So nothing is registered before every
signature was checked, and a process that relies on the patches proves them live first.
"""

from __future__ import annotations

import inspect
import multiprocessing
import pkgutil
from collections.abc import Callable
from typing import Any

from packaging.specifiers import SpecifierSet
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.version import __version__ as sglang_version

from sglang_dynasor.config import SGLANG_RANGE
from sglang_dynasor.errors import DynasorError, PatchError
from sglang_dynasor_patches.patch import Patch, Role
from sglang_dynasor_patches.records import FENCE, MESSAGES, PATCHES, SERVER_ARGS

_ROLES: dict[str, tuple[Role, ...]] = {
    "run_detokenizer_process": (),
    "run_data_parallel_controller_process": ("router",),
    "run_scheduler_process": ("scheduler",),
    "run_scheduler_process_with_init_pipe": ("scheduler",),
}
_ALL_ROLES: tuple[Role, ...] = (
    "flag",
    "main",
    "scheduler",
    "router",
)  # forked children inherit the main process's hooks

_problems: list[str] = []


def process_roles() -> tuple[Role, ...]:
    """What this process needs, by the function that SGLang started it with."""
    target = getattr(multiprocessing.current_process(), "_target", None)
    return _ROLES.get(getattr(target, "__name__", ""), _ALL_ROLES)


def check_version(version: str = sglang_version) -> str | None:
    """What is wrong with this SGLang version, or None."""
    if SpecifierSet(SGLANG_RANGE).contains(version, prereleases=True):
        return None
    return f"SGLang {version} is not supported: install one with pip install 'sglang{SGLANG_RANGE}'"


def check_patch(patch: Patch) -> str | None:
    """What is wrong with a patch's target in the installed SGLang, or None."""
    remedy = f"SGLang {sglang_version}; install one in {SGLANG_RANGE}, or update sglang-dynasor"
    try:
        target: Any = inspect.unwrap(pkgutil.resolve_name(patch.target))
    except (ImportError, AttributeError) as error:
        return f"patch {patch.target}: not found ({error}) in {remedy}"
    target = getattr(target, "__func__", target)
    params = tuple(inspect.signature(target).parameters)
    if params != patch.params:
        return f"patch {patch.target}: parameters are {', '.join(params)}; expected {', '.join(patch.params)}; {remedy}"
    return None


def preflight(roles: tuple[Role, ...] = _ALL_ROLES) -> list[str]:
    """Every reason why the patches of these roles cannot be applied; empty if they can."""
    if (wrong := check_version()) is not None:
        return [wrong]
    return [wrong for patch in PATCHES if patch.role in roles and (wrong := check_patch(patch)) is not None]


def register() -> None:
    """Entry point `sglang.srt.plugins`: register this process's patches, or only the flag's if one would not fit.

    Then `--scheduler dynasor` still gets a clear refusal, and without it SGLang is untouched.
    """
    roles = process_roles()
    is_main = "main" in roles
    _problems[:] = preflight(roles)
    if _problems:
        roles = tuple(role for role in roles if role == "flag")
    elif roles:
        pkgutil.resolve_name(MESSAGES)()  # not a hook: SGLang's own seam for types of messages
    for patch in PATCHES:
        if patch.role in roles and not (_problems and check_patch(patch)):
            HookRegistry.register(patch.target, _guarded(patch), HookType(patch.kind))
    if is_main:
        # Also where hooks are missing: it is what refuses then. Not a hook: SGLang's own seam for the arguments of sgl.Engine.
        from sglang.srt.entrypoints.engine import Engine

        Engine.server_args_class = staticmethod(pkgutil.resolve_name(SERVER_ARGS))  # pyright: ignore[reportAttributeAccessIssue]


def _guarded(patch: Patch) -> Callable[..., Any]:
    hook = pkgutil.resolve_name(patch.hook)
    # In the front process a wrong field is raised for SGLang to answer; in the others nobody would.
    passes = DynasorError if patch.role == "main" else ()
    return pkgutil.resolve_name(FENCE)(patch.kind, hook, passes) if patch.is_fenced else hook


def unproved(roles: tuple[Role, ...]) -> list[str]:
    """The patches of these roles that are not live in this process."""
    missing: list[str] = []
    for patch in PATCHES:
        if patch.role not in roles:
            continue
        hook = pkgutil.resolve_name(patch.hook)
        registered = (entry[1] for entry in HookRegistry._hooks.get(patch.target, ()))
        is_registered = any(getattr(entry, "__wrapped__", entry) is hook for entry in registered)
        target: Any = pkgutil.resolve_name(patch.target)
        is_wrapped = hasattr(getattr(target, "__func__", target), "__wrapped__")
        if not (is_registered and patch.target in HookRegistry._patched and is_wrapped):
            missing.append(f"patch {patch.target}: not live in this process (SGLang {sglang_version})")
    return missing


def require_live(roles: tuple[Role, ...]) -> None:
    """Raise PatchError with every reason unless the patches of these roles are live in this process."""
    wrong = _problems or unproved(roles)
    if wrong:
        raise PatchError("--scheduler dynasor cannot be served: " + "; ".join(wrong))
