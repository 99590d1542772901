"""Training a Trans-Net: what of B's feature follows from A's, and by how many nonlinear steps.

Liang, Li, Li, Wang, Zhang, "Knowledge Consistency between Neural Networks and Beyond", ICLR 2020.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Sequence
from math import prod
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from kdfast.data import ImageData, Loader
from kdfast.errors import UsageError
from kdfast.metrics import VarianceReport
from kdfast.models import TransNet, architecture, parameter_count, save_weights
from kdfast.ops.reference.transnet import SCALE_EPS
from kdfast.seeding import derive_seed, local_randomness
from kdfast.training.features import CachedLoader, Features, LiveLoader
from kdfast.training.journal import say
from kdfast.training.loop import Trainer
from kdfast.training.objective import Trained
from kdfast.training.run_folder import RunFolder, on_main
from kdfast.training.setup import arguments_of
from kdfast.training.tapped import Tapped, require_same_shape

# A gate outside is as good as closed or open, and its logit hardly moves.
_SATURATED = (0.01, 0.99)
# Images looked at for constant channels before training begins.
_LOOKED_AT = 1024


class TransNetObjective(Trained):
    """L = mean of (g(x) - t)^2 over all elements + sum over gates of alpha_i p_i^2.

    `forward`'s images are the pair of features (x, t), [N, C, H, W] or [N, C]; it returns L, its
    two terms and g(x). Both terms are computed in float32 whatever `student` runs in. `alpha` has a
    value for each of the gates. Equation 5 of the paper.
    """

    def __init__(self, student: TransNet, alpha: Sequence[float]):
        super().__init__()
        self.student, self.term_names = student, ["mse", "penalty"]
        gates = len(student.gate_logits)
        self.register_buffer("alpha", torch.tensor(list(alpha)))
        # Sums over the steps of an epoch of dL/dp and of its part without the penalty.
        self.register_buffer("slopes", torch.zeros(2, gates, dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(
        self,
        images: tuple[torch.Tensor, torch.Tensor],
        labels: torch.Tensor | None = None,
        *_: Any,
        indices: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        feature, target = images
        output = self.student(feature)
        with torch.autocast(feature.device.type, enabled=False):
            mse = (output.float() - target.float()).square().mean()
            penalty = (self.alpha * self.student.gates.float().square()).sum()
        return mse + penalty, torch.stack([mse, penalty]).detach(), output.detach()

    def watch(self, optimizer: Optimizer) -> None:
        """Sum up dL/dp as `optimizer` meets it: over all processes, without weight decay."""
        optimizer.register_step_pre_hook(self._note_slopes)

    @torch.no_grad()
    def _note_slopes(self, *_: Any) -> None:
        logits = self.student.gate_logits
        if logits.grad is None:
            return
        gates = logits.double().sigmoid()
        total = logits.grad.double() / (gates * logits.neg().double().sigmoid())
        self.slopes += torch.stack([total, total - 2 * self.alpha * gates])
        self.steps += 1

    def gauges(self) -> dict[str, float]:
        """Gates as they are; dL/dp and its part from the error, means over the epoch's steps."""
        found = {f"gate{i}": p for i, p in enumerate(self.student.gates.tolist())}
        if self.student.gate_logits.requires_grad:
            means = (self.slopes / self.steps.clamp(min=1)).tolist()
            for name, slopes in zip(("dloss_dgate", "dmse_dgate"), means, strict=True):
                found |= {f"{name}{i}": slope for i, slope in enumerate(slopes)}
        self.slopes.zero_()
        self.steps.zero_()
        return found


