"""A network that teaches: frozen, in evaluation mode, never in optimizer or checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdfast.models import InputAdapter, Taps

Answer = tuple[
    torch.Tensor, tuple[torch.Tensor, ...], tuple[tuple[torch.Tensor, torch.Tensor], ...]
]


class Teacher:
    """Answers student-side images with logits [B, C], tapped features and heads, without gradient.

    `adapter` brings images from the student's normalisation and size to the teacher's.
    `bn="batch"` normalises with batch statistics and lets the running ones drift, as one published
    loop did by leaving the teacher in training mode. `heads` are auxiliary classifiers, frozen as
    well, on the tapped layers at `head_positions`; each answers (feature [B, d], logits [B, C]).
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        adapter: InputAdapter,
        bn: str = "running",
        heads: Sequence[nn.Module] = (),
        head_positions: Sequence[int] = (),
    ):
        self.model = model.requires_grad_(False).eval()
        self.mount(heads, head_positions)
        self.taps, self.adapter = Taps(model, layers), adapter
        if bn == "batch":
            for module in model.modules():
                if isinstance(module, _BatchNorm):
                    module.train()
        self.answer = self._answer

    def mount(self, heads: Sequence[nn.Module], positions: Sequence[int]) -> None:
        """Answer with these heads from now on."""
        self.heads = [head.requires_grad_(False).eval() for head in heads]
        self.head_positions = list(positions)

    def compile(self) -> None:
        self.answer = torch.compile(self._answer)

    def calibrate(self, images: torch.Tensor) -> list[torch.Size]:
        """Shapes of the tapped features; finds which taps need a copy."""
        return self.taps.calibrate(self.adapter(images))

    def _answer(self, images: torch.Tensor) -> Answer:
        logits, features = self.taps(self.adapter(images))
        mounted = zip(self.heads, self.head_positions, strict=True)
        return logits, features, tuple(head(features[i]) for head, i in mounted)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> Answer:
        return self.answer(images)
