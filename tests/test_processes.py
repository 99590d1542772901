"""Many processes are one run: same numbers, one end, and a name for whoever failed."""

from __future__ import annotations

import csv
import json
import os
import signal
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_resume import CLASSIFIER, DISTILL, ROOT, TORCHRUN, command, finish

from kdfast.models import checksum

FEW = ("--model", "cifar_resnet8", "--train-limit", 203, "--eval-limit", 90, "--epochs", 1)


def last_line(said: str, start: str) -> str:
    return [line for line in said.splitlines() if line.startswith(start)][-1]


def test_the_failing_process_is_named_by_all(tmp_path):
    """An image that only process 1 reads is damaged."""
    for split, count in (("train", 8), ("val", 2)):
        for label in ("cat", "dog"):
            (tmp_path / "images" / split / label).mkdir(parents=True)
            for i in range(count):
                image = Image.new("RGB", (40, 40), (10 * i, 90, 200 if label == "cat" else 20))
                image.save(tmp_path / "images" / split / label / f"{i}.png")
    (tmp_path / "images/val/dog/1.png").write_bytes(b"no image")
    flags = (
        "--dataset",
        "folder",
        "--data-dir",
        "images",
        "--img-size",
        32,
        "-b",
        4,
        "--epochs",
        1,
    )
    run = command(*TORCHRUN, ROOT / CLASSIFIER, "--model", "cifar_resnet8", *flags, cwd=tmp_path)
    said = finish(run, 1)
    own = last_line(said, "classifier.py (process 1): error: ")
    assert "cannot read" in own and "dog/1.png" in own
    assert "process 1 failed: cannot read" in last_line(said, "classifier.py: error: ")
    assert "Connection closed" not in said, "no traceback of those that only lost the connection"


FAULTY = '''
import os
import torch
from kdfast.methods import Method, method

@method("faulty")
class Faulty(Method):
    """Fails on process 1 at its third step."""
    steps = 0

    def taps(self):
        return "none"

    def forward(self, student, teacher, labels):
        Faulty.steps += 1
        if os.environ["RANK"] == "1" and Faulty.steps == 3:
            FAULT
        return student.logits.sum() * 0
'''


def test_an_unforeseen_error_is_named_by_all(teacher_run, tmp_path):
    """It keeps its traceback, and the other process says whose it was."""
    (tmp_path / "faulty.py").write_text(FAULTY.replace("FAULT", "raise LookupError('lost it')"))
    flags = ("--plugin", "faulty.py", "--method", "faulty", "--no-baseline", *FEW)
    flags += ("--teacher", "cifar_resnet8", "--teacher-checkpoint", teacher_run)
    said = finish(command(*TORCHRUN, ROOT / DISTILL, *flags, cwd=tmp_path), 1)
    assert "LookupError: lost it" in said and "Traceback" in said
    wanted = "distill.py: error: process 1 failed: LookupError: lost it"
    assert last_line(said, "distill.py: error: ") == wanted


def test_an_unforeseen_error_ends_the_workers_too(teacher_run, tmp_path):
    everywhere = FAULTY.replace('os.environ["RANK"] == "1" and ', "")
    (tmp_path / "faulty.py").write_text(everywhere.replace("FAULT", "raise LookupError('lost')"))
    flags = ("--plugin", "faulty.py", "--method", "faulty", "--no-baseline", "-j", 2, *FEW)
    flags += ("--on-device", "never")
    flags += ("--teacher", "cifar_resnet8", "--teacher-checkpoint", teacher_run)
    said = finish(command(sys.executable, ROOT / DISTILL, *flags, cwd=tmp_path), 1)
    assert "Traceback" in said and "LookupError: lost" in said


def test_a_process_that_hangs_ends_the_run(teacher_run, tmp_path):
    """Stopped (as by a debugger or a dead machine), it does not answer, and that ends the run."""
    fault = "os.kill(os.getpid(), __import__('signal').SIGSTOP)"
    (tmp_path / "faulty.py").write_text(FAULTY.replace("FAULT", fault))
    flags = ("--plugin", "faulty.py", "--method", "faulty", "--no-baseline", *FEW)
    flags += ("--teacher", "cifar_resnet8", "--teacher-checkpoint", teacher_run)
    run = command(*TORCHRUN, ROOT / DISTILL, *flags, cwd=tmp_path)
    lines, told = [], None
    for line in run.stderr:
        lines.append(line)
        if "does not answer" in line:
            told = line
            break
    # The launcher waits half a minute for the process it cannot tell to end.
    for pid in children(run.pid):
        os.kill(pid, signal.SIGCONT)
    run.communicate(timeout=600)
    assert told and told.startswith("distill.py: error: process 1 does not answer"), lines
    assert run.returncode == 1


