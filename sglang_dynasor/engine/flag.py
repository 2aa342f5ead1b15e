"""`--scheduler dynasor`: from the command line or `sgl.Engine` to every process, or a clear refusal."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

from sglang.srt.server_args import ServerArgs

from sglang_dynasor.config import DynasorConfig, add_options, take_config
from sglang_dynasor.engine.device import missing_device
from sglang_dynasor.errors import ConfigError, DynasorError

# What programs do not work with yet: attribute of ServerArgs, the values that are fine, and why.
REFUSED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("speculative_algorithm", (None,), "a branch's tokens would be counted wrong"),
    ("pp_size", (1,), "pipeline ranks hold different batches"),
    ("attn_dp_size", (None, 1), "the ranks of data-parallel attention hold different batches"),
    ("enable_dp_attention", (False,), "the ranks of data-parallel attention hold different batches"),
    ("enable_priority_scheduling", (False,), "its preemption takes gangs apart; use dynasor.tenant and its weight"),
    ("enable_pdmux", (False,), "it fills prefill batches past the line of programs"),
    ("enable_hisparse", (False,), "its rows are counted elsewhere"),
    ("disaggregation_mode", ("null",), "branches need the prompt's KV in one place"),
    ("tokenizer_worker_num", (1,), "SGLang loads no plugins in tokenizer workers"),
    ("dllm_algorithm", (None,), "diffusion models have no branches of tokens"),
    ("skip_tokenizer_init", (False,), "answers are read from text"),
    ("is_embedding", (False,), "an embedding has no answer"),
)


def config_of(server_args: Any) -> DynasorConfig:
    """The settings that travel with SGLang's own; stock SGLang's when none do."""
    return getattr(server_args, "_dynasor", None) or DynasorConfig()


def attach(server_args: ServerArgs, config: DynasorConfig) -> ServerArgs:
    """Let `config` travel with `server_args` into every process.

    Raises:
        ConfigError: SGLang was told to do what programs do not work with.
        PatchError: a hook is missing.
    """
    if not config.is_on:
        return server_args
    from sglang_dynasor_patches.install import require_live

    require_live(("flag", "main", "scheduler", "router"))
    for name, fine, why in REFUSED:
        value = getattr(server_args, name, fine[0])
        if value not in fine:
            raise ConfigError(
                f"--scheduler dynasor does not work with --{name.replace('_', '-')}={value!r} ({why}); "
                f"use {fine[0]!r}, or leave --scheduler out"
            )
    if os.environ.get("SGLANG_RUST_SERVER", "0").lower() in ("1", "true"):
        raise ConfigError("--scheduler dynasor does not work with SGLANG_RUST_SERVER; unset it")
    server_args._dynasor = config  # type: ignore[attr-defined]  # an underscore attribute survives pickling
    return server_args


def add_cli_args(result: None, parser: argparse.ArgumentParser) -> None:
    add_options(parser)


def refuse_without_device(config: DynasorConfig, device: str | None) -> None:
    """Say how to get a device where SGLang would find none; it would say only that there is none.

    Raises:
        ConfigError: none is asked for by name, and none is there.
    """
    if config.is_on and device is None and (wrong := missing_device()) is not None:
        raise ConfigError(f"--scheduler dynasor cannot be served: {wrong}")


def from_cli_args(original: Callable[..., ServerArgs], cls: type, args: argparse.Namespace) -> ServerArgs:
    try:
        config, _ = take_config(vars(args))
        refuse_without_device(config, getattr(args, "device", None))
        return attach(original(cls, args), config)
    except DynasorError as error:
        # SGLang would print a traceback; an operator needs the line.
        raise SystemExit(f"error: {error}") from None


def engine_server_args(**kwargs: Any) -> ServerArgs:
    """ServerArgs for `sgl.Engine(scheduler="dynasor", ...)`."""
    config, rest = take_config(kwargs)
    refuse_without_device(config, rest.get("device"))
    return attach(ServerArgs(**rest), config)
