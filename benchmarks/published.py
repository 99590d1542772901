"""Loops as the published code of four methods has them, to measure ours against.

Written from what those loops do, not taken from them: images are PIL images that loader processes
crop, flip and normalise one by one; networks run in NCHW; losses are eager, and loss and accuracy
are read after every step. Each keeps the teacher as its authors did.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from kdfast.data import ImageData, Source

WORKERS = 2
Features = list[Tensor]


class Images(Dataset):
    """Per-image transforms; with `negatives`, that many indices of other classes a sample too."""

    def __init__(self, source: Source, data: ImageData, negatives: int = 0):
        self.source, self.negatives = source, negatives
        self.transform = v2.Compose(
            [
                v2.RandomCrop(data.image_size, 4),
                v2.RandomHorizontalFlip(),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(data.mean, data.std),
            ]
        )
        if negatives:
            labels = np.asarray(source.labels())
            self.others = [np.flatnonzero(labels != c) for c in range(data.classes)]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int):
        image, label = self.source.read(index)
        image = self.transform(image.convert("RGB"))
        if not self.negatives:
            return image, label
        drawn = np.random.choice(self.others[label], self.negatives, replace=False)
        return image, label, index, np.concatenate([[index], drawn])


class Loop(ABC):
    """Student, teacher and optimizer; `step` trains on one of `batches()`.

    `layers` are watched in both networks by their `act` or module outputs, in order.
    """

    graph = False  # whether the teacher's passes build one, which no loss uses

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        data: ImageData,
        layers: tuple[list[str], list[str]],
        device: str,
        batch: int,
        negatives: int = 0,
    ):
        self.device = device
        # Ours may lie in NHWC order, which convolutions would follow.
        layout = torch.contiguous_format
        self.student = copy.deepcopy(student).to(device, memory_format=layout).train()
        self.teacher = copy.deepcopy(teacher).to(device, memory_format=layout).eval()
        self.teacher.requires_grad_(self.graph)
        self.seen = _watch(self.student, layers[0]), _watch(self.teacher, layers[1])
        self.loader = DataLoader(
            Images(data.train, data, negatives),
            batch,
            shuffle=True,
            num_workers=WORKERS,
            pin_memory=device == "cuda",
            drop_last=True,
        )
        self.optimizer = torch.optim.SGD(
            [*self.student.parameters(), *self.more()], lr=0.05, momentum=0.9, weight_decay=5e-4
        )

    def more(self) -> list[nn.Parameter]:
        """What is trained beside the student."""
        return []

    def batches(self) -> Iterator[list[Tensor]]:
        for batch in self.loader:
            yield [part.to(self.device) for part in batch]

    def ask(self, images: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.graph):
            return self.teacher(images)

    @abstractmethod
    def loss(self, logits: Tensor, taught: Tensor, labels: Tensor, *more: Tensor) -> Tensor:
        """The loss of a batch; `more` are what the loader gives beside images and labels."""

    def step(self, images: Tensor, labels: Tensor, *more: Tensor) -> None:
        taught = self.ask(images)
        logits = self.student(images)
        loss = self.loss(logits, taught, labels, *more)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        right = logits.topk(5).indices == labels[:, None]
        loss.item(), right[:, 0].float().mean().item(), right.float().sum(1).mean().item()


class AttentionTransfer(Loop):
    """AT + KD of the ResNet-20/110 study: the teacher in training mode, and in the graph."""

    graph = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher.train()

    def loss(self, logits, taught, labels):
        return (
            F.cross_entropy(logits, labels)
            + 1000 * sum(map(_attention_loss, *self.seen))
            + 0.9 * soft_targets(logits, taught.detach(), 4)
        )


class SoftTargets(Loop):
    """KD of the CRD benchmark."""

    def loss(self, logits, taught, labels):
        return 0.1 * F.cross_entropy(logits, labels) + 0.9 * soft_targets(logits, taught, 4)


class Contrastive(Loop):
    """CRD: indices drawn by the loader, rows of both banks gathered."""

    def __init__(self, *args, negatives: int = 16384, **kwargs):
        self.embed = nn.ModuleList()
        super().__init__(*args, negatives=negatives, **kwargs)
        size, bound = len(self.loader.dataset), (3 / 128) ** 0.5
        self.banks = [torch.empty(size, 128).uniform_(-bound, bound).to(self.device) for _ in "st"]
        self.constants: list[Tensor | None] = [None, None]
        self.share = negatives / size

    def more(self):
        self.embed = nn.ModuleList(nn.Linear(64, 128) for _ in "st").to(self.device)
        return list(self.embed.parameters())

    def loss(self, logits, taught, labels, index, contrast):
        pooled = [seen[0].mean((2, 3)) for seen in self.seen]
        pooled[1] = pooled[1].detach()
        ours = [F.normalize(layer(x)) for layer, x in zip(self.embed, pooled, strict=True)]
        total = F.cross_entropy(logits, labels)
        for side, anchor in enumerate(ours):
            rows = self.banks[1 - side].index_select(0, contrast.view(-1))
            rows = rows.view(*contrast.shape, 128)
            scores = torch.exp(torch.bmm(rows, anchor.unsqueeze(2)).squeeze(2) / 0.07)
            if self.constants[side] is None:
                self.constants[side] = scores.mean().detach() * len(self.banks[0])
            scores = scores / self.constants[side]
            noise = torch.full_like(scores[:, 1:], self.share)
            positive = torch.log(scores[:, 0] / (scores[:, 0] + self.share + 1e-7))
            negative = torch.log(noise / (scores[:, 1:] + self.share + 1e-7))
            total = total - 0.8 * (positive.sum() + negative.sum()) / len(labels)
        with torch.no_grad():
            for bank, row in zip(self.banks, ours, strict=True):
                bank[index] = F.normalize(0.5 * bank[index] + 0.5 * row)
        return total


class IntermediateHeads(Loop):
    """DIH: teacher and heads in the graph, each head asked twice, its loss taken by itself."""

    graph = True

    def __init__(self, *args, heads: list[nn.Module], **kwargs):
        super().__init__(*args, **kwargs)
        self.heads = [copy.deepcopy(head).to(self.device).eval() for head in heads]

    def loss(self, logits, taught, labels):
        answers = [taught]
        for head, feature in zip(self.heads, self.seen[1], strict=True):
            head(feature)
            answers.append(head(feature)[1])
        return sum(
            0.9 * F.cross_entropy(logits, labels) + 0.1 * soft_targets(logits, answer.detach(), 5)
            for answer in answers
        )


def soft_targets(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    ours = F.log_softmax(logits / temperature, dim=1)
    theirs = F.softmax(taught / temperature, dim=1)
    return F.kl_div(ours, theirs, reduction="batchmean") * temperature**2


def _attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    ours, theirs = (F.normalize(x.pow(2).mean(1).flatten(1)) for x in (student, teacher.detach()))
    return (ours - theirs).pow(2).mean()


def _watch(model: nn.Module, layers: list[str]) -> Features:
    """The outputs of `layers` in the latest forward pass, in a list that always holds them."""
    seen: Features = [None] * len(layers)
    for place, layer in enumerate(layers):

        def note(module, args, output, place=place) -> None:
            seen[place] = output

        model.get_submodule(layer).register_forward_hook(note)
    return seen


LOOPS: dict[str, Callable[..., Loop]] = {
    "at+kd": AttentionTransfer,
    "crd": Contrastive,
    "wrn kd": SoftTargets,
    "dih loop": IntermediateHeads,
}
