"""Pages and pictures made from run folders: one run, or several side by side.

Reads what a run wrote (recipe, environment, metrics, summary, samples) and nothing else; it knows no
model and no trainer. Needs the `report` extra (matplotlib, jinja2), which is imported on first use.
"""

from __future__ import annotations

from dpo_kit.report.page import write_comparison, write_report
from dpo_kit.report.run_folder import Run, read_run

__all__ = ["Run", "read_run", "write_comparison", "write_report"]
