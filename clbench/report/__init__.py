"""Reports over run directories: one self-contained HTML page, or a compact Markdown table.

Metrics are recomputed from ``eval.csv``; what ``results.json`` says about them is not trusted. Runs that are interrupted or
corrupt are listed as such and never averaged.
"""

from clbench.report.html import write_report
from clbench.report.markdown import report_markdown
from clbench.report.runs import find_runs

__all__ = ["find_runs", "report_markdown", "write_report"]
