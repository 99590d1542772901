#!/usr/bin/env python
"""Pictures of what network B's feature has in common with network A's, channel by channel.

    python analysis/visualize.py                        digits: two networks of different seeds
    python analysis/visualize.py output/RUN --images 3 14 --channels 0 5 --save-maps

For each image three grids, of A's feature, of B's and of what the Trans-Net makes of A's, in one
colour range; and for each channel a panel: image, input, target and output; the orders beside the
strength of their gates; the residual. There, blue is negative, red positive and white 0; the
input's colours end at its largest magnitude, all others at the target's.

PNG files, and images of TensorBoard in the run's tensorboard/. Without a RUN, on digits, networks
and Trans-Net are trained where they are absent.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kdfast.analysis.pages import write_files
from kdfast.analysis.panels import (
    draw_channel,
    draw_grid,
    grid_channels,
    image_png,
    map_images,
    panel_channels,
    pixels_of,
    shared_range,
)
from kdfast.errors import UsageError
from kdfast.training.finished_transnets import (
    Finished,
    analysis_parser,
    network_words,
    open_finished,
    print_options,
    refuse_flags_of_training,
)
from kdfast.training.journal import say
from kdfast.training.options import parse
from kdfast.training.run_folder import on_main
from kdfast.training.script import script
from kdfast.training.setup import start
from kdfast.training.tapped import exact_convolutions
from kdfast.training.values import natural


@dataclass(frozen=True)
class Maps:
    """One image with its features.

    uint8 `pixels` [h, w, 3] as A is fed them; float32 `source` and `target` [C, H, W] and `orders`
    [K, C, H, W].
    """

    index: int
    words: str
    pixels: np.ndarray
    source: np.ndarray
    target: np.ndarray
    orders: np.ndarray


@script
def main(argv: Sequence[str]) -> None:
    parser = analysis_parser(
        "analysis/visualize.py",
        __doc__,
        runs="?",
        output="folder for the pictures (default: visualize/ in RUN)",
    )
    group = parser.add_argument_group("pictures")
    parser.flag(
        group,
        "--images",
        type=natural,
        nargs="+",
        default=[0, 1],
        metavar="INDEX",
        help="their positions in the split",
    )
    parser.flag(
        group,
        "--channels",
        type=natural,
        nargs="+",
        metavar="C",
        help="those that get a panel (default: 0, 50, ..., 500 as published; where there are not "
        "so many, 11 at even distances)",
    )
    parser.flag(
        group,
        "--grid-channels",
        type=natural,
        nargs="+",
        metavar="C",
        help="those of the grids (default: 0, 2, ..., 68 as published; where there are not so "
        "many, 35 at even distances)",
    )
    parser.switch(group, "--save-maps", help="each map of a panel also as an image of its own")
    options = parse(parser, argv)
    if options.print_config:
        print_options(options)
        return

    runs = [options.runs] if options.runs else []
    refuse_flags_of_training(options, runs)
    accelerator = start(options)
    found = open_finished(parser, options, accelerator, runs)
    finished = next(found)
    if (other := next(found, None)) is not None:
        raise UsageError(
            f"these options stand for several Trans-Nets: give one, such as {other.run.path}"
        )
    check(options, finished)
    on_main(accelerator, lambda: draw_all(options, finished))


def check(options: argparse.Namespace, finished: Finished) -> None:
    """Refuse images and channels that are not there, and complete what was not said."""
    run = finished.run
    if len(run.a.shape) != 3:
        raise UsageError(
            f"layer {run.a.layer} passes {run.a.shape[0]} numbers an image; only maps can be "
            "drawn, so choose a run of an earlier layer"
        )
    channels, count = run.a.shape[0], len(finished.source(options.split))
    for index in options.images:
        if index >= count:
            raise UsageError(
                f"--images {index} is not there: {finished.split_words(options.split)}, counted "
                f"from 0 to {count - 1}"
            )
    for name, default in (("channels", panel_channels), ("grid_channels", grid_channels)):
        chosen = getattr(options, name)
        if chosen is None:
            setattr(options, name, default(channels))
        elif max(chosen) >= channels:
            raise UsageError(
                f"--{name.replace('_', '-')} {max(chosen)} is not there: layer {run.a.layer} has "
                f"channels 0 to {channels - 1}"
            )


def draw_all(options: argparse.Namespace, finished: Finished) -> None:
    """Write all pictures, and show them in TensorBoard."""
    folder = finished.folder / "visualize"
    if "output" in options.given:
        folder = Path(options.output)
    shown: dict[str, bytes] = {}
    for index in options.images:
        maps = features_of(finished, options.split, index)
        pictures = dict(pictures_of(options, finished, maps))
        write_files(folder, pictures)
        shown |= pictures
        if options.save_maps:
            write_files(folder / "maps", dict(single_maps(options, maps)))
    board = finished.folder / "tensorboard"
    show_in_tensorboard(board, finished.serving(options.split), shown)
    say(f"{finished.split_words(options.split)}")
    say(f"{len(shown)} pictures -> {folder}, and TensorBoard's in {board}")


@torch.no_grad()
def features_of(finished: Finished, split: str, index: int) -> Maps:
    """The features of one image of a split, B's of its partner where pairs are shuffled."""
    run = finished.run
    partner = finished.partner(split, index)
    pixels, label = finished.read(split, index, run.a)
    other, _ = finished.read(split, partner, run.b)
    with exact_convolutions():
        source, target = run.a.features(pixels[None]), run.b.features(other[None])
        orders = run.net.orders(source)[:, 0]
    words = f"image {index} of the {finished.serving(split)} split, class {label}"
    if partner != index:
        words += f" (target: image {partner})"
    numbers = (part.float().cpu().numpy() for part in (source[0], target[0], orders))
    return Maps(index, words, pixels.permute(1, 2, 0).numpy(), *numbers)


