"""Quantified knowledge as pictures: curves, and heat maps of entropies."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from kdfast.analysis.knowledge import Report
from kdfast.analysis.picture import as_png, new_figure

_COLOURS = {"student": "#0072B2", "baseline": "#D55E00", "teacher": "#009E73"}
_PANELS = {
    "N_fg": "foreground concepts an image",
    "N_bg": "background concepts an image",
    "fg_share": "share in the foreground",
}
_HEAT = (-4.5, -2.3)  # nats; the range of the published heat maps
_INSIDE, _OUTSIDE = "#1F4BFF", "#00B050"
_LINE = "#00E5FF"
_MOST = 6  # checkpoints an image
_TITLE = 9.5  # points


def draw_curves(report: Report, title: str) -> bytes:
    """A PNG: concepts over epochs, and below over path length where it is known.

    A vertical line is at D_mean, its band one D_std to either side.
    """
    known = [role for role in report.roles if report.measured[role]["speed"]]
    rows = 2 if known else 1
    width = 3.9 * len(_PANELS)
    lines, more = wrapped(title, width)
    height = 3.1 * rows + 0.7 + more
    # Places are given, not found by matplotlib, which takes a second for it.
    figure = new_figure(width, height, layout=None)
    panels = figure.subplots(rows, len(_PANELS), squeeze=False)
    figure.subplots_adjust(
        left=0.5 / width, right=1 - 0.15 / width, bottom=0.85 / height,
        top=1 - (0.6 + more) / height, wspace=0.17, hspace=0.24,
    )  # fmt: skip
    for column, (name, words) in enumerate(_PANELS.items()):
        for role in report.roles:
            _curve(panels[0, column], report, role, name, report.shared.epochs)
        panels[0, column].set_title(words, fontsize=10)
        panels[0, column].set_xlabel("epoch")
        panels[0, column].xaxis.set_major_locator(MaxNLocator(6, integer=True))
        for role in known:
            _curve(panels[1, column], report, role, name, report.shared.path_length(role))
            panels[1, column].set_xlabel(f"path length of the layer, by {report.granularity}")
            if name != "fg_share":
                region = name.removeprefix("N_")
                speed = report.measured[role]["speed"][region]
                mean, std = speed["D_mean"], speed["D_std"]
                panels[1, column].axvline(mean, color=_COLOURS[role], lw=1, ls="--")
                panels[1, column].axvspan(
                    mean - std, mean + std, color=_COLOURS[role], alpha=0.08, lw=0
                )
        highest = max(report.measured[role]["counts"][name].max() for role in report.roles)
        for panel in panels[:, column]:
            panel.set_ylim(0, 1.08 * highest if highest > 0 else 1)
            panel.grid(alpha=0.25)
    handles = [Line2D([], [], color=_COLOURS[r], marker="o", ms=3.5, label=r) for r in report.roles]
    if known:
        handles.append(Line2D([], [], color="#555555", lw=1, ls="--", label="D_mean +- D_std"))
    figure.legend(handles=handles, loc="lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(lines, y=1 - 0.1 / height, fontsize=_TITLE, parse_math=False)
    return as_png(figure)


def _curve(panel: Any, report: Report, role: str, name: str, x: Sequence[float]) -> None:
    values = report.measured[role]["counts"][name]
    panel.plot(x, values, color=_COLOURS[role], marker="o", ms=3.5, lw=1.6)


def draw_maps(report: Report, images: Mapping[int, np.ndarray], title: str) -> bytes:
    """A PNG with the entropies of some images, the networks below one another, epochs beside.

    Args:
        images: uint8 [h, w, 3] by id, of those in the report.

    Dots are concepts, in the foreground and outside of it in different colours; the line around the
    foreground is on the image.
    """
    shared = report.shared
    columns = evenly(len(shared.epochs), _MOST)
    roles = report.roles
    size, left, gap, below = 1.25, 0.1, 0.08, 0.45
    label = 0.22  # inches between an image and its maps
    across, down = 1 + len(columns), len(images) * len(roles)
    block = 0.16  # inches between images
    width = left + across * (size + gap) + label + 0.95
    lines, more = wrapped(title, width)
    top = 0.6 + more
    height = top + down * (size + gap) + block * (len(images) - 1) + below
    figure = new_figure(width, height, layout=None)

    def axes(row: int, column: int) -> Any:
        y = height - top - (row + 1) * (size + gap) - block * (row // len(roles))
        x = left + column * (size + gap) + label * (column > 0)
        cell = figure.add_axes((x / width, y / height, size / width, size / height))
        cell.set_xticks([])
        cell.set_yticks([])
        return cell

    place = {number: i for i, number in enumerate(shared.ids)}
    shown = None
    for n, (number, pixels) in enumerate(images.items()):
        foreground = shared.foreground([number])[0]
        for r, role in enumerate(roles):
            row = n * len(roles) + r
            if r == 0:
                _image(axes(row, 0), pixels, foreground, f"image {number}")
            entropy = shared.entropy(role, [number], shared.epochs)[0]
            concepts = report.measured[role]["counts"]["concepts"][place[number]]
            for c, m in enumerate(columns):
                cell = axes(row, 1 + c)
                shown = cell.imshow(entropy[m], cmap="hot", vmin=_HEAT[0], vmax=_HEAT[1])
                for cells, colour in ((foreground, _INSIDE), (~foreground, _OUTSIDE)):
                    y, x = np.nonzero(concepts[m] & cells)
                    cell.scatter(x, y, s=6, color=colour, edgecolors="white", linewidths=0.3)
                if row == 0:
                    cell.set_title(f"epoch {shared.epochs[m]}", fontsize=8, pad=3)
                if c == 0:
                    cell.set_ylabel(role, fontsize=8, labelpad=2)
    reach = min(3.2, height - top - below)
    bar = figure.add_axes(
        ((width - 0.8) / width, (height - top - reach) / height, 0.14 / width, reach / height)
    )
    figure.colorbar(shown, cax=bar)
    bar.set_ylabel("entropy H (nats)", fontsize=8)
    bar.tick_params(labelsize=7)
    handles = [
        Line2D([], [], color=colour, marker="o", ms=4, ls="", label=label)
        for colour, label in ((_INSIDE, "foreground concept"), (_OUTSIDE, "background concept"))
    ]
    figure.legend(handles=handles, loc="lower center", ncols=2, fontsize=8, frameon=False)
    figure.suptitle(lines, y=1 - 0.12 / height, fontsize=_TITLE, parse_math=False)
    return as_png(figure)


def _image(cell: Any, pixels: np.ndarray, foreground: np.ndarray, title: str) -> None:
    """The image with a line around the foreground cells."""
    height, width = pixels.shape[:2]
    cell.imshow(pixels, interpolation="nearest", extent=(0, width, height, 0))
    grid = len(foreground)
    y, x = np.arange(grid + 1) * height / grid, np.arange(grid + 1) * width / grid
    padded = np.pad(foreground, 1)
    for i, j in np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1]):
        cell.plot([x[j], x[j]], [y[i], y[i + 1]], color=_LINE, lw=1)
    for i, j in np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1]):
        cell.plot([x[j], x[j + 1]], [y[i], y[i]], color=_LINE, lw=1)
    cell.set_title(title, fontsize=8, pad=3)


def wrapped(title: str, width: float) -> tuple[str, float]:
    """`title` in lines that fit into so many inches, and the inches all but the first take.

    Long names are broken; no line is measured, characters count as the widest of most names.
    """
    letters = int((width - 0.2) * 72 / (0.66 * _TITLE))
    lines = textwrap.wrap(title, letters)
    return "\n".join(lines), (len(lines) - 1) * 1.45 * _TITLE / 72


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of 0..count-1 at even distances, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})
