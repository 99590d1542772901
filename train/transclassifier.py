#!/usr/bin/env python
"""Fine-tune network B's tail on orders of what a Trans-Net finds of B's feature in network A's.

    python train/transclassifier.py                     digits: the run of train/transnet.py
    python train/transclassifier.py RUN                 a run folder of train/transnet.py
    accelerate launch train/transclassifier.py RUN --orders 100 111
    torchrun --nproc_per_node 4 train/transclassifier.py RUN --lr 1e-4

The story: a Trans-Net g rebuilds B's feature from A's as a sum of parts, order n of which went
through n nonlinearities; what it cannot rebuild is dropped. B's tail, the layers behind the
watched one, classifies sums of some of the parts, as it is and after fine-tuning: --orders 110
keeps orders 0 and 1 of three. A and g stay as they are. Beside them B's tail is fine-tuned in the
same way on B's own feature, so that further training is not taken for a better feature.

Data, layers and caches are those of RUN, whose flags need not be given again.

A run is a folder with a run folder each, orders-100/ and so on and own/, and with
transclassifier.csv, .md and .png: accuracy on the test split, which selects nothing, before and
after. The weights are whole networks of B's architecture, for timm: B's own head with the tail that
was trained. It goes on with --resume auto wherever it was stopped; with more --orders, too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator

from kdfast.analysis.pages import write_files
from kdfast.analysis.tails import draw_accuracies
from kdfast.data import ImageData
from kdfast.errors import UsageError
from kdfast.training.consistency_flags import pair_flags, tail_flags
from kdfast.training.flags import data_flags, run_flags, training_flags
from kdfast.training.inherited import flags_of_run, with_flags
from kdfast.training.options import parse
from kdfast.training.parser import Parser
from kdfast.training.run_folder import RunFolder, choose_run, on_main
from kdfast.training.script import script
from kdfast.training.seeds import for_each_seed
from kdfast.training.setup import load_data, print_config, start
from kdfast.training.transclassifier import Refinement, check_flags, train_tails
from kdfast.training.transnet_runs import TransNetRun, find_or_train, open_transnet


@script
def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="train/transclassifier.py", description=__doc__)
    parser.flag(
        parser,
        "transnet",
        nargs="?",
        metavar="RUN",
        help="Trans-Net: a run folder of train/transnet.py, or a weights file (default: on digits "
        "that of the other flags, trained where it is absent)",
    )
    data_flags(parser)
    pair_flags(parser)
    tail_flags(parser)
    training_flags(parser)
    run_flags(parser, recipe="refinement")
    run = parser.given(argv).get("transnet")
    theirs = flags_of_run(parser, run) if run else {}
    parser.fallbacks |= theirs  # which recipe is the default depends on them
    options = with_flags(parse(parser, argv), theirs)
    check_flags(options)
    if options.print_config:
        print_config(options)
        return

    accelerator = start(options)
    data = load_data(options, accelerator)
    opened = find_transnet(options, accelerator, data)
    for_each_seed(
        options,
        accelerator,
        folder=lambda own: run_folder(own, data, opened),
        train=lambda own, run: train_and_draw(own, accelerator, data, opened, run),
    )


def find_transnet(
    options: argparse.Namespace, accelerator: Accelerator, data: ImageData
) -> TransNetRun:
    """The Trans-Net of RUN, or the one that the flags of the pair stand for."""
    path = options.transnet
    if path is None:
        found = find_or_train(options, accelerator, data)
        if len(found) > 1:
            raise UsageError(
                f"the flags stand for {len(found)} Trans-Nets; give one of them as RUN: "
                + " ".join(map(str, found))
            )
        path = found[0]
    return open_transnet(path, options, accelerator, data)


def run_folder(options: argparse.Namespace, data: ImageData, opened: TransNetRun) -> RunFolder:
    nets = [net.record()["architecture"] for net in (opened.a, opened.b)]
    name = "-".join(["transclassifier", data.name, *nets, opened.b.layer, f"s{options.seed}"])
    return choose_run(options, name.replace("/", "_").replace(":", "."))


def train_and_draw(
    options: argparse.Namespace,
    accelerator: Accelerator,
    data: ImageData,
    opened: TransNetRun,
    run: RunFolder,
) -> dict[str, Any]:
    results = train_tails(options, accelerator, data, opened, run.path)
    whole = Refinement(run.path, {})
    title = f"{results['b']['architecture']} on {data.name}, tail behind {opened.b.layer}"
    on_main(
        accelerator,
        lambda: write_files(run.path, {whole.picture.name: draw_accuracies(whole.table, title)}),
    )
    return results


if __name__ == "__main__":
    sys.exit(main())
