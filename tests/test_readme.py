"""What the README shows is what is there."""

from __future__ import annotations

import csv
import json
import math
import re
import shlex

import pytest
import torch
from torch.nn import functional as F

from kdfast import ops
from kdfast.data import dataset_names
from kdfast.training.parser import recipe_names

from conftest import ROOT, load_script  # isort: skip

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def script_commands() -> list[list[str]]:
    """(script, flags...) of every command that starts a script, whatever launches it."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    found = []
    for words in map(shlex.split, lines):
        places = [
            i for i, word in enumerate(words) if re.fullmatch(r"(train|analysis)/\w+\.py", word)
        ]
        found += [words[place:] for place in places]
    return found


@pytest.mark.parametrize("command", script_commands(), ids=" ".join)
def test_commands_are_understood(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = load_script(command[0])
    if command[0] == "analysis/knowledge.py":  # it has nothing to merge
        script.knowledge_parser().given(command[1:])
        return
    assert script.main([*command[1:], "--print-config"]) == 0
    # With networks, what they were trained on is left to them.
    wanted = "runs:\n-" if command[0] == "train/sigma.py" and len(command) > 1 else "dataset:"
    assert wanted in capsys.readouterr().out


def test_there_are_two_commands_and_more():
    assert len(script_commands()) >= 4
    section = README.split("## Two commands", 1)[1].split("\n## ", 1)[0]
    assert section.count("```bash") == 2 and section.count("pip install -e") == 3


def test_own_method_is_shown_whole():
    assert (ROOT / "docs/own_method.py").read_text() in blocks("python")


def test_names_are_listed():
    for name in (*dataset_names(), *recipe_names()):
        assert f"`{name}`" in README, name


@pytest.mark.parametrize("name", ["digits", "fashion-mnist"])
def test_accuracies_are_those_of_the_committed_runs(name):
    with (ROOT / f"benchmarks/results/accuracy-{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    rows = [row for row in rows if row["student"] == "cifar_resnet8"]
    assert len(rows) == {"digits": 16, "fashion-mnist": 13}[name]
    for row in rows:
        text = f"{float(row['last_mean']):.2f} +- {float(row['last_std']):.2f}"
        if row["gain_mean"]:
            text += f" ({float(row['gain_mean']):+.2f})"
        (line,) = (line for line in README.splitlines() if line.startswith(f"| {named(row)} |"))
        assert text in line


def test_what_makes_training_fast_costs_no_accuracy():
    """Within two standard errors of the same students trained without all of it, 5 seeds each."""
    tables = {}
    for name in ("digits", "digits-plain"):
        with (ROOT / f"benchmarks/results/accuracy-{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        tables[name] = {row["method"]: row for row in rows if row["student"] == "cifar_resnet8"}
    assert set(tables["digits-plain"]) == {"kd", "at", "kd+at", "crd", "dih"}
    for method, plain in tables["digits-plain"].items():
        fast = tables["digits"][method]
        assert fast["seeds"] == plain["seeds"] == "0 1 2 3 4"
        error = math.hypot(float(fast["last_std"]), float(plain["last_std"])) / math.sqrt(5)
        assert abs(float(fast["last_mean"]) - float(plain["last_mean"])) <= 2 * error, method


def test_training_steps_are_those_of_the_committed_runs():
    lines = (ROOT / "benchmarks/results/training-cpu.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "peak_mb" in row]
    assert len(rows) == 4
    for row in rows:
        speed, peaks = row["images_per_second"]["kdfast"], row["peak_mb"]
        figures = f"| {speed:.0f} | {row['ratio']:.2f}x | {peaks['kdfast']:.0f} MB, published "
        teacher, student = row["what"].split(" -> ")
        (line,) = (line for line in README.splitlines() if figures in line)
        assert f"{teacher} teaches {student}" in line
        assert line.endswith(f"{peaks['published loop']:,.0f} |")


def test_generations_are_those_of_the_committed_run():
    with (ROOT / "benchmarks/results/evolution-digits.csv").open() as file:
        rows = list(csv.DictReader(file))
    for dense, slim in zip(rows[::2], rows[1::2], strict=True):
        top1 = dense["Current Tst Top 1"], slim["Current Tst Top 1"]
        masked = f"{float(slim['masked_top1']):.2f}"
        assert f"| {dense['generation']} | {top1[0]} | {top1[1]} | {masked} |" in README
        for row in (dense, slim):
            assert f"{int(row['parameters']):,}" in README


def test_consistency_is_that_of_the_committed_runs():
    with (ROOT / "benchmarks/results/consistency-digits.csv").open() as file:
        rows = list(csv.DictReader(file))
    runs = dict.fromkeys(row["run"] for row in rows)
    section = README.split("## Compare what two networks know")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(lines) == len(runs) == 6
    for run, line in zip(runs, lines, strict=True):
        share = {r["quantity"]: 100 * float(r["relative"]) for r in rows if r["run"] == run}
        parts = ("order0", "order1", "order2", "residual")
        assert line.endswith("| " + " | ".join(f"{share[part]:.1f}" for part in parts) + " |")
    with (ROOT / "benchmarks/results/transclassifier-digits.csv").open() as file:
        before = [row["before_top1"] for row in csv.DictReader(file)]
    for top1 in before[2:5]:
        assert f"{float(top1):.1f} %" in section


def test_knowledge_is_that_of_the_committed_runs():
    with (ROOT / "benchmarks/results/knowledge-digits.csv").open() as file:
        rows = list(csv.DictReader(file))
    section = README.split("## Explain what a layer knows")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    assert len(lines) == 6
    for line in lines:
        quantity = line.split("`")[1]
        own = [row for row in rows if row["quantity"] == quantity]
        assert [row["seed"] for row in own] == ["0", "1", "2"]
        shown = [f"{float(row['student']):.3g} / {float(row['baseline']):.3g}" for row in own]
        assert f"| {' | '.join(shown)} |" in line


def named(row: dict[str, str]) -> str:
    """How the README's table calls a row of a committed one."""
    method, _, options = row["method"].partition(" (")
    label = "student alone" if method == "none" else method.replace("+", " + ")
    if "init " in options or method == "fitnet+kd":
        return f"{label}, two stages"
    return f"{label}, assistant cifar_resnet14" if "assistants" in options else label


