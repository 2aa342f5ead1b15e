from sglang_dynasor_kernels.row_stats import RowStats, choose_path, row_stats, row_stats_ref
