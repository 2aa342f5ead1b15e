"""Statistics next to the logits: Triton kernels and their twins in plain torch. Imports torch and triton only."""

from sglang_dynasor_kernels.program_stats import ProgramStats, program_stats, program_stats_ref
from sglang_dynasor_kernels.row_stats import RowStats, choose_path, row_confidence, row_stats, row_stats_ref

__all__ = [
    "ProgramStats",
    "RowStats",
    "choose_path",
    "program_stats",
    "program_stats_ref",
    "row_confidence",
    "row_stats",
    "row_stats_ref",
]
