"""sigma_noise forward and backward, standard_normal."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from kdfast import ops
from kdfast.ops import Key, reference
from rows import Row

CPU_LIMIT = (
    "drawing 14.45 million normals twice, ten Philox rounds and Box-Muller, takes 20 ms on two "
    "cores by itself, and moving the bytes another 4"
)


def sigma_noise(device: str) -> Iterator[Row]:
    """Write the noisy images; read their gradient. Eager draws with torch's own generator."""
    key = Key(0, "noise")
    layers = [
        ((1, 3, 224, 224), 96, torch.float32, True),
        ((1, 3, 224, 224), 96, torch.bfloat16, False),
        ((16, 3, 32, 32), 96, torch.float32, False),
    ]
    for shape, samples, dtype, main in layers:
        n, c, h, w = shape
        image = torch.randn(shape, device=device).to(dtype)
        sigma = torch.full((n, 1, 16, 16), 0.01, device=device, requires_grad=True)
        grad = torch.randn((n, samples, c, h, w), device=device).to(dtype)

        def eager(image=image, sigma=sigma, grad=grad) -> Tensor:
            up = F.interpolate(sigma, image.shape[2:], mode="nearest").unsqueeze(1)
            noise = torch.randn(grad.shape, device=image.device)
            return (image.unsqueeze(1) + up * noise).to(image.dtype)

        def fused(image=image, sigma=sigma, samples=samples) -> Tensor:
            return ops.sigma_noise(image, sigma, samples, key)

        def step(forward: Callable, sigma=sigma, grad=grad) -> object:
            return torch.autograd.grad(forward(), sigma, grad)

        def compiled(eager: Callable = eager, step: Callable = step) -> Callable[[], object]:
            forward = torch.compile(eager, dynamic=False)
            return lambda: step(forward)

        goals = {"eager": 10} if device == "cpu" else {"eager": 5, "floor": 0.6}
        yield Row(
            "sigma_noise",
            f"{n}x{samples}x{c}x{h}x{w}",
            dtype,
            {
                "fused": lambda step=step, fused=fused: step(fused),
                "eager": lambda step=step, eager=eager: step(eager),
            },
            compiled=compiled,
            bytes=2 * grad.numel() * grad.element_size(),
            goals=goals if main else {},
            memory=main,
            why=CPU_LIMIT if device == "cpu" and main else "",
        )


def standard_normal(device: str) -> Iterator[Row]:
    """Write the numbers; beside torch's own generator and the twin."""
    key, shape = Key(0, "normal"), (1, 96, 3, 224, 224)
    small = (1, 4, 3, 224, 224)
    for size, twin in ((shape, False), (small, True)):
        steps = {
            "fused": lambda size=size: ops.standard_normal(key, size, device=device),
            "eager": lambda size=size: torch.randn(size, device=device),
        }
        if twin:
            steps["twin"] = lambda size=size: reference.standard_normal(key, size, device=device)
        yield Row(
            "standard_normal",
            "x".join(map(str, size)),
            torch.float32,
            steps,
            bytes=4 * torch.Size(size).numel(),
        )


ROWS = {"sigma_noise": sigma_noise, "standard_normal": standard_normal}
