"""Runs grouped over seeds and compared with the student alone.

A group holds runs whose options differ in nothing but the seed and what no result depends on.
Groups of one method that differ in more stay apart, and their labels say in what.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kdfast.analysis.identity import frozen, identity, natural, said
from kdfast.analysis.runs import Run
from kdfast.errors import UserError


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1); `std` is None where there is one value."""

    mean: float
    std: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        std = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), std)

    def text(self, *, sign: bool = False) -> str:
        mean = f"{self.mean:{'+' if sign else ''}z.2f}"
        return mean if self.std is None else f"{mean} +- {self.std:.2f}"


@dataclass(frozen=True)
class Row:
    """A method in a block: runs that differ in their seed, in its order; scores in percent.

    Attributes:
        label: methods joined by +, `none` for the student alone, with what sets the row apart.
        last, best: of the last epoch, and of the epoch of the highest top1.
        teacher_top1: None without a teacher.
        gain: of `last` over the student alone; None where there is none with the same options.
        paired: whether the gain is that of equal seeds; None without a gain.
        leads: whether no row of the block has a higher mean `last`; False for a single row.
    """

    label: str
    runs: tuple[Run, ...]
    last: Spread
    best: Spread
    teacher_top1: Spread | None
    gain: Spread | None
    paired: bool | None
    leads: bool

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]


@dataclass(frozen=True)
class Block:
    """The rows of one data set, teacher (None: networks that taught nobody here) and student."""

    dataset: str
    teacher: str | None
    student: str
    rows: tuple[Row, ...]

    @property
    def networks(self) -> str:
        return f"{self.teacher} >> {self.student}" if self.teacher else f"{self.student} alone"


@dataclass(frozen=True)
class Table:
    """All blocks for one metric, `top1` or `top5`; `notes` are for the reader."""

    metric: str
    blocks: tuple[Block, ...]
    notes: tuple[str, ...]

    def runs(self) -> list[Run]:
        """Every run that a row rests on, once."""
        found = {run.path: run for b in self.blocks for row in b.rows for run in row.runs}
        return list(found.values())


class _Group:
    """Runs of equal options, one a seed."""

    def __init__(self, runs: list[Run], notes: list[str]):
        self.runs = _one_a_seed(runs, notes)
        first = self.runs[0]
        self.name = "+".join(first.methods) or "none"
        self.methods = set(first.methods)
        self.options = identity(first)

    def values(self, which: str, metric: str) -> dict[int, float]:
        return {run.seed: getattr(run, which)[metric] for run in self.runs}


def tabulate(runs: Iterable[Run], metric: str = "top1") -> Table:
    """Group `runs`, compare, and order.

    Raises `UserError` for two runs of one seed with the same options and different scores; the
    students alone that came along with distillations (`baseline/`) may repeat one another.
    """
    notes: list[str] = []
    gathered: dict[tuple, list[Run]] = defaultdict(list)
    for run in runs:
        names = tuple(sorted(run.methods))
        key = (run.dataset, run.teacher, run.network, names, frozen(identity(run)))
        gathered[key].append(run)
    groups = {key: _Group(found, notes) for key, found in gathered.items()}
    alone = {key: group for key, group in groups.items() if not key[3]}
    blocks: dict[tuple, dict[tuple, _Group]] = defaultdict(dict)
    baselines: dict[tuple, _Group] = {}
    for key, group in groups.items():
        dataset, teacher, student, names, _ = key
        if names:
            blocks[dataset, teacher, student][key] = group
            own = (dataset, None, student, (), frozen(identity(group.runs[0], alone=True)))
            if own in alone:
                blocks[dataset, teacher, student][own] = baselines[key] = alone[own]
    compared = {id(group) for group in baselines.values()}
    for key, group in alone.items():
        if id(group) not in compared:
            blocks[key[0], None, key[2]][key] = group
    ordered = sorted(blocks, key=lambda b: (b[0], b[1] is None, b[1] or "", b[2]))
    made = (Block(*b, _rows(blocks[b], baselines, metric)) for b in ordered)
    return Table(metric, tuple(made), tuple(notes))


def _rows(
    groups: dict[tuple, _Group], baselines: dict[tuple, _Group], metric: str
) -> tuple[Row, ...]:
    labels = _labels(list(groups.values()))
    highest = max(statistics.fmean(g.values("last", metric).values()) for g in groups.values())
    rows = []
    for (key, group), label in zip(groups.items(), labels, strict=True):
        last, best = (group.values(which, metric) for which in ("last", "best"))
        gain, paired = None, None
        if key in baselines:
            gain, paired = _gain(last, baselines[key].values("last", metric))
        spread = Spread.of(list(last.values()))
        row = Row(
            label=label,
            runs=tuple(group.runs),
            last=spread,
            best=Spread.of(list(best.values())),
            teacher_top1=Spread.of([r.teacher_top1 for r in group.runs]) if key[3] else None,
            gain=gain,
            paired=paired,
            leads=len(groups) > 1 and spread.mean == highest,
        )
        rows.append(((len(key[3]), natural(label)), row))
    return tuple(row for _, row in sorted(rows, key=lambda pair: pair[0]))


def _gain(ours: dict[int, float], alone: dict[int, float]) -> tuple[Spread, bool]:
    """Gain of scores by seed over those alone, and whether it is paired.

    Paired: mean and deviation of the differences of equal seeds. Else the difference of the means,
    with the deviation that a difference of two independent runs has.
    """
    if ours.keys() <= alone.keys():
        return Spread.of([score - alone[seed] for seed, score in ours.items()]), True
    one, other = (Spread.of(list(scores.values())) for scores in (ours, alone))
    known = one.std is not None and other.std is not None
    return Spread(one.mean - other.mean, math.hypot(one.std, other.std) if known else None), False


def _one_a_seed(runs: list[Run], notes: list[str]) -> list[Run]:
    kept: dict[int, Run] = {}
    for run in sorted(runs, key=lambda run: (run.aside, run.path)):
        first = kept.setdefault(run.seed, run)
        if first is run:
            continue
        same = all(first.curves[c] == run.curves[c] for c in run.curves if c.startswith("eval_"))
        if not run.aside and (run.methods or not same):
            teachers = {r.options.get("teacher-checksum") for r in (first, run)}
            where = "other weights of the teacher" if len(teachers) > 1 else "the same options"
            raise UserError(
                f"two runs of seed {run.seed} with {where}: {first.path} and {run.path}; remove "
                "one, or report on them apart"
            )
        if not same:
            notes.append(
                f"{run.path} repeats {first.path} and ended at other scores (top1 "
                f"{run.last['top1']:.2f}, not {first.last['top1']:.2f}); the latter counts"
            )
    return [kept[seed] for seed in sorted(kept)]


def _labels(groups: list[_Group]) -> list[str]:
    """Names of the groups; those of equal methods are told apart by the options that differ."""
    labels = []
    for group in groups:
        others = [other.options for other in groups if other.methods == group.methods]
        keys = sorted({key for options in others for key in options})
        differing = [key for key in keys if len({said(key, o.get(key)) for o in others}) > 1]
        own = [key for key in differing if key in group.options]
        words = ", ".join(said(key, group.options[key]) for key in own)
        labels.append(f"{group.name} ({words})" if words else group.name)
    return labels
