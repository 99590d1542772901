"""Philox4x32-10 in integer arithmetic of torch; the bits of `csrc/philox.h`."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

Word = TypeVar("Word", Tensor, int)
_MASK = 0xFFFFFFFF


def philox(key: int, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four words of random bits, int64 tensors in [0, 2^32), for four words of counter each.

    `key` has 64 bits, signed or not. Counters broadcast.
    """
    return rounds(key, *torch.broadcast_tensors(*counter))


def rounds(key: int, a: Word, b: Word, c: Word, d: Word) -> tuple[Word, Word, Word, Word]:
    """`philox` of one counter, all words tensors of one shape or all Python integers."""
    low, high = key & _MASK, (key >> 32) & _MASK
    for _ in range(10):
        (p_high, p_low), (q_high, q_low) = _product(0xD2511F53, a), _product(0xCD9E8D57, c)
        a, b, c, d = q_high ^ b ^ low, q_low, p_high ^ d ^ high, p_low
        low, high = (low + 0x9E3779B9) & _MASK, (high + 0xBB67AE85) & _MASK
    return a, b, c, d


def counter_of(block: Word, id: Word, sample: Word) -> tuple[Word, Word, Word, Word]:
    """The counter of element block `block`, dataset item `id` and `sample`, which broadcast."""
    return block & _MASK, id & _MASK, (id >> 32) & _MASK, sample & _MASK


def uniform(bits: Tensor) -> Tensor:
    """float32 on [0, 1) from the upper 24 of 32 bits."""
    return (bits >> 8).to(torch.float32) * 2.0**-24


def _product(constant: int, word: Word) -> tuple[Word, Word]:
    """Upper and lower half of the 64-bit product, without leaving int64."""
    upper, lower = constant >> 16, constant & 0xFFFF
    low = lower * word
    middle = upper * word + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)
