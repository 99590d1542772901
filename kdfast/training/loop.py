"""The training loop all scripts share: one objective, one loader, one run folder."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker
from accelerate.utils import gather_object
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from kdfast.data import Batch, Loader
from kdfast.errors import Stopped, UsageError, UserError
from kdfast.seeding import derive_seed, seed_process
from kdfast.training import checkpoint, journal
from kdfast.training.ahead import Ready, Side, SideStream, made_ready
from kdfast.training.checkpoint import Position
from kdfast.training.compiled import Compiled
from kdfast.training.interrupt import Interrupt
from kdfast.training.keeper import Keeper
from kdfast.training.objective import Trained
from kdfast.training.optimizer import create_optimizer
from kdfast.training.path_length import PathLength
from kdfast.training.profile import Profile
from kdfast.training.run_folder import RunFolder, on_main
from kdfast.training.schedules import Schedule
from kdfast.training.tally import Tally
from kdfast.training.teacher import Teacher
from kdfast.training.tell import duration, epoch_line


@dataclass
class Progress:
    """Where a run is, and what an unfinished epoch has added up on this process.

    `sums` are float64 [1 + terms + 1]: total and terms weighted by images, then the images.
    """

    position: Position
    sums: list[float]
    seconds: float = 0.0


class Trainer:
    """Trains `objective` on `train`, evaluates on `held_out` every so often, writes `run`.

    `prepare` maps a loader's uint8 images to the device, normalised; `keeper` scores and saves what
    was trained; `arguments` go into the run's record; `path` is measured into path_length.csv. With
    `resume` it goes on from the newest checkpoint in `run`: on a CPU the end is then bit-identical
    to that of an uninterrupted run.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        objective: Trained,
        train: Loader,
        held_out: Loader,
        prepare: Callable[[torch.Tensor], torch.Tensor],
        run: RunFolder,
        options: argparse.Namespace,
        keeper: Keeper,
        arguments: dict[str, Any],
        *,
        teacher: Teacher | None = None,
        path: PathLength | None = None,
        resume: bool = False,
    ):
        self.accelerator, self.run, self.options = accelerator, run, options
        self.train, self.held_out, self.prepare = train, held_out, prepare
        self.keeper, self.arguments, self.teacher = keeper, arguments, teacher
        self.path = path
        if path is not None:
            objective.add_module("path_length", path)  # which brings it into checkpoints
        layout = torch.channels_last if options.channels_last else torch.preserve_format
        self.objective = objective.to(accelerator.device, memory_format=layout)
        self.optimizer = create_optimizer(objective, options)
        self.schedule = Schedule(self.optimizer, options, train.plan.steps)
        self.average = None
        if options.model_ema:
            self.average = ModelEmaV3(objective.student, decay=options.model_ema_decay)
        self.names = ["loss", *objective.term_names]
        self.history: dict[str, Any] = {"last": None, "best": None}
        self.progress = Progress(Position(0), self._no_sums())
        self.random_state: dict[str, Any] | None = None
        if accelerator.scaler is not None:
            fresh = torch.amp.GradScaler(accelerator.device.type)
            accelerator.scaler.load_state_dict(fresh.state_dict())
        if resume:
            self._restore()
        if path is not None:
            path.attach(
                self.optimizer,
                may_differ=accelerator.scaler is not None or objective.moves_weights,
            )
        self.compiled = Compiled(options, accelerator.device) if options.torchcompile else None
        module = self.compiled(objective) if self.compiled else objective
        self.step_module = accelerator.prepare_model(module)
        self.step_optimizer = accelerator.prepare_optimizer(self.optimizer)
        self.side = self._side()
        self.tracker = None

    def fit(self) -> dict[str, Any]:
        """Train what remains; returns `last` and `best`: {epoch, top1, top5, loss}.

        Raises `Stopped`, with a checkpoint written, when SIGTERM or SIGINT arrives.
        """
        options, main = self.options, self.accelerator.is_main_process
        first = self.progress.position.epoch
        on_main(self.accelerator, lambda: self.run.begin(self.arguments))
        if self.progress.position == Position(0):
            on_main(self.accelerator, self._keep_beginning)
        if main and first < options.epochs:
            # Of an epoch that is trained again the old point goes.
            self.tracker = TensorBoardTracker("", self.run.tensorboard, purge_step=first + 1)
            self.tracker.start()
        self.started, self.share_before = time.perf_counter(), self._share_done()
        profiler = Profile(self.run.profile, options.profile if main else None)
        try:
            with Interrupt(self.accelerator) as self.interrupt, profiler as self.profile:
                for epoch in range(first, options.epochs):
                    self._run_epoch(epoch)
                if number := self.interrupt.at_last():
                    raise Stopped(number, " after the last epoch; --resume auto does what is left")
        finally:
            if self.tracker is not None:
                self.tracker.finish()
            self.train.close()
            self.held_out.close()
            # The next network of this process is not to share anything with this one.
            self.accelerator.free_memory()
            if self.compiled:
                torch.compiler.reset()
        return dict(self.history)

    def _side(self) -> Side | None:
        """Where the teacher works ahead; None where it does not."""
        device = self.accelerator.device
        ahead = self.teacher is not None and self.options.teacher_ahead
        return SideStream(device) if ahead and device.type == "cuda" else None

    def _run_epoch(self, epoch: int) -> None:
        options = self.options
        started = time.perf_counter() - self.progress.seconds
        self.schedule.start_epoch(epoch)
        self.objective.start_epoch(epoch)
        if self.random_state is not None:
            checkpoint.set_random_state(self.random_state)
            self.random_state = None
        else:
            # Dropout is then a function of (seed, epoch, process), whatever ran before.
            rank = self.accelerator.process_index
            seed_process(derive_seed(options.seed, "train", epoch, rank))
        tally = self._train_epoch(started)
        losses, images = self._means(tally)
        trained = time.perf_counter() - started
        self._share_state()
        due = (epoch + 1) % options.val_interval == 0 or epoch + 1 == options.epochs
        scores = self._evaluate(tally, started) if due else dict.fromkeys(self.keeper.score_names)
        if due and "loss" in scores:
            self.schedule.losses.append(scores["loss"])
        row = {"epoch": epoch + 1}
        row |= {f"train_{name}": value for name, value in losses.items()}
        row |= {f"eval_{name}": score for name, score in scores.items()}
        row |= self.objective.gauges()
        row["lr"] = self.optimizer.param_groups[0]["lr"]
        row["images_per_second"] = round(images / trained, 1)
        row["seconds"] = round(time.perf_counter() - started, 3)
        better = due and self.keeper.remember(self.history, row)
        if self.path is not None:
            self.path.close_epoch(epoch + 1)
        self.progress = Progress(Position(epoch + 1), self._no_sums())
        on_main(self.accelerator, lambda: self._close_epoch(row, better))
        self._save()

    def _train_epoch(self, started: float) -> Tally:
        """The rest of the epoch at hand; returns this process's tally."""
        accelerator, options = self.accelerator, self.options
        epoch, done = self.progress.position
        steps = self.train.plan.steps
        tally = Tally(self.progress.sums)
        self._train_mode()
        bar = tqdm(
            total=steps,
            initial=done,
            desc=f"epoch {epoch + 1}/{options.epochs}",
            disable=not (accelerator.is_main_process and sys.stderr.isatty()),
            leave=False,
        )
        self.schedule.start_step(epoch * steps + done)
        batches = self.train.epoch(epoch, first_step=done)
        with bar:
            for batch in made_ready(batches, partial(self._make_ready, epoch), self.side):
                portion = batch.portion
                if portion.starts_step and (number := self.interrupt.agreed()):
                    self._stop(number, tally, started)
                total, terms = self._micro_step(batch)
                tally.add(total, terms, portion.count, epoch * steps + done + 1)
                if not portion.ends_step:
                    continue
                self._update()
                done += 1
                self.progress.position = Position(epoch, done)
                bar.update()
                self.profile.step()
                self.schedule.start_step(epoch * steps + done)
                if done % options.log_interval == 0:
                    means, _ = self._means(tally)
                    shown = {name: f"{value:.4g}" for name, value in means.items()}
                    bar.set_postfix({"left": self._time_left(), **shown})
                within = done < steps and options.checkpoint_steps
                if within and done % options.checkpoint_steps == 0:
                    self._pause(tally, started)
                    self._save()
        return tally

    def _update(self) -> None:
        """One optimizer step on the gradients gathered so far."""
        if self.options.clip_grad:
            self.accelerator.clip_grad_norm_(self.objective.parameters(), self.options.clip_grad)
        # accelerate's wrapper looks for packages at every step; only gradient scaling needs it.
        scaled = self.accelerator.scaler is not None
        (self.step_optimizer if scaled else self.optimizer).step()
        self.optimizer.zero_grad()
        self.objective.after_step()
        if self.path is not None:
            self.path.after_step()
        if self.average is not None and self.accelerator.is_main_process:
            self.average.update(self.objective.student)

    def _make_ready(self, epoch: int, batch: Batch) -> Ready:
        """`batch` of the 0-based `epoch` on the device, with the teacher's answer."""
        images = self.prepare(batch.images)
        labels, indices = (
            tensor.to(self.accelerator.device, non_blocking=True)
            for tensor in (batch.labels, batch.indices)
        )
        taught: tuple = ()
        if self.teacher is not None:
            with self.accelerator.autocast():
                taught = self.teacher(images, indices, epoch)
        return Ready(batch.portion, images, labels, indices, taught)

    def _micro_step(self, batch: Ready) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward and backward; returns total [] and terms [terms]."""
        accelerator, weight = self.accelerator, batch.portion.weight
        if self.compiled:
            self.compiled.begin_step()
        wait = not batch.portion.ends_step
        with accelerator.no_sync(self.step_module) if wait else nullcontext():
            total, terms, _ = self._forward(
                batch.images, batch.labels, *batch.taught, indices=batch.indices
            )
            loss = total if weight == 1 else total * weight
            if accelerator.scaler is None:
                loss.backward()
            else:
                accelerator.backward(loss)
        return total, terms

    def _forward(self, images: torch.Tensor, *others: Any, **more: Any):
        try:
            return self.step_module(images, *others, **more)
        except ValueError as error:
            if "more than 1 value per channel" in str(error):
                raise UsageError(
                    f"a batch of {len(images)} image leaves batch normalisation a single value a "
                    "channel; choose another --batch-size, --drop-last or --freeze-bn"
                ) from None
            raise

    def _means(self, tally: Tally) -> tuple[dict[str, float], int]:
        """Means over all processes so far, and images; raises `UserError` for one not finite."""
        device = self.accelerator.device
        *totals, count = self.accelerator.reduce(tally.sums.to(device), "sum").tolist()
        if not all(map(math.isfinite, totals)):
            first_bad = tally.first_bad.to(device)
            bad = self.accelerator.gather(first_bad[None]).amin(0).tolist()
            step = min(bad)
            # The total goes bad with any term; the term is the news.
            pairs = reversed(list(zip(self.names, bad, strict=True)))
            term = next(name for name, its_step in pairs if its_step == step)
            good = checkpoint.latest(self.run.checkpoints)
            raise UserError(
                f"loss term '{term}' is not finite at step {step:.0f}; last good checkpoint: "
                f"{good or 'none'}; lower --lr or the term's weight, or add --clip-grad"
            )
        return {n: t / count for n, t in zip(self.names, totals, strict=True)}, int(count)

    def _no_sums(self) -> list[float]:
        return [0.0] * (len(self.names) + 1)

    def _train_mode(self) -> None:
        self.objective.train()
        if self.options.freeze_bn:
            for module in self.objective.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    @property
    def scored(self) -> nn.Module:
        """The network that is evaluated and saved: the student, or its averaged weights."""
        return self.average.module if self.average is not None else self.objective.student

    def _share_state(self) -> None:
        """Give every process the main one's running statistics, and its average of the weights.

        One network is then scored and saved.
        """
        if self.accelerator.num_processes == 1:
            return
        shared = list(self.objective.buffers())
        if self.average is not None:
            shared += self.average.module.state_dict().values()
        for tensor in shared:
            torch.distributed.broadcast(tensor, 0)

    def _evaluate(self, tally: Tally, started: float) -> dict[str, float]:
        def before_batch() -> None:
            if number := self.interrupt.agreed():
                self._stop(number, tally, started)

        scored = self.scored.eval()
        return self.keeper.evaluate(
            scored, self.held_out, self.accelerator, self.prepare, before_batch
        )

    def _keep_beginning(self) -> None:
        """What is kept of epoch 0: the network as training begins."""
        self._write_path()
        self.keeper.keep_beginning(self.scored)

    def _write_path(self) -> None:
        if self.path is not None:
            self.run.set_path_length(self.path.as_csv())

    def _close_epoch(self, row: dict[str, Any], better: bool) -> None:
        self.keeper.save(self.scored, row, better)
        self._write_path()
        self.run.append_row(row)
        tags = {
            k.replace("_", "/", 1) if k.startswith(("train_", "eval_")) else f"train/{k}": v
            for k, v in row.items()
            if k not in ("epoch", "seconds") and v is not None
        }
        self.tracker.log(tags, step=row["epoch"])
        terms, epochs = self.objective.term_names, self.options.epochs
        journal.say(epoch_line(row, terms, epochs, self._time_left()))

    def _share_done(self) -> float:
        epoch, step = self.progress.position
        return (epoch + step / self.train.plan.steps) / self.options.epochs

    def _time_left(self) -> str:
        """Of the whole run, at the speed since this process began with it; empty when unknown."""
        done = self._share_done()
        spent = time.perf_counter() - self.started
        if done in (self.share_before, 1):
            return ""
        return duration(spent * (1 - done) / (done - self.share_before))

    def _pause(self, tally: Tally, started: float) -> None:
        """Note what the unfinished epoch has added up, which must be finite to be saved."""
        if self.progress.position.step:
            self._means(tally)
        self.progress.sums = tally.sums.tolist()
        self.progress.seconds = time.perf_counter() - started

    def _stop(self, number: int, tally: Tally, started: float) -> None:
        """Write a checkpoint of where the run is, and end it."""
        position = self.progress.position
        if position == Position(0):
            raise Stopped(number, " before the first step; nothing is saved yet")
        self._pause(tally, started)
        kept = self.run.checkpoints / position.name()
        if not on_main(self.accelerator, kept.exists):
            self._save()
        raise Stopped(
            number,
            f" after epoch {position.epoch}, step {position.step}; saved {kept}; the same command "
            "with --resume auto goes on from there",
        )

    def _save(self) -> None:
        """Write a checkpoint of `progress`."""
        mine = {"sums": self.progress.sums, "random": checkpoint.random_state()}
        state = {
            "history": self.history,
            "seconds": self.progress.seconds,
            "processes": gather_object([mine]),
        }
        if self.options.sched == "plateau":
            state["losses"] = self.schedule.losses
        if self.path is not None:
            state["path_length"] = self.path.rows
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        on_main(
            self.accelerator,
            lambda: checkpoint.save(
                self.run.checkpoints,
                self.progress.position,
                self.objective,
                self.optimizer,
                state,
                summary=self.run.summary,
                average=self.average,
                keep=self.options.checkpoint_hist,
            ),
        )

    def _restore(self) -> None:
        # As the main process sees it: all go on from there, or those that cannot say so.
        path = on_main(self.accelerator, lambda: checkpoint.latest(self.run.checkpoints))
        if path is None:
            on_main(self.accelerator, lambda: self.run.set_rows(""))
            return
        position, state = checkpoint.load(
            path, self.objective, self.optimizer, average=self.average
        )
        if "scaler" in state and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.history = state["history"]
        self.schedule.losses = state.get("losses", [])
        mine = state["processes"][self.accelerator.process_index]
        self.progress = Progress(position, mine["sums"], state["seconds"])
        if position.step:
            self.random_state = mine["random"]
        summary = self.run.summary
        on_main(self.accelerator, lambda: self.run.set_rows(checkpoint.rows_of(path, summary)))
        if self.path is not None:
            self.path.rows = state["path_length"]
            on_main(self.accelerator, self._write_path)
