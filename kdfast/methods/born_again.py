"""The loss of Born-Again networks."""

import torch
from torch.nn import functional as F

from kdfast import ops
from kdfast.methods.base import Method, Option, Outputs, Pairing, method


@method("born_again")
class BornAgain(Method):
    """Cross-entropy with a teacher's softened classes, under a weight that changes every epoch.

    Lambda goes geometrically from `--lambda` in the first epoch to `--lambda-end` in the last, one
    value an epoch, both ends exact; linearly when either is 0, which no geometric series reaches.
    The term has lambda in it. Its gradient is that of `kd` at the same temperature.

    Source: Furlanello et al., "Born-Again Neural Networks", ICML 2018, arXiv 1805.04770; this form
    is that of the public code of Liang et al., "Knowledge Consistency between Neural Networks and
    Beyond", ICLR 2020, arXiv 1908.01581.
    """

    gamma = 1.0
    lambda_start = Option(0.5, "lambda of the first epoch", flag="--lambda", least=0.0)
    lambda_end = Option(
        None, "lambda of the last epoch; unset, that of the first", flag="--lambda-end", least=0.0,
        kind=float,
    )  # fmt: skip
    tau = Option(1.0, "temperature of both networks", flag="--tau", positive=True)
    formula = "-lambda_e tau^2 * mean_b sum_c p_t log p_s, p = softmax(z / tau)"

    def __init__(self, **options):
        super().__init__(**options)
        if self.lambda_end is None:
            self.lambda_end = self.lambda_start
        self.epochs = 1
        # A tensor, so that compiled code takes another value without being compiled again; float64
        # keeps the ends exact in whatever precision the logits have.
        self.register_buffer(
            "coefficient", torch.tensor(self.lambda_start, dtype=torch.float64), persistent=False
        )

    def setup(self, pairing: Pairing) -> None:
        self.epochs = pairing.epochs

    def start_epoch(self, epoch: int) -> None:
        self.coefficient.fill_(self._lambda(epoch))

    def gauges(self) -> dict[str, float]:
        return {"lambda": self.coefficient.item()}

    def _lambda(self, epoch: int) -> float:
        first, last, steps = self.lambda_start, self.lambda_end, self.epochs - 1
        if epoch == 0 or first == last:
            return first
        if epoch == steps:
            return last
        share = epoch / steps
        if 0 in (first, last):
            return first + (last - first) * share
        return first * (last / first) ** share

    def forward(self, student: Outputs, teacher: Outputs, labels: torch.Tensor) -> torch.Tensor:
        log_p = F.log_softmax(teacher.logits / self.tau, 1)
        entropy = -(log_p.exp() * log_p).sum(1).mean().detach()
        divergence = ops.soft_target_loss(student.logits, teacher.logits, self.tau)
        return self.coefficient.to(divergence.dtype) * (divergence + self.tau**2 * entropy)
