"""Redrawing the reset part of split weights: public function, fake.

Taha, Shrivastava and Davis, "Knowledge Evolution in Neural Networks", CVPR 2021, arXiv 2103.05152.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdfast.ops import _library, reference
from kdfast.ops._checks import check_device, check_floating, register
from kdfast.ops._key import Key

MOST_ELEMENTS = 1 << 31  # of a weight


def split_reset_(weights: Sequence[Tensor], masks: Sequence[Any], key: Key) -> None:
    """W <- M * W + (1 - M) * R in place, R ~ U(-b, b), b = 1 / sqrt(fan_in).

    fan_in = in * kh * kw of the whole weight, whatever its mask keeps. Element e (its flat index in
    the weight's shape) of layer i is redrawn from the Philox counter (e // 4, i): it depends on
    the key, the layer's place in `weights` and e alone. Kept entries are not touched.

    Args:
        weights: convolution and linear weights [out, in, ...], float32, float64, float16 or
            bfloat16, on one device, of up to 2^31 entries. Contiguous and channels_last weights are
            written in place, others through a copy.
        masks: one a weight, with the attributes `shape` and either `rows` and `columns`, runs
            (start, length) of the outputs and inputs whose common entries are kept ([R, 2] integer
            tensors serve as well), or `bits`, uint8 on the weight's device: entry e is kept if bit
            e % 8 (from the least significant) of byte e // 8 is set. What is not used is None.
        key: the stream of numbers, such as Key(seed, "reset", generation).

    Raises:
        TypeError, ValueError: for a wrong key, dtype, shape, mask or device. Nothing has been
            written then.

    The bits drawn are the same on every device, and a launch takes 64 layers. Autograd does not see
    the change but for the weights' version.

    Source: the paper's re-initialisation of the reset hypothesis with the library's default,
    Kaiming uniform with a = sqrt(5).
    """
    op = "split_reset_"
    weights, masks = list(weights), list(masks)
    forms = _check(op, weights, masks, key)
    device = weights[0].device
    if not _library.fused(op, device):
        reference.split_reset_(weights, masks, key)
        return
    runs: list[tuple[int, int]] = []
    bits: list[Tensor] = []
    rows, columns = [], []
    for form in forms:
        if isinstance(form, Tensor):
            rows.append(-1)
            columns.append(len(bits))
            bits.append(form.contiguous())
        else:
            rows.append(len(form[0]))
            columns.append(len(form[1]))
            runs += [*form[0], *form[1]]
    table = torch.tensor(runs, dtype=torch.int64).view(-1, 2).to(device)
    with torch.no_grad():
        dense = [w.detach() if _in_place(w) else w.detach().contiguous() for w in weights]
        torch.ops.kdfast.split_reset_(dense, table, bits, rows, columns, key.signed)
        for weight, written in zip(weights, dense, strict=True):
            if weight.data_ptr() != written.data_ptr():
                weight.copy_(written)
            else:
                torch.autograd.graph.increment_version(weight)


def _in_place(weight: Tensor) -> bool:
    return weight.is_contiguous() or (
        weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    )


Runs = list[tuple[int, int]]


def _check(
    op: str, weights: list[Tensor], masks: list[Any], key: Key
) -> list[Tensor | tuple[Runs, Runs]]:
    """The masks as packed bits or (runs of rows, runs of columns)."""
    if not isinstance(key, Key):
        raise TypeError(f"{op}: key must be a kdfast.ops.Key, got {type(key).__name__}")
    if not weights or len(weights) != len(masks):
        raise ValueError(
            f"{op}: weights and masks must be equally many, at least one, "
            f"got {len(weights)} and {len(masks)}"
        )
    forms: list[Tensor | tuple[Runs, Runs]] = []
    for i, (weight, mask) in enumerate(zip(weights, masks, strict=True)):
        name = f"weights[{i}]"
        check_floating(op, name, weight)
        if weight.dim() < 2 or not 0 < weight.numel() <= MOST_ELEMENTS:
            raise ValueError(
                f"{op}: {name} must be [out, in, ...] with 1 to 2^31 entries, "
                f"got shape {list(weight.shape)}"
            )
        check_device(op, name, weight, "weights[0]", weights[0])
        if tuple(mask.shape) != tuple(weight.shape):
            raise ValueError(
                f"{op}: masks[{i}] is of shape {list(mask.shape)}, {name} of {list(weight.shape)}"
            )
        if mask.bits is not None:
            forms.append(_check_bits(op, f"masks[{i}].bits", mask.bits, weight))
        else:
            forms.append(
                (
                    _check_runs(op, f"masks[{i}].rows", mask.rows, weight.shape[0]),
                    _check_runs(op, f"masks[{i}].columns", mask.columns, weight.shape[1]),
                )
            )
    return forms


def _check_bits(op: str, name: str, bits: Tensor, weight: Tensor) -> Tensor:
    if not isinstance(bits, Tensor) or bits.dtype != torch.uint8:
        got = bits.dtype if isinstance(bits, Tensor) else type(bits).__name__
        raise TypeError(f"{op}: {name} must be a uint8 tensor, got {got}")
    count = -(-weight.numel() // 8)
    if bits.numel() != count:
        raise ValueError(f"{op}: {name} must have {count} bytes, got {bits.numel()}")
    check_device(op, name, bits, "the weight", weight)
    return bits


def _check_runs(op: str, name: str, runs: Any, size: int) -> Runs:
    if runs is None:
        raise ValueError(f"{op}: {name} must be given where the mask has no bits")
    runs = [(int(start), int(length)) for start, length in runs]
    end = 0
    for start, length in runs:
        if start < end or length < 1 or start + length > size:
            raise ValueError(
                f"{op}: {name} must be ascending runs (start, length) within [0, {size}) "
                f"that do not overlap, got {runs}"
            )
        end = start + length
    return runs


def _reset_fake(
    weights: list[Tensor],
    runs: Tensor,
    bits: list[Tensor],
    rows: list[int],
    columns: list[int],
    key: int,
) -> None:
    return None


register("split_reset_", _reset_fake)
