"""What sigma training leaves: one file for each image and checkpoint, whole or not there.

A sigma run folder holds args.yaml, train.log, candidates.csv, results.json once it is finished,
results/image-00012/image.npz and results/image-00012/epoch-0040.npz. Files are npz without pickled
objects; equal contents are equal bytes.
"""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from kdfast.errors import UserError
from kdfast.training.run_folder import write_atomic

COLUMNS = ("id", "index", "name", "label", "status", "reason")
STATUSES = ("accepted", "rejected", "unfinished")
PATH_LENGTH = "path_length.csv"
# What a file is made of and must share with its run: as JSON, under "made_of".
_MAP = ("sigma", "entropy")
_CURVES = ("mean_entropy", "feature_loss", "penalty")
_NUMBERS = ("delta2", "selected", "steps_run")
_DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, TypeError)


@dataclass(frozen=True, eq=False)
class SigmaRun:
    """The finished results of a sigma run; I images in the order of their ids, M checkpoints.

    Attributes:
        entropy: [I, M, G, G] float64, nats; NaN where an image that was not accepted has no result.
        foreground: [I, G, G] bool.
        made: [I, M] bool, whether there is a result; one without an answer has entropies of NaN.
        epochs: M completed epochs, ascending.
        ids: position in the list of candidates; two runs share it where `record` has the same
            dataset, candidates and seed.
        tried: ids of all candidates with a verdict, of those without results, too: an image
            without foreground or background is rejected before anything is computed.
        accepted: [I] bool; these have all checkpoints.
        names: what the data set calls the images.
        path_length: [M] float64, of the examined layer's weights from epoch 0 on (its sum over
            iterations); None where training did not record it.
        record: the run's options, as args.yaml has them, and `candidates`, `rejected` and
            `finished` as numbers and a truth value.
        labels, indices: class and data set index of each image.
    """

    entropy: np.ndarray
    made: np.ndarray
    foreground: np.ndarray
    epochs: list[int]
    ids: list[int]
    tried: list[int]
    accepted: np.ndarray
    names: list[str]
    path_length: np.ndarray | None
    record: dict[str, Any]
    labels: list[int]
    indices: list[int]


def image_folder(run: Path, image: int) -> Path:
    return run / "results" / f"image-{image:05d}"


def result_path(run: Path, image: int, epoch: int) -> Path:
    return image_folder(run, image) / f"epoch-{epoch:04d}.npz"


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write `arrays` so that a reader sees the old file or the whole new one.

    Raises `UserError` when it cannot be written.
    """
    content = io.BytesIO()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    np.savez(content, allow_pickle=False, **arrays)
    write_atomic(path, content.getvalue())


def write_picture(path: Path, entropy: np.ndarray, low: float, high: float) -> None:
    """A heat map of `entropy` [G, G] as PNG, black at `low` nats and white at `high`."""
    from matplotlib.image import imsave

    content = io.BytesIO()
    enlarged = np.kron(entropy, np.ones((14, 14)))
    imsave(content, enlarged, vmin=low, vmax=high, cmap="hot", format="png")
    write_atomic(path, content.getvalue())


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays in `path`; raises `UserError` when it is missing, damaged or holds objects."""
    try:
        # Opened here: numpy leaves a damaged file open.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UserError(f"{path} is missing; resume the sigma run to make it again") from None
    except _DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{path} is damaged ({reason}); remove it and resume the sigma run"
        ) from None


def write_result(
    run: Path, image: int, epoch: int, arrays: Mapping[str, np.ndarray], made_of: dict[str, Any]
) -> None:
    """Write the result of an image at a checkpoint.

    Args:
        arrays: sigma and entropy [G, G], mean_entropy, feature_loss and penalty [steps], delta2,
            selected and steps_run [].
        made_of: what the result depends on; a reader compares it.
    """
    text = json.dumps(made_of, sort_keys=True)
    write_npz(result_path(run, image, epoch), {**arrays, "made_of": np.array(text)})


def read_result(
    run: Path, image: int, epoch: int, made_of: dict[str, Any]
) -> dict[str, np.ndarray]:
    """The arrays of `write_result`.

    Raises `UserError` for a file that is missing, damaged or made of something else, naming it.
    """
    path = result_path(run, image, epoch)
    arrays = read_npz(path)
    try:
        theirs = json.loads(str(arrays.pop("made_of")))
        grid = arrays["sigma"].shape
        whole = (
            len(grid) == 2
            and all(arrays[name].shape == grid for name in _MAP)
            and all(arrays[name].ndim == 1 for name in _CURVES)
            and all(arrays[name].shape == () for name in _NUMBERS)
            and all(arrays[name].dtype == np.float64 for name in (*_MAP, *_CURVES, "delta2"))
        )
    except (KeyError, ValueError):
        whole, theirs = False, None
    if not whole or not isinstance(theirs, dict):
        raise UserError(f"{path} is no result of sigma training; remove it and resume the run")
    for name in sorted(theirs.keys() | made_of.keys()):
        if theirs.get(name) != made_of.get(name):
            raise UserError(
                f"{path} is of another run: its {name} is {_shown(theirs.get(name))}, here it is "
                f"{_shown(made_of.get(name))}; put the right file back, or remove it and resume"
            )
    return arrays


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."


