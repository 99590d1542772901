"""The memory of contrastive representation distillation (CRD)."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, distributed, nn

from kdfast import ops


class ContrastMemory(nn.Module):
    """The two banks of CRD, a row a training sample, and the loss against them.

    Each step `loss = memory(student, teacher, index, negatives)`, then `memory.update()`, before
    or after the backward: the loss is that of the banks as they were. Several forwards before an
    update are the micro-batches of one step. Z is set by the first batch and then kept. Banks and Z
    are buffers: they travel in checkpoints, and a loaded Z stays.

    Under torch.distributed all processes keep equal banks, if they begin with equal ones: `update`
    gathers what they have seen, and Z comes from all their first batches. Every process must then
    call both at every step.

    Args:
        size: n, samples in the training set.
        dim: d of the embeddings.
        negatives: K, negatives of each sample.
        temperature: of the scores.
        momentum: of the bank rows.
        step_images: images a process has between two updates at most, the same on all. Processes
            that know it need not tell each other how many they have.

    Tian, Krishnan and Isola, "Contrastive Representation Distillation", ICLR 2020, section 3.3.
    """

    student_bank: Tensor
    teacher_bank: Tensor
    z_student: Tensor
    z_teacher: Tensor

    def __init__(
        self,
        size: int,
        dim: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        step_images: int | None = None,
    ):
        super().__init__()
        for name, value in (("size", size), ("dim", dim), ("negatives", negatives)):
            if value < 1:
                raise ValueError(f"ContrastMemory: {name} must be at least 1, got {value}")
        if not 0 < temperature < math.inf:
            raise ValueError(f"ContrastMemory: temperature must be positive, got {temperature}")
        if not 0 <= momentum <= 1:
            raise ValueError(f"ContrastMemory: momentum must be in [0, 1], got {momentum}")
        self.negatives, self.temperature, self.momentum = negatives, temperature, momentum
        self.step_images = step_images
        bound = math.sqrt(3 / dim)  # rows of expected length 1
        self.register_buffer("student_bank", torch.empty(size, dim).uniform_(-bound, bound))
        self.register_buffer("teacher_bank", torch.empty(size, dim).uniform_(-bound, bound))
        self.register_buffer("z_student", torch.tensor(-1.0))  # not set yet
        self.register_buffer("z_teacher", torch.tensor(-1.0))
        self._set = False  # whether both Z surely are set; asking the device would wait for it
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, student: Tensor, teacher: Tensor, index: Tensor, negatives: Tensor) -> Tensor:
        """The loss of both sides; the embeddings are kept for `update`.

        Args:
            student, teacher: [B, d] embeddings of length 1.
            index: [B] int64, data set indices: the rows that `update` will change.
            negatives: [B, K + 1] int64 of `ops.draw_negatives`, column 0 the positive.
        """
        self.observe(student, teacher, index, negatives)
        return self.loss(student, teacher, negatives)

    def observe(
        self,
        student: Tensor,
        teacher: Tensor,
        index: Tensor,
        negatives: Tensor,
        z: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """The part of `forward` that keeps things: Z where it is not set, and the embeddings.

        `z` are z_student and z_teacher where a compiler gives them names of its own.
        """
        if negatives.dim() != 2 or negatives.shape[1] != self.negatives + 1:
            raise ValueError(
                f"ContrastMemory: negatives must be [B, {self.negatives + 1}], the positive and "
                f"{self.negatives} negatives a row, got shape {list(negatives.shape)}"
            )
        if not self._set:
            self._set_constants(student, teacher, negatives, z or (self.z_student, self.z_teacher))
        embeddings = (x.detach().to(self.student_bank) for x in (student, teacher))
        self._seen.append((*embeddings, index))

    def loss(self, student: Tensor, teacher: Tensor, negatives: Tensor) -> Tensor:
        """The part of `forward` that computes: changes nothing, and Z must be set."""
        return ops.contrastive_loss(
            student,
            teacher,
            self.student_bank,
            self.teacher_bank,
            negatives,
            self.z_student,
            self.z_teacher,
            self.temperature,
        )

    def update(self) -> None:
        """Blend the embeddings seen since the last update into the banks; once a step.

        Of a sample that was seen several times the last counts, of several processes the lowest: a
        process without images of its own (`kdfast.data.Portion`) repeats one of process 0.
        """
        if not self._seen:
            raise RuntimeError("ContrastMemory: update() takes a forward before it, one each")
        seen = [torch.cat(parts) for parts in zip(*self._seen, strict=True)]
        self._seen.clear()
        if _processes() > 1:
            seen = _gathered(*seen, self.step_images)
        student, teacher, index = seen
        ops.contrastive_update_(
            self.student_bank, self.teacher_bank, student, teacher, index, self.momentum
        )

    def _set_constants(
        self, student: Tensor, teacher: Tensor, negatives: Tensor, z: tuple[Tensor, Tensor]
    ) -> None:
        constants = torch.stack(
            ops.contrastive_constants(
                student,
                teacher,
                self.student_bank,
                self.teacher_bank,
                negatives,
                self.temperature,
            )
        )
        if _processes() > 1:  # the mean over all samples
            sums = torch.cat([constants, torch.ones_like(constants[:1])]) * len(negatives)
            distributed.all_reduce(sums)
            constants = sums[:2] / sums[2]
        for buffer, value in zip(z, constants, strict=True):
            buffer.copy_(torch.where(buffer > 0, buffer, value))
        self._set = True

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._set = False  # what is loaded may be unset
        super()._load_from_state_dict(*args, **kwargs)


def _processes() -> int:
    ready = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if ready else 1


@functools.cache
def _hosts(world: distributed.ProcessGroup) -> distributed.ProcessGroup:
    """A group whose messages pass between hosts, so that none waits for its device."""
    if distributed.get_backend(world) == "gloo":
        return world
    return distributed.new_group(backend="gloo")


def _gathered(
    student: Tensor, teacher: Tensor, index: Tensor, largest: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of all processes, those of process 0 last; batches may differ in size.

    `largest` is that of the processes' batches where they all know it. A smaller one is filled up
    with its first row, put in front, so that its later rows still count.
    """
    if largest is None:
        count = torch.tensor(len(index))
        group = _hosts(distributed.group.WORLD)
        distributed.all_reduce(count, distributed.ReduceOp.MAX, group=group)
        largest = int(count)
    if len(index) > largest:
        raise RuntimeError(
            f"ContrastMemory: {len(index)} images since the last update, but step_images is "
            f"{largest}"
        )
    dim, dtype = student.shape[1], student.dtype
    # One message: the bits of an index travel as numbers.
    rows = torch.cat([student, teacher, index.unsqueeze(1).view(dtype)], 1)
    rows = torch.cat([rows[:1].expand(largest - len(rows), -1), rows])
    parts = rows.new_empty((_processes(), *rows.shape))
    distributed.all_gather_into_tensor(parts.flatten(0, 1), rows)
    rows = parts.flip(0).flatten(0, 1)
    index = rows[:, 2 * dim :].contiguous().view(torch.int64).squeeze(1)
    return rows[:, :dim], rows[:, dim : 2 * dim], index
