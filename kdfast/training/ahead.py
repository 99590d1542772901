"""Batches on the device with what the teacher says of them, one batch ahead on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from kdfast.data import Batch
from kdfast.data.loader import Portion


@dataclass(frozen=True)
class Ready:
    """A portion as the objective takes it: `taught` is what the teacher answers, () without one."""

    portion: Portion
    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    taught: tuple = ()


class Side(Protocol):
    """Where the next batch is made ready while the one before trains."""

    def run(self, work: Callable[[], Ready | None]) -> tuple[Ready | None, Any]:
        """What `work` returns, perhaps still being computed, and a mark of when it will be."""

    def hand_over(self, ready: Ready, mark: Any) -> None:
        """Let the caller's stream use what `run` returned with `mark`."""


class SideStream:
    """A stream of its own on the CUDA device `device`."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)

    def run(self, work: Callable[[], Ready | None]) -> tuple[Ready | None, torch.cuda.Event]:
        # Not before the steps that were asked for already: never more than one batch ahead.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            ready = work()
        return ready, self.stream.record_event()

    def hand_over(self, ready: Ready, mark: torch.cuda.Event) -> None:
        current = torch.cuda.current_stream(self.device)
        current.wait_event(mark)
        for tensor in tensors_of((ready.images, ready.labels, ready.indices, ready.taught)):
            # Its memory is not to serve the side stream again before `current` has used it.
            tensor.record_stream(current)


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested tuples and lists."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_of(part)


def made_ready(
    batches: Iterator[Batch], work: Callable[[Batch], Ready], side: Side | None = None
) -> Iterator[Ready]:
    """`work(batch)` for each of `batches`, in order.

    With `side` the loader and the work of batch n + 1 come before batch n is handed out, on `side`;
    nothing is begun beyond the end of `batches`. What fails there fails one batch early.
    """
    if side is None:
        yield from map(work, batches)
        return

    def next_one() -> Ready | None:
        batch = next(batches, None)
        return None if batch is None else work(batch)

    ready, mark = side.run(next_one)
    while ready is not None:
        following = side.run(next_one)
        side.hand_over(ready, mark)
        yield ready
        ready, mark = following
