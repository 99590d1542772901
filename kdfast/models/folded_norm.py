"""What is left of a batch normalisation whose arithmetic went into the layer before it."""

from __future__ import annotations

from torch import Tensor, nn


class FoldedNorm(nn.Module):
    """Passes on what it gets, through the dropout and activation that the normalisation had.

    Those are `drop` and `act` of timm's `BatchNormAct2d`; a plain normalisation has neither.
    """

    def forward(self, x: Tensor) -> Tensor:
        for name in ("drop", "act"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x
