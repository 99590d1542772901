#!/usr/bin/env python
"""Train a Trans-Net: how much of network B's feature follows from network A's, and how directly.

    python train/transnet.py                            digits: two seeds, then the Trans-Net
    python train/transnet.py --pair same                digits: a network and itself
    python train/transnet.py --shuffle-pairs            digits: the control, unlike images
    torchrun --nproc_per_node 8 train/transnet.py --dataset cub200 --data-dir DIR \\
        --checkpoint-a RUN_A --checkpoint-b RUN_B --layer features.30 --amp

Two trained networks are frozen and watched at one layer each; a small convolutional network g with
K layers learns to rebuild B's feature of an image from A's. Between its layers are gates p, and the
loss, the mean squared error + the sum of alpha * p^2, opens them no further than it pays. What g
then rebuilds splits into orders of fuzziness: order n went through exactly n nonlinearities. What
it cannot rebuild is what B knows and A does not. analysis/variance.py tells how much each is,
train/transclassifier.py what it is good for, analysis/visualize.py draws it.

A and B may be of different architectures as long as the features have one shape. There is no
augmentation, so features are computed once and kept on disk (--features). Without checkpoints, on
digits, A and B are trained as --pair says, unless that was done before. Everything lands in one run
folder under --output; with several networks B, in a folder pair-0, pair-1, ... of it for each.
It goes on with --resume RUN or --resume auto; with more networks B, too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from kdfast.errors import UsageError
from kdfast.training.consistency_flags import refuse_augmentation
from kdfast.training.options import parse
from kdfast.training.run_folder import choose_run
from kdfast.training.script import script
from kdfast.training.seeds import for_each_seed
from kdfast.training.setup import load_data, print_config, start
from kdfast.training.transnet import TransNetKeeper, gate_weights
from kdfast.training.transnet_pairs import train_pairs
from kdfast.training.transnet_runs import run_name, transnet_parser


@script
def main(argv: Sequence[str]) -> None:
    parser = transnet_parser("train/transnet.py", __doc__)
    options = parse(parser, argv)
    check(options)
    if options.print_config:
        print_config(options)
        return

    accelerator = start(options)
    data = load_data(options, accelerator)
    for_each_seed(
        options,
        accelerator,
        folder=lambda own: choose_run(own, run_name(own, data)),
        train=lambda own, run: train_pairs(own, accelerator, data, run),
        scores=TransNetKeeper.score_names,
    )


def check(options: argparse.Namespace) -> None:
    """Refuse flags that do not go together, or that are of training classifiers."""
    gate_weights(options)
    if options.eval_only:
        raise UsageError("--eval-only scores one network; analysis/variance.py scores a Trans-Net")
    refuse_augmentation(options, "a Trans-Net learns from features of images as they are")
    for dest in ("smoothing", "freeze_bn", "sync_bn"):
        if getattr(options, dest) and dest in options.given:
            raise UsageError(
                f"--{dest.replace('_', '-')} is for training classifiers: a Trans-Net learns "
                "without labels or batch normalisation"
            )


if __name__ == "__main__":
    sys.exit(main())
