"""Knowledge distillation by soft targets."""

from typing import ClassVar

import torch

from kdfast import ops
from kdfast.methods.base import Method, Option, Outputs, method


@method("kd", aliases=("st",))
class SoftTargets(Method):
    """Soft targets: KL between softened class probabilities.

    Sum over classes, mean over the batch; T^2 keeps gradients comparable across temperatures. Its
    weight is alpha, and cross-entropy then has 1 - alpha unless gamma is given.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015,
    arXiv 1503.02531, section 2.
    """

    weight_flag = "alpha"
    default_weight = 0.9
    temperature = Option(4.0, "T of the soft targets", flag="--temperature", positive=True)
    formula = "T^2 * mean_b sum_c p_t (log p_t - log p_s), p = softmax(z / T)"
    equivalences: ClassVar = {
        "kd-batchmean": "`T * T * F.kl_div(F.log_softmax(z_s / T, 1), F.softmax(z_t / T, 1), "
        'reduction="batchmean")` is the term.',
        "kd-mean": '`reduction="mean"`, which is PyTorch\'s default, divides by C as well, as '
        "dividing by `numel()` does: a weight `a` there is `--alpha a/C`, with `--gamma` given.",
        "kd-no-t2": "Without T^2, a weight `a` is `--alpha a/T^2`, with `--gamma` given.",
        "kd-soft-cross-entropy": "`-T^2 * mean_b sum_c p_t log p_s` is the term plus T^2 times the "
        "teacher's mean entropy: another value, the same gradient.",
        "kd-gradient": "The gradient with respect to `z_s` is `(T / B) (p_s - p_t)`, p at T.",
        "kd-high-temperature": "As T grows, the term tends to "
        "`mean_b sum_c (z_s - z_t)^2 / (2 C)` of logits centred per image: half of `logits`.",
        "kd-complement": "`(1 - a) * CE + a * term` is `--alpha a`, which leaves gamma at 1 - a.",
        "kd-reversed": "`a * CE + (1 - a) * term`, where alpha belongs to cross-entropy, is "
        "`--alpha 1-a`.",
        "kd-gamma": "`g * CE + a * term`, with any two weights, is `--gamma g --alpha a`; it is "
        "g + a times the complement form with `a / (g + a)`.",
        "kd-alpha-t-t": "`nn.KLDivLoss()(...) * (a * T * T) + F.cross_entropy(...) * (1 - a)` is "
        '`--alpha a/C --gamma 1-a`; with `reduction="batchmean"` it is `--alpha a`.',
        "kd-tutorial": "PyTorch's tutorial, `0.25 * sum(p_t (log p_t - log p_s)) / B * T^2 + "
        "0.75 * CE` at T = 2, is `--alpha 0.25 --temperature 2`.",
        "kd-timm": "timm's `LogitDistillationTask`: `distill_loss_weight=d, task_loss_weight=w` is "
        "`--alpha d --gamma w`; `task_loss_weight=w` alone is `--alpha 1-w`; neither is "
        "`--alpha 1 --gamma 1`.",
    }

    def forward(self, student: Outputs, teacher: Outputs, labels: torch.Tensor) -> torch.Tensor:
        return ops.soft_target_loss(student.logits, teacher.logits, self.temperature)
