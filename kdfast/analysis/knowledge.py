"""Quantified knowledge of a student, its baseline and perhaps its teacher as tables.

Cheng, Rao, Chen, Zhang, "Explaining Knowledge Distillation by Quantifying the Knowledge", CVPR
2020; the quantities are those of `kdfast.metrics.knowledge`.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdfast.analysis.sigma_runs import Shared, positions
from kdfast.metrics.knowledge import REGIONS, count_concepts, measure_knowledge

_COUNTED = ("N_fg", "N_bg", "N_all", "fg_share")
_SPEED = ("D_mean", "D_var", "D_std", "slope", "slope_skipped")
_SURVEY = ("mean", "upper_10", "upper_5", "upper_1")
# What the authors expect of a distilled student against its baseline.
_EXPECTED = {
    "N_fg": "higher", "N_bg": "lower", "fg_share": "higher", "D_mean_fg": "lower",
    "D_var_fg": "lower", "D_std_fg": "lower", "rho_fg": "higher",
}  # fmt: skip
_FEW = 20  # images; the published numbers are means over 50
_READING = (
    "concept: a cell whose entropy is more than the threshold below Hbar, the mean entropy of the "
    "background cells of all images at that checkpoint. fg: in the foreground, bg: in the "
    "background.",
    "N, fg_share: concepts an image, and the share of them in the foreground, at the last "
    "checkpoint.",
    "D: path length of the layer's weights when an image had the most concepts; mean, population "
    "variance and its root over images. The authors' tables are of D_std in 2020 and of D_var in "
    "2023.",
    "slope: most concepts / D, over images with D > 0; slope_skipped: the other images.",
    "rho: of all concepts an image ever had, the share it has at the last checkpoint.",
    "expected: what the authors expect of a student against its baseline, and whether it is so "
    "here: yes, no, or equal.",
)


@dataclass(frozen=True, eq=False)
class Report:
    """Several networks measured on the images they share.

    Attributes:
        shared: the runs, images and checkpoints.
        threshold: b in nats.
        granularity: `iterations` or `epochs`, what path length sums over.
        best_from, union_from: positions of the first checkpoint that may be the best one and that
            counts in stability.
        measured: by role, what `measure_knowledge` returned.
        apart: by role, what `count_concepts` returned for `shared.unselected` at
            `shared.apart_epochs`; nothing where there are none.
    """

    shared: Shared
    threshold: float
    granularity: str
    best_from: int
    union_from: int
    measured: Mapping[str, Mapping[str, Any]]
    apart: Mapping[str, Mapping[str, np.ndarray]]

    @property
    def roles(self) -> list[str]:
        return list(self.measured)

    def quantities(self, role: str) -> dict[str, float]:
        """Of the last checkpoint or of all: every number by name, NaN where it is unknown."""
        own, run = self.measured[role], self.shared.runs[role]
        found = {name: float(own["counts"][name][-1]) for name in _COUNTED}
        for region in REGIONS:
            for name in _SPEED:
                value = own["speed"][region][name] if own["speed"] else math.nan
                found[f"{name}_{region}"] = value
            found[f"rho_{region}"] = own["stability"][region]["rho"]
        found["background_entropy"] = float(own["counts"]["background_entropy"][-1])
        accepted, tried = int(run.accepted.sum()), run.record["tried"]
        rate = accepted / tried if tried else math.nan
        return found | {"accepted": accepted, "tried": tried, "acceptance_rate": rate}

    def facts(self) -> dict[str, str]:
        """What was measured, by name."""
        shared = self.shared
        record = shared.runs["student"].record
        facts = {role: str(shared.paths[role]) for role in self.roles}
        grid = record["grid"]
        facts["network"] = f"{record['model']}, layer {record['layer']}"
        which = "accepted in all runs" if shared.selected else "accepted or not"
        if len(shared.tried) > len(shared.ids):
            which += f" ({len(shared.tried)} were tried in all)"
        facts["images"] = f"{len(shared.ids)} of {record['dataset']}, {which}, {grid}x{grid} cells"
        facts["checkpoints"] = " ".join(map(str, shared.epochs))
        facts["threshold"] = f"{self.threshold:g} nats below the mean background"
        facts["path length"] = f"summed over {self.granularity}"
        if self.best_from:
            facts["best checkpoint"] = "looked for after the initial network"
        if self.union_from:
            facts["stability"] = "without the concepts of the initial network"
        return facts

    def notes(self) -> list[str]:
        """What a reader should be warned of."""
        shared, found = self.shared, []
        for role in self.roles:
            run = shared.runs[role]
            if not run.record["finished"]:
                found.append(
                    f"the sigma run of the {role} is unfinished; {int(run.accepted.sum())} images "
                    "were accepted so far"
                )
            if self.measured[role]["speed"] is None:
                layer = run.record.get("path-layer")
                remedy = f"train with --path-length {layer} and run train/sigma.py again"
                found.append(
                    f"no path length of the {role}: "
                    + (remedy if layer else f"layer {run.record['layer']} has no weights")
                )
            gone = sorted(set(run.epochs) - set(shared.epochs))
            if gone:
                found.append(
                    f"checkpoints of the {role} that are left out: {' '.join(map(str, gone))}"
                )
        tested = {role: shared.runs[role].record.get("accept-from") for role in self.roles}
        if shared.selected and len(set(tested.values())) > 1:
            each = ", ".join(f"{epoch} of the {role}" for role, epoch in tested.items())
            found.append(f"images were accepted by other checkpoints: from {each} on")
        if shared.left_out:
            why = " for a sigma of 0"
            if not shared.selected:
                why = ", as they have no region or no finite entropy"
            found.append(f"left out{why}: images {_listed(shared.left_out)}")
        if len(shared.ids) < _FEW:
            found.append(
                f"means over only {_images_of(len(shared.ids))}, in one seed, order nothing: give "
                "train/sigma.py more --images, and train with other seeds"
            )
        return found

    def table(self) -> list[list[str]]:
        """Cells for people, the head first: a row a quantity, a column a network."""
        values = {role: self.quantities(role) for role in self.roles}
        lines = [["quantity", *self.roles, "expected"]]
        for name in values["student"]:
            own = [_number(name, values[role][name]) for role in self.roles]
            lines.append([name, *own, _verdict(name, values)])
        return lines

    def apart_table(self) -> list[list[str]]:
        """The same of the counts without selection: a row a checkpoint and network."""
        lines = [["checkpoint", "network", *_COUNTED]]
        for m, epoch in enumerate(self.shared.apart_epochs):
            for role in self.apart:
                own = [_number(name, float(self.apart[role][name][m])) for name in _COUNTED]
                lines.append([str(epoch), role, *own])
        return lines

    def survey_table(self) -> list[list[str]]:
        """Hbar - H of foreground cells at the last checkpoint, a row a network."""
        head = ["network", *_SURVEY]
        surveys = {role: self.measured[role]["survey"] for role in self.roles}
        return [head] + [
            [role, *(f"{surveys[role][name][-1]:.4f}" for name in _SURVEY)] for role in self.roles
        ]


def measure_all(
    shared: Shared, threshold: float, granularity: str, exclude_initial: bool | None
) -> Report:
    """Measure every network.

    Args:
        exclude_initial: whether the initial network, epoch 0, may have the most concepts and counts
            in stability. None: as published, it counts in stability, and may have the most
            concepts in all networks but resnets.
    """
    initial = shared.epochs[0] == 0 and len(shared.epochs) > 1
    resnet = "resnet" in str(shared.runs["student"].record["model"])
    best_from = int(initial and (resnet if exclude_initial is None else exclude_initial))
    union_from = int(initial and bool(exclude_initial))
    foreground = shared.foreground(shared.ids)
    measured = {
        role: measure_knowledge(
            shared.entropy(role, shared.ids, shared.epochs), foreground, shared.path_length(role),
            threshold, best_from, union_from,
        )
        for role in shared.runs
    }  # fmt: skip
    apart = {}
    if shared.apart_epochs:
        everywhere = shared.foreground(shared.unselected)
        for role in shared.runs:
            entropy = shared.entropy(role, shared.unselected, shared.apart_epochs)
            apart[role] = count_concepts(entropy, everywhere, threshold)
    return Report(shared, threshold, granularity, best_from, union_from, measured, apart)


def _verdict(name: str, values: Mapping[str, Mapping[str, float]]) -> str:
    if name not in _EXPECTED:
        return ""
    student, baseline = values["student"][name], values["baseline"][name]
    if math.isnan(student) or math.isnan(baseline):
        return _EXPECTED[name]
    if math.isclose(student, baseline, rel_tol=1e-9, abs_tol=1e-12):
        return f"{_EXPECTED[name]}: equal"
    so = student > baseline if _EXPECTED[name] == "higher" else student < baseline
    return f"{_EXPECTED[name]}: {'yes' if so else 'no'}"


def _number(name: str, value: float) -> str:
    if math.isnan(value):
        return "-"
    if name in ("accepted", "tried") or name.startswith("slope_skipped"):
        return str(value)
    if name == "acceptance_rate":
        return f"{value:.1%}"
    return f"{value:.4g}" if name.startswith(("D_", "slope")) else f"{value:.3f}"


def knowledge_csv(report: Report) -> str:
    """A line a network and quantity: `network, quantity, value`, numbers in full."""
    rows = [
        {"network": role, "quantity": name, "value": repr(value)}
        for role in report.roles
        for name, value in report.quantities(role).items()
    ]
    return _csv(rows)


def curves_csv(report: Report) -> str:
    """A line a network and checkpoint: path length, concepts, Hbar, survey of thresholds."""
    rows = []
    for role in report.roles:
        own = report.measured[role]
        lengths = report.shared.path_length(role)
        for m, epoch in enumerate(report.shared.epochs):
            row = {"network": role, "checkpoint": epoch}
            row["path_length"] = "" if lengths is None else repr(float(lengths[m]))
            for name in (*_COUNTED, "background_entropy"):
                row[name] = repr(float(own["counts"][name][m]))
            for name in _SURVEY:
                row[f"survey_{name}"] = repr(float(own["survey"][name][m]))
            rows.append(row)
    return _csv(rows)


def counts_csv(report: Report) -> str:
    """A line a network, image and checkpoint: concepts in the foreground, background and all."""
    rows = []
    for role in report.roles:
        counts = report.measured[role]["counts"]
        for i, row in enumerate(_images(report, role)):
            for m, epoch in enumerate(report.shared.epochs):
                own = {region: int(counts[region][i, m]) for region in REGIONS}
                rows.append(row | {"checkpoint": epoch} | own)
    return _csv(rows)


def stability_csv(report: Report) -> str:
    """A line a network and image: by region, its best checkpoint and path length there, its
    concepts at the last checkpoint and at any, and the share of these.
    """
    rows = []
    for role in report.roles:
        own = report.measured[role]
        for i, row in enumerate(_images(report, role)):
            for region in REGIONS:
                first, counts = report.best_from, own["counts"][region][i]
                best = first + int(counts[first:].argmax())
                row[f"best_{region}"] = report.shared.epochs[best]
                speed = own["speed"]
                row[f"D_{region}"] = repr(float(speed[region]["time"][i])) if speed else ""
                found = own["stability"][region]
                row[f"last_{region}"] = int(found["last"][i])
                row[f"union_{region}"] = int(found["union"][i])
                row[f"rho_{region}"] = repr(float(found["by_image"][i]))
            rows.append(row)
    return _csv(rows)


def unselected_csv(report: Report) -> str:
    """A line a network and checkpoint: concepts of all images tried in all runs."""
    rows = [
        {"network": role, "checkpoint": epoch, "images": len(report.shared.unselected)}
        | {name: repr(float(own[name][m])) for name in _COUNTED}
        for role, own in report.apart.items()
        for m, epoch in enumerate(report.shared.apart_epochs)
    ]
    return _csv(rows, ["network", "checkpoint", "images", *_COUNTED])


def _images(report: Report, role: str) -> Iterator[dict[str, Any]]:
    run = report.shared.runs[role]
    for i in positions(run, report.shared.ids):
        yield {
            "network": role, "id": run.ids[i], "index": run.indices[i], "name": run.names[i],
            "label": run.labels[i],
        }  # fmt: skip


def _csv(rows: Sequence[Mapping[str, Any]], head: Sequence[str] | None = None) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, head or list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_text(report: Report) -> str:
    """Facts and the table in columns."""
    lines = [f"{name}: {fact}" for name, fact in report.facts().items()]
    cells = report.table()
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    for name, *numbers, expected in cells:
        middle = (f"{n:>{w}}" for n, w in zip(numbers, widths[1:], strict=False))
        lines.append("  ".join([f"{name:<{widths[0]}}", *middle, expected]).rstrip())
    return "\n".join(lines)


def as_markdown(report: Report, title: str, pictures: Mapping[str, str]) -> str:
    """The page: tables, pictures by caption and link, what was measured, how to read it."""
    lines = [f"# {_plain(title)}", "", *_markdown(report.table(), right=1), ""]
    for caption, link in pictures.items():
        lines += [f"![{caption}]({link})", ""]
    lines += ["## What was measured", ""]
    lines += [f"* {name}: {_plain(fact)}" for name, fact in report.facts().items()]
    lines += [f"* note: {_plain(note)}" for note in report.notes()]
    lines += [
        "", "## Without selection", "", *_apart(report),
        "", "## Thresholds", "",
        "Hbar - H over the foreground cells at the last checkpoint, in nats: mean, and what the "
        "upper 10, 5 and 1 % exceed.", "",
        *_markdown(report.survey_table(), right=1),
        "", "## How to read it", "",
        *(f"* {line}" for line in _READING),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _apart(report: Report) -> list[str]:
    """The counts without selection, or why there are none."""
    shared = report.shared
    kept = "Images are kept because their foreground bears no more noise than their background, in "
    every = f"all {_images_of(len(shared.tried))} that were tried in all runs"
    if not report.apart:
        return [
            f"{kept}all networks. There are no counts without that: at none of these checkpoints "
            f"{every} have results. train/sigma.py --keep-rejected makes them at all checkpoints."
        ]
    without = sorted(set(shared.tried) - set(shared.unselected))
    less = f", without images {_listed(without)}, which have no region or no finite entropy"
    return [
        f"{kept}all networks. The same counts of {every}{less if without else ''}, at the "
        "checkpoints at which all of them have results:", "",
        *_markdown(report.apart_table(), right=2),
    ]  # fmt: skip


def _listed(images: Sequence[int]) -> str:
    return " ".join(map(str, images))


def _images_of(count: int) -> str:
    return f"{count} image{'s' * (count != 1)}"


def _markdown(cells: Sequence[Sequence[str]], right: int) -> list[str]:
    """A table; the columns from `right` on hold numbers."""
    head, *rows = cells
    rule = ["---"] * right + ["---:"] * (len(head) - right)
    return [_line(head), f"|{'|'.join(rule)}|", *map(_line, rows)]


_MARKDOWN = str.maketrans({c: f"\\{c}" for c in "\\|*`[]_"} | {"<": "&lt;", "&": "&amp;"})


def _plain(text: str) -> str:
    return " ".join(text.split()).translate(_MARKDOWN)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_plain, cells))} |"
