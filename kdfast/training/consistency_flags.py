"""The flags of knowledge consistency: which two networks, at which layer, and the Trans-Net."""

from __future__ import annotations

import argparse

from kdfast.errors import UsageError
from kdfast.training.parser import Parser
from kdfast.training.values import amount, assignment, orders, positive

PAIRS = ("seeds", "halves", "weak", "pruned", "generations", "same")


def pair_flags(parser: Parser) -> None:
    """Networks A and B, the layer in each, and where their features come from.

    For a parser that has the flags of data.
    """
    flag = parser.flag
    parser.fallbacks["aug"] = False  # features are of images as they are
    group = parser.add_argument_group(
        "pair", "B's feature is explained from A's, both of the same image and of one shape."
    )
    flag(
        group,
        "--model",
        metavar="NAME",
        help="both networks: any timm name, or module.path:function (default: what each weights "
        "file says it is, else cifar_resnet20)",
    )
    flag(group, "--model-a", metavar="NAME", help="network A, where it is another than B")
    flag(group, "--model-b", metavar="NAME", help="network B")
    flag(
        group,
        "--model-kwargs",
        type=assignment,
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="arguments for both constructors (default: those the weights were trained with)",
    )
    flag(
        group,
        "--checkpoint-a",
        metavar="PATH",
        help="A's weights: a file, or a run folder (whose best weights are taken)",
    )
    flag(
        group,
        "--checkpoint-b",
        nargs="+",
        metavar="PATH",
        help="B's weights; several are compared with A one after the other, and a chain folder of "
        "train/born_again.py stands for its generations",
    )
    flag(
        group,
        "--layer",
        metavar="LAYER",
        help="layer in both networks, by dotted name; NAME:in is a layer's input (default: the "
        "last-but-one stage before its last activation, of cifar_resnet20 layer2.2.act2:in)",
    )
    flag(group, "--layer-a", metavar="LAYER", help="layer in A, where it is another than in B")
    flag(group, "--layer-b", metavar="LAYER", help="layer in B")
    flag(
        group,
        "--pair",
        choices=PAIRS,
        default="seeds",
        help="what A and B are when no checkpoints are given: two seeds, two halves of the "
        "training images, a weak and a strong network, a pruned one and its original, born-again "
        "generations, or one network twice",
    )
    parser.switch(
        group,
        "--shuffle-pairs",
        help="take B's features of other images than A's: the control, in which nothing is shared",
    )
    flag(
        group,
        "--features",
        choices=("cache", "live"),
        default="cache",
        help="cache: compute every feature once and keep it on disk; live: run both networks in "
        "every pass",
    )
    flag(
        group,
        "--feature-dir",
        metavar="PATH",
        help="where feature caches go (default: features/ below --output)",
    )
    flag(
        group,
        "--feature-dtype",
        choices=("float16", "bfloat16"),
        default="float16",
        help="of the cache, with a float32 scale a channel",
    )


def transnet_flags(parser: Parser) -> None:
    """The Trans-Net itself and what its loss weighs."""
    flag = parser.flag
    group = parser.add_argument_group(
        "Trans-Net", "The loss is the mean squared error + the sum over gates of alpha * p^2."
    )
    flag(
        group,
        "--layers",
        type=positive,
        default=3,
        metavar="K",
        help="convolutions, with a gated nonlinearity between each two: orders 0 to K - 1",
    )
    flag(
        group,
        "--alpha",
        type=amount,
        nargs="+",
        default=[0.1],
        metavar="VALUE",
        help="weight of p^2: one for all gates, or one for each of the K - 1",
    )
    parser.switch(group, "--freeze-gates", help="leave every gate p at 0.5")
    flag(
        group,
        "--feature-dump",
        metavar="PATH",
        help="take the training features of A and B from the records that the published code has "
        "written into this folder (torch files 000000.pt, ...)",
    )


def tail_flags(parser: Parser) -> None:
    """Which orders B's tail is fine-tuned on, and what is trained beside them."""
    flag = parser.flag
    group = parser.add_argument_group(
        "trans-classifier", "B's tail is fine-tuned on orders of what g finds in A's feature."
    )
    flag(
        group,
        "--orders",
        type=orders,
        nargs="+",
        metavar="MASK",
        help="the orders of each sub-run, one digit each, 1 to keep it, order 0, the linear one, "
        "first (default: the first, the first two, and so on: 100 110 111 for K = 3)",
    )
    parser.switch(
        group, "--own", default=True, help="also fine-tune B's tail on B's own raw feature"
    )


def refuse_augmentation(options: argparse.Namespace, why: str) -> None:
    """Refuse flags of training images; `why` ends the error. Raises `UsageError`."""
    changed = {
        "aug": options.aug,
        "hflip": options.hflip,
        "vflip": options.vflip,
        "rotation": options.rotation,
        "hue_jitter": options.hue_jitter,
        "aa": options.aa,
        "color_jitter": options.color_jitter,
        "train_crop_mode": options.train_crop_mode not in (None, "none"),
        "on_device": options.on_device == "always",
    }
    found = [dest for dest, value in changed.items() if value and dest in options.given]
    # Printed options, which may be given again, always have these.
    found += [dest for dest in ("scale", "ratio", "crop_padding") if dest in options.typed]
    if found:
        flag = found[0].replace("_", "-")
        raise UsageError(f"--{flag} is for training classifiers: {why}; drop it")
