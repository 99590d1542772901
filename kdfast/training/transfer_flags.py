"""The flags of knowledge transfer: teachers, methods, stages, chains, heads and generations."""

from __future__ import annotations

import argparse
from typing import Any

from kdfast.methods import Option, find_method, method_names
from kdfast.training.consistency_flags import pair_flags, tail_flags, transnet_flags
from kdfast.training.flags import (
    data_flags,
    model_flags,
    path_flags,
    pruning_flags,
    run_flags,
    training_flags,
)
from kdfast.training.parser import Parser
from kdfast.training.values import amount, assignment, fraction, inner, natural, positive


def teacher_flags(parser: Parser) -> Any:
    """Which network teaches; returns the group of flags."""
    flag = parser.flag
    group = parser.add_argument_group("teacher")
    flag(
        group,
        "--teacher",
        default="cifar_resnet20",
        metavar="NAME",
        help="any timm name, or module.path:function",
    )
    flag(
        group,
        "--teacher-checkpoint",
        metavar="PATH",
        help="its weights: a file, or a run folder (whose best weights are taken)",
    )
    parser.switch(group, "--teacher-pretrained", help="use published weights, as --pretrained")
    flag(
        group,
        "--teacher-kwargs",
        type=assignment,
        nargs="*",
        metavar="KEY=VALUE",
        help="arguments for its constructor (default: those its checkpoint was trained with)",
    )
    flag(
        group,
        "--teacher-epochs",
        type=positive,
        default=8,
        help="epochs of the teacher, and of heads, that are trained on digits when none are given",
    )
    answer_flags(parser, group)
    return group


def answer_flags(parser: Parser, group: Any) -> None:
    """How a frozen teacher answers."""
    parser.switch(
        group,
        "--fold-teacher",
        default=True,
        help="fold its batch normalisations into its convolutions: the same to rounding, but "
        "faster",
    )
    parser.switch(
        group,
        "--teacher-ahead",
        default=True,
        help="on a GPU, have it answer the next batch while the student trains on this one",
    )
    parser.flag(
        group,
        "--teacher-cache",
        default="auto",
        metavar="auto|never|PATH",
        help="keep the answers of a frozen teacher instead of computing them in every epoch; auto: "
        "in memory, where training images are the same in every epoch and the answers take at most "
        "a quarter of a GPU's free memory, or 4 GiB and half of the machine's; PATH: also in that "
        "folder, for later runs; augmented images are then replayed from it with the same seed",
    )


def distill_flags(parser: Parser) -> None:
    flag = parser.flag
    path_flags(parser)
    group = teacher_flags(parser)
    flag(
        group,
        "--heads",
        metavar="PATH",
        help="run folder of train/heads.py, for methods that use a teacher's auxiliary classifiers",
    )
    flag(
        group,
        "--teacher-bn",
        choices=("running", "batch"),
        default="running",
        help="batch reproduces a published loop that left the teacher in training mode",
    )

    flag(
        group,
        "--assistants",
        nargs="+",
        metavar="NAME[=PATH]",
        help="networks between teacher and student: each is distilled from the one before, "
        "or taken from a weights file or run folder",
    )
    flag(
        group, "--assistant-epochs", type=positive, metavar="N", help="of each (default: --epochs)"
    )

    names = method_names()
    group = parser.add_argument_group(
        "method", "The total loss is gamma * cross-entropy + the sum over methods of weight * term."
    )
    flag(
        group,
        "--method",
        nargs="+",
        metavar="NAME",
        help=f"one or several of {', '.join(names)}; none trains the student alone",
    )
    flag(
        group,
        "--gamma",
        type=amount,
        help="weight of cross-entropy (default: the recipe's, else 1 - alpha with kd, else 1)",
    )
    flag(
        group,
        "--beta",
        nargs="+",
        metavar="[NAME=]VALUE",
        help="weight of the other methods: one number, or at=1000 fsp=1",
    )
    flag(
        group,
        "--student-layers",
        nargs="+",
        metavar="LAYER",
        help="layers to match instead of the stages, by dotted name; NAME:in is a layer's input",
    )
    flag(
        group,
        "--teacher-layers",
        nargs="+",
        metavar="LAYER",
        help="as many of the teacher's (default, of method layer alone: the student's)",
    )
    parser.switch(
        group,
        "--baseline",
        default=None,
        help="also train the student alone, from the "
        "same initial weights (default: on digits only)",
    )
    flag(
        group,
        "--plugin",
        metavar="FILE.py",
        help="run a Python file of yours that defines methods (command line only)",
    )
    _method_flags(parser, group, names)
    first_stage_flags(parser)
    label_phase_flags(parser)
    lines = [f"  {name:8} {find_method(name).__doc__.strip().splitlines()[0]}" for name in names]
    parser.epilog = "\n".join(["methods:", *lines, "", parser.epilog or ""])


