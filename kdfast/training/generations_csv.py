"""What evolved generations come to: a table of the published columns and ours, and one to read."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# In the order and spelling of the authors' code (Taha et al., CVPR 2021).
PUBLISHED = (
    "Date Finished", "Name", "Split Rate", "Bias Split Rate", "Current Val Top 1",
    "Current Val Top 5", "Best Val Top 1", "Best Val Top 5", "Current Tst Top 1",
    "Current Tst Top 5", "Best Tst Top 1", "Best Tst Top 5", "Best Trn Top 1", "Best Trn Top 5",
)  # fmt: skip
OURS = (
    "generation", "kind", "seed", "test_loss", "masked_top1", "masked_top5", "masked_loss",
    "parameters", "operations", "published_operations", "checksum", "masks_checksum",
)  # fmt: skip


def as_csv(entries: Sequence[dict[str, Any]], name: str, rate: float, *, slim: bool) -> str:
    """A dense row for each of `entries` of results.json and, with `slim`, a slim one after it.

    Best scores are those of the evaluated epochs, top 5 independently of top 1; those of training
    are means over an epoch's batches. Slim rows are zeros where there is no slim network.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, [*PUBLISHED, *OURS], restval="", lineterminator="\n")
    writer.writeheader()
    for entry in entries:
        head = {
            "Date Finished": entry["finished"],
            "Name": f"{name}/generation-{entry['generation']}",
            "generation": entry["generation"],
            "seed": entry["seed"],
            "checksum": entry["checksum"],
            "masks_checksum": entry["masks"],
        }
        writer.writerow(head | _dense(entry, rate))
        if slim:
            writer.writerow(head | _slim(entry))
    return text.getvalue()


def _dense(entry: dict[str, Any], rate: float) -> dict[str, Any]:
    last, best, dense = entry["last"], entry["best"], entry["dense"]
    scores = {
        "Current Val Top 1": last["top1"],
        "Current Val Top 5": last["top5"],
        "Best Val Top 1": best["top1"],
        "Best Val Top 5": entry["best_top5"],
        "Best Tst Top 1": 0,  # the test split selects nothing
        "Best Tst Top 5": 0,
        "Best Trn Top 1": entry["best_train_top1"],
        "Best Trn Top 5": entry["best_train_top5"],
    }
    rates = {"Split Rate": f"{rate:g}", "Bias Split Rate": f"{rate:g}", "kind": "dense"}
    return rates | {key: f"{value:.2f}" for key, value in scores.items()} | _tested(dense)


def _slim(entry: dict[str, Any]) -> dict[str, Any]:
    row = {"Split Rate": "slim", "Bias Split Rate": "slim", "kind": "slim"}
    row |= {"Current Tst Top 1": "0.00", "Current Tst Top 5": "0.00"}
    if entry["slim"] is not None:
        row |= _tested(entry["slim"])
    return row | {f"masked_{key}": entry["masked"][key] for key in ("top1", "top5", "loss")}


def _tested(scores: dict[str, Any]) -> dict[str, Any]:
    counts = ("parameters", "operations", "published_operations")
    return {
        "Current Tst Top 1": f"{scores['top1']:.2f}",
        "Current Tst Top 5": f"{scores['top5']:.2f}",
        "test_loss": scores["loss"],
        **{key: scores[key] for key in counts},
    }


def best_scores(summary: Path) -> dict[str, float]:
    """The highest scores of the evaluated epochs in a summary.csv, each by itself."""
    columns = {
        "best_top5": "eval_top5",
        "best_train_top1": "train_top1",
        "best_train_top5": "train_top5",
    }
    with summary.open() as file:
        rows = [row for row in csv.DictReader(file) if row["eval_top1"]]
    return {name: max(float(row[column]) for row in rows) for name, column in columns.items()}


def as_text(entries: Sequence[dict[str, Any]]) -> str:
    """Top-1 of dense, slim and masked dense network by generation, for people."""
    lines = [f"{'generation':>10} {'seed':>10} {'dense':>7} {'slim':>7} {'masked':>7} {'gap':>7}"]
    for entry in entries:
        shown = [entry[kind] and entry[kind]["top1"] for kind in ("dense", "slim", "masked")]
        shown.append(shown[0] - shown[1] if shown[1] is not None else None)
        cells = " ".join(f"{'' if value is None else f'{value:.2f}':>7}" for value in shown)
        lines.append(f"{entry['generation']:>10} {entry['seed']:>10} {cells}".rstrip())
    return "\n".join(lines)