def children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def test_every_image_counts_once_in_evaluation(run_script, teacher_run, tmp_path):
    """357 images in batches of 64 over two processes: counted 357, scored as by one process."""
    flags = ("--model", "cifar_resnet8", "--eval-only", "--eval-limit", 357, "-b", 64)
    flags += ("--initial-checkpoint", teacher_run)
    code, out, err = run_script(CLASSIFIER, *flags, "--threads", 1)
    assert code == 0, err
    one = json.loads(out)
    run = command(*TORCHRUN, ROOT / CLASSIFIER, *flags, "--threads", 1, cwd=tmp_path)
    two = json.loads(finish(run).strip().splitlines()[-1])
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["images"] == two["images"] == 357
    assert (one["top1"], one["top5"]) == (two["top1"], two["top5"])
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-12)
    assert not (tmp_path / "output").exists(), "scoring writes nothing"


def test_one_contrast_memory(run_script, teacher_run, tmp_path):
    """97 images in steps of two micro-batches; in the last step process 1 has no image."""
    flags = (*FEW, "--train-limit", 97, "--global-batch-size", 32, "--grad-accum-steps", 2)
    flags += ("--method", "crd", "--crd-negatives", 60, "--freeze-bn", "--no-baseline")
    flags += ("--teacher", "cifar_resnet8", "--teacher-checkpoint", teacher_run, "--threads", 1)
    code, _, err = run_script(DISTILL, *flags, "--experiment", "one")
    assert code == 0, err
    run = command(*TORCHRUN, ROOT / DISTILL, *flags, "--experiment", "two", cwd=tmp_path)
    assert '"processes": 2' in finish(run)
    found = []
    for name in ("one", "two"):
        folder = tmp_path / "output" / name
        saved = load_file(folder / "checkpoints" / "epoch-0001" / "objective.safetensors")
        with (folder / "summary.csv").open() as file:
            row = next(csv.DictReader(file))
        losses = torch.tensor([float(row["train_crd"]), float(row["eval_loss"])])
        found.append(saved | {"losses": losses})
    assert "methods.0.memory.student_bank" in found[0]
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-6)


def test_workers_change_nothing(run_script, tmp_path):
    flags = (CLASSIFIER, *FEW, "--epochs", 2, "--output", ".", "--hflip", 0.5)
    flags += ("--on-device", "never")
    for workers in (0, 2):
        assert run_script(*flags, "--experiment", f"j{workers}", "-j", workers)[0] == 0
    first, second = (load_file(tmp_path / f"j{j}" / "last.safetensors") for j in (0, 2))
    assert checksum(first) == checksum(second)


def test_synchronised_statistics_need_gpus(refused):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    refused(2, CLASSIFIER, *FEW, "--sync-bn", words=["--sync-bn", "GPU", "--freeze-bn"])


def test_deterministic(run_script, teacher_run, tmp_path):
    """On a CPU the same bits with the flag as without; an operation that has none is refused."""
    flags = (DISTILL, *FEW, "--output", ".", "--method", "kd", "at", "fsp", "logits",
             "--no-baseline", "--recipe", "self", "--teacher", "cifar_resnet8",
             "--teacher-checkpoint", teacher_run, "--model-kwargs", "init=default")  # fmt: skip
    for name, flag in (("plain", ()), ("strict", ("--deterministic",))):
        code, _, err = run_script(*flags, "--experiment", name, *flag)
        assert code == 0, err
        assert torch.are_deterministic_algorithms_enabled() == bool(flag)
    torch.use_deterministic_algorithms(False)
    one, two = (load_file(tmp_path / n / "last.safetensors") for n in ("plain", "strict"))
    assert checksum(one) == checksum(two)


RANDOM = '''
import torch
from kdfast.methods import Method, method

@method("scatter")
class Scatter(Method):
    """Writes what several images would write."""

    def taps(self):
        return "none"

    def forward(self, student, teacher, labels):
        out = torch.zeros(20)
        out.put_(torch.zeros(3, dtype=torch.int64), torch.ones(3), accumulate=False)
        return student.logits.sum() * 0 + out.sum() * 0
'''


def test_operation_without_a_deterministic_form(refused, teacher_run, tmp_path):
    (tmp_path / "scatter.py").write_text(RANDOM)
    flags = (*FEW, "--plugin", "scatter.py", "--method", "scatter", "--deterministic",
             "--teacher", "cifar_resnet8", "--teacher-checkpoint", teacher_run)  # fmt: skip
    leaves = ["output", "output/*", "output/*/*", "output/*/tensorboard/*"]
    words = ["put_", "no deterministic form", "--deterministic"]
    refused(1, DISTILL, *flags, words=words, leaves=leaves)
    torch.use_deterministic_algorithms(False)
