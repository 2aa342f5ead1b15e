"""A picture of latency against load, one line per way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang_dynasor.errors import ConfigError

PANELS = ("mean s", "p90 s")


def check_picture(path: Path) -> None:
    """Find out before the work what would stop it after.

    Raises:
        ConfigError: matplotlib is not installed, or the path cannot be one of a picture.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise ConfigError(
            f"--plot={path} needs matplotlib; pip install 'sglang-dynasor[demo]', or leave it out"
        ) from None
    formats = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix[1:].lower() not in formats:
        raise ConfigError(f"--plot={path} is no picture; let it end with one of {', '.join(formats)}")
    if not path.parent.is_dir():
        raise ConfigError(f"--plot={path}: there is no folder {path.parent}; make it, or choose another path")


def draw_curves(rows: Sequence[dict[str, Any]], loads: Sequence[float], axis_label: str, path: Path) -> None:
    """Write the picture.

    Args:
        rows: of `command.simulate_rows`: for each load in turn the same ways.
        loads: numbers for the axis, in that order.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    ways = list(dict.fromkeys(row["way"] for row in rows))
    figure = Figure(figsize=(5.2 * len(PANELS), 4.2), layout="constrained")
    for axis, key in zip(figure.subplots(1, len(PANELS), squeeze=False)[0], PANELS, strict=True):
        for way in ways:
            axis.plot(loads, [row[key] for row in rows if row["way"] == way], "o-", markersize=4, label=way)
        axis.set(title=f"{key.removesuffix(' s')} latency, s", xlabel=axis_label, yscale="log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[-1].legend(frameon=False, fontsize=8)
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise ConfigError(f"--plot={path} cannot be written: {error}") from None
