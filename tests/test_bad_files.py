"""Files that are missing, damaged or foreign: one line, and none of their code runs."""

import gzip
import multiprocessing
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from kdfast.data import open_data
from kdfast.errors import UserError
from kdfast.models import create_model

CLASSIFIER, DISTILL = "train/classifier.py", "train/distill.py"
STARTED = ["output", "output/mine", "output/mine/args.yaml", "output/mine/.lock",
           "output/mine/train.log", "output/mine/tensorboard",
           "output/mine/tensorboard/*"]  # fmt: skip
PUPIL = ("--teacher", "cifar_resnet8", "--no-baseline")


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def idx(*shape: int, values=0) -> bytes:
    data = np.full(shape, values, np.uint8).tobytes()
    return bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + data


IDX = {
    "train-images-idx3-ubyte": idx(8, 28, 28),
    "train-labels-idx1-ubyte": idx(8),
    "t10k-images-idx3-ubyte": idx(4, 28, 28),
    "t10k-labels-idx1-ubyte": idx(4),
}
PIXELS, LABELS = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


@pytest.mark.parametrize(
    "name, content, word",
    [
        (PIXELS, None, "--download"),
        (PIXELS, b"", "complete idx"),
        (PIXELS, b"\0\0\x08\x03\0\0", "complete idx"),
        (PIXELS, IDX[PIXELS][:-1], "complete idx"),
        (PIXELS, IDX[PIXELS] + b"\0", "complete idx"),
        (PIXELS, b"<html>not found</html>" * 50, "complete idx"),
        (PIXELS, idx(8, 32, 32), "28x28"),
        (PIXELS, idx(7, 28, 28), "7 images"),
        (PIXELS + ".gz", b"no gzip at all", "cannot read"),
        (PIXELS + ".gz", gzip.compress(IDX[PIXELS], mtime=0)[:-9], "cannot read"),
        (PIXELS + ".gz", gzip.compress(IDX[PIXELS], mtime=0)[:10] + b"\xff" * 40, "cannot read"),
        (LABELS, IDX[PIXELS], "complete idx"),
        (LABELS, idx(4, values=10), "label above 9"),
    ],
)
def test_idx_files(refused, tmp_path, name, content, word):
    (tmp_path / "set").mkdir()
    for other, good in IDX.items():
        if other != name.removesuffix(".gz"):
            (tmp_path / "set" / other).write_bytes(good)
    if content is not None:
        (tmp_path / "set" / name).write_bytes(content)
    flags = ("--dataset", "fashion-mnist", "--data-dir", "set")
    refused(1, CLASSIFIER, *flags, words=["set", name, word])


def test_empty_idx_files(refused, tmp_path):
    for name, dimensions in ((PIXELS, (0, 28, 28)), ("train-labels-idx1-ubyte", (0,))):
        (tmp_path / name).write_bytes(idx(*dimensions))
    for name in ("t10k-images-idx3-ubyte", LABELS):
        (tmp_path / name).write_bytes(IDX[name])
    flags = ("--dataset", "fashion-mnist", "--data-dir", ".")
    refused(1, CLASSIFIER, *flags, words=["training split", "empty"])


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_cifar(refused, tmp_path, damage):
    if damage == "changed":
        (tmp_path / "cifar-10-batches-py").mkdir()
        for name in ("batches.meta", "test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
            (tmp_path / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(Bomb()))
    flags = ("--dataset", "cifar10", "--data-dir", tmp_path)
    refused(1, CLASSIFIER, *flags, words=[str(tmp_path), "--download"])
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("name", "words"), [("torch/mnist", ["torch/mnist"]), ("torch/cifar10", ["data set in data"])]
)
def test_missing_set_of_torchvision(refused, name, words):
    refused(1, CLASSIFIER, "--dataset", name, words=[*words, "download"])


def break_folder(root: Path, how: str) -> None:
    if how == "no folder":
        shutil.rmtree(root)
    elif how == "a file":
        shutil.rmtree(root)
        root.write_text("")
    elif how == "no split":
        shutil.rmtree(root / "val")
    elif how == "no classes":
        shutil.rmtree(root / "train")
        (root / "train").mkdir()
    elif how == "an empty class":
        for image in (root / "train" / "dog").iterdir():
            image.unlink()
    elif how == "another class":
        (root / "val" / "dog").rename(root / "val" / "wolf")


@pytest.mark.parametrize(
    "how, words",
    [
        ("no folder", ["images/train", "--data-dir"]),
        ("a file", ["images/train", "--data-dir"]),
        ("no split", ["images/val", "--data-dir"]),
        ("no classes", ["images/train", "one folder a class"]),
        ("an empty class", ["images/train", "dog"]),
        ("another class", ["images", "dog", "wolf"]),
    ],
)
def test_image_folders(refused, image_folder, how, words):
    break_folder(image_folder, how)
    refused(1, CLASSIFIER, "--dataset", "folder", "--data-dir", image_folder, words=words)


