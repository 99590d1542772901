"""All methods against all pairs of networks, in one table."""

from __future__ import annotations

import statistics

from kdfast.analysis.table import Row, Table


def pivot(table: Table) -> list[list[tuple[str, bool]]]:
    """Lines of (text, bold) cells, the first the head; empty where nothing was distilled.

    A row a method, a column a data set and pair of networks, a cell `92.8 (+0.8)`: mean of the
    last epoch and gain. The average is over all columns, for methods that are in all.
    """
    blocks = [block for block in table.blocks if block.teacher]
    if not blocks:
        return []
    labels = list(dict.fromkeys(row.label for block in blocks for row in block.rows))
    labels.sort(key=lambda label: label.split(" ")[0] != "none")
    head = ["method", *(f"{block.dataset} {block.networks}" for block in blocks)]
    found = {
        label: [next((r for r in block.rows if r.label == label), None) for block in blocks]
        for label in labels
    }
    averages = {label: _average(rows) for label, rows in found.items()}
    highest = max((mean for mean, _ in filter(None, averages.values())), default=None)
    lines = []
    for label, rows in found.items():
        cells = [
            (_cell(row.last.mean, row.gain and row.gain.mean), row.leads) if row else ("", False)
            for row in rows
        ]
        average = averages[label]
        cells.append((_cell(*average), average[0] == highest) if average else ("", False))
        lines.append([(label, False), *cells])
    if len(blocks) == 1:
        return [[(name, False) for name in head], *(line[:-1] for line in lines)]
    return [[(name, False) for name in (*head, "avg")], *lines]


def _average(rows: list[Row | None]) -> tuple[float, float | None] | None:
    if None in rows:
        return None
    gains = [row.gain.mean for row in rows if row.gain]
    gain = statistics.fmean(gains) if len(gains) == len(rows) else None
    return statistics.fmean(row.last.mean for row in rows), gain


def _cell(mean: float, gain: float | None) -> str:
    return f"{mean:.1f}" if gain is None else f"{mean:.1f} ({gain:+z.1f})"
