"""The loss part of a CRD step, between the features and their gradients.

Embedding and normalising, index sampling, the loss of both sides, the gradients with respect to the
student's feature and all four embedding parameters, both banks' update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from kdfast.methods import Outputs, Pairing, find_method
from rows import Row

TEMPERATURE, MOMENTUM, EPSILON = 0.07, 0.5, 1e-7
WIDTH = 64  # of the features, as ResNet-20 and ResNet-110 have it


def crd_step(device: str) -> Iterator[Row]:
    """Fused is method crd. Eager is the published form: draws by a permutation of the pool for each
    sample, bank rows gathered to [B, K + 1, d]. "dense" has the same draws, but the product of
    embeddings and whole bank, of which it gathers the scores. The operations are those of the drawn
    scores, both sides, forward and backward."""
    for samples, negatives, goals in (
        (50000, 16384, {"eager": 12, "dense": 1.5}),
        (50000, 4096, {}),
    ):
        batch, dim, classes = 64, 128, 100
        if device == "cuda":
            goals = {"eager": 10} if goals else {}
        data = _Data(samples, classes, negatives, batch, dim, device)
        yield Row(
            "crd_step",
            f"n={samples} K={negatives} B={batch} d={dim}",
            torch.float32,
            {
                "fused": data.fused,
                "eager": lambda data=data: data.plain(_gathered),
                "dense": lambda data=data: data.plain(_dense),
            },
            "",
            operations=2 * 2 * 2 * batch * (negatives + 1) * dim,
            goals=goals,
            memory=negatives == 16384,
        )


class _Data:
    def __init__(
        self, samples: int, classes: int, negatives: int, batch: int, dim: int, device: str
    ):
        targets = torch.arange(samples, device=device) % classes
        order = targets.argsort(stable=True)
        self.ids = torch.randperm(samples, device=device)[:batch]
        self.labels = targets[self.ids]
        self.classes = self.labels.tolist()
        self.others = [order[targets[order] != c] for c in range(classes)]
        self.negatives, self.samples = negatives, samples
        shapes = [(torch.Size([batch, WIDTH]),)] * 2
        self.method = find_method("crd")(dim=dim, negatives=negatives)
        self.method.setup(
            Pairing(("fc:in",), ("fc:in",), *shapes, classes, training_labels=targets.tolist)
        )
        self.method.to(device)
        # The plain forms' own: memory and Z are not shared.
        self.banks = [F.normalize(torch.randn(samples, dim, device=device)) for _ in range(2)]
        self.z = torch.tensor(float(samples), device=device)
        self.student, self.teacher = torch.randn(2, batch, WIDTH, device=device).relu().unbind()
        self.student.requires_grad_()
        self.trained = [self.student, *self.method.parameters()]

    def fused(self) -> tuple[Tensor, ...]:
        outputs = (Outputs(self.z, (x,), self.ids) for x in (self.student, self.teacher))
        gradients = torch.autograd.grad(self.method(*outputs, self.labels), self.trained)
        self.method.after_step()
        return gradients

    def plain(self, scores: Callable[[Tensor, Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        negatives = []
        for c in self.classes:
            pool = self.others[c]
            negatives.append(pool[torch.randperm(len(pool), device=pool.device)[: self.negatives]])
        indices = torch.cat([self.ids.unsqueeze(1), torch.stack(negatives)], 1)
        embeddings = [
            F.normalize(layer(feature))
            for layer, feature in (
                (self.method.embed_student, self.student),
                (self.method.embed_teacher, self.teacher),
            )
        ]
        c, sides = self.negatives / self.samples, []
        for anchor, bank in zip(embeddings, reversed(self.banks), strict=True):
            x = (scores(anchor, bank, indices) / TEMPERATURE).exp() / self.z
            positive = (x[:, 0] / (x[:, 0] + c + EPSILON)).log()
            negative = (c / (x[:, 1:] + c + EPSILON)).log()
            sides.append(-(positive.sum() + negative.sum()) / len(anchor))
        gradients = torch.autograd.grad(sides[0] + sides[1], self.trained)
        with torch.no_grad():
            for bank, embedding in zip(self.banks, embeddings, strict=True):
                rows = MOMENTUM * bank[self.ids] + (1 - MOMENTUM) * embedding
                bank[self.ids] = F.normalize(rows)
        return gradients


def _gathered(anchor: Tensor, bank: Tensor, indices: Tensor) -> Tensor:
    rows = bank.index_select(0, indices.flatten()).view(*indices.shape, -1)
    return torch.bmm(rows, anchor.unsqueeze(2)).squeeze(2)


def _dense(anchor: Tensor, bank: Tensor, indices: Tensor) -> Tensor:
    return (anchor @ bank.T).gather(1, indices)


ROWS = {"crd_step": crd_step}
