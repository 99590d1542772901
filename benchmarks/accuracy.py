#!/usr/bin/env python
"""Accuracy over seeds of declared experiments: the README's tables.

    python benchmarks/accuracy.py digits                every method, 5 seeds, about an hour
    python benchmarks/accuracy.py digits-plain          a few without all that makes training fast
    python benchmarks/accuracy.py fashion-mnist         every method, 3 seeds, about an hour

Runs land in OUTPUT/NAME; finished ones are not repeated, interrupted ones go on. Then
benchmarks/results/accuracy-NAME.md, .csv and .png are written from the run folders alone.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kdfast.analysis import Table, read_runs, tabulate
from kdfast.analysis.curves import draw_curves
from kdfast.analysis.identity import said
from kdfast.analysis.pages import as_csv, as_markdown, write_files
from kdfast.errors import UserError, unknown
from kdfast.training.parser import Parser
from kdfast.training.script import script
from kdfast.training.values import natural

ROOT = Path(__file__).parent.parent
# Name of a student -> flags of train/distill.py.
CATALOGUE = {
    "none": "--method none",
    "logits": "--method logits",
    "kd": "--method kd",
    "at": "--method at",
    "kd+at": "--method kd at",
    "fsp": "--method fsp",
    "fsp-staged": "--method fsp --beta 1 --init-epochs {init}",
    "fitnet": "--method fitnet",
    "fitnet-staged": "--method fitnet kd --init-epochs {init}",
    "crd": "--method crd",
    "crd+kd": "--method crd kd --beta 0.1",
    "dih": "--method dih {linear}",
    "mhkd": "--method mhkd",
    "tofd": "--method tofd {deep}",
    "takd": "--method kd --assistants cifar_resnet14",
    "born-again": "--method born_again",
}


@dataclass(frozen=True)
class Experiment:
    """Students of one teacher: flags that all have, epochs of a first stage, seeds.

    `before` are the runs that students build on, by name, with their script and flags; `flags` by
    the same words are what a student then says of them. Where train/distill.py trains its own,
    there are none. `more` are flags of single students.
    """

    common: str
    init: int
    seeds: tuple[int, ...]
    before: dict[str, str] = field(default_factory=dict)
    flags: dict[str, str] = field(default_factory=lambda: {"linear": "", "deep": ""})
    students: tuple[str, ...] = tuple(CATALOGUE)
    more: dict[str, str] = field(default_factory=dict)

    def command(self, output: Path | str, student: str, seed: int | str) -> str:
        """Into `output`/STUDENT-sSEED."""
        flags = {word: text.format(output=output) for word, text in self.flags.items()}
        own = f"{CATALOGUE[student]} {self.more.get(student, '')}"
        own = own.format(init=self.init, **flags)
        teacher = "" if "--teacher-checkpoint" in own else self.common_teacher(output)
        return " ".join(
            f"train/distill.py {self.common} {teacher} {own} --seed {seed} --resume auto "
            f"--output {output} --experiment {student}-s{seed}".split()
        )

    def common_teacher(self, output: Path | str) -> str:
        return f"--teacher-checkpoint {output}/teacher" if "teacher" in self.before else ""

    def preparation(self, output: Path | str, name: str) -> str:
        text = self.before[name].format(output=output)
        return f"{text} --resume auto --output {output} --experiment {name}"


# Loader processes, images one by one, the teacher as it was trained, NCHW, eager losses.
PLAIN = (
    "--on-device never --no-fold-teacher --teacher-cache never --no-channels-last --ops reference"
)
FASHION = "--dataset fashion-mnist --recipe digits --hflip 0.5 --eval-limit 5000"
MANY = f"{FASHION} --train-limit 20000"
EXPERIMENTS = {
    "digits": Experiment("--no-baseline", 2, (0, 1, 2, 3, 4)),
    "digits-plain": Experiment(
        f"--no-baseline {PLAIN}",
        2,
        (0, 1, 2, 3, 4),
        students=("kd", "at", "kd+at", "crd", "dih"),
    ),
    # A student sees 3,000 images, its teacher has seen 20,000; all are scored on the same 5,000.
    "fashion-mnist": Experiment(
        f"{FASHION} --teacher cifar_resnet20 --model cifar_resnet8 --train-limit 3000 --epochs 3",
        1,
        (0, 1, 2),
        before={
            "teacher": f"train/classifier.py {MANY} --model cifar_resnet20 --epochs 3",
            "heads": f"train/heads.py {MANY} --teacher cifar_resnet20 --epochs 1 "
            "--teacher-checkpoint {output}/teacher",
            "deep": f"train/heads.py {MANY} --teacher cifar_resnet20 --epochs 3 --kind deep",
        },
        flags={
            "linear": "--heads {output}/heads",
            "deep": "--teacher-checkpoint {output}/deep --heads {output}/deep",
        },
        students=tuple(s for s in CATALOGUE if not s.endswith("-staged") and s != "crd+kd"),
        more={"fsp": "--beta 1", "crd": "--beta 0.1"},
    ),
}


@script
def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="benchmarks/accuracy.py", description=__doc__)
    parser.add_argument("name", metavar="NAME", help=" or ".join(EXPERIMENTS))
    flag = parser.flag
    flag(parser, "--seeds", type=natural, nargs="+", metavar="N", help="(default: those declared)")
    flag(parser, "--students", nargs="+", metavar="NAME", help=", ".join(CATALOGUE))
    flag(parser, "--output", type=Path, default=Path("output/accuracy"), help="of the runs")
    flag(parser, "--results", type=Path, default=ROOT / "benchmarks/results", help="of the tables")
    options = parser.fallbacks | parser.given(argv)
    name = options["name"]
    if name not in EXPERIMENTS:
        raise unknown("experiment", name, EXPERIMENTS)
    experiment, output = EXPERIMENTS[name], options["output"] / name
    for student in options["students"] or ():
        if student not in CATALOGUE:
            raise unknown("student", student, CATALOGUE)

    place = shlex.quote(str(output))
    for run in experiment.before:
        finish(output / run, experiment.preparation(place, run))
    folders = []
    for seed in options["seeds"] or experiment.seeds:
        for student in options["students"] or experiment.students:
            folders.append(output / f"{student}-s{seed}")
            finish(folders[-1], experiment.command(place, student, seed))
    table = tabulate(read_runs(folders)[0])
    files = {
        f"accuracy-{name}.md": as_markdown(
            table,
            title=f"Accuracy on {name}",
            picture=f"accuracy-{name}.png",
            more=describe(table, experiment, name),
        ),
        f"accuracy-{name}.csv": as_csv(table),
        f"accuracy-{name}.png": draw_curves(table),
    }
    print(", ".join(map(str, write_files(options["results"], files))))


def finish(folder: Path, command: str) -> None:
    """Train what is to land in `folder`, unless it is complete.

    Raises `UserError` when the command fails; it has said why.
    """
    if (folder / "results.json").exists():
        return
    print(command, flush=True)
    words = [sys.executable, *shlex.split(command)]
    words[1] = str(ROOT / words[1])
    code = subprocess.run(words, stdout=subprocess.DEVNULL, check=False).returncode
    if code or not (folder / "results.json").exists():
        raise UserError(f"no results in {folder}: {command} ended with exit code {code}")


def describe(table: Table, experiment: Experiment, name: str) -> list[str]:
    """Markdown on the scores of every seed, the options, and the commands that made the runs."""
    runs = table.runs()
    seeds = sorted({run.seed for run in runs})
    lines = ["## Every seed, last epoch", ""]
    lines.append(f"| method | {' | '.join(f'seed {seed}' for seed in seeds)} |")
    lines.append("|---|" + "---:|" * len(seeds))
    for block in table.blocks:
        for row in block.rows:
            scores = {run.seed: f"{run.last[table.metric]:.2f}" for run in row.runs}
            lines.append(f"| {row.label} | {' | '.join(scores.get(s, '') for s in seeds)} |")
    keys = ("recipe", "epochs", "global-batch-size", "opt", "lr", "weight-decay", "sched")
    options = ", ".join(said(key, runs[0].options.get(key)) for key in keys)
    lines += ["", "## Options", "", f"* all: {options}"]
    for row in (row for block in table.blocks for row in block.rows):
        chosen = row.runs[0].methods
        if chosen:
            terms = "; ".join(said(m, values) for m, values in chosen.items())
            lines.append(f"* {row.label}: {said('gamma', row.runs[0].options['gamma'])}; {terms}")
    output = f"output/accuracy/{name}"
    lines += ["", "## Commands", "", f"`python benchmarks/accuracy.py {name}` runs, for each SEED:"]
    lines += ["", "```"]
    lines += [f"python {experiment.preparation(output, run)}" for run in experiment.before]
    lines += [f"python {experiment.command(output, s, 'SEED')}" for s in experiment.students]
    return [*lines, "```"]


if __name__ == "__main__":
    sys.exit(main())
