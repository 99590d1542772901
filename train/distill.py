#!/usr/bin/env python
"""Distil a teacher into a student: any timm pair, any combination of methods.

    python train/distill.py                             digits: teacher, student, student alone
    accelerate launch train/distill.py --dataset cifar100 --data-dir DIR --recipe crd \\
        --teacher cifar_resnet110 --teacher-checkpoint RUN --student cifar_resnet20 --method kd at
    torchrun --nproc_per_node 8 train/distill.py --dataset folder --data-dir DIR \\
        --teacher vit_base_patch16_224 --teacher-checkpoint RUN --student resnet18 --method kd --amp
    python train/distill.py --method fsp kd --init-epochs 2   two stages: fsp alone, then kd
    python train/distill.py --teacher cifar_resnet20 --assistants cifar_resnet14 --method kd

The story: load or, on digits, train the teacher; freeze it; have it teach the assistants, one the
next, where there are any; pair layers; where a first stage is asked for, train the first layers on
its terms alone; train the student on gamma * cross-entropy + the sum of weight * term; on digits,
train the same student alone; compare. With method layer, the layers behind the matched one may
learn the labels afterwards (--classifier-epochs).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from kdfast.data import ImageData
from kdfast.methods import find_method
from kdfast.training.chain import Assistant, choose_assistants, distill_through
from kdfast.training.classifier import score
from kdfast.training.flags import data_flags, model_flags, run_flags, training_flags
from kdfast.training.journal import say
from kdfast.training.label_phase import check_rates
from kdfast.training.objective import Choice, choose_methods
from kdfast.training.options import parse
from kdfast.training.parser import Parser, load_plugin
from kdfast.training.run_folder import RunFolder, choose_run
from kdfast.training.script import script
from kdfast.training.seeds import for_each_seed
from kdfast.training.setup import load_data, print_config, start
from kdfast.training.teacher_cache import check_cache
from kdfast.training.teaching import require_teacher, settle_heads
from kdfast.training.transfer_flags import distill_flags


@script
def main(argv: Sequence[str]) -> None:
    load_plugin(argv)
    parser = Parser(prog="train/distill.py", description=__doc__)
    data_flags(parser)
    distill_flags(parser)
    model_flags(parser, student=True)
    training_flags(parser)
    run_flags(parser)
    options = parse(parser, argv)
    choice = choose_methods(options)
    for name, chosen in choice.methods.items():
        find_method(name)(**chosen)  # refuses impossible options before anything is loaded
    assistants = choose_assistants(options, choice)
    check_cache(options)
    if options.print_config:
        print_config(options, **choice.as_yaml())
        return
    if options.baseline is None:
        options.baseline = options.dataset == "digits"
    if not options.eval_only:
        check_rates(options, choice)
        settle_heads(options, choice)
        require_teacher(options)

    accelerator = start(options)
    data = load_data(options, accelerator)
    if options.eval_only:
        name = run_folder(options, choice, assistants, data).path.name
        say(json.dumps(score(options, accelerator, data, name)))
        return
    for_each_seed(
        options,
        accelerator,
        folder=lambda own: run_folder(own, choice, assistants, data),
        train=lambda own, run: distill_through(assistants, own, choice, accelerator, data, run),
    )


def run_folder(
    options: argparse.Namespace, choice: Choice, assistants: Sequence[Assistant], data: ImageData
) -> RunFolder:
    networks = [options.teacher, *(assistant.name for assistant in assistants), options.model]
    parts = ["distill", data.name, "+".join(choice.methods) or "none", *networks]
    name = "-".join([*parts, f"s{options.seed}"]).replace("/", "_").replace(":", ".")
    return choose_run(options, name)


if __name__ == "__main__":
    sys.exit(main())
