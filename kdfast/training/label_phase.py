"""After a layer was matched: the layers behind it learn the labels, all others are frozen.

Cheng, Rao, Chen, Zhang, CVPR 2020: the published loop reports the accuracy of this phase alone.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from kdfast.data import ImageData
from kdfast.errors import UsageError
from kdfast.methods import find_method
from kdfast.models import Taps, checksum, load_weights
from kdfast.training import checkpoint
from kdfast.training.classifier import describe
from kdfast.training.first_stage import Hints
from kdfast.training.journal import say
from kdfast.training.keeper import StudentKeeper
from kdfast.training.loop import Trainer
from kdfast.training.objective import Choice, Objective
from kdfast.training.run_folder import RunFolder, on_main
from kdfast.training.setup import Inputs, arguments_of, make_loaders, metadata

SETTINGS = {
    "opt": "momentum", "momentum": 0.9, "weight_decay": 1e-4, "sched": "plateau",
    "decay_rate": 0.3, "patience_epochs": 10, "val_interval": 1, "sched_on_updates": False,
    "warmup_epochs": 0, "model_ema": False, "baseline": False,
    "save_epochs": [], "profile": None, "path_length": None,
}  # fmt: skip


def rests(choice: Choice) -> bool:
    """Whether no term of the loss need reach the layers behind the matched one."""
    methods = [find_method(name)(**chosen) for name, chosen in choice.methods.items()]
    layers = any(method.taps() == "layer" for method in methods)
    return layers and not choice.gamma and not any(method.heads for method in methods)


def check_rates(options: argparse.Namespace, choice: Choice) -> None:
    """Refuse method layer without a rate of its own, and flags of a phase that cannot be."""
    for name in choice.methods:
        chosen = "lr" in options.given or "lr" in options.settled
        if find_method(name).needs_rate and options.dataset != "digits" and not chosen:
            raise UsageError(
                f"no learning rate fits every layer of method {name}: give --lr (published ones go "
                "from 1e-4 to 10; --recipe knowledge has them by network and --student-layers)"
            )
    if not options.classifier_epochs:
        if "classifier_lr" in options.typed:  # printed options, as a config, have both
            raise UsageError("--classifier-lr is given, but no --classifier-epochs")
        return
    if not rests(choice.main_stage()):
        raise UsageError(
            "--classifier-epochs is for what method layer leaves untrained at --gamma 0; in this "
            "run nothing is"
        )
    if options.classifier_lr is None:
        raise UsageError(
            "--classifier-epochs needs --classifier-lr (published: 1e-3 for VGG and AlexNet, 1e-2 "
            "for ResNet)"
        )


class Tail(Objective):
    """Cross-entropy of what rested while a layer was matched; what was trained then is frozen.

    Frozen modules are in evaluation mode whatever is asked for, so that their batch normalisation
    keeps its statistics; those that hold frozen and other ones follow the other ones.
    """

    def __init__(self, before: Hints, **more: Any):
        before.student.close()
        super().__init__(Taps(before.student.model, []), **more)
        resting = set(before.resting)
        self.frozen = [
            module
            for module in before.student.model.modules()
            if not resting & set(module.modules())
        ]
        for parameter in before.student.parameters():
            parameter.requires_grad_(not parameter.requires_grad)

    def train(self, mode: bool = True) -> Tail:
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self


def require_tail(objective: Objective, layers: Sequence[str]) -> None:
    """Raise `UsageError` where nothing lies behind the matched `layers` that could be trained."""
    if all(parameter.requires_grad for parameter in objective.student.parameters()):
        raise UsageError(
            f"--classifier-epochs: no weights lie behind {', '.join(layers)}; drop it, or match "
            "an earlier layer"
        )


def _folder(outer: RunFolder) -> RunFolder:
    return RunFolder(outer.path / "classifier")


def check_tail(options: argparse.Namespace, outer: RunFolder) -> None:
    """Refuse to go on with a run whose classifier was trained on weights that are not the last."""
    latest = checkpoint.all_positions(outer.checkpoints)
    own = _folder(outer).path
    if own.exists() and latest and latest[-1].epoch < options.epochs:
        raise UsageError(
            f"{own} belongs to the weights after epoch {latest[-1].epoch}, not after "
            f"--epochs {options.epochs}; remove it, or give another --experiment"
        )


def train_tail(
    options: argparse.Namespace,
    accelerator: Accelerator,
    data: ImageData,
    before: Hints,
    inputs: Inputs,
    prepare: Callable[[torch.Tensor], torch.Tensor],
    outer: RunFolder,
    *,
    parent: str,
) -> dict[str, Any]:
    """Train what lies behind the matched layer into `classifier/` of `outer`, or take what is.

    It begins with the last weights of `outer`, which stay as they are; `parent` is the checksum of
    the teacher's. Returns what the results of `outer` say of it: `run`, `epochs`, `checksum` of the
    weights that it began with, `last` and `best`.
    """
    own = copy.copy(options)
    for key, value in SETTINGS.items():
        setattr(own, key, value)
    own.epochs, own.lr = options.classifier_epochs, options.classifier_lr
    student, run = before.student.model, _folder(outer)
    last = outer.weights("last")
    load_weights(student, last)
    begun_with = checksum(student.state_dict())
    begun, done = on_main(accelerator, lambda: (run.path.exists(), run.results.exists()))
    arguments = arguments_of(own, accelerator, data) | {"parent-checksum": begun_with}
    with run.claimed(accelerator, arguments, resume=begun):
        results = on_main(accelerator, run.read_results) if done else None
        if results is None or results["last"]["epoch"] < own.epochs:
            say(f"classifier behind the matched layer: {own.epochs} epochs, into {run.path}")
            train, held_out = make_loaders(own, data, inputs, accelerator)
            trainer = Trainer(
                accelerator,
                Tail(before, label_smoothing=own.smoothing),
                train,
                held_out,
                prepare,
                run,
                own,
                StudentKeeper(run, metadata(student, own.model_kwargs, data, inputs, parent)),
                arguments,
                resume=begun,
            )
            scores = trainer.fit()
            batch = train.plan.global_batch
            results = describe(run, own, accelerator, batch, student, inputs, scores)
            on_main(accelerator, lambda: run.write_results(results))
    say(f"classifier top1 {results['last']['top1']:.2f} after {results['last']['epoch']} epochs")
    kept = {key: results[key] for key in ("run", "last", "best")}
    return kept | {"epochs": results["last"]["epoch"], "checksum": begun_with}
