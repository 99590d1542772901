"""A trained network that is only watched: frozen, at one layer."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from kdfast.data import ImageData, to_float
from kdfast.errors import UsageError, UserError
from kdfast.models import (
    InputAdapter,
    Taps,
    architecture,
    checksum,
    default_tap,
    find_layer,
    read_weights,
    resolve_name,
    shapes_of,
    split_at,
)
from kdfast.training.setup import Inputs, weights_path
from kdfast.training.trained import load_trained


def exact_convolutions():
    """A context in which convolutions on a GPU do not round float32 to TF32."""
    backend = torch.backends.cudnn
    return backend.flags(
        enabled=backend.enabled,
        benchmark=backend.benchmark,
        deterministic=backend.deterministic,
        allow_tf32=False,
    )


@dataclass(frozen=True, eq=False)
class Tapped:
    """`network`, frozen and in evaluation mode on its device, watched at `layer` (as for `Taps`).

    `shape` is that of one image's feature, (C, H, W) or (C,); `checksum` that of the weights, which
    lie at `path`; `classes` the number of its logits; `inputs` what it is fed.
    """

    name: str
    network: nn.Module
    layer: str
    inputs: Inputs
    shape: tuple[int, ...]
    checksum: str
    path: Path | None
    classes: int
    model_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        network, inputs = self.network.requires_grad_(False).eval(), self.inputs
        device = next(network.parameters()).device
        figures = (
            torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (inputs.mean, inputs.std)
        )
        resize = InputAdapter(inputs.mean, inputs.std, inputs.mean, inputs.std, inputs.size)
        parts = _cut(network, self.layer, self.shape, inputs.size)
        for key, value in (("_figures", tuple(figures)), ("_resize", resize), ("_parts", parts)):
            object.__setattr__(self, key, value)
        object.__setattr__(self, "_taps", None if parts else Taps(network, [self.layer]))

    @torch.no_grad()
    def features(
        self, images: torch.Tensor, *, logits: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The layer's feature [N, *shape] of uint8 images [N, 3, H, W] as a loader gives them.

        float32, without TF32, on the network's device whatever precision training runs in; with
        `logits` also those, [N, classes]. Images are normalised, and resized (bilinear,
        antialiased) where they are not of the network's size. Without `logits` nothing behind the
        layer runs where the network can be cut there (`split_at`).
        """
        mean, std = self._figures
        # Alike in whoever asks: a cache's maker, training and reports.
        with torch.autocast(mean.device.type, enabled=False), exact_convolutions():
            x = self._resize(to_float(images.to(mean.device, non_blocking=True), mean, std))
            if self._parts is None:
                answer, (feature,) = self._taps(x)
            else:
                head, tail = self._parts
                feature = head(x)
                answer = tail(feature) if logits else None
        return (feature.float(), answer.float()) if logits else feature.float()

    def record(self) -> dict[str, Any]:
        """What a file that depends on this network says of it; all JSON."""
        return {
            "architecture": architecture(self.network),
            "model_kwargs": self.model_kwargs,
            "classes": self.classes,
            "layer": self.layer,
            "shape": list(self.shape),
            "input_size": [3, *self.inputs.size],
            "mean": list(self.inputs.mean),
            "std": list(self.inputs.std),
            "checksum": self.checksum,
            "path": self.path and str(self.path.absolute()),
        }


@torch.no_grad()
def _cut(
    network: nn.Module, layer: str, shape: tuple[int, ...], size: tuple[int, int]
) -> tuple[nn.Module, nn.Module] | None:
    """Both sides of the layer; None where the network cannot be cut or the cut holds no map."""
    try:
        head, tail = split_at(network, layer)
    except UsageError:
        return None
    parameter = next(network.parameters())
    passed = head(torch.zeros(1, 3, *size, device=parameter.device, dtype=parameter.dtype))
    # Tokens, and the maps of channels-last models, are put into order by Taps alone.
    return (head, tail) if passed.shape[1:] == shape else None


def open_tapped(
    name: str,
    path: str | Path,
    layer: str | None,
    options: argparse.Namespace,
    data: ImageData,
    accelerator: Accelerator,
) -> Tapped:
    """Network `name` ("a" or "b") from a weights file or run folder, on the accelerator's device.

    `layer` None is its `default_tap`. Architecture, constructor arguments, input size, mean and std
    are what the file records; `options.model_a`, `model_b` or `model`, `model_kwargs` and the data
    flags tell where it does not.

    Raises:
        UsageError: unknown layer (with the closest names) or model; a layer that does not pass one
            map or vector an image.
        UserError: weights that do not fit the network, or are for another number of classes.
    """
    path = weights_path(path)
    wanted = getattr(options, f"model_{name}", None) or options.model
    model_name = wanted or _recorded_name(path) or "cifar_resnet20"
    network, inputs, kwargs = load_trained(
        model_name, path, options.model_kwargs or None, options, data
    )
    if layer is None:
        layer = default_tap(network, inputs.size)
    find_layer(network, layer)
    shape = tuple(shapes_of(network, [layer], inputs.size)[0])
    if len(shape) not in (1, 3):
        raise UsageError(
            f"layer '{layer}' of network {name.upper()} ({model_name}) passes {list(shape)} an "
            "image, neither a map [C, H, W] nor a vector [C]; choose another layer"
        )
    digest = checksum(network.state_dict())
    layout = torch.channels_last if options.channels_last else torch.preserve_format
    network = network.to(accelerator.device, memory_format=layout)
    return Tapped(name, network, layer, inputs, shape, digest, path, data.classes, kwargs)


def _recorded_name(path: Path) -> str | None:
    """The architecture that a weights file says it holds."""
    recorded = read_weights(path)[1].get("architecture")
    if not isinstance(recorded, str):
        return None
    try:
        return resolve_name(recorded)
    except UserError as error:
        raise UserError(
            f"{path}: its record has an {error}; name the network with --model"
        ) from None


def require_same_shape(a: Tapped, b: Tapped) -> None:
    """Refuse two networks whose features cannot be mapped onto each other element by element."""
    if a.shape != b.shape:
        said = " and ".join(
            f"layer '{net.layer}' of {net.name.upper()} ({architecture(net.network)}) gives "
            f"{'x'.join(map(str, net.shape))}"
            for net in (a, b)
        )
        raise UsageError(
            f"{said} an image; choose layers of one shape with --layer-a and --layer-b"
        )