def first_stage_flags(parser: Parser) -> None:
    """`--init-...`; without the `init-`, the keys of a method's `init` in a recipe or config."""
    flag = parser.flag
    names = [name for name in method_names() if find_method(name).initialises]
    group = parser.add_argument_group(
        "first stage",
        f"{', '.join(names)}: the term alone trains the layers it reaches; then the student is "
        "trained without it. Rates drop by --decay-rate.",
    )
    flag(
        group,
        "--init-epochs",
        type=natural,
        metavar="N",
        help="epochs of the first stage; 0 trains in one stage (default: the recipe's, else 0)",
    )
    flag(group, "--init-lr", type=amount, help="its learning rate (default: --lr)")
    flag(
        group,
        "--init-decay-milestones",
        type=natural,
        nargs="*",
        metavar="EPOCH",
        help="its epochs trained before each drop (default: no drop)",
    )
    flag(group, "--init-opt", metavar="NAME", help="its optimizer (default: --opt)")
    flag(group, "--init-weight-decay", type=amount, help="(default: --weight-decay)")
    flag(group, "--init-momentum", type=fraction, help="(default: --momentum)")


def label_phase_flags(parser: Parser) -> None:
    group = parser.add_argument_group(
        "classifier",
        "After method layer: all up to the matched layer is frozen, the rest is trained with "
        "cross-entropy by SGD of momentum 0.9 and weight decay 1e-4, its rate times 0.3 when the "
        "evaluation loss has not improved for 10 epochs. The weights of the run stay as they are.",
    )
    parser.flag(
        group,
        "--classifier-epochs",
        type=natural,
        default=0,
        metavar="N",
        help="epochs of this phase (default: 0, without it)",
    )
    parser.flag(
        group, "--classifier-lr", type=amount, metavar="LR", help="learning rate it begins with"
    )


def _method_flags(parser: Parser, group: Any, names: list[str]) -> None:
    """The flags of the methods' options, with `--alpha`, the weight of kd.

    What several methods call the same is one flag, for all of them that are used.
    """
    shared: dict[str, list[tuple[str, str, Option]]] = {"--alpha": []} if "kd" in names else {}
    for name in names:
        for key, option in find_method(name).options().items():
            shared.setdefault(option.flag_of(name, key), []).append((name, key, option))
    for flag, uses in shared.items():
        said = [
            f"{name}: {option.help}{option.shown(' (default: {})')}" for name, _, option in uses
        ]
        if flag == "--alpha" and "kd" in names:
            said.insert(0, "kd: weight of the term (default: 0.9)")
            parser.flag(group, flag, type=amount, help="; ".join(said))
            continue
        option = uses[0][2]
        dest = "method:" + ",".join(f"{name}.{key}" for name, key, _ in uses)
        if isinstance(option.default, bool):
            kind: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        elif option.choices:
            kind = {"choices": option.choices}
        elif isinstance(option.default, tuple):
            kind = {"type": float, "nargs": "+", "metavar": "VALUE"}
        else:
            kind = {"type": option.kind or type(option.default), "metavar": "VALUE"}
        parser.flag(group, flag, dest=dest, help="; ".join(said), **kind)


