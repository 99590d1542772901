"""Networks trained, pruned by magnitude, and trained further with what was pruned held at zero."""

from __future__ import annotations

import argparse
from typing import Any

from accelerate import Accelerator
from torch import nn

from kdfast.data import ImageData
from kdfast.errors import UsageError
from kdfast.models import checksum
from kdfast.models.pruning import prune_magnitude
from kdfast.training.classifier import train_classifier
from kdfast.training.journal import say
from kdfast.training.run_folder import RunFolder
from kdfast.training.setup import Inputs

# Of convolutions and linear layers, in the published comparison (its checkpoint's name).
SENSITIVITIES = (0.2, 1.0)


def check_pruning(options: argparse.Namespace) -> None:
    """Refuse `--prune` where no trained weights come in, or none are trained."""
    if not options.prune:
        return
    if options.eval_only:
        raise UsageError("--eval-only scores weights as they are; drop --prune")
    if not options.initial_checkpoint and not options.pretrained:
        raise UsageError(
            "--prune needs a trained network: give --initial-checkpoint PATH or --pretrained"
        )


def train_pruned(
    options: argparse.Namespace,
    accelerator: Accelerator,
    data: ImageData,
    model: nn.Module,
    inputs: Inputs,
    run: RunFolder,
    *,
    resume: bool,
) -> dict[str, Any]:
    """`train_classifier` of `model`, its small weights gone as `options.prune` says.

    Results and the record of the weights have `zero_share`: weights at zero, of all in
    convolutions and linear layers; the weights' `parent` is the network before it was pruned.
    """
    conv, fc = options.prune
    parent = checksum(model.state_dict())
    masks = prune_magnitude(model, conv, fc)
    say(
        f"{100 * masks.zero_share():.1f} % of the weights in {len(masks.masks())} layers are pruned"
    )
    return train_classifier(
        options, accelerator, data, model, inputs, run,
        resume=resume, parent=parent, masks=masks, **{"parent-checksum": parent},
    )  # fmt: skip
