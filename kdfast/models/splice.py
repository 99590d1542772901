"""One network's classifier on what a Trans-Net finds of its feature in another network's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from kdfast.errors import UsageError


def check_mask(mask: Sequence[int], orders: int) -> tuple[int, ...]:
    """`mask` as 0s and 1s, the linear order first; K = `orders` is the Trans-Net's.

    Raises `UsageError` for one of another length, of other values, or that keeps no order.
    """
    mask = tuple(mask)
    said = f"order mask {''.join(map(str, mask)) or 'of no entries'}"
    needed = f"a Trans-Net of K = {orders} layers has {orders} orders: give as many 0s and 1s"
    if len(mask) != orders or not set(mask) <= {0, 1}:
        raise UsageError(f"{said} does not fit; {needed}, order 0, the linear one, first")
    if not any(mask):
        raise UsageError(f"{said} keeps no order; {needed}, at least one of them 1")
    return tuple(map(int, mask))


def sum_of_orders(transnet: nn.Module, feature: torch.Tensor, mask: Sequence[int]) -> torch.Tensor:
    """The orders n of `transnet` with `mask[n]` = 1 in `feature`, added up; of the same shape.

    feature: [N,C,H,W] or [N,C]. With all orders the sum is the Trans-Net's output, and costs no
    more than that.
    """
    if all(mask):
        return transnet(feature)
    kept = [n for n, keep in enumerate(mask) if keep]
    return transnet.orders(feature)[kept].sum(0)


class Splice(nn.Module):
    """`logits = tail(sum over n in S of x^(n))`, x^(n) the orders of `transnet` in head's feature.

    `forward(images)`: float32 [N,3,H,W], normalised for the head's network -> logits [N,C].
    Everything that it is made of is shared, not copied. For inference put both networks into
    evaluation mode before: `split_at` says how the modes of a cut network work.

    Liang, Li, Li, Wang, Zhang, "Knowledge Consistency between Neural Networks and Beyond", ICLR
    2020: refined features.

    Args:
        head: the first part of network A, `split_at(a, layer_of_a)[0]`.
        transnet: a `TransNet` from A's feature to B's.
        tail: the second part of network B, `split_at(b, layer_of_b)[1]`.
        mask: S, K entries of 0 or 1, the linear order first; (1, 1, 1) keeps all three.

    Raises:
        UsageError: a mask of another length than the Trans-Net has layers, or of zeros alone.
    """

    def __init__(
        self, head: nn.Module, transnet: nn.Module, tail: nn.Module, mask: Sequence[int]
    ) -> None:
        super().__init__()
        self.mask = check_mask(mask, len(transnet.convs))
        self.head, self.transnet, self.tail = head, transnet, tail

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.tail(sum_of_orders(self.transnet, self.head(images), self.mask))
