#!/usr/bin/env python
"""Train auxiliary classifiers (heads) of a teacher, for the methods that distil from them.

    python train/heads.py                               digits: the teacher, then its linear heads
    accelerate launch train/heads.py --dataset cifar100 --data-dir DIR \\
        --teacher cifar_resnet110 --teacher-checkpoint RUN
    torchrun --nproc_per_node 8 train/heads.py --kind deep --dataset cifar100 --data-dir DIR \\
        --teacher cifar_resnet110 --epochs 200 -b 16

Linear heads (method dih) are mounted on the stages of a frozen teacher and trained together in one
pass of it; each keeps the weights of its best epoch. Deep heads (method tofd) are trained from
scratch together with the teacher, which is saved beside them. The run folder is a --heads of
train/distill.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator

from kdfast.data import ImageData
from kdfast.errors import UsageError
from kdfast.models import load_weights
from kdfast.training.flags import data_flags, run_flags, training_flags
from kdfast.training.heads import build_heads, train_deep, train_linear
from kdfast.training.journal import say
from kdfast.training.options import parse
from kdfast.training.parser import Parser
from kdfast.training.run_folder import RunFolder, choose_run
from kdfast.training.script import script
from kdfast.training.seeds import for_each_seed
from kdfast.training.setup import build_model, choose_inputs, load_data, print_config, start
from kdfast.training.teacher_cache import check_cache
from kdfast.training.teaching import has_teacher, load_teacher, require_teacher, train_teacher
from kdfast.training.transfer_flags import head_flags, teacher_flags


@script
def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="train/heads.py", description=__doc__)
    data_flags(parser)
    teacher_flags(parser)
    head_flags(parser)
    training_flags(parser)
    run_flags(parser)
    options = parse(parser, argv)
    check(options)
    if options.print_config:
        print_config(options)
        return
    options.model, options.model_kwargs = options.teacher, dict(options.teacher_kwargs or ())
    if options.kind == "linear":
        require_teacher(options)

    accelerator = start(options)
    data = load_data(options, accelerator)
    train = train_on_frozen if options.kind == "linear" else train_together
    for_each_seed(
        options,
        accelerator,
        folder=lambda own: run_folder(own, data),
        train=lambda own, run: train(own, accelerator, data, run),
    )


def check(options: argparse.Namespace) -> None:
    """Refuse flags that do not go together."""
    check_cache(options)
    if options.eval_only:
        raise UsageError("--eval-only scores one network; heads are scored while they are trained")
    if options.head_pool and len(options.head_pool) > 2:
        raise UsageError("--head-pool takes a height and a width, or one number for both")
    if options.kind == "deep":
        if has_teacher(options):
            raise UsageError(
                "--kind deep trains the teacher together with its heads; to start it from weights "
                "give --initial-checkpoint or --pretrained instead"
            )
        if "teacher_cache" in options.given:
            raise UsageError("--teacher-cache is of linear heads, whose teacher is frozen; drop it")
        if options.head_pool:
            raise UsageError("--head-pool is of linear heads; deep ones pool to one position")
    elif options.pretrained or options.initial_checkpoint:
        raise UsageError(
            "--kind linear trains heads on a frozen teacher; give its weights as "
            "--teacher-checkpoint or --teacher-pretrained"
        )


def run_folder(options: argparse.Namespace, data: ImageData) -> RunFolder:
    parts = ["heads", data.name, options.kind, options.teacher, f"s{options.seed}"]
    return choose_run(options, "-".join(parts).replace("/", "_").replace(":", "."))


def train_on_frozen(
    options: argparse.Namespace, accelerator: Accelerator, data: ImageData, run: RunFolder
) -> dict[str, Any]:
    network, fed = load_teacher(options, data)
    build_heads(options, network, fed.size, data.classes)  # what it refuses, it refuses early
    if not has_teacher(options):
        load_weights(network, train_teacher(options, accelerator, data))
    say(f"linear heads of {options.teacher} on {data.name}, into {run.path}")
    resume = options.resume is not None
    return train_linear(options, accelerator, data, network, fed, run, resume=resume)


def train_together(
    options: argparse.Namespace, accelerator: Accelerator, data: ImageData, run: RunFolder
) -> dict[str, Any]:
    network = build_model(options, data.classes, seed_name="network")
    inputs = choose_inputs(options, data, network)
    say(f"{options.teacher} with deep heads on {data.name}, into {run.path}")
    resume = options.resume is not None
    return train_deep(options, accelerator, data, network, inputs, run, resume=resume)


if __name__ == "__main__":
    sys.exit(main())
