"""What a frozen teacher answers about an image it has seen is kept, not computed again.

Whether, and where: `--teacher-cache`. `kept_answers` has the teachers that keep their answers,
`answer_rows` what is in memory and on disk.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from kdfast.errors import UsageError
from kdfast.training.answer_folder import AnswerFolder
from kdfast.training.image_cache import free_memory
from kdfast.training.journal import say
from kdfast.training.kept_answers import (
    CachedTeacher,
    FixedAnswers,
    Form,
    Lesson,
    ReplayedAnswers,
    row_bytes,
)
from kdfast.training.loop import Trainer
from kdfast.training.run_folder import on_main
from kdfast.training.setup import train_plan, training_augmentation
from kdfast.training.teacher import Teacher

__all__ = ["CachedTeacher", "Lesson", "cached", "check_cache", "fit"]

_GIB = 2**30
AUTO_LIMIT = 4 * _GIB


def check_cache(options: argparse.Namespace) -> None:
    """Refuse a folder for answers that are never the same again."""
    path = options.teacher_cache
    if path in ("auto", "never"):
        return
    if getattr(options, "teacher_bn", "running") == "batch":
        raise UsageError(
            f"--teacher-cache {path}: with --teacher-bn batch an answer depends on the batch and "
            "on those before; drop one of them"
        )
    if options.seeds and options.aug:
        raise UsageError(
            f"--teacher-cache {path}: answers to augmented images are of one seed; add --no-aug, "
            "or give every one of --seeds a run and a folder of its own"
        )


def cached(
    teacher: Teacher,
    lesson: Lesson,
    *,
    read: Collection[int] | None = None,
    head_features: bool = True,
    part: str = "",
) -> Teacher | CachedTeacher:
    """`teacher` with its answers kept, as `--teacher-cache` has it; itself where none are.

    `read` are the positions of the tapped layers that methods read, all by default;
    `head_features` tells whether they read the features of its heads beside their logits. `part` is
    the place in a given folder. Writes nothing; all processes have to call this.

    Raises `UserError` where the folder has answers to something else.
    """
    options, accelerator, data = lesson.options, lesson.accelerator, lesson.data
    wish = getattr(options, "teacher_cache", "auto")
    augmentation = training_augmentation(options, data, lesson.inputs.size)
    changes = augmentation is not None and augmentation.random
    batch_bound = getattr(options, "teacher_bn", "running") == "batch"
    automatic = wish == "auto" and not changes and options.epochs > 1
    if batch_bound or wish == "never" or (wish == "auto" and not automatic):
        return teacher
    layers = tuple(teacher.taps.layers)
    positions = range(len(layers)) if read is None else sorted(set(read))
    form = Form(layers, tuple(positions), len(teacher.heads), head_features)
    blank = torch.zeros(2, 3, *lesson.inputs.size, dtype=torch.uint8)
    with accelerator.autocast():
        fields = form.fields(teacher.example(lesson.prepare(blank)))
    folder = None
    if not automatic:
        record = on_main(accelerator, lambda: lesson.record(fields), patient=True)
        folder = AnswerFolder(Path(wish) / part, record)
        on_main(accelerator, folder.check)
    if changes:
        plan = train_plan(options, data, data.train, accelerator)
        return ReplayedAnswers(teacher, lesson, form, fields, folder=folder, plan=plan)
    needed = len(data.train) * row_bytes(fields)
    kind, budget = on_main(accelerator, lambda: _place(accelerator, needed))
    if kind is None and folder is None:
        say(
            f"the teacher's answers to {len(data.train)} training images take "
            f"{needed / _GIB:.3g} GiB, more than {budget / _GIB:.3g} GiB: it answers anew in every "
            "epoch (--teacher-cache PATH keeps them on disk)"
        )
        return teacher
    place = accelerator.device if kind == "device" else kind and torch.device("cpu")
    return FixedAnswers(teacher, lesson, form, fields, place=place, folder=folder)


def _place(accelerator: Accelerator, needed: int) -> tuple[str | None, int]:
    """Where `needed` bytes a process are kept, `device` or `host` or nowhere, and the bytes left.

    The device of the main process and its machine speak for all.
    """
    device = accelerator.device
    if device.type == "cuda" and needed <= torch.cuda.mem_get_info(device)[0] // 4:
        return "device", needed
    budget = min(AUTO_LIMIT, free_memory() // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return ("host" if needed <= budget else None), budget


def fit(trainer: Trainer) -> dict[str, Any]:
    """`trainer.fit()`, with the answers of a `CachedTeacher` ready before the first step."""
    teacher = trainer.teacher
    if not isinstance(teacher, CachedTeacher):
        return trainer.fit()
    try:
        if trainer.progress.position.epoch < trainer.options.epochs:
            teacher.open()
        return trainer.fit()
    finally:
        teacher.close()
