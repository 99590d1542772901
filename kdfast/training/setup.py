"""From options to the things a training run is made of."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs
from timm.data import resolve_data_config
from timm.layers import convert_sync_batchnorm
from torch import nn

from kdfast import ops
from kdfast.data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Augmentation,
    BatchPlan,
    ImageData,
    Normalise,
    Source,
    eval_transform,
    open_data,
    train_transform,
)
from kdfast.data.transforms import Pipeline, Transform
from kdfast.errors import UsageError, UserError
from kdfast.models import (
    architecture,
    create_model,
    find_layer,
    fixed_input_size,
    input_size,
    load_weights,
    read_weights,
)
from kdfast.models.initial import initialise
from kdfast.seeding import derive_seed
from kdfast.training import on_device, processes
from kdfast.training.compiled import Compiled
from kdfast.training.image_cache import cache_images
from kdfast.training.journal import say
from kdfast.training.options import batch_size
from kdfast.training.run_folder import on_main


def start(options: argparse.Namespace) -> Accelerator:
    """The accelerator of this process: GPU where there is one, else CPU, one process or many."""
    gpu = torch.cuda.is_available()
    precision = options.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16", "fp16"):
        raise UsageError(f"mixed precision {precision} is not supported; use bf16, fp16 or no")
    if precision == "fp16" and not gpu:
        raise UsageError("--mixed-precision fp16 needs a GPU; use bf16 on a CPU")
    if options.sync_bn and not gpu:
        raise UsageError("--sync-bn needs GPUs; on CPUs use --freeze-bn")
    if options.sync_bn and options.freeze_bn:
        raise UsageError("--sync-bn and --freeze-bn contradict each other")
    if options.deterministic:
        # Read by cuBLAS when it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(options.deterministic)
    if options.ops:
        try:
            ops.use(options.ops)
        except RuntimeError as error:
            raise UserError(str(error)) from None
    if getattr(options, "torchcompile", False):
        Compiled(options, torch.device("cuda" if gpu else "cpu"))  # refuses impossible modes
    elif getattr(options, "compile_mode", None):
        raise UsageError("--compile-mode is of --torchcompile, which is not given")
    wrapper = gradient_sharing(gpu, accumulates=getattr(options, "grad_accum_steps", 1) > 1)
    warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")
    options.mixed_precision = precision  # what is recorded is what ran, whoever chose it
    threads = options.threads or (None if gpu else _own_cores())
    accelerator = Accelerator(cpu=not gpu, mixed_precision=precision, kwargs_handlers=[wrapper])
    if threads:
        torch.set_num_threads(threads)
    processes.start(os.path.basename(sys.argv[0]))
    return accelerator


def gradient_sharing(gpu: bool, *, accumulates: bool) -> DistributedDataParallelKwargs:
    """How the processes of a run add up their gradients, on GPUs or on CPUs."""
    # Cross-entropy is in the graph at any gamma, so every parameter of a student is used; in a
    # first stage, which has none, those without a gradient do not ask for one. The graph is then
    # the same in every step. A static one, however, is learnt in the first backward, which must not
    # be one that only accumulates.
    # On a CPU, looking for unused ones keeps DDP from regrouping gradients after the first step: a
    # resumed run of three or more processes would add them in another order.
    # Buffers need no broadcast in every step: running statistics are the main process's at the end
    # of an epoch, and a contrast memory is the same everywhere.
    return DistributedDataParallelKwargs(
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        find_unused_parameters=not gpu,
        static_graph=gpu and not accumulates,
    )


def _own_cores() -> int | None:
    """This process's share of the machine's cores; None when the user decided.

    Launchers set OMP_NUM_THREADS themselves, to 1 or to physical cores, which halves the speed of
    a process that has the machine to itself; without a launcher the variable is the user's word.
    """
    launched = any(name.startswith(("ACCELERATE_", "TORCHELASTIC_")) for name in os.environ)
    if "OMP_NUM_THREADS" in os.environ and not launched:
        return None
    linux = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if linux else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def load_data(options: argparse.Namespace, accelerator: Accelerator) -> ImageData:
    """The image set; with --download one process fetches it, then all open it.

    A small set of image files is decoded once, as --cache-images says.
    """
    if options.download:
        on_main(accelerator, lambda: _open(options, download=True) and None)
    return cache_images(options, _open(options, download=False))


def _open(options: argparse.Namespace, *, download: bool) -> ImageData:
    return open_data(
        options.dataset,
        options.data_dir,
        download=download,
        train_split=options.train_split,
        eval_split=options.val_split,
        test_split=options.test_split,
        classes=options.num_classes,
        box_margin=options.box_margin,
        train_half=options.train_half,
        train_limit=options.train_limit,
        eval_limit=options.eval_limit,
    )


@dataclass(frozen=True)
class Inputs:
    """What a network is fed: height and width in pixels, mean and std per channel in [0, 1]."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def choose_inputs(options: argparse.Namespace, data: ImageData, model: nn.Module) -> Inputs:
    """Flags first, then the set's own size and figures, then what the model was built for.

    Weights that exist already bring their own mean and std along; a recipe's are those of its set.
    """
    config = resolve_data_config(model=model) if hasattr(model, "pretrained_cfg") else {}
    side = data.image_size
    if options.img_size:
        size = (options.img_size, options.img_size)
    elif side is None or fixed_input_size(model):
        size = tuple(input_size(model)[1:])
    else:
        size = (side, side)
    if fixed_input_size(model) and size != tuple(input_size(model)[1:]):
        raise UsageError(
            f"{architecture(model)} takes {input_size(model)[1]} pixel images, not {size[0]}"
        )
    figures = config.get("mean", IMAGENET_MEAN), config.get("std", IMAGENET_STD)
    if options.initial_checkpoint:
        path = weights_path(options.initial_checkpoint)
        recorded = recorded_inputs(path, read_weights(path)[1])
        figures = (recorded.mean, recorded.std) if recorded else figures
    elif not options.pretrained:
        own = options.mean or data.mean, options.std or data.std
        figures = tuple(a or b for a, b in zip(own, figures, strict=True))
    mean, std = (
        getattr(options, name) if name in options.given else figure
        for name, figure in zip(("mean", "std"), figures, strict=True)
    )
    if min(std) <= 0:
        raise UsageError(f"--std must be above 0, got {' '.join(map(str, std))}")
    return Inputs(size, tuple(mean), tuple(std))


