"""Attention transfer."""

from typing import ClassVar

import torch

from kdfast import ops
from kdfast.methods.base import Method, Option, Outputs, method


@method("at", aliases=("attention",))
class AttentionTransfer(Method):
    """Attention transfer: match where each stage looks.

    A is the channel mean of |F|^p, Q that map over its norm, image by image. Channel counts may
    differ; the larger feature map is average pooled to the smaller before it is squared.

    Source: Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017,
    arXiv 1612.03928; mean-square form and beta 1000 of its public code.
    """

    default_weight = 1000.0
    power = Option(2.0, "p of |F|^p", positive=True)
    formula = "sum_stages mean_(b,i) (Q_s - Q_t)^2, Q = A / ||A||_2, A = mean_c |F_c|^p"
    equivalences: ClassVar = {
        "at-channel-sum": "A as sum or as mean over channels gives the same Q.",
        "at-squared-norm": "`(w / 2) * mean_b ||Q_s - Q_t||^2`, the paper's weight with the norm "
        "squared, is w N / 2 times the term of a stage of N positions. Beta 1000 is w = 1.95, 7.8 "
        "and 31 at 32, 16 and 8 pixels: no one w serves all stages.",
        "at-cosine": "A stage's term is `(2 / N) * mean_b (1 - cos(Q_s, Q_t))`, at most 2 / N, for "
        "maps that are not all zero.",
        "at-gradient": "The gradient with respect to `A_s` is "
        "`2 / (B N ||A_s||) * (cos * Q_s - Q_t)`, and with respect to `F_s` it is `2 / c * F_s` "
        "times that at p = 2 and c channels.",
        "at-epsilon": "`Q = A / (||A|| + 1e-6)`, as in a public collection of losses, changes a "
        "stage's term by less than 6e-6 / (N ||A||), ||A|| the smallest norm (1e-4 or more).",
        "at-mean-over-stages": "A weight `w` on the mean over S stages is `--beta w/S`: "
        "recipe `zoo`, 1000 on the mean of three, has 333.3.",
    }

    def taps(self) -> str:
        return "stages"

    def forward(self, student: Outputs, teacher: Outputs, labels: torch.Tensor) -> torch.Tensor:
        return ops.attention_loss(student.features, teacher.features, self.power)
