"""What the weights of a new network are drawn from, where it is not the model's own code."""

from __future__ import annotations

from timm.models.vgg import ConvMlp
from torch import nn

from kdfast.seeding import local_randomness

INITS = ("model", "kaiming-normal", "vgg")
_CONVOLUTIONS = nn.modules.conv._ConvNd
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm)


def initialise(module: nn.Module, init: str, seed: int) -> None:
    """Draw the weights of `module` anew, from `seed` alone.

    `model` leaves them as they are; `kaiming-normal`, of Taha et al., CVPR 2021, draws convolutions
    and linear layers Kaiming normal with fan-in and leaves the rest; `vgg`, as torchvision draws
    VGG and Cheng et al., CVPR 2020, every network, draws convolutions Kaiming normal with fan-out
    and linear layers (timm's convolutions in their place as well) from N(0, 0.01^2), and sets
    normalisation to 1 and 0 and biases to 0.
    """
    with local_randomness(seed):
        if init == "kaiming-normal":
            for layer in module.modules():
                if isinstance(layer, _CONVOLUTIONS | nn.Linear):
                    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        elif init == "vgg":
            init_vgg(module)


def init_vgg(module: nn.Module) -> None:
    """`initialise` with `vgg`, from torch's generator."""
    replacing = {id(m) for part in module.modules() if isinstance(part, ConvMlp)
                 for m in part.modules()}  # fmt: skip
    for layer in module.modules():
        if isinstance(layer, _CONVOLUTIONS) and id(layer) not in replacing:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, _CONVOLUTIONS | nn.Linear):
            nn.init.normal_(layer.weight, std=0.01)
        elif isinstance(layer, _NORMS) and layer.weight is not None:
            nn.init.ones_(layer.weight)
        else:
            continue
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
