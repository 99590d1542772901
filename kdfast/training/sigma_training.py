"""Sigma maps of images at the checkpoints of one network, into a run folder.

Cheng, Rao, Chen, Zhang, "Explaining Knowledge Distillation by Quantifying the Knowledge", CVPR
2020: which images are tried, in which order, and when one is accepted, as in the authors' code.
"""

from __future__ import annotations

import argparse
import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image

from kdfast.data import ImageData, to_float
from kdfast.data.foreground import cell_map, foreground_candidates, foreground_of
from kdfast.data.sources import UNREADABLE, unreadable
from kdfast.errors import Stopped, UserError
from kdfast.ops import Key
from kdfast.training import journal
from kdfast.training.interrupt import Interrupt
from kdfast.training.layout import FREE
from kdfast.training.path_length import weighted_before
from kdfast.training.run_folder import RunFolder, on_main
from kdfast.training.setup import arguments_of
from kdfast.training.sigma import SigmaSettings, SigmaSolution, exact_products, solve_sigma
from kdfast.training.sigma_files import (
    PATH_LENGTH,
    image_folder,
    made_of,
    read_candidates,
    read_image,
    read_options,
    read_result,
    result_path,
    write_candidates,
    write_npz,
    write_picture,
    write_result,
)
from kdfast.training.sigma_memory import bytes_per_sample, choose_chunk, working_bytes
from kdfast.training.snapshots import Watched, accept_from

HEAT = (-4.5, -2.3)  # nats; the range of the published heat maps


class SigmaFolder(RunFolder):
    """The run folder of sigma training."""

    free = frozenset(
        FREE - {"epochs"} | {"wanted-images", "in-common", "memory", "weights-dir", "runs", "run"}
    )


def candidates_of(indices: Sequence[int], count: int, seed: int) -> list[int]:
    """At most `count` of `indices`, drawn without replacement, in the order they are tried.

    By Python's `random.sample`, as in the published code.
    """
    return random.Random(seed).sample(indices, min(count, len(indices)))


def regions(entropy: np.ndarray, foreground: np.ndarray, lowest: float) -> tuple[float, float]:
    """Mean H of the foreground and of the background; NaN of an empty one.

    Of the `lowest` share of each region's cells, rounded up, those of lowest H.
    """
    means = []
    for cells in (foreground, ~foreground):
        found = np.sort(entropy[cells])  # NaN last
        few = found if np.isnan(found).any() else found[: math.ceil(lowest * len(found))]
        means.append(float(few.mean()) if len(few) else math.nan)
    return means[0], means[1]


def accepts(entropy: np.ndarray, foreground: np.ndarray, lowest: float = 1.0) -> bool:
    """Whether mean H of the foreground <= mean H of the background; NaN and empty regions fail."""
    inside, outside = regions(entropy, foreground, lowest)
    return inside <= outside


class _Noted(Exception):
    """A signal came while a batch was being solved."""


