"""The table of a trans-classifier: accuracy of B's tail on every subset of orders.

All functions take results as `train_tails` gives them, with as many `subsets` as are done.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

OWN = "own"
_STATES = ("before", "last", "best")
_READING = (
    "before: B's tail as it is. last, best: fine-tuned, the last epoch's weights and those of the "
    "epoch with the highest top1 on the evaluation split.",
    "orders 110: the tail sees orders 0 and 1 of what the Trans-Net finds of B's feature in A's, "
    "not order 2, and nothing of the residual.",
    "own: B's tail fine-tuned in the same way on B's own feature, so that what more training does "
    "is not taken for what the orders do.",
)


def rows_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """A row each of A and B as they are, of every subset, and of B's own feature.

    `name`, `run` and scores in percent as `before_top1`, `last_epoch` and so on; what a row has not
    is None.
    """
    found = [("A raw", "", {"before": results["a"]}), ("B raw", "", {"before": results["b"]})]
    for entry in results["subsets"]:
        own = entry["orders"] == OWN
        found.append(("B own" if own else f"orders {entry['orders']}", entry["run"], entry))
    rows = []
    for name, run, entry in found:
        row: dict[str, Any] = {"name": name, "run": run}
        for state in _STATES:
            scores = entry.get(state) or {}
            for key in ("epoch", "top1", "top5", "loss"):
                if (state, key) != ("before", "epoch"):
                    row[f"{state}_{key}"] = scores.get(key)
        rows.append(row)
    return rows


def as_csv(results: dict[str, Any]) -> str:
    """A line a row, numbers in full; `split` and `images` say what is scored on."""
    text = io.StringIO()
    rows = [
        {"name": row["name"], "split": results["tested_on"], "images": results["a"]["images"]} | row
        for row in rows_of(results)
    ]
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def table(results: dict[str, Any]) -> list[list[str]]:
    """Cells for people, the head first: top1 and top5 in percent, before and after."""
    head = ["", "before top1", "top5", "last top1", "top5", "best top1", "top5", "epoch"]
    lines = [head]
    for row in rows_of(results):
        line = [row["name"]]
        for state in _STATES:
            for top in ("top1", "top5"):
                score = row[f"{state}_{top}"]
                line.append("" if score is None else f"{score:.2f}")
        epoch = row["best_epoch"]
        lines.append([*line, "" if epoch is None else str(epoch)])
    return lines


def as_text(results: dict[str, Any]) -> str:
    """The table in columns."""
    cells = table(results)
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = []
    for first, *rest in cells:
        padded = (f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True))
        lines.append("  ".join([f"{first:{widths[0]}}", *padded]).rstrip())
    return "\n".join(lines)


def as_markdown(results: dict[str, Any], *, picture: str) -> str:
    """The page: table, chart at link `picture`, what was scored, how to read it."""
    a, b, net = results["a"], results["b"], results["transnet"]
    head, *rows = table(results)
    rule = "|" + "|".join(["---"] + ["---:"] * (len(head) - 1)) + "|"
    lines = [f"# B's tail on orders of A's feature: {results['dataset']}", ""]
    lines += [_line(head), rule, *map(_line, rows), "", f"![test top1]({picture})", ""]
    split = f"{results['tested_on']} split of {results['dataset']}, {a['images']} images"
    if results["tested_on"] != "test":
        split += "; there is no test split, and the best epochs were chosen on this one"
    trained = ", trained on features of different images (the control)" if net["shuffled"] else ""
    lines += ["## What was scored", "", f"* on the {split}"]
    for name, of in (("A", a), ("B", b)):
        lines.append(f"* {name}: {of['architecture']} at {of['layer']}, weights {of['checksum']}")
    lines.append(f"* Trans-Net: K = {net['layers']}, weights {net['checksum']}{trained}")
    lines += ["", "## How to read it", "", *(f"* {line}" for line in _READING)]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
