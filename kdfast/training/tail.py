"""The part of a network behind a layer, as something the training loop can train and save."""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from torch import nn

from kdfast.errors import UsageError
from kdfast.models import architecture, split_at
from kdfast.training.tapped import Tapped


class Tail(nn.Module):
    """What of a copy of `network` lies behind `layer`, all of its parameters to be trained.

    `forward(feature)` -> (logits [N,C], ()), as a watched network answers. Parameters, buffers and
    modes are the tail's alone; `model` is the whole network, whose weights are saved. With
    `sync_bn` batch normalisation takes its statistics over all processes.

    Raises:
        UsageError: a network that cannot be cut there, or of which the tail has no parameters, or
            others in training than in evaluation (auxiliary classifiers).
    """

    def __init__(self, network: nn.Module, layer: str, *, sync_bn: bool = False):
        super().__init__()
        network = copy.deepcopy(network).requires_grad_(False).eval()
        if sync_bn:
            network = convert_sync_batchnorm(network)
        _, tail = split_at(network, layer)
        # Once each: the two versions of a cut network's code share their layers. In a list, so that
        # neither the whole network nor a layer's second name is a part of this one.
        self.layers = tail.when_evaluating
        self._whole = [network, tail]
        trained = list(self.layers.parameters())
        if not trained:
            raise UsageError(
                f"{architecture(network)} has no weights behind layer '{layer}', so nothing to "
                "fine-tune; choose a layer before it"
            )
        if {id(p) for p in tail.parameters()} != {id(p) for p in trained}:
            raise UsageError(
                f"{architecture(network)} has weights behind layer '{layer}' that take part in "
                "training only (auxiliary classifiers); its tail cannot be fine-tuned"
            )
        for parameter in trained:
            parameter.requires_grad_(True)

    @property
    def model(self) -> nn.Module:
        return self._whole[0]

    def train(self, mode: bool = True) -> Tail:
        network, tail = self._whole
        super().train(mode)
        tail.train(mode)
        network.training = mode  # by which a cut network chooses its code
        return self

    def forward(self, feature: torch.Tensor) -> tuple[torch.Tensor, tuple[Any, ...]]:
        return self._whole[1](feature), ()


@torch.no_grad()
def check_tail(b: Tapped) -> None:
    """Refuse a network whose tail, fed the feature as it is watched, does not answer as the whole.

    Tokens that are watched as maps, for example, are not what the next layer takes.
    """
    _, tail = split_at(b.network, b.layer)
    images = torch.arange(3 * b.inputs.size[0] * b.inputs.size[1]).remainder(251).byte()
    feature, logits = b.features(images.view(1, 3, *b.inputs.size), logits=True)
    try:
        answer = tail(feature)
        fits = torch.allclose(answer.float(), logits, rtol=1e-3, atol=1e-3)
    except (RuntimeError, ValueError, TypeError, AssertionError, LookupError):
        fits = False
    if not fits:
        raise UsageError(
            f"layer '{b.layer}' of B ({architecture(b.network)}) is watched as "
            f"{'x'.join(map(str, b.shape))}, which is not what its tail takes; train a Trans-Net "
            "to another --layer-b"
        )
