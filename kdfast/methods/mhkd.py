"""Multi-head knowledge distillation."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from kdfast import ops
from kdfast.errors import UsageError
from kdfast.methods.base import Method, Option, Outputs, Pairing, method
from kdfast.models import ConvHead, pair_stages, parameter_count


@method("mhkd")
class MultiHead(Method):
    """Multi-head distillation: soft targets between auxiliary classifiers of both networks.

    Convolutional heads are mounted on the first stages of teacher and student and trained with the
    student; the teacher's trunk stays as it is. The term holds cross-entropy with its own weight,
    so gamma is 0. In `KD(z_t, z_s)`, KL is at temperature T: sum over classes, mean over the batch.

    Source: Wang, Lohit, Jones, Fu, "Multi-head Knowledge Distillation for Model Compression", 2020,
    arXiv 2012.02911. Its public code lets the student's heads pull the teacher's as well, which is
    `--no-mhkd-detach`.
    """

    gamma = 0.0
    under_autocast = True
    alpha = Option(0.1, "weight of the soft targets", flag="--alpha", least=0.0)
    temperature = Option(4.0, "T of the soft targets", flag="--temperature", positive=True)
    share = Option(0.5, "beta, the weight of a student head", flag="--mhkd-beta", least=0.0)
    stages = Option(2, "how many pairs of stages have heads, the first ones", least=1)
    width = Option(256, "channels of a head", least=1)
    detach = Option(True, "keep the students' heads from pulling the teacher's")
    formula = (
        "KD(z_t, z_s) + sum_i [CE(z_ti) + beta KD(z_ti, z_si)], "
        "KD(t, s) = (1 - alpha) CE(s) + alpha T^2 KL(t || s)"
    )

    def __init__(self, **options: object):
        super().__init__(**options)
        if self.alpha > 1:
            raise UsageError(f"mhkd alpha must be at most 1, got {self.alpha:g}")

    def taps(self) -> str:
        return "stages"

    def pair(self, teacher: list[str], student: list[str]) -> list[tuple[str, str]]:
        return pair_stages(teacher, student, shallow=True)[: self.stages]

    def setup(self, pairing: Pairing) -> None:
        self.smoothing = pairing.label_smoothing
        self.student_heads, self.teacher_heads = (
            nn.ModuleList(ConvHead(shape[1:], pairing.classes, self.width) for shape in shapes)
            for shapes in (pairing.student_shapes, pairing.teacher_shapes)
        )

    def notes(self) -> list[str]:
        counts = (
            " + ".join(f"{parameter_count(head):,}" for head in heads)
            for heads in (self.teacher_heads, self.student_heads)
        )
        return ["parameters of teacher heads {}, of student heads {}".format(*counts)]

    def forward(self, student: Outputs, teacher: Outputs, labels: torch.Tensor) -> torch.Tensor:
        loss = self._taught(student.logits, teacher.logits, labels)
        mounted = zip(
            self.student_heads, student.features, self.teacher_heads, teacher.features, strict=True
        )
        for student_head, ours, teacher_head, theirs in mounted:
            z_s, z_t = (
                head(feature)[1].to(student.logits.dtype)
                for head, feature in ((student_head, ours), (teacher_head, theirs))
            )
            loss = loss + F.cross_entropy(z_t, labels, label_smoothing=self.smoothing)
            target = z_t.detach() if self.detach else z_t
            loss = loss + self.share * self._taught(z_s, target, labels)
        return loss

    def _taught(self, z_s: torch.Tensor, z_t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(1 - alpha) CE(z_s) + alpha T^2 KL(z_t || z_s), in one pass."""
        return ops.distillation_loss(
            z_s, z_t, labels, self.alpha, self.temperature, label_smoothing=self.smoothing
        )
