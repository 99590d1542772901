"""The flags of sigma training and their merging; no network is trained by them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from kdfast.data import dataset_name
from kdfast.errors import UsageError
from kdfast.training.flags import image_flags
from kdfast.training.parser import Parser, merge
from kdfast.training.sigma import SigmaSettings
from kdfast.training.transfer_flags import every_key
from kdfast.training.values import amount, natural, number, positive, share

# On digits, so that two networks take about two minutes on two cores.
_SHORT = {"samples": 16, "images": 4, "candidates": 40, "in_common": True}


def sigma_flags(parser: Parser) -> None:
    """All flags of train/sigma.py."""
    flag, switch = parser.flag, parser.switch
    group = parser.add_argument_group("networks")
    flag(
        group,
        "runs",
        nargs="*",
        default=[],
        metavar="RUN",
        help="run folders with snapshots in weights/ (--save-epochs of train/classifier.py and "
        "train/distill.py); all are asked about the same images",
    )
    flag(
        group,
        "--weights-dir",
        metavar="PATH",
        help="instead of RUN: a folder of epoch-NNNN.safetensors",
    )
    flag(
        group,
        "--layer",
        metavar="LAYER",
        help="layer by dotted name; NAME:in is a layer's input; ReLU is applied to it (default: "
        "the one that RUNs were distilled at, else the last-but-one stage before its activation)",
    )
    flag(
        group,
        "--checkpoints",
        type=natural,
        nargs="+",
        metavar="EPOCH",
        help="(default: every snapshot; of runs of more than 40 epochs that kept them 0 2 5 10 15 "
        "20 25 30 40 50 70 90 110 130 150 170 190 240 280 320 360 400, and the last one)",
    )
    image_flags(parser)
    group = parser.add_argument_group(
        "images", "Drawn from the training images, tried in that order, stopped at --images."
    )
    flag(group, "--candidates", type=positive, default=500, help="images drawn")
    flag(group, "--images", type=positive, default=50, metavar="N", help="images to accept")
    switch(
        group,
        "--in-common",
        help="go on until --images are accepted by every RUN; else each RUN stops at its own first "
        "--images, as published, and fewer may be common to all",
    )
    flag(
        group,
        "--accept-from",
        type=natural,
        metavar="EPOCH",
        help="from this checkpoint on the foreground must bear no more noise than the background, "
        "else the image is rejected (default: 40, or two thirds of a shorter training)",
    )
    flag(
        group,
        "--accept-lowest",
        type=share,
        default=1.0,
        metavar="SHARE",
        help="compare the means of this share of each region's cells, those that bear least",
    )
    switch(
        group,
        "--expand-foreground",
        help="enlarge the object by about an eighth: from an 18x18 map keep the central 16x16",
    )
    switch(
        group,
        "--keep-rejected",
        help="compute all checkpoints of rejected images too, to see what selection does",
    )
    s = SigmaSettings()
    group = parser.add_argument_group("sigma", "A sigma's value depends on all of these.")
    flag(group, "--grid", type=positive, default=s.grid, help="cells a side")
    flag(group, "--samples", type=positive, default=s.samples, help="noise samples a step")
    flag(group, "--initial-sigma", type=amount, default=s.initial, help="everywhere; of delta2 too")
    flag(
        group,
        "--sigma-range",
        type=amount,
        nargs=2,
        default=[s.low, s.high],
        metavar=("LOW", "HIGH"),
        help="what sigma is clamped to",
    )
    flag(group, "--sigma-lr", type=amount, default=s.lr, help="of plain SGD on sigma")
    flag(group, "--steps", type=positive, default=s.steps, help="gradient steps")
    flag(
        group,
        "--more-steps",
        type=natural,
        default=s.more_steps,
        help="further steps where the target was not passed",
    )
    flag(
        group,
        "--lambda",
        type=amount,
        help="weight of the mean entropy in the loss (default: 7; 6 for resnets)",
    )
    flag(
        group,
        "--escalation",
        type=amount,
        default=s.escalation,
        help="factor of lambda in the further steps",
    )
    flag(
        group,
        "--threshold",
        type=number,
        default=s.target,
        help="mean entropy, in nats, of the step that is selected",
    )
    switch(
        group, "--interpolate", help="take ln sigma on the line between the steps at the threshold"
    )
    switch(
        group,
        "--full-steps",
        help="go on after the threshold was passed; the same step is selected as long as the mean "
        "entropy rises",
    )
    _machine_flags(parser)
    _run_flags(parser)


def _machine_flags(parser: Parser) -> None:
    flag, switch = parser.flag, parser.switch
    group = parser.add_argument_group("machine")
    flag(
        group,
        "--image-batch",
        type=positive,
        default=8,
        metavar="B",
        help="images solved together in one process",
    )
    flag(
        group,
        "--chunk",
        type=positive,
        metavar="N",
        help="samples of an image in one forward pass; changes rounding only (default: what keeps "
        "a step below --memory; on a CPU as many as its caches serve well)",
    )
    flag(
        group,
        "--memory",
        type=amount,
        default=4.0,
        metavar="GIB",
        help="what a step may take, where neither --chunk nor an earlier part of the run says how "
        "many samples a pass has",
    )
    switch(group, "--tf32", help="TF32 products on a GPU, if the loss stays within 1 %%")
    flag(
        group,
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        help="NHWC memory format (default: on a CPU)",
    )
    flag(
        group,
        "--mixed-precision",
        choices=("no", "bf16", "fp16"),
        help="no: fewer bits than float32 round as much as is measured",
    )
    flag(
        group,
        "--threads",
        type=positive,
        help="CPU threads a process (default: the machine's cores shared among its processes)",
    )
    switch(group, "--deterministic", help="only operations that give the same bits in every run")
    flag(
        group,
        "--ops",
        choices=("auto", "fused", "reference"),
        help="kdfast's own operations: compiled, plain PyTorch, or what is there (default: "
        "$KDFAST_OPS, else auto)",
    )


def _run_flags(parser: Parser) -> None:
    flag = parser.flag
    group = parser.add_argument_group("run")
    flag(group, "-c", "--config", metavar="FILE", help="YAML of flags; flags given here win")
    parser.switch(group, "--print-config", help="print the merged options as YAML and stop")
    flag(group, "--output", default="output", metavar="PATH", help="where run folders go")
    flag(
        group,
        "--experiment",
        metavar="NAME",
        help="name of the run folder; of several RUNs each adds its own (default: from the run "
        "and the layer)",
    )
    flag(
        group,
        "--resume",
        choices=("auto",),
        help="auto: go on with this run's own folder if it is there",
    )
    flag(group, "--seed", type=natural, default=0, help="of the candidates and of the noise")


def parse_sigma(parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
    """The merged options; raises `UsageError` for what can be refused without networks or data."""
    options = merge(
        parser,
        argv,
        default_recipe=lambda dataset: "digits",
        foreign=every_key() - set(parser.actions()),
    )
    del options.layers_of_methods, options.recipe
    if "channels_last" not in options.given:
        options.channels_last = None  # the recipe's is for training
    options.dataset = dataset_name(options.dataset)
    precision = options.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        raise UsageError(
            f"mixed precision {precision} is refused: sigma training measures feature changes as "
            "small as its rounding; it runs in float32"
        )
    options.mixed_precision = "no"
    options.sync_bn = options.freeze_bn = False
    if options.runs and options.weights_dir:
        raise UsageError("give RUN folders or --weights-dir, not both")
    if not options.runs and not options.weights_dir:
        if options.dataset != "digits":
            raise UsageError(
                f"no networks for {options.dataset}: train them with train/classifier.py or "
                "train/distill.py --save-epochs 0 2 5 ... and give their run folders"
            )
        for name, value in _SHORT.items():
            if name not in options.given:
                setattr(options, name, value)
    if options.in_common and len(options.runs) < 2 and (options.runs or options.weights_dir):
        raise UsageError("--in-common is of two RUNs or more")
    if options.images > options.candidates:
        raise UsageError(
            f"--images {options.images} of --candidates {options.candidates} cannot be accepted"
        )
    if len(set(map(os.path.realpath, options.runs))) < len(options.runs):
        raise UsageError("a RUN is named twice")
    return options


def settings_of(options: argparse.Namespace, weight: float) -> SigmaSettings:
    """The settings that the flags give; lambda is `weight`."""
    return SigmaSettings(
        grid=options.grid,
        samples=options.samples,
        initial=options.initial_sigma,
        low=options.sigma_range[0],
        high=options.sigma_range[1],
        lr=options.sigma_lr,
        steps=options.steps,
        more_steps=options.more_steps,
        weight=weight,
        escalation=options.escalation,
        target=options.threshold,
        interpolate=options.interpolate,
        full=options.full_steps,
    )
