"""One distilled student: the run that train/distill.py makes, and a link of a longer chain."""

from __future__ import annotations

import argparse
import copy
from typing import Any

from accelerate import Accelerator

from kdfast.data import ImageData
from kdfast.methods import find_method
from kdfast.models import InputAdapter, Taps, checksum
from kdfast.training.classifier import describe, train_classifier
from kdfast.training.evaluate import evaluate
from kdfast.training.journal import say
from kdfast.training.keeper import StudentKeeper
from kdfast.training.loop import Trainer
from kdfast.training.objective import Choice, Objective, TapPlan, plan_taps
from kdfast.training.run_folder import RunFolder, on_main
from kdfast.training.setup import (
    arguments_of,
    build_model,
    choose_inputs,
    make_loaders,
    metadata,
    preparer,
    try_out,
)
from kdfast.training.teacher import Teacher
from kdfast.training.teaching import has_teacher, load_teacher, mount_heads, teach
from kdfast.training.tell import comparison


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
    heads = mount_heads(options, choice, data, model, teacher_inputs)
    mounted = heads.layers if heads else ()
    plan = plan_taps(
        methods, student, model, options.student_layers, options.teacher_layers, mounted
    )
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
    objective.setup(
        plan,
        taps.calibrate(example),
        teacher.calibrate(example),
        data.classes,
        head_layers=mounted,
        head_widths=heads.widths if heads else (),
        training_labels=lambda: data.train.labels(),
        epochs=options.epochs,
        seed=options.seed,
    )
    if not has_teacher(options) or (heads and options.heads is None):
        # Only now, when nothing about the request can be refused any more.
        heads = teach(options, accelerator, data, model, teacher_inputs, heads)
        parent = checksum(model.state_dict())
    if heads:
        teacher.mount([head.to(accelerator.device) for head in heads.modules], plan.head_positions)
        say(f"{heads.kind} heads on {', '.join(heads.layers)}, from {heads.where}")
    if options.torchcompile:
        teacher.compile()
    say_plan(options, choice, plan, data, run)
    taught = evaluate(lambda x: teacher(x)[0], held_out, accelerator, prepare)
    say(f"teacher top1 {taught['top1']:.2f}")

    arguments = arguments_of(options, accelerator, data, **choice.as_yaml())
    arguments["teacher-checksum"] = parent
    if heads:
        arguments["heads-checksum"] = heads.checksum()
    with run.claimed(accelerator, arguments, resume=resume):
        trainer = Trainer(
            accelerator,
            objective,
            train,
            held_out,
            prepare,
            run,
            options,
            StudentKeeper(
                run,
                metadata(student, options.model_kwargs, data, inputs, parent),
                options.save_epochs,
            ),
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


def describe_loss(choice: Choice) -> str:
    terms = [f"{choice.gamma:.4g} * ce"]
    terms += [f"{choice.weights[name]:.4g} * {name}" for name in choice.methods]
    return " + ".join(terms)
