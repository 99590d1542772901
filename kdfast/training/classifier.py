"""Training one network on labels alone: teachers, and students for comparison."""

from __future__ import annotations

import argparse
import hashlib
import json
from typing import Any

from accelerate import Accelerator
from torch import nn

from kdfast.data import ImageData
from kdfast.models import Taps
from kdfast.training.loop import Trainer
from kdfast.training.objective import Objective
from kdfast.training.run_folder import RunFolder, on_main
from kdfast.training.setup import (
    Inputs,
    count_operations,
    make_loaders,
    metadata,
    plain,
    preparer,
    try_out,
)


def train_classifier(
    options: argparse.Namespace,
    accelerator: Accelerator,
    data: ImageData,
    model: nn.Module,
    inputs: Inputs,
    run: RunFolder,
    *,
    resume: bool,
) -> dict[str, Any]:
    """Train `model` with cross-entropy into `run`; returns the run's results, already written."""
    arguments = plain(options, processes=accelerator.num_processes)
    on_main(accelerator, lambda: run.check(resume=resume))
    if resume:
        on_main(accelerator, lambda: run.check_same(arguments))
    try_out(model, inputs, data.classes)
    train, held_out = make_loaders(options, data, inputs, accelerator)
    objective = Objective(Taps(model, []), label_smoothing=options.smoothing)
    trainer = Trainer(
        accelerator,
        objective,
        train,
        held_out,
        preparer(inputs, accelerator, channels_last=options.channels_last),
        run,
        options,
        metadata(model, options.model_kwargs, data, inputs, parent=None),
        resume=resume,
    )
    on_main(accelerator, lambda: run.create(resume=resume))
    on_main(accelerator, lambda: run.write_arguments(arguments))
    scores = trainer.fit()
    results = describe(run, options, accelerator, train.plan.global_batch, model, inputs, scores)
    on_main(accelerator, lambda: run.write_results(results))
    return results


def describe(
    run: RunFolder,
    options: argparse.Namespace,
    accelerator: Accelerator,
    global_batch: int,
    model: nn.Module,
    inputs: Inputs,
    scores: dict[str, Any],
    **more: Any,
) -> dict[str, Any]:
    """The results of a run, the object of its last line of output."""
    return {
        "run": str(run.path),
        "seed": options.seed,
        "processes": accelerator.num_processes,
        "global_batch": global_batch,
        **scores,
        **more,
        "parameters": sum(p.numel() for p in model.parameters()),
        "operations": count_operations(model, inputs.size),
    }


# What a network's weights do not depend on.
_INCIDENTAL = {
    "output", "experiment", "resume", "checkpoint-hist", "save-epochs", "log-interval", "workers",
    "threads", "download", "recipe", "baseline",
}  # fmt: skip


def fingerprint(options: argparse.Namespace, keys: set[str], global_batch: int) -> str:
    """Eight hex digits over the global batch and the options in `keys` that weights depend on."""
    relevant = {k: v for k, v in plain(options).items() if k in keys - _INCIDENTAL}
    relevant["global-batch-size"] = global_batch
    text = json.dumps(relevant, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
