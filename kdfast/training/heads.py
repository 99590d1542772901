"""Heads of a teacher: linear ones on its frozen trunk, deep ones trained together with it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from typing import Any

import torch
from accelerate import Accelerator
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn import functional as F

from kdfast.data import ImageData, Loader
from kdfast.errors import UsageError
from kdfast.models import (
    DeepHead,
    InputAdapter,
    LinearHead,
    MountedHeads,
    Taps,
    checksum,
    default_stages,
    parameter_count,
    save_head,
    shapes_of,
)
from kdfast.seeding import derive_seed, local_randomness
from kdfast.training.classifier import describe
from kdfast.training.evaluate import evaluate, evaluate_all
from kdfast.training.journal import say
from kdfast.training.keeper import SCORES, StudentKeeper
from kdfast.training.loop import Trainer
from kdfast.training.objective import Trained
from kdfast.training.run_folder import RunFolder, on_main
from kdfast.training.setup import Inputs, arguments_of, make_loaders, metadata, preparer, try_out
from kdfast.training.teacher import Teacher
from kdfast.training.teacher_cache import CachedTeacher, Lesson, cached, fit


def build_heads(
    options: argparse.Namespace, network: nn.Module, size: tuple[int, int], classes: int
) -> tuple[MountedHeads, list[dict[str, Any]]]:
    """Fresh heads of `options.kind` on the stages of `network`, fed images of `size` pixels.

    Each with its record for `save_head`. A head's weights depend on (seed, its layer) alone.
    """
    layers = options.teacher_layers or default_stages(network)
    shapes = shapes_of(network, layers, size)
    for layer, shape in zip(layers, shapes, strict=True):
        if len(shape) != 3:
            raise UsageError(
                f"heads need feature maps, but layer {layer} passes {list(shape)} an image; choose "
                "a layer before the pooling"
            )
    if len(set(layers)) < len(layers):
        raise UsageError("--teacher-layers names a layer twice")
    deep = options.kind == "deep"
    if deep and len(layers) < 2:
        raise UsageError(
            "--kind deep needs at least two layers: heads go on all but the last, which the "
            "network's own classifier follows"
        )
    if deep and any(one[1:] < later[1:] for one, later in pairwise(shapes)):
        raise UsageError(f"--teacher-layers go from shallow to deep, got {' '.join(layers)}")
    mounted = layers[:-1] if deep else layers
    modules, records = [], []
    for i, (layer, shape) in enumerate(zip(mounted, shapes, strict=False)):
        own: dict[str, Any] = {"shape": list(shape)}
        with local_randomness(derive_seed(options.seed, "head", layer)):
            if deep:
                own["widths"] = [later[0] for later in shapes[i:]]
                head: nn.Module = DeepHead(own["widths"], classes)
            else:
                own["pool"] = _pool(options.head_pool, shape)
                head = LinearHead(shape, classes, own["pool"] and tuple(own["pool"]))
        modules.append(head)
        records.append(
            {"kind": options.kind, "index": i + 1, "heads": len(mounted), "layer": layer} | own
        )
    return MountedHeads(options.kind, tuple(mounted), tuple(modules)), records


def _pool(sides: Sequence[int] | None, shape: Sequence[int]) -> list[int] | None:
    """Height and width to pool a map to; None where it is that small already."""
    if sides is None:
        return None
    wanted = [min(a, b) for a, b in zip((sides[0], sides[-1]), shape[1:], strict=True)]
    return None if wanted == list(shape[1:]) else wanted


def say_heads(heads: MountedHeads, records: Sequence[dict[str, Any]], network: nn.Module) -> None:
    """Say what each head takes and how many parameters it has."""
    counts = [parameter_count(head) for head in heads.modules]
    for record, count in zip(records, counts, strict=True):
        shape = "x".join(map(str, record["shape"]))
        if record.get("pool"):
            shape += f" pooled to {'x'.join(map(str, record['pool']))}"
        say(f"head {record['index']} on {record['layer']}: {shape}, {count:,} parameters")
    own = parameter_count(network)
    say(f"heads: {sum(counts):,} parameters in all, the network has {own:,}")
    if sum(counts) > own and heads.kind == "linear":
        say("note: the heads have more parameters than the network; --head-pool makes them smaller")


class TrunkHeads(nn.ModuleList):
    """Heads on features that somebody else computes: (images, features) -> logits of each."""

    def forward(self, images: torch.Tensor, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [head(feature)[1] for head, feature in zip(self, features, strict=True)]


class HeadedNetwork(nn.Module):
    """A network with heads: images -> logits of each head, then its own."""

    def __init__(self, taps: Taps, heads: Sequence[nn.Module]):
        super().__init__()
        self.taps, self.heads = taps, nn.ModuleList(heads)

    def forward(
        self, images: torch.Tensor, features: Sequence[torch.Tensor] = ()
    ) -> list[torch.Tensor]:
        logits, features = self.taps(images)
        return [*(head(f)[1] for head, f in zip(self.heads, features, strict=True)), logits]


class HeadsObjective(Trained):
    """Sum of the cross-entropies of all classifiers of `student`, a term each.

    `student` is a `TrunkHeads` or a `HeadedNetwork`.
    """

    def __init__(self, student: nn.Module, term_names: list[str], label_smoothing: float = 0.0):
        super().__init__()
        self.student, self.term_names = student, term_names
        self.label_smoothing = label_smoothing

    def forward(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        teacher_logits: torch.Tensor | None = None,
        teacher_features: tuple[torch.Tensor, ...] = (),
        teacher_heads: tuple = (),
        indices: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        answers = self.student(images, teacher_features)
        with torch.autocast(images.device.type, enabled=False):
            terms = torch.stack(
                [
                    F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
                    for logits in answers
                ]
            )
        return terms.sum(), terms.detach(), answers[-1].detach()


Answer = Callable[[nn.Module, torch.Tensor], list[torch.Tensor]]


class HeadsKeeper:
    """Scores all heads in one pass and writes `heads/`.

    Without `trunk` each head keeps the weights of its own best epoch, the first of the highest
    top-1; with it, the keeper of the network that the heads are trained with, those of that
    network's. `answer(scored, images)` gives the logits of all classifiers, the deepest last;
    `records` go into the files. `history` has `heads` beside `last` and `best` of the deepest.
    """

    def __init__(
        self,
        run: RunFolder,
        records: list[dict[str, Any]],
        answer: Answer,
        *,
        trunk: StudentKeeper | None = None,
        save_epochs: Collection[int] = (),
    ):
        self.run, self.records, self.answer = run, records, answer
        self.trunk, self.save_epochs = trunk, save_epochs
        self.score_names = ["loss", "top1", "top5", *(f"top1_{r['layer']}" for r in records)]
        self.scores: list[dict[str, float]] = []
        self.due: list[bool] = []

    def evaluate(self, scored, loader, accelerator, prepare, before_batch) -> dict[str, float]:
        count = len(self.records) + (self.trunk is not None)
        self.scores = evaluate_all(
            lambda x: self.answer(scored, x), count, loader, accelerator, prepare, before_batch
        )
        deepest = {name: self.scores[-1][name] for name in ("loss", "top1", "top5")}
        named = zip(self.records, self.scores, strict=False)
        return deepest | {f"top1_{record['layer']}": scores["top1"] for record, scores in named}

    def remember(self, history: dict[str, Any], row: dict[str, Any]) -> bool:
        scores = [
            {"epoch": row["epoch"]} | {name: found[name] for name in SCORES}
            for found in self.scores
        ]
        better = history["best"] is None or scores[-1]["top1"] > history["best"]["top1"]
        history["last"] = scores[-1]
        if better:
            history["best"] = scores[-1]
        heads = history.setdefault("heads", [{"last": None, "best": None} for _ in self.records])
        self.due = []
        for head, found in zip(heads, scores, strict=False):
            own = head["best"] is None or found["top1"] > head["best"]["top1"]
            self.due.append(own if self.trunk is None else better)
            head["last"] = found
            if self.due[-1]:
                head["best"] = found
        return better

    def keep_beginning(self, scored: nn.Module) -> None:
        if self.trunk is not None:
            self.trunk.keep_beginning(scored.taps)
        elif 0 in self.save_epochs:
            for head, record in zip(scored, self.records, strict=True):
                full = record | {"epoch": 0, "top1": None}
                save_head(self.run.path / "weights" / "epoch-0000", head, full)

    def save(self, scored: nn.Module, row: dict[str, Any], better: bool) -> None:
        if self.trunk is None:
            modules, more = list(scored), {}
        else:
            self.trunk.save(scored.taps, row, better)
            modules = list(scored.heads)
            more = {"parent": checksum(scored.taps.model.state_dict())} if better else {}
        if row["eval_top1"] is None:
            self.due = [False] * len(self.records)
        for head, record, due in zip(modules, self.records, self.due, strict=True):
            top1 = row[f"eval_top1_{record['layer']}"]
            full = record | more | {"epoch": row["epoch"], "top1": top1}
            if due:
                save_head(self.run.path / "heads", head, full)
            if self.trunk is None and row["epoch"] in self.save_epochs:
                save_head(self.run.path / "weights" / f"epoch-{row['epoch']:04d}", head, full)


def train_linear(
    options: argparse.Namespace,
    accelerator: Accelerator,
    data: ImageData,
    network: nn.Module,
    fed: Inputs,
    run: RunFolder,
    *,
    resume: bool,
) -> dict[str, Any]:
    """Train linear heads on the frozen `network`, which is fed `fed`, into `run`.

    All of them in one pass of the trunk: L = sum of their cross-entropies. They share nothing, so
    each ends as if it had been trained alone. Returns the run's results, already written.
    """
    inputs = seen(options, fed)
    heads, records = build_heads(options, network, fed.size, data.classes)
    parent = checksum(network.state_dict())
    arguments = arguments_of(options, accelerator, data) | {"teacher-checksum": parent}
    known = metadata(network, {}, data, fed, parent)
    del known["model_kwargs"]  # those of the parent's own file
    with run.claimed(accelerator, arguments, resume=resume):
        train, held_out = make_loaders(options, data, inputs, accelerator)
        adapter = InputAdapter(inputs.mean, inputs.std, fed.mean, fed.std, fed.size)
        layout = torch.channels_last if options.channels_last else torch.preserve_format
        network = network.to(accelerator.device, memory_format=layout)
        adapter = adapter.to(accelerator.device)
        teacher = Teacher(network, heads.layers, adapter)
        prepare = preparer(inputs, accelerator, channels_last=options.channels_last)
        example = prepare(next(iter(held_out.epoch(0))).images[:2])
        teacher.calibrate(example)
        if options.fold_teacher:
            teacher.fold(example)
        if options.torchcompile:
            teacher.compile()
        say_heads(heads, records, network)
        taught = evaluate(lambda x: teacher(x)[0], held_out, accelerator, prepare)
        say(f"teacher top1 {taught['top1']:.2f}")
        lesson = Lesson(options, accelerator, data, inputs, fed, prepare, parent)
        answers = cached(teacher, lesson)
        keeper = HeadsKeeper(
            run,
            [known | record for record in records],
            lambda scored, images: scored(images, teacher(images)[1]),
            save_epochs=options.save_epochs,
        )
        objective = HeadsObjective(
            TrunkHeads(heads.modules), [f"ce_{layer}" for layer in heads.layers], options.smoothing
        )
        return _fit(
            options, accelerator, objective, train, held_out, prepare, run, keeper, arguments,
            heads, network, fed, teacher=answers, resume=resume, teacher_top1=taught["top1"],
        )  # fmt: skip


def seen(options: argparse.Namespace, fed: Inputs) -> Inputs:
    """What the loaders give: what the network is fed, but for what the user chose otherwise."""
    size = (options.img_size,) * 2 if options.img_size else fed.size
    own = (getattr(options, name) if name in options.given else None for name in ("mean", "std"))
    mean, std = (tuple(a or b) for a, b in zip(own, (fed.mean, fed.std), strict=True))
    return Inputs(size, mean, std)


def train_deep(
    options: argparse.Namespace,
    accelerator: Accelerator,
    data: ImageData,
    network: nn.Module,
    inputs: Inputs,
    run: RunFolder,
    *,
    resume: bool,
) -> dict[str, Any]:
    """Train `network` and deep heads on its stages together: L = sum of their cross-entropies.

    The deepest of them is the network's own classifier, which is scored and saved as that of
    `train_classifier` is. Returns the run's results, already written.

    Zhang, Shi, Shi, Ma, Bao, "Task-Oriented Feature Distillation", NeurIPS 2020: the teacher.
    """
    arguments = arguments_of(options, accelerator, data)
    with run.claimed(accelerator, arguments, resume=resume):
        try_out(network, inputs, data.classes)
        heads, records = build_heads(options, network, inputs.size, data.classes)
        train, held_out = make_loaders(options, data, inputs, accelerator)
        known = metadata(network, dict(options.teacher_kwargs or ()), data, inputs, parent=None)
        prepare = preparer(inputs, accelerator, channels_last=options.channels_last)
        network = network.to(accelerator.device)
        taps = Taps(network, heads.layers)
        taps.calibrate(prepare(next(iter(held_out.epoch(0))).images[:2]))
        say_heads(heads, records, network)
        keeper = HeadsKeeper(
            run,
            [known | record for record in records],
            lambda scored, images: scored(images),
            trunk=StudentKeeper(run, known, options.save_epochs),
        )
        names = [*(f"ce_{layer}" for layer in heads.layers), "ce"]
        student = HeadedNetwork(taps, heads.modules)
        if options.sync_bn:  # of the heads; that of the network is there already
            student = convert_sync_batchnorm(student)
        objective = HeadsObjective(student, names, options.smoothing)
        return _fit(
            options, accelerator, objective, train, held_out, prepare, run, keeper, arguments,
            heads, network, inputs, resume=resume,
        )  # fmt: skip


def _fit(
    options: argparse.Namespace,
    accelerator: Accelerator,
    objective: HeadsObjective,
    train: Loader,
    held_out: Loader,
    prepare: Callable[[torch.Tensor], torch.Tensor],
    run: RunFolder,
    keeper: HeadsKeeper,
    arguments: dict[str, Any],
    heads: MountedHeads,
    network: nn.Module,
    inputs: Inputs,
    *,
    teacher: Teacher | CachedTeacher | None = None,
    resume: bool,
    **more: Any,
) -> dict[str, Any]:
    trainer = Trainer(
        accelerator, objective, train, held_out, prepare, run, options, keeper, arguments,
        teacher=teacher, resume=resume,
    )  # fmt: skip
    scores = fit(trainer)
    counts = [parameter_count(head) for head in heads.modules]
    scores["heads"] = [
        {"layer": layer, "parameters": count} | found
        for layer, count, found in zip(heads.layers, counts, scores["heads"], strict=True)
    ]
    batch = train.plan.global_batch
    results = describe(run, options, accelerator, batch, network, inputs, scores, **more)
    on_main(accelerator, lambda: run.write_results(results))
    say(table(results))
    return results


def table(results: dict[str, Any]) -> str:
    """Top-1 of the teacher and of each head, for people."""
    lines = [f"{'':24} {'last':>6} {'best':>6} {'epoch':>6}"]
    rows = [(head["layer"], head["last"], head["best"]) for head in results["heads"]]
    if "teacher_top1" not in results:
        rows.append(("classifier", results["last"], results["best"]))
    for name, last, best in rows:
        lines.append(f"{name:24} {last['top1']:6.2f} {best['top1']:6.2f} {best['epoch']:6}")
    if "teacher_top1" in results:
        lines.append(f"{'teacher':24} {results['teacher_top1']:6.2f}")
    return "\n".join(lines)
