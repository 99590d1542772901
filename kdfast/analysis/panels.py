"""Feature maps as pictures: grids of channels, and one channel split into its orders.

Liang, Li, Li, Wang, Zhang, "Knowledge Consistency between Neural Networks and Beyond", ICLR 2020,
arXiv 1908.01581: x^(0), x^(1), ... and x^D of single channels.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import Normalize
from PIL import Image

from kdfast.analysis.picture import as_png, new_figure

_PLAIN, _SIGNED = "jet", "seismic"
_SMALLEST = 128  # pixels of the shorter side of a map saved alone


def grid_channels(channels: int) -> list[int]:
    """35 channels for a grid of 6 x 6 with the image: 0, 2, ..., 68 as published where there are
    so many; else evenly spaced ones, or all of them.
    """
    return list(range(0, 70, 2)) if channels > 68 else _evenly(channels, 35)


def panel_channels(channels: int) -> list[int]:
    """Channels looked at one by one: 0, 50, ..., 500 as published; else 11 evenly spaced ones."""
    return list(range(0, 501, 50)) if channels > 500 else _evenly(channels, 11)


def _evenly(channels: int, count: int) -> list[int]:
    """`count` of 0..channels-1 at equal distances from 0 on; all where there are no more."""
    return [i * channels // count for i in range(count)] if channels > count else [*range(channels)]


def shared_range(maps: Sequence[np.ndarray]) -> tuple[float, float]:
    """Lowest and highest value of all of them."""
    return min(float(m.min()) for m in maps), max(float(m.max()) for m in maps)


def draw_grid(
    image: np.ndarray,
    maps: np.ndarray,
    channels: Sequence[int],
    limits: tuple[float, float],
    title: str,
) -> bytes:
    """A PNG with the image and maps of a feature, as square as it goes, in one colour range.

    Args:
        image: uint8 [h, w, 3].
        maps: [C, H, W] of one image; `channels` of them are shown.
        limits: values of the first and the last colour, so that several grids can be compared.
    """
    across = math.ceil(math.sqrt(1 + len(channels)))
    board = _Board(math.ceil((1 + len(channels)) / across), across, cell=1.15)
    _show(board.cell(0, 0), image, "image")
    norm = Normalize(*_spread(limits))
    for place, channel in enumerate(channels, start=1):
        cell = board.cell(*divmod(place, across))
        shown = _show(cell, maps[channel], f"{channel}", cmap=_PLAIN, norm=norm)
    board.bar(shown, 0, board.down, "value")
    return board.png(title)


def draw_channel(
    image: np.ndarray,
    source: np.ndarray,
    target: np.ndarray,
    orders: np.ndarray,
    gates: Sequence[float],
    title: str,
) -> bytes:
    """A PNG with one channel of one image: what g was given, should give and gave; its orders.

    First row: image, input (A's feature), target (B's) and output; second: strength of each
    order's last gate beside the orders; third: the same beside the residual, once below each
    order. Colours are symmetric about 0: the input's end at its largest magnitude, all others at
    the target's, so that orders and residual can be compared.

    Args:
        image: uint8 [h, w, 3].
        source, target: [H, W].
        orders: [K, H, W], whose sum is the output.
        gates: K - 1, p_0 first.
    """
    count = len(orders)
    output = orders.sum(0)
    residual = target - output
    board = _Board(3, max(4, 1 + count), cell=1.7)
    own, shared = (_symmetric(np.abs(m).max()) for m in (source, target))
    _show(board.cell(0, 0), image, "image")
    given = _show(board.cell(0, 1), source, "input (A)", cmap=_SIGNED, norm=own)
    _show(board.cell(0, 2), target, "target (B)", cmap=_SIGNED, norm=shared)
    shown = _show(board.cell(0, 3), output, "output g", cmap=_SIGNED, norm=shared)
    for n in range(count):
        _show(board.cell(1, 1 + n), orders[n], f"order {n}", cmap=_SIGNED, norm=shared)
        _show(board.cell(2, 1 + n), residual, "residual", cmap=_SIGNED, norm=shared)
    for row in (1, 2):
        _draw_gates(board.cell(row, 0, below=0.18), gates)
    board.bar(given, 0, 1, "value, input")
    board.bar(shown, 1, 3, "value, all but the input")
    return board.png(title)


class _Board:
    """A figure of `down` x `across` square cells of `cell` inches, with room for colour bars.

    Places are computed, not found by matplotlib, which takes seconds for a grid.
    """

    GAP, SIDE, HEAD = 0.26, 0.35, 0.6  # inches between cells, at the left, for the title

    def __init__(self, down: int, across: int, cell: float):
        self.down, self.size = down, cell
        self.width = self.SIDE + across * (cell + self.GAP) + 0.85
        self.height = self.HEAD + down * (cell + self.GAP) + 0.05
        self.figure = new_figure(self.width, self.height, layout=None)

    def cell(self, row: int, column: int, below: float = 0.0) -> Any:
        """Axes of one cell; row 0 is the uppermost. `below` inches of it are left for labels."""
        left = self.SIDE + column * (self.size + self.GAP)
        return self._axes(left, self._bottom(row) + below, self.size, self.size - below)

    def bar(self, shown: Any, first: int, last: int, label: str) -> None:
        """A colour bar at the right of rows `first` to `last` - 1."""
        low = self._bottom(last - 1)
        high = self._bottom(first) + self.size
        reach = min(high - low, 3.6)
        axes = self._axes(self.width - 0.8, (low + high - reach) / 2, 0.14, reach)
        self.figure.colorbar(shown, cax=axes)
        axes.set_ylabel(label, fontsize=8)
        axes.tick_params(labelsize=7)

    def png(self, title: str) -> bytes:
        top = 1 - 0.1 / self.height
        self.figure.suptitle(title, y=top, fontsize=9, parse_math=False, wrap=True)
        return as_png(self.figure)

    def _bottom(self, row: int) -> float:
        return self.height - self.HEAD - (row + 1) * self.size - row * self.GAP

    def _axes(self, left: float, bottom: float, width: float, height: float) -> Any:
        shares = left / self.width, bottom / self.height, width / self.width, height / self.height
        return self.figure.add_axes(shares)


def _draw_gates(cell: Any, gates: Sequence[float]) -> None:
    """Bars of 1, p_(K-2), ..., p_0: the gate that each order has and the one before lacks."""
    strengths = [1.0, *reversed(gates)]
    names = ["1", *(f"$p_{i}$" for i in reversed(range(len(gates))))]
    bars = cell.bar(range(len(strengths)), strengths, 0.6, color="#0072B2")
    cell.bar_label(bars, fmt="%.2g", fontsize=7, padding=1)
    cell.set_xticks(range(len(strengths)), names, fontsize=8)
    cell.set_ylim(0, 1.2)
    cell.set_yticks([0, 0.5, 1])
    cell.tick_params(labelsize=7)
    cell.set_title("gates", fontsize=8, pad=3)


def _show(cell: Any, values: np.ndarray, title: str, **kwargs: Any) -> Any:
    shown = cell.imshow(values, interpolation="nearest", **kwargs)
    cell.set_xticks([])
    cell.set_yticks([])
    cell.set_title(title, fontsize=8, pad=3)
    return shown


def _spread(limits: tuple[float, float]) -> tuple[float, float]:
    """Limits that differ, also where all values are equal."""
    low, high = limits
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def _symmetric(largest: float) -> Normalize:
    largest = float(largest) or 1.0
    return Normalize(-largest, largest)


def map_images(source: np.ndarray, target: np.ndarray, orders: np.ndarray) -> Mapping[str, bytes]:
    """Every map of one channel as a PNG of its own, in the colours of `draw_channel`.

    `input`, `target`, `output`, `order0` and so on, `residual`. A value is a square of as many
    pixels as the shorter side needs to have 128; nothing is smoothed and there is no frame.
    """
    output = orders.sum(0)
    own, shared = (_symmetric(np.abs(m).max()) for m in (source, target))
    named = {"input": (source, own), "target": (target, shared), "output": (output, shared)}
    named |= {f"order{n}": (part, shared) for n, part in enumerate(orders)}
    named["residual"] = (target - output, shared)
    return {name: _coloured(values, norm) for name, (values, norm) in named.items()}


def _coloured(values: np.ndarray, norm: Normalize) -> bytes:
    factor = max(1, math.ceil(_SMALLEST / min(values.shape)))
    pixels = matplotlib.colormaps[_SIGNED](norm(values), bytes=True)[..., :3]
    return image_png(pixels.repeat(factor, 0).repeat(factor, 1))


def image_png(pixels: np.ndarray) -> bytes:
    """uint8 [h, w, 3] as a PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pixels_of(png: bytes) -> np.ndarray:
    """A PNG as uint8 [h, w, 3]."""
    return np.array(Image.open(io.BytesIO(png)).convert("RGB"))
