"""Sigma training: how much noise each cell of an image bears before a layer's feature moves.

Cheng, Rao, Chen, Zhang, "Explaining Knowledge Distillation by Quantifying the Knowledge", CVPR
2020, section 3; Ma et al., "Quantifying Layerwise Information Discarding of Neural Networks",
arXiv:1906.04109, for the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from kdfast.ops import Key, sigma_noise

# Of a normal distribution with sigma 1, in nats: 0.5 * ln(2 pi e).
UNIT_ENTROPY = 0.5 * math.log(2 * math.pi * math.e)

# (sigma [b, 1, G, G] float64, which of the images these are [b], step) -> the mean of the squared
# feature distance over delta2 [b] float64, and its gradient with respect to sigma [b, 1, G, G].
FeatureTerm = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class SigmaSettings:
    """What a sigma is, for its value depends on all of these.

    `grid` cells a side; `samples` of noise a step; `initial` sigma everywhere, also that of
    delta2; projection onto [`low`, `high`]; `lr` of plain SGD; `steps`, and `more_steps` with the
    loss weight `weight` (lambda) times `escalation` for an image whose mean entropy has not passed
    `target` by then. `interpolate`: ln sigma on the line between the two steps around the target.
    `full`: take all steps even after the target was passed; the same step is selected wherever the
    mean entropy rises with the steps.
    """

    grid: int = 16
    samples: int = 96
    initial: float = 0.01
    low: float = 1e-3
    high: float = 1.0
    lr: float = 1e-4
    steps: int = 60
    more_steps: int = 20
    weight: float = 7.0
    escalation: float = 1.5
    target: float = -2.8
    interpolate: bool = False
    full: bool = False

    @property
    def most_steps(self) -> int:
        return self.steps + self.more_steps


@dataclass(frozen=True)
class SigmaSolution:
    """Sigmas of B images and how they were found, float64 and on the images' device.

    `sigma` [B,1,G,G] and `entropy` [B,G,G] in nats are those of step `selected` [B], the one whose
    mean entropy is closest to the target (interpolated, where that was asked for). `steps_run` [B];
    `mean_entropy`, `feature_loss` and `penalty` (-lambda * mean entropy) [B, steps + more_steps],
    0 where no step was taken; `delta2` [B], the feature's mean squared distance under uniform noise
    of sigma `initial`.

    Of an image without an answer `selected` is -1, sigma and entropy are NaN: its delta2 is 0 (the
    feature does not react) or something on the way was not finite.
    """

    sigma: Tensor
    entropy: Tensor
    selected: Tensor
    steps_run: Tensor
    mean_entropy: Tensor
    feature_loss: Tensor
    penalty: Tensor
    delta2: Tensor


def entropy(sigma: Tensor) -> Tensor:
    """ln sigma + 0.5 ln(2 pi e): nats a pixel, of sigma's shape and dtype."""
    return sigma.log() + UNIT_ENTROPY


def solve_sigma(
    feature: Callable[[Tensor], Tensor],
    images: Tensor,
    ids: Tensor,
    settings: SigmaSettings,
    key: Key,
    *,
    chunk: int | None = None,
    tf32: bool = False,
    each_step: Callable[[], None] | None = None,
) -> SigmaSolution:
    """Sigmas of a batch of images, each the same as alone (to float32 rounding).

    L = mean((phi(x + sigma eps) - phi(x))^2) / delta2 - lambda * mean entropy, the mean over
    samples and elements of the feature; fresh eps at every step, a function of (key, step, id,
    sample) alone. Projected SGD: sigma is clamped before each forward pass, and what a step stores
    is what that pass used, up to its rounding to float32.

    Args:
        feature: phi, [N,C,H,W] float32 -> [N,...] float32, the activation applied; in evaluation
            mode and frozen, so that images do not touch one another and no weight gradient costs.
        images: [B,C,H,W] float32, normalised as the network was trained.
        ids: [B] int64, distinct; what the noise of an image is drawn by.
        settings: see `SigmaSettings`.
        key: of the noise; another checkpoint has another.
        chunk: samples of an image in one forward pass, None for all; changes rounding only.
        tf32: allow TF32 products on a GPU.
        each_step: called before every step; may raise to stop.

    Raises:
        TypeError: images, or a feature, that are not float32: with fewer bits rounding is as large
            as what is measured.
        ValueError: sizes that do not fit together.
    """
    check_settings(settings, images.shape[-2:])
    if images.dtype != torch.float32:
        raise TypeError(f"solve_sigma: images must be float32, got {images.dtype}")
    if images.dim() != 4 or ids.shape != images.shape[:1]:
        raise ValueError(
            f"solve_sigma: expected images [B,C,H,W] and ids [B], got {list(images.shape)} and "
            f"{list(ids.shape)}"
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"solve_sigma: chunk must be at least 1, got {chunk}")
    with exact_products(images.device, tf32):
        term = _Measured(feature, images, ids, settings, key, chunk or settings.samples)
        alive = term.delta2.isfinite() & (term.delta2 > 0)
        return descend(term, alive, settings, term.delta2, each_step=each_step)


