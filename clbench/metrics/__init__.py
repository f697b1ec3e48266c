"""Metrics and statistics: pure functions of the raw log ``eval.csv``. Definitions and sources: docs/metrics.md."""

from clbench.metrics.continual import METRICS, compute_metrics, forward_transfer, unvisited
from clbench.metrics.log import EvalLog, finished_phases, matrix, read_eval_csv

__all__ = [
    "METRICS",
    "EvalLog",
    "compute_metrics",
    "finished_phases",
    "forward_transfer",
    "matrix",
    "read_eval_csv",
    "unvisited",
]
