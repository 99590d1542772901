"""Reading run folders back: runs, tables over seeds, pages."""

from kdfast.analysis.pages import write_report
from kdfast.analysis.runs import Run, Unfinished, find_runs, read_run, read_runs
from kdfast.analysis.table import Block, Row, Spread, Table, tabulate

__all__ = [
    "Block",
    "Row",
    "Run",
    "Spread",
    "Table",
    "Unfinished",
    "find_runs",
    "read_run",
    "read_runs",
    "tabulate",
    "write_report",
]
