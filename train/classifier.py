#!/usr/bin/env python
"""Train one image classifier with cross-entropy: a teacher, or a student for comparison.

    python train/classifier.py                          cifar_resnet20 on digits, about 30 s
    accelerate launch train/classifier.py --dataset cifar100 --download --model cifar_resnet110
    torchrun --nproc_per_node 8 train/classifier.py --dataset folder --data-dir DIR \\
        --model resnet50 -b 64 --opt sgd --lr 0.5 --epochs 100 --sched cosine --amp

Everything lands in one run folder under --output; its best.safetensors is a --teacher-checkpoint
of train/distill.py and loads with timm.create_model(..., checkpoint_path=...).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from kdfast.training.classifier import train_classifier
from kdfast.training.flags import data_flags, model_flags, run_flags, training_flags
from kdfast.training.options import parse
from kdfast.training.parser import Parser
from kdfast.training.run_folder import choose_run
from kdfast.training.script import script
from kdfast.training.setup import build_model, choose_inputs, load_data, print_config, start


@script
def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="train/classifier.py", description=__doc__)
    data_flags(parser)
    model_flags(parser, student=False)
    training_flags(parser)
    run_flags(parser)
    options = parse(parser, argv)
    if options.print_config:
        print_config(options)
        return

    accelerator = start(options)
    data = load_data(options, accelerator)
    model = build_model(options, data.classes, seed_name="network")
    inputs = choose_inputs(options, data, model)

    dataset, network = data.name.replace("/", "_"), options.model.replace(":", ".")
    run = choose_run(options, f"classifier-{dataset}-{network}-s{options.seed}")
    accelerator.print(f"{network} on {data.name}, {len(data.train)} images, into {run.path}")
    results = train_classifier(
        options, accelerator, data, model, inputs, run, resume=options.resume is not None
    )
    accelerator.print(json.dumps(results))


if __name__ == "__main__":
    sys.exit(main())
