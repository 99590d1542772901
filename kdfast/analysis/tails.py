"""Accuracy of a tail on orders of another network's feature, as a picture."""

from __future__ import annotations

import csv
from pathlib import Path

from kdfast.analysis.picture import as_png, new_figure
from kdfast.analysis.records import read_text
from kdfast.errors import UserError

_COLOURS = {"before": "#A5AA99", "last": "#0072B2", "best": "#009E73"}
_LINES = {"A raw": ("#D55E00", ":"), "B raw": ("#333333", "--")}


def read_accuracies(path: Path) -> dict[str, dict[str, float]]:
    """Top-1 in percent by row and state (`before`, `last`, `best`), from a transclassifier.csv.

    Raises `UserError` for a file that is damaged; the message names the line.
    """
    reader = csv.DictReader(read_text(path).splitlines())
    columns = {state: f"{state}_top1" for state in _COLOURS}
    if not {"name", *columns.values()} <= set(reader.fieldnames or ()):
        raise UserError(f"{path}, line 1: expected columns name, {', '.join(columns.values())}")
    found: dict[str, dict[str, float]] = {}
    for row in reader:
        found[row["name"]] = scores = {}
        for state, column in columns.items():
            if row[column] == "":
                continue
            try:
                scores[state] = float(row[column])
            except (TypeError, ValueError):
                scores[state] = -1.0
            if not 0 <= scores[state] <= 100:
                where = f"{path}, line {reader.line_num}"
                raise UserError(f"{where}: expected {column} in [0, 100], got {row[column]!r}")
    if not found.keys() >= _LINES.keys() or not all(found.values()):
        raise UserError(f"{path}: expected rows {' and '.join(_LINES)}, each with scores")
    return found


def draw_accuracies(path: Path, title: str) -> bytes:
    """A PNG: bars of top-1 before and after, a group a subset, lines for both networks as they are.

    From the file at `path` alone; raises `UserError` as `read_accuracies` does.
    """
    scores = read_accuracies(path)
    groups = [name for name in scores if name not in _LINES]
    figure = new_figure(max(5.6, 2.8 + 1.1 * len(groups)), 4.0)
    panel = figure.subplots()
    for i, (state, colour) in enumerate(_COLOURS.items()):
        places = [g + 0.28 * (i - 1) for g in range(len(groups))]
        bars = panel.bar(
            places, [scores[g][state] for g in groups], 0.26, color=colour, label=state
        )
        panel.bar_label(bars, fmt="%.1f", fontsize=7, padding=2)
    for name, (colour, style) in _LINES.items():
        top1 = scores[name]["before"]
        panel.axhline(top1, color=colour, ls=style, lw=1.2, label=f"{name}  {top1:.2f}")
    panel.set_xticks(range(len(groups)), groups)
    panel.tick_params(axis="x", length=0)
    panel.set_ylim(0, 108)
    panel.set_ylabel("top1 (%)")
    panel.set_title(title, fontsize=10, parse_math=False, wrap=True)
    panel.grid(axis="y", alpha=0.25)
    panel.set_axisbelow(True)
    panel.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    return as_png(figure)
