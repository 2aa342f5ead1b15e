"""How long a step takes: cost curves as data, and how they are fitted to an engine's own steps."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from sglang_dynasor.errors import ConfigError

FEWEST_STEPS = 50  # of a kind, for a fit
SHARE_FITTED = 0.98  # of a kind's steps: those that took longest for what was in them were something else
ROUNDS, SMALLEST_DEVIATION = 30, 1e-3  # of a fit
# When the scheduler sees what a step has brought. With SGLang's overlap schedule it has chosen the next step by then: what has
# ended rides along once more. On a device the results come while that step runs, on a CPU after it.
OVERLAPS = ("off", "device", "host")


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of a decode step and of a prefill pass, all of them straight lines.

    A pass holds up the rows that decode, as in SGLang without mixed chunks.
    """

    decode_s: float  # of a step, whatever is in it: weights are read, kernels launched
    row_s: float  # for each row more
    kv_token_s: float  # for each token of KV that its rows read
    prefill_s: float  # of a pass, whatever is in it
    prefill_row_s: float  # for each request in it
    prefill_token_s: float  # for each token computed
    request_s: float  # from a client to the scheduler, and once for the answer
    overlap: str  # of OVERLAPS
    source: str

    def __post_init__(self) -> None:
        if self.overlap not in OVERLAPS:
            raise ConfigError(f"costs: overlap={self.overlap!r} is not known; use one of {', '.join(OVERLAPS)}")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("source", "overlap") and not (
                isinstance(value, int | float) and value >= 0 and isfinite(value)
            ):
                raise ConfigError(f"costs: {field.name}={value!r} is no time; give seconds, 0 or more")
        if not self.decode_s + self.row_s:
            raise ConfigError("costs: decode_s and row_s are both 0; a step must take time")

    def decode(self, num_rows: int, num_kv_tokens: int) -> float:
        """Seconds of one decode step."""
        return self.decode_s + self.row_s * num_rows + self.kv_token_s * num_kv_tokens

    def prefill(self, num_requests: int, num_tokens: int) -> float:
        """Seconds of one prefill pass."""
        return self.prefill_s + self.prefill_row_s * num_requests + self.prefill_token_s * num_tokens


CURVES = {
    "cpu": Costs(
        0.0032, 0.0004, 0.0, 0.0045, 0.0004, 0.00006, 0.0, "host",
        "the tiny reasoner on two CPU cores: a rounded curve that studies of width assumed, its passes a guess in proportion",
    ),
    "gpu": Costs(
        0.008, 0.00015, 0.0, 0.012, 0.0, 0.00007, 0.0, "device",
        "an 8B model on one large GPU: a rounded curve that studies of width assumed, not measured",
    ),
    # Of the medians with one worker, 32 layers: decode 1 to 128 tokens (within 0.6 ms), prefill 256 to 8192. Attention over the
    # cache is not in that file: 131,072 bytes of KV a token at the card's 2.039 TB/s.
    "a100": Costs(
        0.0097, 0.000029, 6.4e-8, 0.0065, 0.0, 0.0000666, 0.0, "device",
        "Llama-3-8B on one A100, kernels only: microsoft/vidur 7d47513 (MIT), data/profiling/compute/a100/meta-llama/"
        "Meta-Llama-3-8B/mlp.csv; KV reads from the card's data sheet",
    ),
}  # fmt: skip


def read_costs(name: str) -> Costs:
    """The curve of that name in CURVES, or the one in that JSON file.

    Raises:
        ConfigError: it is neither.
    """
    if name in CURVES:
        return CURVES[name]
    try:
        values = json.loads(Path(name).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--costs={name!r} is neither {' nor '.join(CURVES)} nor a JSON file that can be read: {error}"
        ) from None
    names = {field.name for field in fields(Costs)}
    if not isinstance(values, dict) or set(cast("dict[str, Any]", values)) != names:
        raise ConfigError(f"--costs={name!r}: the file must hold one object with the keys {', '.join(sorted(names))}")
    return Costs(**cast("dict[str, Any]", values))


def write_costs(costs: Costs, path: Path) -> None:
    """As `read_costs` reads it."""
    path.write_text(json.dumps(asdict(costs), indent=1) + "\n")


# From an engine's own steps


class Step(NamedTuple):
    """One step of an engine, as it was timed."""

    is_decode: bool
    num_rows: int
    num_tokens: int  # decode: KV tokens that its rows read; prefill: tokens computed
    seconds: float


def read_steps(path: Path) -> list[Step]:
    """Steps from a CSV with the columns kind (decode or prefill), rows, tokens and seconds.

    Raises:
        ConfigError: the file is not that.
    """
    try:
        with path.open() as file:
            rows = csv.DictReader(file)
            return [
                Step({"decode": True, "prefill": False}[r["kind"]], int(r["rows"]), int(r["tokens"]), float(r["seconds"]))
                for r in rows
            ]  # fmt: skip
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is no CSV of steps with kind, rows, tokens and seconds: {error!r}") from None


def fit(steps: Iterable[Step], source: str, overlap: str, request_s: float = 0.0) -> Costs:
    """The curve of the least relative deviations, no coefficient below 0, scaled so that the steps take as long together.

    A machine that others use makes some steps longer and none shorter: deviations, not squares, find the shape beneath that.

    Raises:
        ConfigError: fewer than FEWEST_STEPS of a kind.
    """
    steps = list(steps)
    decode = _fit([s for s in steps if s.is_decode], "decode")
    prefill = _fit([s for s in steps if not s.is_decode], "prefill")
    return Costs(*decode, *prefill, request_s, overlap, source)


def _fit(steps: list[Step], kind: str) -> tuple[float, float, float]:
    """Seconds of a step, of each row and of each token."""
    if len(steps) < FEWEST_STEPS:
        raise ConfigError(f"{len(steps)} {kind} steps are too few for a fit; record at least {FEWEST_STEPS}")
    columns = np.array([(1.0, s.num_rows, s.num_tokens) for s in steps])
    seconds = np.array([s.seconds for s in steps])
    used = [0, 1, 2]
    while (found := _least_deviations(columns[:, used], seconds)).min() < 0 and len(used) > 1:
        used = [column for column, value in zip(used, found, strict=True) if value >= 0] or [0]
    values = np.zeros(3)
    values[used] = np.maximum(found, 0.0)
    expected = columns @ values
    kept = np.argsort(seconds / expected)[: round(SHARE_FITTED * len(steps))]
    values *= seconds[kept].sum() / expected[kept].sum()
    return float(values[0]), float(values[1]), float(values[2])


def _least_deviations(columns: NDArray[Any], seconds: NDArray[Any]) -> NDArray[Any]:
    """Coefficients with the least sum of |expected / measured - 1|, by reweighted least squares."""
    relative, ones = columns / seconds[:, None], np.ones(len(seconds))
    weights = ones
    found = np.zeros(columns.shape[1])
    for _ in range(ROUNDS):
        found = np.linalg.lstsq(relative * weights[:, None], weights, rcond=None)[0]
        weights = np.maximum(np.abs(relative @ found - ones), SMALLEST_DEVIATION) ** -0.5
    return found
