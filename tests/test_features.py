"""Paired features: what a cache holds, who may use it, and in which order it is read."""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from kdfast.data import ImageData, Loader, open_data
from kdfast.data.sources import ArraySource
from kdfast.errors import UsageError, UserError
from kdfast.models import checksum, shapes_of
from kdfast.training import feature_build, feature_cache
from kdfast.training.feature_cache import FeatureCache, channel_scale, decode, encode
from kdfast.training.feature_dump import Dump
from kdfast.training.features import Features, derangement
from kdfast.training.setup import Inputs, evaluation_transform, train_plan
from kdfast.training.tapped import Tapped

ROOT = Path(__file__).parent.parent
IMAGES, HELD_OUT = 70, 26


class Small(nn.Module):
    """A classifier with a map [5, 8, 8] (`conv`), a map of one pixel (`pool`), a vector (`flat`).

    Channel 1 of the map is 0 everywhere, channel 2 is 3 everywhere, channel 3 large.
    """

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.act = nn.Conv2d(3, 5, 3, 4, 1), nn.ReLU(inplace=True)
        self.pool, self.flat = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.fc = nn.Linear(5, 10)
        with torch.no_grad():
            self.conv.weight[1:3] = 0
            self.conv.weight[3] *= 1000
            self.conv.bias[1:3] = torch.tensor([0.0, 3.0])

    def forward(self, x):
        return self.fc(self.flat(self.pool(self.act(self.conv(x)))))


def tapped(name: str = "a", seed: int = 0, layer: str = "conv", size: int = 32) -> Tapped:
    network = Small(seed).eval()
    shape = tuple(shapes_of(network, [layer], (size, size))[0])
    inputs = Inputs((size, size), (0.3, 0.4, 0.5), (0.3, 0.2, 0.1))
    return Tapped(name, network, layer, inputs, shape, checksum(network.state_dict()), None, 10)


def options(folder: Path, **changed) -> argparse.Namespace:
    settings = {
        "features": "cache", "feature_dir": None, "feature_dtype": "float16",
        "shuffle_pairs": False, "output": str(folder), "batch_size": 8, "global_batch_size": None,
        "grad_accum_steps": 1, "drop_last": False, "eval_drop_last": False, "seed": 3,
        "workers": None, "crop_pct": 0.875, "interpolation": "bilinear", "channels_last": False,
        "crop_mode": None, "train_half": None, "train_split": None, "val_split": None,
        "test_split": None,
    }  # fmt: skip
    return argparse.Namespace(**settings | changed)


def noise(train: int = IMAGES) -> ImageData:
    """A set of random images in memory."""
    pixels = np.random.default_rng(0).integers(0, 256, (100 + HELD_OUT, 32, 32, 3), np.uint8)
    labels = np.arange(len(pixels)) * 7 % 10
    parts = (np.arange(train), np.arange(100, 100 + HELD_OUT))
    sources = (ArraySource(pixels[part], labels[part], "noise") for part in parts)
    return ImageData("noise/a:b", *sources, 10, 32, in_memory=True)


def features(folder: Path, *nets: Tapped, data=None, **changed) -> Features:
    nets = nets or (tapped("a", 0), tapped("b", 1))
    return Features(options(folder, **changed), Accelerator(cpu=True), data or noise(), nets)


def collect(feats: Features, split: str = "train", *, shuffle: bool = False, epoch: int = 0):
    """All features of an epoch by network, with labels and indices."""
    loader = feats.loader(split, shuffle=shuffle)
    parts, labels, indices = [], [], []
    for batch in loader.epoch(epoch):
        parts.append(feats.prepare(batch.images))
        labels.append(batch.labels)
        indices.append(batch.indices)
    loader.close()
    return [torch.cat(of_one) for of_one in zip(*parts, strict=True)], *map(
        torch.cat, (labels, indices)
    )


def caches(folder: Path) -> list[Path]:
    return sorted((folder / "features").glob("[!.]*"))


def images_of(source, count: int) -> torch.Tensor:
    data = noise()
    transform = evaluation_transform(options(Path()), data, (32, 32))
    return torch.stack([transform(source.read(i)[0]) for i in range(count)])


# What is stored


