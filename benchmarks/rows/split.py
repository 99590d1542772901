"""split_conv2d against the dense convolution of a masked weight; the masks themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from kdfast.ops import Key, SplitMask, reference, split_conv2d
from kdfast.ops.reference.split import draw_bits
from rows import FORMATS, Row, feature, size

STAGES = [(64, 56), (128, 28), (256, 14), (512, 7)]  # of ResNet-18: width, edge


def split_conv(device: str) -> Iterator[Row]:
    """ResNet-18's 3x3 convolutions at rate 0.5, forward and backward.

    "masked dense" holds a float mask; segments are four concatenated inputs; bits keep half of all
    weights, so the convolution is as large as before and only the masking differs.
    """
    batch = 256 if device == "cuda" else 8
    for width, edge in STAGES:
        shape = (width, width, 3, 3)
        goal = {"masked dense": 2.5} if device == "cuda" else {"masked dense": 3}
        if width == 64:
            goal = {} if device == "cuda" else {"masked dense": 1.8}
        masks = {
            "": (SplitMask.kels(shape, 0.5), goal),
            " segments": (SplitMask.kels(shape, 0.5, segments=[width // 4] * 4), goal),
        }
        if width == 512:
            masks[" bits"] = (SplitMask.wels(shape, 0.5, Key(0), device), {})
        for name, (mask, goals) in masks.items():
            x = feature((batch, width, edge, edge), torch.float32, "channels_last", device)
            weight = feature(shape, torch.float32, "channels_last", device) * 0.05
            upstream = feature(tuple(x.shape), torch.float32, "channels_last", device)
            x.requires_grad_(), weight.requires_grad_()
            dense = mask.dense(torch.float32, device).contiguous(memory_format=torch.channels_last)

            def step(conv: Callable, x=x, weight=weight, upstream=upstream) -> tuple[Tensor, ...]:
                return torch.autograd.grad(conv(x, weight), (x, weight), upstream)

            def fused(x: Tensor, weight: Tensor, mask=mask) -> Tensor:
                return split_conv2d(x, weight, mask, padding=1)

            def eager(x: Tensor, weight: Tensor, mask=mask) -> Tensor:
                return reference.split_conv2d(x, weight, mask, padding=1)

            def masked(x: Tensor, weight: Tensor, dense=dense) -> Tensor:
                return F.conv2d(x, weight * dense, padding=1)

            def compiled(step: Callable = step, masked: Callable = masked) -> Callable[[], object]:
                conv = torch.compile(masked, dynamic=False)
                return lambda: step(conv)

            steps = {
                "fused": lambda step=step, fused=fused: step(fused),
                "eager": lambda step=step, eager=eager: step(eager),
                "masked dense": lambda step=step, masked=masked: step(masked),
            }
            if mask.bits is None and len(mask.columns) > 1:

                def cat(x: Tensor, weight: Tensor, mask=mask) -> Tensor:
                    """What torch has for several runs: slices put together."""
                    kept = mask.rows[0][1]
                    x, weight = (
                        torch.cat([t.narrow(1, *run) for run in mask.columns], 1)
                        for t in (x, weight[:kept])
                    )
                    y = F.conv2d(x, weight, padding=1)
                    return F.pad(y, (0, 0, 0, 0, 0, mask.shape[0] - kept))

                steps["slices"] = lambda step=step, cat=cat: step(cat)
            kept = mask.sum() if mask.bits is None else weight.numel()
            yield Row(
                "split_conv2d",
                f"{batch}x{width}x{edge}x{edge}{name}",
                torch.float32,
                steps,
                "channels_last",
                compiled,
                operations=3 * 2 * batch * edge * edge * kept,
                goals=goals,
            )


def split_mask(device: str) -> Iterator[Row]:
    """A weight masked by bits, forward and backward; "dense mask" holds a boolean one."""
    shape = (512, 512, 3, 3)
    mask = SplitMask.wels(shape, 0.5, Key(0), device)
    for format, dtype in (
        ("nchw", torch.float32),
        ("channels_last", torch.float32),
        ("nchw", torch.bfloat16),
        ("channels_last", torch.bfloat16),
    ):
        weight = feature(shape, torch.float32, format, device).requires_grad_()
        upstream = feature(shape, dtype, format, device)
        dense = mask.dense(device=device).contiguous(memory_format=FORMATS[format])

        def step(masked: Tensor, weight=weight, upstream=upstream) -> tuple[Tensor, ...]:
            return torch.autograd.grad(masked, weight, upstream)

        def fused(step=step, weight=weight, dtype=dtype) -> tuple[Tensor, ...]:
            return step(torch.ops.kdfast.split_mask(weight, mask.bits, dtype))

        def eager(step=step, weight=weight, dtype=dtype) -> tuple[Tensor, ...]:
            return step(weight.masked_fill(~mask.dense(device=weight.device), 0).to(dtype))

        def held(step=step, weight=weight, dtype=dtype, dense=dense) -> tuple[Tensor, ...]:
            return step((weight * dense.float()).to(dtype))

        yield Row(
            "split_mask",
            "x".join(map(str, shape)),
            dtype,
            {"fused": fused, "eager": eager, "dense mask": held},
            format,
            bytes=2 * size(weight, upstream, mask.bits),
            goals={"dense mask": 1},
        )


def split_draw(device: str) -> Iterator[Row]:
    """The bits of one weight, forward only."""
    shape, key = (512, 512, 3, 3), Key(0)
    count = 512 * 512 * 9
    yield Row(
        "split_draw",
        "x".join(map(str, shape)),
        torch.uint8,
        {
            "fused": lambda: SplitMask.wels(shape, 0.5, key, device),
            "eager": lambda: SplitMask(shape, bits=draw_bits(key.signed, count, 1 << 23, device)),
        },
        goals={"eager": 1},
    )


ROWS = {"split_conv2d": split_conv, "split_mask": split_mask, "split_draw": split_draw}
