"""What the README shows is what is there."""

from __future__ import annotations

import csv
import re
import shlex

import pytest

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
    assert load_script(command[0]).main([*command[1:], "--print-config"]) == 0
    assert "dataset:" in capsys.readouterr().out


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
    assert len(rows) == {"digits": 2, "fashion-mnist": 6}[name]
    for row in rows:
        text = f"{float(row['last_mean']):.2f} +- {float(row['last_std']):.2f}"
        if row["gain_mean"]:
            text += f" ({float(row['gain_mean']):+.2f})"
        label = "student alone" if row["method"] == "none" else row["method"].replace("+", " + ")
        (line,) = (line for line in README.splitlines() if line.startswith(f"| {label} |"))
        assert text in line