@pytest.mark.parametrize("dtype, bits", [("float16", 11), ("bfloat16", 8)])
@pytest.mark.parametrize("layer, shape", [("conv", (5, 8, 8)), ("pool", (5, 1, 1)), ("fc", (10,))])
def test_a_cache_holds_what_the_network_answers(tmp_path, dtype, bits, layer, shape):
    net = tapped(layer=layer)
    assert net.shape == shape
    feats = features(tmp_path, net, feature_dtype=dtype)
    (found,), labels, indices = collect(feats)
    data = noise()
    live = net.features(images_of(data.train, IMAGES))
    assert found.shape == (IMAGES, *shape) and found.dtype == torch.float32
    (path,) = caches(tmp_path)
    cache = FeatureCache(path)
    least = feature_cache.along_channels(cache.scale, live) * 2.0**-25  # half a subnormal step
    bound = live.abs() * 2.0**-bits + (least if dtype == "float16" else 0)
    assert ((found - live).abs() <= bound * 1.001).all()
    assert torch.equal(indices, torch.arange(IMAGES))
    assert labels.tolist() == data.train.labels()
    logits = net.network(net._resize((images_of(data.train, IMAGES).float() / 255
             - torch.tensor([0.3, 0.4, 0.5]).view(3, 1, 1))
             / torch.tensor([0.3, 0.2, 0.1]).view(3, 1, 1)))  # fmt: skip
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert cache.columns["label"].tolist() == labels.tolist()
    assert cache.columns["label"].dtype == np.int32
    assert torch.equal(torch.from_numpy(cache.columns["top1"]), ranks < 1)
    assert torch.equal(torch.from_numpy(cache.columns["top3"]), ranks < 3)
    assert 0 < (ranks < 3).sum() < IMAGES


def test_silent_and_constant_channels(tmp_path):
    """0 stays 0 and a constant stays what it is, exactly: scales are powers of two."""
    (found,), *_ = collect(features(tmp_path, tapped()))
    assert (found[:, 1] == 0).all() and (found[:, 2] == 3).all()
    assert found[:, 3].abs().max() > 100


def test_usual_features_are_stored_as_they_are():
    assert channel_scale(torch.tensor([[200.0, -4.0], [0.0, 3.0]])).tolist() == [1, 1]
    assert channel_scale(torch.tensor([[0.01, -8e-4]])).log2().tolist() == [-10, -14]


def test_scales_leave_room():
    first = torch.tensor([[1.0, 0.0, 500.0], [-3.0, 0.0, 1000.0]])
    scale = channel_scale(first)
    assert scale.log2().frac().eq(0).all() and scale.dtype == torch.float32
    stored = first[1].abs() / scale
    assert 8 <= stored[2] < 16
    for value in (64 * 1000.0, -64 * 1000.0):  # in any channel, the silent one as well
        assert encode(torch.full((1, 3), value), scale, torch.float16).isfinite().all()
    assert channel_scale(torch.zeros(2, 3)).gt(0).all()
    tiny = torch.tensor([[1e-6, 2e-3, 1000.0]])
    there = decode(encode(tiny, channel_scale(tiny), torch.float16), channel_scale(tiny))
    torch.testing.assert_close(there, tiny, rtol=2**-11, atol=1e-7)


def test_overflow_is_refused(tmp_path, monkeypatch):
    """A later image far beyond the first ones: said, and nothing is left; bfloat16 takes it."""
    net = tapped()
    monkeypatch.setattr(feature_build, "channel_scale", lambda x: channel_scale(x) / (1 << 13))
    with pytest.raises(UserError, match=r"image \d+ .*too large for float16.*bfloat16"):
        features(tmp_path, net).loader("train")
    assert caches(tmp_path) == [] and not list((tmp_path / "features").iterdir())
    collect(features(tmp_path, net, feature_dtype="bfloat16"))


def test_features_that_are_not_finite_are_refused(tmp_path):
    net = tapped()
    with torch.no_grad():
        net.network.conv.bias[0] = float("inf")
    with pytest.raises(UserError, match="network A at 'conv' is not finite"):
        features(tmp_path, net).loader("train")
    assert not list((tmp_path / "features").iterdir())


