"""The teacher of a run: loaded from a checkpoint, published weights, or trained on digits."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

from accelerate import Accelerator
from timm.models import get_pretrained_cfg
from torch import nn

from kdfast.data import ImageData
from kdfast.errors import UsageError
from kdfast.models import create_model, read_weights, resolve_name
from kdfast.training.classifier import fingerprint, train_classifier
from kdfast.training.flags import data_flags, model_flags, training_flags
from kdfast.training.journal import say
from kdfast.training.options import batch_size
from kdfast.training.parser import Parser
from kdfast.training.run_folder import RunFolder, on_main
from kdfast.training.setup import (
    Inputs,
    build_model,
    choose_inputs,
    load_checkpoint,
    recorded_inputs,
    try_out,
    weights_path,
)


def require_teacher(options: argparse.Namespace) -> None:
    """Refuse a run without a teacher, but on digits, where one is trained."""
    given = options.teacher_checkpoint or options.teacher_pretrained
    if not given and options.dataset != "digits":
        raise UsageError(
            f"no teacher for {options.dataset}: train one with train/classifier.py --dataset "
            f"{options.dataset} --model {options.teacher} and give its run folder as "
            "--teacher-checkpoint, or use --teacher-pretrained"
        )


def load_teacher(options: argparse.Namespace, data: ImageData) -> tuple[nn.Module, Inputs]:
    """The teacher's network and what it is fed, from its checkpoint where that tells."""
    path, known, fed = None, {}, None
    kwargs = dict(options.teacher_kwargs or ())
    if options.teacher_checkpoint:
        path = weights_path(options.teacher_checkpoint)
        known = read_weights(path)[1]
        fed = recorded_inputs(path, known)
        name = resolve_name(options.teacher)
        # Another network's arguments would only hide that the file does not fit.
        same = known.get("architecture") in (name, name.partition(".")[0])
        if same and options.teacher_kwargs is None and isinstance(known.get("model_kwargs"), dict):
            kwargs = known["model_kwargs"]
    if options.teacher_pretrained:
        require_same_classes(options.teacher, data)
    model = create_model(
        options.teacher,
        data.classes,
        pretrained=options.teacher_pretrained,
        img_size=fed and fed.size,
        **kwargs,
    )
    if path is not None:
        load_checkpoint(model, path)
    if fed is None:
        own = argparse.Namespace(**vars(options))
        own.pretrained, own.initial_checkpoint = options.teacher_pretrained, None
        if path is None:
            # Published weights, or those of the run to come: fed what they are trained on, whatever
            # the student gets. A bare file says nothing, so the flags hold for it as well.
            own.img_size = own.mean = own.std = None
        fed = choose_inputs(own, data, model)
    try_out(model, fed, data.classes)
    return model, fed


def require_same_classes(name: str, data: ImageData) -> None:
    """Refuse published weights for other classes: timm would draw a random classifier unasked."""
    published = get_pretrained_cfg(resolve_name(name))
    if published is not None and published.num_classes != data.classes:
        raise UsageError(
            f"the published {name} tells {published.num_classes} classes apart, {data.name} has "
            f"{data.classes}; fine-tune it with train/classifier.py --model {name} --pretrained "
            "and give that run as --teacher-checkpoint"
        )


def train_teacher(options: argparse.Namespace, accelerator: Accelerator, data: ImageData) -> Path:
    """Train the digits teacher, or take the one that the same options gave before."""
    own = copy.deepcopy(options)
    own.model, own.model_kwargs = options.teacher, dict(options.teacher_kwargs or ())
    own.epochs, own.save_epochs = options.teacher_epochs, []
    own.pretrained, own.initial_checkpoint, own.img_size = False, None, None
    own.profile = None
    own.freeze_bn = False  # the student's: a fresh teacher has no statistics to freeze
    scratch = Parser()
    data_flags(scratch)
    model_flags(scratch, student=False)
    training_flags(scratch)
    processes = accelerator.num_processes
    batch = batch_size(own, processes) * processes * own.grad_accum_steps
    key = fingerprint(own, set(scratch.actions()) | {"seed"}, batch)
    run = RunFolder(Path(options.output) / "teachers" / f"digits-{options.teacher}-{key}")
    if on_main(accelerator, run.results.exists):
        say(f"teacher {options.teacher}: taken from {run.path}")
        return weights_path(run.path)
    say(f"teacher {options.teacher}: training into {run.path}")
    model = build_model(own, data.classes, seed_name="network")
    fed = choose_inputs(own, data, model)
    begun = on_main(accelerator, run.path.exists)
    train_classifier(own, accelerator, data, model, fed, run, resume=begun)
    return weights_path(run.path)
