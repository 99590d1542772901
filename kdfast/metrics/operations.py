"""Operations of a forward pass and parameters: the true numbers, and those of a publication.

Taha, Shrivastava, Davis, "Knowledge Evolution in Neural Networks", CVPR 2021, arXiv 2103.05152:
its reductions (73 % at split rate 0.5) are quoted in the convention of its public code, which
differs from the true count; `published_operations` and `published_parameters` follow it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kdfast.models import parameter_count


def count_operations(model: nn.Module, size: tuple[int, int]) -> int:
    """Floating-point operations of one image's forward pass, a multiply-add counted as two.

    Args:
        model: takes [1, 3, height, width]; it is run in eval mode and left as it was.
        size: height and width in pixels.

    Source: torch's `FlopCounterMode`, which counts convolutions and matrix products.
    """
    with FlopCounterMode(display=False) as counter:
        _run(model, size)
    return counter.get_total_flops()


def published_operations(model: nn.Module, size: tuple[int, int]) -> int:
    """Operations of one image's forward pass as Knowledge Evolution's tables count them.

    Per call of a module, N the elements of its output: convolution N * (2 * kh * kw * in / groups
    - 1), and N more with a bias; linear N * (2 * in - 1), its bias free; batch norm 2 * N; ReLU N;
    max-pool N * (k - 1); average pool N * k. k is the kernel's area where the module was given a
    pair and its *side* where it was given one number, as published. Nothing else counts: other
    activations and norms, adaptive pools, sums, and whatever is not a module (functional ReLUs).

    Args:
        model: dense or slim, of any library; takes [1, 3, height, width]. It is run in eval mode
            and left as it was.
        size: height and width in pixels.

    Example: torchvision's resnet18 with 100 classes at 224x224: 3,632,418,204; 968,435,356 with
    half the channels.
    """
    total = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        total += output.numel() * _operations_an_element(module)

    hooks = []
    try:
        for module in model.modules():
            if isinstance(module, _COUNTED):
                hooks.append(module.register_forward_hook(count))
        _run(model, size)
    finally:
        for hook in hooks:
            hook.remove()
    return total


_MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_AVERAGE_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_COUNTED = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.ReLU, *_MAX_POOLS, *_AVERAGE_POOLS)


def _operations_an_element(module: nn.Module) -> int:
    """Operations for one element of the output of a module of `_COUNTED`."""
    if isinstance(module, nn.Conv2d):
        return 2 * module.weight[0].numel() - (module.bias is None)
    if isinstance(module, nn.Linear):
        return 2 * module.in_features - 1
    if isinstance(module, nn.BatchNorm2d):
        return 2
    if isinstance(module, nn.ReLU):
        return 1
    kernel = module.kernel_size
    area = kernel if isinstance(kernel, int) else math.prod(kernel)
    return area - isinstance(module, _MAX_POOLS)


def published_parameters(model: nn.Module, split: bool = True) -> int:
    """Parameters as Knowledge Evolution's tables count them: masks are parameters there.

    Args:
        model: dense or slim, of any library.
        split: count the masks: an entry for each convolution and linear weight and, in a DenseNet,
            for each channel of the batch norms that read a concatenation. Without them it is the
            true count.
    """
    count = parameter_count(model)
    if not split:
        return count
    # torchvision's and timm's names; norm0 and norm2 read a convolution.
    masked_norms = ("norm1", "norm", "norm5") if type(model).__name__ == "DenseNet" else ()
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            count += module.weight.numel()
        elif isinstance(module, nn.BatchNorm2d) and name.rpartition(".")[2] in masked_norms:
            count += module.num_features
    return count


def _run(model: nn.Module, size: tuple[int, int]) -> None:
    """One black image through `model`, in eval mode, on its device and in its dtype."""
    parameter = next(model.parameters())
    image = torch.zeros(1, 3, *size, device=parameter.device, dtype=parameter.dtype)
    with torch.no_grad(), _evaluating(model):
        model(image)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; then each module has the mode it had, a frozen part its own."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
