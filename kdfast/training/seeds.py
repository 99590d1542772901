"""One run, or the same run with several seeds: `--seeds 0 1 2`."""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from accelerate import Accelerator

from kdfast.training.run_folder import RunFolder, on_main


def for_each_seed(
    options: argparse.Namespace,
    accelerator: Accelerator,
    *,
    folder: Callable[[argparse.Namespace], RunFolder],
    train: Callable[[argparse.Namespace, RunFolder], dict[str, Any]],
    scores: Sequence[str] = ("top1",),
) -> None:
    """Train with every seed into `folder(options)`, saying each run's results as a line of JSON.

    With `--seeds` the last line has mean and standard deviation of `scores` over them. No run
    begins before all folders are known to be free (or, with `--resume auto`, to be gone on with).
    """
    runs = [(own, folder(own)) for own in _one_by_one(options)]
    for own, run in runs:
        on_main(accelerator, lambda own=own, run=run: run.check(resume=own.resume is not None))
    results = []
    for own, run in runs:
        results.append(train(own, run))
        if accelerator.is_main_process:
            print(json.dumps(results[-1]), flush=True)
    if options.seeds:
        summary = {
            "runs": [result["run"] for result in results],
            "seeds": options.seeds,
        } | {
            f"{kind}_{score}": _spread([result[kind][score] for result in results])
            for kind in ("last", "best")
            for score in scores
        }
        if accelerator.is_main_process:
            print(json.dumps(summary), flush=True)


def _one_by_one(options: argparse.Namespace) -> Iterator[argparse.Namespace]:
    if not options.seeds:
        yield options
        return
    for seed in options.seeds:
        own = copy.copy(options)
        own.seed, own.seeds = seed, None
        own.experiment = options.experiment and f"{options.experiment}-s{seed}"
        yield own


def _spread(values: list[float]) -> dict[str, float | None]:
    """Mean and sample standard deviation, None for a single value."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "std": deviation}
