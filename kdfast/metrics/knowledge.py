"""How much a layer knows of images, how early and how directly it came to know it.

Cheng, Rao, Chen, Zhang, "Explaining Knowledge Distillation by Quantifying the Knowledge", CVPR
2020: a cell of an image that bears clearly less noise than the average background cell is a
concept. Where paper and the authors' code differ, the code is followed.

Arrays are [images I, checkpoints M, cells G, G]; regions are `fg`, `bg` and `all`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

REGIONS = ("fg", "bg", "all")
_UPPER = {"upper_10": 0.90, "upper_5": 0.95, "upper_1": 0.99}


def count_concepts(
    entropy: np.ndarray, foreground: np.ndarray, threshold: float = 0.2
) -> dict[str, np.ndarray]:
    """The concepts of every image at every checkpoint: cells with Hbar_m - H > `threshold`.

    Args:
        entropy: [I, M, G, G] H in nats, finite.
        foreground: [I, G, G] bool; every image has both regions.
        threshold: nats; a cell exactly there is no concept.

    Returns:
        background_entropy [M]: Hbar_m, the mean over images of the mean over their background.
        concepts: [I, M, G, G] bool.
        fg, bg, all: [I, M] int64, concepts in the region.
        share: [I, M], concepts in the foreground of all concepts, 0 where there are none.
        N_fg, N_bg, N_all, fg_share: [M], their means over images.

    Raises:
        ValueError: shapes that do not match, no image, an image without one of the regions, or
            an entropy that is not finite.
    """
    entropy, foreground = _checked(entropy, foreground)
    images, checkpoints = entropy.shape[:2]
    inside = foreground.reshape(images, -1)
    limits = _background_entropy(entropy, foreground)
    concepts = limits[:, None, None] - entropy > threshold
    cells = concepts.reshape(images, checkpoints, -1)
    counts = {
        "fg": (cells & inside[:, None]).sum(2),
        "all": cells.sum(2),
    }
    counts["bg"] = counts["all"] - counts["fg"]
    share = counts["fg"] / np.maximum(counts["all"], 1)
    return {
        "background_entropy": limits,
        "concepts": concepts,
        **{region: counts[region] for region in REGIONS},
        "share": share,
        **{f"N_{region}": counts[region].mean(0) for region in REGIONS},
        "fg_share": share.mean(0),
    }


def learning_speed(counts: np.ndarray, path_length: np.ndarray, first: int = 0) -> dict[str, Any]:
    """How far the layer had come when it knew most of an image, and how much images differ in that.

    Args:
        counts: [I, M] concepts.
        path_length: [M] path length of the layer's weights up to each checkpoint.
        first: position of the first checkpoint that may be the best one.

    Returns:
        best [I]: position of the checkpoint with the most concepts, the earliest of equals.
        time [I]: path length there.
        D_mean, D_var, D_std: its mean, population variance (divided by I) and root over images.
        slope: mean of counts / time at the best, over images with time > 0; NaN where none has.
        slope_skipped: images without a slope.

    Raises:
        ValueError: shapes that do not match, or no checkpoint from `first` on.
    """
    counts, path_length = np.asarray(counts), np.asarray(path_length, np.float64)
    if counts.ndim != 2 or not counts.size or path_length.shape != counts.shape[1:]:
        raise ValueError(
            f"counts must be [I, M] and path_length [M], got {list(counts.shape)} and "
            f"{list(path_length.shape)}"
        )
    _check_first(first, counts.shape[1])
    best = first + counts[:, first:].argmax(1)
    time = path_length[best]
    most = counts[np.arange(len(counts)), best]
    moved = time > 0
    variance = float(time.var())
    return {
        "best": best,
        "time": time,
        "D_mean": float(time.mean()),
        "D_var": variance,
        "D_std": math.sqrt(variance),
        "slope": float((most[moved] / time[moved]).mean()) if moved.any() else math.nan,
        "slope_skipped": int((~moved).sum()),
    }


def stability(concepts: np.ndarray, first: int = 0) -> dict[str, Any]:
    """rho: of all concepts that an image ever had, the share it has at the last checkpoint.

    Args:
        concepts: [I, M, G, G] bool.
        first: position of the first checkpoint that counts.

    Returns:
        last, union [I]: concepts at the last checkpoint, and at any.
        by_image [I]: last / union, 0 where there never was one.
        rho: its mean.

    Raises:
        ValueError: another shape, or no checkpoint from `first` on.
    """
    concepts = np.asarray(concepts, bool)
    if concepts.ndim != 4 or not len(concepts):
        raise ValueError(f"concepts must be [I, M, G, G], got {list(concepts.shape)}")
    _check_first(first, concepts.shape[1])
    last = concepts[:, -1].sum((1, 2))
    union = concepts[:, first:].any(1).sum((1, 2))
    by_image = last / np.maximum(union, 1)
    return {"last": last, "union": union, "by_image": by_image, "rho": float(by_image.mean())}


def survey_thresholds(entropy: np.ndarray, foreground: np.ndarray) -> dict[str, np.ndarray]:
    """Hbar_m - H over all foreground cells of all images: what a threshold could be.

    Arguments and errors are those of `count_concepts`. Returns `mean` [M] and the quantiles above
    which 10, 5 and 1 % of the cells lie: `upper_10`, `upper_5` and `upper_1`, [M].
    """
    entropy, foreground = _checked(entropy, foreground)
    cells = np.moveaxis(entropy, 1, -1)[foreground]  # [cells, M]
    found = _background_entropy(entropy, foreground) - cells
    quantiles = np.quantile(found, list(_UPPER.values()), axis=0)
    return {"mean": found.mean(0)} | dict(zip(_UPPER, quantiles, strict=True))


def measure_knowledge(
    entropy: np.ndarray,
    foreground: np.ndarray,
    path_length: np.ndarray | None,
    threshold: float = 0.2,
    best_from: int = 0,
    union_from: int = 0,
) -> dict[str, Any]:
    """All of it for one network.

    Args:
        entropy, foreground, threshold: as in `count_concepts`.
        path_length: [M]; None leaves learning speed out.
        best_from: `first` of `learning_speed`.
        union_from: `first` of `stability`.

    Returns:
        counts: of `count_concepts`.
        speed: of `learning_speed`, by region; None without a path length.
        stability: of `stability`, by region.
        survey: of `survey_thresholds`.
    """
    counts = count_concepts(entropy, foreground, threshold)
    inside = np.asarray(foreground, bool)[:, None]
    where = {"fg": inside, "bg": ~inside, "all": np.True_}
    speed = None
    if path_length is not None:
        speed = {r: learning_speed(counts[r], path_length, best_from) for r in REGIONS}
    return {
        "counts": counts,
        "speed": speed,
        "stability": {r: stability(counts["concepts"] & where[r], union_from) for r in REGIONS},
        "survey": survey_thresholds(entropy, foreground),
    }


def _background_entropy(entropy: np.ndarray, foreground: np.ndarray) -> np.ndarray:
    """Hbar [M]."""
    outside = ~foreground.reshape(len(foreground), -1)
    cells = entropy.reshape(*entropy.shape[:2], -1)
    sums = np.einsum("imc,ic->im", cells, outside.astype(np.float64))
    return (sums / outside.sum(1)[:, None]).mean(0)


def _checked(entropy: np.ndarray, foreground: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    entropy, foreground = np.asarray(entropy, np.float64), np.asarray(foreground, bool)
    if entropy.ndim != 4 or not entropy.shape[1]:
        raise ValueError(f"entropy must be [I, M, G, G], got {list(entropy.shape)}")
    if not len(entropy):
        raise ValueError("there is no image to count in")
    due = (len(entropy), *entropy.shape[2:])
    if foreground.shape != due:
        raise ValueError(f"foreground must be {list(due)}, got {list(foreground.shape)}")
    for region, cells in (("foreground", foreground), ("background", ~foreground)):
        lacking = np.flatnonzero(~cells.any((1, 2)))
        if len(lacking):
            raise ValueError(f"image {lacking[0]} has no {region}")
    if not np.isfinite(entropy).all():
        raise ValueError("entropies must be finite, as those of sigma > 0 are")
    return entropy, foreground


def _check_first(first: int, checkpoints: int) -> None:
    if not 0 <= first < checkpoints:
        raise ValueError(f"first must be a position of {checkpoints} checkpoints, got {first}")
