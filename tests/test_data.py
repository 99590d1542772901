"""Image sets, pipelines and the batches every process gets."""

from __future__ import annotations

import gzip
import multiprocessing
import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kdfast.data import Augmentation, BatchPlan, Loader, open_data, to_float, train_transform
from kdfast.data.sources import ArraySource
from kdfast.ops import Key


def write_fashion(folder, images, labels, *, compress=True):
    """A miniature Fashion-MNIST in its real file layout."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem in ("train", "t10k"):
        for kind, array, magic in (("images-idx3", images, 2051), ("labels-idx1", labels, 2049)):
            content = struct.pack(f">i{array.ndim}i", magic, *array.shape) + array.tobytes()
            name = f"{stem}-{kind}-ubyte"
            if compress:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)


@pytest.fixture
def fashion(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (20, 28, 28), dtype=np.uint8)
    write_fashion(tmp_path / "fashion", images, np.arange(20, dtype=np.uint8) % 10)
    return tmp_path / "fashion", images


def test_digits():
    data = open_data("digits")
    assert (len(data.train), len(data.eval), data.classes) == (1437, 360, 10)
    image, label = data.train.read(0)
    assert image.size == (32, 32) and 0 <= label < 10
    counts = np.bincount(data.eval.labels())
    assert counts.min() >= 35 and counts.max() <= 37
    pixels = data.train.images / 255
    assert pixels.mean() == pytest.approx(data.mean[0], abs=1e-4)
    assert pixels.std() == pytest.approx(data.std[0], abs=1e-4)
    assert not data.flip


@pytest.mark.parametrize("compress", [True, False])
def test_fashion_mnist_from_local_files(tmp_path, compress):
    images = np.random.default_rng(0).integers(0, 255, (12, 28, 28), dtype=np.uint8)
    write_fashion(tmp_path / "f", images, np.arange(12, dtype=np.uint8) % 10, compress=compress)
    data = open_data("fashion_mnist", tmp_path / "f")
    image, label = data.train.read(3)
    padded = np.asarray(image)
    assert padded.shape == (32, 32) and label == 3
    assert np.array_equal(padded[2:-2, 2:-2], images[3])
    assert padded[:2].sum() == padded[:, -2:].sum() == 0


def test_image_folder(image_folder):
    data = open_data("folder", image_folder)
    assert (len(data.train), len(data.eval), data.classes) == (6, 4, 2)
    assert data.train.read(5)[1] == 1
    assert data.image_size is None


def test_timm_names(image_folder):
    data = open_data("torch/image_folder", image_folder, train_split="train", eval_split="val")
    assert (len(data.train), len(data.eval), data.classes) == (6, 4, 2)
    image, label = data.train.read(4)
    assert image.size == (47, 47) and label == 1


def test_hugging_face_names(image_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    name = f"hfds/{image_folder}"
    data = open_data(name, tmp_path / "cache", train_split="train", eval_split="validation")
    assert (len(data.train), len(data.eval), data.classes) == (6, 4, 2)
    assert {data.train.read(i)[1] for i in range(6)} == {0, 1}


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar_layout(tmp_path, monkeypatch, name, classes):
    """torchvision's layout, with checksums recomputed for a miniature of it."""
    import hashlib
    import pickle

    import torchvision

    owner = getattr(torchvision.datasets, name.upper())
    folder = tmp_path / owner.base_folder
    folder.mkdir()
    key = "labels" if name == "cifar10" else "fine_labels"

    def write(entries):
        written = []
        for file, _ in entries:
            data = np.random.default_rng(1).integers(0, 255, (4, 3072), dtype=np.uint8)
            content = pickle.dumps({"data": data, key: [0, 1, 2, classes - 1]})
            (folder / file).write_bytes(content)
            written.append([file, hashlib.md5(content).hexdigest()])
        return written

    monkeypatch.setattr(owner, "train_list", write(owner.train_list))
    monkeypatch.setattr(owner, "test_list", write(owner.test_list))
    meta = pickle.dumps({owner.meta["key"]: [str(i) for i in range(classes)]})
    (folder / owner.meta["filename"]).write_bytes(meta)
    monkeypatch.setitem(owner.meta, "md5", hashlib.md5(meta).hexdigest())
    data = open_data(name, tmp_path)
    assert len(data.train) == 4 * len(owner.train_list) and data.classes == classes
    assert data.eval.read(3)[1] == classes - 1 and data.eval.read(0)[0].size == (32, 32)


