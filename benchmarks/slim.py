"""Slim ResNet-18 against the dense one, and the time that masks of DenseNet-169 take.

    python benchmarks/slim.py                       # on this machine's CPU
    python benchmarks/slim.py --device cuda --output benchmarks/results/slim-h200.jsonl
    python benchmarks/slim.py --rows eager --quick

Inference on a batch of 32 images of 224x224, float32, channels_last, split rate 0.5 (kels), both
networks interleaved in one process: images a second from the median with the 10th and 90th
percentile, and the ratio is the median of the rounds' own. Memory is the peak of one eager call
beyond weights and images, of each network in a process of its own on the CPU. The masks' time is
that of the first call in the process, the export of the model included. One JSON line a row goes to
stdout and --output, where rows measured before stay; a Markdown table goes next to it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import environment, kept, markdown, peak_bytes, side_by_side, summary, write_results
from torch import nn

from kdfast.models import create_model, extract_slim, parameter_count, split_masks

BATCH, CLASSES, SIZE, RATE = 32, 100, (3, 224, 224), 0.5
FORMS = ("dense", "slim")


def networks(device: str) -> dict[str, nn.Module]:
    dense = create_model("resnet18", CLASSES).eval()
    slim = extract_slim(dense, split_masks(dense, RATE, input_size=SIZE), input_size=SIZE).eval()
    pair = zip(FORMS, (dense, slim), strict=True)
    return {name: m.to(device, memory_format=torch.channels_last) for name, m in pair}


def inference(model: nn.Module, device: str) -> Callable[[], torch.Tensor]:
    images = torch.randn(BATCH, *SIZE, device=device).contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def step() -> torch.Tensor:
        return model(images)

    return step


def speed(device: str, rounds: int, *, compiled: bool) -> dict[str, object]:
    models = networks(device)
    sizes = {form: parameter_count(model) for form, model in models.items()}
    if compiled:
        models = {form: torch.compile(model) for form, model in models.items()}
    steps = {form: inference(model, device) for form, model in models.items()}
    times = side_by_side(steps, device, rounds=rounds)
    result = {
        "what": f"ResNet-18 at {RATE}, {'torch.compile' if compiled else 'eager'}",
        "times": {form: summary(samples) for form, samples in times.items()},
        "images_a_second": {
            form: round(1e3 * BATCH / statistics.median(samples), 1)
            for form, samples in times.items()
        },
        "parameters": sizes,
        "ratio": round(
            statistics.median(a / b for a, b in zip(times["dense"], times["slim"], strict=True)), 2
        ),
        "rounds": rounds,
    }
    if not compiled:
        result["peak_mb"] = {form: round(peak(form, device) / 1e6, 1) for form in FORMS}
    return {**result, "goal": 3.0, "met": result["ratio"] >= 3}


def peak(form: str, device: str) -> int:
    """Bytes; on the CPU asked of a process of its own."""
    if device == "cuda":
        return peak_bytes(inference(networks(device)[form], device), device)
    command = [sys.executable, __file__, "--peak", form]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def masks(device: str, rounds: int) -> dict[str, object]:
    del device  # derived on the host, from shapes alone
    model = create_model("densenet169", CLASSES)
    seconds = []
    for _ in range(min(3, rounds)):
        start = time.perf_counter()
        found = split_masks(model, RATE, input_size=SIZE)
        seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    extract_slim(model, found, input_size=SIZE)
    extraction = time.perf_counter() - start
    return {
        "what": f"masks of DenseNet-169 at {RATE}",
        "seconds": round(seconds[0], 2),
        "again": round(statistics.median(seconds[1:]), 2),
        "extraction": round(extraction, 2),
        "goal": 10.0,
        "met": seconds[0] < 10,
    }


ROWS = {
    "eager": lambda device, rounds: speed(device, rounds, compiled=False),
    "compile": lambda device, rounds: speed(device, rounds, compiled=True),
    "masks": masks,
}


def table(results: list[dict]) -> str:
    lines = []
    for result in results:
        outcome = "met" if result["met"] else "**missed**"
        if result["row"] == "masks":
            measured = (
                f"{result['seconds']:.2f} s, again {result['again']:.2f} s; "
                f"slim network {result['extraction']:.2f} s"
            )
            goal, ratio = f"less than {result['goal']:g} s: {outcome}", "-"
        else:
            measured = "; ".join(
                f"{form} {rate:.1f} images/s ({1e3 * BATCH / t['p90']:.1f}-"
                f"{1e3 * BATCH / t['p10']:.1f}), {result['parameters'][form]:,} parameters"
                for (form, t), rate in zip(
                    result["times"].items(), result["images_a_second"].values(), strict=True
                )
            )
            goal, ratio = f"at least {result['goal']:g}: {outcome}", f"{result['ratio']:.2f}"
        peaks = ", ".join(f"{form} {mb:g}" for form, mb in result.get("peak_mb", {}).items())
        lines.append(
            {
                "what": result["what"],
                "measured": measured,
                "slim / dense": ratio,
                "peak MB": peaks or "-",
                "goal": goal,
            }
        )
    return markdown(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--output", type=Path, help="JSON lines; the table goes to the same .md")
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 15")
    parser.add_argument("--note", help="what else the machine was doing; stands below the table")
    parser.add_argument("--peak", choices=FORMS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    if args.peak:
        print(peak_bytes(inference(networks("cpu")[args.peak], "cpu"), "cpu"))
        return 0
    where = environment(args.device)
    results = kept(args.output, args.rows)
    for name in args.rows:
        result = ROWS[name](args.device, 3 if args.quick else 15)
        results.append({"row": name, **result, **where, "note": args.note})
        print(json.dumps(results[-1]), flush=True)
    results.sort(key=lambda result: list(ROWS).index(result["row"]))
    text = f"{where['device']}, torch {where['torch']}, batch {BATCH}, {SIZE[1]}x{SIZE[2]}, "
    text += f"float32, channels_last\n\n{table(results)}\n"
    notes = dict.fromkeys(result["note"] for result in results if result["note"])
    text += "".join(f"\n{note}\n" for note in notes)
    print(f"\n{text}")
    write_results(args.output, results, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