class TransNetKeeper:
    """Scores the held-out split: `loss`, the mean squared error, and `residual_share`.

    That is Var(t - g(x)) / Var(t), both per channel, then averaged. Best is the lowest loss, the
    first on ties. Writes `last.safetensors`, `best.safetensors` and `weights/` of `save_epochs`,
    epoch 0 being the fresh Trans-Net, each with `metadata`.
    """

    score_names = ["loss", "residual_share"]  # noqa: RUF012 (never changed)

    def __init__(self, run: RunFolder, metadata: dict[str, Any], save_epochs: Collection[int] = ()):
        self.run, self.metadata, self.save_epochs = run, metadata, save_epochs

    def keep_beginning(self, scored: nn.Module) -> None:
        if 0 in self.save_epochs:
            metadata = self.metadata | {"epoch": 0, "loss": None}
            save_weights(self.run.epoch_weights(0), scored, metadata)

    @torch.no_grad()
    def evaluate(
        self,
        scored: nn.Module,
        loader: Loader,
        accelerator: Accelerator,
        prepare: Callable[[torch.Tensor], tuple[torch.Tensor, ...]],
        before_batch: Callable[[], None],
    ) -> dict[str, float]:
        report = VarianceReport(1)
        for batch in loader.epoch(0):
            before_batch()
            if not batch.portion.count:
                continue
            feature, target = prepare(batch.images)
            with accelerator.autocast():
                output = scored(feature)
            report.update(output.float()[None], target)
        report.reduce(accelerator)
        found = report.compute()
        means = found["means"]["residual"]
        bias = sum(mean * mean for mean in means) / len(means)
        return {
            "loss": found["residual"] + bias,
            "residual_share": found["relative"]["residual"],
        }

    def remember(self, history: dict[str, Any], row: dict[str, Any]) -> bool:
        scores = {"epoch": row["epoch"]} | {n: row[f"eval_{n}"] for n in self.score_names}
        better = history["best"] is None or scores["loss"] < history["best"]["loss"]
        history["last"] = scores
        if better:
            history["best"] = scores
        return better

    def save(self, scored: nn.Module, row: dict[str, Any], better: bool) -> None:
        epoch = row["epoch"]
        metadata = self.metadata | {"epoch": epoch, "loss": row["eval_loss"]}
        paths = [self.run.weights(name) for name in ["last"] + ["best"] * better]
        if epoch in self.save_epochs:
            paths.append(self.run.epoch_weights(epoch))
        for path in paths:
            save_weights(path, scored, metadata)


def gate_weights(options: argparse.Namespace) -> list[float]:
    """`--alpha`, a value for each of the `--layers` - 1 gates.

    Raises `UsageError` for another number of values than one or that.
    """
    gates = options.layers - 1
    if len(options.alpha) not in (1, gates):
        if not gates:
            raise UsageError("--layers 1 has no gates for --alpha to weigh; drop --alpha")
        raise UsageError(
            f"--alpha has {len(options.alpha)} values, but --layers {options.layers} has {gates} "
            f"gates; give one value, or {gates}"
        )
    return options.alpha * gates if len(options.alpha) == 1 else list(options.alpha)


def build_transnet(options: argparse.Namespace, shape: Sequence[int]) -> TransNet:
    """A fresh Trans-Net for features of `shape` an image; its weights depend on the seed alone."""
    with local_randomness(derive_seed(options.seed, "transnet")):
        # A kernel on a single position would meet nothing but its centre.
        net = TransNet(shape[0], options.layers, 1 if prod(shape[1:]) == 1 else 3)
    net.gate_logits.requires_grad_(not options.freeze_gates)
    return net


