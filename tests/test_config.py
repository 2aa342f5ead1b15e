"""The operator's settings."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

import pytest

from sglang_dynasor.config import HELP, DynasorConfig, add_options, take_config
from sglang_dynasor.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheduler": "fcfs"}, "--scheduler='fcfs' is not a scheduler; use 'dynasor'"),
        ({"dynasor_max_branches": 0}, r"--dynasor-max-branches=0 is outside \[1, 256\]"),
        ({"dynasor_max_branches": 257}, r"--dynasor-max-branches=257 is outside"),
        ({"dynasor_level": "quick"}, "--dynasor-level='quick' is not known; use one of careful, balanced, fast"),
        ({"dynasor_level": "predictive:0.1"}, "--dynasor-level='predictive:0.1' is not known"),
        ({"dynasor_patience_tokens": -2}, "--dynasor-patience-tokens=-2 is below -1; choose -1"),
        ({"dynasor_reward_url": "host:1"}, "--dynasor-reward-url='host:1' is no address; write http://"),
        ({"dynasor_reward_timeout_s": 0}, r"--dynasor-reward-timeout-s=0 is outside \(0, 600\]"),
        ({"dynasor_reward_timeout_s": 601}, "is outside"),
        ({"dynasor_statistics_mib": 0}, r"--dynasor-statistics-mib=0 is outside \[1, 65536\]"),
        ({"dynasor_statistics_mib": 65_537}, "is outside"),
        ({"dynasor_width": -1}, r"--dynasor-width=-1 is outside \[0, 256\]"),
        ({"dynasor_width": 257}, r"--dynasor-width=257 is outside"),
        ({"dynasor_max_price": "dear"}, "--dynasor-max-price='dear' is no price; choose 0"),
        ({"dynasor_max_price": None}, "--dynasor-max-price=None is no price"),
        ({"dynasor_max_price": True}, "--dynasor-max-price=True is no price"),
        ({"dynasor_max_price": -0.1}, "--dynasor-max-price=-0.1 is no price"),
        ({"dynasor_max_price": 1.5}, "--dynasor-max-price=1.5 is no price"),
        ({"dynasor_max_price": float("nan")}, "--dynasor-max-price=nan is no price"),
        ({"dynasor_max_price": float("inf")}, "--dynasor-max-price=inf is no price"),
        ({"dynasor_tenant_weights": "gold"}, "--dynasor-tenant-weights='gold': 'gold' is no weight"),
        ({"dynasor_tenant_weights": "a=1,gold="}, "'gold=' is no weight"),
        ({"dynasor_tenant_weights": "gold=x"}, "'gold=x' is no weight"),
        ({"dynasor_tenant_weights": "gold=0"}, "write NAME=WEIGHT with a weight above 0"),
        ({"dynasor_tenant_weights": "gold=-1"}, "'gold=-1' is no weight"),
        ({"dynasor_tenant_weights": "gold=inf"}, "'gold=inf' is no weight"),
        ({"dynasor_tenant_weights": "gold=nan"}, "'gold=nan' is no weight"),
        ({"dynasor_tenant_weights": "=2"}, "'=2' is no weight"),
        ({"dynasor_tenant_weights": "a=1=2"}, "'a=1=2' is no weight"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    """Each error names the option, the value got and what is allowed."""
    with pytest.raises(ConfigError, match=message):
        DynasorConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dynasor_max_branches": 256, "dynasor_width": 256},
        {"dynasor_level": "fast"},
        {"dynasor_statistics_mib": 1},
        {"dynasor_statistics_mib": 65_536},
        {"dynasor_patience_tokens": 0},
        {"dynasor_max_price": 0},
        {"dynasor_max_price": 1},
        {"dynasor_patience_tokens": 10**12},
    ],
)
def test_the_edges_are_allowed(settings: dict[str, Any]) -> None:
    """The nearest values that are right."""
    assert not DynasorConfig(**settings).is_on


def test_weights_are_read() -> None:
    """Named tenants only; a comma too many does no harm."""
    assert DynasorConfig(dynasor_tenant_weights="gold=4,free=0.5,").tenant_weights == {"gold": 4.0, "free": 0.5}
    assert DynasorConfig(dynasor_tenant_weights="gold = 4, free=0.5, ").tenant_weights == {"gold": 4.0, "free": 0.5}
    assert DynasorConfig().tenant_weights == {}


def test_every_setting_is_an_option() -> None:
    """The command line gives the same defaults, and each setting has help."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    assert take_config(vars(parser.parse_args([]))) == (DynasorConfig(), {})
    ours, rest = take_config({**vars(parser.parse_args(["--dynasor-patience-tokens", "7"])), "port": 1})
    assert (ours.dynasor_patience_tokens, rest) == (7, {"port": 1})
    assert set(HELP) == {field.name for field in fields(DynasorConfig)}
