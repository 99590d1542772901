"""What the networks for small images share: the head, timm's way of reaching it, and the record."""

from __future__ import annotations

import torch
from timm.layers import create_classifier
from torch import nn


class CifarNetwork(nn.Module):
    """Features, adaptive global pool, dropout, linear layer: [N,in_chans,H,W] -> [N,num_classes].

    A network registers the layers of its `forward_features`, then calls `add_head`: the linear
    layer is the last to be registered. `head` is its attribute's name.
    """

    head = "fc"

    def add_head(
        self, num_features: int, num_classes: int, global_pool: str, drop_rate: float
    ) -> None:
        self.num_features = self.head_hidden_size = num_features
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)

    def get_classifier(self) -> nn.Module:
        return getattr(self, self.head)

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        self.num_classes = num_classes
        self.global_pool, linear = create_classifier(
            self.num_features, num_classes, pool_type=global_pool
        )
        if num_classes > 0:
            self.init_head(linear)
        setattr(self, self.head, linear)

    def init_head(self, linear: nn.Linear) -> None:
        """The library's own draw, unless a network says otherwise."""

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def init_kaiming(model: nn.Module) -> None:
    """Convolutions from N(0, 2 / (k^2 * out)), their biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def init_small_head(linear: nn.Linear) -> None:
    """Weight from N(0, 0.01^2), bias 0."""
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)


def choose(argument: str, value: str, choices: tuple[str, ...]) -> str:
    """`value`, one of `choices`.

    Raises:
        ValueError: it is none of them.
    """
    if value not in choices:
        raise ValueError(f"{argument} must be {' or '.join(map(repr, choices))}, got {value!r}")
    return value


def default_cfg(classifier: str, pool_size: int, first_conv: str = "conv1") -> dict[str, object]:
    """timm's record of a network for 32x32 images of CIFAR-10."""
    return {
        "url": "",
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (pool_size, pool_size),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
        "first_conv": first_conv,
        "classifier": classifier,
        "license": "apache-2.0",
    }
