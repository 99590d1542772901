"""The flags scripts share, in groups; names are timm's where timm has one."""

from __future__ import annotations

from typing import Any

from kdfast.models.initial import INITS
from kdfast.training.compiled import MODES
from kdfast.training.parser import Parser
from kdfast.training.schedules import SCHEDULES
from kdfast.training.values import (
    amount,
    assignment,
    factor,
    fraction,
    natural,
    number,
    positive,
    share,
)


def image_flags(parser: Parser) -> Any:
    """Which images there are, and what networks are fed; returns the group of flags."""
    group = parser.add_argument_group("data")
    flag = parser.flag
    flag(
        group,
        "--dataset",
        default="digits",
        help="digits, fashion-mnist, cifar10, cifar100, tiny-imagenet, imagenet, flowers102, "
        "aircraft, cub200, dogs120, voc, voc-animal, mix320 and ilsvrc-mammals (cut to their "
        "boxes), folder, lists "
        "(train.txt, val.txt and perhaps test.txt, or .csv, each row an image file and its "
        "label), or a name of timm's create_dataset such as torch/cifar10 or "
        "hfds/owner/name",
    )
    flag(group, "--data-dir", metavar="PATH", help="where the set's files are")
    parser.switch(group, "--download", help="fetch the set first where the library can")
    flag(group, "--train-split", help="name of the training split, or of its folder or list")
    flag(group, "--val-split", help="name of the evaluation split")
    flag(group, "--test-split", help="name of a third split, which selects nothing")
    flag(
        group,
        "--box-margin",
        type=factor,
        metavar="FACTOR",
        help="enlarge boxes so many times a side; black where the image ends (default: 1; 1.5 for "
        "ilsvrc-mammals)",
    )
    flag(
        group,
        "--train-half",
        choices=("a", "b"),
        help="train on half of the images of every class: a are the first, b the others",
    )
    flag(
        group, "--train-limit", type=positive, metavar="N", help="train on the first N images only"
    )
    flag(
        group,
        "--eval-limit",
        type=positive,
        metavar="N",
        help="evaluate and test on the first N only",
    )
    flag(group, "--num-classes", type=positive, help="class count of a set that does not say")
    flag(
        group,
        "--img-size",
        type=positive,
        help="side of the images fed to the network (default: the set's own or the network's)",
    )
    flag(
        group,
        "--mean",
        type=number,
        nargs=3,
        help="per-channel mean in [0, 1] (default: the set's own or the network's)",
    )
    flag(group, "--std", type=number, nargs=3, help="per-channel standard deviation")
    flag(
        group,
        "--cache-images",
        choices=("auto", "always", "never"),
        default="auto",
        help="decode image files once and keep their pixels, in memory that loader processes "
        "share; results do not depend on it; auto: where the training images take at most 8 GiB "
        "and half of the free memory",
    )
    return group


def data_flags(parser: Parser) -> None:
    """`image_flags`, and how images are augmented and loaded."""
    group = image_flags(parser)
    flag = parser.flag
    flag(
        group,
        "--train-crop-mode",
        choices=("pad", "rrc", "rkrc", "crop", "none"),
        help="pad: pad and cut back; rrc, rkrc: random resized crop; crop: resize both sides to "
        "--train-resize and cut (default: pad on sets of small images, else rrc)",
    )
    flag(
        group,
        "--train-resize",
        type=positive,
        metavar="SIDE",
        help="crop mode crop: pixels of both sides before it cuts (default: 8/7 of --img-size)",
    )
    flag(group, "--crop-padding", type=natural, default=4, help="pixels for crop mode pad")
    flag(
        group,
        "--padding-mode",
        choices=("zeros", "reflect"),
        default="zeros",
        help="what crop mode pad fills with",
    )
    flag(
        group,
        "--hflip",
        type=fraction,
        help="probability of a horizontal flip (default: 0.5; 0 on digits)",
    )
    flag(group, "--vflip", type=fraction, help="probability of a vertical flip (default: 0)")
    flag(
        group,
        "--rotation",
        type=amount,
        metavar="DEGREES",
        help="turn by up to so many degrees, in other crop modes than rrc and rkrc (default: 0)",
    )
    flag(group, "--scale", type=number, nargs=2, default=[0.08, 1.0], help="area range of rrc")
    flag(group, "--ratio", type=number, nargs=2, default=[3 / 4, 4 / 3], help="ratio range of rrc")
    flag(
        group,
        "--color-jitter",
        type=amount,
        default=0.0,
        help="range of brightness, contrast and saturation around 1",
    )
    flag(
        group,
        "--hue-jitter",
        type=amount,
        help="range of hue around 0, up to 0.5, with or "
        "without --color-jitter; not with --aa (default: 0)",
    )
    flag(group, "--aa", metavar="POLICY", help="timm AutoAugment policy, with rrc or rkrc")
    flag(
        group,
        "--crop-mode",
        choices=("center", "squash", "border"),
        help="where images are not augmented; center: cut the middle out of them; squash: resize "
        "both sides without keeping the ratio; border: add borders (default: center)",
    )
    parser.switch(
        group, "--aug", default=True, help="augment; --no-aug trains on the evaluation pipeline"
    )
    flag(group, "--crop-pct", type=share, default=0.875, help="centre crop of larger images")
    flag(
        group,
        "--interpolation",
        choices=("bilinear", "bicubic", "nearest"),
        default="bilinear",
        help="how images are resized",
    )
    flag(
        group,
        "--on-device",
        choices=("auto", "always", "never"),
        default="auto",
        help="keep images as bytes on the training device, and crop and flip them there, without "
        "loader processes; results do not depend on it; auto: where all have the size that the "
        "network is fed, crop mode is pad or none, --hflip 0 or 0.5 and nothing else augments, "
        "and they take at most a quarter of the device's free memory",
    )
    flag(
        group,
        "-j",
        "--workers",
        type=natural,
        help="loader processes; results do not depend "
        "on it (default: 0 for sets in memory on a CPU, else up to 4)",
    )


