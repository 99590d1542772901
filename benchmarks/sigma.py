"""Sigma training against the published loop: a step, and an accepted image; and counting.

    python benchmarks/sigma.py                      # on this machine's CPU
    python benchmarks/sigma.py --device cuda --output benchmarks/results/sigma-h200.jsonl
    python benchmarks/sigma.py --quick

The other side is written from the method's description: one image at a time, all weights asking
for gradients, the noise drawn by torch and scaled by an up-sampled sigma, the whole network run,
its layer read by a hook, all 60 steps. Both select at the same mean entropy, of the same network,
layer, images and settings, float32; lambda is 7, of ResNets 6, where the crossing is late and
little is left to be saved by stopping there. Ours is what train/sigma.py runs by default. A step is
of one image, interleaved in one process, medians with the 10th and 90th percentile; ours is a step
of a batch over its images. An accepted image is all steps of one checkpoint, ours stopping at the
crossing. Networks for 32x32 images, and two for large ones at 96x96 with few samples.

Row `counting` is `count_concepts` with learning speed and stability, of 1,000 images at 20
checkpoints, 256 cells each. One JSON line a row goes to stdout and --output, and a Markdown and a
CSV table next to it.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torchvision
from common import environment, kept, markdown, sample_ms, summary, write_results
from torch import nn
from torch.nn import functional as F

from kdfast.metrics.knowledge import count_concepts, learning_speed, stability
from kdfast.models import create_model, default_tap, find_layer
from kdfast.ops import Key
from kdfast.training.sigma import SigmaSettings, solve_sigma
from kdfast.training.sigma_memory import bytes_per_sample, choose_chunk, working_bytes
from kdfast.training.snapshots import reach


@dataclass(frozen=True)
class Row:
    """What is measured: `batch` images of `side` pixels, lambda `weight`, `samples` of noise.

    `rounds` of steps, in each `few` and `many` steps, the difference of which counts; and `wholes`
    of whole images.
    """

    side: int
    weight: float
    batch: int
    samples: int
    layer: str | None = None
    rounds: int = 15
    few: int = 2
    many: int = 8
    wholes: int = 5


ROWS = {
    "cifar_resnet8": Row(32, 6.0, 4, 32),
    "cifar_vgg8": Row(32, 7.0, 2, 32, wholes=3),
    "resnet18": Row(96, 6.0, 2, 8, rounds=7, few=1, many=4, wholes=1),
    "vgg11": Row(96, 7.0, 2, 4, "classifier.0", rounds=5, few=1, many=3, wholes=1),
}
CLASSES = 10
GOALS = {"step": (1.5, 5.0), "image": (2.2, 5.0)}
COUNTING, COUNTING_GOAL = "counting", 1.0
COUNTED = (1000, 20, 16)  # images, checkpoints, cells a side


class Published:
    """One image's loop."""

    def __init__(self, model: nn.Module, layer: str, settings: SigmaSettings):
        self.model, self.settings = model, settings
        self.kept: list[torch.Tensor] = []
        module = find_layer(model, layer)
        if layer.endswith(":in"):
            module.register_forward_pre_hook(lambda _, args: self.kept.append(args[0].clone()))
        else:
            module.register_forward_hook(lambda _, __, out: self.kept.append(out.clone()))

    def feature(self, images: torch.Tensor) -> torch.Tensor:
        self.kept.clear()
        self.model(images)
        return F.relu(self.kept.pop())

    def noisy(self, image: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        copies = image.repeat(self.settings.samples, 1, 1, 1)
        up = F.interpolate(sigma, image.shape[-2:]).expand_as(copies)
        return copies + up * torch.randn_like(copies)

    def solve(self, image: torch.Tensor, steps: int) -> torch.Tensor:
        s = self.settings
        sigma = torch.full((1, 1, s.grid, s.grid), s.initial, device=image.device)
        with torch.no_grad():
            clean = self.feature(image)
            delta2 = (self.feature(self.noisy(image, sigma)) - clean).square().mean()
        sigma.requires_grad_()
        optimizer = torch.optim.SGD([sigma], lr=s.lr)
        stored = []
        for _ in range(steps):
            sigma.data.clamp_(s.low, s.high)
            entropy = (sigma.log() + 1.4189385).mean()
            stored.append((entropy.item(), sigma.detach().clone()))
            moved = (self.feature(self.noisy(image, sigma)) - clean).square().mean()
            loss = moved / delta2 - s.weight * entropy
            optimizer.zero_grad()  # of sigma alone: weights go on collecting theirs
            loss.backward()
            optimizer.step()
        return min(stored, key=lambda pair: abs(pair[0] - s.target))[1]


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    own = not name.startswith("vgg")
    model = create_model(name, CLASSES) if own else torchvision.models.vgg11(num_classes=CLASSES)
    return model.eval()


class Ours:
    """A batch of images, as train/sigma.py solves it."""

    def __init__(self, model: nn.Module, layer: str, settings: SigmaSettings, images: torch.Tensor):
        cpu = images.device.type == "cpu"
        model.requires_grad_(False)
        model.to(memory_format=torch.channels_last if cpu else torch.preserve_format)
        head = reach(model, layer, images[:1])[1]
        self.feature = lambda x: F.relu(head(x))
        self.settings, self.images = settings, images
        self.ids = torch.arange(len(images), device=images.device)
        memory = working_bytes(model, images.device, 4 * 2**30)
        self.chunk = choose_chunk(
            bytes_per_sample(self.feature, images[:1]), len(images), settings.samples, memory
        )

    def solve(self, steps: int | None = None):
        settings = self.settings
        if steps is not None:
            settings = replace(settings, steps=steps, more_steps=0)
        return solve_sigma(self.feature, self.images, self.ids, settings, Key(0), chunk=self.chunk)


def measure(name: str, device: str, quick: bool) -> dict[str, object]:
    row = ROWS[name]
    rounds, wholes = (min(3, row.rounds), 1) if quick else (row.rounds, row.wholes)
    settings = SigmaSettings(samples=row.samples, weight=row.weight)
    images = torch.randn(row.batch, 3, row.side, row.side, device=device)
    model = build(name).to(device)
    layer = row.layer or default_tap(model, (row.side, row.side))
    published = Published(model, layer, settings)
    ours = Ours(build(name).to(device), layer, settings, images)

    forms = {"published": lambda n: published.solve(images[:1], n), "ours": ours.solve}
    steps: dict[str, list[float]] = {form: [] for form in forms}
    whole: dict[str, list[float]] = {form: [] for form in forms}
    for solve in forms.values():
        solve(1)
    for _ in range(rounds):
        for form, solve in forms.items():
            # The difference: what set-up takes cancels.
            took = [
                sample_ms(lambda n=n, solve=solve: solve(n), device, 1) for n in (row.few, row.many)
            ]
            images_solved = row.batch if form == "ours" else 1
            steps[form].append((took[1] - took[0]) / (row.many - row.few) / images_solved)
    for _ in range(wholes):
        begin = time.perf_counter()
        published.solve(images[:1], settings.steps)
        whole["published"].append((time.perf_counter() - begin) * 1e3)
        begin = time.perf_counter()
        found = ours.solve()
        run = found.steps_run.tolist()
        whole["ours"].append((time.perf_counter() - begin) * 1e3 / row.batch)

    def ratio(times: dict[str, list[float]]) -> float:
        pairs = zip(times["published"], times["ours"], strict=True)
        return round(statistics.median(a / b for a, b in pairs), 2)

    gpu = device == "cuda"
    return {
        "what": f"{name} at {layer}, {row.side}x{row.side}, lambda {row.weight:g}, {row.samples} "
        f"samples, batches of {row.batch}",
        "step_ms": {form: round(statistics.median(t), 3) for form, t in steps.items()},
        "step": {form: summary(t) for form, t in steps.items()} if rounds > 1 else None,
        "step_ratio": ratio(steps),
        "image_ms": {form: round(statistics.median(t), 1) for form, t in whole.items()},
        "image_ratio": ratio(whole),
        "steps_run": run,
        "chunk": ours.chunk,
        "goals": {kind: goal[gpu] for kind, goal in GOALS.items()},
        "rounds": rounds,
    }


def measure_counting(quick: bool) -> dict[str, object]:
    draw = np.random.default_rng(0)
    images, checkpoints, grid = COUNTED
    entropy = draw.normal(-2.8, 0.3, (images, checkpoints, grid, grid))
    foreground = draw.random((images, grid, grid)) < 0.4
    path = np.linspace(0, 1, checkpoints)

    def count() -> None:
        found = count_concepts(entropy, foreground)
        learning_speed(found["fg"], path)
        stability(found["concepts"] & foreground[:, None])

    times = [sample_ms(count, "cpu", 1) / 1e3 for _ in range(3 if quick else 9)]
    return {
        "what": f"counting, {images} images x {checkpoints} checkpoints x {grid * grid} cells",
        "seconds": round(statistics.median(times), 3),
        "goal": COUNTING_GOAL,
        "rounds": len(times),
    }


def table(results: list[dict]) -> list[dict[str, object]]:
    return [
        {
            "what": r["what"],
            **{
                column: text
                for kind in ("step", "image")
                for column, text in (
                    (f"{kind}, published ms", f"{r[f'{kind}_ms']['published']:g}"),
                    (f"{kind}, ours ms", f"{r[f'{kind}_ms']['ours']:g}"),
                    (f"{kind}, ratio", f"{r[f'{kind}_ratio']:.2f}"),
                    (
                        f"{kind}, goal",
                        f"at least {r['goals'][kind]:g}: "
                        + met(r[f"{kind}_ratio"] >= r["goals"][kind]),
                    ),
                )
            },
            "steps run of 60": " ".join(map(str, r["steps_run"])),
        }
        for r in results
        if r["row"] != COUNTING
    ]


def counting_table(results: list[dict]) -> list[dict[str, object]]:
    return [
        {
            "what": r["what"],
            "seconds": f"{r['seconds']:g}",
            "goal": f"below {r['goal']:g}: {met(r['seconds'] < r['goal'])}",
        }
        for r in results
        if r["row"] == COUNTING
    ]


def met(reached: bool) -> str:
    return "met" if reached else "**missed**"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = [*ROWS, COUNTING]
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument("--rows", nargs="+", choices=names, metavar="ROW", help=", ".join(names))
    parser.add_argument(
        "--output", type=Path, help="JSON lines; tables go to the same .md and .csv"
    )
    parser.add_argument(
        "--quick", action="store_true", help="the small networks and counting, few rounds"
    )
    parser.add_argument("--note", help="what else the machine was doing; stands below the table")
    args = parser.parse_args(argv)
    rows = args.rows or [n for n in names if not args.quick or n == COUNTING or ROWS[n].side <= 32]

    where = environment(args.device)
    results = kept(args.output, rows)
    for name in rows:
        if name == COUNTING:
            result = measure_counting(args.quick)
        else:
            result = measure(name, args.device, args.quick)
        results.append({"row": name, **result, **where, "note": args.note})
        print(json.dumps(results[-1]), flush=True)
    results.sort(key=lambda result: names.index(result["row"]))
    tables = [found for found in (table(results), counting_table(results)) if found]
    text = f"{where['device']}, torch {where['torch']}, float32\n\n"
    text += "\n\n".join(map(markdown, tables)) + "\n"
    notes = dict.fromkeys(result["note"] for result in results if result["note"])
    text += "".join(f"\n{note}\n" for note in notes)
    print(f"\n{text}")
    write_results(args.output, results, text)
    if args.output:
        with args.output.with_suffix(".csv").open("w", newline="") as file:
            columns = dict.fromkeys(column for found in tables for column in found[0])
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(line for found in tables for line in found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
