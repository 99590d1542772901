"""Weights on disk: what is written, what is read, what is refused."""

import argparse
import os
import pickle

import pytest
import timm
import torch
from safetensors import safe_open
from torch import nn

from kdfast.errors import UserError
from kdfast.models import (
    Taps,
    checksum,
    create_model,
    load_weights,
    read_weights,
    save_weights,
    unwrap,
)

METADATA = {
    "architecture": "cifar_resnet8",
    "classes": 10,
    "dataset": "digits",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "input_size": [3, 32, 32],
    "parent": None,
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create_model("cifar_resnet8", 10)


def test_checksum(model):
    state = model.state_dict()
    digest = checksum(state)
    assert len(digest) == 64
    assert digest == checksum(dict(reversed(state.items())))
    assert digest == checksum(model.to(memory_format=torch.channels_last).state_dict())
    assert checksum({"a": torch.zeros(2, 3)}) != checksum({"a": torch.zeros(3, 2)})
    assert checksum({"a": torch.zeros(2)}) != checksum({"b": torch.zeros(2)})
    assert checksum({"a": torch.zeros(2)}) != checksum({"a": torch.zeros(2, dtype=torch.int32)})
    assert checksum({"a": torch.ones(2, dtype=torch.bfloat16)})
    state["bn1.num_batches_tracked"] += 1
    assert digest != checksum(state)


def test_checksum_stays_the_same_between_versions():
    state = {"b": torch.arange(3, dtype=torch.float32), "a": torch.tensor(7)}
    assert checksum(state) == ("b2add2013683f330e0e7ee5d523da325ec40555783c1dcd1c88d3c5ad971dc20")


@pytest.mark.parametrize("wrap", [lambda m: m, torch.compile, lambda m: Taps(m, ["layer1"])])
def test_weights_round_trip(model, tmp_path, wrap):
    path = tmp_path / "run" / "best.safetensors"
    save_weights(path, wrap(model.to(memory_format=torch.channels_last)), METADATA)
    assert [entry.name for entry in path.parent.iterdir()] == ["best.safetensors"]
    other = create_model("cifar_resnet8", 10)
    assert load_weights(wrap(other), path) == METADATA
    assert unwrap(wrap(other)) is other
    assert checksum(other.state_dict()) == checksum(model.state_dict())
    with safe_open(path, "pt") as file:
        assert file.metadata()["classes"] == "10"
    by_timm = timm.create_model("cifar_resnet8", num_classes=10, checkpoint_path=str(path))
    assert checksum(by_timm.state_dict()) == checksum(model.state_dict())


def test_tied_weights_are_written_out(tmp_path):
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    save_weights(tmp_path / "tied.safetensors", tied, {})
    state, _ = read_weights(tmp_path / "tied.safetensors")
    assert torch.equal(state["0.weight"], state["1.weight"])


def test_failed_write_keeps_the_old_file(model, tmp_path, monkeypatch):
    path = tmp_path / "last.safetensors"
    save_weights(path, model, METADATA)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*: No space left on device"):
        save_weights(path, create_model("cifar_resnet8", 10), METADATA)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.safetensors"]


@pytest.mark.parametrize("key", ["state_dict", "model", "state_dict_ema", None])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_torch_checkpoints(model, tmp_path, key, prefix):
    state = {prefix + name: value for name, value in model.state_dict().items()}
    extra = {"arch": "resnet8", "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    torch.save({key: state, **extra} if key else state, tmp_path / "model_best.pth.tar")
    other = create_model("cifar_resnet8", 10)
    metadata = load_weights(other, tmp_path / "model_best.pth.tar")
    assert checksum(other.state_dict()) == checksum(model.state_dict())
    assert metadata == ({"architecture": "resnet8"} if key else {})


def test_averaged_weights_come_first(model, tmp_path):
    average = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    checkpoint = {"state_dict": model.state_dict(), "state_dict_ema": average}
    torch.save(checkpoint, tmp_path / "last.pth")
    assert checksum(read_weights(tmp_path / "last.pth")[0]) == checksum(average)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_pickled_code_is_refused_and_not_run(model, tmp_path):
    trace = tmp_path / "executed"
    evil = Malicious(str(trace))
    torch.save({"state_dict": model.state_dict(), "extra": evil}, tmp_path / "zip.pth")
    old = {"_use_new_zipfile_serialization": False}
    torch.save({"state_dict": model.state_dict(), "extra": evil}, tmp_path / "old.pth", **old)
    torch.save(model, tmp_path / "module.pth")
    for name in ("zip.pth", "old.pth", "module.pth"):
        with pytest.raises(UserError, match="runs no pickled code: save its state dict") as caught:
            load_weights(model, tmp_path / name)
        assert "\n" not in str(caught.value)
    for name in ("bare.pkl", "bare.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(evil))
        with pytest.raises(UserError, match="is damaged or no"):
            load_weights(model, tmp_path / name)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_damaged_files(model, tmp_path, name):
    path = tmp_path / name
    if name.endswith(".pth"):
        torch.save(model.state_dict(), path)
    else:
        save_weights(path, model, METADATA)
    whole = path.read_bytes()
    for content in (b"", b"hello, world\n", whole[:7], whole[:1000], whole[:-1000], whole[1:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"is damaged or no|cannot read") as caught:
            read_weights(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [{"epoch": 3}, [1, 2], {}, torch.zeros(2)])
def test_files_without_weights(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UserError, match="holds no state dict"):
        read_weights(tmp_path / "a.pth")


def test_missing_file(model, tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(UserError, match=f"no weights file at {path}"):
            load_weights(model, path)


@pytest.mark.parametrize(
    ("name", "classes", "message"),
    [
        ("cifar_resnet8", 100, "fit cifar_resnet8: the checkpoint has 10 classes, the model 100"),
        ("cifar_resnet20", 10, r"fit cifar_resnet20: it holds cifar_resnet8, 72 \(.*\) missing"),
        ("cifar_resnet8x4", 10, r"cifar_resnet8, 6 \(.*\) missing, 46 \(.*\) of another shape"),
        ("mobilenetv3_small_100", 10, r"239 \(.*\) missing, 51 \(.*\) unexpected;"),
    ],
)  # fmt: skip
def test_weights_of_another_model(model, tmp_path, name, classes, message):
    save_weights(tmp_path / "a.safetensors", model, METADATA)
    other = create_model(name, classes)
    before = checksum(other.state_dict())
    with pytest.raises(UserError, match=message) as caught:
        load_weights(other, tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value)
    assert checksum(other.state_dict()) == before


def test_weights_that_are_not_finite(model, tmp_path):
    torch.save(
        dict(model.state_dict(), **{"fc.bias": torch.full((10,), torch.nan)}), tmp_path / "a"
    )
    with pytest.raises(UserError, match=r"a is of no use: 1 \(fc.bias\) not finite"):
        load_weights(model, tmp_path / "a")
    with torch.no_grad():
        model.conv1.weight[0] = torch.inf
    with pytest.raises(
        UserError, match=r"b.safetensors not written: 1 \(conv1.weight\) not finite"
    ):
        save_weights(tmp_path / "b.safetensors", model, {})
    assert not (tmp_path / "b.safetensors").exists()
