"""Learning-rate schedules: timm's, and the published ones timm lacks, as functions of the epoch."""

from __future__ import annotations

import argparse
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence

from timm.scheduler import create_scheduler_v2
from torch.optim import Optimizer


def constant(epoch: int, options: argparse.Namespace) -> float:
    """1, after a warm-up of (e + 1) / W."""
    return min(1.0, (epoch + 1) / max(1, options.warmup_epochs))


def log(epoch: int, options: argparse.Namespace) -> float:
    """Log-spaced over `decades`, one value an epoch, both ends exact.

    Knowledge-consistency and quantified-knowledge papers.
    """
    last = options.epochs - 1
    return 10 ** (-options.decades * epoch / last) if last else 1.0


def multistep(epoch: int, options: argparse.Namespace) -> float:
    """Drop by `decay_rate` once `m` whole epochs have been trained, for each milestone m.

    timm's drops one epoch sooner, at 1-based epoch m itself.
    """
    drops = bisect_right(sorted(options.decay_milestones), epoch)
    return constant(epoch, options) * options.decay_rate**drops


def evolution_cosine(epoch: int, options: argparse.Namespace) -> float:
    """Warm-up (e + 1) / W, then 0.5 * (1 + cos(pi * (e - W) / (E - W))): never exactly 0.

    Taha et al., "Knowledge Evolution in Neural Networks", CVPR 2021, public code.
    """
    warmup = options.warmup_epochs
    if epoch < warmup:
        return (epoch + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (options.epochs - warmup)))


def evolution_step(epoch: int, options: argparse.Namespace) -> float:
    """1, then 1/10 from half of the epochs on, 1/100 from three quarters on; no warm-up.

    Taha et al., CVPR 2021, public code.
    """
    return 0.1 ** ((epoch >= 0.5 * options.epochs) + (epoch >= 0.75 * options.epochs))


def plateau(losses: Sequence[float], options: argparse.Namespace) -> float:
    """Times `decay_rate` whenever more than `patience_epochs` scores have brought nothing better.

    `losses` are those of the evaluations so far; better is lower by one part in 10,000, the rule of
    PyTorch's ReduceLROnPlateau.
    """
    best, bad, factor = math.inf, 0, 1.0
    for loss in losses:
        better = loss < best * (1 - 1e-4)
        best, bad = (loss, 0) if better else (best, bad + 1)
        if bad > options.patience_epochs:
            factor, bad = factor * options.decay_rate, 0
    return factor


OWN_SCHEDULES: dict[str, Callable[[int, argparse.Namespace], float]] = {
    "constant": constant,
    "log": log,
    "multistep": multistep,
    "evolution-cosine": evolution_cosine,
    "evolution-step": evolution_step,
}
TIMM_SCHEDULES = ("cosine", "tanh", "step", "poly")
SCHEDULES = (*OWN_SCHEDULES, "plateau", *TIMM_SCHEDULES)


class Schedule:
    """Sets the learning rate of `optimizer` before every epoch, or every step where asked.

    A pure function of epoch, step and, of `plateau`, the evaluation losses before, which are
    `losses`: a resumed run needs nothing but those.
    """

    def __init__(self, optimizer: Optimizer, options: argparse.Namespace, steps_per_epoch: int):
        self.optimizer, self.options, self.steps = optimizer, options, steps_per_epoch
        self.bases = [group["lr"] for group in optimizer.param_groups]
        self.timm = None
        self.losses: list[float] = []
        if options.sched in TIMM_SCHEDULES:
            self.timm, _ = create_scheduler_v2(
                optimizer,
                sched=options.sched,
                num_epochs=options.epochs,
                decay_epochs=options.decay_epochs,
                decay_rate=options.decay_rate,
                min_lr=options.min_lr,
                warmup_lr=options.warmup_lr,
                warmup_epochs=options.warmup_epochs,
                step_on_epochs=not options.sched_on_updates,
                updates_per_epoch=steps_per_epoch,
            )

    def start_epoch(self, epoch: int) -> None:
        """Set the rate of 0-based `epoch`."""
        if self.timm is not None:
            self.timm.step(epoch)
            return
        if self.options.sched == "plateau":
            factor = constant(epoch, self.options) * plateau(self.losses, self.options)
        else:
            factor = OWN_SCHEDULES[self.options.sched](epoch, self.options)
        for group, base in zip(self.optimizer.param_groups, self.bases, strict=True):
            group["lr"] = base * factor

    def start_step(self, step: int) -> None:
        """Set the rate of optimizer step `step`, counted from the start of training."""
        if self.timm is not None and self.options.sched_on_updates:
            self.timm.step_update(step)
