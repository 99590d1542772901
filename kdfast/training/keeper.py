"""What a run scores and saves after every epoch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn

from kdfast.data import Loader
from kdfast.models import save_weights
from kdfast.training.evaluate import evaluate
from kdfast.training.run_folder import RunFolder

SCORES = ("top1", "top5", "loss")


class Keeper(Protocol):
    """Scores and saves `scored`, the objective's student or the average of its weights.

    `score_names` are what `evaluate` answers with, in that order.
    """

    score_names: list[str]

    def keep_beginning(self, scored: nn.Module) -> None:
        """Write the weights of epoch 0, where they are asked for; on the main process only.

        Called before the first step of a run that begins, not of one that is resumed.
        """

    def evaluate(
        self,
        scored: nn.Module,
        loader: Loader,
        accelerator: Accelerator,
        prepare: Callable[[torch.Tensor], torch.Tensor],
        before_batch: Callable[[], None],
    ) -> dict[str, float]:
        """`loss`, `top1`, `top5` and what else the summary is to hold, each as `eval_<name>`."""

    def remember(self, history: dict[str, Any], row: dict[str, Any]) -> bool:
        """Keep the scores of summary row `row` in `history`; whether it is the best epoch."""

    def save(self, scored: nn.Module, row: dict[str, Any], better: bool) -> None:
        """Write the weights of the epoch of `row`; on the main process only.

        Scores of an epoch that was not evaluated are None; it is not better then.
        """


class StudentKeeper:
    """One network: `last.safetensors`, `best.safetensors`, and `weights/` of `save_epochs`.

    `metadata` goes into each file. The best epoch is that of the highest top-1, the first on ties,
    of those that were evaluated. Epoch 0 of `save_epochs` is the network as training begins.
    `parts` are scored apart, too: see `evaluate`.
    """

    def __init__(
        self,
        run: RunFolder,
        metadata: dict[str, Any],
        save_epochs: Collection[int] = (),
        parts: Mapping[str, range] = MappingProxyType({}),
    ):
        self.run, self.metadata, self.save_epochs, self.parts = run, metadata, save_epochs, parts
        self.score_names = ["loss", "top1", "top5", *(f"top1_{name}" for name in parts)]

    def keep_beginning(self, scored: nn.Module) -> None:
        if 0 in self.save_epochs:
            save_weights(
                self.run.epoch_weights(0), scored.model, self.metadata | {"epoch": 0, "top1": None}
            )

    def evaluate(self, scored, loader, accelerator, prepare, before_batch) -> dict[str, float]:
        scores = evaluate(
            lambda x: scored(x)[0], loader, accelerator, prepare, before_batch, self.parts
        )
        return {name: scores[name] for name in self.score_names}

    def remember(self, history: dict[str, Any], row: dict[str, Any]) -> bool:
        names = [*SCORES, *(f"top1_{name}" for name in self.parts)]
        scores = {"epoch": row["epoch"]} | {name: row[f"eval_{name}"] for name in names}
        better = history["best"] is None or scores["top1"] > history["best"]["top1"]
        history["last"] = scores
        if better:
            history["best"] = scores
        return better

    def save(self, scored: nn.Module, row: dict[str, Any], better: bool) -> None:
        epoch = row["epoch"]
        metadata = self.metadata | {"epoch": epoch, "top1": row["eval_top1"]}
        names = ["last"] + ["best"] * better
        paths = [self.run.weights(name) for name in names]
        if epoch in self.save_epochs:
            paths.append(self.run.epoch_weights(epoch))
        for path in paths:
            save_weights(path, scored.model, metadata)
