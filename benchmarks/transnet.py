"""What a Trans-Net's epoch spends on features: the cache, files of one image each, plain memory.

    python benchmarks/transnet.py                        # on this machine's CPU
    python benchmarks/transnet.py --device cuda --output benchmarks/results/transnet-h200.csv
    python benchmarks/transnet.py --sizes digits --quick

Two networks' features, of the size of the digits default (32x16x16) and of vgg16's conv5
(512x14x14), in a float16 cache that two networks of one convolution have filled; batches of 64.
Reading is one pass over all pairs until a batch is in memory, to be moved to the device: 16-bit
rows of the cache, or float32 from one torch file an image, unpickled one after the other, as the
published loop has it. Decoding to float32 is the device's work; a row of its own has both, which on
a CPU can be no faster than copying float32 tensors. An epoch is forward, backward and Adam of a
Trans-Net of three layers, decoding included; waiting is the time from asking for a batch to having
it. The ways are interleaved in one process after a pass of each, so all files are in the page
cache; a ratio is the median of the rounds' own. The table goes to --output, and as Markdown next to
it.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from common import environment, markdown
from torch import nn
from torch.nn import functional as F

from kdfast.data import Batch, ImageData
from kdfast.data.sources import ArraySource
from kdfast.models import TransNet, checksum
from kdfast.training.features import Features
from kdfast.training.setup import Inputs
from kdfast.training.tapped import Tapped

BATCH = 64
# Shape of a feature, its stride in pixels, images, rounds of reading, epochs.
SIZES = {"digits": ((32, 16, 16), 2, 1437, 15, 7), "vgg16": ((512, 14, 14), 16, 192, 15, 3)}
Pair = tuple[torch.Tensor, torch.Tensor]


class OneConvolution(nn.Module):
    """A cheap network with a feature of the wanted shape behind `conv`."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, channels, stride, stride), nn.Linear(channels, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(x).mean((2, 3)))


def pair_of_features(
    shape: tuple[int, ...], stride: int, count: int, folder: Path, accelerator: Accelerator
) -> Features:
    """Features of two networks, not yet cached, of `count` random images."""
    side = shape[1] * stride
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (count, side, side, 3), np.uint8)
    source = ArraySource(pixels, np.arange(count) % 10, "noise")
    data = ImageData("noise", source, source, 10, side, in_memory=True)
    inputs = Inputs((side, side), (0.5,) * 3, (0.25,) * 3)
    nets = []
    for name in "ab":
        network = OneConvolution(shape[0], stride)
        digest = checksum(network.state_dict())
        network = network.to(accelerator.device)
        nets.append(Tapped(name, network, "conv", inputs, shape, digest, None, 10))
    options = argparse.Namespace(
        features="cache", feature_dir=str(folder), feature_dtype="float16", shuffle_pairs=False,
        batch_size=BATCH, global_batch_size=None, grad_accum_steps=1, drop_last=False,
        eval_drop_last=False, seed=0, workers=0, crop_pct=1.0, interpolation="bilinear",
        channels_last=False, crop_mode=None, train_half=None, train_split=None, val_split=None,
        test_split=None,
    )  # fmt: skip
    return Features(options, accelerator, data, nets)


def everything(feats: Features) -> Pair:
    """All pairs in the order of the images, float32 on the device."""
    loader = feats.loader("train")
    batches = [feats.prepare(batch.images) for batch in loader.epoch(0)]
    loader.close()
    a, b = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return a, b


def write_files(pair: Pair, folder: Path) -> None:
    """One record an image, with the published names of its fields."""
    folder.mkdir()
    right = torch.tensor([1, 1], dtype=torch.int32)
    for i, (a, b) in enumerate(zip(*(part.cpu() for part in pair), strict=True)):
        record = {"target": torch.tensor(i % 10, dtype=torch.int32), "pred1": right, "pred2": right}
        torch.save(record | {"convOut1": a.clone(), "convOut2": b.clone()}, folder / f"{i:06d}.pt")


class Files:
    """The published way to read: a file an image, in the order of `plan`."""

    def __init__(self, folder: Path, plan, device: torch.device):
        self.folder, self.plan, self.device = folder, plan, device

    def epoch(self, epoch: int) -> Iterator[Pair]:
        for portion in self.plan.portions(epoch):
            # Unpickled as the published loop did it, which is also the fastest; files of our own.
            records = [
                torch.load(self.folder / f"{i:06d}.pt", weights_only=False) for i in portion.indices
            ]
            a, b = (torch.stack([r[key] for r in records]) for key in ("convOut1", "convOut2"))
            yield a.to(self.device), b.to(self.device)


class Memory:
    """Float32 tensors on the device, indexed."""

    def __init__(self, pair: Pair, plan):
        self.pair, self.plan = pair, plan

    def epoch(self, epoch: int) -> Iterator[Pair]:
        a, b = self.pair
        for portion in self.plan.portions(epoch):
            indices = torch.tensor(portion.indices, device=a.device)
            yield a[indices], b[indices]


class Cache:
    """What training reads."""

    def __init__(self, feats: Features):
        self.feats, self.loader = feats, feats.loader("train", shuffle=True)
        self.plan, self.waited = self.loader.plan, 0.0

    def stored(self, epoch: int) -> Iterator[Batch]:
        """Batches as they are read, not decoded."""
        return self.loader.epoch(epoch)

    def epoch(self, epoch: int) -> Iterator[Pair]:
        self.waited = 0.0
        batches = self.loader.epoch(epoch)
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - asked
            if batch is None:
                return
            yield self.feats.prepare(batch.images)


def timed(action: Callable[[], object], device: str) -> float:
    started = time.perf_counter()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def training(channels: int, device: torch.device) -> Callable[[Iterator[Pair]], None]:
    torch.manual_seed(0)
    net = TransNet(channels).to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, weight_decay=1e-4)

    def train(pairs: Iterator[Pair]) -> None:
        for a, b in pairs:
            loss = F.mse_loss(net(a), b) + 0.1 * net.gates.square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return train


def drain(pairs: Iterator) -> None:
    """Have it all, and keep none."""
    for _ in pairs:
        pass


def spread(samples: list[float], unit: str = "s") -> str:
    """Median and extremes."""
    return f"{statistics.median(samples):.4g} {unit} ({min(samples):.4g}-{max(samples):.4g})"


def median_ratio(first: list[float], second: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def row(
    size: str, what: str, measured: str, value: str, goal: str = "-", met: bool | None = None
) -> dict[str, str]:
    return {
        "feature": size,
        "what": what,
        "measured": measured,
        "value": value,
        "goal": goal,
        "outcome": {True: "met", False: "**missed**", None: "-"}[met],
    }


def measure(size: str, device: str, accelerator: Accelerator, quick: bool) -> list[dict[str, str]]:
    shape, stride, count, rounds, epochs = SIZES[size]
    rounds, epochs = (3, 1) if quick else (rounds, epochs)
    label = f"{'x'.join(map(str, shape))}, {count} images"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        feats = pair_of_features(shape, stride, count, folder / "caches", accelerator)
        pair = everything(feats)
        write_files(pair, folder / "files")
        cache = Cache(feats)
        files = Files(folder / "files", cache.plan, accelerator.device)
        memory = Memory(pair, cache.plan)
        ways = {
            "cache": cache.stored,
            "decoded": cache.epoch,
            "files": files.epoch,
            "memory": memory.epoch,
        }
        reading: dict[str, list[float]] = {name: [] for name in ways}
        for i in range(-1, rounds):
            for name, way in ways.items():
                seconds = timed(lambda way=way, i=i: drain(way(i)), device)
                if i >= 0:  # a pass of each comes first
                    reading[name].append(seconds)
        train = training(shape[0], accelerator.device)
        train(memory.epoch(0))
        spent: dict[str, list[float]] = {"cache": [], "memory": []}
        waits = []
        trained = {"cache": cache.epoch, "memory": memory.epoch}
        for i in range(epochs):
            for name in spent if i % 2 else reversed(spent):
                way = trained[name]
                spent[name].append(timed(lambda way=way, i=i: train(way(i)), device))
            waits.append(cache.waited / spent["cache"][-1])
        cache.loader.close()
        stored = sum(p.stat().st_size for p in (folder / "caches").rglob("*") if p.is_file())
    faster = median_ratio(reading["files"], reading["cache"])
    decoded = median_ratio(reading["files"], reading["decoded"])
    longer = median_ratio(spent["cache"], spent["memory"])
    share, waited = stored / (8 * pair[0].numel()), statistics.median(waits)
    return [
        row(
            label,
            "reading: files / cache",
            f"files {spread(reading['files'])}; cache {spread(reading['cache'])}",
            f"{faster:.1f}",
            "at least 10",
            faster >= 10,
        ),
        row(
            label,
            "reading and decoding: files / cache",
            f"cache {spread(reading['decoded'])}; float32 copied in memory "
            f"{spread(reading['memory'])}",
            f"{decoded:.1f}",
        ),
        row(
            label,
            "waiting for features, of an epoch",
            spread([100 * wait for wait in waits], "%"),
            f"{waited:.2%}",
            "at most 2 %",
            waited <= 0.02,
        ),
        row(
            label,
            "epoch: cache / memory",
            "; ".join(f"{name} {spread(samples)}" for name, samples in spent.items()),
            f"{longer:.3f}",
            "at most 1.05",
            longer <= 1.05,
        ),
        row(
            label,
            "bytes on disk / float32",
            f"{stored / 1e6:.1f} MB",
            f"{share:.1%}",
            "at most 52 %",
            share <= 0.52,
        ),
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--output", type=Path, help="CSV; the table also goes to the same .md")
    parser.add_argument("--quick", action="store_true", help="3 rounds of reading, 1 epoch")
    parser.add_argument("--note", help="what else the machine was doing; stands below the table")
    args = parser.parse_args(argv)

    accelerator = Accelerator(cpu=args.device == "cpu")
    where = environment(args.device)
    rows = []
    for size in args.sizes:
        rows += measure(size, args.device, accelerator, args.quick)
    text = (
        f"{where['device']}, torch {where['torch']}, batch {BATCH}, float32\n\n{markdown(rows)}\n"
    )
    text += f"\n{args.note}\n" if args.note else ""
    print(text)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.with_suffix(".md").write_text(text)
        with args.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], "device", "torch"])
            writer.writeheader()
            writer.writerows(r | {k: where[k] for k in ("device", "torch")} for r in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
