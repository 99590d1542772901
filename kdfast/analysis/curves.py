"""Accuracy over epochs as a picture."""

from __future__ import annotations

import io
import math
import textwrap
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kdfast.analysis.table import Block, Row, Table

# Ten that stay apart on white, also for readers who confuse red and green (after Okabe and Ito).
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00",
    "#56B4E9", "#7F3C8D", "#8C564B", "#A5AA99", "#B8A000",
)  # fmt: skip
_ALONE = "#333333"
_DASHES = ("--", (0, (1, 1)), (0, (6, 2, 1, 2)), (0, (9, 3)))
_WIDTH, _HEIGHT = 7.6, 4.2  # inches a panel, its legend beside it
_LINE = 0.17  # inches a line of the legend
_SIDE = 60_000  # pixels; matplotlib draws no more than 65,535


def draw_curves(table: Table) -> bytes:
    """A PNG with a panel a block and a line a row: the mean over seeds of `eval_<metric>` an epoch
    that was evaluated.

    The band is one sample standard deviation to either side, where there are several seeds.
    """
    across = min(len(table.blocks), 2)
    down = math.ceil(len(table.blocks) / across)
    lines = max(sum(_legend(r).count("\n") + 1 for r in b.rows) for b in table.blocks)
    height = max(_HEIGHT, _LINE * (lines + 4))
    figure = Figure(figsize=(_WIDTH * across, height * down), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(down, across, squeeze=False).ravel()
    styles = _styles(table)
    for panel, block in zip(panels, table.blocks, strict=False):
        _draw(panel, block, table.metric, styles)
    for panel in panels[len(table.blocks) :]:
        panel.set_axis_off()
    picture = io.BytesIO()
    # Without the version the same runs give the same bytes.
    figure.savefig(picture, dpi=min(110, _SIDE / (height * down)), metadata={"Software": None})
    return picture.getvalue()


def _styles(table: Table) -> dict[tuple[str, bool], dict[str, Any]]:
    """A line style by label and `_is_baseline`, the same in all panels; baselines are dashed."""
    taught, alone = {}, {}
    for block in table.blocks:
        for row in block.rows:
            (alone if _is_baseline(block, row) else taught)[row.label] = None
    styles: dict[tuple[str, bool], dict[str, Any]] = {}
    for i, label in enumerate(taught):
        line = ("-", "-.", ":")[i // len(COLOURS) % 3]
        styles[label, False] = {"color": COLOURS[i % len(COLOURS)], "linestyle": line}
    for i, label in enumerate(alone):
        styles[label, True] = {"color": _ALONE, "linestyle": _DASHES[i % len(_DASHES)]}
    return styles


def _is_baseline(block: Block, row: Row) -> bool:
    return block.teacher is not None and row.teacher_top1 is None


def _draw(
    panel: Any, block: Block, metric: str, styles: dict[tuple[str, bool], dict[str, Any]]
) -> None:
    lowest, longest = math.inf, 0
    for row in block.rows:
        curves = [run.curves[f"eval_{metric}"] for run in row.runs]
        scores = np.array(curves, dtype=float)  # [seeds, epochs], NaN where not evaluated
        epochs = 1 + np.flatnonzero(~np.isnan(scores).any(0))
        scores = scores[:, epochs - 1]
        mean = scores.mean(0)
        marker = "o" if len(epochs) <= 20 else None
        style = styles[row.label, _is_baseline(block, row)]
        panel.plot(epochs, mean, **style, lw=1.6, marker=marker, ms=3.5, label=_legend(row))
        if len(scores) > 1:
            std = scores.std(0, ddof=1)
            panel.fill_between(
                epochs, mean - std, mean + std, color=style["color"], alpha=0.13, lw=0
            )
        # A long run's first epochs would press its later ones into a strip.
        first = len(mean) // 10 if len(mean) >= 20 else 0
        lowest, longest = min(lowest, mean[first:].min()), max(longest, epochs[-1])
    taught = [row.teacher_top1.mean for row in block.rows if row.teacher_top1]
    highest = max(row.best.mean for row in block.rows)
    if taught and metric == "top1":
        mean = sum(taught) / len(taught)
        panel.axhline(mean, color="#888888", lw=1, ls=":", label=f"teacher {mean:.2f}")
        highest = max(highest, mean)
    room = max(0.06 * (highest - lowest), 0.5)
    panel.set_ylim(max(lowest - room, -1), min(highest + room, 101))
    panel.set_xlim(1 - 0.02 * longest, longest + 0.02 * longest)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_xlabel("epoch")
    panel.set_ylabel(f"{metric} (%)")
    panel.set_title(f"{block.dataset}: {block.networks}", fontsize=10, parse_math=False, wrap=True)
    panel.grid(alpha=0.25)
    # Beside the panel: inside it would lie on the lines of some run or other.
    legend = panel.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _legend(row: Row) -> str:
    score = row.last.text().replace(" ", "\xa0")  # stays on one line
    text = f"{row.label}  {score}"
    # matplotlib leaves labels with a leading underscore out.
    return textwrap.fill(text if text[0] != "_" else f" {text}", 36)
