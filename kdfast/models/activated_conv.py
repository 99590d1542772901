"""A convolution that applies the ReLU behind it while its result is in the cache."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ActivatedConv2d(nn.Conv2d):
    """relu(convolution): [N,C,H,W] -> [N,out_channels,h,w], without a second pass over the result.

    One call of oneDNN, in float32 on a CPU, where no gradient is asked for; else two operations.
    """

    def forward(self, x: Tensor) -> Tensor:
        if fuses(self, x):
            return torch.ops.mkldnn._convolution_pointwise(
                x, self.weight, self.bias, self.padding, self.stride, self.dilation, self.groups,
                "relu", [], "",
            )  # fmt: skip
        return F.relu_(self._conv_forward(x, self.weight, self.bias))


def can_fuse(conv: nn.Module) -> bool:
    """Whether `conv` is a plain convolution, such as oneDNN takes, in a torch that has it."""
    return (
        type(conv) is nn.Conv2d
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    )


def fuses(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether this call on `x` [N,C,H,W] is one that oneDNN's fused form is for."""
    return (
        x.device.type == "cpu"
        and x.dtype == conv.weight.dtype == torch.float32
        and x.dim() == 4
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )
