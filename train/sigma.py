#!/usr/bin/env python
"""Measure how much a layer of a network knows of an image, where, and at which epochs.

    python train/sigma.py                               digits: a distilled student, its baseline
    accelerate launch train/sigma.py STUDENT BASELINE TEACHER --layer classifier.0
    torchrun --nproc_per_node 8 train/sigma.py STUDENT BASELINE --data-dir DIR --candidates 500
    python train/sigma.py --weights-dir DIR --dataset cub200 --data-dir DATA --checkpoints 0 50 150

The story: draw candidate images; for each snapshot of a training run, the last one first, learn
how large a Gaussian perturbation every cell of an image bears before the layer's feature moves, up
to the same mean entropy for all; keep the images whose foreground bears no more than their
background; stop when there are enough, with --in-common enough that all RUNs accepted. Each RUN
gets a run folder of its own below --output, which analysis/knowledge.py reads; a run that was
stopped goes on with --resume auto.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator

from kdfast.data import ImageData
from kdfast.errors import UsageError, UserError
from kdfast.training.parser import Parser
from kdfast.training.run_folder import on_main
from kdfast.training.script import script
from kdfast.training.setup import load_data, print_config, start
from kdfast.training.sigma import check_settings
from kdfast.training.sigma_fit import fit
from kdfast.training.sigma_flags import parse_sigma, settings_of, sigma_flags
from kdfast.training.sigma_networks import digits_networks
from kdfast.training.sigma_training import SigmaFolder, SigmaTrainer
from kdfast.training.snapshots import (
    Snapshots,
    Watched,
    adopt_data,
    choose_layer,
    find_snapshots,
    leave_to_runs,
)


@script
def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="train/sigma.py", description=__doc__)
    sigma_flags(parser)
    options = parse_sigma(parser, argv)
    if options.print_config:
        leave_to_runs(options, parser)
        print_config(options)
        return
    found = snapshots_of(options)
    adopt_data(options, parser, found)
    accelerator = start(options)
    if options.tf32 and accelerator.device.type != "cuda":
        raise UsageError("--tf32 is a matter of GPUs; there is none here")
    data = load_data(options, accelerator)
    if not found:
        options.runs = list(map(str, digits_networks(options, accelerator, data)))
        found = snapshots_of(options)
    trainers = prepare(options, accelerator, data, found)
    results = fit(trainers, in_common=options.in_common)
    if accelerator.is_main_process:
        for result in results:
            print(json.dumps(result), flush=True)
    for result in results:
        if not result.get("accepted_in_common", result["accepted"]):
            by = " by all networks" if result["accepted"] else ""
            raise UserError(
                f"{result['run']}: none of {result['tried']} candidates was accepted{by} "
                "(candidates.csv has the reasons); results so far are kept. Give more --candidates,"
                " a later --accept-from or another --layer"
            )


def snapshots_of(options: argparse.Namespace) -> list[Snapshots]:
    if options.weights_dir:
        return [find_snapshots(options.weights_dir, options.checkpoints, bare=True)]
    return [find_snapshots(run, options.checkpoints, bare=False) for run in options.runs]


def prepare(
    options: argparse.Namespace,
    accelerator: Accelerator,
    data: ImageData,
    found: Sequence[Snapshots],
) -> list[SigmaTrainer]:
    """A trainer for each network; what can be refused is refused before any begins."""
    layer = choose_layer(options, data, found)
    runs = run_folders(options, found, layer)
    trainers = []
    for snapshots, run in zip(found, runs, strict=True):
        watched = Watched(snapshots, layer, options, data, accelerator.device)
        weight = getattr(options, "lambda")
        if weight is None:
            weight = 6.0 if "resnet" in watched.architecture else 7.0
        settings = settings_of(options, weight)
        try:
            check_settings(settings, watched.inputs.size)
        except ValueError as error:
            raise UsageError(str(error)) from None
        own = copy.copy(options)
        on_main(accelerator, lambda run=run: run.check(resume=options.resume is not None))
        trainers.append(SigmaTrainer(own, accelerator, data, watched, settings, run))
    return trainers


def run_folders(
    options: argparse.Namespace, found: Sequence[Snapshots], layer: str
) -> list[SigmaFolder]:
    """A folder for each network; raises `UsageError` where two would have the same."""
    paths: dict[Path, Snapshots] = {}
    for snapshots in found:
        parts = ["sigma", snapshots.name, layer, f"s{options.seed}"]
        if options.experiment:
            parts = [options.experiment, *([snapshots.name] if len(found) > 1 else [])]
        path = Path(options.output) / "-".join(parts).replace("/", "_").replace(":", ".")
        if path in paths:
            raise UsageError(
                f"the results of {paths[path].run} and {snapshots.run} would go to the same folder,"
                f" {path}: RUNs are told apart by the last part of their paths; rename one, or take"
                " them one by one, each with an --experiment of its own"
            )
        paths[path] = snapshots
    return [SigmaFolder(path) for path in paths]


if __name__ == "__main__":
    sys.exit(main())
