"""Which layer of a network is compared when the user names none."""

from __future__ import annotations

import torch
from timm.layers import activations
from torch import nn

from kdfast.errors import UsageError
from kdfast.models.stages import default_stages

_ACTIVATIONS = (nn.modules.activation.__name__, activations.__name__)


def default_tap(model: nn.Module, size: tuple[int, int]) -> str:
    """The last-but-one stage of `model` before its last activation, a layer spec for `Taps`.

    `NAME:in` where what a stage passes on is what activation NAME made of it (the sum that ends a
    residual block, of cifar_resnet20 `layer2.2.act2:in`), else the stage's output. Found by running
    the model once, in evaluation mode, on an image of `size` (height, width) pixels.

    Raises:
        UsageError: the model does not list its stages.
    """
    try:
        stage = default_stages(model)[-2:][0]
    except UsageError:
        raise UsageError(
            f"{type(model).__name__} does not list its stages; name the layer with --layer"
        ) from None
    module = model.get_submodule(stage)
    passed: list[tuple[str, object]] = []
    made: list[object] = []
    handles = [module.register_forward_hook(lambda _, __, output: made.append(output))]
    for name, part in module.named_modules(prefix=stage):
        if type(part).__module__ in _ACTIVATIONS and not any(part.children()):
            handles.append(
                part.register_forward_hook(
                    lambda _, __, output, name=name: passed.append((name, output))
                )
            )
    training = {part: part.training for part in model.modules()}
    parameter = next(model.parameters())
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, *size, device=parameter.device, dtype=parameter.dtype))
    finally:
        for handle in handles:
            handle.remove()
        for part, mode in training.items():
            part.training = mode
    last = next((name for name, output in reversed(passed) if output is made[-1]), None)
    return f"{last}:in" if last else stage
