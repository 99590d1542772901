"""Which weights of a layer belong to the fit hypothesis, without a dense mask.

Taha, Shrivastava, Davis, "Knowledge Evolution in Neural Networks", CVPR 2021, arXiv 2103.05152.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from kdfast.ops import _library
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
        kept = active(groups, rate) * (out // groups) if groups > 1 else active(out, rate)
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
            columns = [(s, active(n, rate)) for s, n in zip(starts, segments, strict=True)]
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
        return total(self.rows) * total(self.columns) * math.prod(self.shape[2:])

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


def active(width: int, rate: float) -> int:
    """a(n) = ceil(n * rate), at least 1; forgives 1e-9, the error of a float product."""
    return max(1, math.ceil(width * rate - 1e-9))


def total(runs: Runs) -> int:
    return sum(length for _, length in runs)


def joined_runs(runs: Iterable[tuple[int, int]]) -> Runs:
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
    return joined_runs(result)


def _check_rate(rate: float) -> None:
    if not 0 < rate <= 1:
        raise ValueError(f"SplitMask: rate must be in (0, 1], got {rate}")