def test_ops_example_runs():
    """The README's block of ops, line by line, on both paths."""
    block = re.search(r"## The ops\n\n```python\n(.*?)```", README, re.S)[1]
    maps, logits = torch.rand(2, 4, 8, 8), torch.randn(2, 5)
    names = {
        "seed": 0,
        "epoch": 0,
        "feature": maps,
        "student": maps,
        "teacher": maps * 2,
        "student_pairs": [(maps, maps)],
        "teacher_pairs": [(maps, maps * 2)],
        "student_logits": logits,
        "teacher_logits": logits * 2,
        "cohort_logits": torch.randn(3, 2, 5),
        "labels": torch.tensor([0, 1]),
        **dict(zip("NSCHW", (2, 3, 3, 8, 8), strict=True)),
        "ids": torch.tensor([7, 3]),
        "image": torch.rand(2, 3, 8, 8),
        "sigma": torch.full((2, 1, 4, 4), 0.1),
        "class_offsets": torch.tensor([0, 17000, 34000]),
        **{name: F.normalize(torch.randn(2, 8)) for name in ("e_s", "e_t")},
        **{f"{name}_bank": F.normalize(torch.randn(34000, 8)) for name in ("student", "teacher")},
        "z_s": torch.tensor(1e5),
        "z_t": torch.tensor(1e5),
        "x": maps,
        "weight": torch.randn(6, 4, 3, 3),
        "hidden": maps,
        "gate": torch.tensor(0.5),
        "images_u8": torch.zeros(40000, 8, 8, 3, dtype=torch.uint8),
        "mean": (0.5, 0.5, 0.5),
        "std": (0.2, 0.2, 0.2),
    }
    results = {}
    for path in ("fused", "reference"):
        found = {**names, "weights": [names["weight"].clone()], "masks": []}
        results[path] = []
        with ops.use(path):
            for line in block.splitlines():
                if line.startswith("ops.split_reset_"):
                    found["masks"] = [found["mask"]]
                if line.startswith("ops."):
                    results[path].append(eval(line, found))
                else:
                    exec(line, found)
        results[path].append(found["weights"][0])
    for fused, twin in zip(*results.values(), strict=True):
        if fused is not None:
            torch.testing.assert_close(fused, twin, rtol=1e-4, atol=1e-5)
