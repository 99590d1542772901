"""Logit matching."""

from typing import ClassVar

import torch
from torch.nn import functional as F

from kdfast.errors import UsageError
from kdfast.methods.base import Method, Option, Outputs, Pairing, method


@method("logits", aliases=("logit",))
class Logits(Method):
    """Mean squared difference of logits (or of pooled features).

    `compare=feature` takes the penultimate vectors instead, as the published `self` numbers do;
    both networks then need the same width.

    Source: Ba and Caruana, "Do Deep Nets Really Need to be Deep?", NeurIPS 2014, arXiv 1312.6184.
    """

    compare = Option("logits", "what is compared", choices=("logits", "feature"))
    formula = "mean_(b,c) (z_s - z_t)^2"
    equivalences: ClassVar = {
        "logits-half-sum": "The paper's `mean_b sum_c (z_s - z_t)^2 / 2` is C / 2 times the term: "
        "a weight `w` there is `--beta w*C/2`.",
        "logits-sum": '`F.mse_loss(z_s, z_t, reduction="sum")` is B C times the term.',
        "logits-gradient": "The gradient with respect to `z_s` is `2 (z_s - z_t) / (B C)`.",
    }

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
