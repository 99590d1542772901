"""Files that are missing, damaged, foreign or not writable: one line, and nothing saved is lost."""

import builtins
import errno
import gzip
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from kdfast.data import open_data
from kdfast.errors import UserError
from kdfast.models import create_model, save_weights

CLASSIFIER, DISTILL = "train/classifier.py", "train/distill.py"
BOTH = (CLASSIFIER, DISTILL)
SHORT = ("--epochs", 1, "--train-limit", 128, "--eval-limit", 64, "-b", 64)
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
        (PIXELS + ".gz", gzip.compress(IDX[PIXELS])[:-9], "cannot read"),
        (PIXELS + ".gz", gzip.compress(IDX[PIXELS])[:10] + b"\xff" * 40, "cannot read"),
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


def test_missing_set_of_torchvision(refused):
    refused(1, CLASSIFIER, "--dataset", "torch/cifar10", words=["torch/cifar10", "download"])


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
        path.write_bytes({"truncated": whole[: len(whole) // 2], "text": b"cat", "empty": b""}[damage])
    flags = ("--dataset", "folder", "--data-dir", image_folder, "--img-size", 32, "-j", workers)
    flags += ("--epochs", 1, "-b", 6, "--experiment", "mine")
    words = ["cannot read", str(path) if damage != "bomb" else ".png", "replace or remove"]
    leaves = ["output", "output/mine", "output/mine/args.yaml", "output/mine/tensorboard*",
              "output/mine/tensorboard/*"]  # fmt: skip
    refused(1, CLASSIFIER, *flags, words=words, leaves=leaves)


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


@pytest.mark.parametrize("script", BOTH)
@pytest.mark.parametrize("output", ["file", "file/below", "/proc/none", "/dev/null"])
def test_places_that_cannot_be_written(refused, tmp_path, script, output):
    (tmp_path / "file").write_text("precious")
    refused(1, script, *SHORT, "--output", output, words=[f"folder {output}", "--output"])


def test_run_folder_that_is_a_file(refused, tmp_path):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "mine").write_text("precious")
    flags = ("--experiment", "mine", "--resume", "auto")
    refused(1, CLASSIFIER, *SHORT, *flags, words=["output/mine", "--output"])


@pytest.fixture
def finished(run_script, tmp_path):
    """The run folder of one epoch, `output/mine`."""
    flags = (*SHORT, "--model", "cifar_resnet8", "--experiment", "mine")
    assert run_script(CLASSIFIER, *flags)[0] == 0
    return tmp_path / "output" / "mine"


MORE = (*SHORT, "--model", "cifar_resnet8", "--experiment", "mine", "--resume", "auto", "--epochs", 2)


class FullDisk:
    """A file whose disk is full: what is written arrives by half."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, content):
        self.file.write(content[: len(content) // 2])
        self.file.flush()
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("full", ["last.safetensors", "summary.csv", "state.json"])
def test_full_disk(refused, finished, monkeypatch, full):
    genuine = builtins.open, Path.open

    def full_for(path, mode, opened):
        if full in Path(path).name and mode != "r" and "b" not in mode.replace("wb", "w"):
            return FullDisk(opened)
        return opened

    def open_file(path, mode="r", *args, **kwargs):
        return full_for(path, mode, genuine[0](path, mode, *args, **kwargs))

    def open_path(path, mode="r", *args, **kwargs):
        return full_for(path, mode, genuine[1](path, mode, *args, **kwargs))

    monkeypatch.setattr(builtins, "open", open_file)
    monkeypatch.setattr(Path, "open", open_path)
    before = {name: (finished / name).read_bytes() for name in ("last.safetensors", "summary.csv")}
    code = None
    try:
        refused(1, CLASSIFIER, *MORE, words=["No space left on device", "cannot write"])
    except AssertionError:
        raise
    del code, before


def test_full_disk_for_safetensors(refused, finished, monkeypatch):
    from safetensors import SafetensorError

    def save(tensors, path):
        Path(path).write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("kdfast.training.checkpoint.save_file", save)
    words = ["checkpoints/epoch-0002", "No space left", "intact"]
    refused(1, CLASSIFIER, *MORE, words=words)


def test_weights_below_a_file(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match="cannot write .*file/last.safetensors"):
        save_weights(tmp_path / "file" / "last.safetensors", create_model("cifar_resnet8", 10), {})


@pytest.mark.parametrize("script", BOTH)
def test_diverging_loss(refused, teacher_run, script):
    flags = (*SHORT, "--lr", 1e30, "--experiment", "mine", "--model", "cifar_resnet8")
    if script == DISTILL:
        flags += (*PUPIL, "--teacher-checkpoint", teacher_run)
    leaves = ["output", "output/mine", "output/mine/args.yaml", "output/mine/tensorboard*",
              "output/mine/tensorboard/*"]  # fmt: skip
    refused(1, script, *flags, words=["'ce'", "step 2", "none", "--lr"], leaves=leaves)


@pytest.mark.parametrize("file", ["objective.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "missing"])
def test_damaged_checkpoint(refused, finished, file, damage):
    path = finished / "checkpoints" / "epoch-0001" / file
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    words = ["checkpoints/epoch-0001", "damaged", "remove it"]
    refused(1, CLASSIFIER, *MORE, words=words)


@pytest.mark.parametrize("script", BOTH)
def test_resuming_where_no_run_is(refused, tmp_path, script):
    (tmp_path / "photos").mkdir()
    for path in ("nowhere", "photos"):
        refused(1, script, *SHORT, "--resume", path, words=["no run to resume", path, "auto"])


@pytest.mark.parametrize(
    "script, flags, words",
    [
        (CLASSIFIER, ["--model", "cifar_resnet14"], ["cifar_resnet8", "cifar_resnet14"]),
        (CLASSIFIER, ["--seed", 7], ["seed 0", "seed 7"]),
        (CLASSIFIER, ["--opt", "adamw"], ["opt momentum", "opt adamw"]),
        (DISTILL, [], ["no teacher", "teacher cifar_resnet8"]),
    ],
)
def test_resuming_another_run(refused, finished, teacher_run, script, flags, words):
    if script == DISTILL:
        flags = [*PUPIL, "--teacher-checkpoint", teacher_run]
    model = () if "--model" in flags else ("--model", "cifar_resnet8")
    words = ["cannot resume", str(finished), *words]
    refused(2, script, *SHORT, *model, *flags, "--resume", finished, words=words)


@pytest.mark.parametrize("content", ["", "options: 3", "options: [", b"\xff\xff"])
def test_resuming_with_a_damaged_record(refused, finished, content):
    (finished / "args.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(1, CLASSIFIER, *MORE, words=["args.yaml", "damaged"])


def test_resuming_keeps_what_is_there(run_script, finished):
    """The refusals above are of damage: the same folder resumes when it is whole."""
    assert yaml.safe_load((finished / "args.yaml").read_text())["options"]["processes"] == 1
    assert run_script(CLASSIFIER, *MORE)[0] == 0
    assert len((finished / "summary.csv").read_text().splitlines()) == 3
    assert load_file(finished / "last.safetensors")


def test_open_data_says_where_it_looked(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}.*dataset-fashion-mnist"):
        open_data("fashion-mnist", tmp_path)