def test_size_on_disk(tmp_path):
    features(tmp_path, tapped("a")).loader("train")
    (path,) = caches(tmp_path)
    taken = sum(file.stat().st_size for file in path.iterdir())
    assert taken <= 0.52 * 4 * IMAGES * 5 * 8 * 8 + 2000  # a record and three headers
    assert (path / "data.bin").stat().st_size == 2 * IMAGES * 5 * 8 * 8


def test_a_live_batch_is_the_network_itself(tmp_path):
    nets = (tapped("a", 0), tapped("b", 1, layer="pool"))
    found, labels, indices = collect(features(tmp_path, *nets, features="live"), "val")
    images = images_of(noise().eval, HELD_OUT)
    for one, net in zip(found, nets, strict=True):
        torch.testing.assert_close(one, net.features(images), rtol=1e-5, atol=1e-4)
    assert labels.tolist() == noise().eval.labels()
    assert indices.tolist() == list(range(HELD_OUT)) and not (tmp_path / "features").exists()


@pytest.mark.parametrize("kind", ["cache", "live"])
def test_a_sample_is_evenly_spaced_and_of_the_first_network(tmp_path, monkeypatch, kind):
    feats = features(tmp_path, features=kind)
    whole = collect(feats)[0][0]
    loader = feats.loader("train", shuffle=True)
    monkeypatch.setattr(feats, "nets", feats.nets[:1])
    found = torch.cat(list(feats.sample(loader, 20)))
    assert torch.allclose(found, whole[[i * IMAGES // 20 for i in range(20)]], atol=1e-4)
    assert len(torch.cat(list(feats.sample(loader, 1000)))) == IMAGES
    loader.close()


def test_networks_run_without_tf32(tmp_path):
    net, seen = tapped(), []
    net.network.conv.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    before = torch.backends.cudnn.allow_tf32
    net.features(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert seen == [False] and torch.backends.cudnn.allow_tf32 == before


def test_networks_of_other_sizes(tmp_path):
    """Each gets the images of its own size, from a cache as live."""
    nets = (tapped("a", 0), tapped("b", 0, size=24))
    cached, *_ = collect(features(tmp_path, *nets), "val")
    live, *_ = collect(features(tmp_path, *nets, features="live"), "val")
    assert cached[1].shape == (HELD_OUT, 5, 6, 6)
    for one, other in zip(cached, live, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


# Where it lies


def test_names_are_safe_and_settings_do_not_collide(tmp_path):
    net = tapped(layer="act:in")
    for changed in ({}, {"feature_dtype": "bfloat16"}):
        features(tmp_path, net, **changed).loader("train")
    features(tmp_path, net, data=noise(train=40)).loader("train")
    features(tmp_path, tapped(layer="act:in", size=24)).loader("train")
    features(tmp_path, net).loader("val")
    names = [path.name for path in caches(tmp_path)]
    assert len(names) == 5
    start = f"{net.checksum[:8]}-act_in-noise_a_b-"
    assert all(name.startswith((start + "train-", start + "val-")) for name in names)


def test_a_third_split_or_the_second(tmp_path, image_folder):
    """Without a third split "test" is "val", of which there is one cache."""
    for split in ("val", "test"):
        features(tmp_path, tapped()).loader(split)
    assert len(caches(tmp_path)) == 1
    shutil.copytree(image_folder / "train", image_folder / "test")
    data = open_data("folder", image_folder)
    net = tapped()
    feats = features(tmp_path / "folder", net, data=data, batch_size=3)
    assert [len(collect(feats, split)[1]) for split in ("train", "val", "test")] == [6, 4, 6]
    assert len(caches(tmp_path / "folder")) == 3


def test_a_cache_is_made_once(tmp_path, monkeypatch):
    first = collect(features(tmp_path))
    before = {path: (path / "data.bin").stat().st_mtime_ns for path in caches(tmp_path)}
    assert len(before) == 2
    monkeypatch.setattr("kdfast.training.features.build", None)
    second = collect(features(tmp_path))
    for one, two in zip(first[0], second[0], strict=True):
        assert torch.equal(one, two)
    assert before == {p: (p / "data.bin").stat().st_mtime_ns for p in caches(tmp_path)}


def test_one_network_twice_is_one_cache(tmp_path):
    feats = features(tmp_path, tapped("a"), tapped("b"))
    (a, b), *_ = collect(feats)
    assert len(caches(tmp_path)) == 1 and torch.equal(a, b)


def test_where_it_goes(tmp_path):
    elsewhere = tmp_path / "other"
    features(tmp_path, tapped(), feature_dir=str(elsewhere)).loader("val")
    assert len(list(elsewhere.iterdir())) == 1 and not caches(tmp_path)


def test_a_small_disk(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=50_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    words = r"need .* GiB, and .* has .* GiB left; give --feature-dir .* or --features live"
    with pytest.raises(UserError, match=words):
        features(tmp_path).loader("train")
    assert not (tmp_path / "features").exists()


def test_a_disk_that_cannot_be_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match=r"No space left.*--feature-dir.*--features live"):
        features(tmp_path).loader("train")
    assert not list((tmp_path / "features").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write a feature cache.*--feature-dir"):
        features(tmp_path, feature_dir=str(tmp_path / "file")).loader("train")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"cannot write a feature cache.*--feature-dir"):
        features(tmp_path, feature_dir=str(tmp_path / "link")).loader("train")


# What is refused


def stale(feats: Features, *words: str, split: str = "train") -> None:
    with pytest.raises(UserError) as caught:
        feats.loader(split)
    said = str(caught.value)
    assert [word for word in (*words, "feature cache", "--feature-dir") if word not in said] == []
    assert "\n" not in said


def test_other_images_are_refused(tmp_path, image_folder):
    """A file exchanged since, or an array's pixels; a set that has moved is the same set."""
    net = tapped()
    features(tmp_path, net, data=open_data("folder", image_folder), batch_size=3).loader("train")
    moved = image_folder.rename(tmp_path / "moved")
    features(tmp_path, net, data=open_data("folder", moved), batch_size=3).loader("train")
    assert len(caches(tmp_path)) == 1
    Image.new("RGB", (50, 50), (9, 8, 7)).save(moved / "train/dog/2.png")
    feats = features(tmp_path, net, data=open_data("folder", moved), batch_size=3)
    stale(feats, "other images or labels")
    features(tmp_path, net).loader("val")
    data = noise()
    data.eval.images[HELD_OUT - 1, 0, 0] += 1
    stale(features(tmp_path, net, data=data), "other images or labels", split="val")


@pytest.mark.parametrize("name", ["{}", "{} box 1,2,30.5,40"])
def test_sizes_of_files_in_a_folder_whose_name_says_box(tmp_path, name):
    path = tmp_path / "bird box crops/a box 7.png"
    path.parent.mkdir()
    path.write_bytes(b"12345")
    assert feature_build._size_of(name.format(path)) == 5
    assert feature_build._size_of(name.format("cifar10 image 3")) is None


def test_other_weights_are_refused(tmp_path):
    """Under the name that the cache of these weights would have."""
    features(tmp_path, tapped(seed=0)).loader("train")
    (path,) = caches(tmp_path)
    other = tapped(seed=1)
    features(tmp_path, other).loader("train")
    (theirs,) = set(caches(tmp_path)) - {path}
    shutil.rmtree(theirs)
    shutil.copytree(path, theirs)
    stale(features(tmp_path, other), "other weights", other.checksum[:12], str(theirs))
    meta = json.loads((theirs / "meta.json").read_text()) | {"checksum": other.checksum}
    (theirs / "meta.json").write_text(json.dumps(meta))
    stale(features(tmp_path, other), "does not hold what the network answers to image 0")


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("input_size", [3, 24, 24], "another input_size ([3, 24, 24], not [3, 32, 32])"),
        ("layer", "pool", "another layer (pool, not conv)"),
        ("mean", [0, 0, 0], "another mean"),
        ("crop", [32, 0.9, "bilinear", "center"], "another crop"),
        ("layout", 99, "layout 99"),
    ],
)
def test_other_settings_are_refused(tmp_path, key, value, words):
    features(tmp_path, tapped()).loader("val")
    (path,) = caches(tmp_path)
    meta = json.loads((path / "meta.json").read_text())
    assert meta[key] != value
    (path / "meta.json").write_text(json.dumps(meta | {key: value}))
    stale(features(tmp_path, tapped()), words, split="val")


def test_damaged_caches_are_refused(tmp_path):
    features(tmp_path, tapped()).loader("val")
    (path,) = caches(tmp_path)
    for name in ("data.bin", "scale.npy", "columns.npy", "meta.json"):
        whole = (path / name).read_bytes()
        for damaged in (None, whole[:-1], b""):
            (path / name).unlink()
            if damaged is not None:
                (path / name).write_bytes(damaged)
            stale(features(tmp_path, tapped()), name, str(path), split="val")
            (path / name).write_bytes(whole)
    features(tmp_path, tapped()).loader("val")


def test_a_damaged_row_is_found_when_it_is_read(tmp_path):
    feats = features(tmp_path, tapped())
    feats.loader("train")
    (path,) = caches(tmp_path)
    row = 2 * 5 * 8 * 8
    with (path / "data.bin").open("r+b") as file:
        file.seek(50 * row + 7)
        byte = file.read(1)
        file.seek(50 * row + 7)
        file.write(bytes([byte[0] ^ 64]))
    loader = feats.loader("train")  # of the first rows none is damaged
    with pytest.raises(UserError, match=r"row 50 of data.bin is missing or damaged"):
        list(loader.epoch(0))
    loader.close()


def test_an_unreadable_image_leaves_nothing(tmp_path, image_folder):
    (image_folder / "train/dog/2.png").write_bytes(b"no image")
    feats = features(tmp_path, data=open_data("folder", image_folder), batch_size=2)
    with pytest.raises(UserError, match=r"dog/2.png"):
        feats.loader("train")
    assert not list((tmp_path / "features").iterdir())


# In which order


@pytest.mark.parametrize("accumulation, drop_last", [(1, False), (3, True)])
def test_batches_are_those_of_the_image_loader(tmp_path, accumulation, drop_last):
    settings = {"grad_accum_steps": accumulation, "drop_last": drop_last}
    feats = features(tmp_path, **settings)
    data, own = noise(), options(tmp_path, **settings)
    plan = train_plan(own, data, data.train, feats.accelerator)
    transform = evaluation_transform(own, data, (32, 32))
    images = Loader(data.train, transform, plan, classes=data.classes)
    cached = feats.loader("train", shuffle=True)
    live = features(tmp_path, **settings, features="live").loader("train", shuffle=True)
    assert cached.plan.steps == live.plan.steps == images.plan.steps
    for epoch, first in ((0, 0), (4, 1)):
        passes = (loader.epoch(epoch, first) for loader in (images, cached, live))
        for due, stored, seen in zip(*passes, strict=True):
            assert due.portion == stored.portion == seen.portion
            for batch in (stored, seen):
                assert torch.equal(batch.labels, due.labels) and batch.labels.dtype == torch.int64
                assert torch.equal(batch.indices, due.indices)
            expected = feats.nets[1].features(due.images)
            torch.testing.assert_close(
                feats.prepare(stored.images)[1], expected, rtol=1e-3, atol=1e-3
            )
            torch.testing.assert_close(feats.prepare(seen.images)[1], expected)
    cached.close()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_reads_its_own_rows(tmp_path, rank):
    """Two processes share 70 images in 5 steps; in the last one process 1 keeps step."""
    feats = features(tmp_path, batch_size=9, data=noise(train=73))
    loader = feats.loader("train", shuffle=True)
    loader.plan.processes, loader.plan.rank = 2, rank
    portions = loader.plan.portions(1)
    batches = list(loader.epoch(1))
    loader.close()
    assert [batch.portion for batch in batches] == portions
    assert [batch.indices.tolist() for batch in batches] == [p.indices for p in portions]
    assert (batches[-1].portion.count == 0) == (rank == 1)
    cache = loader.caches[0]
    for batch in batches:
        assert torch.equal(batch.images[0].stored, cache.rows(batch.portion.indices))


def test_too_few_images(tmp_path):
    with pytest.raises(UsageError, match="global batch 400 is larger than the 70 training"):
        features(tmp_path, batch_size=400).loader("train", shuffle=True)
    with pytest.raises(UsageError, match="leaves no evaluation batch"):
        features(tmp_path, batch_size=400, eval_drop_last=True).loader("val")


# Shuffled pairs


def test_shuffled_pairs(tmp_path):
    nets = [tapped("a", 0), tapped("b", 1), tapped("c", 0)]
    plain, labels, _ = collect(features(tmp_path, *nets))
    (a, b, c), shuffled_labels, indices = collect(features(tmp_path, *nets, shuffle_pairs=True))
    assert torch.equal(a, plain[0]) and torch.equal(labels, shuffled_labels)
    order = (b[:, None] == plain[1][None]).flatten(2).all(2).float()
    assert order.sum(0).eq(1).all() and order.sum(1).eq(1).all(), "a permutation"
    assert order.diagonal().eq(0).all(), "no image keeps its own"
    where = order.argmax(1)
    assert torch.equal(c, plain[2][where]), "one order for all"
    again, _, indices = collect(features(tmp_path, *nets, shuffle_pairs=True), shuffle=True)
    assert torch.equal(again[1], plain[1][where[indices]]), "in every epoch"
    other, *_ = collect(features(tmp_path, *nets, shuffle_pairs=True, seed=4))
    assert not torch.equal(other[1], b)


def test_derangements():
    assert {tuple(derangement(3, seed).tolist()) for seed in range(30)} == {(1, 2, 0), (2, 0, 1)}
    with pytest.raises(UserError, match="at least two images"):
        derangement(1, 0)


def test_shuffled_pairs_need_a_cache(tmp_path):
    with pytest.raises(UsageError, match=r"--shuffle-pairs .*--features live"):
        features(tmp_path, shuffle_pairs=True, features="live")


# The thread


def readers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("kdfast-features")]


def test_the_thread_ends(tmp_path):
    loader = features(tmp_path).loader("train")
    passing = loader.epoch(0)
    next(passing)
    assert len(readers()) == 1
    passing.close()
    loader.close()
    assert readers() == []
    assert len(list(loader.epoch(1))) == loader.plan.steps
    loader.close()
    loader.close()
    assert readers() == []


def test_its_errors_come_as_they_are(tmp_path, monkeypatch):
    feats = features(tmp_path)
    loader = feats.loader("train")
    error = LookupError("lost")

    def lose(*_, **__):
        raise error

    monkeypatch.setattr(FeatureCache, "rows", lose)
    with pytest.raises(LookupError) as caught:
        next(loader.epoch(0))
    assert caught.value is error
    loader.close()


# Old dumps


@pytest.fixture
def dump(tmp_path) -> Path:
    """What the published code leaves of networks `tapped("a", 0)` and `tapped("b", 1)`."""
    folder, source = tmp_path / "dump", noise().train
    folder.mkdir()
    images = images_of(source, IMAGES)
    a, b = (tapped(name, seed).features(images) for name, seed in (("a", 0), ("b", 1)))
    order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(5)).tolist()
    for number, index in enumerate(order):
        record = {
            "target": torch.tensor(source.targets[index], dtype=torch.int32),
            "pred1": torch.tensor([index % 2, 1], dtype=torch.int32),
            "pred2": torch.tensor([0, index % 3 == 0], dtype=torch.int32),
            "convOut1": a[index].clone(),
            "convOut2": b[index].clone(),
        }
        torch.save(record, folder / f"{number:06d}.pt")
    (folder / "order.json").write_text(json.dumps(order))
    return folder


def dumped(folder: Path, dump: Path, *nets: Tapped, **changed) -> Features:
    nets = nets or (tapped("a", 0), tapped("b", 1))
    return Features(options(folder, **changed), Accelerator(cpu=True), noise(), nets, dump)


def test_an_old_dump(tmp_path, dump):
    order = json.loads((dump / "order.json").read_text())
    plain, labels, _ = collect(features(tmp_path / "plain"))
    feats = dumped(tmp_path, dump)
    found, found_labels, indices = collect(feats)
    assert indices.tolist() == list(range(IMAGES)) and torch.equal(found_labels, labels[order])
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other[order], rtol=1e-3, atol=1e-3)
    first, second = (cache.columns for cache in feats.loader("train").caches)
    assert first["top1"].tolist() == [i % 2 == 1 for i in order] and first["top3"].all()
    assert second["top3"].tolist() == [i % 3 == 0 for i in order] and not second["top1"].any()
    held_out, *_ = collect(feats, "val")
    assert len(held_out[0]) == HELD_OUT
    names = [path.name for path in caches(tmp_path)]
    features(tmp_path).loader("train")
    assert len(caches(tmp_path)) == len(names) + 2, "not taken for a cache of the images"
    (dump / "000003.pt").write_bytes(b"")
    stale(dumped(tmp_path, dump), "other images or labels")


