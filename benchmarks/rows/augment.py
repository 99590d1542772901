"""crop_flip of a batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torchvision import transforms

from kdfast import ops
from kdfast.ops import Key, reference
from rows import Row

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)


def crop_flip(device: str) -> Iterator[Row]:
    """Read the pixels, write the batch. Eager is torchvision, an image at a time, on the host."""
    batch, size = 512, 32
    key = Key(0, "augment")
    images = torch.randint(0, 256, (4096, size, size, 3), dtype=torch.uint8)
    indices = torch.randperm(len(images))[:batch]
    pictures = [transforms.ToPILImage()(images[i].permute(2, 0, 1)) for i in indices]
    pipeline = transforms.Compose(
        [
            transforms.RandomCrop(size, 4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    images, indices = images.to(device), indices.to(device)

    def eager() -> Tensor:
        batch = torch.stack([pipeline(picture) for picture in pictures])
        return batch.contiguous(memory_format=torch.channels_last).to(device)

    yield Row(
        "crop_flip",
        f"{batch}x3x{size}x{size}",
        torch.float32,
        {
            "fused": lambda: ops.crop_flip(images, indices, key, MEAN, STD),
            "eager": eager,
            "twin": lambda: reference.crop_flip(images, indices, key, MEAN, STD),
        },
        "channels_last",
        bytes=batch * 3 * size * size * 5,
        goals={"eager": 5} if device == "cpu" else {"floor": 0.8},
    )


ROWS = {"crop_flip": crop_flip}
