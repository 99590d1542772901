"""Logit matching."""

import torch
from torch.nn import functional as F

from kdfast.errors import UsageError
from kdfast.methods.base import Method, Option, Outputs, Pairing, method


@method("logits", aliases=("logit",))
class Logits(Method):
    """Mean squared difference of logits (or of pooled features).

    L = mean over (b, c) of (z_s - z_t)^2. `compare=feature` takes the penultimate vectors instead,
    as the published `self` numbers do; both networks then need the same width.

    Source: Ba and Caruana, "Do Deep Nets Really Need to be Deep?", NeurIPS 2014, arXiv 1312.6184.
    """

    compare = Option("logits", "what is compared", choices=("logits", "feature"))

    def taps(self) -> str:
        return "penultimate" if self.compare == "feature" else "none"

    def setup(self, pairing: Pairing) -> None:
        shapes = pairing.student_shapes, pairing.teacher_shapes
        if self.compare == "feature" and shapes[0] != shapes[1]:
            student, teacher = (list(shape[0][1:]) for shape in shapes)
            raise UsageError(
                f"method logits compare=feature needs equal widths, but the student has {student} "
                f"and the teacher {teacher}; use --logits-compare logits"
            )

    def forward(self, student: Outputs, teacher: Outputs, labels: torch.Tensor) -> torch.Tensor:
        if self.compare == "feature":
            return F.mse_loss(student.features[0].float(), teacher.features[0].float())
        return F.mse_loss(student.logits, teacher.logits)