@pytest.mark.parametrize("written", ["with checksums", "without", "no archive"])
def test_a_dump_is_known_by_its_contents(tmp_path, dump, written):
    path = dump / "000002.pt"
    record = torch.load(path, weights_only=True)

    def write() -> tuple[str, int]:
        torch.serialization.set_crc32_options(written != "without")
        try:
            torch.save(record, path, _use_new_zipfile_serialization=written != "no archive")
        finally:
            torch.serialization.set_crc32_options(True)
        return Dump(dump, [(5, 8, 8)] * 2).fingerprint(), path.stat().st_size

    before, size = write()
    assert write() == (before, size)
    record["convOut2"][0, 0, 0] += 1
    after, now = write()
    assert now == size and after != before


def test_a_map_has_no_axes_behind_it(tmp_path, dump):
    path = dump / "000000.pt"
    record = torch.load(path, weights_only=True)
    torch.save(record | {"convOut1": record["convOut1"][..., None, None]}, path)
    with pytest.raises(UserError, match=r"convOut1 is \[5, 8, 8, 1, 1\]"):
        Dump(dump, [(5, 8, 8)] * 2).read(0)


def test_dumps_that_are_refused(tmp_path, dump):
    def refuse(words: str, *nets: Tapped, folder: Path = dump) -> None:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always", ResourceWarning)
            with pytest.raises(UserError, match=words):
                dumped(tmp_path, folder, *nets).loader("train")
            gc.collect()
        left_open = [str(w.message) for w in seen if w.category is ResourceWarning]
        assert not left_open
        assert not list((tmp_path / "features").glob("*")) and not list(tmp_path.glob("*/.*"))

    refuse(r"000000.pt is of no training image of class \d in network B", tapped("a", 0),
           tapped("b", 2))  # fmt: skip
    refuse(r"convOut1 is \[5, 8, 8\], and the layer gives \[5, 1, 1\]", tapped(layer="pool"),
           tapped("b", 1))  # fmt: skip
    refuse("no feature dump at .*000000.pt", folder=tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"--feature-dump.*--features live"):
        dumped(tmp_path, dump, features="live")
    path = dump / "000066.pt"
    whole = path.read_bytes()
    for content in (whole[:100], b"", b"nothing"):
        path.write_bytes(content)
        refuse("000066.pt (is no record|holds no whole)")
    torch.save({"target": Path("x")}, path)
    refuse("000066.pt holds objects besides tensors, and kdfast runs no pickled code")
    torch.save({"target": torch.tensor(1)}, path)
    refuse("000066.pt is no record of a feature dump, with target, pred1")
    path.unlink()
    refuse("record 000066 is missing")