def pictures_of(
    options: argparse.Namespace, finished: Finished, maps: Maps
) -> Iterator[tuple[str, bytes]]:
    """File names and PNGs of the grids and panels of one image."""
    name, run = f"image-{maps.index:05d}", finished.run
    output = maps.orders.sum(0)
    chosen = options.grid_channels
    limits = shared_range([part[chosen] for part in (maps.source, maps.target, output)])
    for part, values, what in (
        ("a", maps.source, f"feature of A: {network_words(run.a)}"),
        ("b", maps.target, f"feature of B: {network_words(run.b)}"),
        ("g", output, f"what the Trans-Net makes of A's feature, {len(maps.orders)} layers"),
    ):
        title = f"{what}\n{maps.words}"
        yield f"{name}-{part}.png", draw_grid(maps.pixels, values, chosen, limits, title)
    gates = run.net.gates.tolist()
    for channel in options.channels:
        own = maps.source[channel], maps.target[channel], maps.orders[:, channel]
        title = f"channel {channel} of {run.b.layer}, {maps.words}"
        yield (
            f"{name}-channel-{channel:04d}.png",
            draw_channel(maps.pixels, *own, gates, title),
        )


def single_maps(options: argparse.Namespace, maps: Maps) -> Iterator[tuple[str, bytes]]:
    """File names and PNGs of the image and of every map of its panels."""
    name = f"image-{maps.index:05d}"
    yield f"{name}.png", image_png(maps.pixels)
    for channel in options.channels:
        own = maps.source[channel], maps.target[channel], maps.orders[:, channel]
        for part, png in map_images(*own).items():
            yield f"{name}-channel-{channel:04d}-{part}.png", png


def show_in_tensorboard(folder: Path, split: str, pictures: dict[str, bytes]) -> None:
    """The pictures as images of TensorBoard, in the place of those of an earlier call."""
    from torch.utils.tensorboard import SummaryWriter

    suffix = f".visualize-{split}"
    for earlier in folder.glob(f"*{suffix}"):
        earlier.unlink()
    with SummaryWriter(str(folder), filename_suffix=suffix) as writer:
        for name, png in pictures.items():
            tag = name.removesuffix(".png").replace("-", "/", 2).replace("/", "-", 1)
            writer.add_image(f"{split}/{tag}", pixels_of(png), dataformats="HWC")


if __name__ == "__main__":
    sys.exit(main())
