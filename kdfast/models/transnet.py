"""Trans-Net: rebuilds one network's feature from another's, and says how nonlinear the way is.

Liang, Li, Li, Wang, Zhang, "Knowledge Consistency between Neural Networks and Beyond", ICLR 2020,
arXiv 1908.01581; scales and initialisation are those of its code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kdfast.errors import UserError
from kdfast.ops import gated_relu
from kdfast.ops.reference.transnet import SCALE_EPS

_CONV = re.compile(r"linearLayers_conv\.(\d+)\.weight")
_GATES = "nonLinearLayers_p_pre"


class TransNet(nn.Module):
    """g(x) of `layers` convolutions C -> C without bias and a gate between each two of them.

    With xt = x / s(x):  h_0 = W_0 xt,  h_i = W_i (xt + p_i-1 relu(h_i-1 / s(h_i-1))),
    g(x) = h_K-1. s is the standard deviation over positions, unbiased, of a sample and channel,
    plus 1e-5, and a constant for the gradient; of a single position it is 1. Gates are
    p = sigmoid(`gate_logits`), one half at first.

    Args:
        channels: C of both features.
        layers: K, at least 1.
        kernel_size: 3 for maps [N, C, H, W]; 1 for vectors [N, C], of which a 3x3 kernel would read
            its centre alone. Weights start within 1 / sqrt(9 C) either way.

    Raises:
        ValueError: no channels, no layers, or an even kernel.
    """

    def __init__(self, channels: int, layers: int = 3, kernel_size: int = 3):
        super().__init__()
        if channels < 1 or layers < 1 or kernel_size % 2 == 0:
            raise ValueError(
                "a Trans-Net needs channels and layers of at least 1 and an odd kernel size, got "
                f"{channels}, {layers} and {kernel_size}"
            )
        self.channels, self.kernel_size = channels, kernel_size
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, bias=False)
            for _ in range(layers)
        )
        bound = (9 * channels) ** -0.5
        for conv in self.convs:
            nn.init.uniform_(conv.weight, -bound, bound)
        self.gate_logits = nn.Parameter(torch.zeros(layers - 1))

    @property
    def gates(self) -> Tensor:
        """p [K - 1], between 0 and 1; gate i lies between convolutions i and i + 1."""
        return self.gate_logits.sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """x, [N, C, H, W] or [N, C] -> the target's feature as far as it follows, same shape."""
        scaled = _scaled(_as_map(x))
        hidden = self.convs[0](scaled)
        for conv, gate in zip(self.convs[1:], self.gates, strict=True):
            hidden = conv(gated_relu(scaled, hidden, gate))
        return hidden.view_as(x)

    def orders(self, x: Tensor) -> Tensor:
        """g(x) split by how many gates a part went through: [K, N, C, H, W] or [K, N, C].

        `orders(x)[n]` went through exactly n nonlinearities, whose masks and scales are those of
        the whole signal; the sum over n is `forward(x)`. One pass, 1 + 2 + ... + K convolutions.

        Source: the paper's section 3.2, equation 4.
        """
        scaled = _scaled(_as_map(x))
        parts = self.convs[0](scaled)[None]
        for conv, gate in zip(self.convs[1:], self.gates, strict=True):
            hidden = parts.sum(0)
            factor = gate * (hidden > 0) / _scale(hidden)
            parts = torch.cat([scaled[None], factor * parts])
            parts = conv(parts.flatten(0, 1)).view_as(parts)
        return parts.view(-1, *x.shape)

    @classmethod
    def published(cls, state_dict: Mapping[str, Tensor], *, vectors: bool = False) -> TransNet:
        """The Trans-Net of a state dict with the authors' names.

        With `vectors` the 3x3 kernels keep their centres, all that a feature [N, C] ever met.
        Entries of other names, which take no part in the forward pass, are left out.

        Raises:
            UserError: entries are missing or their shapes are no Trans-Net's.
        """
        found = {int(m[1]): value for k, value in state_dict.items() if (m := _CONV.fullmatch(k))}
        convs = [found[i] for i in sorted(found)]
        logits = state_dict.get(_GATES, torch.empty(0)).detach().reshape(-1)
        channels = len(convs[0]) if convs and convs[0].ndim == 4 else 0
        whole = (
            channels
            and sorted(found) == list(range(len(convs)))
            and {tuple(conv.shape) for conv in convs} == {(channels, channels, 3, 3)}
            and len(logits) == len(convs) - 1
        )
        if not whole:
            raise UserError(
                "no Trans-Net in these weights: they need linearLayers_conv.0.weight to "
                f"linearLayers_conv.K-1.weight, each [C, C, 3, 3], and K - 1 values {_GATES}"
            )
        net = cls(channels, len(convs), 1 if vectors else 3)
        with torch.no_grad():
            for own, conv in zip(net.convs, convs, strict=True):
                own.weight.copy_(conv[:, :, 1:2, 1:2] if vectors else conv)
            net.gate_logits.copy_(logits)
        return net


def _as_map(x: Tensor) -> Tensor:
    if x.ndim not in (2, 4):
        raise ValueError(f"a Trans-Net takes [N, C, H, W] or [N, C], got shape {list(x.shape)}")
    return x if x.ndim == 4 else x[:, :, None, None]


def _scale(x: Tensor) -> Tensor:
    """s(x) [N, C, 1, 1], without gradient."""
    if x.shape[2:].numel() == 1:
        return x.new_ones(*x.shape[:2], 1, 1)
    # In half precision the sum of squares would overflow or lose its end.
    wide = x.detach() if x.dtype == torch.float64 else x.detach().float()
    return wide.std((2, 3), keepdim=True) + SCALE_EPS


def _scaled(x: Tensor) -> Tensor:
    return x / _scale(x)
