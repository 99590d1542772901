"""Assistants: each learns from the one before, and the student from the last."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import load_script
from safetensors.torch import load_file
from test_resume import record_of

from kdfast.analysis.runs import read_runs
from kdfast.analysis.table import tabulate
from kdfast.models import checksum, create_model, read_weights, save_weights
from kdfast.seeding import derive_seed

DISTILL = "train/distill.py"
FEW = ("--train-limit", 64, "--eval-limit", 32, "-b", 32, "--epochs", 1, "--model", "cifar_resnet8",
       "--teacher", "cifar_resnet8", "--no-baseline", "--method", "kd")  # fmt: skip
TWO = ("--assistants", "cifar_resnet8", "cifar_resnet14", "--assistant-epochs", 2)
MINE = (*FEW, *TWO, "--experiment", "mine")


@pytest.fixture(scope="session")
def chain_run(teacher_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chain")
    flags = (*MINE, "--output", folder, "--teacher-checkpoint", teacher_run)
    assert load_script(DISTILL).main([str(flag) for flag in flags]) == 0
    return folder / "mine"


@pytest.fixture
def chain(chain_run, tmp_path):
    return shutil.copytree(chain_run, tmp_path / "output" / "mine")


def sum_of(path: Path) -> str:
    return checksum(load_file(path / "best.safetensors"))


def test_every_link_learns_from_the_one_before(chain, teacher_run):
    links = [chain / "assistants/1-cifar_resnet8", chain / "assistants/2-cifar_resnet14", chain]
    taught_by = [sum_of(teacher_run), *map(sum_of, links[:2])]
    tops = []
    for link, parent in zip(links, taught_by, strict=True):
        options = yaml.safe_load((link / "args.yaml").read_text())["options"]
        results = json.loads((link / "results.json").read_text())
        assert options["teacher-checksum"] == results["chain"][-1]["checksum"] == parent
        assert read_weights(link / "last.safetensors")[1]["parent"] == parent
        assert results["last"]["epoch"] == (1 if link == chain else 2)
        assert parent in (link / "train.log").read_text()
        tops.append(results["best"]["top1"])
    found = results["chain"]
    assert [network["checksum"] for network in found] == taught_by
    assert [network["architecture"] for network in found] == [
        "cifar_resnet8", "cifar_resnet8", "cifar_resnet14",
    ]  # fmt: skip
    assert [Path(network["run"]).name for network in found] == [
        teacher_run.name, *(link.name for link in links[:2]),
    ]  # fmt: skip
    assert [network["top1"] for network in found[1:]] == tops[:2], "the best weights teach"
    log = (chain / "train.log").read_text()
    assert all(network["checksum"] in log for network in found)
    options = yaml.safe_load((chain / "args.yaml").read_text())["options"]
    assert options["teacher"] == "cifar_resnet8", "a table sets the chain beside other students"
    assert options["assistants"] == ["cifar_resnet8", "cifar_resnet14"]
    assert results["teacher_top1"] == found[0]["top1"]


def test_initial_weights(run_script, teacher_run, tmp_path):
    """Each assistant draws its own; the student's are those that it has without assistants."""
    flags = (*FEW, "--assistants", "cifar_resnet8", "cifar_resnet8", "--lr", 0, "--output", ".")
    flags += ("--teacher-checkpoint", teacher_run, "--experiment", "run")
    assert run_script(DISTILL, *flags)[0] == 0
    stem = [
        load_file(tmp_path / "run" / link / "last.safetensors")["conv1.weight"]
        for link in (".", "assistants/1-cifar_resnet8", "assistants/2-cifar_resnet8")
    ]
    torch.manual_seed(derive_seed(0, "student"))
    assert torch.equal(stem[0], create_model("cifar_resnet8", 10).state_dict()["conv1.weight"])
    assert not any(torch.equal(stem[i], stem[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_an_assistant_equal_to_the_teacher_changes_nothing(run_script, teacher_run, tmp_path):
    """The student is plain KD's bit for bit, and the log names the assistant's checksum."""
    flags = (*FEW, "--output", ".", "--teacher-checkpoint", teacher_run)
    assert run_script(DISTILL, *flags, "--experiment", "plain")[0] == 0
    assistants = ("--assistants", f"cifar_resnet8={teacher_run}")
    code, out, err = run_script(DISTILL, *flags, *assistants)
    assert code == 0, err
    name = "distill-digits-kd-cifar_resnet8-cifar_resnet8-cifar_resnet8-s0"
    one, two = (record_of(tmp_path / folder) for folder in ("plain", name))
    assert one == two
    assert f"assistant 1 cifar_resnet8, weights {sum_of(teacher_run)}" in out
    found = json.loads(out.splitlines()[-1])["chain"]
    assert found[0] == found[1], "both are scored as the student's teacher"
    assert not (tmp_path / name / "assistants").exists()


def test_a_finished_chain_stays(run_script, chain, teacher_run):
    before = {path: path.read_bytes() for path in chain.glob("assistants/*/*.safetensors")}
    assert len(before) == 2 * len(list(chain.glob("assistants/*")))
    log = (chain / "assistants/1-cifar_resnet8/train.log").read_bytes()
    flags = (*MINE, "--teacher-checkpoint", teacher_run, "--resume", "auto", "--epochs", 2)
    assert run_script(DISTILL, *flags)[0] == 0
    assert before == {path: path.read_bytes() for path in before}
    assert log == (chain / "assistants/1-cifar_resnet8/train.log").read_bytes()
    assert json.loads((chain / "results.json").read_text())["last"]["epoch"] == 2


def test_a_damaged_link(refused, chain, teacher_run):
    results = chain / "assistants/1-cifar_resnet8/results.json"
    flags = (*MINE, "--teacher-checkpoint", teacher_run, "--resume", "auto", "--epochs", 2)
    for text in ("{", "{}", '{"last": {"top1": 1, "epoch": 1}, "best": {"top1": 1, "epoch": 1}}'):
        results.write_text(text)
        words = ["link 1", "results.json is damaged", "put it back"]
        refused(1, DISTILL, *flags, words=words, leaves=("output/mine/*",))


def test_arguments_of_the_student_are_not_those_of_another_network(run_script, teacher_run):
    flags = (*FEW, "--teacher-checkpoint", teacher_run, "--model-kwargs", "init=xavier")
    code, _, err = run_script(DISTILL, *flags, "--assistants", "cifar_wrn16_1")
    assert code == 0, err


FIRST, SECOND = "assistants/1-cifar_resnet8", "assistants/2-cifar_resnet14"


@pytest.mark.parametrize(
    ("gone", "words", "student"),
    [
        (FIRST, ["link 1, assistant cifar_resnet8", FIRST, "missing", "put it back"], "begun"),
        (FIRST, ["link 1, assistant cifar_resnet8", FIRST, "missing"], "not begun"),
        (SECOND, ["link 2, assistant cifar_resnet14", SECOND, "missing"], "begun"),
        (f"{FIRST}/best.safetensors", ["link 1", "best.safetensors is missing"], "not begun"),
        (f"{SECOND}/results.json", ["link 2", "results.json is missing"], "begun"),
    ],
)
def test_missing_link(refused, chain, teacher_run, gone, words, student):
    path = chain / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if student == "not begun":
        forget_student(chain)
    flags = (*MINE, "--teacher-checkpoint", teacher_run, "--resume", "auto")
    refused(1, DISTILL, *flags, words=words)


def forget_student(run: Path) -> None:
    """Leave `run` as it was before the student's stage."""
    for name in ("last.safetensors", "best.safetensors", "summary.csv", "results.json"):
        (run / name).unlink()
    shutil.rmtree(run / "checkpoints")
    record = yaml.safe_load((run / "args.yaml").read_text())
    del record["options"]["teacher-checksum"]
    (run / "args.yaml").write_text(yaml.safe_dump(record))


def test_links_exchanged_by_hand(refused, chain, teacher_run):
    """Other weights of link 1 than those that taught link 2; then of link 2."""
    flags = (*MINE, "--teacher-checkpoint", teacher_run, "--resume", "auto")
    leaves = ["output/mine/train.log", "output/mine/args.yaml"]
    for link, words in ((FIRST, ["link 2", SECOND]), (SECOND, ["resume output/mine:"])):
        path = chain / link / "best.safetensors"
        whole = path.read_bytes()
        state, record = read_weights(path)
        model = create_model(record["architecture"], 10)
        model.load_state_dict(state | {"fc.bias": state["fc.bias"] + 1})
        save_weights(path, model, record)
        words = ["cannot resume", "teacher-checksum", *words]
        refused(2, DISTILL, *flags, words=words, leaves=leaves)
        path.write_bytes(whole)
    path.write_bytes(whole[:500])
    words = ["assistants/2-cifar_resnet14/best.safetensors", "damaged"]
    refused(1, DISTILL, *flags, words=words, leaves=leaves)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--assistants", "cifar_resnet8", "cifar_resnet20"), ["assistants", "cifar_resnet20"]),
        (("--assistants", "cifar_resnet14"), ["assistants ['cifar_resnet14']"]),
        ((*TWO, "--assistant-epochs", 3), ["assistant-epochs 2", "assistant-epochs 3"]),
        ((*TWO, "--lr", 0.7), ["lr 0.05", "lr 0.7"]),
    ],
)
def test_resuming_another_chain(refused, chain, teacher_run, flags, words):
    flags = (*FEW, "--assistant-epochs", 2, *flags, "--teacher-checkpoint", teacher_run)
    words = ["cannot resume output/mine", *words]
    refused(2, DISTILL, *flags, "--experiment", "mine", "--resume", "auto", words=words)


@pytest.mark.parametrize(
    ("code", "flags", "words"),
    [
        (2, "--assistants cifar_resnet41", ["link 1", "did you mean", "cifar_resnet44"]),
        (2, "--assistants =x", ["--assistants =x", "NAME=PATH"]),
        (2, "--assistants cifar_resnet14=", ["NAME=PATH"]),
        (1, "--assistants cifar_resnet14=nowhere", ["link 1", "cifar_resnet14", "nowhere"]),
        (1, "--assistants cifar_resnet14=empty", ["link 1", "empty has no best.safetensors"]),
        (1, "--assistants cifar_resnet8=seven.safetensors", ["link 1", "7 classes", "model 10"]),
        (1, "--assistants cifar_resnet14=TEACHER", ["link 1", "cifar_resnet8", "does not fit"]),
        (2, "--assistants cifar_resnet8 cifar_resnet8=TEACHER", ["link 2", "teach nobody"]),
        (2, "--assistant-epochs 2", ["--assistant-epochs", "no --assistants"]),
        (2, "--assistants cifar_resnet14 --warmup-epochs 1 --epochs 3 --assistant-epochs 1 "
            "--warmup-epochs 2", ["--warmup-epochs 2", "--assistant-epochs 1"]),
        (2, "--assistants cifar_resnet14 --student-layers layer1 --teacher-layers layer1",
            ["--student-layers", "several"]),
        (2, "--assistants cifar_resnet8x4 --method fsp", ["link 1", "equal channels"]),
        (2, "--assistants cifar_resnet14 cifar_resnet8x4 --method fsp --student cifar_resnet8x4",
            ["link 2", "equal channels"]),
    ],
)  # fmt: skip
def test_bad_assistants(refused, teacher_run, tmp_path, code, flags, words):
    (tmp_path / "empty").mkdir()
    save_weights(tmp_path / "seven.safetensors", create_model("cifar_resnet8", 7), {})
    flags = flags.replace("TEACHER", str(teacher_run)).split()
    refused(code, DISTILL, *FEW, "--teacher-checkpoint", teacher_run, *flags, words=words)


HEADED = '''
from typing import ClassVar
from kdfast.methods import Method, method

@method("headed")
class Headed(Method):
    """Needs the teacher's heads."""

    heads: ClassVar[str] = "linear"
'''


def test_methods_that_need_heads(refused, teacher_run, tmp_path):
    (tmp_path / "headed.py").write_text(HEADED)
    flags = (*FEW, "--plugin", "headed.py", "--method", "headed", "--assistants", "cifar_resnet14")
    flags += ("--teacher-checkpoint", teacher_run)
    refused(2, DISTILL, *flags, words=["headed", "heads", "--assistants"])


def test_seeds_config_and_scores(run_script, refused, teacher_run, tmp_path):
    """A chain a seed, its flags from a printed config; a first stage in each link."""
    flags = (*FEW, "--assistants", "cifar_resnet8", "--method", "fsp", "kd", "--init-epochs", 1)
    flags += ("--teacher-checkpoint", teacher_run, "--output", ".")
    code, out, err = run_script(DISTILL, *flags, "--print-config")
    assert code == 0, err
    config = yaml.safe_load(out)
    assert config["assistants"] == ["cifar_resnet8"] and "assistant-epochs" not in config
    (tmp_path / "c.yaml").write_text(
        yaml.safe_dump({k: v for k, v in config.items() if k != "seed"})
    )
    code, out, err = run_script(DISTILL, "-c", "c.yaml", "--seeds", 0, 1)
    assert code == 0, err
    runs = [Path(run) for run in json.loads(out.splitlines()[-1])["runs"]]
    network = "cifar_resnet8-" * 3
    assert [run.name for run in runs] == [f"distill-digits-fsp+kd-{network}s{s}" for s in (0, 1)]
    links = [run / "assistants/1-cifar_resnet8" for run in runs]
    assert all((run / "first-stage/results.json").exists() for run in (*runs, *links))
    assert len({sum_of(run) for run in (*runs, *links)}) == 4
    code, out, err = run_script(DISTILL, *flags, "--eval-only", "--resume", "auto")
    assert code == 0, err
    best = json.loads((runs[0] / "results.json").read_text())["best"]["top1"]
    assert json.loads(out)["top1"] == best

    finished, unfinished = read_runs(runs)
    assert len(finished) == 4 and not unfinished, "students and assistants, no first stages"
    rows = [row for block in tabulate(finished).blocks for row in block.rows]
    assert sorted(len(row.runs) for row in rows) == [2, 2], "an assistant is no student of theirs"
    assert any("assistants" in row.label for row in rows)