def check_settings(settings: SigmaSettings, size: tuple[int, int]) -> None:
    """Raise `ValueError` for numbers that cannot be, naming the first."""
    s = settings
    wrong = {
        "samples": s.samples < 1,
        "grid": not 1 <= s.grid <= min(size),
        "low": not s.low > 0,
        "initial": not s.low <= s.initial <= s.high,
        "lr": not 0 < s.lr < math.inf,
        "steps": s.steps < 1,
        "more_steps": s.more_steps < 0,
        "weight": not 0 < s.weight < math.inf,
        "escalation": not 0 < s.escalation < math.inf,
        "target": not math.isfinite(s.target),
    }
    for name, bad in wrong.items():
        if bad:
            raise ValueError(f"sigma settings: {name} {getattr(s, name)} is impossible")


@contextmanager
def exact_products(device: torch.device, tf32: bool) -> Iterator[None]:
    """float32 arithmetic whatever the caller runs in: no autocast, TF32 only where asked for."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = tf32
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


class _Measured:
    """The feature term by noise: a `FeatureTerm`."""

    def __init__(
        self,
        feature: Callable[[Tensor], Tensor],
        images: Tensor,
        ids: Tensor,
        settings: SigmaSettings,
        key: Key,
        chunk: int,
    ):
        self.feature, self.images, self.ids = feature, images, ids
        self.settings, self.key, self.chunk = settings, key, chunk
        with torch.no_grad():
            self.clean = feature(images)
        if self.clean.dtype != torch.float32:
            raise TypeError(f"solve_sigma: the feature must be float32, got {self.clean.dtype}")
        if self.clean.shape[0] != images.shape[0]:
            raise ValueError(
                f"solve_sigma: the feature of {images.shape[0]} images has shape "
                f"{list(self.clean.shape)}"
            )
        self.elements = self.clean[0].numel()
        # What is left of the batch, kept until more of it is finished.
        self.which = torch.arange(len(images), device=images.device)
        self.rest = (images, ids, self.clean)
        uniform = images.new_full((len(images), 1, settings.grid, settings.grid), settings.initial)
        self.delta2 = self._run(uniform, Key(*key.words, "delta2"), None)[0]

    def __call__(self, sigma: Tensor, which: Tensor, step: int) -> tuple[Tensor, Tensor]:
        if len(which) != len(self.which):
            self.which = which
            self.rest = tuple(tensor[which] for tensor in (self.images, self.ids, self.clean))
        delta2 = self.delta2[which]
        distance, gradient = self._run(sigma.float(), Key(*self.key.words, step), delta2)
        return distance / delta2, gradient

    def _run(self, sigma: Tensor, key: Key, delta2: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Mean squared distance [b], and with `delta2` the gradient of its ratio to that."""
        images, ids, clean = self.rest
        total = torch.zeros(len(images), dtype=torch.float64, device=images.device)
        gradient = None if delta2 is None else torch.zeros_like(sigma, dtype=torch.float64)
        if delta2 is not None:
            sigma.requires_grad_()
            scale = (2 / (self.settings.samples * self.elements * delta2)).float()
        for first in range(0, self.settings.samples, self.chunk):
            count = min(self.chunk, self.settings.samples - first)
            with torch.set_grad_enabled(delta2 is not None):
                noisy = sigma_noise(images, sigma, count, key, ids, first)
                passed = self.feature(noisy.flatten(0, 1))
            del noisy
            moved = passed.detach().unflatten(0, (len(images), count)) - clean[:, None]
            total += _squares(moved).sum(1, dtype=torch.float64)
            if delta2 is not None:
                # Of the mean of squares by hand: nothing of the loss is kept for autograd.
                moved *= scale.view(-1, *[1] * (moved.dim() - 1))
                (part,) = torch.autograd.grad(passed, sigma, moved.flatten(0, 1))
                gradient += part
        return total / (self.settings.samples * self.elements), gradient


def _squares(moved: Tensor) -> Tensor:
    """Of [b, samples, ...] the sums of squares [b, samples], in whatever memory format it is.

    In float32, whose sums are pairwise: as float64 the squares would be copied.
    """
    squares = moved.square()
    rest = tuple(range(2, moved.dim()))
    return squares.sum(rest) if rest else squares


