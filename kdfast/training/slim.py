"""The networks that an evolved generation is: dense, slim and masked dense; scored and on disk."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from kdfast.data import ImageData
from kdfast.errors import UsageError, UserError
from kdfast.metrics import count_operations, published_operations
from kdfast.models import (
    architecture,
    parameter_count,
    save_weights,
)
from kdfast.models.channel_graph import tracing
from kdfast.training.evaluate import evaluate_all
from kdfast.training.journal import say
from kdfast.training.run_folder import RunFolder, write_atomic
from kdfast.training.setup import Inputs, make_loaders, preparer
from kdfast.training.split_files import Split


class Examiner:
    """Scores the networks of a generation on the test split, all in one pass over it.

    Where a set has no test split, the evaluation split serves; no score of it selects anything.
    """

    def __init__(
        self, options: argparse.Namespace, accelerator: Accelerator, data: ImageData, inputs: Inputs
    ):
        self.options, self.accelerator, self.inputs = options, accelerator, inputs
        self.split = "evaluation" if data.test is None else "test"
        own = data if data.test is None else replace(data, eval=data.test, parts={})
        _, self.loader = make_loaders(options, own, inputs, accelerator)
        self.prepare = preparer(inputs, accelerator, channels_last=options.channels_last)

    def say_split(self, data: ImageData) -> None:
        """Say once what is scored on."""
        count = f"{self.loader.plan.size} images"
        if self.split == "test":
            say(f"generations are scored on the test split of {data.name}, {count}")
        else:
            say(
                f"note: {data.name} has no test split; its evaluation split, {count}, serves: last "
                "weights are scored, and it selects none of them"
            )

    def score(self, networks: dict[str, nn.Module]) -> dict[str, dict[str, Any]]:
        """`top1`, `top5`, `loss` and `images` of each; the networks end up on the device."""
        layout = torch.channels_last if self.options.channels_last else torch.preserve_format
        for network in networks.values():
            network.to(self.accelerator.device, memory_format=layout).eval()
        try:
            scores = evaluate_all(
                lambda x: [network(x) for network in networks.values()],
                len(networks),
                self.loader,
                self.accelerator,
                self.prepare,
            )
        finally:
            self.loader.close()
        return dict(zip(networks, scores, strict=True))


def counts_of(network: nn.Module, size: tuple[int, int]) -> dict[str, int]:
    """Parameters, operations, and operations in the convention of the published tables."""
    return {
        "parameters": parameter_count(network),
        "operations": count_operations(network, size),
        "published_operations": published_operations(network, size),
    }


def program_of(slim: nn.Module, inputs: Inputs) -> torch.export.ExportedProgram:
    """float32 [N, 3, H, W], normalised, to logits [N, C], for any N; raises `UsageError`."""
    example = torch.zeros(2, 3, *inputs.size)
    batch = {0: torch.export.Dim("batch", min=1)}
    try:
        with tracing():
            return torch.export.export(slim.eval(), (example,), dynamic_shapes=(batch,))
    except Exception as error:  # whatever a model's code provokes in the tracer
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UsageError(
            f"the slim {architecture(slim)} cannot be exported for batches of any size: {reason}; "
            "choose another network, or --split-mode wels"
        ) from None


def write_slim(
    run: RunFolder, slim: nn.Module, split: Split, inputs: Inputs, record: dict[str, Any]
) -> None:
    """Write `slim.safetensors`, `slim.pt2` and `slim.json`, each whole; on the main process only.

    The program loads with torch alone; `record` is what the weights' metadata and the JSON say.
    Raises `UserError` when a file cannot be written.
    """
    widths = {
        name.removesuffix(".weight"): {
            "dense": list(mask.shape),
            "slim": list(slim.get_parameter(name).shape),
        }
        for name, mask in split.masks.items()
    }
    save_weights(run.path / "slim.safetensors", slim, record)
    _save_program(run.path / "slim.pt2", program_of(slim, inputs))
    content = record | {"layers": widths}
    write_atomic(run.path / "slim.json", json.dumps(content, indent=2) + "\n")


def _save_program(path: Path, program: torch.export.ExportedProgram) -> None:
    temporary = path.with_name(f".tmp.{path.name}")
    try:
        torch.export.save(program, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}"
        ) from None
