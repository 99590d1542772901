"""Flow of solution procedure."""

from itertools import pairwise
from typing import ClassVar

import torch

from kdfast import ops
from kdfast.errors import UsageError
from kdfast.methods.base import Method, Option, Outputs, Pairing, method


@method("fsp")
class FlowOfSolution(Method):
    """Flow of solution procedure: match how features change between layers.

    The Gram matrix of every two consecutive feature maps (stem after its ReLU first) is compared.
    One stage with cross-entropy, or with `--init-epochs` the paper's two: the term alone, then
    training without it.

    Source: Yim, Joo, Bae, Kim, "A Gift from Knowledge Distillation", CVPR 2017, eq. 1 and 2. The
    paper pools by maximum, the public code bases by average.
    """

    initialises = True
    pool = Option("avg", "how a larger map is brought to the next one's size", ("avg", "max"))
    formula = "sum_pairs mean_(b,i,j) (G_s - G_t)^2, G_ij = sum_xy F1_i F2_j / (h w)"
    equivalences: ClassVar = {
        "fsp-ninth": "The mean over three pairs, divided by three, is `--beta 0.1111` (1/9): "
        "recipe `self`.",
        "fsp-mean-over-pairs": "A weight `w` on the mean over P pairs is `--beta w/P`.",
        "fsp-broadcast": "The mean over positions of the broadcast product `F1[:, :, None] * "
        "F2[:, None]` is G.",
        "fsp-no-area": "Without the 1 / (h w), a pair's term is (h w)^2 times as large.",
        "fsp-squared-norm": "The paper's `mean_b ||G_s - G_t||^2` sums over (i, j): m n times a "
        "pair's term for m and n channels.",
        "fsp-transpose": "G with its two maps exchanged is the transpose, and the term the same.",
        "fsp-pool": "Average and maximum pooling agree on maps that are constant over positions.",
    }

    def taps(self) -> str:
        return "stem+stages"

    def setup(self, pairing: Pairing) -> None:
        if len(pairing.student_layers) < 2:
            raise UsageError("method fsp needs at least two layers; give more --student-layers")
        shapes = zip(pairing.student_shapes, pairing.teacher_shapes, strict=True)
        for i, (student, teacher) in enumerate(shapes):
            if student[1] != teacher[1]:
                raise UsageError(
                    f"method fsp needs equal channels, but student layer "
                    f"{pairing.student_layers[i]} has {student[1]} and teacher layer "
                    f"{pairing.teacher_layers[i]} has {teacher[1]}; use method at, or choose "
                    "--student-layers and --teacher-layers that match"
                )

    def forward(self, student: Outputs, teacher: Outputs, labels: torch.Tensor) -> torch.Tensor:
        pairs = (list(pairwise(net.features)) for net in (student, teacher))
        return ops.fsp_loss(*pairs, self.pool)
