"""What the micro-batches of an epoch add up to: total and terms, read only now and then."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

# Rows that are kept at most before they are added up, whatever the log interval.
_ROWS = 1024


class Tally:
    """Sums of total and terms weighted by images, and of the images, on this process.

    A step leaves one small float32 copy on the device and computes nothing more; what was left is
    added up, in order and in float64, when `sums` or `first_bad` are read, which waits for the
    device. The bits of the sums do not depend on when they were read.

    Args:
        sums: what was added up before, [1 + terms + 1].
    """

    def __init__(self, sums: Sequence[float]):
        self._sums = torch.tensor(sums, dtype=torch.float64)
        self._first_bad = torch.full_like(self._sums[:-1], math.inf)
        self._rows: list[torch.Tensor] = []
        self._seen: list[tuple[int, int]] = []

    def add(self, total: torch.Tensor, terms: torch.Tensor, count: int, step: int) -> None:
        """Note total [] and terms [terms] of a micro-batch of `count` images in step `step`."""
        # A copy: compiled code uses the memory of its results again.
        self._rows.append(torch.cat([total.detach().reshape(1), terms]))
        self._seen.append((count, step))
        if len(self._rows) == _ROWS:
            self._add_up()

    def _add_up(self) -> None:
        if not self._rows:
            return
        values = torch.stack(self._rows).cpu().double()
        counts, steps = torch.tensor(self._seen, dtype=torch.float64).unbind(1)
        bad = torch.where(torch.isfinite(values), math.inf, steps[:, None]).amin(0)
        self._first_bad = torch.minimum(self._first_bad, bad)
        weighted = torch.cat([values * counts[:, None], counts[:, None]], 1)
        # One row after the other: on a CPU a cumulative sum adds in order.
        self._sums = torch.cat([self._sums[None], weighted]).cumsum(0)[-1]
        self._rows.clear()
        self._seen.clear()

    @property
    def sums(self) -> torch.Tensor:
        """float64 [1 + terms + 1] on the host."""
        self._add_up()
        return self._sums

    @property
    def first_bad(self) -> torch.Tensor:
        """The first step at which total and terms were not finite, else inf: [1 + terms]."""
        self._add_up()
        return self._first_bad