# Batches.


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 70),
    batch=st.integers(1, 9),
    processes=st.integers(1, 5),
    accumulation=st.integers(1, 3),
    shuffle=st.booleans(),
)
def test_every_image_once_and_weights_average(size, batch, processes, accumulation, shuffle):
    plans = [
        BatchPlan(size, batch, processes=processes, rank=r, accumulation=accumulation, seed=5,
                  shuffle=shuffle)
        for r in range(processes)
    ]  # fmt: skip
    per_rank = [plan.portions(epoch=2) for plan in plans]
    seen: list[int] = []
    value = {i: float(i * i % 17) for i in range(size)}
    step: list[int] = []
    mean = 0.0
    for portions in zip(*per_rank, strict=True):
        assert len({p.ends_step for p in portions}) == 1
        for portion in portions:
            real = portion.indices[: portion.count]
            step += real
            local = sum(value[i] for i in portion.indices) / len(portion.indices)
            mean += portion.weight * local / processes
        if portions[0].ends_step:
            assert mean == pytest.approx(sum(value[i] for i in step) / len(step))
            seen, step, mean = seen + step, [], 0.0
    assert sorted(seen) == list(range(size)) and not step
    if not shuffle:
        assert seen == list(range(size))


def test_order_does_not_depend_on_processes():
    one = [p.indices for p in BatchPlan(50, 8, seed=1, shuffle=True).portions(3)]
    two = [
        [p.indices for p in BatchPlan(50, 4, processes=2, rank=r, seed=1, shuffle=True).portions(3)]
        for r in (0, 1)
    ]
    assert one == [a + b for a, b in zip(*two, strict=True)]
    assert one != [p.indices for p in BatchPlan(50, 8, seed=2, shuffle=True).portions(3)]
    assert one != [p.indices for p in BatchPlan(50, 8, seed=1, shuffle=True).portions(4)]


def test_drop_last_and_process_zero_is_never_idle():
    plan = BatchPlan(50, 8, shuffle=True, drop_last=True)
    assert plan.steps == 6 and sum(p.count for p in plan.portions(0)) == 48
    last = [BatchPlan(9, 4, processes=2, rank=r).portions(0)[-1] for r in (0, 1)]
    assert [p.count for p in last] == [1, 0] and last[1].weight == 0 and len(last[1].indices) == 1


def loader(workers, seed=0, **plan):
    images = np.random.default_rng(0).integers(0, 255, (37, 32, 32, 3), dtype=np.uint8)
    transform = train_transform((32, 32), Augmentation(), "bilinear", 32)
    source = ArraySource(images, np.arange(37) % 4, "made-up")
    plan = BatchPlan(37, 8, shuffle=True, seed=seed, **plan)
    return Loader(source, transform, plan, classes=4, workers=workers)


def epoch_of(loader, epoch):
    batches = list(loader.epoch(epoch))
    return {int(i): image for b in batches for i, image in zip(b.indices, b.images, strict=True)}


def test_augmentation_is_a_function_of_seed_epoch_and_index():
    alone, workers = loader(0), loader(2)
    first = epoch_of(alone, 1)
    for other in (epoch_of(workers, 1), epoch_of(loader(0, drop_last=False), 1)):
        assert all(torch.equal(first[i], other[i]) for i in first)
    other_batches = Loader(
        alone._loader.dataset.source,
        alone._loader.dataset.transform,
        BatchPlan(37, 5, shuffle=True),
        classes=4,
    )
    assert all(torch.equal(first[i], image) for i, image in epoch_of(other_batches, 1).items())
    assert any(not torch.equal(first[i], image) for i, image in epoch_of(alone, 2).items())
    assert any(
        not torch.equal(first[i], image) for i, image in epoch_of(loader(0, seed=1), 1).items()
    )


def test_a_process_ends_though_its_workers_wait_for_work():
    """What garbage collection leaves when it takes the queues first: workers nobody can tell."""
    program = (
        "from test_data import epoch_of, loader\n"
        "started = loader(2)\n"
        "epoch_of(started, 0)\n"
        "started._loader._iterator._shutdown = True\n"
        "print('ready', flush=True)\n"
    )
    command = [sys.executable, "-c", program]
    ended = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=600
    )
    assert (ended.returncode, ended.stdout) == (0, "ready\n"), ended.stderr


def test_closed_loaders_begin_anew():
    others = set(multiprocessing.active_children())
    closed = loader(2)
    first = epoch_of(closed, 0)
    assert len(set(multiprocessing.active_children()) - others) == 2
    closed.close()
    assert set(multiprocessing.active_children()) <= others
    again = epoch_of(closed, 0)
    closed.close()
    assert all(torch.equal(first[i], again[i]) for i in first)


def test_loading_leaves_global_randomness_alone():
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    expected = torch.rand(2), random.random(), np.random.rand()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    epoch_of(loader(0), 0)
    assert torch.equal(torch.rand(2), expected[0])
    assert (random.random(), np.random.rand()) == expected[1:]


def test_crop_pads_as_asked():
    white = Image.new("RGB", (32, 32), "white")
    reflect = train_transform((32, 32), Augmentation(padding_mode="reflect"), "bilinear", 32)
    zeros = train_transform((32, 32), Augmentation(hflip=0), "bilinear", 32)
    assert all((reflect(white, Key(0), index) == 255).all() for index in range(10))
    assert any((zeros(white, Key(0), index) == 0).any() for index in range(10))


def test_normalisation():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3).expand(2, 3, 4, 3)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.1, 0.2, 0.3), (0.5, 0.25, 1.0)))
    assert torch.allclose(to_float(images, mean, std), (images / 255 - mean) / std, atol=1e-6)
