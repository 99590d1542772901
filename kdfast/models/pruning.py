"""Magnitude pruning: small weights of convolutions and linear layers become zero, and stay zero.

Han, Mao, Dally, "Deep Compression", ICLR 2016, arXiv:1510.00149; the threshold is the usual rule, a
sensitivity times the standard deviation of the layer's weights.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils import prune

from kdfast.errors import UsageError


class BelowSensitivity(prune.BasePruningMethod):
    """Prune weights of magnitude below `sensitivity` times the (population) standard deviation."""

    PRUNING_TYPE = "unstructured"

    def __init__(self, sensitivity: float):
        self.sensitivity = sensitivity

    def compute_mask(self, t: torch.Tensor, default_mask: torch.Tensor) -> torch.Tensor:
        return default_mask * (t.abs() >= self.sensitivity * t.std(correction=0))


class WeightMasks(nn.Module):
    """Which weights of a network are kept: a boolean buffer for each pruned parameter.

    As buffers, masks are in the checkpoints of a run and move with it.
    """

    def __init__(self, masks: dict[str, torch.Tensor]):
        super().__init__()
        for name, mask in masks.items():
            self.register_buffer(name.replace(".", "/"), mask)

    def masks(self) -> dict[str, torch.Tensor]:
        """By the parameter's name in the network."""
        return {name.replace("/", "."): mask for name, mask in self.named_buffers()}

    @torch.no_grad()
    def apply_to(self, model: nn.Module) -> None:
        """Set every other weight to zero, in place."""
        for name, mask in self.masks().items():
            model.get_parameter(name).masked_fill_(~mask, 0)

    def zero_share(self) -> float:
        """Weights that are zero, of all weights in the layers that are pruned."""
        masks = self.masks().values()
        return 1 - sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)


def prune_magnitude(model: nn.Module, conv: float, fc: float) -> WeightMasks:
    """Prune `model` in place: convolutions at sensitivity `conv`, linear layers at `fc`, from 0 up.

    Biases and normalisation stay whole.

    Raises:
        UsageError: a layer would keep no weight; a network without such layers.
    """
    # torch's pruning gives weights another name and place; of a copy, so that the model keeps its.
    scratch, masks = copy.deepcopy(model), {}
    for name, module in scratch.named_modules():
        if not isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            continue
        linear = isinstance(module, nn.Linear)
        sensitivity = fc if linear else conv
        BelowSensitivity.apply(module, "weight", sensitivity)
        mask = module.weight_mask.bool()
        if not mask.any():
            kind = "linear layers" if linear else "convolutions"
            raise UsageError(
                f"sensitivity {sensitivity:g} of {kind} prunes every weight of {name}; lower it"
            )
        masks[f"{name}.weight".lstrip(".")] = mask
    if not masks:
        raise UsageError(f"{type(model).__name__} has no convolution or linear layer to prune")
    found = WeightMasks(masks)
    found.apply_to(model)
    return found
