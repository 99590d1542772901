"""Teachers whose answers are kept: how rows are made, and how they are found again.

Where training images are the same in every epoch, the answers to all of them are computed in one
pass before the first step: in index order, in batches that are always the same, so that a resumed
run has the same bits. Where augmentation changes them, answers are of (seed, epoch,
index): a folder keeps them as they are computed, and runs that follow replay them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, distributed
from tqdm import tqdm

from kdfast.data import BatchPlan, ImageData, Loader, Portion
from kdfast.models import MountedHeads
from kdfast.training.answer_folder import AnswerFolder
from kdfast.training.answer_rows import DiskRows, Field, MemoryRows
from kdfast.training.feature_build import data_fingerprint
from kdfast.training.journal import say
from kdfast.training.options import batch_size
from kdfast.training.run_folder import on_main
from kdfast.training.setup import (
    Inputs,
    loader_settings,
    training_augmentation,
    training_transform,
)
from kdfast.training.teacher import Answer, Teacher

_GIB = 2**30
# How much is handed to another process, or read from a file, at once.
_PIECE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Form:
    """The tensors of an answer that methods read, which are those kept.

    Of `layers`, all that are tapped, those at the positions `read`; of so many `heads` the logits,
    and the features on request.
    """

    layers: tuple[str, ...]
    read: tuple[int, ...]
    heads: int = 0
    head_features: bool = True

    def named(self, answer: Answer) -> list[tuple[str, Tensor]]:
        """What is kept of `answer`, each under its name."""
        logits, features, heads = answer
        kept = [("logits", logits)]
        kept += [(self.layers[i], features[i]) for i in self.read]
        for number, (feature, head_logits) in enumerate(heads[: self.heads], start=1):
            kept += [(f"feature of head {number}", feature)] * self.head_features
            kept.append((f"logits of head {number}", head_logits))
        return kept

    def tensors(self, answer: Answer) -> list[Tensor]:
        return [tensor for _, tensor in self.named(answer)]

    def fields(self, answer: Answer) -> list[Field]:
        return [Field.of(name, tensor) for name, tensor in self.named(answer)]

    def answer(self, tensors: list[Tensor]) -> Answer:
        """The answer of which `tensors` are kept; what nobody reads is empty, [B, 0]."""
        logits, *rest = tensors
        unread = logits.new_empty(len(logits), 0)
        features = [unread] * len(self.layers)
        for position, tensor in zip(self.read, rest, strict=False):
            features[position] = tensor
        rest = rest[len(self.read) :]
        if self.head_features:
            heads = tuple(zip(rest[::2], rest[1::2], strict=True))
        else:
            heads = tuple((unread, head_logits) for head_logits in rest)
        return logits, tuple(features), heads


@dataclass(frozen=True)
class Lesson:
    """Who is taught what: all that answers to the training images of a run depend on.

    `inputs` are what the loaders give, `fed` what the teacher's network is fed, `parent` the
    checksum of its weights; `prepare` brings a loader's images to the device.
    """

    options: argparse.Namespace
    accelerator: Accelerator
    data: ImageData
    inputs: Inputs
    fed: Inputs
    prepare: Callable[[Tensor], Tensor]
    parent: str
    heads: MountedHeads | None = None

    def record(self, fields: list[Field]) -> dict[str, Any]:
        """For `meta.json`: all that must be the same for answers to be the same."""
        options, data = self.options, self.data
        augmentation = training_augmentation(options, data, self.inputs.size)
        found = {
            "teacher": options.teacher,
            "teacher-checksum": self.parent,
            "heads-checksum": self.heads and self.heads.checksum(),
            "layers": [field.name for field in fields],
            "answers": [str(field) for field in fields],
            "mixed-precision": options.mixed_precision,
            "channels-last": options.channels_last,
            "torchcompile": options.torchcompile,
            "fold-teacher": getattr(options, "fold_teacher", None),
            "teacher-bn": "running",
            "device": self.accelerator.device.type,
            "dataset": data.name,
            "images": len(data.train),
            "data": data_fingerprint(data.train, in_memory=data.in_memory),
            "box-margin": options.box_margin,
            "interpolation": options.interpolation,
            "augmentation": augmentation is not None,
        }
        found |= asdict(self.inputs)
        found |= {f"teacher-{key}": value for key, value in asdict(self.fed).items()}
        if augmentation is None:
            found |= {"crop-pct": options.crop_pct, "crop-mode": options.crop_mode or "center"}
        else:
            drawn = asdict(augmentation).items()
            found |= {f"augmentation-{key.replace('_', '-')}": value for key, value in drawn}
        if augmentation is not None and augmentation.random:
            processes = self.accelerator.num_processes
            found |= {
                "seed": options.seed,
                "batch-size": batch_size(options, processes),
                "processes": processes,
                "grad-accum-steps": options.grad_accum_steps,
                "drop-last": options.drop_last,
            }
        return found


class CachedTeacher:
    """Answers as its `teacher` does, from rows that are kept.

    It is called as a `Teacher` is. Without `indices` the network answers: evaluation has other
    images. `open` comes before the first step and is called by all processes, `close` after the
    last.
    """

    def __init__(self, teacher: Teacher, lesson: Lesson, form: Form, fields: list[Field]):
        self.teacher, self.lesson, self.form, self.fields = teacher, lesson, form, fields

    def __call__(
        self, images: Tensor, indices: Tensor | None = None, epoch: int | None = None
    ) -> Answer:
        if indices is None or epoch is None:
            return self.teacher(images)
        return self.recall(images, indices, epoch)

    def recall(self, images: Tensor, indices: Tensor, epoch: int) -> Answer:
        """The answer to training images `indices` [B], int64 on the device, in 0-based `epoch`."""
        raise NotImplementedError

    def open(self) -> None:
        """Make the rows ready; raises `UserError` where they cannot be kept."""

    def close(self) -> None:
        """Let go of the rows; those on disk are whole."""


class FixedAnswers(CachedTeacher):
    """Rows by index, where training images are the same in every epoch.

    In memory at `place`; with a `folder` also on disk, whose rows other runs make or read. Without
    a `place` they are read from there.
    """

    def __init__(self, *args: Any, place: torch.device | None, folder: AnswerFolder | None = None):
        super().__init__(*args)
        self.place, self.folder = place, folder
        self.memory: MemoryRows | None = None
        self.disk: DiskRows | None = None

    def recall(self, images: Tensor, indices: Tensor, epoch: int) -> Answer:
        if self.memory is not None:
            return self.form.answer(self.memory.read(indices))
        return self.form.answer(self.disk.read(indices.cpu().numpy()))

    def open(self) -> None:
        count = len(self.lesson.data.train)
        if self.folder is not None:
            self.disk = self._complete_folder(count)
        if self.place is not None:
            device = self.lesson.accelerator.device
            self.memory = MemoryRows(self.fields, count, self.place, device)
            if self.disk is None:
                self._fill_memory()
            else:
                self._read_folder(count)
        where = f"in memory ({self.place.type})" if self.place else "read from disk"
        if self.folder is not None:
            where += f", {self.folder.path}"
        gib = count * row_bytes(self.fields) / _GIB
        say(f"the teacher's answers to {count} training images are kept: {gib:.3f} GiB, {where}")

    def close(self) -> None:
        if self.disk is not None:
            self.disk.close()
        self.memory = self.disk = None

    @property
    def _batch(self) -> int:
        return batch_size(self.lesson.options, self.lesson.accelerator.num_processes)

    def _numbers(self) -> list[int]:
        return list(range(-(-len(self.lesson.data.train) // self._batch)))

    def _share(self, numbers: list[int], rank: int) -> list[int]:
        """Those of the batches `numbers` that process `rank` computes, which are in a row."""
        processes = self.lesson.accelerator.num_processes
        return numbers[len(numbers) * rank // processes : len(numbers) * (rank + 1) // processes]

    def _computed(self, numbers: list[int]) -> Iterator[tuple[int, list[Tensor]]]:
        """The index of its first image and what is kept of its answer, for every batch."""
        lesson = self.lesson
        options, accelerator, data = lesson.options, lesson.accelerator, lesson.data
        loader = Loader(
            data.train,
            training_transform(options, data, lesson.inputs.size),
            _Pass(len(data.train), self._batch, numbers),
            **loader_settings(options, data, accelerator),
        )
        shown = accelerator.is_main_process and sys.stderr.isatty()
        bar = tqdm(total=len(numbers), desc="teacher", disable=not shown, leave=False)
        try:
            with bar:
                for batch in loader.epoch(0):
                    images = lesson.prepare(batch.images)
                    with accelerator.autocast():
                        answer = self.teacher(images)
                    yield batch.portion.indices[0], self.form.tensors(answer)
                    bar.update()
        finally:
            loader.close()

    def _fill_memory(self) -> None:
        accelerator, numbers = self.lesson.accelerator, self._numbers()
        for first, tensors in self._computed(self._share(numbers, accelerator.process_index)):
            self.memory.write(first, tensors)
        for rank in range(accelerator.num_processes if accelerator.num_processes > 1 else 0):
            if share := self._share(numbers, rank):
                self._hand_out(rank, share[0] * self._batch, (share[-1] + 1) * self._batch)
        if self.place.type == "cuda":
            torch.cuda.synchronize(self.place)  # other streams will read them

    def _hand_out(self, rank: int, first: int, end: int) -> None:
        """Give the rows that process `rank` has computed to all."""
        for field, rows in zip(self.fields, self.memory.tensors, strict=True):
            for piece in rows[first:end].split(max(1, _PIECE_BYTES // field.nbytes)):
                raw = piece.view(len(piece), -1).view(torch.uint8)
                moved = raw.to(self.lesson.accelerator.device)
                distributed.broadcast(moved, rank)
                if moved is not raw:
                    raw.copy_(moved)

    def _complete_folder(self, count: int) -> DiskRows:
        """The rows in the folder, all of which are there."""
        accelerator = self.lesson.accelerator
        rows = DiskRows(self.folder.path, self.fields, count, count, accelerator.device)

        def missing() -> list[int]:
            self.folder.claim(wait=True)
            rows.create()
            rows.open(write=False)
            whole = rows.done.astype(bool)
            rows.close()
            batch = self._batch
            return [i for i in self._numbers() if not whole[i * batch : (i + 1) * batch].all()]

        try:
            numbers = on_main(accelerator, missing, patient=True)
            if numbers:
                rows.open(write=True)
                try:
                    share = self._share(numbers, accelerator.process_index)
                    for first, tensors in self._computed(share):
                        rows.write(first, tensors)
                finally:
                    rows.close()
                accelerator.wait_for_everyone()
        finally:
            self.folder.release()
        rows.open(write=False)
        return rows

    def _read_folder(self, count: int) -> None:
        step = max(1, _PIECE_BYTES // row_bytes(self.fields))
        for first in range(0, count, step):
            indices = np.arange(first, min(first + step, count))
            self.memory.write(first, self.disk.read(indices))
        self.disk.close()
        self.disk = None
        if self.place.type == "cuda":
            torch.cuda.synchronize(self.place)


class ReplayedAnswers(CachedTeacher):
    """Rows by (epoch, index) in `folder`, where augmentation is keyed by them.

    Written as they are computed; who comes later with the same keys and the same batches reads
    them. Each process has the rows of its own images, in the order in which `plan` has these.
    """

    def __init__(self, *args: Any, folder: AnswerFolder, plan: BatchPlan):
        super().__init__(*args)
        self.folder, self.plan = folder, plan
        self.rows: DiskRows | None = None
        self.epoch: int | None = None

    def recall(self, images: Tensor, indices: Tensor, epoch: int) -> Answer:
        if epoch != self.epoch:
            self._turn_to(epoch)
        rows = self.position[indices.cpu().numpy()]
        if rows[0] < 0 or (rows != np.arange(rows[0], rows[0] + len(rows))).any():
            raise ValueError("these images are no batch of the plan whose answers are kept")
        if self.rows.done[rows].all():
            return self.form.answer(self.rows.read(rows))
        answer = self.teacher(images)
        self.rows.write(int(rows[0]), self.form.tensors(answer))
        return answer

    def open(self) -> None:
        accelerator, device = self.lesson.accelerator, self.lesson.accelerator.device
        on_main(accelerator, lambda: self.folder.claim(wait=False))
        self.period = sum(len(portion.indices) for portion in self.plan.portions(0))
        self.rows = DiskRows(
            self.folder.path / f"process-{accelerator.process_index}",
            self.fields,
            self.lesson.options.epochs * self.period,
            self.period,
            device,
        )
        self.rows.create()
        self.rows.open(write=True)
        there = int(self.rows.done[: self.rows.count].sum())
        of = "" if accelerator.num_processes == 1 else " of this process"
        say(
            f"the teacher's answers are kept in {self.folder.path}: {there} of "
            f"{self.rows.count}{of} are there"
        )

    def close(self) -> None:
        try:
            if self.rows is not None:
                self.rows.close()
        finally:
            self.rows = self.epoch = None
            self.folder.release()

    def _turn_to(self, epoch: int) -> None:
        """Have `position` tell the row of every image of this process in `epoch`."""
        self.rows.commit()
        order = [index for portion in self.plan.portions(epoch) for index in portion.indices]
        self.position = np.full(self.plan.size, -1, np.int64)
        self.position[order] = epoch * self.period + np.arange(len(order))
        self.epoch = epoch


class _Pass(BatchPlan):
    """The batches `numbers` of all images in order."""

    def __init__(self, size: int, batch: int, numbers: Collection[int]):
        super().__init__(size, batch)
        self.numbers = numbers

    def portions(self, epoch: int, first_step: int = 0) -> list[Portion]:
        found = []
        for number in self.numbers:
            first = number * self.batch_size
            indices = list(range(first, min(first + self.batch_size, self.size)))
            found.append(Portion(indices, len(indices), 1.0, True, True))
        return found


def row_bytes(fields: list[Field]) -> int:
    """Of the answer to one image."""
    return sum(field.nbytes for field in fields)
