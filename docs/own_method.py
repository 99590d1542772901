"""A distillation method of your own: one class, and its flags, help and recipe keys are there.

    python train/distill.py --plugin docs/own_method.py --method kd similarity --similarity-power 2

This one compares how similar the images of a batch look to each network (after Tung and Mori,
"Similarity-Preserving Knowledge Distillation", ICCV 2019).
"""

import torch
from torch.nn import functional as F

from kdfast.methods import Method, Option, Outputs, method


@method("similarity")
class Similarity(Method):
    """Match which images of a batch resemble each other in the last stage."""

    default_weight = 10.0  # --beta
    power = Option(1.0, "exponent on |similarity|", positive=True)  # --similarity-power

    def taps(self) -> str:
        return "stages"

    def forward(self, student: Outputs, teacher: Outputs, labels: torch.Tensor) -> torch.Tensor:
        ours, theirs = (
            F.normalize(net.features[-1].float().flatten(1)) for net in (student, teacher)
        )
        ours, theirs = ((x @ x.T).abs().pow(self.power) for x in (ours, theirs))  # [B, B]
        return F.mse_loss(ours, theirs)