def try_out(model: nn.Module, inputs: Inputs, classes: int) -> None:
    """Refuse a network that cannot take such images or does not answer with a logit a class."""
    name, size = architecture(model), f"{inputs.size[0]}x{inputs.size[1]}"
    training = model.training
    try:
        with torch.no_grad():
            answer = model.eval()(torch.zeros(1, 3, *inputs.size))
    except (RuntimeError, ValueError, TypeError, AssertionError, LookupError) as error:
        raise UsageError(
            f"{name} fails on {size} images: {str(error) or type(error).__name__}; "
            "choose another --img-size or another network"
        ) from None
    finally:
        model.train(training)
    shape = list(answer.shape) if isinstance(answer, torch.Tensor) else type(answer).__name__
    if shape != [1, classes]:
        raise UsageError(
            f"{name} answers one image with {shape}, not with the {classes} logits of a classifier"
        )


def recorded_inputs(path: Path, known: dict[str, Any]) -> Inputs | None:
    """What the network in weights file `path` was trained on; None where `known` does not say."""
    if not {"input_size", "mean", "std"} <= known.keys():
        return None
    try:
        _, height, width = map(int, known["input_size"])
        mean, std = (tuple(float(x) for x in known[key]) for key in ("mean", "std"))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: no numbers in its input_size, mean or std: {error}") from None
    if min(height, width) < 1 or len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise UserError(f"{path}: its input_size, mean or std is impossible")
    return Inputs((height, width), mean, std)


