#!/usr/bin/env python
"""How much of network B's feature follows from network A's, order by order, and how much does not.

    python analysis/variance.py                         digits: two networks of different seeds
    python analysis/variance.py output/RUN              a run of train/transnet.py
    python analysis/variance.py output/transnet-* --output comparison
    torchrun --nproc_per_node 8 analysis/variance.py output/RUN --split test

A Trans-Net splits B's feature into orders of fuzziness, x^(n) rebuilt with n nonlinear steps, and a
residual x^D. Their variances, raw and relative to that of the feature, are computed in one pass of
the images and do not depend on batches or processes. Several runs are a row each and share one
chart; when they are generations of one chain, it also has the residual over them.

Writes variance.csv, per_channel.csv, variance.md and variance.png, and prints the table. Without a
RUN, on digits, networks and Trans-Net are trained where they are absent.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from kdfast.analysis.pages import write_files
from kdfast.analysis.variance import (
    Measured,
    as_csv,
    as_markdown,
    as_text,
    draw_variances,
    per_channel_csv,
)
from kdfast.training.features import Features
from kdfast.training.finished_transnets import (
    Finished,
    analysis_parser,
    open_finished,
    print_options,
    refuse_flags_of_training,
)
from kdfast.training.journal import say
from kdfast.training.measure import measure
from kdfast.training.options import parse
from kdfast.training.run_folder import on_main
from kdfast.training.script import script
from kdfast.training.setup import start


@script
def main(argv: Sequence[str]) -> None:
    parser = analysis_parser(
        "analysis/variance.py",
        __doc__,
        runs="*",
        output="folder for the files (default: variance/ in RUN, of several in the folder that "
        "holds them)",
    )
    group = parser.add_argument_group("variance")
    parser.flag(
        group,
        "--mean-scope",
        choices=("channel", "global"),
        default="channel",
        help="variance of each channel about its own mean, then averaged, as in the published "
        "tables; or of all values about one mean",
    )
    parser.flag(
        group,
        "--orders-dtype",
        choices=("float64", "float32"),
        default="float64",
        help="of the Trans-Net's arithmetic; what float32 rounds depends on the batch size, but it "
        "is much faster on GPUs without float64 units",
    )
    options = parse(parser, argv)
    if options.print_config:
        print_options(options)
        return

    refuse_flags_of_training(options, options.runs)
    accelerator = start(options)
    found = []
    for finished in open_finished(parser, options, accelerator, options.runs):
        report = look(finished, accelerator, options)
        found.append((finished.run.path, finished.folder, report))
    labels = label_all([path for path, _, _ in found])
    measured = [
        dataclasses.replace(report, label=label)
        for label, (_, _, report) in zip(labels, found, strict=True)
    ]
    folder = output_folder(options, [folder for _, folder, _ in found])
    on_main(accelerator, lambda: tell_and_write(measured, folder))


def look(finished: Finished, accelerator: Accelerator, options: argparse.Namespace) -> Measured:
    """Measure one Trans-Net over `options.split`."""
    split, run = options.split, finished.run
    say(f"Trans-Net {run.path}")
    features = Features(finished.options, accelerator, finished.data, [run.a, run.b])
    loader = features.loader(split)
    try:
        dtype = getattr(torch, options.orders_dtype)
        report = measure(run.net, features, loader, accelerator, options.mean_scope, dtype)
    finally:
        loader.close()
    gates = tuple(run.net.gates.tolist())
    return Measured(str(run.path), report, gates, finished.facts(split), finished.generation())


def label_all(paths: Sequence[Path]) -> list[str]:
    """What tables call the runs: their names, with as much of the path as sets them apart."""
    parts = [path.absolute().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(own[-depth:]) for own in parts]
        if len(set(labels)) == len(labels):
            break
    return labels


def output_folder(options: argparse.Namespace, folders: Sequence[Path]) -> Path:
    """Where the files go."""
    if "output" in options.given:
        return Path(options.output)
    if len(folders) == 1:
        return folders[0] / "variance"
    shared = [Path(folder.absolute()).parts for folder in folders]
    depth = 0
    while len({parts[: depth + 1] for parts in shared}) == 1 and depth < min(map(len, shared)) - 1:
        depth += 1
    return Path(*shared[0][:depth]) / "variance"


def tell_and_write(measured: Sequence[Measured], folder: Path) -> None:
    """Print the table and write all files."""
    images = list(dict.fromkeys(one.facts["images"] for one in measured))
    title = f"Knowledge consistency: {'; '.join(images)}"
    say(as_text(measured))
    for one in measured:
        for note in one.notes():
            print(f"variance.py: note: {one.label}: {note}", file=sys.stderr)
    written = write_files(
        folder,
        {
            "variance.csv": as_csv(measured),
            "per_channel.csv": per_channel_csv(measured),
            "variance.md": as_markdown(measured, title=title, picture="variance.png"),
            "variance.png": draw_variances(measured, title),
        },
    )
    say(f"{', '.join(path.name for path in written)} -> {folder}")


if __name__ == "__main__":
    sys.exit(main())
