#!/usr/bin/env python
"""Train one image classifier with cross-entropy: a teacher, or a student for comparison.

    python train/classifier.py                          cifar_resnet20 on digits, about 30 s
    accelerate launch train/classifier.py --dataset cifar100 --download --model cifar_resnet110
    torchrun --nproc_per_node 8 train/classifier.py --dataset folder --data-dir DIR \\
        --model resnet50 -b 64 --opt sgd --lr 0.5 --epochs 100 --sched cosine --amp
    python train/classifier.py --initial-checkpoint RUN --prune 0.2 1.0 --lr 0.01

Everything lands in one run folder under --output; its best.safetensors is a --teacher-checkpoint
of train/distill.py and loads with timm.create_model(..., checkpoint_path=...).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator

from kdfast.data import ImageData
from kdfast.training.classifier import score, train_classifier
from kdfast.training.flags import (
    data_flags,
    model_flags,
    path_flags,
    pruning_flags,
    run_flags,
    training_flags,
)
from kdfast.training.journal import say
from kdfast.training.options import parse
from kdfast.training.parser import Parser
from kdfast.training.pruning import check_pruning, train_pruned
from kdfast.training.run_folder import RunFolder, choose_run
from kdfast.training.script import script
from kdfast.training.seeds import for_each_seed
from kdfast.training.setup import build_model, choose_inputs, load_data, print_config, start


@script
def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="train/classifier.py", description=__doc__)
    data_flags(parser)
    model_flags(parser, student=False)
    pruning_flags(parser)
    training_flags(parser)
    path_flags(parser)
    run_flags(parser)
    options = parse(parser, argv)
    check_pruning(options)
    if options.print_config:
        print_config(options)
        return

    accelerator = start(options)
    data = load_data(options, accelerator)
    if options.eval_only:
        say(json.dumps(score(options, accelerator, data, run_name(options, data))))
        return
    for_each_seed(
        options,
        accelerator,
        folder=lambda own: choose_run(own, run_name(own, data)),
        train=lambda own, run: train_one(own, accelerator, data, run),
    )


def run_name(options: argparse.Namespace, data: ImageData) -> str:
    half = [f"half-{options.train_half}"] * bool(options.train_half)
    parts = ["classifier", data.name, *half, options.model, f"s{options.seed}"]
    parts += ["pruned"] * bool(options.prune)
    return "-".join(parts).replace("/", "_").replace(":", ".")


def train_one(
    options: argparse.Namespace, accelerator: Accelerator, data: ImageData, run: RunFolder
) -> dict[str, Any]:
    model = build_model(options, data.classes, seed_name="network")
    inputs = choose_inputs(options, data, model)
    say(f"{options.model} on {data.name}, {len(data.train)} images, into {run.path}")
    resume = options.resume is not None
    train = train_pruned if options.prune else train_classifier
    return train(options, accelerator, data, model, inputs, run, resume=resume)


if __name__ == "__main__":
    sys.exit(main())