def test_named_split_has_no_substitute(refused, image_folder):
    flags = ("--dataset", "folder", "--data-dir", image_folder, "--val-split", "test")
    refused(1, CLASSIFIER, *flags, words=["images/test"])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "bomb"])
def test_unreadable_images(refused, image_folder, monkeypatch, damage, workers):
    path = image_folder / "train" / "dog" / "1.png"
    if damage == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    else:
        whole = path.read_bytes()
        half = whole[: len(whole) // 2]
        path.write_bytes({"truncated": half, "text": b"cat", "empty": b""}[damage])
    flags = ("--dataset", "folder", "--data-dir", image_folder, "--img-size", 32, "-j", workers)
    flags += ("--epochs", 1, "-b", 6, "--experiment", "mine")
    words = ["cannot read", str(path) if damage != "bomb" else ".png", "replace or remove"]
    refused(1, CLASSIFIER, *flags, words=words, leaves=STARTED)
    assert multiprocessing.active_children() == []


def weights(name: str = "cifar_resnet8", classes: int = 10) -> dict[str, torch.Tensor]:
    return create_model(name, classes).state_dict()


def make_weights(path: Path, kind: str) -> None:
    tensors = weights()
    save = save_file if path.suffix == ".safetensors" else torch.save
    if kind == "truncated":
        save(tensors, path)
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("<html>not found</html>")
    elif kind == "pickled code":
        path.write_bytes(pickle.dumps({"state_dict": Bomb()}))
    elif kind == "torch code":
        torch.save({"state_dict": Bomb()}, path)
    elif kind == "other network":
        save(weights("cifar_resnet14"), path)
    elif kind == "other classes":
        save(weights(classes=7), path)
    elif kind == "not finite":
        save(tensors | {"fc.bias": torch.full((10,), torch.nan)}, path)
    elif kind == "folder":
        path.mkdir()


CHECKPOINTS = [
    ("t.pt", "missing", "no weights file"),
    ("t.safetensors", "missing", "no weights file"),
    ("t.pt", "truncated", "damaged"),
    ("t.safetensors", "truncated", "damaged"),
    ("t.pth", "empty", "damaged"),
    ("t.safetensors", "empty", "damaged"),
    ("t.pth", "text", "damaged"),
    ("t.safetensors", "text", "damaged"),
    ("t.pt", "pickled code", ""),
    ("t.safetensors", "pickled code", "damaged"),
    ("t.pth", "torch code", "pickled code"),
    ("t.safetensors", "torch code", "damaged"),
    ("t.pt", "other network", "does not fit cifar_resnet8"),
    ("t.safetensors", "other network", "does not fit cifar_resnet8"),
    ("t.safetensors", "other classes", "7 classes, the model 10"),
    ("t.pth", "not finite", "not finite"),
    ("t", "folder", "no best.safetensors"),
]


@pytest.mark.parametrize(
    "script, flags",
    [
        (CLASSIFIER, ("--model", "cifar_resnet8", "--initial-checkpoint")),
        (DISTILL, ("--initial-checkpoint",)),
        (DISTILL, (*PUPIL, "--teacher-checkpoint")),
    ],
    ids=["network", "student", "teacher"],
)
@pytest.mark.parametrize("row", CHECKPOINTS, ids=lambda row: f"{row[1]} {row[0]}")
def test_checkpoints(refused, tmp_path, script, flags, row):
    name, kind, word = row
    make_weights(tmp_path / name, kind)
    refused(1, script, *flags, name, words=[name, word])
    assert not Path("ran").exists()


def test_teacher_of_another_architecture_is_named(refused, teacher_run):
    flags = ("--teacher", "cifar_resnet20", "--teacher-checkpoint", teacher_run)
    refused(1, DISTILL, *flags, words=["does not fit cifar_resnet20", "it holds cifar_resnet8"])


def test_teacher_with_an_impossible_record(refused, tmp_path):
    record = {"input_size": "[3, 32, 32]", "mean": '["a", "b", "c"]', "std": "[1, 1, 1]"}
    save_file(weights(), tmp_path / "t.safetensors", record)
    flags = (*PUPIL, "--teacher-checkpoint", "t.safetensors")
    refused(1, DISTILL, *flags, words=["t.safetensors", "mean"])


@pytest.mark.parametrize("flag", ["--config", "--recipe"])
@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00epochs", "folder"])
def test_unreadable_config(refused, tmp_path, flag, content):
    if content == "folder":
        (tmp_path / "mine.yaml").mkdir()
    elif content is not None:
        (tmp_path / "mine.yaml").write_bytes(content)
    refused(1, CLASSIFIER, flag, "mine.yaml", words=["cannot read mine.yaml"])


def test_open_data_says_where_it_looked(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}.*dataset-fashion-mnist"):
        open_data("fashion-mnist", tmp_path)