def generation_flags(parser: Parser) -> None:
    """Those of a born-again chain: its length, where it starts, and its loss."""
    flag = parser.flag
    group = parser.add_argument_group("generations")
    flag(
        group,
        "--generations",
        type=positive,
        help="how many, generation 0 included (default: 5; 3 on digits)",
    )
    flag(
        group,
        "--start-generation",
        type=int,
        choices=(0, 1),
        default=0,
        help="0 trains generation 0 on labels alone; 1 takes --teacher-checkpoint for it",
    )
    flag(
        group,
        "--teacher",
        metavar="NAME",
        help="network of the given generation 0 (default: that of --model)",
    )
    flag(
        group,
        "--teacher-checkpoint",
        metavar="PATH",
        help="its weights: a file, or a run folder (whose last weights are taken)",
    )
    flag(
        group,
        "--teacher-kwargs",
        type=assignment,
        nargs="*",
        metavar="KEY=VALUE",
        help="arguments for its constructor (default: those its checkpoint was trained with)",
    )
    answer_flags(parser, group)
    group = parser.add_argument_group(
        "loss of generations 1 and up", "cross-entropy + lambda * cross-entropy with the teacher"
    )
    _method_flags(parser, group, ["born_again"])


def evolution_flags(parser: Parser) -> None:
    """Those of evolved generations: how many, how weights are split, how they are drawn."""
    flag = parser.flag
    group = parser.add_argument_group("generations")
    flag(
        group,
        "--generations",
        type=positive,
        default=5,
        help="how many, generation 0, the ordinary training, included",
    )
    flag(
        group,
        "--split-rate",
        type=inner,
        default=0.5,
        metavar="RATE",
        help="share of each layer's channels (kels) or weights (wels) that every generation "
        "inherits, between 0 and 1",
    )
    flag(
        group,
        "--split-mode",
        choices=("kels", "wels"),
        default="kels",
        help="kels: whole channels, which are a slim network; wels: single weights, drawn once",
    )
    flag(
        group,
        "--reset-init",
        choices=("uniform", "construction"),
        default="uniform",
        help="what the other weights are drawn from: uniform within 1 / sqrt(fan-in), as "
        "published, or what a new network has",
    )


def head_flags(parser: Parser) -> None:
    flag = parser.flag
    group = parser.add_argument_group("heads")
    flag(
        group,
        "--kind",
        choices=("linear", "deep"),
        default="linear",
        help="linear: on the frozen teacher, for dih; deep: trained together with it, for tofd",
    )
    flag(
        group,
        "--teacher-layers",
        nargs="+",
        metavar="LAYER",
        help="layers to mount heads on instead of the stages, shallow to deep; of --kind deep the "
        "last is the one that the network's own classifier follows",
    )
    flag(
        group,
        "--head-pool",
        type=positive,
        nargs="+",
        metavar="SIDE",
        help="average pool maps to this height and width before a linear head",
    )
    parser.switch(group, "--pretrained", help="deep: start from published weights")
    flag(group, "--initial-checkpoint", metavar="PATH", help="deep: start from these weights")


def every_key() -> set[str]:
    """The YAML keys of all scripts: a recipe serves them all."""
    parser = Parser()
    for add in (data_flags, distill_flags, training_flags, pruning_flags, run_flags):
        add(parser)
    model_flags(parser, student=True)
    # Groups of other scripts, whose flags of the same name are not quite the same.
    keys = set(parser.actions())
    groups = (pair_flags, transnet_flags, tail_flags)
    for add in (head_flags, generation_flags, evolution_flags, *groups):
        other = Parser()
        add(other)
        keys |= set(other.actions())
    return keys
