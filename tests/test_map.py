"""docs/map.md names places that exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROWS = [
    line.split("|")[2]
    for line in (ROOT / "docs" / "map.md").read_text().splitlines()
    if line.startswith("| ") and "`" in line.split("|")[2] and ".py" in line.split("|")[2]
]


def test_every_place_on_the_map_is_there() -> None:
    """Each file, and each name said to be in it."""
    assert len(ROWS) > 25
    for row in ROWS:
        files = re.findall(r"`([a-z_/]+\.py)`", row)
        assert files, row
        for file in files:
            assert (ROOT / "sglang_dynasor" / file).is_file(), row
        name = re.search(r"\.py`: `([A-Za-z_.]+)`", row)
        if name is not None:
            place = importlib.import_module("sglang_dynasor." + files[0].removesuffix(".py").replace("/", "."))
            for part in name[1].split("."):
                place = getattr(place, part)
