"""Seeds as pure functions of what they are for."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import numpy as np
import torch


def derive_seed(seed: int, *stream: int | str) -> int:
    """A 63-bit seed for `stream` (names and numbers), the same on every machine and process."""
    text = "\x1f".join(str(part) for part in (seed, *stream))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def seed_process(seed: int) -> None:
    """Seed all generators of this process: Python's, NumPy's, torch's and its devices'."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)


@contextmanager
def local_randomness(seed: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's CPU generators inside the block, then restore them.

    Augmentations draw from the global generators; here what they draw depends on `seed` alone,
    and dropout outside draws what it would have drawn without them.
    """
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    torch_state = torch.default_generator.get_state()
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.default_generator.set_state(torch_state)
