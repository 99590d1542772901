"""Training one network on labels alone: teachers, and students for comparison."""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from kdfast.data import ImageData
from kdfast.errors import UsageError
from kdfast.metrics import count_operations
from kdfast.models import Taps, parameter_count
from kdfast.models.pruning import WeightMasks
from kdfast.training.evaluate import evaluate
from kdfast.training.keeper import StudentKeeper
from kdfast.training.loop import Trainer
from kdfast.training.objective import Objective
from kdfast.training.path_length import PathLength
from kdfast.training.run_folder import RunFolder, choose_run, on_main
from kdfast.training.setup import (
    Inputs,
    arguments_of,
    build_model,
    choose_inputs,
    make_loaders,
    metadata,
    plain,
    preparer,
    try_out,
    weights_path,
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
    accuracy: bool = False,
    parent: str | None = None,
    masks: WeightMasks | None = None,
    path_length: Sequence[str] | None = None,
    **recorded: Any,
) -> dict[str, Any]:
    """Train `model` with cross-entropy into `run`; returns the run's results, already written.

    With `accuracy` the summary has that of the training images, too. `parent` is the checksum of
    the weights that `model` came from; what `masks` prune stays zero, and `zero_share` is then in
    the results. `path_length` are the layers whose paths are measured, those of `options` where it
    is None. `recorded` is what the run's record holds beside `options`.
    """
    arguments = arguments_of(options, accelerator, data, **recorded)
    about = metadata(model, options.model_kwargs, data, inputs, parent)
    pruned = {} if masks is None else {"zero_share": masks.zero_share()}
    if masks is not None:
        about |= pruned | {"prune": list(options.prune)}
    with run.claimed(accelerator, arguments, resume=resume):
        try_out(model, inputs, data.classes)
        train, held_out = make_loaders(options, data, inputs, accelerator)
        layers = getattr(options, "path_length", None) if path_length is None else path_length
        trainer = Trainer(
            accelerator,
            Objective(
                Taps(model, []), label_smoothing=options.smoothing, accuracy=accuracy, masks=masks
            ),
            train,
            held_out,
            preparer(inputs, accelerator, channels_last=options.channels_last),
            run,
            options,
            StudentKeeper(run, about, options.save_epochs, data.parts),
            arguments,
            path=PathLength(model, layers) if layers else None,
            resume=resume,
        )
        scores = trainer.fit()
        batch = train.plan.global_batch
        results = describe(run, options, accelerator, batch, model, inputs, scores, **pruned)
        on_main(accelerator, lambda: run.write_results(results))
    return results


def score(
    options: argparse.Namespace, accelerator: Accelerator, data: ImageData, name: str
) -> dict[str, Any]:
    """`--eval-only`: `top1`, `top5`, `loss` and `images` of weights that exist; writes nothing.

    `name` is that of the run folder for `--resume auto`. Raises `UsageError` without weights.
    """
    own = copy.copy(options)
    if options.resume is not None:
        own.initial_checkpoint = str(choose_run(options, name).path)
    if not own.initial_checkpoint and not own.pretrained:
        raise UsageError(
            "--eval-only needs weights: give --initial-checkpoint PATH, --pretrained or --resume "
            "PATH"
        )
    model = build_model(own, data.classes, seed_name="network")
    inputs = choose_inputs(own, data, model)
    try_out(model, inputs, data.classes)
    _, held_out = make_loaders(own, data, inputs, accelerator)
    layout = torch.channels_last if options.channels_last else torch.preserve_format
    model = model.to(accelerator.device, memory_format=layout).eval()
    prepare = preparer(inputs, accelerator, channels_last=options.channels_last)
    scores = evaluate(model, held_out, accelerator, prepare, parts=data.parts)
    weights = own.initial_checkpoint and str(weights_path(own.initial_checkpoint))
    return {
        "weights": weights or "pretrained",
        "model": options.model,
        "dataset": data.name,
        "processes": accelerator.num_processes,
        **scores,
    }


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
        "parameters": parameter_count(model),
        "operations": count_operations(model, inputs.size),
    }


# What a network's weights do not depend on.
_INCIDENTAL = {
    "workers", "threads", "download", "cache-images", "on-device", "teacher-ahead",
}  # fmt: skip


def fingerprint(
    options: argparse.Namespace, keys: set[str], global_batch: int, *more: str | None
) -> str:
    """Eight hex digits over the global batch, `more`, and what weights depend on in `keys`."""
    relevant = {k: v for k, v in plain(options).items() if k in keys - _INCIDENTAL}
    relevant["global-batch-size"] = global_batch
    if more:
        relevant["more"] = more
    text = json.dumps(relevant, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
