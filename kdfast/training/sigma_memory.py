"""What a step of sigma training takes in memory, and how many samples fit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

# On a CPU larger passes leave the caches, and every tensor of theirs is mapped and cleared anew.
_CPU_BYTES = 64 << 20


def bytes_per_sample(feature: Callable[[Tensor], Tensor], image: Tensor) -> int:
    """Peak bytes that a step adds for one more noisy sample in flight.

    S + I + 3 F + 2 L: S what the forward pass keeps for the backward, I the gradient of the noisy
    image, F the feature with its distance and gradient, L the largest tensor that is kept, twice:
    the gradients on both sides of the layer that is being passed back. Found by one forward pass.

    Args:
        feature: as of `solve_sigma`.
        image: [1,C,H,W] float32.
    """
    weights: set[int] = set()
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.shape[:1] == (2,):
            sizes[storage.data_ptr()] = storage.nbytes()
        else:
            weights.add(storage.data_ptr())
        return tensor

    pair = image.detach().repeat(2, 1, 1, 1).requires_grad_()
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
        passed = feature(pair)
    sizes.pop(pair.data_ptr(), None)
    sizes[pair.data_ptr()] = pair.nbytes
    largest = max(sizes.values())
    total = sum(sizes.values()) + pair.nbytes + 3 * passed.nbytes + 2 * largest
    return total // 2


def working_bytes(network: nn.Module, device: torch.device, limit: float) -> float:
    """What one pass should take of the `limit` bytes it may take.

    All of it on a GPU. On a CPU 64 MiB, or as many bytes as the weights have, which every pass
    reads anew.
    """
    if device.type != "cpu":
        return limit
    weights = sum(parameter.nbytes for parameter in network.parameters())
    return min(limit, max(_CPU_BYTES, weights))


def choose_chunk(sample: int, images: int, samples: int, budget: float) -> int:
    """Samples of each of `images` in one pass so that it takes `budget` bytes at most; 1 or more.

    Chunks are of equal size, one perhaps smaller.
    """
    most = max(1, int(budget // (sample * images)))
    passes = -(-samples // most)
    return -(-samples // passes)
