"""Sets of channels that are kept or dropped together, and how they lie along a dimension.

A dimension is a layout: segments one after the other, each a set whose every channel takes `inner`
positions (1, or the pixels of a flattened map). Sets are tied, cut and coarsened as a network's
operations demand; a set that was has `parts`, the segments it now consists of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from kdfast.ops.split_mask import Runs, joined_runs


class ChannelSet:
    """`units` channels, or blocks of channels that stay whole.

    `produced`: a convolution or linear layer puts them out, so that they can be dropped. `fixed`:
    all of them stay (image channels, classes).
    """

    def __init__(self, units: int, *, produced: bool = False, fixed: bool = False):
        self.units, self.produced, self.fixed = units, produced, fixed
        self.parts: Layout | None = None


class Segment(NamedTuple):
    """A set in a layout, `inner` positions a unit."""

    set: ChannelSet
    inner: int

    @property
    def length(self) -> int:
        return self.set.units * self.inner


Layout = tuple[Segment, ...]
Kept = Callable[[ChannelSet], Runs]


class Mismatch(Exception):
    """Layouts that cannot be brought together; says why."""


def new_layout(size: int, *, produced: bool = False, fixed: bool = False) -> Layout:
    return (Segment(ChannelSet(size, produced=produced, fixed=fixed), 1),)


def resolve(layout: Iterable[Segment]) -> Layout:
    """The layout in terms of the sets as they now are."""
    found: list[Segment] = []
    for segment in layout:
        if segment.set.parts is None:
            found.append(segment)
        else:
            inner = segment.inner
            found += resolve(Segment(p.set, p.inner * inner) for p in segment.set.parts)
    return tuple(found)


def length(layout: Iterable[Segment]) -> int:
    return sum(segment.length for segment in layout)


def fix(layout: Layout) -> None:
    for segment in resolve(layout):
        segment.set.fixed = True


def produce(layout: Layout) -> None:
    for segment in resolve(layout):
        segment.set.produced = True


def scaled(layout: Layout, numerator: int, denominator: int = 1) -> Layout:
    """Every channel with `numerator / denominator` times its positions, which must be whole."""
    segments = []
    for segment in resolve(layout):
        inner, rest = divmod(segment.inner * numerator, denominator)
        if rest:
            raise Mismatch(f"its {segment.inner} positions a channel are divided by {denominator}")
        segments.append(Segment(segment.set, inner))
    return tuple(segments)


def coarsen(layout: Layout, block: int) -> Layout:
    """The layout with whole blocks of `block` positions as its units."""
    for segment in resolve(layout):
        unit = math.lcm(segment.inner, block)
        if segment.length % unit:
            raise Mismatch(f"{segment.length} channels are no multiple of {unit}")
        if unit != segment.inner:
            _replace(segment, ChannelSet(segment.length // unit), unit)
    return resolve(layout)


def cut(layout: Layout, position: int) -> tuple[Layout, Layout]:
    """What lies before `position` and what lies from there on."""
    before: list[Segment] = []
    after = list(resolve(layout))
    while position and after:
        if after[0].length > position:
            after[:1] = _halves(after[0], position)
        before.append(after.pop(0))
        position -= before[-1].length
    return tuple(before), tuple(after)


def tie(first: Layout, second: Layout) -> None:
    """Make position p of both the same channel, for every p."""
    if length(first) != length(second):
        raise Mismatch(f"{length(first)} channels meet {length(second)}")
    ours, theirs = list(resolve(first)), list(resolve(second))
    while ours:
        shorter = min(ours[0].length, theirs[0].length)
        for side in (ours, theirs):
            if side[0].length > shorter:
                side[:1] = _halves(side[0], shorter)
                # Both sides may hold the set that was cut.
                ours, theirs = list(resolve(ours)), list(resolve(theirs))
                break
        else:
            _merge(ours.pop(0), theirs.pop(0))
            ours, theirs = list(resolve(ours)), list(resolve(theirs))


def _merge(first: Segment, second: Segment) -> None:
    if first.set is second.set:
        return
    unit = math.lcm(first.inner, second.inner)
    if first.length % unit:
        raise Mismatch(
            f"{first.length} channels in blocks of {first.inner} meet blocks of {second.inner}"
        )
    joined = ChannelSet(first.length // unit)
    _replace(first, joined, unit)
    _replace(second, joined, unit)


def _replace(segment: Segment, new: ChannelSet, unit: int) -> None:
    """Let the segment's set consist of `new`, whose units take `unit` positions there."""
    old = segment.set
    new.produced, new.fixed = new.produced or old.produced, new.fixed or old.fixed
    old.parts = (Segment(new, unit // segment.inner),)


def _halves(segment: Segment, position: int) -> Layout:
    units, rest = divmod(position, segment.inner)
    if rest:
        raise Mismatch(f"a block of {segment.inner} channels is cut at {rest}")
    old = segment.set
    sizes = units, old.units - units
    old.parts = tuple(
        Segment(ChannelSet(size, produced=old.produced, fixed=old.fixed), 1) for size in sizes
    )
    return resolve([segment])


def kept_runs(layout: Layout, kept: Kept) -> Runs:
    """The positions (start, length) of kept channels along a dimension."""
    runs, offset = [], 0
    for segment in resolve(layout):
        inner = segment.inner
        runs += [(offset + start * inner, count * inner) for start, count in kept(segment.set)]
        offset += segment.length
    return joined_runs(runs)