def model_flags(parser: Parser, *, student: bool, init: str | None = None) -> None:
    group = parser.add_argument_group("student" if student else "model")
    names = ("--model", "--student") if student else ("--model",)
    parser.flag(
        group,
        *names,
        default="cifar_resnet8" if student else "cifar_resnet20",
        metavar="NAME",
        help="any timm name, or module.path:function",
    )
    parser.switch(
        group,
        "--pretrained",
        help="start from published weights, of timm or of torchvision.models:NAME",
    )
    parser.flag(group, "--initial-checkpoint", metavar="PATH", help="start from these weights")
    parser.flag(
        group,
        "--model-kwargs",
        type=assignment,
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="arguments for the model's constructor",
    )
    parser.flag(
        group,
        "--init",
        choices=INITS,
        default=init,
        help="weights of a new network: as the model's code draws them; kaiming-normal: "
        "convolutions and linear layers Kaiming normal with fan-in; vgg: as torchvision draws VGG, "
        "with fan-out and linear layers from N(0, 0.01^2)" + " (default: model)" * (init is None),
    )
    parser.flag(
        group,
        "--reset-layers",
        nargs="+",
        metavar="LAYER",
        help="draw these modules anew, as --init vgg does, once weights are loaded",
    )


def path_flags(parser: Parser) -> None:
    group = parser.add_argument_group("path length")
    parser.flag(
        group,
        "--path-length",
        nargs="*",
        metavar="LAYER",
        help="measure how far the weights of these modules travel, into path_length.csv; not with "
        "--model-ema (default, and without a LAYER: none; default of method layer: the last "
        "convolution or linear layer up to the matched one, shortcuts aside)",
    )


def pruning_flags(parser: Parser) -> None:
    parser.flag(
        parser.add_argument_group("pruning"),
        "--prune",
        type=amount,
        nargs=2,
        metavar=("CONV", "FC"),
        help="before training set the weights of convolutions and linear layers to zero whose "
        "magnitude is below this many standard deviations of their layer's, and keep them there; "
        "0.2 1.0 are published",
    )


