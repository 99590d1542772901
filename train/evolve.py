#!/usr/bin/env python
"""Evolve a network on a small set: generation after generation, part inherited, part drawn anew.

    python train/evolve.py                              three of cifar_resnet20 on digits, 100 s
    accelerate launch train/evolve.py --dataset flowers102 --data-dir DIR --download
    torchrun --nproc_per_node 4 train/evolve.py --dataset folder --data-dir DIR --model resnet50 \\
        --split-rate 0.8 --generations 11

The story: masks split every convolution's and linear layer's weights once, in a fit and a reset
part. Generation 0 is the ordinary training of the whole network, bit for bit that of
train/classifier.py with the same options and seed. Generation g begins with all of the last weights
of generation g - 1, draws the reset part anew, and trains the whole network again, with a new
optimizer and the schedule from its start. With --split-mode kels the fit part is itself a narrower
network, which is cut out after every generation: slim.pt2, a program that needs torch alone,
slim.safetensors and slim.json.

A run is a folder with masks.safetensors, a run folder a generation (generation-0/ and so on),
generations.csv and generations.png: accuracy of the dense network's last weights, of the slim
network and of the masked dense one, all on the test split, which selects nothing. It goes on with
--resume auto wherever it was stopped; with more --generations, too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator

from kdfast.analysis.evolution import draw_generations
from kdfast.analysis.pages import write_files
from kdfast.data import ImageData
from kdfast.training.evolution import check_flags, evolve
from kdfast.training.flags import data_flags, model_flags, run_flags, training_flags
from kdfast.training.options import parse
from kdfast.training.parser import Parser
from kdfast.training.run_folder import RunFolder, choose_run, on_main
from kdfast.training.script import script
from kdfast.training.seeds import for_each_seed
from kdfast.training.setup import load_data, print_config, start
from kdfast.training.transfer_flags import evolution_flags


@script
def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="train/evolve.py", description=__doc__)
    data_flags(parser)
    model_flags(parser, student=False, init="model")
    evolution_flags(parser)
    training_flags(parser)
    run_flags(parser, recipe="evolution")
    options = parse(parser, argv)
    check_flags(options)
    if options.print_config:
        print_config(options)
        return

    accelerator = start(options)
    data = load_data(options, accelerator)
    for_each_seed(
        options,
        accelerator,
        folder=lambda own: run_folder(own, data),
        train=lambda own, run: evolve_and_draw(own, accelerator, data, run),
    )


def run_folder(options: argparse.Namespace, data: ImageData) -> RunFolder:
    name = "-".join(["evolve", data.name, options.model, f"s{options.seed}"])
    return choose_run(options, name.replace("/", "_").replace(":", "."))


def evolve_and_draw(
    options: argparse.Namespace, accelerator: Accelerator, data: ImageData, run: RunFolder
) -> dict[str, Any]:
    results = evolve(options, accelerator, data, run.path)
    title = f"{options.model} on {data.name}, {options.split_mode} at {options.split_rate:g}"
    on_main(
        accelerator,
        lambda: write_files(
            run.path,
            {"generations.png": draw_generations(run.path / "generations.csv", title)},
        ),
    )
    return results


if __name__ == "__main__":
    sys.exit(main())
