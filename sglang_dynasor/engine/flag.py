"""`--scheduler dynasor`: from the command line or `sgl.Engine` to every process, or a clear refusal, of the start or of programs."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sglang.srt.server_args import ServerArgs

from sglang_dynasor.config import DynasorConfig, add_options, take_config
from sglang_dynasor.engine.device import missing_device
from sglang_dynasor.engine.fence import FENCE
from sglang_dynasor.errors import ConfigError, DynasorError
from sglang_dynasor.policy.spec import ProgramSpec
from sglang_dynasor.policy.templates import Templates, parse_templates

logger = logging.getLogger(__name__)

# What programs do not work with yet: attribute of ServerArgs, the values that are fine, and why. A server with another value
# serves plain requests as stock SGLang does.
WITHOUT_PROGRAMS: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("speculative_algorithm", (None,), "a branch's tokens would be counted wrong"),
    ("pp_size", (1,), "pipeline ranks hold different batches"),
    ("attn_dp_size", (None, 1), "the ranks of data-parallel attention hold different batches"),
    ("enable_dp_attention", (False,), "the ranks of data-parallel attention hold different batches"),
    ("enable_pdmux", (False,), "it fills prefill batches past the line of programs"),
    ("enable_hisparse", (False,), "its rows are counted elsewhere"),
    ("disaggregation_mode", ("null",), "branches need the prompt's KV in one place"),
    ("dllm_algorithm", (None,), "diffusion models have no branches of tokens"),
    ("skip_tokenizer_init", (False,), "answers are read from text"),
    ("is_embedding", (False,), "an embedding has no answer"),
)


def config_of(server_args: Any) -> DynasorConfig:
    """The settings that travel with SGLang's own; stock SGLang's when none do."""
    return getattr(server_args, "_dynasor", None) or DynasorConfig()


def is_off(server_args: Any) -> str:
    """Why a server that was asked to serve programs does not; empty where it does, and where it was not asked."""
    return getattr(server_args, "_dynasor_off", "")


def has_many_fronts(server_args: Any) -> bool:
    """Whether requests come in by tokenizer workers, in which SGLang loads no plugins (gate.py)."""
    return getattr(server_args, "tokenizer_worker_num", 1) > 1


def serves_programs(server_args: Any) -> bool:
    return config_of(server_args).is_on and not is_off(server_args)


def read_templates(config: DynasorConfig, check: Callable[[ProgramSpec], None] | None = None) -> tuple[Templates, str]:
    """The operator's templates, and the text they were read from.

    Args:
        check: raises FieldError for what this server cannot serve.

    Raises:
        ConfigError: the file cannot be read, or something in it is wrong; the message begins with the file and the line.
    """
    file = config.dynasor_templates
    try:
        text = Path(file).read_text(encoding="utf-8") if file else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--dynasor-templates={file!r} cannot be read: {error}") from None
    level, default = config.dynasor_level, config.dynasor_default
    return parse_templates(text, file, config.dynasor_max_branches, level, default, check), text


def attach(server_args: ServerArgs, config: DynasorConfig) -> ServerArgs:
    """Let `config` travel with `server_args` into every process.

    Raises:
        ConfigError: SGLang was told to be served by what loads no plugins.
        PatchError: a hook is missing.
    """
    if not config.is_on:
        return server_args
    read_templates(config)
    from sglang_dynasor_patches.install import require_live

    require_live(("flag", "main", "scheduler", "router"))
    if os.environ.get("SGLANG_RUST_SERVER", "0").lower() in ("1", "true"):
        raise ConfigError("--scheduler dynasor does not work with SGLANG_RUST_SERVER; unset it")
    if has_many_fronts(server_args):
        for name in ("templates", "default", "log", "owner_header"):
            value = getattr(config, f"dynasor_{name}")
            if value:
                raise ConfigError(
                    f"--dynasor-{name}={value!r} does not work with --tokenizer-worker-num above 1, because SGLang loads no plugins in "
                    "tokenizer workers; leave out one of the two"
                )
    FENCE.is_strict = config.dynasor_strict
    # Underscore attributes survive pickling.
    server_args._dynasor = config  # type: ignore[attr-defined]
    server_args._dynasor_off = why_off(server_args)  # type: ignore[attr-defined]
    if off := is_off(server_args):
        logger.warning("dynasor: %s Plain requests are served as by stock SGLang.", off)
    return server_args


def why_off(server_args: Any) -> str:
    """The first of WITHOUT_PROGRAMS that these arguments of SGLang's have, said so that a client understands; empty: none."""
    if server_args.enable_priority_scheduling and not server_args.disable_priority_preemption:
        return (
            "This server takes no programs: --enable-priority-scheduling does not work with them (its preemption takes gangs "
            "apart); it would have to come with --disable-priority-preemption."
        )
    for name, fine, why in WITHOUT_PROGRAMS:
        value = getattr(server_args, name, fine[0])
        if value not in fine:
            return f"This server takes no programs: --{name.replace('_', '-')}={value!r} does not work with them ({why}); it would have to be {fine[0]!r}."
    return ""


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
