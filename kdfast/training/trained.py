"""Networks that somebody trained: rebuilt from a weights file as its record says."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import nn

from kdfast.data import ImageData
from kdfast.models import create_model, read_weights, resolve_name
from kdfast.training.setup import (
    Inputs,
    choose_inputs,
    load_checkpoint,
    recorded_inputs,
    try_out,
)


def load_trained(
    name: str,
    path: Path | None,
    kwargs: dict[str, Any] | None,
    options: argparse.Namespace,
    data: ImageData,
    *,
    pretrained: bool = False,
) -> tuple[nn.Module, Inputs, dict[str, Any]]:
    """Network `name` with the weights of `path`, what it is fed, and its constructor's arguments.

    Those are `kwargs`, or where None is given what the file records; so are size, mean and std,
    which the flags in `options` tell where the file does not. Without `path`, published weights
    where `pretrained`, else fresh ones.
    """
    known: dict[str, Any] = {}
    fed = None
    own_kwargs = dict(kwargs or ())
    if path is not None:
        known = read_weights(path)[1]
        fed = recorded_inputs(path, known)
        full = resolve_name(name)
        # Another network's arguments would only hide that the file does not fit.
        same = known.get("architecture") in (full, full.partition(".")[0])
        if same and kwargs is None and isinstance(known.get("model_kwargs"), dict):
            own_kwargs = known["model_kwargs"]
    model = create_model(
        name, data.classes, pretrained=pretrained, img_size=fed and fed.size, **own_kwargs
    )
    if path is not None:
        load_checkpoint(model, path)
    if fed is None:
        own = argparse.Namespace(**vars(options))
        own.pretrained, own.initial_checkpoint = pretrained, None
        if path is None:
            # Published weights, or those of a run to come: fed what they are trained on, whatever
            # another network gets. A bare file says nothing, so the flags hold for it as well.
            own.img_size = own.mean = own.std = None
        fed = choose_inputs(own, data, model)
    try_out(model, fed, data.classes)
    return model, fed, own_kwargs
