"""A network that teaches: frozen, in evaluation mode, never in optimizer or checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdfast.models import InputAdapter, Taps, fold_batch_norms

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
        self.model, self.bn = model.requires_grad_(False).eval(), bn
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

    def fold(self, example: torch.Tensor) -> None:
        """Answer from now on from a copy whose convolutions normalise and apply ReLUs themselves.

        To rounding the answers are the same. `example` [B, 3, H, W] shows what can be folded. Where
        batch statistics are used nothing is.
        """
        if self.bn == "batch":
            return
        layers = self.taps.layers
        self.taps.close()
        images = self.adapter(example)
        self.model = fold_batch_norms(self.model, images, keep=layers, activations=True)
        self.taps = Taps(self.model, layers)
        self.calibrate(example)

    def compile(self) -> None:
        self.answer = torch.compile(self._answer)

    def calibrate(self, images: torch.Tensor) -> list[torch.Size]:
        """Shapes of the tapped features; finds which taps need a copy."""
        return self.taps.calibrate(self.adapter(images))

    @torch.no_grad()
    def example(self, images: torch.Tensor) -> Answer:
        """As a call, but never compiled: which shapes and dtypes answers have."""
        return self._answer(images)

    def _answer(self, images: torch.Tensor) -> Answer:
        logits, features = self.taps(self.adapter(images))
        mounted = zip(self.heads, self.head_positions, strict=True)
        return logits, features, tuple(head(features[i]) for head, i in mounted)

    @torch.no_grad()
    def __call__(
        self,
        images: torch.Tensor,
        indices: torch.Tensor | None = None,
        epoch: int | None = None,
    ) -> Answer:
        """The answer to `images` [B, 3, H, W].

        Which training images they are (`indices`, int64 [B]) in which 0-based `epoch` is for a
        `CachedTeacher`, which is called in the same way.
        """
        return self.answer(images)
