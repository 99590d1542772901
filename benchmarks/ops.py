"""Fused ops against their eager twin, torch.compile of the twin, and the floor.

    python benchmarks/ops.py                          # every op on this machine's CPU
    python benchmarks/ops.py --device cuda --output benchmarks/results/ops-h200.jsonl
    python benchmarks/ops.py --ops attention_loss --quick

Forward plus backward, interleaved in one process, median with 10th and 90th percentile. The floor
is the bytes that must move divided by the copy bandwidth of two 256 MB arrays, measured in the same
process. One JSON line a row goes to stdout and --output, a Markdown table to stdout and next to it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from common import copy_bandwidth, environment, markdown, side_by_side, summary
from torch import Tensor

from kdfast import ops
from kdfast.ops import reference

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass
class Row:
    """One line of the table. `run(function)` is a step with the fused op or a twin of it."""

    op: str
    shape: str
    dtype: torch.dtype
    format: str
    function: Callable
    twin: Callable
    run: Callable[[Callable], object]
    bytes: int  # that must move, each input read and each output written once


def attention_loss(device: str) -> Iterator[Row]:
    """Read F_s and F_t; read F_s, write dF_s."""
    pair, stages = [(128, 64, 32, 32)], [(128, 16, 32, 32), (128, 32, 16, 16), (128, 64, 8, 8)]
    layers = [
        (pair, torch.float32, "nchw"),
        (pair, torch.float32, "channels_last"),
        (pair, torch.bfloat16, "nchw"),
        (pair, torch.bfloat16, "channels_last"),
        (stages, torch.float32, "nchw"),
        (stages, torch.float32, "channels_last"),
    ]
    if device == "cuda":
        layers.append(([(512, 256, 32, 32)], torch.bfloat16, "nchw"))
        layers.append(([(512, 256, 32, 32)], torch.bfloat16, "channels_last"))
    for shapes, dtype, format in layers:
        student, teacher = (
            [feature(shape, dtype, format, device) for shape in shapes] for _ in range(2)
        )
        for tensor in student:
            tensor.requires_grad_()

        def run(loss: Callable, student=student, teacher=teacher) -> tuple[Tensor, ...]:
            return torch.autograd.grad(loss(student, teacher), student)

        size = sum(tensor.numel() * tensor.element_size() for tensor in student)
        yield Row(
            "attention_loss",
            " ".join("x".join(map(str, shape)) for shape in shapes),
            dtype,
            format,
            ops.attention_loss,
            reference.attention_loss,
            run,
            4 * size,
        )


def feature(shape: tuple[int, ...], dtype: torch.dtype, format: str, device: str) -> Tensor:
    return torch.randn(shape, device=device).to(dtype, memory_format=FORMATS[format])


# One entry an op: the rows of a device.
OPS: dict[str, Callable[[str], Iterator[Row]]] = {"attention_loss": attention_loss}


def measure(row: Row, device: str, bandwidth: float, quick: bool) -> dict[str, object]:
    torch._dynamo.reset()
    compiled = torch.compile(row.twin, dynamic=False)
    steps = {
        "fused": lambda: row.run(row.function),
        "eager": lambda: row.run(row.twin),
        "compile": lambda: row.run(compiled),
    }
    rounds = 5 if quick else 40
    times = {name: summary(ms) for name, ms in side_by_side(steps, device, rounds=rounds).items()}
    floor = row.bytes / bandwidth * 1e3
    return {
        "op": row.op,
        "shape": row.shape,
        "dtype": str(row.dtype).removeprefix("torch."),
        "format": row.format,
        **times,
        "floor_ms": round(floor, 4),
        "of_floor": round(floor / times["fused"]["ms"], 3),
        "vs_eager": round(times["eager"]["ms"] / times["fused"]["ms"], 2),
        "vs_compile": round(times["compile"]["ms"] / times["fused"]["ms"], 2),
        "rounds": rounds,
        "copy_gb_s": round(bandwidth / 1e9, 1),
    }


def table(results: list[dict]) -> str:
    def time(entry: dict) -> str:
        return f"{entry['ms']:.3g} ({entry['p10']:.3g}-{entry['p90']:.3g})"

    rows = []
    for result in results:
        rows.append(
            {
                "op": result["op"],
                "shape": f"{result['shape']} {result['dtype']} {result['format']}",
                **{f"{name} ms": time(result[name]) for name in ("fused", "eager", "compile")},
                "floor ms": f"{result['floor_ms']:.3g}",
                "x eager": result["vs_eager"],
                "x compile": result["vs_compile"],
                "of floor": f"{result['of_floor']:.0%}",
            }
        )
    return markdown(rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument("--ops", nargs="+", choices=list(OPS), default=list(OPS), metavar="OP")
    parser.add_argument("--output", type=Path, help="JSON lines; the table goes to the same .md")
    parser.add_argument("--quick", action="store_true", help="5 rounds instead of 40")
    args = parser.parse_args(argv)

    ops.use("fused")
    torch.manual_seed(0)
    where = environment(args.device)
    bandwidth = copy_bandwidth(args.device)
    results = []
    for name in args.ops:
        for row in OPS[name](args.device):
            results.append({**measure(row, args.device, bandwidth, args.quick), **where})
            print(json.dumps(results[-1]), flush=True)
    text = f"{where['device']}, torch {where['torch']}, copy {bandwidth / 1e9:.1f} GB/s\n\n"
    text += table(results) + "\n"
    print(f"\n{text}")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text("".join(json.dumps(result) + "\n" for result in results))
        args.output.with_suffix(".md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
