"""Contrastive representation distillation (CRD)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, distributed, nn

from kdfast import ops


class ContrastMemory(nn.Module):
    """The two banks of CRD, a row a training sample, and the loss against them.

    Each step `loss = memory(student, teacher, index, negatives)`, then `memory.update()`, before
    or after the backward: the loss is that of the banks as they were. Z is set by the first batch
    and then kept. Banks and Z are buffers: they travel in checkpoints, and a loaded Z stays.

    Under torch.distributed all processes keep equal banks: `update` gathers what they have seen,
    and Z comes from all their first batches. Every process must then call both at every step.

    Args:
        size: n, samples in the training set.
        dim: d of the embeddings.
        negatives: K, negatives of each sample.
        temperature: of the scores.
        momentum: of the bank rows.

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
        bound = math.sqrt(3 / dim)  # rows of expected length 1
        self.register_buffer("student_bank", torch.empty(size, dim).uniform_(-bound, bound))
        self.register_buffer("teacher_bank", torch.empty(size, dim).uniform_(-bound, bound))
        self.register_buffer("z_student", torch.tensor(-1.0))  # not set yet
        self.register_buffer("z_teacher", torch.tensor(-1.0))
        self._set = False  # whether both Z surely are set; asking the device would wait for it
        self._seen: tuple[Tensor, Tensor, Tensor] | None = None

    def forward(self, student: Tensor, teacher: Tensor, index: Tensor, negatives: Tensor) -> Tensor:
        """The loss of both sides.

        Args:
            student, teacher: [B, d] embeddings of length 1.
            index: [B] int64, data set indices: the rows that `update` will change.
            negatives: [B, K + 1] int64 of `ops.draw_negatives`, column 0 the positive.
        """
        if negatives.dim() != 2 or negatives.shape[1] != self.negatives + 1:
            raise ValueError(
                f"ContrastMemory: negatives must be [B, {self.negatives + 1}], the positive and "
                f"{self.negatives} negatives a row, got shape {list(negatives.shape)}"
            )
        if not self._set:
            self._set_constants(student, teacher, negatives)
        loss = ops.contrastive_loss(
            student,
            teacher,
            self.student_bank,
            self.teacher_bank,
            negatives,
            self.z_student,
            self.z_teacher,
            self.temperature,
        )
        self._seen = (student.detach(), teacher.detach(), index)
        return loss

    def update(self) -> None:
        """Blend the embeddings of the last forward into the banks; once a forward."""
        if self._seen is None:
            raise RuntimeError("ContrastMemory: update() takes a forward before it, one each")
        student, teacher, index = self._seen
        self._seen = None
        if _processes() > 1:
            student, teacher, index = _gathered(student.to(self.student_bank), teacher, index)
        ops.contrastive_update_(
            self.student_bank, self.teacher_bank, student, teacher, index, self.momentum
        )

    def _set_constants(self, student: Tensor, teacher: Tensor, negatives: Tensor) -> None:
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
        for z, value in zip((self.z_student, self.z_teacher), constants, strict=True):
            z.copy_(torch.where(z > 0, z, value))
        self._set = True

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._set = False  # what is loaded may be unset
        super()._load_from_state_dict(*args, **kwargs)


def _processes() -> int:
    ready = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if ready else 1


def _gathered(student: Tensor, teacher: Tensor, index: Tensor) -> list[Tensor]:
    """The tensors of all processes one after the other; batches may differ in size."""
    count = index.new_tensor([len(index)])
    counts = [torch.empty_like(count) for _ in range(_processes())]
    distributed.all_gather(counts, count)
    sizes = torch.cat(counts).tolist()
    gathered = []
    for tensor in (student, teacher.to(student), index):
        padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in sizes]
        distributed.all_gather(parts, padded)
        gathered.append(torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]))
    return gathered
