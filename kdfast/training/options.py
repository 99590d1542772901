"""A script's options: parsed, merged, and checked as far as that needs no data, model or device."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from timm.optim import get_optimizer_info, list_optimizers

from kdfast.data import dataset_name
from kdfast.errors import UsageError, unknown
from kdfast.methods import expand
from kdfast.models import resolve_name
from kdfast.training.parser import Parser, merge
from kdfast.training.schedules import OWN_SCHEDULES
from kdfast.training.transfer_flags import every_key


def parse(parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
    """Merge and check what can be checked without data, model or device."""
    options = merge(
        parser,
        argv,
        default_recipe=lambda dataset: "digits" if dataset == "digits" else parser.recipe,
        foreign=every_key() - set(parser.actions()),
        canonical=_canonical,
    )
    options.model_kwargs = dict(getattr(options, "model_kwargs", ()))
    if options.amp:
        if options.mixed_precision not in (None, "bf16"):
            raise UsageError(f"--amp contradicts --mixed-precision {options.mixed_precision}")
        options.mixed_precision = "bf16"
    options.dataset = dataset_name(options.dataset)
    if options.batch_size and "global_batch_size" not in options.given:
        options.global_batch_size = None  # the recipe's, which -b replaces
    check_optimizer("--opt", options.opt)
    for flag, bounds in (("--scale", options.scale), ("--ratio", options.ratio)):
        if not 0 < bounds[0] <= bounds[1]:
            text = " ".join(f"{bound:g}" for bound in bounds)
            raise UsageError(f"{flag} needs two numbers above 0, the smaller first, got {text}")
    if options.sched in OWN_SCHEDULES or options.sched == "plateau":
        if options.sched_on_updates and "sched_on_updates" in options.given:
            raise UsageError(
                f"--sched {options.sched} changes once an epoch; drop --sched-on-updates"
            )
        if options.patience_epochs is None and options.sched == "plateau":
            options.patience_epochs = 10
        options.sched_on_updates = False  # the recipe meant it for the schedule it names
    elif "patience_epochs" in options.given:
        raise UsageError(
            f"--patience-epochs is of --sched plateau, not of {options.sched}; drop it"
        )
    _check_augmentation(options, augments=parser.fallbacks["aug"])
    if options.warmup_epochs > options.epochs:
        raise UsageError(
            f"--warmup-epochs {options.warmup_epochs} is longer than --epochs {options.epochs}"
        )
    if options.seeds:
        if "seed" in options.given:
            raise UsageError("--seed and --seeds contradict each other; give one of them")
        if len(set(options.seeds)) < len(options.seeds):
            raise UsageError(f"--seeds {' '.join(map(str, options.seeds))} repeats a seed")
        if options.resume not in (None, "auto"):
            raise UsageError("--resume PATH is one run; with --seeds give --resume auto")
        if options.eval_only:
            raise UsageError("--eval-only scores one network; drop --seeds")
    if "init" in options.given and options.init != "model":
        for key in ("pretrained", "initial_checkpoint"):
            if getattr(options, key, None):
                raise UsageError(
                    f"--init {options.init} draws the weights that --{key.replace('_', '-')} "
                    "brings; drop one"
                )
    if options.model_ema and getattr(options, "path_length", None):
        whose = "" if "path_length" in options.given else f", of recipe {options.recipe},"
        raise UsageError(
            f"--path-length{whose} measures the weights that are trained, --model-ema keeps an "
            "average of them: drop one, or give --path-length without a layer"
        )
    if options.save_epochs and "save_epochs" not in options.given:
        kept = {epoch for epoch in options.save_epochs if epoch <= options.epochs}
        options.save_epochs = sorted(kept | {options.epochs})
    if max(options.save_epochs, default=0) > options.epochs:
        raise UsageError(f"--save-epochs {max(options.save_epochs)} is after the last epoch")
    return options


def _check_augmentation(options: argparse.Namespace, augments: bool) -> None:
    """Refuse typed flags of augmentation that would change nothing.

    Recipes and printed options may hold them. A recipe's side to resize to goes with its crop mode.
    A script that by itself `augments` nothing says why in its own words.
    """
    if options.train_resize and options.train_crop_mode != "crop":
        if "train_resize" in options.given:
            raise UsageError("--train-resize needs --train-crop-mode crop")
        options.train_resize = None
    if options.aug or not augments:
        return
    for dest in (
        "train_crop_mode", "train_resize", "hflip", "vflip", "rotation", "color_jitter",
        "hue_jitter", "aa",
    ):  # fmt: skip
        if dest in options.typed and getattr(options, dest):
            flag = dest.replace("_", "-")
            whose = "" if "aug" in options.given else f" of recipe {options.recipe}"
            raise UsageError(f"--{flag} has no effect with --no-aug{whose}; drop it, or give --aug")


def check_optimizer(flag: str, name: str) -> None:
    """Raise `UsageError` for an optimizer that timm lacks or the loop cannot run."""
    kind = name.lower().rpartition("_")[2]
    if kind not in list_optimizers():
        raise unknown(f"value of {flag}", name, list_optimizers())
    if get_optimizer_info(kind).second_order:
        raise UsageError(f"{flag} {name} needs second-order gradients; choose another")


def _canonical(key: str, word: str) -> list[str]:
    """The names that `word`, a value of flag `key`, stands for."""
    if key == "dataset":
        return [dataset_name(word)]
    if key in ("model", "model-a", "model-b", "student", "teacher"):
        return [resolve_name(word)]
    return expand(word) if key == "method" else [word]


def batch_size(options: argparse.Namespace, processes: int) -> int:
    """Images per process and forward pass, from `-b` or the global batch.

    Raises `UsageError` when the global batch does not divide evenly or contradicts `-b`.
    """
    share = processes * options.grad_accum_steps
    total, own = options.global_batch_size, options.batch_size
    if own and total in (None, own * share):
        return own
    if own:
        raise UsageError(
            f"--batch-size {own} x {processes} processes x {options.grad_accum_steps} accumulation "
            f"steps is {own * share}, not --global-batch-size {total}"
        )
    if not total:
        raise UsageError("give --batch-size or --global-batch-size")
    if total % share:
        raise UsageError(
            f"global batch {total} does not divide by {processes} processes x "
            f"{options.grad_accum_steps} accumulation steps; give --batch-size"
        )
    return total // share