class SigmaTrainer:
    """One network's sigma run, a block of candidates at a time.

    The images of a block go round the processes. A block goes from the last checkpoint to the
    first, and an image that is rejected leaves it.

    Attributes:
        rows: the candidates, as candidates.csv has them.
        epochs: checkpoints, ascending.
        units, solved: results of an image at a checkpoint that this process has looked at, and
            those of them that it has made.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        accelerator: Accelerator,
        data: ImageData,
        watched: Watched,
        settings: SigmaSettings,
        run: SigmaFolder,
    ):
        self.options, self.accelerator, self.data = options, accelerator, data
        self.watched, self.settings, self.run = watched, settings, run
        self.epochs = watched.snapshots.epochs
        self.accept_from = accept_from(self.epochs, options.accept_from)
        self.device = accelerator.device
        indices = candidates_of(foreground_candidates(data), options.candidates, options.seed)
        labels = data.train.labels()
        self.rows = [
            {
                "id": i, "index": index, "name": data.train.describe(index),
                "label": labels[index], "status": "unfinished", "reason": "",
            }
            for i, index in enumerate(indices)
        ]  # fmt: skip
        self.foregrounds: dict[int, np.ndarray] = {}
        self.loaded: int | None = None
        self.before: list[dict[str, Any]] = []
        self.units = self.solved = 0

    def _record(self) -> dict[str, Any]:
        """What args.yaml holds."""
        snapshots = self.watched.snapshots
        image = self._dummy()
        sample = bytes_per_sample(self.watched.feature, image)
        self.chunk = self.options.chunk or self._affordable(sample)
        if self.options.tf32:
            self._check_tf32(image)
        resolved = {
            "kind": "sigma",
            "wanted-images": self.options.images,  # `images` are those that there are
            "lambda": self.settings.weight,
            "run": str(snapshots.run or self.options.weights_dir),
            "network": snapshots.name,
            "model": self.watched.architecture,
            "layer": self.watched.layer,
            "inputs": {name: list(value) for name, value in asdict(self.watched.inputs).items()},
            "checkpoints": self.epochs,
            "checksums": on_main(self.accelerator, self.watched.checksums, patient=True),
            "path-layer": weighted_before(self.watched.network, self.watched.layer, image),
            "accept-from": self.accept_from,
            "settings": asdict(self.settings),
            "chunk": self.chunk,
            "epochs": max(1, *self.epochs),
        }
        return arguments_of(self.options, self.accelerator, self.data) | resolved

    def _affordable(self, sample: int) -> int:
        """Samples in one pass, by --memory and the bytes of a sample.

        A run that goes on keeps to those it was begun with: other passes round differently.
        """
        own = self.options
        memory = working_bytes(self.watched.network, self.device, own.memory * 2**30)
        asked = choose_chunk(sample, own.image_batch, self.settings.samples, memory)
        begun = on_main(self.accelerator, self._begun_with) if own.resume else None
        if begun is None or begun == asked:
            return asked
        if "memory" in own.given:
            journal.say(
                f"note: --memory {own.memory:g} has no effect, a pass keeps the samples that the "
                f"run was begun with, {begun}; another --experiment begins anew"
            )
        return begun

    def _begun_with(self) -> int | None:
        try:
            chunk = read_options(self.run.path).get("chunk")
        except UserError:
            return None  # nothing there, or what the check of the folder refuses
        return chunk if type(chunk) is int and chunk > 0 else None

    def _dummy(self) -> torch.Tensor:
        return torch.zeros(1, 3, *self.watched.inputs.size, device=self.device)

    def _check_tf32(self, image: torch.Tensor) -> None:
        """Refuse TF32 where it moves the loss by more than one in a hundred."""
        if self.device.type != "cuda":
            return
        found = []
        index = self.rows[0]["index"]
        image = self._normalised([self._pixels(index)])
        noise = 0.01 * torch.randn(
            (16, *image.shape[1:]), generator=torch.Generator().manual_seed(0)
        ).to(self.device)
        for tf32 in (False, True):
            with exact_products(self.device, tf32), torch.no_grad():
                moved = self.watched.feature(image + noise) - self.watched.feature(image)
                found.append(float(moved.double().square().mean()))
        if not abs(found[1] - found[0]) <= 0.01 * found[0]:
            raise UserError(
                f"--tf32 changes the loss from {found[0]:.4g} to {found[1]:.4g}, more than 1 %; "
                "leave it out"
            )

    def settle(self) -> None:
        """Settle what the run is made with; refuse, before anything is written, to go on with it
        where that is not what it was begun with.
        """
        self.arguments = self._record()
        if self.options.resume is not None:
            on_main(self.accelerator, lambda: self.run.check_same(self.arguments))

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the run folder, for `block` and `finish`."""
        resume = self.options.resume is not None
        with self.run.claimed(self.accelerator, self.arguments, resume=resume):
            on_main(self.accelerator, lambda: self._begin(self.arguments))
            yield

    def finish(self, **more: Any) -> dict[str, Any]:
        """Write the results, with `more`, and return them."""
        results = self._results() | more
        on_main(self.accelerator, lambda: self.run.write_results(results))
        return results

    def _begin(self, arguments: dict[str, Any]) -> None:
        self.run.begin(arguments)
        self.run.results.unlink(missing_ok=True)
        with suppress(UserError):  # missing or damaged, it is made again
            self.before = read_candidates(self.run.path)
        source = self.watched.snapshots.run
        if source is not None and (source / PATH_LENGTH).is_file():
            text = (source / PATH_LENGTH).read_bytes()
            (self.run.path / PATH_LENGTH).write_bytes(text)

    def accepted(self) -> set[int]:
        """Ids of the accepted candidates."""
        return {row["id"] for row in self.rows if row["status"] == "accepted"}

    def block(
        self,
        block: list[dict[str, Any]],
        interrupt: Interrupt,
        told: Callable[[int, int], None],
    ) -> None:
        """Take some of `rows` through all checkpoints, the last first.

        `told` is called after each checkpoint with its epoch and how many of the block remain.
        Raises `Stopped` when a signal came.
        """
        place = self.accelerator.process_index
        mine = block[place :: self.accelerator.num_processes]
        self._prepare(mine)
        self._share(block, mine)
        for epoch in reversed(self.epochs):
            if not any(self._goes_on(row) for row in block):
                break
            alive = [r for r in mine if self._goes_on(r) and r["id"] in self.foregrounds]
            stopped = None
            try:
                self._solve(alive, epoch, interrupt)
            except _Noted:
                stopped = interrupt.noted
            # Every process takes part, with images or without.
            stopped = interrupt.at_last() or stopped
            if stopped:
                raise Stopped(
                    stopped,
                    f"; finished results are in {self.run.path}; the same command with --resume "
                    "auto goes on from there",
                )
            self._share(block, mine)
            told(epoch, sum(row["status"] != "rejected" for row in block))
        for row in block:
            if row["status"] == "unfinished":
                row["status"] = "accepted"
        for row in mine:
            if row["status"] == "accepted":
                self._picture(row)
        on_main(self.accelerator, lambda: write_candidates(self.run.path, self._known()))

    def _known(self) -> list[dict[str, Any]]:
        """`rows`; those not tried again yet as an earlier part of the run left them."""
        before = {row["index"]: row for row in self.before}
        return [
            before.get(row["index"], row) if row["status"] == "unfinished" else row
            for row in self.rows
        ]

    def _goes_on(self, row: dict[str, Any]) -> bool:
        return row["status"] != "rejected" or self.options.keep_rejected

    def _share(self, block: list[dict[str, Any]], mine: list[dict[str, Any]]) -> None:
        """What every process has found out about its images of the block."""
        found = gather_object([(row["id"], row["status"], row["reason"]) for row in mine])
        known = {number: (status, reason) for number, status, reason in found}
        for row in block:
            row["status"], row["reason"] = known[row["id"]]

    def _prepare(self, rows: list[dict[str, Any]]) -> None:
        """Read the images and their foregrounds; reject those without both regions."""
        self.pixels: dict[int, np.ndarray] = {}
        self.foregrounds.clear()
        for row in rows:
            pixels = self._pixels(row["index"])
            mask = foreground_of(self.data, row["index"], self.watched.inputs.size)
            cells = cell_map(mask, self.settings.grid, self.options.expand_foreground)
            if cells.all() or not cells.any():
                row["status"] = "rejected"
                row["reason"] = f"no {'background' if cells.any() else 'foreground'} cell"
                continue
            self.pixels[row["id"]], self.foregrounds[row["id"]] = pixels, cells
            if not (image_folder(self.run.path, row["id"]) / "image.npz").exists():
                write_npz(
                    image_folder(self.run.path, row["id"]) / "image.npz",
                    {"image": pixels, "foreground": cells},
                )
            elif (
                read_image(self.run.path, row["id"], self.settings.grid)["foreground"] != cells
            ).any():
                raise UserError(
                    f"{image_folder(self.run.path, row['id'])}: another foreground than the data "
                    "set gives now; put the data back as it was, or give another --experiment"
                )

    def _pixels(self, index: int) -> np.ndarray:
        """uint8 [H, W, 3]: the whole image at the network's size, both sides resized."""
        height, width = self.watched.inputs.size
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image = self.data.train.read(index)[0].convert("RGB")
        except UNREADABLE as error:
            raise unreadable(self.data.train, index, error) from None
        if image.size != (width, height):
            image = image.resize((width, height), Image.BILINEAR)
        return np.asarray(image)

    def _normalised(self, pixels: list[np.ndarray]) -> torch.Tensor:
        inputs = self.watched.inputs
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (inputs.mean, inputs.std))
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
        return to_float(images, mean, std).contiguous().to(self.device)

    def _solve(self, rows: list[dict[str, Any]], epoch: int, interrupt: Interrupt) -> None:
        """Make what is missing of the results at `epoch`, and judge the images by them."""
        path = self.run.path
        missing = [row for row in rows if not result_path(path, row["id"], epoch).exists()]
        if missing:
            # All of the batch, so that its bits do not depend on where a run was stopped.
            solution = self._solution(rows, epoch, interrupt)
            for i, row in enumerate(rows):
                if row in missing:
                    about = made_of(self.arguments, epoch, row)
                    write_result(path, row["id"], epoch, _arrays(solution, i), about)
            self.solved += len(missing)
        self.units += len(rows)
        for row in rows:
            self._judge(row, epoch)

    def _solution(
        self, rows: list[dict[str, Any]], epoch: int, interrupt: Interrupt
    ) -> SigmaSolution:
        def heed() -> None:
            if interrupt.noted:
                raise _Noted

        if self.loaded != epoch:
            self.watched.load(epoch)
            self.loaded = epoch
        try:
            return solve_sigma(
                self.watched.feature,
                self._normalised([self.pixels[row["id"]] for row in rows]),
                torch.tensor([row["index"] for row in rows], device=self.device),
                self.settings,
                Key(self.options.seed, "sigma", epoch),
                chunk=self.chunk,
                tf32=self.options.tf32,
                each_step=heed,
            )
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{str(error).split('. ')[0]}; give another --experiment with a smaller --memory "
                "or --image-batch"
            ) from None

    def _judge(self, row: dict[str, Any], epoch: int) -> None:
        if row["status"] == "rejected":
            return
        about = made_of(self.arguments, epoch, row)
        found = read_result(self.run.path, row["id"], epoch, about)
        if int(found["selected"]) < 0:
            still = float(found["delta2"]) == 0
            what = "delta2 is 0: the layer does not react" if still else "a loss is not finite"
            row["status"], row["reason"] = "rejected", f"{what} at checkpoint {epoch}"
            return
        cells = self.foregrounds[row["id"]]
        lowest = self.options.accept_lowest
        if epoch >= self.accept_from and not accepts(found["entropy"], cells, lowest):
            inside, outside = regions(found["entropy"], cells, lowest)
            row["status"] = "rejected"
            row["reason"] = (
                f"mean entropy {inside:.3f} of the foreground is above {outside:.3f} of the "
                f"background at checkpoint {epoch}"
            )

    def _picture(self, row: dict[str, Any]) -> None:
        """Heat maps of an accepted image."""
        for epoch in self.epochs:
            path = result_path(self.run.path, row["id"], epoch)
            if not path.with_suffix(".png").exists():
                about = made_of(self.arguments, epoch, row)
                entropy = read_result(self.run.path, row["id"], epoch, about)["entropy"]
                write_picture(path.with_suffix(".png"), entropy, *HEAT)

    def _results(self) -> dict[str, Any]:
        counts = {
            status: sum(row["status"] == status for row in self.rows)
            for status in ("accepted", "rejected")
        }
        tried = sum(counts.values())
        return {
            "run": str(self.run.path),
            "network": self.watched.snapshots.name,
            "layer": self.watched.layer,
            "shape": list(self.watched.shape),
            "checkpoints": self.epochs,
            "seed": self.options.seed,
            "processes": self.accelerator.num_processes,
            "candidates": len(self.rows),
            "tried": tried,
            **counts,
            "acceptance_rate": counts["accepted"] / tried,
        }


def _arrays(solution: SigmaSolution, i: int) -> dict[str, np.ndarray]:
    fields = {name: getattr(solution, name)[i].cpu().numpy() for name in vars(solution)}
    return fields | {"sigma": fields["sigma"][0]}