def build_model(options: argparse.Namespace, classes: int, *, seed_name: str) -> nn.Module:
    """The network to train, its weights drawn from (seed, `seed_name`) alone."""
    torch.manual_seed(derive_seed(options.seed, seed_name))
    model = create_model(
        options.model,
        classes,
        pretrained=options.pretrained,
        img_size=options.img_size,
        **options.model_kwargs,
    )
    init = getattr(options, "init", None)
    if init and not (options.pretrained or options.initial_checkpoint):
        initialise(model, init, derive_seed(options.seed, "init"))
    if options.initial_checkpoint:
        load_checkpoint(model, weights_path(options.initial_checkpoint))
    for layer in getattr(options, "reset_layers", None) or ():
        initialise(find_layer(model, layer), "vgg", derive_seed(options.seed, "reset", layer))
    # Before anything watches its layers.
    return convert_sync_batchnorm(model) if options.sync_bn else model


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """`load_weights`, which says so when it had only the order of the entries to go by."""
    if load_weights(model, path).get("matched_by_order"):
        say(f"{path}: foreign names, matched with {architecture(model)} by order")


def weights_path(path: str | Path) -> Path:
    """A weights file, or the best weights of a run folder."""
    path = Path(path)
    if not path.is_dir():
        return path
    best = path / "best.safetensors"
    if not best.exists():
        reason = "give a finished run folder or a file"
        if (path / "heads").is_dir():
            reason = "it holds heads, which are for --heads"
        elif generations := sorted(path.glob("generation-*")):
            reason = f"it is a chain of generations; give one, such as {generations[-1]}"
        raise UserError(f"{path} has no best.safetensors; {reason}")
    return best


def make_loaders(
    options: argparse.Namespace, data: ImageData, inputs: Inputs, accelerator: Accelerator
) -> tuple[on_device.AnyLoader, on_device.AnyLoader]:
    """Training and evaluation batches of this process, for a network that is fed `inputs`.

    Where the images are on the device, batches are normalised already, as `preparer` would.
    """
    held_out = evaluation_transform(options, data, inputs.size)
    training = training_transform(options, data, inputs.size)
    common = loader_settings(options, data, accelerator)
    evaluated = eval_plan(options, data.eval, accelerator)
    if options.eval_drop_last:
        for name, part in data.parts.items():
            if evaluated.steps * evaluated.global_batch <= part.start:
                raise UsageError(
                    f"--eval-drop-last leaves no image of {name} in the evaluation split of "
                    f"{data.name}; lower --batch-size"
                )
    planned = train_plan(options, data, data.train, accelerator)
    train, evaluation = on_device.loaders(
        options,
        data,
        [
            on_device.Part("training", data.train, training, planned, augmented=options.aug),
            on_device.Part("evaluation", data.eval, held_out, evaluated, augmented=False),
        ],
        inputs.size,
        inputs.mean,
        inputs.std,
        accelerator.device,
        **common,
    )
    return train, evaluation


def training_augmentation(
    options: argparse.Namespace, data: ImageData, size: tuple[int, int]
) -> Augmentation | None:
    """How training images of `size` are augmented; None with `--no-aug`."""
    if not options.aug:
        return None
    native = data.image_size
    small = native is not None and size == (native, native)
    return Augmentation(
        crop=options.train_crop_mode or ("pad" if small else "rrc" if native is None else "none"),
        padding=options.crop_padding,
        padding_mode={"zeros": "constant"}.get(options.padding_mode, options.padding_mode),
        hflip=options.hflip if options.hflip is not None else 0.5 * data.flip,
        scale=tuple(options.scale),
        ratio=tuple(options.ratio),
        color_jitter=options.color_jitter,
        hue_jitter=options.hue_jitter or 0.0,
        vflip=options.vflip or 0.0,
        rotation=options.rotation or 0.0,
        resize=options.train_resize,
        auto_augment=options.aa,
    )


def training_transform(
    options: argparse.Namespace, data: ImageData, size: tuple[int, int]
) -> Transform:
    """The pipeline of training images, to `size`."""
    augmentation = training_augmentation(options, data, size)
    if augmentation is None:
        return evaluation_transform(options, data, size)
    return train_transform(size, augmentation, options.interpolation, data.image_size)


def evaluation_transform(
    options: argparse.Namespace, data: ImageData, size: tuple[int, int]
) -> Pipeline:
    """The pipeline without augmentation, to images of `size`."""
    mode = options.crop_mode or "center"
    return eval_transform(size, options.crop_pct, options.interpolation, data.image_size, mode)


