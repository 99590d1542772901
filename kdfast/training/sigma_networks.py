"""A distilled student and its baseline on digits, for sigma training to which no run is given."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from accelerate import Accelerator

from kdfast.data import ImageData
from kdfast.training.distillation import distill
from kdfast.training.flags import data_flags, model_flags, run_flags, training_flags
from kdfast.training.journal import say
from kdfast.training.objective import choose_methods
from kdfast.training.options import parse
from kdfast.training.parser import Parser
from kdfast.training.run_folder import on_main
from kdfast.training.shared_networks import shared_run
from kdfast.training.transfer_flags import distill_flags

# The layer that is matched and examined: at inner ones a baseline of six epochs on digits knows
# less of the ink than of the empty background, and no image is accepted.
LAYER = "fc"
SAVED = [0, 1, 3, 6]
_FOLDER = "networks"
# What the images are and what the machine does.
_SHARED = {
    "dataset", "data_dir", "train_split", "val_split", "test_split", "train_limit", "eval_limit",
    "num_classes", "train_half", "cache_images", "threads", "deterministic", "ops",
    "output", "seed",
}  # fmt: skip


def digits_networks(
    options: argparse.Namespace, accelerator: Accelerator, data: ImageData
) -> list[Path]:
    """Run folders of a student distilled on digits and of its baseline, with snapshots in both.

    From the same initial weights, by method layer and by labels, as train/distill.py --method layer
    does; taken again by all who ask with the same options.
    """
    parser = Parser()
    for add in (data_flags, distill_flags, training_flags, run_flags):
        add(parser)
    model_flags(parser, student=True)
    own = parse(parser, ["--dataset", "digits", "--method", "layer", "--student-layers", LAYER])
    for key in _SHARED:
        setattr(own, key, getattr(options, key))
    own.save_epochs, own.baseline = list(SAVED), True
    own.given = set()
    choice = choose_methods(own)
    depends = [choice.as_yaml(), own.teacher, own.teacher_epochs, SAVED, LAYER]
    loss = json.dumps(depends, sort_keys=True)
    run = shared_run(own, accelerator, _FOLDER, f"digits-{own.model}-distilled-s{own.seed}", loss)
    if on_main(accelerator, run.results.exists):
        say(f"student and baseline: taken from {run.path}")
    else:
        own.resume = "auto" if on_main(accelerator, run.path.exists) else None
        distill(own, choice, accelerator, data, run)
    return [run.path, run.path / "baseline"]
