"""Accuracy on the test split of networks as they are, and of tails behind a Trans-Net."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator

from kdfast.data import ImageData
from kdfast.models import split_at
from kdfast.models.splice import sum_of_orders
from kdfast.training.evaluate import evaluate_all
from kdfast.training.features import Features
from kdfast.training.journal import say
from kdfast.training.tail import Tail
from kdfast.training.transnet_runs import TransNetRun

Scores = dict[str, float]


class Examiner:
    """Scores on the test split, from images to logits, as the spliced network itself would.

    Where a set has no test split, the evaluation split serves; no score of it selects anything.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        accelerator: Accelerator,
        data: ImageData,
        opened: TransNetRun,
    ):
        live = copy.copy(options)
        live.features = "live"  # the rows of a cache are rounded
        self.accelerator, self.opened = accelerator, opened
        self.split = "evaluation" if data.test is None else "test"
        self.loader = Features(live, accelerator, data, [opened.a, opened.b]).loader("test")

    def say_split(self, data: ImageData) -> None:
        """Say once what is scored on."""
        count = f"{self.loader.plan.size} images"
        if self.split == "test":
            say(f"tails are scored on the test split of {data.name}, {count}")
        else:
            say(
                f"note: {data.name} has no test split; its evaluation split, {count}, serves, on "
                "which the best epochs were chosen as well"
            )

    def before(self, subsets: Sequence[str]) -> dict[str, Scores]:
        """Of `a` and `b` as they are, and of B's tail as it is: on `subsets`, and on its `own`."""
        net, a, b = self.opened.net, self.opened.a, self.opened.b
        masks = [tuple(map(int, subset)) for subset in subsets]
        _, tail = split_at(b.network, b.layer)

        def answer(images: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
            feature, logits_a = a.features(images[0], logits=True)
            _, logits_b = b.features(images[1], logits=True)
            return [logits_a, logits_b, *(tail(_orders(net, feature, mask)) for mask in masks)]

        scores = self._score(answer, 2 + len(masks))
        return dict(zip(("a", "b", *subsets), scores, strict=True)) | {"own": scores[1]}

    def score(self, tails: Sequence[Tail], mask: Sequence[int] | None) -> list[Scores]:
        """Of each tail on the orders in `mask`, or on B's own feature."""
        net, a, b = self.opened.net, self.opened.a, self.opened.b

        def answer(images: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
            if mask is None:
                feature = b.features(images[1])
            else:
                feature = _orders(net, a.features(images[0]), mask)
            return [tail(feature)[0] for tail in tails]

        return self._score(answer, len(tails))

    def _score(self, answer: Any, count: int) -> list[Scores]:
        try:
            scores = evaluate_all(answer, count, self.loader, self.accelerator, lambda x: x)
        finally:
            self.loader.close()
        return [{key: own[key] for key in ("top1", "top5", "loss", "images")} for own in scores]


def _orders(net: torch.nn.Module, feature: torch.Tensor, mask: Sequence[int]) -> torch.Tensor:
    with torch.autocast(feature.device.type, enabled=False):
        return sum_of_orders(net, feature, mask)
