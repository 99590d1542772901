"""Networks that a run needs and nobody gave: trained on digits, once for all that ask alike."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from kdfast.data import ImageData
from kdfast.training.classifier import fingerprint, train_classifier
from kdfast.training.flags import data_flags, model_flags, run_flags, training_flags
from kdfast.training.journal import say
from kdfast.training.options import batch_size
from kdfast.training.parser import Parser
from kdfast.training.run_folder import RunFolder, on_main
from kdfast.training.setup import build_model, choose_inputs


def classifier_options(
    options: argparse.Namespace, model: str, model_kwargs: Mapping[str, Any], epochs: int
) -> argparse.Namespace:
    """The options of a new `model`, trained on labels with the data and settings of `options`.

    None of another network's or of a method's.
    """
    scratch = Parser()
    for add in (data_flags, training_flags, run_flags):
        add(scratch)
    model_flags(scratch, student=False)
    own = argparse.Namespace(
        **{key: copy.copy(v) for key, v in vars(options).items() if key in scratch.fallbacks},
        given=options.given,
        layers_of_methods=[],
    )
    own.model, own.model_kwargs = model, dict(model_kwargs)
    own.epochs, own.save_epochs = epochs, []
    own.pretrained, own.initial_checkpoint, own.img_size = False, None, None
    own.profile = own.experiment = own.resume = None
    own.init = own.reset_layers = None
    own.freeze_bn = False  # another's: a fresh network has no statistics to freeze
    return own


def shared_run(
    own: argparse.Namespace, accelerator: Accelerator, folder: str, name: str, *more: str | None
) -> RunFolder:
    """The run folder below --output that the same options had before.

    `more` is what else the weights depend on.
    """
    scratch = Parser()
    data_flags(scratch)
    model_flags(scratch, student=False)
    training_flags(scratch)
    processes = accelerator.num_processes
    batch = batch_size(own, processes) * processes * own.grad_accum_steps
    key = fingerprint(own, set(scratch.actions()) | {"seed"}, batch, *more)
    return RunFolder(Path(own.output) / folder / f"{name}-{key}")


def shared_classifier(
    own: argparse.Namespace,
    accelerator: Accelerator,
    data: ImageData,
    run: RunFolder,
    said: str,
    train: Callable[..., Any] = train_classifier,
) -> RunFolder:
    """`run` with a network of `own` in it, trained (by `train`) unless that was done before.

    `said` is what the network is called when the user is told.
    """
    if on_main(accelerator, run.results.exists):
        say(f"{said}: taken from {run.path}")
        return run
    say(f"{said}: training into {run.path}")
    model = build_model(own, data.classes, seed_name="network")
    fed = choose_inputs(own, data, model)
    begun = on_main(accelerator, run.path.exists)
    train(own, accelerator, data, model, fed, run, resume=begun)
    return run
