"""The CRD step: index sampling, the loss of both sides, its gradients, both banks' update."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from kdfast import ops
from kdfast.ops import Key
from rows import Row

TEMPERATURE, MOMENTUM, EPSILON = 0.07, 0.5, 1e-7
KEY = Key(0)


def crd_step(device: str) -> Iterator[Row]:
    """Eager is the published form: draws by a permutation of the pool for each sample, bank rows
    gathered to [B, K + 1, d]. "dense" has the same draws, but the product of embeddings and whole
    bank, of which it gathers the scores. The operations are those of the drawn scores, both sides,
    forward and backward."""
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
        self.order = targets.argsort(stable=True)
        self.offsets = torch.arange(0, samples + 1, samples // classes, device=device)
        self.ids = torch.randperm(samples, device=device)[:batch]
        self.labels = targets[self.ids]
        self.classes = self.labels.tolist()
        self.others = [self.order[targets[self.order] != c] for c in range(classes)]
        self.negatives, self.samples = negatives, samples
        unit = (F.normalize(torch.randn(rows, dim, device=device)) for rows in [samples] * 2)
        self.banks = list(unit)
        self.embeddings = [F.normalize(torch.randn(batch, dim, device=device)) for _ in range(2)]
        for embedding in self.embeddings:
            embedding.requires_grad_()
        self.z = torch.tensor(float(samples), device=device)

    def fused(self) -> tuple[Tensor, ...]:
        indices = ops.draw_negatives(
            self.labels, self.offsets, self.negatives, self.ids, KEY, self.order
        )
        loss = ops.contrastive_loss(
            *self.embeddings, *self.banks, indices, self.z, self.z, TEMPERATURE
        )
        gradients = torch.autograd.grad(loss, self.embeddings)
        ops.contrastive_update_(*self.banks, *self.embeddings, self.ids, MOMENTUM)
        return gradients

    def plain(self, scores: Callable[[Tensor, Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        negatives = []
        for c in self.classes:
            pool = self.others[c]
            negatives.append(pool[torch.randperm(len(pool), device=pool.device)[: self.negatives]])
        indices = torch.cat([self.ids.unsqueeze(1), torch.stack(negatives)], 1)
        c, sides = self.negatives / self.samples, []
        for anchor, bank in zip(self.embeddings, reversed(self.banks), strict=True):
            x = (scores(anchor, bank, indices) / TEMPERATURE).exp() / self.z
            positive = (x[:, 0] / (x[:, 0] + c + EPSILON)).log()
            negative = (c / (x[:, 1:] + c + EPSILON)).log()
            sides.append(-(positive.sum() + negative.sum()) / len(anchor))
        gradients = torch.autograd.grad(sides[0] + sides[1], self.embeddings)
        with torch.no_grad():
            for bank, embedding in zip(self.banks, self.embeddings, strict=True):
                rows = MOMENTUM * bank[self.ids] + (1 - MOMENTUM) * embedding
                bank[self.ids] = F.normalize(rows)
        return gradients


def _gathered(anchor: Tensor, bank: Tensor, indices: Tensor) -> Tensor:
    rows = bank.index_select(0, indices.flatten()).view(*indices.shape, -1)
    return torch.bmm(rows, anchor.unsqueeze(2)).squeeze(2)


def _dense(anchor: Tensor, bank: Tensor, indices: Tensor) -> Tensor:
    return (anchor @ bank.T).gather(1, indices)


ROWS = {"crd_step": crd_step}
