"""Stopped at any moment and resumed, a run ends as if it had never been stopped, bit for bit."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_bad_files import Bomb
from torch.optim.optimizer import register_optimizer_step_post_hook

from kdfast.models import checksum
from kdfast.training import checkpoint
from kdfast.training.checkpoint import Position

ROOT = Path(__file__).parent.parent
TORCHRUN = (Path(sys.executable).parent / "torchrun", "--nproc_per_node", 2)
THREE = (*TORCHRUN[:2], 3)
CLASSIFIER, DISTILL, HEADS = "train/classifier.py", "train/distill.py", "train/heads.py"
BORN_AGAIN = "train/born_again.py"
FEW = ("--model", "cifar_resnet8", "--train-limit", 203, "--eval-limit", 90, "--epochs", 3,
       "--checkpoint-steps", 1)  # fmt: skip
# Kills in a row, each of the run that the one before has left.
KILLS = int(os.environ.get("KDFAST_TEST_KILLS", 3))


def command(*words: object, cwd: Path, **more) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return subprocess.Popen(
        [str(word) for word in words],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """Both outputs of `process` once it has ended with exit code `code`."""
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, f"{process.returncode}\n{out[-2000:]}\n{err[-4000:]}"
    return out + err


def record_of(run: Path) -> dict:
    """All that an interrupted and an uninterrupted run must agree on."""
    with (run / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["seconds"], row["images_per_second"]
    results = json.loads((run / "results.json").read_text())
    kept = [*run.glob("*.safetensors"), *run.glob("heads/*.safetensors")]
    weights = {p.name: checksum(load_file(p)) for p in sorted(kept)}
    last = checkpoint.latest(run / "checkpoints")
    weights |= {p.name: checksum(load_file(p)) for p in sorted(last.glob("*.safetensors"))}
    return {"rows": rows, "last": results["last"], "best": results["best"], **weights}


def records_of(run: Path) -> dict[str, dict]:
    """The same of a run and of all runs that are parts of it."""
    parts = [path.parent.relative_to(run) for path in run.rglob("results.json")]
    return {str(part): record_of(run / part) for part in parts}


SHORT = ("--train-limit", 64, "-b", 32, "--epochs", 1)
CASES = {
    "plain": (CLASSIFIER, ()),
    "accumulated and averaged": (
        CLASSIFIER,
        ("--grad-accum-steps", 2, "--model-ema", "--model-ema-decay", 0.9),
    ),
    "bf16": (CLASSIFIER, ("--amp", "--train-limit", 96, "-b", 8)),
    "three": (CLASSIFIER, ("-b", 16, "--model", "cifar_resnet20", "--epochs", 2)),
    "distilled": (DISTILL, ()),
    "two stages": (DISTILL, (*SHORT, "--method", "fsp", "kd", "--init-epochs", 1)),
    "chain": (DISTILL, (*SHORT, "--method", "kd", "--assistants", "cifar_resnet8")),
    "crd": (
        DISTILL,
        ("--method", "crd", "kd", "--crd-negatives", 40, "--crd-positives", "relax",
         "--grad-accum-steps", 2),
    ),
    "dih": (DISTILL, ("--method", "dih", "--teacher-epochs", 1)),
    "tofd": (DISTILL, (*SHORT, "--method", "tofd", "--teacher-epochs", 1)),
    "linear heads": (HEADS, ()),
    "deep heads": (HEADS, ("--kind", "deep")),
}  # fmt: skip
# What only differs in the loss from another case is killed less often.
SELDOM = {"two stages", "dih", "tofd", "linear heads", "deep heads", "three"}


@pytest.mark.parametrize(
    "case, processes",
    [
        *((case, 1) for case in CASES if case != "three"),
        ("accumulated and averaged", 2),
        ("bf16", 2),
        ("three", 3),
    ],
)
def test_killed_and_resumed(teacher_run, tmp_path, case, processes):
    script, flags = CASES[case]
    flags = (*FEW, *flags, "--output", tmp_path)
    if script == HEADS:
        flags = flags[2:]  # the network is the teacher
    if script != CLASSIFIER:
        flags += ("--teacher", "cifar_resnet8")
    if script == DISTILL:
        flags += ("--no-baseline",)
    if script != CLASSIFIER and case not in ("deep heads", "tofd"):
        flags += ("--teacher-checkpoint", teacher_run)
    launcher = {1: (sys.executable,), 2: TORCHRUN, 3: THREE}[processes]
    killed = (*launcher, ROOT / "tests/killed.py")
    finish(command(*killed, "0:0", script, *flags, "--experiment", "whole", cwd=tmp_path))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    chance = random.Random(f"{case} {processes} {KILLS}")
    flags += ("--experiment", "cut", "--resume", "auto")
    kills = 0
    # Three processes add gradients in an order of their own; with two there is only one.
    while kills < (max(1, KILLS // 3) if case in SELDOM else KILLS):
        rank = kills % processes
        # The other processes take part in steps, but write nothing.
        moment = chance.randint(1, 45 if rank == 0 else 5)
        ended = command(*killed, f"{rank}:{moment}", script, *flags, cwd=tmp_path)
        said = "".join(ended.communicate(timeout=600))
        if ended.returncode == 0:  # it was done before its moment came; another one is killed
            assert records_of(whole) == records_of(cut)
            shutil.rmtree(cut)
            continue
        assert ended.returncode == (-signal.SIGKILL if processes == 1 else 1), said
        assert processes == 1 or f"process {rank} died" in said, said
        kills += 1
    finish(command(*killed, "0:0", script, *flags, cwd=tmp_path))
    assert records_of(whole) == records_of(cut)
    assert not list(cut.rglob(".partial*"))


def chain_of(run: Path) -> dict:
    """All that must agree of a chain and of its generations, wherever it lies."""
    results = json.loads((run / "results.json").read_text())
    for entry in results["generations"]:
        entry["run"] = Path(entry["run"]).name
    del results["run"]
    return results | {path.name: record_of(path) for path in sorted(run.glob("generation-*"))}


def test_killed_chain(tmp_path):
    """Before its first generation, between two, while one saves its last epoch, and later again."""
    killed = (sys.executable, ROOT / "tests/killed.py")
    flags = (BORN_AGAIN, *FEW[:6], "--epochs", 2, "--generations", 3, "--lambda-end", 0.1,
             "--output", tmp_path)  # fmt: skip
    finish(command(*killed, "0:0", *flags, "--experiment", "whole", cwd=tmp_path))
    flags += ("--experiment", "cut", "--resume", "auto")
    left = []
    for moment in (2, 35, 26, 40):
        ended = command(*killed, f"0:{moment}", *flags, cwd=tmp_path)
        said = "".join(ended.communicate(timeout=600))
        assert ended.returncode == -signal.SIGKILL, said
        links = sorted((tmp_path / "cut").glob("generation-*"))
        left.append([(link / "results.json").exists() for link in links])
    assert left == [[], [True, False], [True, False], [True, True, False]]
    finish(command(*killed, "0:0", *flags, cwd=tmp_path))
    assert chain_of(tmp_path / "whole") == chain_of(tmp_path / "cut")


class Signalled:
    """Sends this process a signal at the Nth optimizer step, or at the Nth scored batch."""

    def __init__(self, monkeypatch, number: int, *, step: int = 0, scored: int = 0):
        self.counts = {"step": 0, "scored": 0}

        def count(what: str, limit: int) -> None:
            self.counts[what] += 1
            if self.counts[what] == limit:
                os.kill(os.getpid(), number)

        self.handle = register_optimizer_step_post_hook(lambda *_: count("step", step))
        genuine = torch.Tensor.topk

        def topk(*args, **kwargs):
            count("scored", scored)
            return genuine(*args, **kwargs)

        monkeypatch.setattr(torch.Tensor, "topk", topk)


@pytest.fixture
def signalled(monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        made = []

        def arm(number: int, **when) -> None:
            made.append(Signalled(patch, number, **when))

        def disarm() -> None:
            patch.undo()
            for one in made:
                one.handle.remove()

        arm.off = disarm
        yield arm
        disarm()


HOW = {
    "a step": {"step": 6},
    "the last step of an epoch": {"step": 4},
    "scoring": {"scored": 2},
    "scoring the last batch": {"scored": 4},
    "the end": {"step": 12},
}
NEW = ("--checkpoint-steps", 100)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("when", HOW)
def test_stopped_by_a_signal(run_script, signalled, tmp_path, number, code, when):
    flags = (CLASSIFIER, *FEW, *NEW, "--output", ".")
    assert run_script(*flags, "--experiment", "whole")[0] == 0
    signalled(number, **HOW[when])
    flags += ("--experiment", "cut")
    got, _, err = run_script(*flags)
    signalled.off()
    assert got == code, err
    assert len(err.splitlines()) == 1 and signal.Signals(number).name in err
    assert "--resume auto" in err and str(checkpoint.latest(Path("cut/checkpoints"))) in err
    assert "stopped by" in (tmp_path / "cut" / "train.log").read_text().splitlines()[-1]
    assert not (tmp_path / "cut" / "results.json").exists()
    code, _, err = run_script(*flags, "--resume", "auto")
    assert code == 0, err
    assert record_of(tmp_path / "whole") == record_of(tmp_path / "cut")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "handlers are put back"


@pytest.mark.parametrize(
    ("case", "part", "step"),
    [
        ("two stages", "first-stage", 3),
        ("two stages", "", 6),
        ("chain", "assistants/1-cifar_resnet8", 1),
        ("chain", "assistants/1-cifar_resnet8", 2),
        ("chain", "", 3),
    ],
)
def test_stopped_in_a_part(run_script, signalled, teacher_run, tmp_path, case, part, step):
    """Stopped in a part of a run, the same command goes on in that part."""
    flags = (DISTILL, *FEW, *CASES[case][1], *NEW, "--output", ".", "--teacher", "cifar_resnet8",
             "--teacher-checkpoint", teacher_run, "--no-baseline")  # fmt: skip
    flags += ("--init-epochs", 2) if case == "two stages" else ()
    assert run_script(*flags, "--experiment", "whole")[0] == 0
    signalled(signal.SIGTERM, step=step)
    flags += ("--experiment", "cut")
    code, _, err = run_script(*flags)
    signalled.off()
    assert code == 143, err
    assert str(Path("cut") / part / "checkpoints") in err and len(err.splitlines()) == 1
    for folder in {"cut", f"cut/{part}"}:
        assert "stopped by" in (tmp_path / folder / "train.log").read_text().splitlines()[-1]
    code, _, err = run_script(*flags, "--resume", "auto")
    assert code == 0, err
    assert records_of(tmp_path / "whole") == records_of(tmp_path / "cut")


def test_stopped_before_the_first_step(run_script, monkeypatch):
    from kdfast.training.interrupt import Interrupt

    genuine = Interrupt.__enter__

    def entered(self):
        genuine(self)
        os.kill(os.getpid(), signal.SIGTERM)
        return self

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Interrupt, "__enter__", entered)
        code, _, err = run_script(CLASSIFIER, *FEW, "--experiment", "run")
    assert code == 143 and "before the first step" in err
    assert run_script(CLASSIFIER, *FEW, "--experiment", "run", "--resume", "auto")[0] == 0


DROPOUT = """
import torch
from torch import nn

