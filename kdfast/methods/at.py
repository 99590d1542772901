"""Attention transfer."""

import torch

from kdfast import ops
from kdfast.methods.base import Method, Option, Outputs, method


@method("at", aliases=("attention",))
class AttentionTransfer(Method):
    """Attention transfer: match where each stage looks.

    A = channel mean of |F|^p, Q = A / ||A||_2 per image; the term is the sum over stages of
    mean over (b, i) of (Q_s - Q_t)^2. Channel counts may differ; the larger feature map is average
    pooled to the smaller before it is squared.

    Source: Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017,
    arXiv 1612.03928; mean-square form and beta 1000 of its public code.
    """

    default_weight = 1000.0
    power = Option(2.0, "p of |F|^p", positive=True)

    def taps(self) -> str:
        return "stages"

    def forward(self, student: Outputs, teacher: Outputs, labels: torch.Tensor) -> torch.Tensor:
        return ops.attention_loss(student.features, teacher.features, self.power)
