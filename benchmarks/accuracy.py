#!/usr/bin/env python
"""Accuracy over seeds of declared experiments: the README's tables.

    python benchmarks/accuracy.py digits                5 seeds, about 5 minutes on 2 cores
    python benchmarks/accuracy.py fashion-mnist         6 methods, 3 seeds; hours on 2 cores

Runs land in OUTPUT/NAME; finished ones are not repeated, interrupted ones go on. Then
benchmarks/results/accuracy-NAME.md, .csv and .png are written from the run folders alone.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
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
COSINE = "--recipe self --sched cosine --sched-on-updates --channels-last"


@dataclass(frozen=True)
class Experiment:
    """Students of one teacher: the flags of its scripts, the methods and the seeds.

    `teacher` are flags of train/classifier.py; None where train/distill.py trains its own.
    """

    dataset: str
    student: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    teacher: str | None = None

    def teacher_run(self, output: Path) -> Path | None:
        name = f"classifier-{self.dataset}-cifar_resnet20-s0"
        return output / name if self.teacher else None

    def run(self, output: Path, method: str, seed: int) -> Path:
        """The folder that train/distill.py chooses by itself."""
        networks = "cifar_resnet20-cifar_resnet8"
        return output / f"distill-{self.dataset}-{method.replace(' ', '+')}-{networks}-s{seed}"

    def teacher_command(self, output: Path | str) -> str:
        return f"train/classifier.py {self.teacher} --resume auto --output {output}"

    def command(self, output: Path | str, method: str, seed: int | str) -> str:
        teacher = self.teacher_run(Path(output))
        checkpoint = f" --teacher-checkpoint {teacher}" if teacher else ""
        return (
            f"train/distill.py {self.student}{checkpoint} --method {method} --seed {seed} "
            f"--resume auto --output {output}"
        )


EXPERIMENTS = {
    "digits": Experiment("digits", "--baseline", ("kd at",), (0, 1, 2, 3, 4)),
    "fashion-mnist": Experiment(
        "fashion-mnist",
        f"--dataset fashion-mnist {COSINE} --model cifar_resnet8 --epochs 2",
        ("none", "logits", "kd", "at", "kd at", "fsp"),
        (0, 1, 2),
        f"--dataset fashion-mnist {COSINE} --model cifar_resnet20 --epochs 3",
    ),
}


@script
def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="benchmarks/accuracy.py", description=__doc__)
    parser.add_argument("name", metavar="NAME", help=" or ".join(EXPERIMENTS))
    flag = parser.flag
    flag(parser, "--seeds", type=natural, nargs="+", metavar="N", help="(default: those declared)")
    flag(parser, "--output", type=Path, default=Path("output/accuracy"), help="of the runs")
    flag(parser, "--results", type=Path, default=ROOT / "benchmarks/results", help="of the tables")
    options = parser.fallbacks | parser.given(argv)
    name = options["name"]
    if name not in EXPERIMENTS:
        raise unknown("experiment", name, EXPERIMENTS)
    experiment, output = EXPERIMENTS[name], options["output"] / name
    seeds = options["seeds"] or experiment.seeds

    teacher = experiment.teacher_run(output)
    if teacher is not None:
        finish(teacher, experiment.teacher_command(shlex.quote(str(output))))
    folders = []
    for seed in seeds:
        for method in experiment.methods:
            folders.append(experiment.run(output, method, seed))
            finish(folders[-1], experiment.command(shlex.quote(str(output)), method, seed))
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
    output, methods = f"output/accuracy/{name}", ", ".join(experiment.methods)
    lines += ["", "## Commands", "", f"`python benchmarks/accuracy.py {name}` runs what follows,"]
    lines += [f"METHOD being one of: {methods}.", "", "```"]
    if experiment.teacher:
        lines.append(f"python {experiment.teacher_command(output)}")
    return [*lines, f"python {experiment.command(output, 'METHOD', 'SEED')}", "```"]


if __name__ == "__main__":
    sys.exit(main())
