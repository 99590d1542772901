"""Batches as a pure function of (seed, epoch): which images, in which order, on which process.

The order of an epoch is drawn once for all processes; each takes its slice of every global batch.
No image comes twice in an epoch, none twice in evaluation, none is invented to fill a batch.
"""

from __future__ import annotations

import atexit
import math
import signal
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from kdfast.data.sources import UNREADABLE, Source, unreadable
from kdfast.data.transforms import CropFlip, Transform
from kdfast.errors import UserError
from kdfast.ops import Key
from kdfast.seeding import derive_seed, local_randomness


@dataclass(frozen=True)
class Portion:
    """One process's share of one micro-batch.

    `indices` are dataset indices; `count` of them are real (0 when this process only keeps step
    with the others and repeats one image at weight 0). `weight` times the mean loss over the
    portion, averaged over processes and summed over the micro-batches of a step, is the mean over
    the step's images.
    """

    indices: list[int]
    count: int
    weight: float
    starts_step: bool
    ends_step: bool


class BatchPlan:
    """Cuts `size` images into steps of `batch_size * processes * accumulation`.

    `batch_size` is per process and micro-batch. With `drop_last` an uneven last step is left out.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        processes: int = 1,
        rank: int = 0,
        accumulation: int = 1,
        seed: int = 0,
        shuffle: bool = False,
        drop_last: bool = False,
    ):
        self.size, self.batch_size, self.processes, self.rank = size, batch_size, processes, rank
        self.accumulation, self.seed, self.shuffle = accumulation, seed, shuffle
        self.drop_last = drop_last

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.processes * self.accumulation

    @property
    def steps(self) -> int:
        """Optimizer steps an epoch."""
        whole = self.size // self.global_batch
        return whole if self.drop_last else math.ceil(self.size / self.global_batch)

    def order(self, epoch: int) -> torch.Tensor:
        if not self.shuffle:
            return torch.arange(self.size)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
        return torch.randperm(self.size, generator=generator)

    def portions(self, epoch: int, first_step: int = 0) -> list[Portion]:
        """This process's portions of the steps of `epoch` from `first_step` on."""
        order = self.order(epoch).tolist()
        micro = self.batch_size * self.processes
        portions = []
        for step in range(first_step, self.steps):
            batch = order[step * self.global_batch : (step + 1) * self.global_batch]
            for start in range(0, len(batch), micro):
                part = batch[start : start + micro]
                # Ceilings, so that process 0 (whose buffers the others receive) is never idle.
                low, high = (
                    math.ceil(len(part) * r / self.processes) for r in (self.rank, self.rank + 1)
                )
                indices = part[low:high]
                portions.append(
                    Portion(
                        indices or part[:1],
                        len(indices),
                        len(indices) * self.processes / len(batch),
                        start == 0,
                        start + micro >= len(batch),
                    )
                )
        return portions


@dataclass(frozen=True)
class Batch:
    """`images` [B, 3, H, W], int64 `labels` and dataset `indices` [B], and their portion.

    Images are uint8 on the host, or float32 where a loader has them on the device, normalised.
    """

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    portion: Portion


class _Samples(Dataset):
    """Source and pipeline joined; addressed by (epoch, index), so that a worker needs no state."""

    def __init__(self, source: Source, transform: Transform, classes: int, seed: int):
        self.source, self.transform, self.classes, self.seed = source, transform, classes, seed

    def __getitem__(self, key: tuple[int, int]):
        epoch, index = key
        try:
            # Pillow also warns of what it then raises or repairs.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image, label = self.source.read(index)
            pixels = self._transformed(image, epoch, index)
        except UNREADABLE as error:
            # Returned, not raised: a worker's exception arrives with the worker's traceback.
            return unreadable(self.source, index, error)
        if not 0 <= label < self.classes:
            return wrong_label(self.source, index, label, self.classes)
        return pixels, label, index

    def _transformed(self, image: Image.Image, epoch: int, index: int) -> torch.Tensor:
        if isinstance(self.transform, CropFlip):
            return self.transform(image, Key(self.seed, "augment", epoch), index)
        with local_randomness(derive_seed(self.seed, "augment", epoch, index)):
            return self.transform(image)


def wrong_label(source: Source, index: int, label: int, classes: int) -> UserError:
    """The line for an image whose label is none of the classes."""
    return UserError(f"{source.describe(index)} has label {label}, outside the {classes} classes")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _collate(samples: list):
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
    images, labels, indices = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels), torch.tensor(indices)


class _Addresses:
    """The batch sampler: (epoch, index) pairs of the epoch at hand."""

    def __init__(self, plan: BatchPlan):
        self.plan, self.epoch = plan, 0
        self.portions: list[Portion] = []

    def start(self, epoch: int, first_step: int) -> list[Portion]:
        self.epoch, self.portions = epoch, self.plan.portions(epoch, first_step)
        return self.portions

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for portion in self.portions:
            yield [(self.epoch, index) for index in portion.indices]

    def __len__(self) -> int:
        return len(self.portions)


def _leave_signals(worker: int) -> None:
    """The training process decides when to stop; a Ctrl-C reaches its workers too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


_workers: set[BaseProcess] = set()


def _end(workers: Iterable[BaseProcess]) -> None:
    """Workers do not obey SIGTERM, with which torch and multiprocessing would end them."""
    for worker in workers:
        if worker.is_alive():
            worker.kill()


atexit.register(_end, _workers)


class Loader:
    """Batches of `source` as `plan` cuts them, on this process.

    `loader.epoch(e)` iterates epoch e, `loader.epoch(e, s)` what is left of it after s steps.

    Raises `UserError` naming the image when one cannot be read.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        plan: BatchPlan,
        *,
        classes: int,
        workers: int = 0,
        pin_memory: bool = False,
    ):
        self.plan = plan
        self._addresses = _Addresses(plan)
        self._loader = DataLoader(
            _Samples(source, transform, classes, plan.seed),
            batch_sampler=self._addresses,
            collate_fn=_collate,
            num_workers=workers,
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            worker_init_fn=_leave_signals,
            # Its own generator: drawing worker seeds must not move dropout's.
            generator=torch.Generator(),
        )

    def close(self) -> None:
        """End the worker processes; the next epoch would start new ones."""
        iterator, self._loader._iterator = self._loader._iterator, None
        if iterator is not None:
            iterator._shutdown_workers()
            _end(iterator._workers)
            for worker in iterator._workers:
                worker.join()

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        portions = self._addresses.start(epoch, first_step)
        for portion, batch in zip(portions, self._batches(), strict=True):
            if isinstance(batch, UserError):
                raise batch
            yield Batch(*batch, portion)

    def _batches(self) -> Iterator:
        try:
            batches = iter(self._loader)
            if self._loader.num_workers:
                _workers.difference_update([w for w in _workers if not w.is_alive()])
                _workers.update(batches._workers)
            yield from batches
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise UserError(
                f"{_one_line(error)}; when memory or shared memory (/dev/shm) ran out, lower "
                "--workers"
            ) from None
