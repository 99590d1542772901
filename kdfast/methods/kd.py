"""Knowledge distillation by soft targets."""

import torch
from torch.nn import functional as F

from kdfast.methods.base import Method, Option, Outputs, method


@method("kd", aliases=("st",))
class SoftTargets(Method):
    """Soft targets: KL between softened class probabilities.

    L = T^2 * (1/B) * sum_b sum_c p_t^T (log p_t^T - log p_s^T), p^T = softmax(z / T): sum over
    classes, mean over the batch; T^2 keeps gradients comparable across temperatures. Its weight is
    alpha, and cross-entropy then has 1 - alpha unless gamma is given.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015,
    arXiv 1503.02531, section 2.
    """

    weight_flag = "alpha"
    default_weight = 0.9
    temperature = Option(4.0, "T of the soft targets", flag="--temperature", positive=True)

    def forward(self, student: Outputs, teacher: Outputs, labels: torch.Tensor) -> torch.Tensor:
        log_student = F.log_softmax(student.logits / self.temperature, dim=1)
        log_teacher = F.log_softmax(teacher.logits / self.temperature, dim=1)
        divergence = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
        return self.temperature * self.temperature * divergence
