"""The first stage of a method with two: its term alone trains the layers that it reaches.

Romero et al., "FitNets", ICLR 2015, section 2.2; Yim et al., CVPR 2017, section 3.4.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator

from kdfast.data import ImageData
from kdfast.errors import UserError
from kdfast.models import checksum, load_weights
from kdfast.training import checkpoint
from kdfast.training.classifier import describe
from kdfast.training.journal import say
from kdfast.training.keeper import StudentKeeper
from kdfast.training.loop import Trainer
from kdfast.training.objective import Choice, Objective
from kdfast.training.run_folder import RunFolder, on_main
from kdfast.training.setup import Inputs, arguments_of, make_loaders, metadata
from kdfast.training.teacher import Teacher
from kdfast.training.teacher_cache import CachedTeacher, fit


class Hints(Objective):
    """Terms alone: cross-entropy is read, not learnt, and what the terms do not reach rests."""

    def __init__(self, *args: Any, **more: Any):
        super().__init__(*args, **more)
        self.learns_labels = False
        self.resting: list[torch.nn.Module] = []

    def rest(self, *batch: Any, **more: Any) -> None:
        """Freeze all parameters and modules that the terms of an example batch do not depend on.

        The arguments are those of `forward`. Parameters without a gradient no longer ask for one,
        and modules after all that is compared stay in eval mode, their buffers as they are.
        """
        passed: list[tuple[torch.nn.Module, torch.Tensor]] = []

        def keep(module: torch.nn.Module, args: tuple, output: Any) -> None:
            if isinstance(output, torch.Tensor) and output.requires_grad:
                passed.append((module, output))

        hooks = [module.register_forward_hook(keep) for module in self.student.model.modules()]
        # Batch normalisation would take the example into its statistics.
        self.eval()
        total, _, _ = self(*batch, **more)
        for hook in hooks:
            hook.remove()
        own = [parameter for parameter in self.parameters() if parameter.requires_grad]
        wanted = [*own, *(output for _, output in passed)]
        gradients = torch.autograd.grad(total, wanted, allow_unused=True)
        reached = {
            id(tensor)
            for tensor, gradient in zip(wanted, gradients, strict=True)
            if gradient is not None
        }
        trained = {id(module) for module, output in passed if id(output) in reached}
        for parameter in own:
            parameter.requires_grad_(id(parameter) in reached)
        for module in self.student.model.modules():
            parts = {id(part) for part in module.modules()}
            if not parts & trained and not any(id(p) in reached for p in module.parameters()):
                self.resting.append(module)
        self.train()

    def train(self, mode: bool = True) -> Hints:
        super().train(mode)
        for module in self.resting:
            module.eval()
        return self


def first_stage_options(options: argparse.Namespace, init: dict[str, Any]) -> argparse.Namespace:
    """The options of the first stage: those of the run, and the settings `init`."""
    own = copy.copy(options)
    for key, value in init.items():
        setattr(own, key.replace("-", "_"), value)
    own.sched = "multistep" if own.decay_milestones else "constant"
    own.sched_on_updates, own.warmup_epochs = False, 0
    own.model_ema, own.baseline = False, False
    own.save_epochs, own.profile = [], None
    return own


def train_first_stage(
    options: argparse.Namespace,
    choice: Choice,
    accelerator: Accelerator,
    data: ImageData,
    hints: Hints,
    teacher: Teacher | CachedTeacher,
    inputs: Inputs,
    prepare: Callable[[torch.Tensor], torch.Tensor],
    outer: RunFolder,
    *,
    parent: str,
    teacher_top1: float,
) -> tuple[RunFolder, dict[str, Any]]:
    """Train the student of `hints` into `first-stage/` of `outer`, or take what is there.

    `parent` is the checksum of the teacher's weights. Returns the folder, whose last weights the
    main stage begins with, and what the main stage's results say of it. Raises `UserError` when it
    is gone although the main stage has begun.
    """
    run = RunFolder(outer.path / "first-stage")
    begun, done, later = on_main(
        accelerator,
        lambda: (run.path.exists(), run.results.exists(), checkpoint.latest(outer.checkpoints)),
    )
    if later and not done:
        raise UserError(
            f"{run.results} is missing, but the main stage has begun ({later}); put the first "
            f"stage back, or remove {outer.path} to start anew"
        )
    names = " and ".join(choice.methods)
    arguments = arguments_of(options, accelerator, data, **choice.as_yaml())
    arguments["teacher-checksum"] = parent
    with run.claimed(accelerator, arguments, resume=begun):
        if not done:
            say(f"first stage: {names} alone, {options.epochs} epochs, into {run.path}")
            train, held_out = make_loaders(options, data, inputs, accelerator)
            student = hints.student.model
            record = metadata(student, options.model_kwargs, data, inputs, parent)
            trainer = Trainer(
                accelerator,
                hints,
                train,
                held_out,
                prepare,
                run,
                options,
                StudentKeeper(run, record),
                arguments,
                teacher=teacher,
                resume=begun,
            )
            scores = fit(trainer)
            batch = train.plan.global_batch
            results = describe(
                run, options, accelerator, batch, student, inputs, scores, teacher_top1=teacher_top1
            )
            on_main(accelerator, lambda: run.write_results(results))
    last = run.weights("last")
    load_weights(hints.student.model, last)
    weights = checksum(hints.student.model.state_dict())
    say(f"first stage of {options.epochs} epochs done; going on from {last} ({weights})")
    return run, {
        "epochs": options.epochs,
        "methods": list(choice.methods),
        "checksum": weights,
        "run": str(run.path),
    }
