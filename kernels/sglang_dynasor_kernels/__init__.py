"""Statistics next to the logits: Triton kernels and their twins in plain torch. Imports torch and triton only.

What is exported has a caller in the engine; the twins, ground truth of the tests, are in the modules.
"""

from sglang_dynasor_kernels.program_stats import (
    BEGUN,
    ENDS_MARK,
    FRESH,
    IS_MARK,
    NEVER,
    SAYING,
    Addition,
    add_rows,
    keep_rows,
)
from sglang_dynasor_kernels.row_stats import row_confidence, row_stats

__all__ = [
    "BEGUN",
    "ENDS_MARK",
    "FRESH",
    "IS_MARK",
    "NEVER",
    "SAYING",
    "Addition",
    "add_rows",
    "keep_rows",
    "row_confidence",
    "row_stats",
]