def train_transnet(
    options: argparse.Namespace,
    accelerator: Accelerator,
    data: ImageData,
    a: Tapped,
    b: Tapped,
    features: Features,
    run: RunFolder,
    *,
    resume: bool,
) -> dict[str, Any]:
    """Train a Trans-Net from the features of `a` to those of `b` into `run`.

    `features` yields both, in this order. Returns the run's results, already written.

    Raises:
        UsageError: the shapes of the features differ, or --alpha fits no gates.
    """
    require_same_shape(a, b)
    alpha = gate_weights(options)
    arguments = describe_pair(options, accelerator, data, a, b)
    begun = on_main(accelerator, lambda: run.arguments.is_file())
    with run.claimed(accelerator, arguments, resume=resume):
        net = build_transnet(options, a.shape)
        known = {
            "kind": "transnet",
            "layers": options.layers,
            "channels": net.channels,
            "kernel_size": net.kernel_size,
            "a": a.record(),
            "b": b.record(),
            "dataset": data.name,
            "shuffled": options.shuffle_pairs,
            "alpha": alpha,
            "frozen_gates": options.freeze_gates,
            "seed": options.seed,
        }
        train = features.loader("train", shuffle=True)
        if not begun:  # else it was said then
            warn_of_constants(features, train, accelerator, a)
        objective = TransNetObjective(net, alpha)
        trainer = Trainer(
            accelerator,
            objective,
            train,
            features.loader("val"),
            features.prepare,
            run,
            options,
            TransNetKeeper(run, known, options.save_epochs),
            arguments,
            resume=resume,
        )
        objective.watch(trainer.optimizer)
        scores = trainer.fit()
        gates = trainer.scored.gates.tolist()
        warn_of_saturation(gates)
        results = {
            "run": str(run.path),
            "seed": options.seed,
            "processes": accelerator.num_processes,
            "global_batch": train.plan.global_batch,
            **scores,
            "gates": gates,
            "parameters": parameter_count(net),
            "operations": count_of(net, a.shape),
        }
        on_main(accelerator, lambda: run.write_results(results))
    return results


def describe_pair(
    options: argparse.Namespace, accelerator: Accelerator, data: ImageData, a: Tapped, b: Tapped
) -> dict[str, Any]:
    """What `args.yaml` records of a Trans-Net's run; A and B are known by their checksums."""
    records = [{k: v for k, v in net.record().items() if k != "path"} for net in (a, b)]
    names = dict.fromkeys(architecture(net.network) for net in (a, b))
    return arguments_of(
        options,
        accelerator,
        data,
        kind="transnet",
        model=" ".join(names),
        alpha=gate_weights(options),
        a=records[0],
        b=records[1],
    )


def count_of(net: TransNet, shape: Sequence[int]) -> int:
    """Floating-point operations for one image's feature, a multiply-add counted as two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, *shape, device=net.gate_logits.device))
    return counter.get_total_flops()


@torch.no_grad()
def warn_of_constants(
    features: Features, train: CachedLoader | LiveLoader, accelerator: Accelerator, a: Tapped
) -> None:
    """Say how many channels of A are constant, but not zero, in some images.

    Of training images evenly spaced, since those of a class may follow each other.
    """
    if prod(a.shape[1:]) == 1:
        return
    found = torch.zeros(a.shape[0] + 1, device=accelerator.device)  # the last counts images
    for feature in features.sample(train, _LOOKED_AT):
        maps = feature.flatten(2)
        flat = (maps.std(2) < SCALE_EPS) & (maps.mean(2).abs() > 100 * SCALE_EPS)
        found[:-1] += flat.sum(0)
        found[-1] += len(flat)
    *channels, images = accelerator.reduce(found, "sum").tolist()
    constant = sum(count > 0 for count in channels)
    if constant:
        say(
            f"warning: {constant} of {len(channels)} channels of A's layer {a.layer} are constant, "
            f"and not zero, in up to {max(channels):.0f} of {images:.0f} images: divided "
            f"by their standard deviation they blow up to {1 / SCALE_EPS:g} times their size; "
            "choose a layer before its activation"
        )


def warn_of_saturation(gates: Sequence[float]) -> None:
    low, high = _SATURATED
    found = [f"p{i} = {p:.2g}" for i, p in enumerate(gates) if not low <= p <= high]
    if found:
        say(
            f"warning: {len(found)} of {len(gates)} gates are saturated ({', '.join(found)}): as "
            "good as closed or open, they hardly learn; change --alpha or lower --lr"
        )
