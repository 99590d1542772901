#!/usr/bin/env python
"""Compare runs: tables over seeds, accuracy curves, and one page to send around.

    python analysis/report.py output/*                  run folders, or folders that hold some
    python analysis/report.py output --metric top5 --output report --title "Our networks"

Runs that differ in nothing but the seed are one row; a gain is over the student alone with the
same options: the `baseline/` of a distillation, a run of --method none, or one of
train/classifier.py. Writes report.csv, report.md, curves.png and report.html.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from kdfast.analysis import read_runs, tabulate, write_report
from kdfast.errors import UserError
from kdfast.training.parser import Parser
from kdfast.training.script import script


@script
def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="analysis/report.py", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders")
    flag = parser.flag
    flag(
        parser,
        "--output",
        type=Path,
        default=Path("report"),
        metavar="PATH",
        help="folder for the files; those of an earlier report are replaced",
    )
    flag(parser, "--metric", choices=("top1", "top5"), default="top1", help="what is compared")
    flag(parser, "--title", default="Report", help="of the pages")
    options = parser.fallbacks | parser.given(argv)

    runs, unfinished = read_runs(options["runs"])
    if not runs:
        first = unfinished[0]
        raise UserError(
            f"no finished run: {first.path} has {first.done} of {first.epochs} epochs"
            + (f", {len(unfinished) - 1} more are unfinished too" if unfinished[1:] else "")
        )
    table = tabulate(runs, options["metric"])
    written = write_report(options["output"], table, unfinished, options["title"])
    for run in unfinished:
        _note(f"{run.path} is unfinished ({run.done} of {run.epochs} epochs), left out")
    for note in table.notes:
        _note(note)
    print(f"{len(runs)} runs -> {', '.join(map(str, written))}")


def _note(text: str) -> None:
    print(f"report.py: note: {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
