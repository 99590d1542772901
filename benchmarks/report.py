#!/usr/bin/env python
"""How long a report over many runs takes: 100 run folders of 240 epochs, as training writes them.

python benchmarks/report.py
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
METHODS = ("none", "logits", "kd", "at", "fsp")
NETWORKS = ("cifar_resnet8", "cifar_resnet20", "cifar_resnet32", "cifar_resnet8x4")
EPOCHS = 240


def write_run(folder: Path, method: str, student: str, seed: int) -> None:
    """A run folder as train/distill.py leaves it, less weights and checkpoints."""
    # As many options as a run of the recipe crd records.
    options = {f"option-{i}": value for i, value in enumerate([0.05, 1, False, "crd", [0.1]] * 10)}
    options |= {
        "dataset": "cifar100",
        "model": student,
        "teacher": "cifar_resnet110",
        "epochs": EPOCHS,
        "seed": seed,
        "method": [method],
        "methods": {} if method == "none" else {method: {"beta": 1.0}},
        "gamma": 1.0,
        "teacher-checksum": f"{seed:064x}",
    }
    environment = {"kdfast": "0.1.0", "torch": "2.15.0", "cpu": "AVX2, 2 of 2 threads"}
    record = {"options": options, "environment": environment}
    rows = []
    for epoch in range(1, EPOCHS + 1):
        top1 = 70 - 60 * 0.98**epoch + METHODS.index(method) + seed / 7
        row = {
            "epoch": epoch, "train_loss": 3.1 * 0.99**epoch, "train_ce": 2.7 * 0.99**epoch,
            f"train_{method}": 0.4 * 0.99**epoch, "eval_loss": 2.9 * 0.99**epoch,
            "eval_top1": top1, "eval_top5": top1 + 20, "lr": 0.05 * 0.99**epoch,
            "images_per_second": 3141.5, "seconds": 15.926,
        }  # fmt: skip
        rows.append(row)
    scores = {"epoch": EPOCHS} | {key: rows[-1][f"eval_{key}"] for key in ("top1", "top5", "loss")}
    results = {
        "run": str(folder), "seed": seed, "last": scores, "best": scores, "teacher_top1": 74.0,
        "baseline_top1": None, "parameters": 78042, "operations": 25003264,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "args.yaml").write_text(yaml.safe_dump(record, sort_keys=False))
    lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    (folder / "summary.csv").write_text("\n".join(lines) + "\n")
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")


def seconds(*command: str, cwd: Path) -> float:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    started = time.perf_counter()
    subprocess.run([sys.executable, *command], cwd=cwd, env=environment, check=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=100, help="run folders (default: 100)")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions (default: 5)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        for i in range(args.runs):
            student, method = NETWORKS[i // 5 % 4], METHODS[i % 5]
            write_run(Path(place, "runs", f"{i:04d}"), method, student, seed=i // 20)
        script = str(ROOT / "analysis/report.py")
        # Interleaved, so that a disturbance meets both alike; the least is the least disturbed.
        times = [
            (
                seconds(script, "runs", cwd=Path(place)),
                seconds("-c", "import kdfast", cwd=Path(place)),
            )
            for _ in range(args.rounds)
        ]
    whole, imports = (min(column) for column in zip(*times, strict=True))
    print(
        f"{args.runs} runs of {EPOCHS} epochs: {whole:.2f} s, of it import kdfast {imports:.2f} s"
    )


if __name__ == "__main__":
    main()
