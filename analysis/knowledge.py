#!/usr/bin/env python
"""What a distilled student's layer knows, against that of the same network without a teacher.

    python analysis/knowledge.py                        what train/sigma.py left in output/
    python analysis/knowledge.py --student RUN --baseline RUN --teacher RUN
    python analysis/knowledge.py --student RUN --baseline RUN --threshold 0.3 --granularity epochs

RUN is a run folder of train/sigma.py. On the images that were accepted in all of them: concepts in
foreground and background (N_fg, N_bg, fg_share), how early and how simultaneously they were learned
(D_mean, D_var, D_std, slope) and how few were dropped again (rho).

Writes knowledge.md, curves.png and heatmaps.png, and as CSV the table (knowledge), the curves over
checkpoints (curves), the counts of every image (counts), a sheet of images (stability) and the
counts without selection (unselected); prints the table.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from kdfast.analysis.knowledge import (
    Report,
    as_markdown,
    as_text,
    counts_csv,
    curves_csv,
    knowledge_csv,
    measure_all,
    stability_csv,
    unselected_csv,
)
from kdfast.analysis.knowledge_pictures import draw_curves, draw_maps
from kdfast.analysis.pages import write_files
from kdfast.analysis.sigma_runs import find_pair, share
from kdfast.errors import UsageError
from kdfast.training.parser import Parser
from kdfast.training.script import script
from kdfast.training.sigma_files import read_image, read_sigma
from kdfast.training.values import natural, number

ROLES = ("student", "baseline", "teacher")


@script
def main(argv: Sequence[str]) -> None:
    parser = knowledge_parser()
    given = parser.given(argv)
    options = parser.fallbacks | given
    paths = runs_of(options)
    runs = {
        role: read_sigma(path, granularity=options["granularity"]) for role, path in paths.items()
    }
    shared = share(runs, paths, options["checkpoints"], selected=not options["all_images"])
    report = measure_all(
        shared, options["threshold"], options["granularity"], options["exclude_initial"]
    )
    folder = options["output"] or paths["student"] / "knowledge"
    written = write_files(folder, files_of(report, options["pictures"]))
    print(as_text(report))
    for note in report.notes():
        print(f"knowledge.py: note: {note}", file=sys.stderr)
    print(f"{', '.join(path.name for path in written)} -> {folder}")


def knowledge_parser() -> Parser:
    parser = Parser(prog="analysis/knowledge.py", description=__doc__)
    flag = parser.flag
    for role in ROLES:
        more = " (default: the one pair in output/)" if role == "student" else ""
        flag(parser, f"--{role}", type=Path, metavar="RUN", help=f"sigma run of the {role}{more}")
    flag(
        parser,
        "--output",
        type=Path,
        metavar="PATH",
        help="folder for the files (default: knowledge/ in the student's run)",
    )
    flag(
        parser,
        "--threshold",
        type=number,
        default=0.2,
        metavar="NATS",
        help="how far below the mean background a concept is",
    )
    flag(
        parser,
        "--granularity",
        choices=("iterations", "epochs"),
        default="iterations",
        help="path length sums the steps of iterations, as published numbers do, or of epochs, as "
        "the published formula does",
    )
    flag(
        parser,
        "--checkpoints",
        type=natural,
        nargs="+",
        metavar="EPOCH",
        help="(default: all that every run has)",
    )
    parser.switch(
        parser,
        "--exclude-initial",
        default=None,
        help="leave the initial network out, where the most concepts are looked for and in rho "
        "(default: as published, out of the former in resnets only)",
    )
    parser.switch(
        parser,
        "--all-images",
        help="all images that were tried in all runs, rejected ones, too; these have results at "
        "the last checkpoint, with --keep-rejected of train/sigma.py at all of --checkpoints",
    )
    flag(
        parser,
        "--pictures",
        type=natural,
        default=4,
        metavar="N",
        help="images in heatmaps.png",
    )
    return parser


def runs_of(options: dict) -> dict[str, Path]:
    """The sigma runs by role."""
    if options["student"] is None and options["baseline"] is None:
        if options["teacher"] is not None:
            raise UsageError("--teacher needs --student and --baseline")
        student, baseline = find_pair(Path("output"))
        return {"student": student, "baseline": baseline}
    for role in ROLES[:2]:
        if options[role] is None:
            raise UsageError(f"give --{role}, too: networks are compared")
    paths = {role: options[role] for role in ROLES if options[role] is not None}
    for one, other in (("student", "baseline"), ("student", "teacher"), ("baseline", "teacher")):
        if one in paths and other in paths and paths[one].resolve() == paths[other].resolve():
            raise UsageError(f"--{one} and --{other} are the same run, {paths[one]}")
    return paths


def files_of(report: Report, pictures: int) -> dict[str, str | bytes]:
    """Contents by name."""
    shared = report.shared
    record = shared.runs["student"].record
    title = f"Quantified knowledge: {record['model']}, layer {record['layer']}, {record['dataset']}"
    files: dict[str, str | bytes] = {"curves.png": draw_curves(report, title)}
    links = {"concepts over epochs and path length": "curves.png"}
    chosen = shared.ids[:pictures]
    if chosen:
        path = shared.paths["student"]
        images = {i: read_image(path, i, record["grid"])["image"] for i in chosen}
        files["heatmaps.png"] = draw_maps(report, images, title)
        links["entropies of cells; dots are concepts"] = "heatmaps.png"
    return files | {
        "knowledge.csv": knowledge_csv(report),
        "curves.csv": curves_csv(report),
        "counts.csv": counts_csv(report),
        "stability.csv": stability_csv(report),
        "unselected.csv": unselected_csv(report),
        "knowledge.md": as_markdown(report, title, links),
    }


if __name__ == "__main__":
    sys.exit(main())