def loader_settings(
    options: argparse.Namespace, data: ImageData, accelerator: Accelerator
) -> dict[str, Any]:
    """What all loaders of images have in common: classes, workers, pinned memory."""
    gpu = accelerator.device.type == "cuda"
    workers = options.workers
    if workers is None:
        idle = data.in_memory and not gpu
        workers = 0 if idle else min(4, max(1, (os.cpu_count() or 1) // accelerator.num_processes))
    return {"classes": data.classes, "workers": workers, "pin_memory": gpu}


def train_plan(
    options: argparse.Namespace, data: ImageData, source: Source, accelerator: Accelerator
) -> BatchPlan:
    """Shuffled steps over `source`, a split of `data`, as the options have it.

    Raises `UsageError` when it has less than a step.
    """
    plan = BatchPlan(
        len(source),
        batch_size(options, accelerator.num_processes),
        processes=accelerator.num_processes,
        rank=accelerator.process_index,
        accumulation=options.grad_accum_steps,
        seed=options.seed,
        shuffle=True,
        drop_last=options.drop_last,
    )
    if plan.global_batch > len(source):
        raise UsageError(
            f"global batch {plan.global_batch} is larger than the {len(source)} training "
            f"images of {data.name}; lower --batch-size"
        )
    return plan


def eval_plan(options: argparse.Namespace, source: Source, accelerator: Accelerator) -> BatchPlan:
    """Batches over `source` in order; raises `UsageError` when none is left of it."""
    plan = BatchPlan(
        len(source),
        batch_size(options, accelerator.num_processes),
        processes=accelerator.num_processes,
        rank=accelerator.process_index,
        drop_last=options.eval_drop_last,
    )
    if plan.steps == 0:
        raise UsageError("--eval-drop-last leaves no evaluation batch; lower --batch-size")
    return plan


def preparer(
    inputs: Inputs, accelerator: Accelerator, *, channels_last: bool
) -> Callable[[torch.Tensor], torch.Tensor]:
    """uint8 [N, 3, H, W] on the host to normalised float32 on the device.

    What is floating already, as loaders on the device give it, stays as it is.
    """
    normalise = Normalise(inputs.mean, inputs.std, accelerator.device)
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def prepare(images: torch.Tensor) -> torch.Tensor:
        if images.is_floating_point():
            return images
        images = images.to(accelerator.device, non_blocking=True)
        return normalise(images).contiguous(memory_format=layout)

    return prepare


def metadata(
    model: nn.Module, kwargs: dict, data: ImageData, inputs: Inputs, parent: str | None
) -> dict[str, Any]:
    """What a weights file says about itself; `parent` is the checksum of the teacher's weights."""
    return {
        "architecture": architecture(model),
        "model_kwargs": kwargs,
        "classes": data.classes,
        "dataset": data.name,
        "input_size": [3, *inputs.size],
        "mean": list(inputs.mean),
        "std": list(inputs.std),
        "parent": parent,
    }


def arguments_of(
    options: argparse.Namespace, accelerator: Accelerator, data: ImageData, **resolved: Any
) -> dict[str, Any]:
    """What `args.yaml` records of a run: its options, and the processes and images it had."""
    images = {"train": len(data.train), "eval": len(data.eval), "classes": data.classes}
    return plain(options, **resolved, processes=accelerator.num_processes, images=images)


def plain(options: argparse.Namespace, **resolved: Any) -> dict[str, Any]:
    """The options as YAML would give them again: flag names, plain values, resolved methods."""
    hidden = {
        "given",
        "typed",
        "settled",
        "layers_of_methods",
        "print_config",
        "config",
        "plugin",
        "seeds",
        "eval_only",
    }
    replaced = set()
    if "methods" in resolved:
        staging = {key for key in vars(options) if key.startswith("init_")}
        replaced = {"method", "alpha", "beta", "gamma"} | staging
    content = {
        key.replace("_", "-"): dict(value) if key.endswith("_kwargs") else value
        for key, value in sorted(vars(options).items())
        if key not in hidden | replaced and ":" not in key and value is not None
    }
    return content | resolved


def print_config(options: argparse.Namespace, **resolved: Any) -> None:
    print(yaml.safe_dump(plain(options, **resolved), sort_keys=False), end="")
