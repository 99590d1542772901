"""The compiled training step: `--torchcompile`, `--compile-mode`."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn

from kdfast.errors import UsageError

MODES = ("default", "reduce-overhead", "max-autotune")


class Compiled:
    """How what is trained is compiled on `device`: student and all terms in one graph.

    In modes other than `default` CUDA replays a step as one graph. Gradients and losses then lie in
    memory that the next replay uses again; a step is over when that begins.

    Raises:
        UsageError: a mode that replays, with gradient accumulation on a GPU.
    """

    def __init__(self, options: argparse.Namespace, device: torch.device):
        gpu, accumulates = device.type == "cuda", options.grad_accum_steps > 1
        usual = "reduce-overhead" if gpu and not accumulates else "default"
        self.mode = options.compile_mode or usual
        self.replays = gpu and self.mode != "default"
        if self.replays and accumulates:
            raise UsageError(
                f"--compile-mode {self.mode} replays each micro-batch in the memory of the one "
                "before, where its gradients are; with --grad-accum-steps use default"
            )

    def __call__(self, objective: nn.Module) -> Any:
        # Batches have two or three sizes, and code for any size is slower.
        return torch.compile(objective, mode=self.mode, dynamic=False)

    def begin_step(self) -> None:
        """Call before each forward."""
        if self.replays:
            torch.compiler.cudagraph_mark_step_begin()