def training_flags(parser: Parser) -> None:
    flag, switch = parser.flag, parser.switch
    group = parser.add_argument_group("optimisation")
    flag(group, "--epochs", type=positive, default=240, help="passes over the training set")
    flag(group, "-b", "--batch-size", type=positive, help="images per process and forward pass")
    flag(
        group,
        "--global-batch-size",
        type=positive,
        help="images per optimizer step over all processes; the recipe's way to give the batch",
    )
    flag(group, "--grad-accum-steps", type=positive, default=1, help="forward passes per step")
    switch(group, "--drop-last", help="leave an uneven last training batch out")
    switch(
        group,
        "--eval-drop-last",
        help="leave an uneven last evaluation batch out, as one published table did",
    )
    flag(
        group,
        "--opt",
        default="momentum",
        help="any timm optimizer; momentum is SGD without Nesterov, sgd with",
    )
    flag(group, "--lr", type=amount, default=0.05, help="base learning rate")
    flag(group, "--momentum", type=fraction, default=0.9, help="where the optimizer has one")
    flag(group, "--weight-decay", type=amount, default=5e-4, help="on all parameters")
    switch(group, "--filter-bias-and-bn", help="no weight decay on biases and normalisation")
    flag(group, "--clip-grad", type=amount, help="largest gradient norm")
    flag(group, "--smoothing", type=fraction, default=0.0, help="label smoothing")
    switch(
        group,
        "--freeze-bn",
        help="normalise the trained network with its running statistics, left as they are",
    )
    flag(
        group,
        "--val-interval",
        type=positive,
        default=1,
        metavar="N",
        help="evaluate after every N epochs, and after the last one",
    )
    switch(group, "--model-ema", help="keep, evaluate and save an average of the weights")
    flag(group, "--model-ema-decay", type=fraction, default=0.9998, help="of that average")

    group = parser.add_argument_group("learning rate")
    flag(
        group,
        "--sched",
        choices=SCHEDULES,
        default="multistep",
        help="schedule; plateau: drops when the evaluation loss stalls",
    )
    switch(group, "--sched-on-updates", help="change the rate at every step, for timm's schedules")
    flag(
        group,
        "--decay-milestones",
        type=natural,
        nargs="+",
        default=[150, 180, 210],
        help="multistep: epochs trained before each drop",
    )
    flag(group, "--decay-epochs", type=positive, default=30, help="step: epochs between drops")
    flag(
        group,
        "--decay-rate",
        type=amount,
        default=0.1,
        help="step, multistep, plateau: factor of a drop; poly: its power",
    )
    flag(
        group,
        "--patience-epochs",
        type=natural,
        metavar="N",
        help="plateau: evaluations without a lower loss that are borne before a drop (default: 10)",
    )
    flag(group, "--decades", type=amount, default=2.0, help="log: powers of ten from first to last")
    flag(group, "--warmup-epochs", type=natural, default=0, help="linear warm-up")
    flag(group, "--warmup-lr", type=amount, default=1e-5, help="where timm's warm-up starts")
    flag(group, "--min-lr", type=amount, default=0.0, help="where timm's schedules end")

    group = parser.add_argument_group("machine")
    flag(
        group,
        "--mixed-precision",
        choices=("no", "bf16", "fp16"),
        help="(default: what accelerate launch says, else no)",
    )
    flag(
        group,
        "--threads",
        type=positive,
        help="CPU threads a process (default: the machine's cores shared among its processes)",
    )
    switch(group, "--amp", help="the same as --mixed-precision bf16")
    switch(
        group,
        "--sync-bn",
        help="batch statistics over all processes, on GPUs; on CPUs use --freeze-bn",
    )
    switch(
        group,
        "--deterministic",
        help="only operations that give the same bits in every run; on a CPU all do",
    )
    switch(group, "--channels-last", help="NHWC memory format")
    switch(group, "--torchcompile", help="compile the training step")
    flag(
        group,
        "--compile-mode",
        choices=MODES,
        help="of torch.compile; the others replay CUDA graphs (default: reduce-overhead on a GPU "
        "without --grad-accum-steps, else default)",
    )
    flag(
        group,
        "--ops",
        choices=("auto", "fused", "reference"),
        help="kdfast's own operations: "
        "compiled, plain PyTorch, or what is there (default: $KDFAST_OPS, else auto)",
    )


def run_flags(parser: Parser, *, recipe: str = "crd") -> None:
    """`recipe` is taken on other sets than digits when none is given."""
    flag = parser.flag
    parser.recipe = recipe
    group = parser.add_argument_group("run")
    flag(group, "-c", "--config", metavar="FILE", help="YAML of flags; flags given here win")
    flag(
        group,
        "--recipe",
        metavar="NAME",
        help=f"published settings by name or .yaml file (default: digits on digits, else {recipe})",
    )
    parser.switch(group, "--print-config", help="print the merged options as YAML and stop")
    flag(group, "--output", default="output", metavar="PATH", help="where run folders go")
    flag(
        group,
        "--experiment",
        metavar="NAME",
        help="name of the run folder (default: from the script, set, method, networks and seed)",
    )
    flag(
        group,
        "--resume",
        metavar="PATH",
        help="go on from a run folder, or `auto`: from this run's own folder if it is there",
    )
    flag(group, "--checkpoint-hist", type=positive, default=2, help="checkpoints kept")
    flag(
        group,
        "--checkpoint-steps",
        type=positive,
        metavar="N",
        help="also save every N steps within an epoch (default: after each epoch)",
    )
    flag(
        group,
        "--profile",
        type=positive,
        metavar="N",
        help="record N training steps in profile/ of the run folder",
    )
    parser.switch(
        group,
        "--eval-only",
        help="score the weights of --initial-checkpoint, --pretrained or --resume PATH, and stop",
    )
    flag(
        group,
        "--save-epochs",
        type=natural,
        nargs="+",
        default=[],
        help="epochs whose weights are kept in weights/; 0 is the network as training begins",
    )
    flag(group, "--log-interval", type=positive, default=50, help="steps between readings")
    flag(group, "--seed", type=natural, default=0, help="of everything random")
    flag(
        group,
        "--seeds",
        type=natural,
        nargs="+",
        metavar="SEED",
        help="one run after the other with these seeds, each in its own folder",
    )
