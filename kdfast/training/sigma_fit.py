"""Which candidates the sigma runs of several networks try, and when there are enough."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from kdfast.errors import Stopped
from kdfast.training import journal
from kdfast.training.interrupt import Interrupt
from kdfast.training.journal import say
from kdfast.training.sigma_training import SigmaTrainer
from kdfast.training.tell import duration


def fit(trainers: Sequence[SigmaTrainer], *, in_common: bool) -> list[dict[str, Any]]:
    """Try candidates until `--images` of them are accepted; the results, already written.

    Each network until it has accepted enough, one network after the other as in the published
    code; with `in_common` all of them, block by block, until enough are accepted by every one.

    Candidates are taken in blocks of at most `--image-batch` images a process, never more than are
    still to be accepted. So which images are solved together follows from the options and from
    earlier results alone: a resumed run makes the same files.
    """
    for trainer in trainers:
        trainer.settle()
    groups = [list(trainers)] if in_common else [[trainer] for trainer in trainers]
    return [results for group in groups for results in _Group(group).fit()]


class _Group:
    """Networks that are asked about the same blocks."""

    def __init__(self, trainers: list[SigmaTrainer]):
        self.trainers = trainers
        first = trainers[0]
        self.accelerator, self.rows = first.accelerator, first.rows
        self.images = first.options.images
        self.most = first.options.image_batch * self.accelerator.num_processes

    def accepted(self) -> set[int]:
        return set.intersection(*(trainer.accepted() for trainer in self.trainers))

    def fit(self) -> list[dict[str, Any]]:
        with ExitStack() as stack:
            for trainer in self.trainers:
                stack.enter_context(trainer.opened())
                say(
                    f"{trainer.watched.snapshots.name} at {trainer.watched.layer}, "
                    f"{len(trainer.epochs)} checkpoints, into {trainer.run.path}"
                )
            interrupt = stack.enter_context(Interrupt(self.accelerator, patient=True))
            self.started = time.monotonic()
            self.tried = 0
            while self.tried < len(self.rows) and (found := len(self.accepted())) < self.images:
                size = min(self.most, self.images - found, len(self.rows) - self.tried)
                for number in range(len(self.trainers)):
                    self._block(number, size, interrupt)
                self.tried += size
            both = {"accepted_in_common": len(self.accepted())} if len(self.trainers) > 1 else {}
            results = [trainer.finish(**both) for trainer in self.trainers]
            if number := interrupt.at_last():
                raise Stopped(number, "; the results are complete")
        return results

    def _block(self, number: int, size: int, interrupt: Interrupt) -> None:
        """The next `size` candidates through one of the networks."""
        trainer = self.trainers[number]
        last = self.tried + size - 1
        accepted = len(self.accepted())

        def told(epoch: int, remain: int) -> None:
            words = [
                f"images {self.tried}-{last}" if size > 1 else f"image {last}",
                f"checkpoint {epoch}",
                f"{remain} of {size} remain",
                f"{accepted} of {self.images} accepted",
            ]
            if len(self.trainers) > 1:
                words.insert(0, trainer.watched.snapshots.name)
            through = 1 - trainer.epochs.index(epoch) / len(trainer.epochs)
            share = (number + through) / len(self.trainers)
            left = self._left(accepted + remain, size, share)
            say("  ".join(words + ([f"{duration(left)} left"] if left is not None else [])))

        with journal.logged_to(trainer.run.log):
            trainer.block(trainer.rows[self.tried : last + 1], interrupt, told)

    def _left(self, accepted: int, size: int, share: float) -> float | None:
        """Seconds until enough images are accepted, if as many go on to be.

        `share` of the block of `size` images is done; `accepted` counts what remains of it.
        """
        solved = sum(trainer.solved for trainer in self.trainers)
        if not solved:
            return None
        each = (time.monotonic() - self.started) / solved
        a_candidate = sum(trainer.units for trainer in self.trainers) / (self.tried + share * size)
        begun = self.tried + size
        more = max(0, self.images - accepted) * begun / max(1, accepted)
        return each * a_candidate * ((1 - share) * size + min(more, len(self.rows) - begun))
