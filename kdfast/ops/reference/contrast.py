"""Contrastive representation distillation: draws, loss, bank update."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.ops._checks import compute_dtype
from kdfast.ops._key import Key
from kdfast.ops.reference.philox import counter_of, philox

EPSILON = 1e-7  # of the published code, in every denominator of the loss
ROW_EPSILON = 1e-12  # smallest norm a bank row is divided by
ROUNDS = 6  # of the permutation
_MASK = 0xFFFFFFFF


def draw_negatives(
    labels: Tensor,
    class_offsets: Tensor,
    negatives: int,
    ids: Tensor,
    key: Key,
    order: Tensor | None = None,
) -> Tensor:
    """[B, K + 1] indices, column 0 `ids`, the rest of other classes; see `kdfast.ops`."""
    first = class_offsets[labels]
    own = class_offsets[labels + 1] - first
    first, own, size = (x.unsqueeze(1) for x in (first, own, class_offsets[-1] - own))
    places = torch.arange(negatives, device=ids.device).unsqueeze(0)
    values = torch.where(
        negatives <= size,
        _permuted(places % size, size, ids.unsqueeze(1), key),
        _with_replacement(places, size, ids.unsqueeze(1), key),
    )
    drawn = values + own * (values >= first)
    return torch.cat([ids.unsqueeze(1), drawn if order is None else order[drawn]], 1)


def _permuted(places: Tensor, size: Tensor, ids: Tensor, key: Key) -> Tensor:
    """The permutation of [0, size) at `places`: `Permutation` of csrc/contrast.h."""
    rows = size.double().sqrt().ceil().long()
    columns = (size + rows - 1) // rows
    zero = torch.zeros_like(ids)
    words = [
        word for block in (0, 1) for word in philox(key.value, counter_of(zero + block, ids, zero))
    ]
    row, column = places // columns, places % columns
    value = size
    while bool((value >= size).any()):  # cells past `size` go on until none is
        again = value >= size
        to_row, to_column = row, column
        for k in range(0, ROUNDS, 2):
            to_row = _shifted(to_row, to_column, words[k], rows)
            to_column = _shifted(to_column, to_row, words[k + 1], columns)
        row, column = torch.where(again, to_row, row), torch.where(again, to_column, column)
        value = row * columns + column
    return value


def _shifted(a: Tensor, x: Tensor, key: Tensor, size: Tensor) -> Tensor:
    bits = ((x ^ key) * 0x9E3779B9) & _MASK
    bits = ((bits ^ (bits >> 15)) * 0xBB67AE85) & _MASK
    return (a + (((bits >> 16) * size) >> 16)) % size


def _with_replacement(places: Tensor, size: Tensor, ids: Tensor, key: Key) -> Tensor:
    blocks = places[:, ::4] // 4 + 2
    words = philox(key.value, counter_of(blocks, ids, torch.zeros_like(ids)))
    bits = torch.stack(words, 2).flatten(1)[:, : places.shape[1]]
    return (bits * size) >> 32


def contrastive_loss(
    student: Tensor,
    teacher: Tensor,
    student_bank: Tensor,
    teacher_bank: Tensor,
    indices: Tensor,
    z_student: Tensor,
    z_teacher: Tensor,
    temperature: float,
) -> Tensor:
    """The loss of both sides, over gathered bank rows [B, K + 1, d]; see `kdfast.ops`."""
    dtype = compute_dtype(student, teacher, student_bank, teacher_bank)
    c = (indices.shape[1] - 1) / student_bank.shape[0]
    sides = []
    for anchor, bank, z in (
        (student, teacher_bank, z_student),
        (teacher, student_bank, z_teacher),
    ):
        scores = _scores(anchor.to(dtype), bank.to(dtype), indices)
        log_x = scores / temperature - z.to(dtype).log()
        x = log_x.exp()
        positive = (x[:, 0] + (c + EPSILON)).log() - log_x[:, 0]
        negative = ((x[:, 1:] + EPSILON) / c).log1p().sum(1)
        sides.append((positive + negative).mean())
    return sides[0] + sides[1]


@torch.no_grad()
def contrastive_constants(
    student: Tensor,
    teacher: Tensor,
    student_bank: Tensor,
    teacher_bank: Tensor,
    indices: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """(Z_s, Z_t): bank rows times the mean of exp(score / temperature); see `kdfast.ops`."""
    dtype = compute_dtype(student, teacher, student_bank, teacher_bank)
    return tuple(
        bank.shape[0]
        * (_scores(anchor.to(dtype), bank.to(dtype), indices) / temperature).exp().mean()
        for anchor, bank in ((student, teacher_bank), (teacher, student_bank))
    )


def _scores(anchor: Tensor, bank: Tensor, indices: Tensor) -> Tensor:
    rows = bank.detach()[indices]  # [B, K + 1, d]
    with torch.autocast(anchor.device.type, enabled=False):
        return torch.bmm(rows, anchor.unsqueeze(2)).squeeze(2)


@torch.no_grad()
def contrastive_update_(
    student_bank: Tensor,
    teacher_bank: Tensor,
    student: Tensor,
    teacher: Tensor,
    index: Tensor,
    momentum: float,
) -> None:
    """M[i] <- M[i] and e[i] blended and normalised, in place; see `kdfast.ops`."""
    # Equal indices all write what the last of them would.
    same = index.unsqueeze(1) == index.unsqueeze(0)
    last = (same * torch.arange(len(index), device=index.device)).amax(1)
    for bank, embedding in ((student_bank, student), (teacher_bank, teacher)):
        blended = momentum * bank[index] + (1 - momentum) * embedding.to(bank)[last]
        norm = torch.linalg.vector_norm(blended, dim=1, keepdim=True).clamp_min(ROW_EPSILON)
        bank[index] = blended / norm
