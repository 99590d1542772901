"""Run folders that cannot be written, resumed or trusted: one line, and nothing saved is lost."""

import builtins
import errno
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import load_script
from safetensors import SafetensorError
from safetensors.torch import load_file

from kdfast.errors import UserError
from kdfast.models import create_model, save_weights

CLASSIFIER, DISTILL = "train/classifier.py", "train/distill.py"
BOTH = (CLASSIFIER, DISTILL)
SHORT = ("--epochs", 1, "--train-limit", 32, "--eval-limit", 16, "-b", 16)
PUPIL = ("--teacher", "cifar_resnet8", "--no-baseline")
STARTED = ["output", "output/mine", "output/mine/args.yaml", "output/mine/.lock",
           "output/mine/train.log", "output/mine/tensorboard",
           "output/mine/tensorboard/*"]  # fmt: skip


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


MINE = (*SHORT, "--model", "cifar_resnet8", "--experiment", "mine")
MORE = (*MINE, "--epochs", 2, "--resume", "auto")


@pytest.fixture(scope="session")
def one_epoch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    assert load_script(CLASSIFIER).main([*map(str, MINE), "--output", str(folder)]) == 0
    return folder / "mine"


@pytest.fixture
def finished(one_epoch, tmp_path):
    """The run folder of one epoch, `output/mine`."""
    return shutil.copytree(one_epoch, tmp_path / "output" / "mine")


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


WRITTEN = ["output/mine/tensorboard/*", "output/mine/train.log", "output/mine/last.safetensors",
           "output/mine/best.safetensors", "output/mine/args.yaml"]  # fmt: skip


@pytest.mark.parametrize(
    "full, leaves",
    [
        (".args.yaml", []),
        (".last.safetensors", WRITTEN),
        ("summary.csv", WRITTEN),
        ("state.json", [*WRITTEN, "output/mine/summary.csv"]),
        (
            ".results.json",
            [
                *WRITTEN,
                "output/mine/summary.csv",
                "output/mine/checkpoints/*",
                "output/mine/checkpoints/*/*",
            ],
        ),
    ],
)
def test_full_disk(refused, run_script, finished, full, leaves):
    def on_full_disk(genuine):
        def opened(path, mode="r", *args, **kwargs):
            file = genuine(path, mode, *args, **kwargs)
            hit = Path(str(path)).name.startswith(full) and mode[0] != "r"
            return FullDisk(file) if hit else file

        return opened

    old = (finished / "summary.csv").read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", on_full_disk(open))
        patch.setattr(Path, "open", on_full_disk(Path.open))
        words = ["No space left on device", "cannot write", "output/mine/"]
        refused(1, CLASSIFIER, *MORE, words=words, leaves=leaves)
    assert load_file(finished / "last.safetensors")
    assert (finished / "summary.csv").read_text().startswith(old)
    assert run_script(CLASSIFIER, *MORE)[0] == 0
    assert len((finished / "summary.csv").read_text().splitlines()) == 3


def test_full_disk_for_tensors(refused, finished, monkeypatch):
    def save(tensors, path):
        Path(path).write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("kdfast.training.checkpoint.save_file", save)
    words = ["checkpoints/epoch-0002", "No space left", "intact"]
    leaves = [*WRITTEN, "output/mine/summary.csv"]
    refused(1, CLASSIFIER, *MORE, words=words, leaves=leaves)


def test_weights_below_a_file(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match=r"cannot write .*file/last\.safetensors"):
        save_weights(tmp_path / "file" / "last.safetensors", create_model("cifar_resnet8", 10), {})


@pytest.mark.parametrize("script", BOTH)
def test_diverging_loss(refused, teacher_run, script):
    flags = (*SHORT, "--lr", 1e30, "--experiment", "mine", "--model", "cifar_resnet8")
    if script == DISTILL:
        flags += (*PUPIL, "--teacher-checkpoint", teacher_run)
    refused(1, script, *flags, words=["loss term", "step 2", "none", "--lr"], leaves=STARTED)


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


@pytest.mark.parametrize("content", [b"", b"options: 3", b"options: [", b"\xff\xff"])
def test_resuming_with_a_damaged_record(refused, finished, content):
    (finished / "args.yaml").write_bytes(content)
    refused(1, CLASSIFIER, *MORE, words=["args.yaml", "damaged"])


def test_resuming_keeps_what_is_there(run_script, finished):
    """The refusals above are of damage: the same folder resumes when it is whole."""
    assert yaml.safe_load((finished / "args.yaml").read_text())["options"]["processes"] == 1
    assert run_script(CLASSIFIER, *MORE)[0] == 0
    assert len((finished / "summary.csv").read_text().splitlines()) == 3
    assert load_file(finished / "last.safetensors")
