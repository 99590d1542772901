"""Trans-Nets from network A to several networks B: a folder of run folders."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from kdfast.data import ImageData
from kdfast.errors import UsageError
from kdfast.training.layout import FREE
from kdfast.training.links import Chain
from kdfast.training.pair_networks import pair_checkpoints
from kdfast.training.run_folder import RunFolder, on_main
from kdfast.training.setup import arguments_of
from kdfast.training.transnet import gate_weights
from kdfast.training.transnet_runs import train_pair

# No pair depends on another, so that epochs and networks B may be added; A and B are known by the
# checksums in each pair's record.
_FREE = frozenset(FREE | {"checkpoint-a", "checkpoint-b"})


class Comparison(Chain):
    """The folder of all pairs, made when the first of them begins."""

    free = _FREE


class Pair(RunFolder):
    """The run folder of pair `number`: `pair-0/`, `pair-1/`, ..."""

    free = _FREE

    def __init__(self, whole: Comparison, number: int):
        super().__init__(whole.path / f"pair-{number}")
        self.whole = whole

    def begin(self, arguments: dict[str, Any]) -> None:
        self.whole.enter()
        super().begin(arguments)


def train_pairs(
    options: argparse.Namespace, accelerator: Accelerator, data: ImageData, run: RunFolder
) -> dict[str, Any]:
    """Train a Trans-Net for each pair of networks that the options stand for.

    One pair's goes into `run`, those of several into folders pair-0 and so on below it. Returns the
    results, already written; those of several have each pair's in `pairs`, and in `last` and `best`
    means over them.

    Raises:
        UsageError: the folder, or a pair in it, was made with other options or networks, or holds
            more pairs than are asked for.
    """
    pairs = pair_checkpoints(options, accelerator, data)
    resume = options.resume is not None
    if len(pairs) == 1:
        on_main(accelerator, lambda: _check_parts(run.path, ()))
        return train_pair(options, accelerator, data, *pairs[0], run, resume=resume)
    record = arguments_of(options, accelerator, data, kind="transnet", alpha=gate_weights(options))
    whole = Comparison(run.path, record)
    parts = [Pair(whole, number) for number in range(len(pairs))]
    with whole.claimed(accelerator, record, resume=resume):
        on_main(accelerator, lambda: _check_parts(whole.path, parts))
        found = []
        for part, (a, b) in zip(parts, pairs, strict=True):
            begun = on_main(accelerator, part.path.exists)
            found.append(train_pair(options, accelerator, data, a, b, part, resume=begun))
        results = {
            "run": str(whole.path),
            "seed": options.seed,
            "processes": accelerator.num_processes,
            **{kind: _means([result[kind] for result in found]) for kind in ("last", "best")},
            "pairs": found,
        }
        on_main(accelerator, lambda: whole.write_results(results))
    return results


def _check_parts(path: Path, parts: Sequence[Pair]) -> None:
    """Refuse a folder with pairs that are not asked for: its results would not tell of them."""
    asked = {part.path.name for part in parts}
    there = {found.name for found in path.glob("pair-*") if re.fullmatch(r"pair-\d+", found.name)}
    if beyond := sorted(there - asked, key=lambda name: int(name[5:])):
        raise UsageError(
            f"{path} has {beyond[0]} too; give the networks B of all its pairs, or another "
            "--experiment"
        )


def _means(scores: list[dict[str, float]]) -> dict[str, float]:
    names = [name for name in scores[0] if name != "epoch"]
    return {name: sum(one[name] for one in scores) / len(scores) for name in names}
