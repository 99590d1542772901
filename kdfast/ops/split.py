"""Split masks and the convolution of a masked weight: public names, fakes, autograd.

Taha, Shrivastava, Davis, "Knowledge Evolution in Neural Networks", CVPR 2021, arXiv 2103.05152.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kdfast.ops import _library, reference
from kdfast.ops._checks import check_device, check_floating, check_shape, register
from kdfast.ops._key import Key
from kdfast.ops.reference.split import draw_bits, pack_bits, unpack_bits

Runs = tuple[tuple[int, int], ...]


class SplitMask:
    """The binary mask M of a weight [out, in, ...]: a block of rows and columns, or single weights.

    A block mask (KELS) keeps M[o, i, ...] = 1 for o in `rows` and i in `columns`. A bit mask (WELS)
    has a bit a weight. Neither is ever stored dense.

    Args:
        shape: of the weight, at least two dimensions.
        rows, columns: runs (start, length) of dimensions 0 and 1, ascending and disjoint, at least
            one each; touching runs are joined.
        bits: in place of both, uint8 [ceil(weights / 8)], least significant bit first, in the
            order of the contiguous weight; spare bits 0.

    Attributes:
        shape: a tuple.
        rows, columns: tuples of (start, length); None for a bit mask.
        bits: the tensor; None for a block mask.

    Raises:
        TypeError, ValueError: for another shape, runs that are empty, out of order or outside
            the shape, bits of another dtype or number.

    Source: the paper's kernel-level (KELS) and weight-level (WELS) splits.
    """

    def __init__(
        self,
        shape: Sequence[int],
        rows: Iterable[Sequence[int]] | None = None,
        columns: Iterable[Sequence[int]] | None = None,
        bits: Tensor | None = None,
    ):
        self.shape = _shape(shape)
        if (bits is None) != (rows is not None and columns is not None) or (
            bits is not None and (rows is not None or columns is not None)
        ):
            raise ValueError("SplitMask: expected rows and columns, or bits alone")
        self.rows: Runs | None = None
        self.columns: Runs | None = None
        self.bits: Tensor | None = None
        self._rows: Tensor | None = None  # row mask of a bit mask
        self._plans: dict[int, tuple[Runs, int] | None] = {}  # by groups, see _plan
        if bits is None:
            self.rows = _runs("rows", rows, self.shape[0])
            self.columns = _runs("columns", columns, self.shape[1])
            return
        if not isinstance(bits, Tensor) or bits.dtype != torch.uint8:
            got = bits.dtype if isinstance(bits, Tensor) else type(bits).__name__
            raise TypeError(f"SplitMask: bits must be a uint8 tensor, got {got}")
        expected = (self._weights() + 7) // 8
        if tuple(bits.shape) != (expected,):
            raise ValueError(
                f"SplitMask: bits of a weight {list(self.shape)} must have shape [{expected}], "
                f"got {list(bits.shape)}"
            )
        self.bits = bits.contiguous()
        self._rows = unpack_bits(self.bits, self._weights()).view(self.shape[0], -1).any(1)

    @classmethod
    def kels(
        cls,
        shape: Sequence[int],
        rate: float,
        first: bool = False,
        last: bool = False,
        segments: Sequence[int] | None = None,
        groups: int = 1,
    ) -> SplitMask:
        """The corner block: rows o < a(out), columns i < a(in), with a(n) = ceil(n * rate).

        Args:
            shape: of a convolution's or linear layer's weight.
            rate: in (0, 1]. The ceiling forgives 1e-9, the error of a float product.
            first: all columns are kept (a stem, whose inputs are image channels).
            last: all rows are kept (a classifier).
            segments: widths of the concatenated inputs; of segment k, which starts at S_k, columns
                [S_k, S_k + a(n_k)) are kept.
            groups: of a grouped convolution, whose first a(groups) groups are kept whole.

        Raises:
            ValueError: for a rate outside (0, 1], segments that do not add up to `in`, `first` or
                `groups` together with segments, rows that groups do not divide.
        """
        shape = _shape(shape)
        _check_rate(rate)
        out, into = shape[0], shape[1]
        if groups < 1 or out % groups:
            raise ValueError(f"SplitMask: groups must divide {out} rows, got {groups}")
        if segments is not None and (first or groups > 1):
            raise ValueError("SplitMask: expected no segments with first or groups")
        kept = _active(groups, rate) * (out // groups) if groups > 1 else _active(out, rate)
        rows = [(0, out if last else kept)]
        if first or groups > 1:
            columns = [(0, into)]
        else:
            segments = [into] if segments is None else list(segments)
            if sum(segments) != into or min(segments) < 1:
                raise ValueError(
                    f"SplitMask: segments must be positive and add up to {into} columns, "
                    f"got {segments}"
                )
            starts = [sum(segments[:k]) for k in range(len(segments))]
            columns = [(s, _active(n, rate)) for s, n in zip(starts, segments, strict=True)]
        return cls(shape, rows, columns)

    @classmethod
    def wels(
        cls, shape: Sequence[int], rate: float, key: Key, device: torch.device | str = "cpu"
    ) -> SplitMask:
        """Every weight by itself: M = [u >= 1 - rate], u uniform on [0, 1) with 24 bits.

        u of the contiguous weight's element e is word e % 4 of Philox(key, counter e // 4): the
        same bits on every device.

        Raises:
            ValueError: for a rate outside (0, 1] or more than 2^34 weights.
            TypeError: for a key that is none.
        """
        shape = _shape(shape)
        _check_rate(rate)
        if not isinstance(key, Key):
            raise TypeError(f"SplitMask: key must be a Key, got {type(key).__name__}")
        count = math.prod(shape)
        if count > 1 << 34:
            raise ValueError(f"SplitMask: expected at most 2^34 weights, got {count}")
        threshold = math.ceil((1 - rate) * 2**24)
        device = torch.device(device)
        if _library.fused("SplitMask", device):
            like = torch.empty(0, device=device)
            bits = torch.ops.kdfast.split_draw(like, key.signed, count, threshold)
        else:
            bits = draw_bits(key.signed, count, threshold, device)
        return cls(shape, bits=bits)

    @classmethod
    def from_dense(cls, mask: Tensor) -> SplitMask:
        """A bit mask of the non-zero entries of `mask`."""
        return cls(mask.shape, bits=pack_bits(mask.contiguous().flatten() != 0))

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> SplitMask:
        """The mask that `state()` was taken of."""
        return cls(state["shape"], state.get("rows"), state.get("columns"), state.get("bits"))

    def state(self) -> dict[str, Any]:
        """Lists of integers, and `bits` the one tensor: what JSON and safetensors can hold."""
        if self.bits is not None:
            return {"shape": list(self.shape), "bits": self.bits}
        return {
            "shape": list(self.shape),
            "rows": [list(run) for run in self.rows],
            "columns": [list(run) for run in self.columns],
        }

    def dense(
        self, dtype: torch.dtype = torch.bool, device: torch.device | str | None = None
    ) -> Tensor:
        """M as a new tensor of `shape`, on `device` (None: that of the bits, else the CPU)."""
        if self.bits is not None:
            bits = self.bits.to(self.bits.device if device is None else device)
            return unpack_bits(bits, self._weights()).view(self.shape).to(dtype)
        rows, columns = self.row_mask(device), self.column_mask(device)
        block = (rows.unsqueeze(1) & columns).view(*self.shape[:2], *(1,) * (len(self.shape) - 2))
        return block.expand(self.shape).to(dtype, memory_format=torch.contiguous_format)

    def sum(self) -> int:
        """The number of kept weights. Bits on a GPU: waits for it."""
        if self.bits is not None:
            return int(unpack_bits(self.bits, self._weights()).sum())
        return _total(self.rows) * _total(self.columns) * math.prod(self.shape[2:])

    @property
    def keep(self) -> float:
        """The kept fraction of weights."""
        return self.sum() / self._weights()

    @property
    def row_keep(self) -> float:
        """The fraction of rows that keep a weight."""
        return int(self.row_mask().sum()) / self.shape[0]

    @property
    def column_keep(self) -> float:
        """The fraction of columns that keep a weight."""
        return int(self.column_mask().sum()) / self.shape[1]

    def row_mask(self, device: torch.device | str | None = None) -> Tensor:
        """[out] booleans: the rows that keep a weight; for bias and normalisation."""
        if self._rows is not None:
            return self._rows.to(self._rows.device if device is None else device)
        return _run_mask(self.rows, self.shape[0], device)

    def column_mask(self, device: torch.device | str | None = None) -> Tensor:
        """[in] booleans: the columns that keep a weight."""
        if self.bits is not None:
            dense = self.dense(device=device)
            return dense.flatten(2).any(2).any(0) if dense.dim() > 2 else dense.any(0)
        return _run_mask(self.columns, self.shape[1], device)

    def to(self, device: torch.device | str) -> SplitMask:
        """The mask with its bits on `device`; itself where nothing moves."""
        if self.bits is None or self.bits.device == torch.device(device):
            return self
        return SplitMask(self.shape, bits=self.bits.to(device))

    def _weights(self) -> int:
        return math.prod(self.shape)

    def __eq__(self, other: object) -> bool:
        """Equal shapes and equal runs, or equal bits wherever they are."""
        if not isinstance(other, SplitMask):
            return NotImplemented
        if (self.shape, self.rows, self.columns) != (other.shape, other.rows, other.columns):
            return False
        return self.bits is None or torch.equal(self.bits, other.bits.to(self.bits.device))

    def __hash__(self) -> int:
        return hash((self.shape, self.rows, self.columns))

    def __repr__(self) -> str:
        kept = "bits" if self.bits is not None else f"rows={self.rows}, columns={self.columns}"
        return f"SplitMask({list(self.shape)}, {kept})"


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
        weight = _copy(weight, *in_place, *mask.shape[:2], _is_channels_last(weight))
        if bias is not None:
            bias = bias.masked_fill(~mask.row_mask(bias.device), 0)
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    inputs, groups = plan
    channels_last = _is_channels_last(x)
    x = _take(x, None, inputs)
    weight = _take(weight, mask.rows, mask.columns)
    if bias is not None:
        bias = _take(bias.view(1, -1, 1, 1), None, mask.rows).flatten()
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return _widen(y, mask.rows, mask.shape[0], channels_last or _is_channels_last(y))


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
            inputs = _joined((group * width + s, n) for group in used for s, n in mask.columns)
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
        sizes = 0 if rows is None else _total(rows), _total(columns)
        moves = [] if rows is None else _packed(rows), _packed(columns)
        return _copy(tensor, *moves, *sizes, _is_channels_last(tensor))
    start, length = columns[0]
    if rows is None and length == width:
        return tensor
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


def _is_channels_last(tensor: Tensor) -> bool:
    """Whether samples are dense in channels_last and not in NCHW."""
    dense = [True, True]
    for i, order in enumerate(((3, 2, 1), (1, 3, 2))):
        expected = 1
        for dim in order:
            if tensor.shape[dim] != 1 and tensor.stride(dim) != expected:
                dense[i] = False
                break
            expected = expected * tensor.shape[dim]
    return dense[1] and not dense[0]


def _conv_dtype(weight: Tensor) -> torch.dtype:
    """What conv2d would cast the weight to."""
    kind = weight.device.type
    if weight.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return weight.dtype
    return torch.get_autocast_dtype(kind)


# Masks: helpers and checks.


def _active(width: int, rate: float) -> int:
    """a(n) = ceil(n * rate), at least 1."""
    return max(1, math.ceil(width * rate - 1e-9))


def _total(runs: Runs) -> int:
    return sum(length for _, length in runs)


def _joined(runs: Iterable[tuple[int, int]]) -> Runs:
    """The runs with those that touch joined."""
    joined: list[tuple[int, int]] = []
    for start, length in runs:
        if joined and joined[-1][0] + joined[-1][1] == start:
            start, length = joined[-1][0], joined.pop()[1] + length
        joined.append((start, length))
    return tuple(joined)


def _run_mask(runs: Runs, size: int, device: torch.device | str | None) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool, device=device)
    for start, length in runs:
        mask[start : start + length] = True
    return mask


def _shape(shape: Sequence[int]) -> tuple[int, ...]:
    shape = tuple(int(size) for size in shape)
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(
            f"SplitMask: shape must be that of a non-empty weight [out, in, ...], got {list(shape)}"
        )
    return shape


def _runs(name: str, runs: Iterable[Sequence[int]], size: int) -> Runs:
    result, end = [], 0
    for run in runs:
        if len(run) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) for n in run):
            raise TypeError(f"SplitMask: {name} must be pairs of integers, got {run!r}")
        start, length = run
        if start < end or length < 1 or start + length > size:
            raise ValueError(
                f"SplitMask: {name} must be ascending, disjoint runs (start, length) "
                f"within {size}, got ({start}, {length})"
            )
        result.append((start, length))
        end = start + length
    if not result:
        raise ValueError(f"SplitMask: {name} must have at least one run, got none")
    return _joined(result)


def _check_rate(rate: float) -> None:
    if not 0 < rate <= 1:
        raise ValueError(f"SplitMask: rate must be in (0, 1], got {rate}")


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
    format = torch.channels_last if _is_channels_last(weight) else torch.contiguous_format
    return torch.empty(weight.shape, dtype=dtype, device=weight.device, memory_format=format)


def _draw_fake(like: Tensor, key: int, count: int, threshold: int) -> Tensor:
    return torch.empty((count + 7) // 8, dtype=torch.uint8, device=like.device)


# Autograd: a copy's gradient is the copy back, a mask's gradient the masked gradient.


def _copy_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    source, ctx.rows, ctx.columns, _, _, _ = inputs
    ctx.sizes = (source.shape[0] if ctx.rows else 0, source.shape[1])
    ctx.channels_last = _is_channels_last(source)


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
