"""The teacher of a run: loaded from a checkpoint, published weights, or trained on digits.

So are its heads, where a method distils from them.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from kdfast.data import ImageData
from kdfast.errors import UsageError
from kdfast.methods import find_method, method_names
from kdfast.models import (
    MountedHeads,
    checksum,
    load_heads,
    load_weights,
    published_classes,
)
from kdfast.training.heads import build_heads, train_deep, train_linear
from kdfast.training.journal import say
from kdfast.training.objective import Choice
from kdfast.training.run_folder import on_main
from kdfast.training.setup import (
    Inputs,
    build_model,
    choose_inputs,
    weights_path,
)
from kdfast.training.shared_networks import classifier_options, shared_classifier, shared_run
from kdfast.training.trained import load_trained

# Below --output, of what is trained on digits.
_FOLDER = "teachers"


def has_teacher(options: argparse.Namespace) -> bool:
    """Whether the weights of the teacher are given."""
    return bool(options.teacher_checkpoint or options.teacher_pretrained)


def require_teacher(options: argparse.Namespace) -> None:
    """Refuse a run without a teacher, but on digits, where one is trained."""
    if not has_teacher(options) and options.dataset != "digits":
        raise UsageError(
            f"no teacher for {options.dataset}: train one with train/classifier.py --dataset "
            f"{options.dataset} --model {options.teacher} and give its run folder as "
            "--teacher-checkpoint, or use --teacher-pretrained"
        )


def load_teacher(options: argparse.Namespace, data: ImageData) -> tuple[nn.Module, Inputs]:
    """The teacher's network and what it is fed, from its checkpoint where that tells."""
    path = weights_path(options.teacher_checkpoint) if options.teacher_checkpoint else None
    if options.teacher_pretrained:
        require_same_classes(options.teacher, data)
    kwargs = None if options.teacher_kwargs is None else dict(options.teacher_kwargs)
    model, fed, _ = load_trained(
        options.teacher, path, kwargs, options, data, pretrained=options.teacher_pretrained
    )
    return model, fed


def require_same_classes(name: str, data: ImageData) -> None:
    """Refuse published weights for other classes: a random classifier would be drawn unasked."""
    known = published_classes(name)
    if known not in (None, data.classes):
        raise UsageError(
            f"the published {name} tells {known} classes apart, {data.name} has "
            f"{data.classes}; fine-tune it with train/classifier.py --model {name} --pretrained "
            "and give that run as --teacher-checkpoint"
        )


def settle_heads(options: argparse.Namespace, choice: Choice) -> None:
    """Refuse --heads that no method uses, and methods that lack them, but on digits.

    Deep heads bring their teacher along: it is taken from their run unless it is given.
    """
    kinds = {kind: name for name in choice.methods if (kind := find_method(name).heads)}
    if len(kinds) > 1:
        raise UsageError(
            " and ".join(f"method {name} needs {kind} heads" for kind, name in kinds.items())
            + "; a teacher has heads of one kind: choose one of them"
        )
    if not kinds:
        if options.heads:
            raise UsageError(
                f"--heads is given, but no method uses a teacher's heads; {', '.join(_users())} do"
            )
        return
    ((kind, name),) = kinds.items()
    if options.heads:
        if kind == "deep" and not has_teacher(options):
            options.teacher_checkpoint = options.heads
        return
    command = (
        f"train/heads.py --kind {kind} --dataset {options.dataset} --teacher {options.teacher}"
    )
    if kind == "deep" and has_teacher(options):
        raise UsageError(
            f"method {name} needs a teacher that was trained together with its heads: make one "
            f"with {command} and give its run folder as --heads"
        )
    if options.dataset != "digits":
        if kind == "linear":
            command += " --teacher-checkpoint RUN"
        raise UsageError(
            f"method {name} needs heads of the teacher: train them with {command} and give the "
            "run folder as --heads"
        )


def _users() -> list[str]:
    return [name for name in method_names() if find_method(name).heads]


