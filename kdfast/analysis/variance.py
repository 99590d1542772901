"""Variance reports of Trans-Nets as tables (text, CSV, Markdown) and as a bar chart.

Liang, Li, Li, Wang, Zhang, "Knowledge Consistency between Neural Networks and Beyond", ICLR 2020,
arXiv 1908.01581: Var(x^(n)) of every order of fuzziness, and Var(x^D) of what cannot be rebuilt.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdfast.analysis.curves import COLOURS
from kdfast.analysis.picture import as_png, new_figure

_RESIDUAL, _OUTPUT = "#D55E00", "#A5AA99"
_ORDERS = tuple(colour for colour in COLOURS if colour not in (_RESIDUAL, _OUTPUT))
_READING = (
    "order n: what n nonlinear steps rebuild of B's feature from A's; output: their sum, g; "
    "residual: target - output, the inconsistent part.",
    "Parts are correlated: they do not add up to the target. Var(output) = sum of Var(order n) + "
    "2 x sum of the covariances.",
    "g does not see the scale of a channel in a single image, which it divides out, so even equal "
    "networks leave a residual: it is an upper bound of the inconsistency.",
)
_SCOPES = {
    "channel": "each channel about its own mean, then the mean over channels",
    "global": "all values about one mean",
}


@dataclass(frozen=True)
class Measured:
    """One Trans-Net measured.

    Attributes:
        label: what tables and chart call it.
        report: what `VarianceReport.compute()` returned.
        gates: the K - 1 gates, p_0 first.
        facts: what was measured, by name, in the order of reading.
        generation: of network B in a chain, where it is of one.
    """

    label: str
    report: Mapping[str, Any]
    gates: tuple[float, ...]
    facts: Mapping[str, str]
    generation: int | None = None

    @property
    def parts(self) -> list[str]:
        """`order0` and so on, then `residual`."""
        return [*(f"order{n}" for n in range(len(self.report["orders"]))), "residual"]

    def variance(self, name: str) -> float:
        """Of a part, of `target` or of `output`."""
        if name.startswith("order"):
            return self.report["orders"][int(name.removeprefix("order"))]
        return self.report[name]

    def relative(self, name: str) -> float:
        """The same divided by Var(target); NaN where the target does not vary."""
        if name.startswith("order"):
            return self.report["relative"]["orders"][int(name.removeprefix("order"))]
        return self.report["relative"][name]

    def rows(self) -> list[tuple[str, float, float]]:
        """Every quantity with its variance (or covariance) and that divided by Var(target)."""
        names = [*self.parts, "target", "output"]
        found = [(name, self.variance(name), self.relative(name)) for name in names]
        target = self.variance("target")
        return found + [
            (f"cov({pair})", value, value / target if target else math.nan)
            for pair, value in self.report["covariances"].items()
        ]

    def notes(self) -> list[str]:
        """What a reader should be warned of."""
        constant, channels = self.report["constant_channels"], self.report["channels"]
        blown = self.report.get("blown_channels", 0)
        found = []
        if self.variance("target") == 0:
            found.append("the target does not vary at all, so nothing can be said relative to it")
        elif constant:
            found.append(
                f"{constant} of {channels} target channels are constant on these images; they "
                "count as variance 0 in every mean over channels"
            )
        if blown:
            found.append(
                f"{blown} of {channels} channels of A are constant, but not 0, in some image; "
                "divided by their scale of 1e-5 they blow up"
            )
        shut = [f"p_{i} {gate:.2g}" for i, gate in enumerate(self.gates) if not _is_open(gate)]
        if shut:
            found.append(f"saturated gates: {', '.join(shut)}")
        return found


def _is_open(gate: float) -> bool:
    """Whether a gate is neither as good as closed nor as good as 1."""
    return 0.01 <= gate <= 0.99


def as_csv(measured: Sequence[Measured]) -> str:
    """A line a run and quantity: `run, quantity, variance, relative`, numbers in full."""
    rows = [
        {"run": one.label, "quantity": name, "variance": repr(raw), "relative": repr(relative)}
        for one in measured
        for name, raw, relative in one.rows()
    ]
    return _csv(list(rows[0]), rows)


def per_channel_csv(measured: Sequence[Measured]) -> str:
    """A line a run and channel: variance and mean of every part, of target and of output.

    Variances are about the channel's own mean, whatever the scope of the report.
    """
    rows, header = [], ["run", "channel"]
    for one in measured:
        names = [*one.parts, "target", "output"]
        columns = {
            f"{name}_{kind}": one.report[key][name]
            for name in names
            for kind, key in (("variance", "per_channel"), ("mean", "means"))
        }
        header += [name for name in columns if name not in header]
        for channel in range(one.report["channels"]):
            own = {name: repr(float(values[channel])) for name, values in columns.items()}
            rows.append({"run": one.label, "channel": channel} | own)
    return _csv(header, rows)


def _csv(header: list[str], rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, header, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def table(measured: Sequence[Measured]) -> list[list[str]]:
    """Cells of the table for people, the head first: a row a quantity, or a row a run if several.

    A cell of several runs is the variance relative to Var(target), which is the column `target`.
    """
    if len(measured) == 1:
        head = ["quantity", "variance", "of Var(target)"]
        return [head, *([n, f"{raw:.5g}", _share(r)] for n, raw, r in measured[0].rows())]
    orders = max(len(one.report["orders"]) for one in measured)
    parts = [*(f"order{n}" for n in range(orders)), "residual", "output"]
    gates = [f"p_{i}" for i in range(orders - 1)]
    lines = [["run", *parts, "Var(target)", *gates]]
    for one in measured:
        own = {*one.parts, "output"}
        shares = [_share(one.relative(name)) if name in own else "" for name in parts]
        strengths = [f"{gate:.3f}" for gate in one.gates] + [""] * (orders - 1 - len(one.gates))
        lines.append([one.label, *shares, f"{one.variance('target'):.5g}", *strengths])
    return lines


def _share(value: float) -> str:
    return f"{value:.2%}" if math.isfinite(value) else "-"


def as_text(measured: Sequence[Measured]) -> str:
    """The table in columns, with what was measured before it and the gates after it."""
    lines = []
    for one in measured if len(measured) == 1 else ():
        lines += [f"{name}: {fact}" for name, fact in one.facts.items()]
    cells = table(measured)
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    for line in cells:
        first, *rest = (
            f"{cell:{'<' if i == 0 else '>'}{width}}"
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        lines.append("  ".join([first, *rest]).rstrip())
    if len(measured) > 1:
        lines.append("relative to Var(target)")
    elif gates := measured[0].gates:
        lines.append(f"gates: {gates_text(gates)}")
    return "\n".join(lines)


def gates_text(gates: Sequence[float]) -> str:
    """`p_0 0.165, p_1 0.282`."""
    return ", ".join(f"p_{i} {gate:.4g}" for i, gate in enumerate(gates))


def as_markdown(measured: Sequence[Measured], *, title: str, picture: str) -> str:
    """The page: table, chart at link `picture`, what was measured, how to read it, warnings."""
    head, *rows = table(measured)
    rule = "|" + "|".join(["---"] + ["---:"] * (len(head) - 1)) + "|"
    lines = [f"# {_plain(title)}", "", _line(head), rule, *map(_line, rows), ""]
    lines += [f"![variances relative to the target]({picture})", ""]
    for one in measured:
        lines += [f"## {_plain(one.label)}" if len(measured) > 1 else "## What was measured", ""]
        facts = dict(one.facts) | ({"gates": gates_text(one.gates)} if one.gates else {})
        lines += [f"* {name}: {_plain(fact)}" for name, fact in facts.items()]
        lines += [f"* note: {note}" for note in one.notes()] + [""]
    scopes = sorted({one.report["mean_scope"] for one in measured})
    reading = [f"Variance: {_SCOPES[scope]}." for scope in scopes] + list(_READING)
    lines += ["## How to read it", "", *(f"* {line}" for line in reading)]
    return "\n".join(lines) + "\n"


_MARKDOWN = str.maketrans({c: f"\\{c}" for c in "\\|*`[]"} | {"<": "&lt;", "&": "&amp;"})


def _plain(text: str) -> str:
    return " ".join(text.split()).translate(_MARKDOWN)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_plain, cells))} |"


def draw_variances(measured: Sequence[Measured], title: str) -> bytes:
    """A PNG: bars of the variances relative to the target, a group a run.

    Where all runs are generations of one chain, a second panel has Var(x^D) / Var(t) over them.
    """
    chain = sorted(
        (one.generation, one.relative("residual")) for one in measured if one.generation is not None
    )
    chain = chain if len(chain) == len(measured) > 1 else []
    orders = max(len(one.report["orders"]) for one in measured)
    names = [*(f"order{n}" for n in range(orders)), "residual", "output"]
    width = max(5.2, 1.6 + 0.32 * len(names) * len(measured))
    figure = new_figure(min(width, 40.0) + (4.2 if chain else 0.0), 4.2)
    ratios = {"width_ratios": [width, 4.2]} if chain else {}
    panels = figure.subplots(1, 2 if chain else 1, squeeze=False, gridspec_kw=ratios).ravel()
    _bars(panels[0], measured, names)
    if chain:
        _over_generations(panels[1], chain)
    figure.suptitle(title, fontsize=10, parse_math=False, wrap=True)
    return as_png(figure)


def _bars(panel: Any, measured: Sequence[Measured], names: Sequence[str]) -> None:
    step = 0.84 / len(names)
    for i, name in enumerate(names):
        have = [g for g, one in enumerate(measured) if name in {*one.parts, "output"}]
        shares = [100 * measured[g].relative(name) for g in have]
        places = [g + (i - (len(names) - 1) / 2) * step for g in have]
        bars = panel.bar(places, shares, 0.92 * step, label=_words(name), **_style(name))
        if len(measured) <= 4:
            panel.bar_label(bars, fmt="%.1f", fontsize=7, padding=2)
    # The whole of B's feature.
    panel.axhline(100, color="#333333", lw=0.8, ls=":")
    labels = _short([one.label for one in measured])
    panel.set_xticks(range(len(measured)), labels, fontsize=8)
    for tick in panel.get_xticklabels():
        tick.set_parse_math(False)
    panel.tick_params(axis="x", length=0)
    panel.set_xlim(-0.55, len(measured) - 0.45)
    panel.margins(y=0.1)
    panel.set_ylabel("variance (% of the target's)")
    panel.grid(axis="y", alpha=0.25)
    panel.set_axisbelow(True)
    panel.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)


def _style(name: str) -> dict[str, Any]:
    """Colours that readers who confuse red and green keep apart; the residual is hatched too."""
    if name == "residual":
        return {"color": _RESIDUAL, "hatch": "///", "edgecolor": "white", "linewidth": 0}
    if name == "output":
        return {"color": _OUTPUT}
    return {"color": _ORDERS[int(name.removeprefix("order")) % len(_ORDERS)]}


def _words(name: str) -> str:
    return {"residual": "residual", "output": "output g"}.get(name, name.replace("order", "order "))


def _short(labels: Sequence[str]) -> list[str]:
    """The labels without the words that all begin with, in lines that fit below a group."""
    shared = 0
    if len(labels) > 1:
        columns = zip(*labels, strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda column: len({*column}) == 1, columns))
    cut = max(labels[0].rfind(mark, 0, shared) for mark in "-/_ ") + 1
    return [textwrap.fill(label[cut:], 18) for label in labels]


def _over_generations(panel: Any, chain: Sequence[tuple[int, float]]) -> None:
    generations = [generation for generation, _ in chain]
    shares = [100 * share for _, share in chain]
    panel.plot(generations, shares, color=_RESIDUAL, marker="o", ms=5, lw=1.8)
    panel.set_xticks(generations)
    panel.set_ylim(0, 1.15 * max([*shares, 1e-9]))
    panel.set_xlabel("generation of B")
    panel.set_ylabel("residual (% of the target's variance)")
    panel.grid(alpha=0.25)
