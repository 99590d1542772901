"""Sigma runs of several networks, checked to be comparable, on the images they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdfast.errors import UsageError, UserError
from kdfast.training.sigma_files import SigmaRun, read_options

_HELP = "give --student RUN --baseline RUN, run folders of train/sigma.py"
# Options that must agree, and what to call them; those of the images come after.
_ALIKE = {"layer": "layer", "model": "network", "grid": "grid", "dataset": "data set"}
_INPUTS = ("size", "mean", "std")  # sigma is in units of the normalised input
_IMAGES = ("seed", "train-split", "train-half", "train-limit", "box-margin")


@dataclass(frozen=True, eq=False)
class Shared:
    """What the runs in `runs`, by role, have in common.

    Attributes:
        runs, paths: by role: `student`, `baseline` and perhaps `teacher`.
        epochs: checkpoints, ascending.
        ids: of the images that are looked at, ascending: those accepted in all runs, or all that
            were tried in all.
        tried: of the images that were tried in all runs, accepted or not.
        unselected: those of `tried` that can be counted in: with both regions and without a
            result that is not finite.
        apart_epochs: those of `epochs` at which all of `unselected` have results in all runs.
        left_out: images that would be looked at, but have no region or no finite entropy at some
            checkpoint in some run.
        selected: whether images had to be accepted.
    """

    runs: Mapping[str, SigmaRun]
    paths: Mapping[str, Path]
    epochs: list[int]
    ids: list[int]
    tried: list[int]
    unselected: list[int]
    apart_epochs: list[int]
    left_out: list[int]
    selected: bool

    def entropy(self, role: str, ids: Sequence[int], epochs: Sequence[int]) -> np.ndarray:
        """[ids, epochs, G, G] float64."""
        run = self.runs[role]
        columns = [run.epochs.index(epoch) for epoch in epochs]
        return run.entropy[np.ix_(positions(run, ids), columns)]

    def foreground(self, ids: Sequence[int]) -> np.ndarray:
        """[ids, G, G] bool, the same in all runs."""
        run = next(iter(self.runs.values()))
        return run.foreground[positions(run, ids)]

    def path_length(self, role: str) -> np.ndarray | None:
        """[epochs] float64, None where the run has no record of it."""
        run = self.runs[role]
        if run.path_length is None:
            return None
        return run.path_length[[run.epochs.index(epoch) for epoch in self.epochs]]


def positions(run: SigmaRun, ids: Sequence[int]) -> list[int]:
    """Where images are in the arrays of a run."""
    place = {number: i for i, number in enumerate(run.ids)}
    return [place[number] for number in ids]


def find_pair(output: Path) -> tuple[Path, Path]:
    """The one student and its baseline that have sigma runs in folder `output`.

    They are known by the runs they are of: RUN and RUN/baseline, at one layer and seed. Raises
    `UsageError` where there is none or several.
    """
    found: dict[tuple[Any, ...], list[tuple[Path, Any]]] = {}
    for path in sorted(output.glob("*/candidates.csv")):
        try:
            options = read_options(path.parent)
        except UserError:
            continue  # another script's folder, or a damaged one: asked for by name, it says why
        key = (str(options.get("run")), options["layer"], options.get("seed"))
        found.setdefault(key, []).append((path.parent, options["settings"]))
    pairs = [
        (student, baseline)
        for (run, *rest), students in found.items()
        for student in students
        for baseline in found.get((str(Path(run) / "baseline"), *rest), [])
    ]
    if not pairs:
        raise UsageError(
            f"no sigma runs of a student and its baseline in {output}: run train/sigma.py, or "
            f"{_HELP}"
        )
    # Those that can be compared first.
    pairs.sort(key=lambda pair: pair[0][1] != pair[1][1])
    (student, _), (baseline, _) = pairs[0]
    if len(pairs) > 1:
        raise UsageError(
            f"{len(pairs)} pairs of student and baseline have sigma runs in {output}: {_HELP}, "
            f"such as --student {student} --baseline {baseline}"
        )
    return student, baseline


def share(
    runs: Mapping[str, SigmaRun],
    paths: Mapping[str, Path],
    checkpoints: Sequence[int] | None,
    *,
    selected: bool = True,
) -> Shared:
    """The images and checkpoints that all runs have.

    Args:
        checkpoints: epochs to look at; None takes all that are in every run.
        selected: whether only accepted images count; else all that were tried in all runs.

    Raises:
        UserError: runs that cannot be compared, naming both; no image that all accepted; without
            `selected`, tried images without results at some checkpoint.
        UsageError: a checkpoint that a run does not have.
    """
    first, *others = runs
    for other in others:
        check_comparable(paths[first], runs[first], paths[other], runs[other])
    epochs = _epochs(runs, paths, checkpoints)
    tried = _intersection(set(run.tried) for run in runs.values())
    unselected = _measurable(runs, tried, epochs)
    gaps = {epoch: unselected - _there(runs, epoch) for epoch in epochs}
    apart_epochs = [epoch for epoch in epochs if unselected and not gaps[epoch]]
    if selected:
        wanted = _accepted(runs, paths)
    else:
        _check_all_there(paths, tried, gaps)
        wanted = tried
    finite = _finite(runs, epochs)
    ids = sorted(wanted & finite)
    if not ids:
        everywhere = ", ".join(map(str, paths.values()))
        which = "accepted" if selected else "tried"
        raise UserError(
            f"every image {which} in all of {everywhere} has no region or no finite entropy at "
            "some checkpoint"
        )
    return Shared(
        runs, paths, epochs, ids, sorted(tried), sorted(unselected), apart_epochs,
        sorted(wanted - finite), selected,
    )  # fmt: skip


def _measurable(runs: Mapping[str, SigmaRun], tried: set[int], epochs: Sequence[int]) -> set[int]:
    """Images of `tried` that have both regions, and no result at `epochs` that is not finite.

    Those without results in any run lack a region; nothing was to be computed of them.
    """
    found = tried & set().union(*(run.ids for run in runs.values()))
    for run in runs.values():
        columns = [run.epochs.index(epoch) for epoch in epochs]
        unsound = ~np.isfinite(run.entropy[:, columns]).all((2, 3)) & run.made[:, columns]
        gone = unsound.any(1) | ~_both_regions(run)
        found -= {number for number, yes in zip(run.ids, gone, strict=True) if yes}
    return found


def _there(runs: Mapping[str, SigmaRun], epoch: int) -> set[int]:
    """Images that have a result at `epoch` in all runs."""
    return _intersection(
        {i for i, yes in zip(run.ids, run.made[:, run.epochs.index(epoch)], strict=True) if yes}
        for run in runs.values()
    )


def _check_all_there(
    paths: Mapping[str, Path], tried: set[int], gaps: Mapping[int, set[int]]
) -> None:
    """Raise `UserError` where images were tried, but have no results at some checkpoint."""
    everywhere = ", ".join(map(str, paths.values()))
    if not tried:
        raise UserError(f"no image was tried in all of {everywhere}; resume train/sigma.py")
    missing = sorted(set().union(*gaps.values()))
    if missing:
        shown = " ".join(map(str, missing[:10])) + (" ..." if len(missing) > 10 else "")
        complete = [str(epoch) for epoch, gap in gaps.items() if not gap]
        instead = f", or look at --checkpoints {' '.join(complete)}" if complete else ""
        raise UserError(
            f"--all-images: {len(missing)} of the {len(tried)} images that were tried in all of "
            f"{everywhere} have no results at some of the checkpoints {' '.join(map(str, gaps))} "
            f"(images {shown}); give train/sigma.py --keep-rejected{instead}"
        )


def _accepted(runs: Mapping[str, SigmaRun], paths: Mapping[str, Path]) -> set[int]:
    """Those accepted in all runs; raises `UserError` where there is none."""
    remedy = "look at all images with --all-images, or accept more with train/sigma.py"
    for role, run in runs.items():
        if not run.accepted.any():
            raise UserError(
                f"{paths[role]} has no accepted image, its candidates.csv has the reasons; {remedy}"
            )
    found = _intersection(
        {i for i, yes in zip(run.ids, run.accepted, strict=True) if yes} for run in runs.values()
    )
    if not found:
        raise UserError(
            f"no image was accepted in all of {', '.join(map(str, paths.values()))}; {remedy} "
            "(--images, --candidates)"
        )
    return found


def check_comparable(one: Path, first: SigmaRun, other: Path, second: SigmaRun) -> None:
    """Raise `UserError`, naming both, where two runs differ in what sigmas depend on."""
    pairs = [(words, first.record.get(k), second.record.get(k)) for k, words in _ALIKE.items()]
    fed = [run.record.get("inputs") or {} for run in (first, second)]
    pairs += [(f"input {name}", *(own.get(name) for own in fed)) for name in _INPUTS]
    pairs += [(f"--{key}", first.record.get(key), second.record.get(key)) for key in _IMAGES]
    settings = [run.record["settings"] for run in (first, second)]
    for name in sorted(settings[0].keys() | settings[1].keys()):
        pairs.append((f"setting {name}", *(own.get(name) for own in settings)))
    for words, mine, theirs in pairs:
        if mine != theirs:
            raise UserError(
                f"{one} and {other} cannot be compared: the {words} is {mine} in the one and "
                f"{theirs} in the other"
            )
    both = sorted(set(first.ids) & set(second.ids))
    for number in both:
        (i,), (j,) = positions(first, [number]), positions(second, [number])
        if first.indices[i] != second.indices[j]:
            raise UserError(
                f"{one} and {other} have other lists of images: candidate {number} is image "
                f"{first.indices[i]} in the one and {second.indices[j]} in the other; run "
                "train/sigma.py for both with the same data, --candidates and --seed"
            )
        if (first.foreground[i] != second.foreground[j]).any():
            raise UserError(
                f"{one} and {other} have different foregrounds of candidate {number}; run "
                "train/sigma.py for both with the same data and --expand-foreground"
            )


def _epochs(
    runs: Mapping[str, SigmaRun], paths: Mapping[str, Path], wanted: Sequence[int] | None
) -> list[int]:
    if wanted is None:
        found = sorted(_intersection(set(run.epochs) for run in runs.values()))
        if not found:
            raise UserError(f"{', '.join(map(str, paths.values()))} share no checkpoint")
        return found
    for role, run in runs.items():
        for epoch in wanted:
            if epoch not in run.epochs:
                there = " ".join(map(str, run.epochs))
                raise UsageError(
                    f"--checkpoints {epoch} is not in {paths[role]}, which has {there}"
                )
    return sorted(set(wanted))


def _finite(runs: Mapping[str, SigmaRun], epochs: Sequence[int]) -> set[int]:
    """Images with both regions whose entropies are finite at all of `epochs` in all runs."""
    return _intersection(_finite_in(run, epochs) for run in runs.values())


def _finite_in(run: SigmaRun, epochs: Sequence[int]) -> set[int]:
    columns = [run.epochs.index(epoch) for epoch in epochs]
    fine = np.isfinite(run.entropy[:, columns]).all((1, 2, 3))
    fine &= _both_regions(run)
    return {number for number, yes in zip(run.ids, fine, strict=True) if yes}


def _both_regions(run: SigmaRun) -> np.ndarray:
    """[I] bool."""
    return run.foreground.any((1, 2)) & ~run.foreground.all((1, 2))


def _intersection(sets) -> set[int]:
    first, *others = sets
    return first.intersection(*others)
