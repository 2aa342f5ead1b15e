"""The operator's settings: one table that the command line, `sgl.Engine`, the checks and docs/reference.md are made from."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from sglang_dynasor.errors import ConfigError, quoted

SGLANG_RANGE = ">=0.5.23,<0.5.24"
# Levels of the rule `predictive` by name, the first the default. docs/results.md has the replay that they come from.
LEVELS = {"careful": 0.05, "balanced": 0.1, "fast": 0.2}
CAREFUL = next(iter(LEVELS))
_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")


@dataclass(frozen=True, slots=True)
class DynasorConfig:
    """What the operator chose. Frozen, so every scheduler process sees the same."""

    scheduler: str | None = None
    dynasor_max_branches: int = 64
    dynasor_level: str = CAREFUL
    dynasor_patience_tokens: int = -1
    dynasor_width: int = 0
    dynasor_max_price: float = 0.0
    dynasor_tenant_weights: str = ""
    dynasor_reward_url: str = ""
    dynasor_reward_timeout_s: float = 10.0
    dynasor_embedding_url: str = ""
    dynasor_equal_timeout_s: float = 10.0
    dynasor_statistics_mib: int = 64
    dynasor_templates: str = ""
    dynasor_default: str = ""
    dynasor_log: str = ""
    dynasor_owner_header: str = ""
    dynasor_show_texts: bool = False
    dynasor_strict: bool = False

    def __post_init__(self) -> None:
        if self.scheduler not in (None, "dynasor"):
            raise ConfigError(
                f"--scheduler={self.scheduler!r} is not a scheduler; use 'dynasor', or leave it out for stock SGLang"
            )
        if not 1 <= self.dynasor_max_branches <= 256:
            raise ConfigError(
                f"--dynasor-max-branches={self.dynasor_max_branches} is outside [1, 256]; choose a value inside"
            )
        check_level(self.dynasor_level, "--dynasor-level")
        if self.dynasor_patience_tokens < -1:
            raise ConfigError(
                f"--dynasor-patience-tokens={self.dynasor_patience_tokens} is below -1; choose -1 (one KV pool), 0 (order "
                "of arrival) or a number of tokens"
            )
        check_width(self.dynasor_width, "--dynasor-width")
        check_price(self.dynasor_max_price, "--dynasor-max-price")
        if self.dynasor_reward_url and not self.dynasor_reward_url.startswith(("http://", "https://")):
            raise ConfigError(
                f"--dynasor-reward-url={self.dynasor_reward_url!r} is no address; write http://HOST:PORT of a server started "
                "with a reward model"
            )
        if not 0 < self.dynasor_reward_timeout_s <= 600:
            raise ConfigError(
                f"--dynasor-reward-timeout-s={self.dynasor_reward_timeout_s} is outside (0, 600]; choose seconds inside"
            )
        if self.dynasor_embedding_url and not self.dynasor_embedding_url.startswith(("http://", "https://")):
            raise ConfigError(
                f"--dynasor-embedding-url={self.dynasor_embedding_url!r} is no address; write http://HOST:PORT of a server "
                "started with an embedding model"
            )
        if not 0 < self.dynasor_equal_timeout_s <= 600:
            raise ConfigError(
                f"--dynasor-equal-timeout-s={self.dynasor_equal_timeout_s} is outside (0, 600]; choose seconds inside"
            )
        if not 1 <= self.dynasor_statistics_mib <= 65_536:
            raise ConfigError(
                f"--dynasor-statistics-mib={self.dynasor_statistics_mib} is outside [1, 65536]; choose MiB inside, at least twelve bytes "
                "for each token of the vocabulary"
            )
        if self.dynasor_log and not os.access(os.path.dirname(self.dynasor_log) or ".", os.W_OK):
            raise ConfigError(
                f"--dynasor-log={self.dynasor_log!r} cannot be written: its folder is not there or not writable; choose another file"
            )
        if self.dynasor_owner_header and not _HEADER.fullmatch(self.dynasor_owner_header):
            raise ConfigError(
                f"--dynasor-owner-header={quoted(self.dynasor_owner_header)} is no name of an HTTP header; write one such as x-user, which your "
                "gateway sets on every request"
            )
        _ = self.tenant_weights

    @property
    def tenant_weights(self) -> dict[str, float]:
        """Weight of each tenant named; the others have 1.

        Raises:
            ConfigError: not of the form NAME=WEIGHT,NAME=WEIGHT, or a weight that is not above 0.
        """
        weights: dict[str, float] = {}
        for part in self.dynasor_tenant_weights.split(","):
            if not part.strip():
                continue
            name, _, text = map(str.strip, part.partition("="))
            try:
                weights[name] = float(text)
            except ValueError:
                weights[name] = 0.0
            if not name or not 0 < weights[name] < float("inf"):
                raise ConfigError(
                    f"--dynasor-tenant-weights={self.dynasor_tenant_weights!r}: {part!r} is no weight; write NAME=WEIGHT "
                    "with a weight above 0, several joined by commas"
                )
        return weights

    @property
    def is_on(self) -> bool:
        return self.scheduler == "dynasor"


def check_level(value: object, name: str = "level") -> None:
    """Raises ConfigError for what is no level."""
    if not isinstance(value, str) or value not in LEVELS:
        raise ConfigError(f"{name}={quoted(value)} is not known; use one of {', '.join(LEVELS)}")


def check_width(value: object, name: str = "width") -> None:
    """Raises ConfigError for what is no width."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 256:
        raise ConfigError(f"{name}={quoted(value)} is outside [0, 256]; choose 0 (the load decides) or more")


