#!/usr/bin/env python
"""Distil a teacher into a student: any timm pair, any combination of methods.

    python train/distill.py                             digits: teacher, student, student alone
    accelerate launch train/distill.py --dataset cifar100 --data-dir DIR --recipe crd \\
        --teacher cifar_resnet110 --teacher-checkpoint RUN --student cifar_resnet20 --method kd at
    torchrun --nproc_per_node 8 train/distill.py --dataset folder --data-dir DIR \\
        --teacher vit_base_patch16_224 --teacher-checkpoint RUN --student resnet18 --method kd --amp

The story: load or, on digits, train the teacher; freeze it; pair layers; train the student on
gamma * cross-entropy + the sum of weight * term; on digits, train the same student alone; compare.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from timm.models import get_pretrained_cfg
from torch import nn

from kdfast.data import ImageData
from kdfast.errors import UsageError
from kdfast.methods import find_method
from kdfast.models import (
    InputAdapter,
    Taps,
    checksum,
    create_model,
    load_weights,
    read_weights,
    resolve_name,
)
from kdfast.training.classifier import describe, fingerprint, score, train_classifier
from kdfast.training.evaluate import evaluate
from kdfast.training.flags import (
    data_flags,
    distill_flags,
    model_flags,
    run_flags,
    training_flags,
)
from kdfast.training.journal import say
from kdfast.training.loop import Trainer
from kdfast.training.objective import Choice, Objective, TapPlan, choose_methods, plan_taps
from kdfast.training.options import batch_size, parse
from kdfast.training.parser import Parser, load_plugin
from kdfast.training.run_folder import RunFolder, choose_run, on_main
from kdfast.training.script import script
from kdfast.training.seeds import for_each_seed
from kdfast.training.setup import (
    Inputs,
    arguments_of,
    build_model,
    choose_inputs,
    load_checkpoint,
    load_data,
    make_loaders,
    metadata,
    preparer,
    print_config,
    recorded_inputs,
    start,
    try_out,
    weights_path,
)
from kdfast.training.teacher import Teacher
from kdfast.training.tell import comparison


@script
def main(argv: Sequence[str]) -> None:
    load_plugin(argv)
    parser = Parser(prog="train/distill.py", description=__doc__)
    data_flags(parser)
    distill_flags(parser)
    model_flags(parser, student=True)
    training_flags(parser)
    run_flags(parser)
    options = parse(parser, argv)
    choice = choose_methods(options)
    if options.print_config:
        print_config(options, **choice.as_yaml())
        return
    if options.baseline is None:
        options.baseline = options.dataset == "digits"
    if not (options.teacher_checkpoint or options.teacher_pretrained or options.eval_only):
        require_digits(options)

    accelerator = start(options)
    data = load_data(options, accelerator)
    if options.eval_only:
        name = run_folder(options, choice, data).path.name
        say(json.dumps(score(options, accelerator, data, name)))
        return
    for_each_seed(
        options,
        accelerator,
        folder=lambda own: run_folder(own, choice, data),
        train=lambda own, run: distill(own, choice, accelerator, data, run),
    )


def distill(
    options: argparse.Namespace,
    choice: Choice,
    accelerator: Accelerator,
    data: ImageData,
    run: RunFolder,
) -> dict[str, Any]:
    """One run into `run`; returns its results."""
    student = build_model(options, data.classes, seed_name="student")
    inputs = choose_inputs(options, data, student)
    resume = options.resume is not None
    try_out(student, inputs, data.classes)
    train, held_out = make_loaders(options, data, inputs, accelerator)
    alone = copy.deepcopy(student) if options.baseline else None

    model, teacher_inputs = load_teacher(options, data)
    parent = checksum(model.state_dict())  # before --teacher-bn batch lets its statistics drift
    methods = [find_method(name)(**chosen) for name, chosen in choice.methods.items()]
    plan = plan_taps(methods, student, model, options.student_layers, options.teacher_layers)
    adapter = InputAdapter(
        inputs.mean, inputs.std, teacher_inputs.mean, teacher_inputs.std, teacher_inputs.size
    )
    adapter, model = adapter.to(accelerator.device), model.to(accelerator.device)
    teacher = Teacher(model, plan.teacher_layers, adapter, bn=options.teacher_bn)
    taps = Taps(student.to(accelerator.device), plan.student_layers)
    objective = Objective(
        taps, methods, choice.weights, choice.gamma, plan.views, options.smoothing
    )
    prepare = preparer(inputs, accelerator, channels_last=options.channels_last)
    example = prepare(next(iter(held_out.epoch(0))).images[:2])
    objective.setup(plan, taps.calibrate(example), teacher.calibrate(example), data.classes)
    if options.teacher_checkpoint is None and not options.teacher_pretrained:
        # Only now, when nothing about the request can be refused any more.
        load_weights(model, train_teacher(options, accelerator, data))
        parent = checksum(model.state_dict())
    if options.torchcompile:
        teacher.compile()
    say_plan(options, choice, plan, data, run)
    taught = evaluate(lambda x: teacher(x)[0], held_out, accelerator, prepare)
    say(f"teacher top1 {taught['top1']:.2f}")

    arguments = arguments_of(options, accelerator, data, **choice.as_yaml())
    arguments["teacher-checksum"] = parent
    with run.claimed(accelerator, arguments, resume=resume):
        trainer = Trainer(
            accelerator,
            objective,
            train,
            held_out,
            prepare,
            run,
            options,
            metadata(student, options.model_kwargs, data, inputs, parent),
            arguments,
            teacher=teacher if methods else None,
            resume=resume,
        )
        scores = trainer.fit()
        baseline = None
        if alone is not None:
            say("student alone, from the same initial weights")
            aside = RunFolder(run.path / "baseline")
            begun = on_main(accelerator, aside.path.exists)
            baseline = train_classifier(
                options, accelerator, data, alone, inputs, aside, resume=begun
            )
        results = describe(
            run, options, accelerator, train.plan.global_batch, student, inputs, scores,
            teacher_top1=taught["top1"],
            baseline_top1=baseline and baseline["last"]["top1"],
        )  # fmt: skip
        on_main(accelerator, lambda: run.write_results(results))
        say(comparison(options.teacher, options.model, taught, baseline, results, choice))
    return results


def say_plan(
    options: argparse.Namespace, choice: Choice, plan: TapPlan, data: ImageData, run: RunFolder
) -> None:
    """Say what is about to be trained: networks, loss and the layers each method compares."""
    say(f"teacher {options.teacher} -> student {options.model} on {data.name}, into {run.path}")
    say(f"loss = {describe_loss(choice)}")
    for name, (ours, theirs) in plan.views.items():
        pairs = (
            f"{plan.teacher_layers[j]} -> {plan.student_layers[i]}"
            for i, j in zip(ours, theirs, strict=True)
        )
        if ours:
            say(f"{name}: {', '.join(pairs)}")


def require_digits(options: argparse.Namespace) -> None:
    if options.dataset != "digits":
        raise UsageError(
            f"no teacher for {options.dataset}: train one with train/classifier.py --dataset "
            f"{options.dataset} --model {options.teacher} and give its run folder as "
            "--teacher-checkpoint, or use --teacher-pretrained"
        )


def run_folder(options: argparse.Namespace, choice: Choice, data: ImageData) -> RunFolder:
    parts = [data.name, "+".join(choice.methods) or "none", options.teacher, options.model]
    name = "-".join(["distill", *parts, f"s{options.seed}"]).replace("/", "_").replace(":", ".")
    return choose_run(options, name)


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


def describe_loss(choice: Choice) -> str:
    terms = [f"{choice.gamma:.4g} * ce"]
    terms += [f"{choice.weights[name]:.4g} * {name}" for name in choice.methods]
    return " + ".join(terms)


if __name__ == "__main__":
    sys.exit(main())
