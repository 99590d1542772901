#!/usr/bin/env python
"""Train born-again networks: generation after generation, each taught by the one before.

    python train/born_again.py                          three generations of cifar_resnet8 on digits
    accelerate launch train/born_again.py --dataset cifar100 --data-dir DIR --model cifar_resnet20
    torchrun --nproc_per_node 2 train/born_again.py --dataset folder --data-dir DIR \\
        --model vgg16_bn --start-generation 1 --teacher-checkpoint RUN --seed 10 --epochs 300 \\
        --lr 0.01 --sched step --decay-epochs 60 --decay-rate 0.3

The story: generation 0 learns from labels (or is given); generation g starts anew, and learns from
labels and from the last weights of generation g - 1: cross-entropy + lambda * cross-entropy with
the teacher's classes at temperature tau. Lambda goes geometrically from --lambda in the first
epoch to --lambda-end in the last, linearly when one of them is 0.

Generation g has seed --seed + 10 g. The learning rate starts anew with every generation: `--sched
log --decades 2` lets it fall by two powers of ten over its epochs, `--sched step --decay-epochs 60
--decay-rate 0.3` to 0.3 of itself every 60. --pretrained and --initial-checkpoint are what every
generation starts from.

A chain is a folder with a run folder each, generation-0/ and so on, that goes on with --resume
auto wherever it was stopped; with more --generations, too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from kdfast.data import ImageData
from kdfast.training.flags import data_flags, model_flags, run_flags, training_flags
from kdfast.training.generations import check_chain_flags, choose_loss, train_chain
from kdfast.training.options import parse
from kdfast.training.parser import Parser
from kdfast.training.run_folder import RunFolder, choose_run
from kdfast.training.script import script
from kdfast.training.seeds import for_each_seed
from kdfast.training.setup import load_data, print_config, start
from kdfast.training.teacher_cache import check_cache
from kdfast.training.transfer_flags import generation_flags


@script
def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="train/born_again.py", description=__doc__)
    data_flags(parser)
    model_flags(parser, student=True)
    generation_flags(parser)
    training_flags(parser)
    run_flags(parser)
    options = parse(parser, argv)
    check_chain_flags(options)
    check_cache(options)
    choice = choose_loss(options)
    if options.print_config:
        print_config(options, **choice.as_yaml())
        return

    accelerator = start(options)
    data = load_data(options, accelerator)
    for_each_seed(
        options,
        accelerator,
        folder=lambda own: run_folder(own, data),
        train=lambda own, run: train_chain(own, choice, accelerator, data, run.path),
    )


def run_folder(options: argparse.Namespace, data: ImageData) -> RunFolder:
    networks = [options.teacher] * options.start_generation + [options.model]
    name = "-".join(["born_again", data.name, *networks, f"s{options.seed}"])
    return choose_run(options, name.replace("/", "_").replace(":", "."))


if __name__ == "__main__":
    sys.exit(main())