def mount_heads(
    options: argparse.Namespace,
    choice: Choice,
    data: ImageData,
    network: nn.Module,
    fed: Inputs,
) -> MountedHeads | None:
    """The heads that the methods distil from; fresh ones where they are still to be trained."""
    kind = next((k for name in choice.methods if (k := find_method(name).heads)), None)
    if kind is None:
        return None
    if options.heads is None:
        return build_heads(_options_of_heads(options, kind), network, fed.size, data.classes)[0]
    heads = load_heads(options.heads, network, fed.size, data.classes, kind=kind)
    if has_teacher(options):
        heads.require_parent(checksum(network.state_dict()))
    return heads


def teach(
    options: argparse.Namespace,
    accelerator: Accelerator,
    data: ImageData,
    network: nn.Module,
    fed: Inputs,
    heads: MountedHeads | None,
) -> tuple[MountedHeads | None, str | None]:
    """Train what was not given, on digits, into `network`.

    Returns the heads, of which none is fresh, and where the teacher's weights are.
    """
    source = options.teacher_checkpoint
    missing = heads is not None and options.heads is None
    if missing and heads.kind == "deep":
        path = _train_heads(options, accelerator, data, network, fed, heads.kind)
        load_weights(network, weights_path(path))
        source = str(path)
    elif not has_teacher(options):
        weights = train_teacher(options, accelerator, data)
        load_weights(network, weights)
        source = str(weights.parent)
    parent = checksum(network.state_dict())
    if not missing:
        if heads is not None:
            heads.require_parent(parent)
        return heads, source
    if heads.kind == "linear":
        path = _train_heads(options, accelerator, data, network, fed, heads.kind)
    return load_heads(path, network, fed.size, data.classes, kind=heads.kind, parent=parent), source


def train_teacher(options: argparse.Namespace, accelerator: Accelerator, data: ImageData) -> Path:
    """Train the digits teacher, or take the one that the same options gave before."""
    own = _options_of_teacher(options)
    run = shared_run(own, accelerator, _FOLDER, f"digits-{options.teacher}")
    shared_classifier(own, accelerator, data, run, f"teacher {options.teacher}")
    return weights_path(run.path)


def _train_heads(
    options: argparse.Namespace,
    accelerator: Accelerator,
    data: ImageData,
    network: nn.Module,
    fed: Inputs,
    kind: str,
) -> Path:
    """Train heads on digits, or take those that the same options gave before; their run folder."""
    own = _options_of_heads(options, kind)
    deep = kind == "deep"
    parent = None if deep else checksum(network.state_dict())
    name = f"digits-{options.teacher}-{kind}-heads"
    run = shared_run(own, accelerator, _FOLDER, name, kind, parent)
    if on_main(accelerator, run.results.exists):
        say(f"{kind} heads of {options.teacher}: taken from {run.path}")
        return run.path
    say(f"{kind} heads of {options.teacher}: training into {run.path}")
    begun = on_main(accelerator, run.path.exists)
    if deep:
        network = build_model(own, data.classes, seed_name="network")
        fed = choose_inputs(own, data, network)
    train = train_deep if deep else train_linear
    train(own, accelerator, data, copy.deepcopy(network), fed, run, resume=begun)
    return run.path


def _options_of_teacher(options: argparse.Namespace) -> argparse.Namespace:
    """The options of the run that trains what teaches: none of the student's or the methods'."""
    kwargs = options.teacher_kwargs or ()
    return classifier_options(options, options.teacher, dict(kwargs), options.teacher_epochs)


def _options_of_heads(options: argparse.Namespace, kind: str) -> argparse.Namespace:
    own = _options_of_teacher(options)
    own.teacher, own.teacher_kwargs = options.teacher, own.model_kwargs
    own.fold_teacher, own.teacher_ahead = options.fold_teacher, options.teacher_ahead
    own.kind, own.head_pool, own.teacher_layers = kind, None, None
    return own
