"""Fused ops against their eager twin, torch.compile of the twin, and the floor.

    python benchmarks/ops.py                          # every op on this machine's CPU
    python benchmarks/ops.py --device cuda --output benchmarks/results/ops-h200.jsonl
    python benchmarks/ops.py --ops attention_loss --quick

Forward plus backward, interleaved in one process, median with 10th and 90th percentile. The floor
is the bytes that must move divided by the copy bandwidth of two 256 MB arrays, or the operations by
the rate of a float32 matrix product, measured in the same process. The rows are in `rows/`. One
JSON line a row goes to stdout and --output, a Markdown table to stdout and next to it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import torch
from common import (
    copy_bandwidth,
    environment,
    markdown,
    matmul_rate,
    peak_bytes,
    side_by_side,
    summary,
    write_results,
)
from rows import Row, all_rows

from kdfast import ops

OPS = all_rows()


def measure(
    row: Row, number: int, device: str, limits: dict[str, float], quick: bool
) -> dict[str, object]:
    """The row's times, ratios, floor and goals; `limits` are bytes and operations a second."""
    torch._dynamo.reset()
    steps = dict(row.steps)
    if row.compiled is not None:
        steps["compile"] = row.compiled()
    rounds = 5 if quick else 40
    times = {name: summary(ms) for name, ms in side_by_side(steps, device, rounds=rounds).items()}
    fused = times["fused"]["ms"]
    ratios = {name: round(entry["ms"] / fused, 2) for name, entry in times.items()}
    del ratios["fused"]
    result: dict[str, object] = {
        "op": row.op,
        "shape": row.shape,
        "dtype": str(row.dtype).removeprefix("torch."),
        "format": row.format,
        "times": times,
        "ratios": ratios,
        "goals": row.goals,
        "rounds": rounds,
        "why": row.why,
        **{name: round(limit / 1e9, 1) for name, limit in limits.items()},
    }
    if row.bytes or row.operations:
        floor = max(row.bytes / limits["copy_gb_s"], row.operations / limits["matmul_gops"]) * 1e3
        result["floor_ms"] = round(floor, 4)
        ratios["floor"] = round(floor / fused, 3)
    if row.memory:
        result["peak_mb"] = {
            name: round(peak(row, number, name, device) / 1e6, 1) for name in row.steps
        }
    result["met"] = all(ratios.get(name, 0) >= goal for name, goal in row.goals.items())
    return result


def peak(row: Row, number: int, step: str, device: str) -> int:
    """Peak memory of a step of the op's row `number`; on the CPU in a process of its own."""
    if device == "cuda":
        return peak_bytes(row.steps[step], device)
    command = [sys.executable, __file__, "--peak", row.op, str(number), step]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def table(results: list[dict]) -> str:
    """Markdown: a line a row, the goal beside what was measured, and the reasons below."""

    def time(entry: dict) -> str:
        return f"{entry['ms']:.3g} ({entry['p10']:.3g}-{entry['p90']:.3g})"

    def ratio(name: str, result: dict) -> str:
        value, goal = result["ratios"].get(name), result["goals"].get(name)
        if value is None:
            return "-"
        form = "{:.0%}" if name == "floor" else "{:.2f}"
        said = form.format(value)
        if goal is None:
            return said
        return f"{said} ({'goal' if value >= goal else '**goal**'} {form.format(goal)})"

    rows, reasons = [], []
    for result in results:
        shape = f"{result['shape']} {result['dtype']} {result['format']}"
        times = result["times"]
        known = ("fused", "eager", "compile")
        others = [name for name in times if name not in known]
        memory = result.get("peak_mb")
        rows.append(
            {
                "op": result["op"],
                "shape": shape,
                **{f"{name} ms": time(times[name]) if name in times else "-" for name in known},
                "floor ms": f"{result['floor_ms']:.3g}" if "floor_ms" in result else "-",
                **{f"x {name}": ratio(name, result) for name in known[1:]},
                "x other form": "; ".join(f"{name} {ratio(name, result)}" for name in others)
                or "-",
                "of floor": ratio("floor", result),
                "peak MB": ", ".join(f"{k} {v:g}" for k, v in memory.items()) if memory else "-",
            }
        )
        if result["why"] and not result["met"]:
            reasons.append(f"- {result['op']} {shape}: {result['why']}.")
    text = markdown(rows)
    if reasons:
        text += "\n\nWhere a goal is missed:\n\n" + "\n".join(reasons)
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument("--ops", nargs="+", choices=list(OPS), default=list(OPS), metavar="OP")
    parser.add_argument("--output", type=Path, help="JSON lines; the table goes to the same .md")
    parser.add_argument("--quick", action="store_true", help="5 rounds instead of 40")
    parser.add_argument("--peak", nargs=3, metavar=("OP", "ROW", "STEP"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)

    if args.peak:
        op, number, step = args.peak
        row = next(islice(OPS[op]("cpu"), int(number), None))
        print(peak_bytes(row.steps[step], "cpu"))
        return 0
    ops.use("fused")
    torch.manual_seed(0)
    where = environment(args.device)
    limits = {
        "copy_gb_s": copy_bandwidth(args.device),
        "matmul_gops": matmul_rate(args.device),
    }
    results = []
    for name in args.ops:
        for number, row in enumerate(OPS[name](args.device)):
            results.append({**measure(row, number, args.device, limits, args.quick), **where})
            print(json.dumps(results[-1]), flush=True)
    text = (
        f"{where['device']}, torch {where['torch']}, copy {limits['copy_gb_s'] / 1e9:.1f} GB/s, "
        f"matrix product {limits['matmul_gops'] / 1e9:.0f} GFLOP/s\n\n"
    )
    text += table(results) + "\n"
    print(f"\n{text}")
    write_results(args.output, results, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
