"""Run folders, found and read."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kdfast.analysis.records import (
    SCORES,
    fail,
    read_arguments,
    read_results,
    read_summary,
    read_text,
)
from kdfast.errors import UserError

# Folders inside a run that hold no run to report on; a first stage is a part of its own.
_INNER = {"checkpoints", "tensorboard", "weights", "profile", "first-stage"}

# Runs that train no classifier, by the `kind` in their options, and what they hold.
_NO_NETWORK = {
    "linear": "heads of a frozen teacher",
    "transnet": "a Trans-Net of two networks",
    "tail": "a tail fine-tuned on orders of a feature",
    "sigma": "sigma maps of a network",
}


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: its folder.
        options, environment: of `args.yaml`.
        methods: distillation methods by name with their options; empty for a student alone, a
            teacher, or any other network trained on labels.
        teacher: its teacher's name; None without methods.
        curves: columns of `summary.csv` by name, a number an epoch; scores are in percent, and
            None of an epoch that was not evaluated.
        last, best: {epoch, top1, top5, loss}; best is of the first epoch of the highest top1.
        teacher_top1: percent; None without a teacher.
        parameters: count.
        aside: trained beside a distillation, as its `baseline/`.
    """

    path: Path
    options: dict[str, Any]
    environment: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    teacher: str | None
    curves: dict[str, list[float | None]]
    last: dict[str, float]
    best: dict[str, float]
    teacher_top1: float | None
    parameters: int
    aside: bool

    @property
    def seed(self) -> int:
        return self.options["seed"]

    @property
    def epochs(self) -> int:
        return self.options["epochs"]

    @property
    def network(self) -> str:
        return self.options["model"]

    @property
    def dataset(self) -> str:
        """The set's name; a `folder` set is told by the folder's name."""
        name = self.options["dataset"]
        if name == "folder" and "data-dir" in self.options:
            return f"{name} ({Path(str(self.options['data-dir'])).name})"
        return name


@dataclass(frozen=True)
class Unfinished:
    """A run without results: `done` of its `epochs` are in the summary."""

    path: Path
    done: int
    epochs: int


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """Run folders at and below `paths`, each once, in the order of their names.

    A chain of runs is no run itself, and its own files are passed over, as `CHAIN/*` names them
    too. Raises `UserError` for a path that is no folder, or that no run lies below.
    """
    found: dict[Path, Path] = {}
    paths = list(paths)
    whole = [path for path in paths if not (path.is_file() and _is_chain(path.parent))]
    for path in whole or paths:
        if not path.is_dir():
            what = "is a file" if path.exists() else "does not exist"
            raise UserError(f"{path} {what}; give run folders, or folders that hold some")
        below = []
        for here, inner, files in os.walk(path):
            # Within a run, what was trained behind a matched layer: its results have the scores.
            aside = {"classifier"} if "summary.csv" in files else set()
            inner[:] = sorted(set(inner) - _INNER - aside)
            if _is_run(Path(here), files) and not _is_chain(Path(here)):
                below.append(Path(here))
        if not below:
            raise UserError(f"no run at or below {path}: no args.yaml there; give run folders")
        for folder in below:
            found.setdefault(folder.resolve(), folder)
    return sorted(found.values())


def _is_run(path: Path, files: list[str]) -> bool:
    if "args.yaml" not in files and {"summary.csv", "results.json"} <= set(files):
        raise UserError(f"{path / 'args.yaml'} is missing; without it nobody knows what was run")
    return "args.yaml" in files


def _is_chain(path: Path) -> bool:
    """Whether `path` records runs that depend on one another: it has options, no rows, and runs."""
    if not (path / "args.yaml").is_file() or (path / "summary.csv").exists():
        return False
    parts = _INNER | {"baseline"}  # of a run that has not come to its rows yet
    return any(inner.parent.name not in parts for inner in path.glob("*/args.yaml"))


def read_runs(paths: Iterable[Path]) -> tuple[list[Run], list[Unfinished]]:
    """All runs of networks at and below `paths`; those of what hangs on one are passed over.

    Raises `UserError` as `find_runs` and `read_run` do, and where nothing else is left.
    """
    folders = find_runs(paths)
    others = {path: kind for path in folders if (kind := _kind(path)) in _NO_NETWORK}
    networks = [path for path in folders if path not in others]
    if not networks:
        what = _NO_NETWORK[others[folders[0]]]
        raise UserError(f"{folders[0]} holds {what}; give runs of networks")
    read = [read_run(path) for path in networks]
    return (
        [run for run in read if isinstance(run, Run)],
        [run for run in read if isinstance(run, Unfinished)],
    )


def _kind(path: Path) -> Any:
    return read_arguments(path / "args.yaml")[0].get("kind")


def read_run(path: Path) -> Run | Unfinished:
    """The run in folder `path`.

    Raises `UserError` when a file of it is damaged, contradicts another, or was written by a newer
    kdfast; the message names the file, the line where there is one, and what was expected.
    """
    options, environment = read_arguments(path / "args.yaml")
    results, summary = path / "results.json", path / "summary.csv"
    if not results.exists():
        # It may be running: its last row may be half written, and is not counted then.
        rows = read_text(summary).count("\n") - 1 if summary.exists() else 0
        return Unfinished(path, max(rows, 0), options["epochs"])
    if not summary.exists():
        raise UserError(f"{summary} is missing, yet {results.name} is there")
    content, last, best = read_results(results)
    curves = read_summary(summary)
    done, epochs = len(curves["epoch"]), options["epochs"]
    if last["epoch"] < epochs and done < epochs:
        return Unfinished(path, done, epochs)  # resumed for more epochs than the results are of
    wrong = partial(fail, results)
    if last["epoch"] != done:
        wrong("epoch", f"last epoch {done}, as summary.csv has rows, got {last['epoch']}")
    if done != epochs:
        wrong("epoch", f"last epoch {epochs}, as args.yaml says, got {done}")
    if content.get("seed") != options["seed"]:
        wrong("seed", f"seed {options['seed']}, as args.yaml says, got {content.get('seed')!r}")
    top1 = curves["eval_top1"]
    if top1[-1] is None:
        fail(summary, "", f"scores of the last epoch in line {done + 1}, got none")
    first_best = 1 + top1.index(max(score for score in top1 if score is not None))
    if best["epoch"] != first_best:
        wrong("best", f"best epoch {first_best}, as summary.csv says, got {best['epoch']}")
    for name, scores in (("last", last), ("best", best)):
        for score in SCORES:
            row = curves[f"eval_{score}"][scores["epoch"] - 1]
            if not _same(row, scores[score]):
                expected = f"{row} as in summary.csv, line {scores['epoch'] + 1}"
                wrong(name, f"{name} {score} {expected}, got {scores[score]}")
    methods = options.get("methods", {})
    if methods and content.get("teacher_top1") is None:
        wrong("teacher_top1", "teacher_top1, for there is a teacher")
    return Run(
        path=path,
        options=options,
        environment=environment,
        methods=methods,
        teacher=options["teacher"] if methods else None,
        curves=curves,
        last=last,
        best=best,
        teacher_top1=content.get("teacher_top1"),
        parameters=content["parameters"],
        aside=path.name == "baseline" and (path.parent / "args.yaml").is_file(),
    )


def _same(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-9) or (math.isnan(one) and math.isnan(other))
