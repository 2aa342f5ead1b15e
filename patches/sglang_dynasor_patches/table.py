"""Write the ledger of patches into patches/README.md: `python -m sglang_dynasor_patches.table`."""

from __future__ import annotations

from pathlib import Path

from sglang_dynasor.config import SGLANG_RANGE
from sglang_dynasor_patches.records import PATCHES

README = Path(__file__).parents[1] / "README.md"


def ledger() -> str:
    """The ledger as Markdown."""
    rows = [
        f"| `{patch.target.removeprefix('sglang.srt.')}` | {patch.kind} | {patch.role} | {patch.why} | {patch.remove_when} |"
        for patch in PATCHES
    ]
    return "\n".join(
        [
            "# What sglang-dynasor changes in SGLang",
            "",
            f"Supported: `sglang{SGLANG_RANGE}`. Generated from `sglang_dynasor_patches/records.py` by `make readme`.",
            "Each target's parameters are checked before anything is registered; with `--scheduler dynasor` every process",
            "then proves that its hooks are live, or the start-up stops. Without the flag each hook returns at once.",
            "",
            "| target in `sglang.srt` | hook | process | why | can go when |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
            "Besides, `Engine.server_args_class` (a seam of SGLang's own) takes the options of",
            '`sgl.Engine(scheduler="dynasor")`, and `io_struct.hook_custom_types` our types of messages.',
            "",
        ]
    )


if __name__ == "__main__":
    README.write_text(ledger())
