"""One distilled student: the run that train/distill.py makes, and a link of a longer chain."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from timm.layers import convert_sync_batchnorm
from torch import nn

from kdfast.data import ImageData, Loader
from kdfast.methods import find_method
from kdfast.models import InputAdapter, MountedHeads, Taps, checksum, load_weights
from kdfast.training.classifier import describe, train_classifier
from kdfast.training.evaluate import evaluate
from kdfast.training.first_stage import Hints, first_stage_options, train_first_stage
from kdfast.training.journal import say
from kdfast.training.keeper import StudentKeeper
from kdfast.training.label_phase import check_tail, require_tail, rests, train_tail
from kdfast.training.loop import Trainer
from kdfast.training.objective import Choice, Objective, TapPlan, plan_taps
from kdfast.training.optimizer import create_optimizer
from kdfast.training.path_length import PathLength, weight_of, weighted_before
from kdfast.training.run_folder import RunFolder, on_main
from kdfast.training.setup import (
    Inputs,
    arguments_of,
    build_model,
    choose_inputs,
    make_loaders,
    metadata,
    preparer,
    try_out,
)
from kdfast.training.teacher import Teacher
from kdfast.training.teacher_cache import CachedTeacher, Lesson, cached, fit
from kdfast.training.teaching import has_teacher, load_teacher, mount_heads, teach
from kdfast.training.tell import comparison


@dataclass
class Stage:
    """An objective, the teacher it asks and the layers they compare."""

    options: argparse.Namespace
    choice: Choice
    plan: TapPlan
    objective: Objective
    teacher: Teacher


@dataclass
class Assembly:
    """All that a run trains with, checked as far as that needs no training.

    `network` is the teacher's, fed `fed`, `parent` the checksum of its weights and `source` where
    they are from, `heads` its auxiliary classifiers where the main stage asks for them; all are
    random until `prepare_teacher` was called. `alone` is the student once more,
    where a baseline is wanted; `first` trains a copy of it, where there is a first stage.
    `path_length` are the layers whose paths are measured.
    """

    student: nn.Module
    alone: nn.Module | None
    inputs: Inputs
    train: Loader
    held_out: Loader
    prepare: Callable[[torch.Tensor], torch.Tensor]
    network: nn.Module
    fed: Inputs
    heads: MountedHeads | None
    parent: str
    source: str | None
    main: Stage
    first: Stage | None
    path_length: list[str]

    @property
    def stages(self) -> list[Stage]:
        return [self.main] if self.first is None else [self.first, self.main]


def assemble(
    options: argparse.Namespace,
    choice: Choice,
    accelerator: Accelerator,
    data: ImageData,
    *,
    seed_name: str = "student",
) -> Assembly:
    """Build and check both networks, loaders and objectives; writes nothing.

    The student's weights are drawn from (seed, `seed_name`).
    """
    student = build_model(options, data.classes, seed_name=seed_name)
    inputs = choose_inputs(options, data, student)
    try_out(student, inputs, data.classes)
    train, held_out = make_loaders(options, data, inputs, accelerator)
    alone = copy.deepcopy(student) if options.baseline else None
    begun = copy.deepcopy(student) if choice.staged else None

    model, teacher_inputs = load_teacher(options, data)
    parent = checksum(model.state_dict())  # before --teacher-bn batch lets its statistics drift
    heads = mount_heads(options, choice, data, model, teacher_inputs)
    adapter = InputAdapter(
        inputs.mean, inputs.std, teacher_inputs.mean, teacher_inputs.std, teacher_inputs.size
    )
    layout = torch.channels_last if options.channels_last else torch.preserve_format
    adapter = adapter.to(accelerator.device)
    model = model.to(accelerator.device, memory_format=layout)
    prepare = preparer(inputs, accelerator, channels_last=options.channels_last)
    batch = next(iter(held_out.epoch(0)))
    example = prepare(batch.images[:2])

    def stage(
        options: argparse.Namespace, choice: Choice, student: nn.Module, kind: type[Objective]
    ) -> Stage:
        methods = [find_method(name)(**chosen) for name, chosen in choice.methods.items()]
        asked = heads if any(method.heads for method in methods) else None
        mounted = asked.layers if asked else ()
        plan = plan_taps(
            methods, student, model, options.student_layers, options.teacher_layers, mounted
        )
        teacher = Teacher(model, plan.teacher_layers, adapter, bn=options.teacher_bn)
        taps = Taps(student.to(accelerator.device), plan.student_layers)
        objective = kind(taps, methods, choice.weights, choice.gamma, plan.views, options.smoothing)
        objective.setup(
            plan,
            taps.calibrate(example),
            teacher.calibrate(example),
            data.classes,
            head_layers=mounted,
            head_widths=asked.widths if asked else (),
            training_labels=lambda: data.train.labels(),
            epochs=options.epochs,
            seed=options.seed,
            step_images=train.plan.batch_size * train.plan.accumulation,
        )
        if options.sync_bn:  # of the methods; the student's is there already
            objective.methods = convert_sync_batchnorm(objective.methods)
        objective.to(accelerator.device)
        create_optimizer(objective, options)
        return Stage(options, choice, plan, objective, teacher)

    alone_by_terms = rests(choice.main_stage())
    main = stage(options, choice.main_stage(), student, Hints if alone_by_terms else Objective)
    first = None
    if begun is not None:
        own = first_stage_options(options, choice.init)
        first = stage(own, choice.first_stage(), begun, Hints)
    for made in (main, first):
        if made is not None and isinstance(made.objective, Hints):
            labels, indices = (x[:2].to(accelerator.device) for x in (batch.labels, batch.indices))
            made.objective.rest(example, labels, *made.teacher(example), indices=indices)
    if options.classifier_epochs:
        require_tail(main.objective, main.plan.student_layers)
    paths = layers_of_path(options, main.objective, example)
    return Assembly(
        student, alone, inputs, train, held_out, prepare, model, teacher_inputs, heads, parent,
        options.teacher_checkpoint, main, first, paths,
    )  # fmt: skip


def layers_of_path(
    options: argparse.Namespace, objective: Objective, example: torch.Tensor
) -> list[str]:
    """The layers of `--path-length`; by default, of method layer, the one behind each tap.

    By default none where an average of the weights is kept. Raises `UsageError` for one that has no
    weights to measure.
    """
    student, layers = objective.student, options.path_length
    if layers is None and options.model_ema:
        return []
    if layers is None:
        taps = [
            student.layers[i]
            for method in objective.methods
            if method.taps() == "layer"
            for i in objective.views[method.name][0]
        ]
        found = (weighted_before(student.model, tap, example) for tap in taps)
        layers = list(dict.fromkeys(layer for layer in found if layer))
    for layer in layers:
        weight_of(student.model, layer)
    return layers


def prepare_teacher(
    options: argparse.Namespace, accelerator: Accelerator, data: ImageData, made: Assembly
) -> None:
    """Train what of the teacher and its heads was not given, and mount the heads."""
    if not has_teacher(options) or (made.heads and options.heads is None):
        # Only now, when nothing about the request can be refused any more.
        made.heads, made.source = teach(
            options, accelerator, data, made.network, made.fed, made.heads
        )
        made.parent = checksum(made.network.state_dict())
    if made.heads:
        layers = ", ".join(made.heads.layers)
        say(f"{made.heads.kind} heads on {layers}, from {made.heads.where}")
    ready_teacher(options, accelerator, made)


def ready_teacher(options: argparse.Namespace, accelerator: Accelerator, made: Assembly) -> None:
    """Make the teacher, whose weights are there, answer as fast as the options allow."""
    if made.heads:
        modules = [head.to(accelerator.device) for head in made.heads.modules]
        made.main.teacher.mount(modules, made.main.plan.head_positions)
    if options.fold_teacher:
        example = next(iter(made.held_out.epoch(0))).images[:2]
        for stage in made.stages:
            stage.teacher.fold(made.prepare(example))
    if options.torchcompile:
        for stage in made.stages:
            stage.teacher.compile()


def keep_answers(
    options: argparse.Namespace,
    accelerator: Accelerator,
    data: ImageData,
    made: Assembly,
    stage: Stage,
) -> Teacher | CachedTeacher:
    """The teacher of `stage`, with what its methods read kept as `--teacher-cache` has it."""
    methods, own = stage.objective.methods, stage.options
    lesson = Lesson(
        own, accelerator, data, made.inputs, made.fed, made.prepare, made.parent,
        made.heads if stage.teacher.heads else None,
    )  # fmt: skip
    links = [f"{key}-{vars(options)[key]}" for key in ("assistant", "generation") if key in options]
    return cached(
        stage.teacher,
        lesson,
        read={j for _, theirs in stage.objective.views.values() for j in theirs},
        head_features=any(method.heads and method.head_features for method in methods),
        part="/".join([*links, *(["first-stage"] if stage is made.first else [])]),
    )


def score_teacher(
    options: argparse.Namespace, accelerator: Accelerator, made: Assembly
) -> dict[str, Any]:
    """The teacher as a chain names it: `architecture`, `checksum`, `top1`, `run`."""
    taught = evaluate(lambda x: made.main.teacher(x)[0], made.held_out, accelerator, made.prepare)
    return {
        "architecture": options.teacher,
        "checksum": made.parent,
        "top1": taught["top1"],
        "run": made.source,
    }


def distill(
    options: argparse.Namespace,
    choice: Choice,
    accelerator: Accelerator,
    data: ImageData,
    run: RunFolder,
    *,
    seed_name: str = "student",
    chain: list[dict[str, Any]] | None = None,
    recorded: argparse.Namespace | None = None,
    keep: bool = False,
) -> dict[str, Any]:
    """One run into `run`; returns its results.

    As a link of a chain: `chain` are the networks before its teacher, `recorded` the options that
    its record tells instead of its own, and with `keep` a finished run stays as it is.
    """
    resume = options.resume is not None
    made = assemble(options, choice, accelerator, data, seed_name=seed_name)
    prepare_teacher(options, accelerator, data, made)
    say(f"teacher {options.teacher} -> student {options.model} on {data.name}, into {run.path}")
    for stage in made.stages:
        say_plan(stage, first=stage is made.first)
    teachers = [
        keep_answers(options, accelerator, data, made, stage) if stage.choice.methods else None
        for stage in made.stages
    ]
    taught = score_teacher(options, accelerator, made)
    say(f"teacher top1 {taught['top1']:.2f}")
    arguments = arguments_of(recorded or options, accelerator, data, **choice.as_yaml())
    arguments["teacher-checksum"] = made.parent
    if made.heads:
        arguments["heads-checksum"] = made.heads.checksum()
    more: dict[str, Any] = {"teacher_top1": taught["top1"]}
    if chain is not None:
        more["chain"] = [*chain, taught]
        more["teacher_top1"] = more["chain"][0 if recorded else -1]["top1"]
    with run.claimed(accelerator, arguments, resume=resume):
        if keep and on_main(accelerator, run.results.exists):
            return on_main(accelerator, lambda: run.read_results("chain"))
        on_main(accelerator, lambda: check_tail(options, run))
        if chain is not None or made.first is not None:
            on_main(accelerator, lambda: run.begin(arguments))
        say_chain(more.get("chain", ()))
        if made.first is not None:
            aside, more["first_stage"] = train_first_stage(
                made.first.options, made.first.choice, accelerator, data, made.first.objective,
                teachers[0], made.inputs, made.prepare, run,
                parent=made.parent, teacher_top1=taught["top1"],
            )  # fmt: skip
            load_weights(made.student, aside.weights("last"))
            made.first = None
        trainer = Trainer(
            accelerator,
            made.main.objective,
            made.train,
            made.held_out,
            made.prepare,
            run,
            options,
            StudentKeeper(
                run,
                metadata(made.student, options.model_kwargs, data, made.inputs, made.parent),
                options.save_epochs,
                data.parts,
            ),
            arguments,
            teacher=teachers[-1],
            path=PathLength(made.student, made.path_length) if made.path_length else None,
            resume=resume,
        )
        scores = fit(trainer)
        if options.classifier_epochs:
            more["classifier"] = train_tail(
                recorded or options, accelerator, data, made.main.objective, made.inputs,
                made.prepare, run, parent=made.parent,
            )  # fmt: skip
        baseline = None
        if made.alone is not None:
            say("student alone, from the same initial weights")
            aside = RunFolder(run.path / "baseline")
            begun = on_main(accelerator, aside.path.exists)
            baseline = train_classifier(
                recorded or options, accelerator, data, made.alone, made.inputs, aside,
                resume=begun, path_length=made.path_length,
            )  # fmt: skip
        more["baseline_top1"] = baseline and baseline["last"]["top1"]
        results = describe(
            run, options, accelerator, made.train.plan.global_batch, made.student, made.inputs,
            scores, **more,
        )  # fmt: skip
        on_main(accelerator, lambda: run.write_results(results))
        say(comparison(options.teacher, options.model, taught, baseline, results, choice))
    return results


def say_chain(chain: Sequence[dict[str, Any]]) -> None:
    """Say who taught whom: the teacher and the assistants after it, each by its checksum."""
    for number, network in enumerate(chain):
        kind = f"assistant {number}" if number else "chain: teacher"
        say(
            f"{kind} {network['architecture']}, weights {network['checksum']}, "
            f"top1 {network['top1']:.2f}"
        )


def say_plan(stage: Stage, *, first: bool) -> None:
    """Say what is about to be trained: the loss, the layers each method compares, its notes."""
    say(f"loss{' of the first stage' if first else ''} = {describe_loss(stage.choice)}")
    plan = stage.plan
    for name, (ours, theirs) in plan.views.items():
        pairs = (
            f"{plan.teacher_layers[j]} -> {plan.student_layers[i]}"
            for i, j in zip(ours, theirs, strict=True)
        )
        if ours:
            say(f"{name}: {', '.join(pairs)}")
    for method in stage.objective.methods:
        for note in method.notes():
            say(f"{method.name}: {note}")


def describe_loss(choice: Choice) -> str:
    terms = [f"{choice.gamma:.4g} * ce"]
    terms += [f"{choice.weights[name]:.4g} * {name}" for name in choice.methods]
    return " + ".join(terms)
