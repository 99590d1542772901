"""Whole training steps side by side: a method's step against another form of the same work.

    python benchmarks/training.py                     # every row on this machine's CPU
    python benchmarks/training.py --device cuda --output benchmarks/results/training-h200.jsonl
    python benchmarks/training.py --rows heads --quick

Rows `at+kd`, `crd`, `wrn kd` and `dih loop` train with the loop, loader, teacher and losses of
train/distill.py against benchmarks/published.py, reading of images included. In the others a step
is the teacher's forward pass, the objective's forward and backward pass and the optimizer's step.
All: batch 64 at 32x32, 100 classes, float32, ours channels_last. The forms of a row are interleaved
in one process; median with 10th and 90th percentile, the ratio is the median of the rounds. One
JSON line a row goes to stdout and --output, where rows measured before stay; a Markdown table goes
next to it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import loops
import torch
import where
from common import environment, kept, markdown, side_by_side, summary, write_results
from torch import nn

from kdfast.methods import find_method
from kdfast.models import (
    InputAdapter,
    LinearHead,
    Taps,
    create_model,
    default_stages,
    shapes_of,
)
from kdfast.training.heads import HeadsObjective, TrunkHeads
from kdfast.training.objective import Objective
from kdfast.training.teacher import Teacher

BATCH, CLASSES, SIZE = 64, 100, (32, 32)
Step = Callable[[], object]


@dataclass
class Row:
    """`ratio` says which form's time is divided by which; `goal` is the least, or the most."""

    name: str
    what: str
    steps: dict[str, Step]
    ratio: tuple[str, str]
    least: float | None = None
    most: float | None = None

    def met(self, value: float) -> bool:
        return (self.least is None or value >= self.least) and (
            self.most is None or value <= self.most
        )


def network(name: str, device: str) -> nn.Module:
    model = create_model(name, CLASSES)
    # Statistics that fit the weights: features neither vanish nor grow with depth.
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(BATCH, 3, *SIZE))
    return model.to(device, memory_format=torch.channels_last)


def batch(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(BATCH, 3, *SIZE, device=device)
    labels = torch.randint(CLASSES, (BATCH,), device=device)
    return images.contiguous(memory_format=torch.channels_last), labels


def teacher_of(model: nn.Module, layers: list[str], heads: list[nn.Module] = ()) -> Teacher:
    same = InputAdapter((0,) * 3, (1,) * 3, (0,) * 3, (1,) * 3)
    teacher = Teacher(model, layers, same, heads=heads, head_positions=range(len(heads)))
    teacher.calibrate(batch(str(next(model.parameters()).device))[0])
    return teacher


def training_step(objective: nn.Module, teacher: Teacher, device: str) -> Step:
    """What the training loop does with a batch."""
    objective.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(
        objective.parameters(), lr=1e-4, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    images, labels = batch(device)

    def step() -> None:
        total, _, _ = objective(images, labels, *teacher(images))
        total.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def linear_heads(model: nn.Module, layers: list[str]) -> list[nn.Module]:
    return [LinearHead(shape, CLASSES) for shape in shapes_of(model, layers, SIZE)]


def heads(device: str) -> Row:
    """All heads in one pass of the trunk against a run for each."""
    trunk = network("cifar_resnet110", device)
    layers = default_stages(trunk)

    def step_of(chosen: list[str]) -> Step:
        objective = HeadsObjective(TrunkHeads(linear_heads(trunk, chosen)), chosen)
        return training_step(objective, teacher_of(trunk, chosen), device)

    alone = [step_of([layer]) for layer in layers]
    steps = {"one pass": step_of(layers), "a run each": lambda: [step() for step in alone]}
    what = f"{len(layers)} linear heads on cifar_resnet110"
    return Row("heads", what, steps, ("a run each", "one pass"), least=2.5)


def dih(device: str) -> Row:
    """Distilling from a cohort of four against distilling from the final classifier alone."""
    model = network("cifar_resnet110", device)
    layers = default_stages(model)
    mounted = [head.to(device) for head in linear_heads(model, layers)]
    steps = {}
    for name in ("dih", "kd"):
        own = mounted if name == "dih" else []
        method = find_method(name)()
        objective = Objective(
            Taps(network("cifar_resnet8", device), []),
            [method],
            {name: method.default_weight},
            0.0 if name == "dih" else 0.1,
            {name: ([], [])},
        )
        teacher = teacher_of(model, layers if own else [], own)
        steps[name] = training_step(objective, teacher, device)
    what = f"cifar_resnet110 with {len(layers)} heads -> cifar_resnet8"
    return Row("dih", what, steps, ("dih", "kd"), most=1.15)


ROWS = {"heads": heads, "dih": dih}
ALL = [*loops.PAIRS, *ROWS]


def measure(row: Row, device: str, rounds: int) -> dict[str, object]:
    times = side_by_side(row.steps, device, rounds=rounds)
    over, under = (times[form] for form in row.ratio)
    value = statistics.median(a / b for a, b in zip(over, under, strict=True))
    return {
        "row": row.name,
        "what": row.what,
        "times": {form: summary(samples) for form, samples in times.items()},
        "ratio": round(value, 3),
        "of": list(row.ratio),
        "goal": row.least or row.most,
        "met": row.met(value),
        "rounds": rounds,
    }


def table(results: list[dict]) -> str:
    lines = []
    for result in results:
        over, under = result["of"]
        forms = (
            f"{form} {t['ms']:.1f} ms ({t['p10']:.1f}-{t['p90']:.1f})"
            for form, t in result["times"].items()
        )
        goal = f"{'at least' if over != result['row'] else 'at most'} {result['goal']}"
        goal += f": {'met' if result['met'] else '**missed**'}"
        lines.append(
            {
                "step": f"{result['row']}: {result['what']}",
                "median (10th-90th percentile)": "; ".join(forms),
                "ratio": f"{over} / {under} = {result['ratio']:.2f}",
                "goal": goal if result["goal"] else "",
            }
        )
    return markdown(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument("--rows", nargs="+", choices=ALL, default=ALL, metavar="ROW")
    parser.add_argument("--output", type=Path, help="JSON lines; the table goes to the same .md")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--compile", action="store_true", help="ours with --torchcompile")
    parser.add_argument("--profile", action="store_true", help="only say where the time goes")
    parser.add_argument("--peak", nargs=2, metavar=("ROW", "FORM"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.peak:
        print(loops.peak(*args.peak, args.device))
        return 0

    torch.manual_seed(0)
    place = environment(args.device)
    machine = f"{place['device']}, torch {place['torch']}, batch {BATCH}, {SIZE[0]}x{SIZE[1]}\n\n"
    if args.profile:
        chosen = [name for name in args.rows if name in loops.PAIRS]
        text = machine + where.table({n: loops.profiles(n, args.device) for n in chosen}) + "\n"
        print(text)
        if args.output:
            args.output.with_suffix(".md").write_text(text)
        return 0
    results = kept(args.output, args.rows)
    for name in args.rows:
        if name in loops.PAIRS:
            rounds, steps = (2, 4) if args.quick else (5, 8)
            found = loops.measure(name, args.device, rounds, steps, compiled=args.compile)
        else:
            found = measure(ROWS[name](args.device), args.device, 3 if args.quick else 15)
        results.append(found | place)
        print(json.dumps(results[-1]), flush=True)
    results.sort(key=lambda result: ALL.index(result["row"]))
    text = machine + table(results) + "\n"
    if loop_rows := [result for result in results if result["row"] in loops.PAIRS]:
        text += "\n" + loops.details(loop_rows) + "\n"
    print(f"\n{text}")
    write_results(args.output, results, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
