"""Finished sigma runs that nobody computed, in the files train/sigma.py writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from kdfast.training.sigma_files import (
    image_folder,
    made_of,
    result_path,
    write_candidates,
    write_npz,
    write_result,
)

EPOCHS = [0, 2, 5, 10]
GRID = 8
LENGTHS = [0.0, 0.3, 0.2, 0.2, 0.2, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1]  # an epoch
SETTINGS = {"samples": 8, "weight": 7.0, "target": -2.8}


def circle(image: int) -> np.ndarray:
    """bool [GRID, GRID]: the foreground of an image."""
    y, x = np.mgrid[:GRID, :GRID]
    return (x - 3 - image % 2) ** 2 + (y - 3.5) ** 2 < 6


def entropy(image: int, epoch: int, knows: float) -> np.ndarray:
    """[GRID, GRID] float64: the foreground grows clear as epochs go by, the faster `knows` is."""
    noise = np.random.default_rng([image, epoch]).normal(0, 0.12, (GRID, GRID))
    return -2.8 + noise - circle(image) * 0.5 * (1 - np.exp(-knows * epoch))


def write_run(
    path: Path,
    *,
    knows: float = 0.3,
    images: int = 5,
    rejected: tuple[int, ...] = (3,),
    epochs: list[int] = EPOCHS,
    lengths: bool = True,
    finished: bool = True,
    change: dict[str, Any] | None = None,
    shift: int = 0,
    blank: tuple[int, ...] = (),
) -> Path:
    """A sigma run folder; `rejected` images have the last checkpoint only, `blank` ones, which lack
    a region, nothing.

    `change` are options of args.yaml; candidate i is image 10 + 3 i + `shift` of the set.
    """
    options = {
        "kind": "sigma", "run": f"output/{path.name}", "model": "vgg11", "layer": "classifier.0",
        "path-layer": "classifier.0",
        "dataset": "digits", "grid": GRID, "seed": 0, "settings": dict(SETTINGS),
        "checkpoints": list(epochs), "checksums": [f"{epoch:016x}" for epoch in epochs],
    }  # fmt: skip
    options |= change or {}
    path.mkdir(parents=True)
    (path / "args.yaml").write_text(yaml.safe_dump({"options": options}))
    rows = []
    for image in range(images + 1):
        status = "rejected" if image in (*rejected, *blank) else "accepted"
        status = "unfinished" if image == images else status
        row = {
            "id": image, "index": 10 + 3 * image + shift, "name": f"digits image {image}",
            "label": image % 3, "status": status, "reason": "",
        }  # fmt: skip
        rows.append(row)
        if status == "unfinished" or image in blank:
            continue
        pixels = np.random.default_rng(image).integers(0, 256, (4 * GRID, 4 * GRID, 3), np.uint8)
        pixels[circle(image).repeat(4, 0).repeat(4, 1)] //= 3
        arrays = {"image": pixels, "foreground": circle(image)}
        image_folder(path, image).mkdir(parents=True)
        write_npz(image_folder(path, image) / "image.npz", arrays)
        for epoch in epochs if status == "accepted" else epochs[-1:]:
            write_map(path, options, row, epoch, entropy(image, epoch, knows))
    write_candidates(path, rows)
    if lengths:
        lines = [f"{e},classifier.0,{v},{v / 2}" for e, v in enumerate(LENGTHS)]
        text = "\n".join(["epoch,layer,iterations,epochs", *lines, ""])
        (path / "path_length.csv").write_text(text)
    if finished:
        (path / "results.json").write_text("{}")
    return path


def write_map(path: Path, options: dict, row: dict, epoch: int, values: np.ndarray) -> None:
    curve = np.zeros(4)
    arrays = {
        "sigma": np.exp(values - 1.4189385), "entropy": values, "mean_entropy": curve,
        "feature_loss": curve, "penalty": curve, "delta2": np.float64(1),
        "selected": np.int64(2), "steps_run": np.int64(4),
    }  # fmt: skip
    result_path(path, row["id"], epoch).unlink(missing_ok=True)
    write_result(path, row["id"], epoch, arrays, made_of(options, epoch, row))
