"""Whether a set's decoded images are kept in memory, and how much of it there is."""

from __future__ import annotations

import argparse
import os
from contextlib import suppress
from pathlib import Path

import psutil

from kdfast.data import ImageData, keep_decoded
from kdfast.errors import UsageError, UserError
from kdfast.training.journal import note, say

_GIB = 2**30
AUTO_LIMIT = 8 * _GIB
# Of containers and batch jobs, in the two versions of control groups.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def cache_images(options: argparse.Namespace, data: ImageData) -> ImageData:
    """`data` as --cache-images has it; every process of a machine has a copy and its share.

    Raises `UsageError` for a set of a library that cannot be kept, `UserError` when the training
    images do not fit, where they have to.
    """
    always = options.cache_images == "always"
    if options.cache_images == "never" or data.in_memory:
        return data
    if data.train.size(0) is None:
        if always:
            raise UsageError(
                f"--cache-images always: {data.name} is read by its library, not from image files"
            )
        return data
    free = free_memory()
    budget = free if always else min(AUTO_LIMIT, free // 2)
    budget //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    kept = keep_decoded(data, budget)
    if kept is not data:
        sources = {"training": kept.train, "evaluation": kept.eval}
        for split, source in sources.items():
            size = getattr(source, "nbytes", None)
            if size is not None:
                note(f"{len(source)} {split} images are decoded once: {size / _GIB:.3f} GiB")
        return kept
    what = f"the decoded training images of {data.name} take more than {budget / _GIB:.1f} GiB"
    if always:
        raise UserError(
            f"--cache-images always: {what}, the free memory of a process; give --cache-images "
            "never, or --train-limit"
        )
    say(f"{what}; files are decoded at every reading (--cache-images always takes more memory)")
    return data


def free_memory() -> int:
    """Bytes that this machine can still give, and no more than its control group may have."""
    free = psutil.virtual_memory().available
    for path in _LIMITS:
        with suppress(OSError, ValueError):  # no such group, or the word `max`
            free = min(free, int(Path(path).read_text()))
    return free
