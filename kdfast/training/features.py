"""Paired features of frozen networks: 16-bit rows from disk, or the networks run on the fly."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from kdfast.data import Batch, BatchPlan, ImageData, Loader, Portion, Source
from kdfast.data.sources import Subset
from kdfast.errors import UsageError, UserError
from kdfast.seeding import derive_seed
from kdfast.training.feature_build import Target, build, data_fingerprint, first_images
from kdfast.training.feature_cache import LAYOUT, FeatureCache, decode
from kdfast.training.feature_dump import Dump, import_dump
from kdfast.training.run_folder import on_main
from kdfast.training.setup import eval_plan, evaluation_transform, loader_settings, train_plan
from kdfast.training.tapped import Tapped

# Batches that are read before they are asked for.
AHEAD = 2
# Rows of a cache that are computed again before it is believed.
CHECKED_IMAGES = 8


class Features:
    """Features of the same images in several networks, at one layer each.

    Batches are those of `kdfast.data.Loader` with the same options: the same images in the same
    order in the same portions. There is no augmentation. With `options.features` "cache" each
    network's features are computed once, kept below `options.feature_dir` (by default features/ in
    `options.output`) as `options.feature_dtype`, and found there again; with "live" the networks
    run in every pass. With `options.shuffle_pairs` every network after the first answers to other
    images than the first: a fixed derangement of the split, by `options.seed`.

    With `dump`, a folder that the published code has written of two networks, the features of the
    training split come from there: their "index" is then the number of the record.

    Raises `UsageError` for shuffled pairs or a dump without a cache.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        accelerator: Accelerator,
        data: ImageData,
        nets: Sequence[Tapped],
        dump: str | Path | None = None,
    ):
        if options.shuffle_pairs and options.features == "live":
            raise UsageError(
                "--shuffle-pairs takes features of other images from the cache; drop "
                "--features live"
            )
        if dump and options.features == "live":
            raise UsageError("--feature-dump is read into a cache; drop --features live")
        self.options, self.accelerator, self.data = options, accelerator, data
        self.nets = tuple(nets)
        self.dump = Dump(dump, [net.shape for net in self.nets]) if dump else None
        self._identities = [json.dumps(_known(net)) for net in self.nets]

    def loader(self, split: str, *, shuffle: bool = False) -> CachedLoader | LiveLoader:
        """Batches of "train", "val" or "test"; the set's "val" where it has no third split.

        With `shuffle` they are training's: shuffled anew in every epoch, gathered over
        `grad_accum_steps`; without, those of an evaluation. A cache that is not there yet is made
        first, by all processes together; all have to call this.

        Raises:
            UsageError: less images than a step takes.
            UserError: a cache that is damaged, or of other weights, images or settings; one that
                cannot be written.
        """
        split, source = self._source(split)
        if shuffle:
            plan = train_plan(self.options, self.data, source, self.accelerator)
        else:
            plan = eval_plan(self.options, source, self.accelerator)
        if self.options.features == "live":
            return self._live(plan, source)
        caches = self._caches(split, source)
        order = None
        if self.options.shuffle_pairs:
            order = derangement(len(source), derive_seed(self.options.seed, "pairs", split))
        return CachedLoader(plan, caches, self.accelerator.device, order)

    def prepare(self, images: Sequence[Rows | torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """float32 features [N, *shape] on the device of what a batch has as `images`, by network.

        A network that is given twice, with the same images, is asked once.
        """
        found: dict[tuple, torch.Tensor] = {}
        features = []
        for net, identity, part in zip(self.nets, self._identities, images, strict=True):
            key = (id(part), identity)
            if key not in found:
                rows = isinstance(part, Rows)
                feature = part.features(self.accelerator.device) if rows else net.features(part)
                found[key] = self._arranged(feature)
            features.append(found[key])
        return tuple(features)

    def sample(self, loader: CachedLoader | LiveLoader, count: int) -> Iterator[torch.Tensor]:
        """float32 features [N, *shape] of the first network alone, on the device, batch by batch.

        Of this process's share of `count` training images, evenly spaced over the split; `loader`
        is one of that split.
        """
        size, batch = loader.plan.size, loader.plan.batch_size
        count = min(count, size)
        chosen = [i * size // count for i in range(count)]
        share = chosen[self.accelerator.process_index :: self.accelerator.num_processes]
        if isinstance(loader, CachedLoader):
            for start in range(0, len(share), batch):
                yield loader.first(share[start : start + batch]).features(self.accelerator.device)
        elif share:
            transform = evaluation_transform(self.options, self.data, self.nets[0].inputs.size)
            settings = loader_settings(self.options, self.data, self.accelerator)
            part = Subset(self._source("train")[1], share)
            images = Loader(part, transform, BatchPlan(len(share), batch), **settings)
            try:
                for one in images.epoch(0):
                    yield self.nets[0].features(one.images)
            finally:
                images.close()

    def _arranged(self, features: torch.Tensor) -> torch.Tensor:
        maps = self.options.channels_last and features.dim() == 4
        return features.contiguous(
            memory_format=torch.channels_last if maps else torch.contiguous_format
        )

    def _source(self, split: str) -> tuple[str, Source | Dump]:
        if split == "train" and self.dump is not None:
            return split, self.dump
        if split == "test" and self.data.test is None:
            split = "val"
        sources = {"train": self.data.train, "val": self.data.eval, "test": self.data.test}
        return split, sources[split]

    def _live(self, plan: BatchPlan, source: Source) -> LiveLoader:
        settings = loader_settings(self.options, self.data, self.accelerator)
        sizes = [net.inputs.size for net in self.nets]
        loaders = {
            size: Loader(
                source, evaluation_transform(self.options, self.data, size), plan, **settings
            )
            for size in dict.fromkeys(sizes)
        }
        return LiveLoader(plan, loaders, sizes)

    def _caches(self, split: str, source: Source | Dump) -> list[FeatureCache]:
        """The cache of each network, made where it is not there; equal networks share one."""

        def record_all() -> list[dict[str, Any]]:
            if isinstance(source, Dump):
                fingerprint = source.fingerprint()
            else:
                fingerprint = data_fingerprint(source, in_memory=self.data.in_memory)
            return [self._record(net, split, len(source), fingerprint) for net in self.nets]

        records = on_main(self.accelerator, record_all, patient=True)
        folder = Path(self.options.feature_dir or Path(self.options.output) / "features")
        paths = [folder / folder_name(record) for record in records]
        targets = {
            path: Target(net, path, record)
            for net, path, record in zip(self.nets, paths, records, strict=True)
        }
        due = on_main(self.accelerator, lambda: [p for p in targets if not p.exists()])
        if due and isinstance(source, Dump):
            made = [Target(*of) for of in zip(self.nets, paths, records, strict=True)]
            action = partial(import_dump, source, made, self.options, self.data)
            on_main(self.accelerator, action, patient=True)
        elif due:
            made = [targets[path] for path in due]
            build(made, self.options, self.accelerator, self.data, source)
        on_main(self.accelerator, lambda: self._check(targets.values(), source))
        opened = {path: FeatureCache(path) for path in targets}
        return [opened[path] for path in paths]

    def _check(self, targets: Iterable[Target], source: Source | Dump) -> None:
        """Refuse caches that are not of these weights, images and settings."""
        for target in targets:
            cache, net = FeatureCache(target.path), target.net
            cache.require(target.record)
            if isinstance(source, Dump):
                continue  # its rows were compared when they were taken over
            size = net.inputs.size
            images = first_images(CHECKED_IMAGES, self.options, self.data, source, size)
            cache.require_like(net.features(images))

    def _record(self, net: Tapped, split: str, images: int, fingerprint: str) -> dict[str, Any]:
        options, size = self.options, net.inputs.size
        native = self.data.image_size
        crop = None
        if size != (native, native):
            mode = options.crop_mode or "center"
            crop = [native, options.crop_pct, options.interpolation, mode]
        chosen = [getattr(options, f"{split}_split")]
        if split == "train":
            chosen.append(options.train_half)
        record = {
            **_known(net),
            "layout": LAYOUT,
            "dtype": options.feature_dtype,
            "dataset": self.data.name,
            "split": split,
            "selection": chosen,
            "images": images,
            "crop": crop,
            "dumped": self.dump is not None and split == "train",
            "data": fingerprint,
        }
        return json.loads(json.dumps(record))


def _known(net: Tapped) -> dict[str, Any]:
    """What is recorded of a network, but for where its weights lie."""
    return {key: value for key, value in net.record().items() if key != "path"}


def folder_name(record: dict[str, Any]) -> str:
    """`<checksum8>-<layer>-<dataset>-<split>-<hash>`, whose hash is of all settings.

    Not of the images themselves: a cache of images that have changed is to be found, and refused.
    """
    settings = {key: value for key, value in record.items() if key != "data"}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    words = (record["checksum"][:8], record["layer"], record["dataset"], record["split"])
    safe = (re.sub(r"[^\w.]+", "_", word) for word in words)
    return "-".join((*safe, digest[:8]))


def derangement(count: int, seed: int) -> torch.Tensor:
    """A permutation of range(count) that moves every number, each as likely as the others.

    Raises `UserError` when `count` is below 2.
    """
    if count < 2:
        raise UserError("--shuffle-pairs needs at least two images a split")
    generator = torch.Generator().manual_seed(seed)
    while True:  # e times on average
        order = torch.randperm(count, generator=generator)
        if not (order == torch.arange(count)).any():
            return order


@dataclass(frozen=True)
class Rows:
    """Stored features [N, *shape], 16-bit on the host, and their scale [C] on the device.

    The scale is None where all of it is 1.
    """

    stored: torch.Tensor
    scale: torch.Tensor | None

    def features(self, device: torch.device) -> torch.Tensor:
        return decode(self.stored.to(device, non_blocking=True), self.scale)


class CachedLoader:
    """Batches of `plan` out of `caches`, read by a thread a little ahead of their use.

    `Batch.images` are `Rows`, one for each cache, in order. Where `order` is given, all but the
    first are of image `order[i]` instead of i.
    """

    def __init__(
        self,
        plan: BatchPlan,
        caches: Sequence[FeatureCache],
        device: torch.device,
        order: torch.Tensor | None = None,
    ):
        self.plan, self.caches, self.order = plan, list(caches), order
        self._pin = device.type == "cuda"
        self._scales = {
            cache.path: None if (cache.scale == 1).all() else cache.scale.to(device)
            for cache in caches
        }
        self._labels = torch.from_numpy(self.caches[0].columns["label"].astype("int64"))
        self._reader: ThreadPoolExecutor | None = None

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` from `first_step` on."""
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, thread_name_prefix="kdfast-features")
        reader = self._reader
        coming: deque = deque()
        portions = iter(self.plan.portions(epoch, first_step))

        def read_next() -> None:
            if (portion := next(portions, None)) is not None:
                coming.append(reader.submit(self._read, portion))

        for _ in range(AHEAD):
            read_next()
        try:
            while coming:
                batch = coming.popleft().result()
                read_next()
                yield batch
        finally:
            for future in coming:
                future.cancel()

    def first(self, indices: Sequence[int]) -> Rows:
        """What a batch of images `indices` has for the first network."""
        cache = self.caches[0]
        return Rows(cache.rows(indices), self._scales[cache.path])

    def close(self) -> None:
        """End the thread; the next epoch would start a new one."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.shutdown(cancel_futures=True)

    def _read(self, portion: Portion) -> Batch:
        indices = torch.tensor(portion.indices)
        found: dict[tuple, Rows] = {}
        keys = []
        for position, cache in enumerate(self.caches):
            moved = position > 0 and self.order is not None
            keys.append((cache.path, moved))
            if keys[-1] not in found:
                wanted = self.order[indices] if moved else indices
                rows = cache.rows(wanted.numpy(), pin=self._pin)
                found[keys[-1]] = Rows(rows, self._scales[cache.path])
        images = tuple(found[key] for key in keys)
        return Batch(images, self._labels[indices], indices, portion)


class LiveLoader:
    """Batches of `plan` whose `images` are uint8 [N, 3, H, W], one for each of `sizes`, in order.

    `loaders` give them, one for each size there is.
    """

    def __init__(
        self,
        plan: BatchPlan,
        loaders: dict[tuple[int, int], Loader],
        sizes: Sequence[tuple[int, int]],
    ):
        self.plan, self.loaders, self.sizes = plan, loaders, sizes

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` from `first_step` on."""
        iterators = [loader.epoch(epoch, first_step) for loader in self.loaders.values()]
        for batches in zip(*iterators, strict=True):
            images = {s: b.images for s, b in zip(self.loaders, batches, strict=True)}
            yield replace(batches[0], images=tuple(images[size] for size in self.sizes))

    def close(self) -> None:
        """End the worker processes."""
        for loader in self.loaders.values():
            loader.close()
