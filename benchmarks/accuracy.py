#!/usr/bin/env python
"""Accuracy over seeds: teacher, student alone, student distilled; the README's table.

    python benchmarks/accuracy.py                       digits, 5 seeds, about 5 minutes on 2 cores
    python benchmarks/accuracy.py --seeds 0 1 2 --name fmnist -- --dataset fashion-mnist ...

Flags after -- go to train/distill.py. Runs land under --output and are not repeated; the table is
written to benchmarks/results/accuracy-NAME.md with the options that made it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent


def run(output: Path, name: str, seed: int, flags: list[str]) -> Path:
    """The run folder of one seed, trained now unless it is complete."""
    folder = output / f"{name}-s{seed}"
    if not (folder / "results.json").exists():
        command = [
            sys.executable,
            ROOT / "train/distill.py",
            "--seed",
            str(seed),
            "--resume",
            "auto",
            "--output",
            output,
            "--experiment",
            folder.name,
            "--baseline",
            *flags,
        ]
        print(f"seed {seed}", flush=True)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


def spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} +- {deviation:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--name", default="digits", help="of the result file")
    parser.add_argument("--output", type=Path, default=Path("output/accuracy"))
    parser.add_argument("flags", nargs="*", help="flags of train/distill.py, after --")
    args = parser.parse_args()
    folders = [run(args.output, args.name, seed, args.flags) for seed in args.seeds]
    results = [json.loads((f / "results.json").read_text()) for f in folders]
    alone = [json.loads((f / "baseline/results.json").read_text()) for f in folders]
    record = yaml.safe_load((folders[0] / "args.yaml").read_text())
    options, machine = record["options"], record["environment"]
    method = " + ".join(options["method"])
    last, base = ([r["last"]["top1"] for r in rows] for rows in (results, alone))
    best, base_best = ([r["best"]["top1"] for r in rows] for rows in (results, alone))
    gains = [a - b for a, b in zip(last, base, strict=True)]
    rows = [
        ("teacher", options["teacher"], spread([r["teacher_top1"] for r in results]), ""),
        ("alone", options["model"], spread(base), spread(base_best)),
        (method, options["model"], spread(last), spread(best)),
        ("gain", "", spread(gains), ""),
    ]
    table = [
        f"Top-1 on {options['dataset']}, {len(folders)} seeds, mean +- standard deviation.",
        "",
        "| | network | last epoch | best epoch |",
        "|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        f"Per seed, distilled: {', '.join(f'{v:.2f}' for v in last)}; alone: "
        f"{', '.join(f'{v:.2f}' for v in base)}. Recipe {options['recipe']}, "
        f"{machine['cpu']}, torch {machine['torch']}, kdfast {machine['kdfast']}.",
    ]
    text = "\n".join(table) + "\n"
    (ROOT / "benchmarks/results" / f"accuracy-{args.name}.md").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
