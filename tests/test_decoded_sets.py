"""Image files decoded once into memory: the same pixels, counted before, shared by workers."""

from __future__ import annotations

import gc
import os
import pickle
import signal
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdfast.data import Augmentation, BatchPlan, Loader, keep_decoded, open_data, train_transform
from kdfast.data.sources import FileSource, FirstOf
from kdfast.errors import UserError
from kdfast.models import read_weights
from kdfast.training import image_cache

CLASSIFIER = "train/classifier.py"
MODES = ["RGB", "L", "P", "RGBA", "I;16", "CMYK", "1", "LA"]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Photos of all modes and of different sizes, two classes, 8 + 4."""
    generator = np.random.default_rng(0)
    for i in range(12):
        mode = MODES[i % len(MODES)]
        path = tmp_path / "photos" / ("train" if i < 8 else "val") / "ab"[i % 2] / f"{i}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (30 + i, 44 - i, 3), dtype=np.uint8)
        if mode == "I;16":
            image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 200)
        else:
            image = Image.fromarray(pixels).convert(mode)
        image.save(path.with_suffix({"CMYK": ".jpg"}.get(mode, ".png")))
    return tmp_path / "photos"


def total(source) -> int:
    """Bytes of the decoded images."""
    return sum(3 * np.prod(source.read(i)[0].size) for i in range(len(source)))


def pixels(source) -> list[bytes]:
    return [source.read(i)[0].convert("RGB").tobytes() for i in range(len(source))]


def reads(monkeypatch) -> list[int]:
    """The indices that file sources decode from now on."""
    seen, read = [], FileSource.read

    def counted(self, index):
        seen.append(index)
        return read(self, index)

    monkeypatch.setattr(FileSource, "read", counted)
    return seen


def test_every_image_is_decoded_once(folder, monkeypatch):
    data = open_data("folder", folder)
    kept = keep_decoded(data, 10**8)
    expected = pixels(data.train)
    seen = reads(monkeypatch)
    assert pixels(kept.train) == expected and sorted(seen) == list(range(8))
    assert pixels(kept.train) == expected and len(seen) == 8
    assert [kept.train.read(i)[0].size for i in range(8)] == [
        data.train.read(i)[0].size for i in range(8)
    ]
    assert kept.train.labels() == data.train.labels() == [kept.train.read(i)[1] for i in range(8)]
    assert [kept.train.describe(i) for i in range(8)] == [data.train.describe(i) for i in range(8)]
    assert len(kept.train) == 8 and (kept.name, kept.classes) == ("folder", 2)


def test_what_is_read_is_the_readers_own(folder):
    kept = keep_decoded(open_data("folder", folder), 10**8)
    expected = pixels(kept.train)
    for i in range(8):
        kept.train.read(i)[0].paste("white", (0, 0, 99, 99))
    assert pixels(kept.train) == expected


def test_the_budget_is_for_training_images_first(folder):
    data = open_data("folder", folder)
    train, held_out = total(data.train), total(data.eval)
    assert keep_decoded(data, train - 1) is data
    kept = keep_decoded(data, train)
    assert kept.train is not data.train and kept.eval is data.eval
    assert kept.train.nbytes == train
    assert keep_decoded(data, train + held_out - 1).eval is data.eval
    assert keep_decoded(data, train + held_out).eval.nbytes == held_out


def test_sizes_are_counted_without_decoding(folder, monkeypatch):
    data = open_data("folder", folder)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decodes"))
    assert keep_decoded(data, 10**8).train.nbytes > 0


def test_large_sets_are_told_by_a_sample(folder, monkeypatch):
    source = open_data("folder", folder).train
    many = FileSource(source.samples * 5000)
    opened = []
    size = FileSource.size
    monkeypatch.setattr(FileSource, "size", lambda self, i: opened.append(i) or size(self, i))
    data = open_data("folder", folder)
    large = type(data)("folder", many, data.eval, 2)
    assert keep_decoded(large, 10**6) is large and len(opened) < 1000


def test_limited_sets_need_less(folder):
    data = open_data("folder", folder, train_limit=3)
    assert isinstance(data.train, FirstOf)
    assert keep_decoded(data, total(data.train)).train.nbytes == total(data.train)


def test_sets_that_are_in_memory_or_in_a_library_stay(image_folder):
    data = open_data("digits")
    assert keep_decoded(data, 10**9) is data
    splits = {"train_split": "train", "eval_split": "val"}
    data = open_data("torch/image_folder", image_folder, **splits)
    assert keep_decoded(data, 10**9) is data


def epoch(loader: Loader, number: int) -> dict[int, torch.Tensor]:
    return {
        index: image
        for batch in loader.epoch(number)
        for index, image in zip(batch.indices.tolist(), batch.images, strict=True)
    }


def loader_of(source, workers: int) -> Loader:
    crop = train_transform((16, 16), Augmentation(crop="rrc"), "bilinear", None)
    plan = BatchPlan(len(source), 2, shuffle=True)
    return Loader(source, crop, plan, classes=2, workers=workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_share_what_one_of_them_decoded(folder, workers):
    data = open_data("folder", folder)
    plain = loader_of(data.train, 0)
    expected = [epoch(plain, e) for e in range(3)]
    kept = loader_of(keep_decoded(data, 10**8).train, workers)
    got = [epoch(kept, 0)]
    for path in folder.glob("train/*/*"):
        path.unlink()
    got += [epoch(kept, e) for e in (1, 2)]
    kept.close()
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[i], theirs[i]) for i in theirs)


def test_a_worker_killed_while_it_fills_leaves_nothing_wrong(folder, monkeypatch):
    data = open_data("folder", folder)
    expected = pixels(data.train)
    kept = keep_decoded(data, 10**8).train
    child = os.fork()
    if child == 0:
        for i in range(3):
            kept.read(i)
        # Dies between the pixels of an image and the word that they are there.
        convert = Image.Image.convert

        def die(image, mode):
            rgb = convert(image, mode)
            kept._pixels[kept._starts[3] : kept._starts[4] - 5] = 77
            os.kill(os.getpid(), signal.SIGKILL)
            return rgb

        monkeypatch.setattr(Image.Image, "convert", die)
        kept.read(3)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    seen = reads(monkeypatch)
    assert pixels(kept) == expected and seen == [3, 4, 5, 6, 7]


def test_memory_goes_with_the_set(folder):
    kept = keep_decoded(open_data("folder", folder), 10**8)
    store = kept.train._store
    pixels(kept.train)
    del kept
    gc.collect()
    store.close()  # refused while anything looks into it


def test_a_worker_that_was_not_forked_reads_files(folder):
    data = open_data("folder", folder)
    copied = pickle.loads(pickle.dumps(keep_decoded(data, 10**8).train))
    assert pixels(copied) == pixels(data.train)


def test_images_that_change_in_loading_are_not_kept(folder, monkeypatch):
    data = open_data("folder", folder)
    expected = pixels(data.train)
    real = FileSource.size
    monkeypatch.setattr(FileSource, "size", lambda self, i: (5, 7) if i == 2 else real(self, i))
    kept = keep_decoded(data, 10**8).train
    assert pixels(kept) == pixels(kept) == expected


@pytest.mark.parametrize("damage", ["text", "gone", "truncated"])
def test_damaged_images_are_told_when_they_are_read(folder, damage):
    data = open_data("folder", folder)
    path = Path(data.train.describe(4))
    content = path.read_bytes()
    path.unlink() if damage == "gone" else path.write_bytes(
        b"cat" if damage == "text" else content[: len(content) // 2]
    )
    loader = loader_of(keep_decoded(data, 10**8).train, 0)
    with pytest.raises(UserError, match=f"cannot read {path}"):
        epoch(loader, 0)


def test_no_memory_for_it(folder, monkeypatch):
    from kdfast.data import decoded

    def fail(*args):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(decoded.mmap, "mmap", fail)
    data = open_data("folder", folder)
    assert keep_decoded(data, 10**8) is data


# The flag.


def flags(folder: Path, *more: object) -> list[object]:
    start = ["--dataset", "folder", "--data-dir", folder, "--model", "cifar_resnet8", "-b", 4]
    return [*start, "--img-size", 16, "--epochs", 2, *more]


def test_results_do_not_depend_on_it(run_script, folder, monkeypatch):
    weights = {}
    for how, workers in (("never", 0), ("auto", 0), ("always", 2)):
        seen = reads(monkeypatch)
        command = flags(folder, "--cache-images", how, "-j", workers, "--experiment", how)
        code, _, err = run_script(CLASSIFIER, *command)
        assert code == 0, err
        weights[how] = read_weights(Path(f"output/{how}/last.safetensors"))[0]
        if workers == 0:
            assert len(seen) == {"never": 24, "auto": 12}[how]
    for how in ("auto", "always"):
        assert weights[how].keys() == weights["never"].keys()
        assert all(torch.equal(weights[how][k], value) for k, value in weights["never"].items())
    assert "decoded" in Path("output/auto/train.log").read_text()


def test_a_resumed_run_may_change_it(run_script, folder):
    command = flags(folder, "-j", 0, "--experiment", "mine", "--resume", "auto")
    assert run_script(CLASSIFIER, *command, "--cache-images", "never")[0] == 0
    assert run_script(CLASSIFIER, *command, "--epochs", 3)[0] == 0


def test_too_large_for_the_memory(run_script, refused, folder, monkeypatch):
    monkeypatch.setattr(image_cache, "free_memory", lambda: 5000)
    command = flags(folder, "-j", 0, "--epochs", 1)
    words = ["--cache-images always", "folder", "memory", "never"]
    refused(1, CLASSIFIER, *command, "--cache-images", "always", words=words)
    code, out, err = run_script(CLASSIFIER, *command, "--seeds", 1, 2)
    assert code == 0, err
    assert out.count("--cache-images") == 1
    code, out, _ = run_script(CLASSIFIER, *command, "--cache-images", "never")
    assert code == 0 and "--cache-images" not in out


def test_processes_of_a_machine_share_its_memory(folder, monkeypatch):
    data = open_data("folder", folder)
    monkeypatch.setattr(image_cache, "free_memory", lambda: 3 * total(data.train))
    options = Namespace(cache_images="auto")
    assert image_cache.cache_images(options, data) is not data
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert image_cache.cache_images(options, data) is data


def test_nothing_to_decode(run_script, refused, image_folder):
    command = ["--epochs", 1, "--train-limit", 64, "--eval-limit", 64, "--cache-images", "always"]
    assert run_script(CLASSIFIER, *command)[0] == 0
    command += ["--dataset", "torch/image_folder", "--data-dir", image_folder]
    command += ["--train-split", "train", "--val-split", "val"]
    refused(2, CLASSIFIER, *command, words=["--cache-images always", "torch/image_folder"])


def test_free_memory():
    free = image_cache.free_memory()
    assert 2**26 < free < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
