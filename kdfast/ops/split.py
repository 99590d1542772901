"""The convolution of a masked weight: public function, fakes, autograd.

Taha, Shrivastava, Davis, "Knowledge Evolution in Neural Networks", CVPR 2021, arXiv 2103.05152.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kdfast.ops import _library, reference
from kdfast.ops._checks import check_device, check_floating, check_shape, register
from kdfast.ops._layout import is_channels_last
from kdfast.ops.split_mask import Runs, SplitMask, joined_runs, total


def split_conv2d(
    x: Tensor,
    weight: Tensor,
    mask: SplitMask,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """conv2d(x, M * W, r * b), r[o] = 1 where row o keeps a weight: the rows that keep none are 0.

    Block masks are computed as the small dense convolution they are, on x[:, columns] and
    W[rows, columns]; a grouped one too, if every group keeps no row or as many as the others.
    Everything else masks the weight first, in one pass.

    Args:
        x: [N, C, H, W], float32, float64, float16 or bfloat16; channels_last gives channels_last.
        weight: [O, C / groups, kh, kw], full size; its gradient is too, 0 outside M.
        mask: of the weight's shape; bits on its device.
        bias: [O]; entries of rows that keep no weight are not read, their gradient is 0.
        stride, padding, dilation, groups: as `torch.nn.functional.conv2d`.

    Returns:
        [N, O, H', W'] of the dtype that conv2d gives, autocast included. What is outside the mask
        is not read: NaN there leaves no trace, and the gradient of x is 0 in unread channels.
        Differentiable any number of times.

    Raises:
        TypeError, ValueError: for a wrong dtype, rank, size, device or mask shape.

    Source: the paper's masked network (M * W); its slim network is the small convolution.
    """
    _check_conv(x, weight, mask, bias, stride, padding, dilation, groups)
    if not _library.fused("split_conv2d", x.device):
        return reference.split_conv2d(x, weight, mask, bias, stride, padding, dilation, groups)
    if mask.bits is not None:
        masked = torch.ops.kdfast.split_mask(weight, mask.bits, _conv_dtype(weight))
        if bias is not None:
            bias = bias.masked_fill(~mask.row_mask(bias.device), 0)
        return F.conv2d(x, masked, bias, stride, padding, dilation, groups)

    plan = _plan(mask, groups)
    if plan is None:
        in_place = ([i for s, n in runs for i in (s, s, n)] for runs in (mask.rows, mask.columns))
        weight = _copy(weight, *in_place, *mask.shape[:2], is_channels_last(weight))
        if bias is not None:
            bias = bias.masked_fill(~mask.row_mask(bias.device), 0)
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    inputs, groups = plan
    channels_last = is_channels_last(x)
    x = _take(x, None, inputs)
    weight = _take(weight, mask.rows, mask.columns)
    if bias is not None:
        bias = _take(bias.view(1, -1, 1, 1), None, mask.rows).flatten()
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return _widen(y, mask.rows, mask.shape[0], channels_last or is_channels_last(y))


def _plan(mask: SplitMask, groups: int) -> tuple[Runs, int] | None:
    """The channels of x that a block mask reads and the groups that are left.

    None where groups keep different numbers of rows, which is no convolution of fewer groups.
    """
    if groups == 1:
        return mask.columns, 1
    if groups not in mask._plans:
        size, width = mask.shape[0] // groups, mask.shape[1]
        counts = [0] * groups
        for start, length in mask.rows:
            for group in range(start // size, (start + length - 1) // size + 1):
                last = min(start + length, (group + 1) * size)
                counts[group] += last - max(start, group * size)
        used = [group for group in range(groups) if counts[group]]
        plan = None
        if all(counts[group] == counts[used[0]] for group in used):
            inputs = joined_runs((group * width + s, n) for group in used for s, n in mask.columns)
            plan = inputs, len(used)
        mask._plans[groups] = plan
    return mask._plans[groups]


def _take(tensor: Tensor, rows: Runs | None, columns: Runs) -> Tensor:
    """tensor[rows, columns], dense in its own memory format; rows None: all of them.

    One run of each is padding by negative widths: torch copies that as fast as a kernel of ours
    (docs/decisions.md), and its gradient, unlike a slice's, keeps the memory format.
    """
    height, width = tensor.shape[:2]
    if rows is not None and rows[0][1] == height:
        rows = None
    if len(columns) > 1 or (rows is not None and len(rows) > 1):
        sizes = 0 if rows is None else total(rows), total(columns)
        moves = [] if rows is None else _packed(rows), _packed(columns)
        return _copy(tensor, *moves, *sizes, is_channels_last(tensor))
    start, length = columns[0]
    if rows is None and length == width:
        return tensor
    if torch.compiler.is_compiling():  # inductor fuses slices; torch 2.11's cannot cut by padding
        part = tensor.narrow(1, start, length)
        return part if rows is None else part.narrow(0, *rows[0])
    cut = [0, 0, 0, 0, -start, start + length - width]
    if rows is not None:
        cut += [-rows[0][0], sum(rows[0]) - height]
    return torch.constant_pad_nd(tensor, cut)


def _widen(y: Tensor, rows: Runs, out: int, channels_last: bool) -> Tensor:
    """[N, out, H, W]: zeros but for `rows`, which are those of y."""
    if len(rows) > 1:
        return _copy(y, [], _swapped(_packed(rows)), 0, out, channels_last)
    start, length = rows[0]
    if length < out:
        y = torch.constant_pad_nd(y, [0, 0, 0, 0, start, out - start - length])
    return y.contiguous(memory_format=torch.channels_last) if channels_last else y


def _copy(
    source: Tensor,
    rows: list[int],
    columns: list[int],
    out_rows: int,
    out_columns: int,
    channels_last: bool,
) -> Tensor:
    """Zeros but for the copied runs, flat triples; see csrc/schemas/split.cpp."""
    return torch.ops.kdfast.split_copy(source, rows, columns, out_rows, out_columns, channels_last)


def _packed(runs: Runs) -> list[int]:
    """(start, place in the packed order, length) of each run."""
    result, place = [], 0
    for start, length in runs:
        result += [start, place, length]
        place += length
    return result


def _conv_dtype(weight: Tensor) -> torch.dtype:
    """What conv2d would cast the weight to."""
    kind = weight.device.type
    if weight.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return weight.dtype
    return torch.get_autocast_dtype(kind)


def _check_conv(
    x: Tensor,
    weight: Tensor,
    mask: SplitMask,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> None:
    op = "split_conv2d"
    check_floating(op, "x", x)
    check_floating(op, "weight", weight)
    check_shape(op, "x", x, 4, "[N, C, H, W] feature map")
    check_shape(op, "weight", weight, 4, "[O, C / groups, kh, kw] weight")
    check_device(op, "weight", weight, "x", x)
    if not isinstance(mask, SplitMask):
        raise TypeError(f"{op}: mask must be a SplitMask, got {type(mask).__name__}")
    if mask.shape != tuple(weight.shape):
        raise ValueError(
            f"{op}: mask must have the weight's shape {list(weight.shape)}, got {list(mask.shape)}"
        )
    if mask.bits is not None:
        check_device(op, "mask.bits", mask.bits, "x", x)
    out, width = weight.shape[0], weight.shape[1]
    if groups < 1 or out % groups:
        raise ValueError(f"{op}: groups must divide {out} rows of the weight, got {groups}")
    if x.shape[1] != width * groups:
        raise ValueError(
            f"{op}: x must have {width * groups} channels for a weight {list(weight.shape)} in "
            f"{groups} groups, got {x.shape[1]}"
        )
    if bias is not None:
        check_floating(op, "bias", bias)
        check_device(op, "bias", bias, "x", x)
        if tuple(bias.shape) != (out,):
            raise ValueError(f"{op}: bias must have shape [{out}], got {list(bias.shape)}")
    if not torch.is_autocast_enabled(x.device.type):
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and tensor.dtype != x.dtype:
                raise TypeError(f"{op}: {name} must be {x.dtype} as x is, got {tensor.dtype}")
    steps = [_pair(op, "stride", stride, 1), _pair(op, "dilation", dilation, 1)]
    if isinstance(padding, str):
        if padding not in ("same", "valid") or (padding == "same" and steps[0] != (1, 1)):
            raise ValueError(
                f"{op}: padding must be integers, 'valid', or 'same' with stride 1, got {padding!r}"
            )
        if padding == "same":
            return
    margins = (0, 0) if padding == "valid" else _pair(op, "padding", padding, 0)
    for i, name in enumerate(("height", "width")):
        size = x.shape[2 + i] + 2 * margins[i]
        kernel = steps[1][i] * (weight.shape[2 + i] - 1) + 1
        if size < kernel:
            raise ValueError(
                f"{op}: x must reach the kernel, got a padded {name} of {size} for {kernel}"
            )


def _pair(op: str, name: str, value: Any, least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) not in (1, 2) or any(not isinstance(n, int) or n < least for n in pair):
        raise ValueError(f"{op}: {name} must be one or two integers from {least} on, got {value}")
    return pair if len(pair) == 2 else (pair[0], pair[0])


# Fakes: sizes, dtypes and layouts of what csrc returns.


def _copy_fake(
    source: Tensor,
    rows: list[int],
    columns: list[int],
    out_rows: int,
    out_columns: int,
    channels_last: bool,
) -> Tensor:
    sizes = (out_rows if rows else source.shape[0], out_columns, *source.shape[2:])
    format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(sizes, dtype=source.dtype, device=source.device, memory_format=format)


def _mask_fake(weight: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    format = torch.channels_last if is_channels_last(weight) else torch.contiguous_format
    return torch.empty(weight.shape, dtype=dtype, device=weight.device, memory_format=format)


def _draw_fake(like: Tensor, key: int, count: int, threshold: int) -> Tensor:
    return torch.empty((count + 7) // 8, dtype=torch.uint8, device=like.device)


# Autograd: a copy's gradient is the copy back, a mask's gradient the masked gradient.


def _copy_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    source, ctx.rows, ctx.columns, _, _, _ = inputs
    ctx.sizes = (source.shape[0] if ctx.rows else 0, source.shape[1])
    ctx.channels_last = is_channels_last(source)


def _copy_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    back = [_swapped(runs) for runs in (ctx.rows, ctx.columns)]
    source = torch.ops.kdfast.split_copy(grad, *back, *ctx.sizes, ctx.channels_last)
    return source, None, None, None, None, None


def _swapped(triples: list[int]) -> list[int]:
    """Source and target of each run exchanged."""
    return [
        number
        for i in range(0, len(triples), 3)
        for number in (triples[i + 1], triples[i], triples[i + 2])
    ]


def _mask_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    weight, bits, _ = inputs
    ctx.dtype = weight.dtype
    ctx.save_for_backward(bits)


def _mask_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.kdfast.split_mask(grad, *ctx.saved_tensors, ctx.dtype), None, None


register("split_copy", _copy_fake, _copy_backward, _copy_setup)
register("split_mask", _mask_fake, _mask_backward, _mask_setup)
register("split_draw", _draw_fake)
