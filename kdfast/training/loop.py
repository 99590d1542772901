"""The training loop all scripts share: one objective, one loader, one run folder."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from kdfast.data import Loader
from kdfast.errors import UsageError, UserError
from kdfast.models import save_weights
from kdfast.seeding import derive_seed
from kdfast.training import checkpoint
from kdfast.training.evaluate import evaluate
from kdfast.training.objective import Objective
from kdfast.training.run_folder import RunFolder, on_main
from kdfast.training.schedules import Schedule
from kdfast.training.teacher import Teacher


class Trainer:
    """Trains `objective` on `train`, evaluates on `held_out` after every epoch, writes `run`.

    `prepare` maps a loader's uint8 images to the device, normalised; `metadata` goes into every
    weights file. With `resume` it goes on from the newest checkpoint in `run`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        objective: Objective,
        train: Loader,
        held_out: Loader,
        prepare: Callable[[torch.Tensor], torch.Tensor],
        run: RunFolder,
        options: argparse.Namespace,
        metadata: dict[str, Any],
        *,
        teacher: Teacher | None = None,
        resume: bool = False,
    ):
        self.accelerator, self.run, self.options = accelerator, run, options
        self.train, self.held_out, self.prepare = train, held_out, prepare
        self.metadata, self.teacher = metadata, teacher
        layout = torch.channels_last if options.channels_last else torch.preserve_format
        self.objective = objective.to(accelerator.device, memory_format=layout)
        try:
            self.optimizer = create_optimizer_v2(
                objective,
                opt=options.opt,
                lr=options.lr,
                weight_decay=options.weight_decay,
                momentum=options.momentum,
                filter_bias_and_bn=options.filter_bias_and_bn,
            )
        except (ValueError, AssertionError) as error:
            raise UsageError(f"--opt {options.opt}: {error}") from None
        self.schedule = Schedule(self.optimizer, options, train.plan.steps)
        self.average = None
        if options.model_ema:
            self.average = ModelEmaV3(objective.student, decay=options.model_ema_decay)
        self.history: dict[str, Any] = {"last": None, "best": None}
        self.first_epoch = self._restore() if resume else 0
        module = torch.compile(objective) if options.torchcompile else objective
        self.step_module = accelerator.prepare_model(module)
        self.step_optimizer = accelerator.prepare_optimizer(self.optimizer)
        self.tracker = None

    def fit(self) -> dict[str, Any]:
        """Train the remaining epochs; returns `last` and `best`: {epoch, top1, top5, loss}."""
        options, main = self.options, self.accelerator.is_main_process
        if main and self.first_epoch < options.epochs:
            self.tracker = TensorBoardTracker("", self.run.tensorboard)
            self.tracker.start()
        for epoch in range(self.first_epoch, options.epochs):
            started = time.perf_counter()
            self.schedule.start_epoch(epoch)
            # Dropout is then a function of (seed, epoch, process), whatever ran before.
            rank = self.accelerator.process_index
            torch.manual_seed(derive_seed(options.seed, "train", epoch, rank))
            losses, images = self._train_epoch(epoch)
            trained = time.perf_counter() - started
            self._share_buffers()
            scores = self._evaluate()
            row = {"epoch": epoch + 1}
            row |= {f"train_{name}": value for name, value in losses.items()}
            row |= {f"eval_{name}": scores[name] for name in ("loss", "top1", "top5")}
            row["lr"] = self.optimizer.param_groups[0]["lr"]
            row["images_per_second"] = round(images / trained, 1)
            row["seconds"] = round(time.perf_counter() - started, 3)
            better = self._remember(row)
            on_main(self.accelerator, lambda row=row, better=better: self._close_epoch(row, better))
        if self.tracker is not None:
            self.tracker.finish()
        return dict(self.history)

    def _train_epoch(self, epoch: int) -> tuple[dict[str, float], int]:
        accelerator, device = self.accelerator, self.accelerator.device
        names = ["loss", *self.objective.term_names]
        sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=device)
        first_bad = torch.full((len(names),), math.inf, dtype=torch.float64, device=device)
        self._train_mode()
        done = 0
        first_step = epoch * self.train.plan.steps
        bar = tqdm(
            total=self.train.plan.steps,
            desc=f"epoch {epoch + 1}/{self.options.epochs}",
            disable=not (accelerator.is_main_process and sys.stderr.isatty()),
            leave=False,
        )
        self.schedule.start_step(first_step)
        for batch in self.train.epoch(epoch):
            portion = batch.portion
            images = self.prepare(batch.images)
            labels = batch.labels.to(device, non_blocking=True)
            taught: tuple = ()
            if self.teacher is not None:
                with accelerator.autocast():
                    taught = self.teacher(images)
            wait = not portion.ends_step
            with accelerator.no_sync(self.step_module) if wait else nullcontext():
                total, terms, _ = self._forward(images, labels, taught)
                accelerator.backward(total * portion.weight)
            values = torch.cat([total.detach().reshape(1), terms]).double()
            bad = ~torch.isfinite(values) & torch.isinf(first_bad)
            first_bad = torch.where(bad, float(first_step + done + 1), first_bad)
            sums[:-1] += values * portion.count
            sums[-1] += portion.count
            if wait:
                continue
            if self.options.clip_grad:
                accelerator.clip_grad_norm_(self.objective.parameters(), self.options.clip_grad)
            self.step_optimizer.step()
            self.step_optimizer.zero_grad()
            if self.average is not None:
                self.average.update(self.objective.student)
            done += 1
            bar.update()
            self.schedule.start_step(first_step + done)
            if done % self.options.log_interval == 0:
                means, _ = self._read(sums, first_bad, names)
                bar.set_postfix({name: f"{value:.4g}" for name, value in means.items()})
        bar.close()
        return self._read(sums, first_bad, names)

    def _forward(self, images, labels, taught):
        try:
            return self.step_module(images, labels, *taught)
        except ValueError as error:
            if "more than 1 value per channel" in str(error):
                raise UsageError(
                    f"a batch of {len(images)} image leaves batch normalisation a single value a "
                    "channel; choose another --batch-size, --drop-last or --freeze-bn"
                ) from None
            raise

    def _read(self, sums, first_bad, names) -> tuple[dict[str, float], int]:
        """Means over all processes so far; raises `UserError` when one is not finite."""
        *totals, count = self.accelerator.reduce(sums, "sum").tolist()
        if not all(map(math.isfinite, totals)):
            bad = self.accelerator.gather(first_bad[None]).amin(0).tolist()
            step = min(bad)
            # The total goes bad with any term; the term is the news.
            term = next(n for n, s in reversed(list(zip(names, bad, strict=True))) if s == step)
            good = checkpoint.latest(self.run.checkpoints)
            raise UserError(
                f"loss term '{term}' is not finite at step {step:.0f}; last good checkpoint: "
                f"{good or 'none'}; lower --lr or the term's weight, or add --clip-grad"
            )
        return {n: t / count for n, t in zip(names, totals, strict=True)}, int(count)

    def _train_mode(self) -> None:
        self.objective.train()
        if self.options.freeze_bn:
            for module in self.objective.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    def _share_buffers(self) -> None:
        """Give every process the main one's running statistics: one network is scored and saved."""
        if self.accelerator.num_processes == 1:
            return
        networks = [self.objective] + ([self.average.module] if self.average is not None else [])
        for network in networks:
            for buffer in network.buffers():
                torch.distributed.broadcast(buffer, 0)

    def _evaluate(self) -> dict[str, float]:
        student = self.average.module if self.average is not None else self.objective.student
        student.eval()
        return evaluate(lambda x: student(x)[0], self.held_out, self.accelerator, self.prepare)

    def _remember(self, row: dict[str, Any]) -> bool:
        """Keep the last and best scores; returns whether this epoch is the best (first on ties)."""
        scores = {"epoch": row["epoch"]} | {k: row[f"eval_{k}"] for k in ("top1", "top5", "loss")}
        best = self.history["best"]
        better = best is None or scores["top1"] > best["top1"]
        self.history["last"] = scores
        if better:
            self.history["best"] = scores
        return better

    def _close_epoch(self, row: dict[str, Any], better: bool) -> None:
        options, epoch = self.options, row["epoch"]
        student = self.average.module if self.average is not None else self.objective.student
        metadata = self.metadata | {"epoch": epoch, "top1": row["eval_top1"]}
        save_weights(self.run.weights("last"), student.model, metadata)
        if better:
            save_weights(self.run.weights("best"), student.model, metadata)
        if epoch in options.save_epochs:
            save_weights(self.run.epoch_weights(epoch), student.model, metadata)
        self.run.append_row(row)
        state = {"history": self.history}
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        checkpoint.save(
            self.run.checkpoints,
            epoch,
            self.objective,
            self.optimizer,
            state,
            average=self.average,
            keep=options.checkpoint_hist,
        )
        tags = {
            k.replace("_", "/", 1) if k.startswith(("train_", "eval_")) else f"train/{k}": v
            for k, v in row.items()
            if k not in ("epoch", "seconds")
        }
        self.tracker.log(tags, step=epoch)
        terms = "  ".join(f"{n} {row[f'train_{n}']:.4g}" for n in self.objective.term_names)
        print(
            f"epoch {epoch:>{len(str(options.epochs))}}/{options.epochs}  "
            f"loss {row['train_loss']:.4f}  {terms}  top1 {row['eval_top1']:.2f}  "
            f"{row['images_per_second']:.0f} images/s",
            flush=True,
        )

    def _restore(self) -> int:
        path = checkpoint.latest(self.run.checkpoints)
        if path is None:
            on_main(self.accelerator, lambda: self.run.keep_rows(0))
            return 0
        state = checkpoint.load(path, self.objective, self.optimizer, average=self.average)
        if "scaler" in state and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.history = state["history"]
        on_main(self.accelerator, lambda: self.run.keep_rows(state["epoch"]))
        return state["epoch"]