def write_candidates(run: Path, rows: list[dict[str, Any]]) -> None:
    """Replace candidates.csv by `rows`, each with `COLUMNS`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(run / "candidates.csv", text.getvalue())


def read_candidates(run: Path) -> list[dict[str, Any]]:
    """The rows of candidates.csv; raises `UserError` where it is missing or damaged."""
    path = run / "candidates.csv"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, strict=True))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; give a run folder of train/sigma.py") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    found = []
    for number, row in enumerate(rows):
        try:
            numbers = {key: int(row[key]) for key in ("id", "index", "label")}
            sound = row["status"] in STATUSES and numbers["id"] == number and None not in row
        except (KeyError, TypeError, ValueError):
            sound = False
        if not sound or None in row.values():
            raise UserError(
                f"{path}, line {number + 2}: expected {', '.join(COLUMNS)}; resume the sigma run "
                "to write it again"
            )
        found.append({**row, **numbers})
    return found


def read_sigma(path: str | Path, *, granularity: str = "iterations") -> SigmaRun:
    """The finished results in sigma run folder `path`, of a run that may still be going on.

    `granularity`: whether the path length sums over `iterations` or over `epochs`.

    Raises:
        UserError: no sigma run there; a file that is missing, damaged, or of another network,
            layer, data set or setting, naming it.
    """
    run = Path(path)
    options = read_options(run)
    epochs, grid = options["checkpoints"], options["grid"]
    rows = [row for row in read_candidates(run) if row["status"] != "unfinished"]
    kept, maps, made, foregrounds = [], [], [], []
    for row in rows:
        accepted = row["status"] == "accepted"
        have = [e for e in epochs if accepted or result_path(run, row["id"], e).exists()]
        if not have:  # rejected before anything was computed
            continue
        entropy = np.full((len(epochs), grid, grid), np.nan)
        for epoch in have:
            found = read_result(run, row["id"], epoch, made_of(options, epoch, row))
            if found["entropy"].shape != (grid, grid):
                raise UserError(f"{result_path(run, row['id'], epoch)} has another grid")
            entropy[epochs.index(epoch)] = found["entropy"]
        maps.append(entropy)
        made.append([epoch in have for epoch in epochs])
        foregrounds.append(read_image(run, row["id"], grid)["foreground"])
        kept.append(row)
    rejected = sum(row["status"] == "rejected" for row in rows)
    record = options | {
        "tried": len(rows), "rejected": rejected, "finished": (run / "results.json").exists(),
    }  # fmt: skip
    return SigmaRun(
        entropy=np.stack(maps) if maps else np.empty((0, len(epochs), grid, grid)),
        made=np.array(made, dtype=bool).reshape(len(kept), len(epochs)),
        foreground=np.stack(foregrounds) if maps else np.empty((0, grid, grid), bool),
        epochs=list(epochs),
        ids=[row["id"] for row in kept],
        tried=[row["id"] for row in rows],
        accepted=np.array([row["status"] == "accepted" for row in kept], dtype=bool),
        names=[row["name"] for row in kept],
        path_length=read_path_length(run, options.get("path-layer"), epochs, granularity),
        record=record,
        labels=[row["label"] for row in kept],
        indices=[row["index"] for row in kept],
    )


def read_image(run: Path, image: int, grid: int) -> dict[str, np.ndarray]:
    """image.npz: `image` uint8 [S, S, 3] and `foreground` bool [G, G]."""
    path = image_folder(run, image) / "image.npz"
    arrays = read_npz(path)
    foreground = arrays.get("foreground")
    if foreground is None or foreground.dtype != bool or foreground.shape != (grid, grid):
        raise UserError(
            f"{path} has no foreground map of {grid}x{grid} cells; remove it and resume the run"
        )
    image = arrays.get("image")
    if image is None or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise UserError(f"{path} has no image of 8-bit RGB; remove it and resume the run")
    return arrays


def read_options(run: Path) -> dict[str, Any]:
    """The options in args.yaml of a sigma run; raises `UserError` where they are none."""
    path = run / "args.yaml"
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))["options"]
        epochs, checksums = options["checkpoints"], options["checksums"]
        sound = (
            all(isinstance(options[name], str) for name in ("layer", "model", "dataset"))
            and type(options["seed"]) is int
            and isinstance(options["settings"], dict)
            and type(options["grid"]) is int
            and options["grid"] > 0
            and all(type(epoch) is int for epoch in epochs)
            and sorted(set(epochs)) == epochs
            and len(epochs) == len(checksums) > 0
        )
    except FileNotFoundError:
        raise UserError(f"no sigma run at {run}; make one with train/sigma.py") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, LookupError):
        sound = False
    if not sound:
        raise UserError(f"{path} is damaged, or of another script; give a run of train/sigma.py")
    return options


def made_of(options: Mapping[str, Any], epoch: int, row: Mapping[str, Any]) -> dict[str, Any]:
    """What the result of candidate `row` at `epoch` depends on, by the options of its run."""
    checksum = options["checksums"][options["checkpoints"].index(epoch)]
    return {
        "weights": checksum, "layer": options["layer"], "dataset": options["dataset"],
        "epoch": epoch, "image": row["id"], "index": row["index"], "seed": options["seed"],
        **{f"setting {name}": value for name, value in options["settings"].items()},
    }  # fmt: skip


def read_path_length(
    run: Path, layer: str | None, epochs: list[int], granularity: str
) -> np.ndarray | None:
    """Path length of `layer` up to each of `epochs`; None where the run has no record of it.

    The rows of path_length.csv are epoch, layer, iterations, epochs: what each epoch adds.
    """
    path = run / PATH_LENGTH
    if not path.exists():
        return None
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, strict=True))
        added = {int(r["epoch"]): float(r[granularity]) for r in rows if r["layer"] == layer}
        if not added:
            return None
        return np.array([sum(added[e] for e in range(epoch + 1)) for epoch in epochs])
    except (OSError, UnicodeDecodeError, csv.Error, LookupError, TypeError, ValueError):
        raise UserError(
            f"{path} is damaged: expected epoch, layer, iterations and epochs of each epoch up to "
            f"{epochs[-1]}; put it back as it was, or remove it to go without path length"
        ) from None
