"""Distilling knowledge via intermediate classifiers."""

import torch
from torch.nn import functional as F

from kdfast import ops
from kdfast.errors import UsageError
from kdfast.methods.base import Method, Option, Outputs, Pairing, method


@method("dih")
class IntermediateClassifiers(Method):
    """Soft targets of a cohort: the teacher's final classifier and linear heads on its stages.

    Member 0 of the cohort is the final classifier, member j the j-th head, shallow to deep. The
    term holds cross-entropy, 1 - alpha of it for each member, so gamma is 0 unless it is given.
    Without heads it is kd with gamma 1 - alpha.

    Source: Asadian, Salehi-Abari, "Distilling Knowledge via Intermediate Classifiers", 2021,
    arXiv 2103.00497, in the summed form of the authors' code.
    """

    gamma = 0.0
    heads = "linear"
    head_features = False
    alpha = Option(0.1, "weight of each member's soft targets", flag="--alpha", least=0.0)
    alphas = Option(
        (), "one weight a member, the final classifier's first; 0 removes a member", least=0.0
    )
    temperature = Option(5.0, "T of the soft targets", flag="--temperature", positive=True)
    reduction = Option("sum", "over the members", choices=("sum", "mean"))
    formula = (
        "sum_j (1 - alpha_j) * CE + alpha_j T^2 * mean_b sum_c p_j (log p_j - log p_s), "
        "p = softmax(z / T)"
    )

    smoothing = 0.0

    def setup(self, pairing: Pairing) -> None:
        self.smoothing = pairing.label_smoothing
        members = 1 + len(pairing.head_layers)
        if self.alphas and len(self.alphas) != members:
            raise UsageError(
                f"--dih-alphas has {len(self.alphas)} weights for {members} members: the final "
                f"classifier and the heads on {', '.join(pairing.head_layers) or 'no layer'}"
            )
        weights = self.alphas or [self.alpha]
        if max(weights) > 1:
            raise UsageError(
                f"dih: alpha {max(weights):g} makes the weight of cross-entropy negative; give at "
                "most 1"
            )
        if not any(weights):
            raise UsageError("dih: alpha 0 removes every member; give one a weight above 0")

    def forward(self, student: Outputs, teacher: Outputs, labels: torch.Tensor) -> torch.Tensor:
        members = [teacher.logits, *(logits for _, logits in teacher.heads)]
        cohort = torch.stack([logits.to(teacher.logits.dtype) for logits in members])
        weights = self.alphas or self.alpha
        if self.smoothing:
            share = self.smoothing / student.logits.shape[1]
            hot = F.one_hot(labels, student.logits.shape[1]).to(student.logits.dtype)
            labels = (1 - self.smoothing) * hot + share
        return ops.cohort_loss(
            student.logits, cohort, labels, weights, self.temperature, self.reduction
        )