def check_price(value: object, name: str = "max_price") -> None:
    """Raises ConfigError for what is no price."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise ConfigError(
            f"{name}={quoted(value)} is no price; choose 0 (none) to 1, such as 0.02: what a branch must be worth under the "
            "heaviest load"
        )


HELP = {
    "scheduler": "'dynasor' makes reasoning programs first-class in the scheduler; without it SGLang is untouched.",
    "dynasor_max_branches": "Most branches one program may ask for (1 to 256).",
    "dynasor_level": f"How sure a program that does not say must be of its answer: {', '.join(LEVELS)}.",
    "dynasor_patience_tokens": "Tokens that later arrivals may get before a waiting program is head of the line "
    "(-1: one KV pool; 0: order of arrival).",
    "dynasor_width": "Branches in flight of every program (0: the load decides).",
    "dynasor_max_price": "What one more branch must be worth under the heaviest load, as risk removed (0: none; 0 to 1); the "
    "price rises with the load, from 0 where nothing waits, and a program whose next branch is worth less ends.",
    "dynasor_tenant_weights": "Shares of tenants that differ from 1, as in 'gold=4,free=0.5'.",
    "dynasor_reward_url": "Server of a reward model (SGLang with a classification or reward head) for judge 'model'.",
    "dynasor_reward_timeout_s": "Seconds after which a branch goes on without the reward model's word.",
    "dynasor_embedding_url": "Server of an embedding model (/v1/embeddings) for equal 'embedding'.",
    "dynasor_equal_timeout_s": "Seconds after which two answers stay apart where nobody has said whether they are the same.",
    "dynasor_statistics_mib": "MiB on the device for the answers of programs that ask for statistics; what finds no room there is mixed on "
    "the host, from the likeliest tokens.",
    "dynasor_templates": "TOML file of named, versioned settings that clients ask for as 'NAME@VERSION', and that requests get which send no "
    "field.",
    "dynasor_default": "Template or algorithm of requests that send no field, where no row of the file fits; those that cannot be programs are "
    "served without.",
    "dynasor_log": "File to which each record is appended as a line of JSON, for 'sglang-dynasor report'; at the next start the newest are read "
    "from it.",
    "dynasor_owner_header": "HTTP header in which a gateway says who sends a request, in place of the credential: ids and records are each "
    "owner's own.",
    "dynasor_show_texts": "Let who may see programs in flight also read their prompts and texts; the beginnings of prompts go into the log, too.",
    "dynasor_strict": "Let an exception in dynasor's policy fail the engine instead of falling back (for tests).",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the operator's options; only store and store_true, which SGLang's --config YAML can carry."""
    group = parser.add_argument_group("dynasor")
    for field in fields(DynasorConfig):
        option = "--" + field.name.replace("_", "-")
        if field.name == "scheduler":
            group.add_argument(option, choices=["dynasor"], default=None, help=HELP[field.name])
        elif isinstance(field.default, bool):
            group.add_argument(option, action="store_true", help=HELP[field.name])
        else:
            group.add_argument(option, type=type(field.default), default=field.default, help=HELP[field.name])


def take_config(options: Mapping[str, Any]) -> tuple[DynasorConfig, dict[str, Any]]:
    """Split options by name into ours, checked, and the rest.

    Raises:
        ConfigError: one of ours is out of range.
    """
    names = {field.name for field in fields(DynasorConfig)}
    ours = {name: value for name, value in options.items() if name in names}
    return DynasorConfig(**ours), {name: value for name, value in options.items() if name not in names}