def build(num_classes, **_):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 4), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, num_classes),
    )
"""


@pytest.mark.parametrize(
    "extra",
    [
        ("--model", "dropping:build"),
        ("--opt", "adamw", "--lr", 0.001),
        ("--opt", "lamb", "--lr", 0.001, "--channels-last"),
        ("--opt", "adafactorbv", "--lr", 0.001),
        ("--opt", "lion", "--lr", 0.0003, "--sched", "cosine", "--sched-on-updates"),
        ("-j", 2, "--on-device", "never"),
        ("--global-batch-size", 30, "--grad-accum-steps", 3, "--drop-last"),
    ],
    ids=lambda extra: str(extra[1]),
)
def test_stopped_within_an_epoch(run_script, signalled, tmp_path, monkeypatch, extra):
    (tmp_path / "dropping.py").write_text(DROPOUT)
    monkeypatch.syspath_prepend(tmp_path)
    flags = (CLASSIFIER, *FEW, *NEW, "--output", ".", *extra)
    code, _, err = run_script(*flags, "--experiment", "whole")
    assert code == 0, err
    signalled(signal.SIGTERM, step=6)
    flags += ("--experiment", "cut")
    assert run_script(*flags)[0] == 143
    signalled.off()
    code, _, err = run_script(*flags, "--resume", "auto")
    assert code == 0, err
    assert record_of(tmp_path / "whole") == record_of(tmp_path / "cut")


def test_two_processes_stop_at_one_step(tmp_path):
    """One process of two is told; both stop at the same step, save, and exit with 143."""
    flags = (CLASSIFIER, *FEW, *NEW, "--output", tmp_path, "--log-interval", 1)
    killed = (*TORCHRUN, ROOT / "tests/killed.py", "0:0")
    finish(command(*killed, *flags, "--experiment", "whole", cwd=tmp_path))
    stopped = (*TORCHRUN, ROOT / "tests/killed.py", "1:5:TERM")
    said = finish(command(*stopped, *flags, "--experiment", "cut", cwd=tmp_path), 1)
    assert said.count("stopped by SIGTERM") == 1 and "exitcode  : 143" in said
    where = checkpoint.all_positions(tmp_path / "cut" / "checkpoints")[-1]
    assert where.epoch == 1 and where.step in (1, 2, 3)
    flags += ("--experiment", "cut", "--resume", "auto")
    finish(command(*killed, *flags, cwd=tmp_path))
    assert record_of(tmp_path / "whole") == record_of(tmp_path / "cut")


@pytest.fixture(scope="session")
def stopped_run(tmp_path_factory):
    """A run folder with a finished epoch and two steps of the next."""
    from conftest import load_script

    folder = tmp_path_factory.mktemp("stopped")
    steps = []

    def count(*_):
        steps.append(1)
        if len(steps) == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    handle = register_optimizer_step_post_hook(count)
    flags = (*FEW, *NEW, "--output", folder, "--experiment", "mine")
    assert load_script(CLASSIFIER).main([str(f) for f in flags]) == 143
    handle.remove()
    return folder / "mine"


@pytest.fixture
def stopped(stopped_run, tmp_path):
    return shutil.copytree(stopped_run, tmp_path / "output" / "mine")


MORE = (*FEW, *NEW, "--experiment", "mine", "--resume", "auto")
PARTS = ("objective.safetensors", "optimizer.safetensors", "state.json", "summary.csv")


@pytest.mark.parametrize("tenth", range(10))
def test_truncated_checkpoint(refused, stopped, tenth):
    for name in PARTS:
        path = stopped / "checkpoints" / "epoch-0001-step-000002" / name
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) * tenth // 10])
        words = ["checkpoints/epoch-0001-step-000002", "damaged", "remove it"]
        refused(1, CLASSIFIER, *MORE, words=words)
        path.write_bytes(whole)


@pytest.mark.parametrize("name", PARTS)
def test_incomplete_checkpoint(refused, stopped, name):
    (stopped / "checkpoints" / "epoch-0001-step-000002" / name).unlink()
    refused(1, CLASSIFIER, *MORE, words=["epoch-0001-step-000002", "damaged", name])


@pytest.mark.parametrize("name", PARTS[:2])
def test_flipped_bit(refused, stopped, name):
    path = stopped / "checkpoints" / "epoch-0001-step-000002" / name
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    refused(1, CLASSIFIER, *MORE, words=["epoch-0001-step-000002", "damaged", name])


def test_the_checkpoint_before_the_damaged_one(run_script, stopped, tmp_path):
    """What the line of a damaged checkpoint says works: removed, the one before is gone on from."""
    shutil.rmtree(stopped / "checkpoints" / "epoch-0001-step-000002")
    assert run_script(CLASSIFIER, *MORE)[0] == 0
    assert run_script(CLASSIFIER, *FEW, "--experiment", "whole")[0] == 0
    assert record_of(tmp_path / "output" / "whole") == record_of(stopped)


@pytest.mark.parametrize("edit", ["score", "missing", "header", "cut"])
def test_summary_edited_by_hand(refused, run_script, stopped, edit):
    path = stopped / "summary.csv"
    text = path.read_text()
    if edit == "missing":
        path.unlink()
    else:
        changed = {"score": text.replace("\n1,", "\n1,9"), "header": "x" + text, "cut": text[:-5]}
        path.write_text(changed[edit])
    line = refused(1, CLASSIFIER, *MORE, words=["summary.csv", "put its rows back"])
    source, _ = line.split("cp ")[1].split()
    shutil.copy(source, path)
    assert run_script(CLASSIFIER, *MORE)[0] == 0


def test_rows_after_the_checkpoint_are_written_anew(run_script, stopped, tmp_path):
    with (stopped / "summary.csv").open("a") as file:
        file.write("2,0.1,0.1,0.1,99")  # as a kill while writing leaves it
    assert run_script(CLASSIFIER, *MORE)[0] == 0
    assert run_script(CLASSIFIER, *FEW, "--experiment", "whole")[0] == 0
    assert record_of(tmp_path / "output" / "whole") == record_of(stopped)


def test_checkpoint_of_a_newer_version(refused, stopped):
    path = stopped / "checkpoints" / "epoch-0001-step-000002" / "state.json"
    for version, word in ((checkpoint.VERSION + 1, "newer"), (1, "older")):
        state = json.loads(path.read_text())
        path.write_text(json.dumps(state | {"version": version}))
        refused(1, CLASSIFIER, *MORE, words=[f"{word} kdfast", "epoch-0001-step-000002"])


def test_folder_of_a_newer_version(refused, stopped):
    record = yaml.safe_load((stopped / "args.yaml").read_text())
    (stopped / "args.yaml").write_text(yaml.safe_dump(record | {"layout": 99}))
    refused(1, CLASSIFIER, *MORE, words=["newer kdfast", "layout 99", "update"])


@pytest.mark.parametrize("name", PARTS)
def test_pickled_checkpoint_is_never_run(refused, stopped, name):
    path = stopped / "checkpoints" / "epoch-0001-step-000002" / name
    torch.save({"x": Bomb()}, path)
    refused(1, CLASSIFIER, *MORE, words=["epoch-0001-step-000002", "damaged"])
    assert not Path("ran").exists()


def test_one_folder_is_one_run(refused, run_script, stopped):
    """While one process holds the folder another is refused, also after the holder was killed."""
    hold = (
        "import time; from pathlib import Path; "
        "from kdfast.training.run_folder import RunFolder; "
        f"run = RunFolder(Path({str(stopped)!r})); run._take_lock(); print('held', flush=True); "
        "time.sleep(600)"
    )
    holder = command(sys.executable, "-c", hold, cwd=stopped)
    assert holder.stdout.readline() == "held\n"
    refused(1, CLASSIFIER, *MORE, words=["output/mine", "in use by another process"])
    holder.kill()
    holder.communicate()
    assert run_script(CLASSIFIER, *MORE)[0] == 0


def test_what_a_kill_while_saving_left_is_swept(run_script, stopped):
    rest = stopped / "checkpoints" / ".partial-epoch-0001-step-000003"
    rest.mkdir()
    (rest / "objective.safetensors").write_bytes(b"half")
    assert run_script(CLASSIFIER, *MORE)[0] == 0
    assert not rest.exists()


def test_only_the_newest_checkpoints_stay(run_script, tmp_path):
    flags = (CLASSIFIER, *FEW, "--experiment", "run", "--output", ".", "--checkpoint-hist", 3)
    assert run_script(*flags)[0] == 0
    positions = checkpoint.all_positions(tmp_path / "run" / "checkpoints")
    assert positions == [Position(2, 2), Position(2, 3), Position(3)]


def test_more_epochs_than_before(run_script, stopped):
    """A longer run replaces the results of the shorter one only when it ends."""
    assert run_script(CLASSIFIER, *MORE)[0] == 0
    assert json.loads((stopped / "results.json").read_text())["last"]["epoch"] == 3
    assert run_script(CLASSIFIER, *MORE, "--epochs", 4)[0] == 0
    assert json.loads((stopped / "results.json").read_text())["last"]["epoch"] == 4
