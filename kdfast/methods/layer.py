"""One layer of the teacher, matched as it is."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from kdfast.errors import UsageError
from kdfast.methods.base import Method, Outputs, Pairing, method


@method("layer")
class Layer(Method):
    """Match one layer of the teacher before its ReLU, without labels.

    No regressor, no normalisation: both networks need the same shape there. Cross-entropy takes no
    part (gamma 0), so the layers behind the matched one stay as they begin; --classifier-epochs
    trains them afterwards. One --student-layers name holds for both networks. Of several pairs the
    terms are summed. By default the last-but-one stage before its last activation. The learning
    rate that fits goes from 1e-4 to 10 with layer and network, so --lr is to be given.

    Source: Cheng, Rao, Chen, Zhang, "Explaining Knowledge Distillation by Quantifying the
    Knowledge", CVPR 2020, arXiv 2003.03622, in the form of its public code.
    """

    gamma = 0.0
    needs_rate = True
    formula = "mean_(b,c,x,y) (F_s - F_t)^2"

    def taps(self) -> str:
        return "layer"

    def setup(self, pairing: Pairing) -> None:
        pairs = zip(
            pairing.student_layers,
            pairing.student_shapes,
            pairing.teacher_layers,
            pairing.teacher_shapes,
            strict=True,
        )
        for ours, shape, theirs, target in pairs:
            if shape[1:] != target[1:]:
                raise UsageError(
                    f"method layer needs equal shapes, but student layer {ours} has "
                    f"{list(shape[1:])} and teacher layer {theirs} {list(target[1:])}; choose "
                    "--student-layers and --teacher-layers that match, or --method fitnet"
                )

    def forward(self, student: Outputs, teacher: Outputs, labels: torch.Tensor) -> torch.Tensor:
        pairs = zip(student.features, teacher.features, strict=True)
        dtype = student.logits.dtype
        return torch.stack([F.mse_loss(a.to(dtype), b.to(dtype)) for a, b in pairs]).sum()