def descend(
    term: FeatureTerm,
    alive: Tensor,
    settings: SigmaSettings,
    delta2: Tensor,
    *,
    each_step: Callable[[], None] | None = None,
) -> SigmaSolution:
    """Projected gradient descent on term(sigma) - lambda * mean entropy, each image for itself.

    Args:
        term: of some of the images; see `FeatureTerm`.
        alive: [B] bool, those to be solved; the others get no answer.
        delta2: [B] float64, passed on.
    """
    device, batch, cells = alive.device, len(alive), settings.grid**2
    shape = (batch, 1, settings.grid, settings.grid)
    sigma = torch.full(shape, settings.initial, dtype=torch.float64, device=device)
    weight = settings.weight
    found = _Found(shape, settings, device)
    active = alive.nonzero()[:, 0]
    for step in range(settings.most_steps):
        if step == settings.steps:
            active = active[~found.passed[active]]
            weight *= settings.escalation
        if not len(active):
            break
        if each_step is not None:
            each_step()
        current = sigma[active].clamp_(settings.low, settings.high)
        distance, gradient = term(current, active, step)
        current = current.detach()
        over = found.store(active, step, current, distance, weight)
        gradient = gradient - weight / (cells * current)
        sigma.index_copy_(0, active, current - settings.lr * gradient)
        if not settings.full:
            active = active[~over]  # the one place of a step where the host waits for a GPU
    return found.solution(delta2)


class _Found:
    """History and best step of a batch."""

    def __init__(self, shape: tuple[int, ...], settings: SigmaSettings, device: torch.device):
        self.settings = settings
        batch = shape[0]

        def filled(value: float, *size: int) -> Tensor:
            return torch.full(size, value, dtype=torch.float64, device=device)

        self.mean_entropy, self.feature_loss, self.penalty = (
            filled(0, batch, settings.most_steps) for _ in range(3)
        )
        self.best, self.between, self.last = (filled(math.nan, *shape) for _ in range(3))
        self.gap = filled(math.inf, batch)
        self.selected = torch.full((batch,), -1, device=device)
        self.steps_run = torch.zeros_like(self.selected)
        self.rising = torch.ones(batch, dtype=torch.bool, device=device)
        self.passed = ~self.rising
        self.crossed = ~self.rising

    def store(
        self, which: Tensor, step: int, sigma: Tensor, distance: Tensor, weight: float
    ) -> Tensor:
        """Whether images `which` [b] need no further step [b]."""
        target = self.settings.target
        mean = entropy(sigma).mean((1, 2, 3))
        self.mean_entropy[:, step].index_copy_(0, which, mean)
        self.feature_loss[:, step].index_copy_(0, which, distance)
        self.penalty[:, step].index_copy_(0, which, -weight * mean)
        self.steps_run.index_fill_(0, which, step + 1)
        gap, before = (mean - target).abs(), self.gap[which]
        closer = gap < before  # strictly: of equal steps the first
        self.gap.index_copy_(0, which, torch.where(closer, gap, before))
        self._put(self.best, which, closer, sigma)
        self.selected.index_copy_(0, which, self.selected[which].masked_fill_(closer, step))
        over = mean > target
        self.passed.index_copy_(0, which, self.passed[which] | over)
        if not step:
            finished = torch.zeros_like(over)
        else:
            before = self.mean_entropy[:, step - 1][which]
            rising = self.rising[which] & (mean >= before)
            self.rising.index_copy_(0, which, rising)
            if self.settings.interpolate:
                self._interpolate(which, sigma, before, mean, over & (before <= target))
            # While it rises no later step comes closer than this one or the one before.
            finished = over & rising
        if self.settings.interpolate:
            self.last.index_copy_(0, which, sigma)
        return finished

    @staticmethod
    def _put(kept: Tensor, which: Tensor, chosen: Tensor, value: Tensor) -> None:
        """kept[which[chosen]] = value[chosen], without waiting for what is chosen."""
        mixed = torch.where(chosen[:, None, None, None], value, kept[which])
        kept.index_copy_(0, which, mixed)

    def _interpolate(
        self, which: Tensor, sigma: Tensor, before: Tensor, mean: Tensor, over: Tensor
    ) -> None:
        """ln sigma on the line to the target, of the images that pass it for the first time."""
        first = over & ~self.crossed[which]
        share = ((self.settings.target - before) / (mean - before))[:, None, None, None]
        there, here = sigma.log(), self.last[which].log()
        self._put(self.between, which, first, (here + share * (there - here)).exp())
        self.crossed.index_copy_(0, which, self.crossed[which] | first)

    def solution(self, delta2: Tensor) -> SigmaSolution:
        sigma = torch.where(self.between.isnan(), self.best, self.between)
        sound = sigma.isfinite().flatten(1).all(1) & self.feature_loss.isfinite().all(1)
        sigma = sigma.masked_fill(~sound[:, None, None, None], math.nan)
        return SigmaSolution(
            sigma,
            entropy(sigma)[:, 0],
            self.selected.masked_fill(~sound, -1),
            self.steps_run,
            self.mean_entropy,
            self.feature_loss,
            self.penalty,
            delta2,
        )