# Several processes, and kills

BUILD = """
import os, signal, sys
from pathlib import Path
import torch
from test_features import Accelerator, Features, noise, options, tapped

writes, limit, write = 0, int(sys.argv[2]), os.pwrite

def pwrite(*args):
    global writes
    writes += 1
    if writes == limit:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*args)

os.pwrite = pwrite
torch.set_num_threads(1)
accelerator = Accelerator(cpu=True)
nets = (tapped("a", 0), tapped("b", 1))
feats = Features(options(Path(sys.argv[1])), accelerator, noise(), nets)
loader = feats.loader("train")
count = sum(batch.portion.count for batch in loader.epoch(0))
sys.stdout.write(f"{accelerator.num_processes} {writes} {count}\\n")
loader.close()
if accelerator.num_processes > 1:
    torch.distributed.destroy_process_group()
"""


def run_build(folder: Path, *launcher: object, kill: int = 0) -> subprocess.CompletedProcess:
    script = folder / "build.py"
    script.write_text(BUILD)
    paths = f"{ROOT}:{ROOT / 'tests'}"
    return subprocess.run(
        [*map(str, launcher), str(script), str(folder), str(kill)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_a_killed_build_is_no_cache(tmp_path):
    done = run_build(tmp_path, sys.executable, kill=7)
    assert done.returncode == -9, done.stderr
    assert caches(tmp_path) == []
    assert len(list((tmp_path / "features").glob(".*.partial"))) == 2
    found, *_ = collect(features(tmp_path))
    live, *_ = collect(features(tmp_path, features="live"))
    for one, other in zip(found, live, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    assert len(caches(tmp_path)) == 2 and not list((tmp_path / "features").glob(".*.partial"))


def test_a_cache_being_made_is_held_to_the_end(tmp_path, monkeypatch):
    """Another command must not begin it again, not even just before it has its name."""
    attempt = (
        "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    )
    rename, tried = Path.rename, []

    def first_try(path: Path, target: Path):
        command = [sys.executable, "-S", "-c", attempt, str(path / ".lock")]
        tried.append(subprocess.run(command, capture_output=True, text=True).stderr)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", first_try)
    features(tmp_path).loader("val")
    assert len(tried) == 2 and all("BlockingIOError" in said for said in tried)


@pytest.mark.parametrize("lost_at", ["mkdir", "open"])
def test_a_folder_that_is_renamed_meanwhile(tmp_path, monkeypatch, lost_at):
    """By another command that completes it between two looks at it."""
    features(tmp_path).loader("val")
    path = caches(tmp_path)[0]
    target = feature_build.Target(None, path, {"images": 1, "shape": [1]})
    path.rename(target.partial)
    method = getattr(Path, lost_at)

    def late(self, *args, **kwargs):
        if target.partial in (self, self.parent) and not path.exists():
            target.partial.rename(path)
            if lost_at == "mkdir":
                raise FileExistsError(17, "File exists")
        return method(self, *args, **kwargs)

    monkeypatch.setattr(Path, lost_at, late)
    assert target.begin() is False and path.exists()


SLOW = """
import os, sys, time
from datetime import timedelta
from pathlib import Path
from accelerate import Accelerator, InitProcessGroupKwargs
from kdfast.errors import UserError
from kdfast.training.run_folder import on_main

# Imports take as long as they like; from here on processes wait 2 s for each other.
here = Path(sys.argv[0]).parent
(here / f"rank{os.environ['RANK']}").touch()
while not (here / "rank0").exists() or not (here / "rank1").exists():
    time.sleep(0.01)
waiting = InitProcessGroupKwargs(timeout=timedelta(seconds=2))
accelerator = Accelerator(cpu=True, kwargs_handlers=[waiting])

def fail():
    time.sleep(4)
    raise UserError("slow")

# Whole lines at once: unbuffered, print writes line ends apart, and processes mix.
sys.stdout.write(on_main(accelerator, lambda: time.sleep(4) or "done\\n", patient=True))
try:
    on_main(accelerator, fail, patient=True)
except UserError as error:
    sys.stdout.write(f"{error}\\n")
"""


def test_the_others_wait_longer_than_a_collective_does(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    torchrun = Path(sys.executable).parent / "torchrun"
    command = [torchrun, "--nproc_per_node", "2", tmp_path / "slow.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(done.stdout.split()) == ["done", "done", "slow", "slow"]


def test_two_processes_make_one_cache(tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    two.mkdir()
    torchrun = Path(sys.executable).parent / "torchrun"
    done = run_build(two, torchrun, "--nproc_per_node", 2)
    assert done.returncode == 0, done.stderr[-3000:]
    # 5 batches of a process, of two networks, rows and columns; 70 images, 35 of each process.
    said = [line for line in done.stdout.splitlines() if "features of" not in line]
    assert said == ["2 20 35", "2 20 35"]
    collect(features(one))
    assert [path.name for path in caches(two)] == [path.name for path in caches(one)]
    for theirs, ours in zip(caches(two), caches(one), strict=True):
        first, second = FeatureCache(theirs), FeatureCache(ours)
        assert first.record == second.record and torch.equal(first.scale, second.scale)
        for name in ("label", "top1", "top3"):
            assert np.array_equal(first.columns[name], second.columns[name])
        everything = range(IMAGES)
        torch.testing.assert_close(
            decode(first.rows(everything), first.scale),
            decode(second.rows(everything), second.scale),
            rtol=2**-9,
            atol=1e-4,
        )
