"""The run folder: one layout, written by the main process, whole at every moment."""

from __future__ import annotations

import argparse
import csv
import errno
import fcntl
import io
import json
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

import kdfast
from kdfast import about
from kdfast.errors import Stopped, UsageError, UserError
from kdfast.training import journal, processes
from kdfast.training.layout import FREE, LAYOUT

T = TypeVar("T")
# Named first when several differ.
_TELLING = (
    "dataset", "model", "teacher", "assistants", "teacher-checksum", "method", "methods", "opt",
    "seed",
)  # fmt: skip


def on_main(accelerator: Accelerator, action: Callable[[], T], *, patient: bool = False) -> T:
    """Run `action` on the main process; every process gets its result or raises its error.

    Where it may take longer than a collective operation waits, `patient` has the others wait
    without one.
    """
    box: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            box[0] = action()
        except Stopped:
            raise
        except UserError as error:
            box[1] = error
        except OSError as error:
            box[1] = UserError(f"{error.filename or 'file'}: {error.strerror or error}")
    if accelerator.num_processes > 1:
        if patient:
            processes.wait_for_main()
        broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content`; a reader sees the old file or the new one, never half of it.

    Raises `UserError` when it cannot be written; the old file is then as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb" if isinstance(content, bytes) else "w") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if temporary.exists():
            temporary.unlink()
        raise _not_written(path, error) from None


def write_at(handle: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at byte `offset` of an open file, whose position stays."""
    while data:
        written = os.pwrite(handle, data, offset)
        data, offset = data[written:], offset + written


def _not_written(path: Path, error: OSError) -> UserError:
    reason = error.strerror or error
    return UserError(f"cannot write {path}: {reason}; what was saved before is intact")


def choose_run(options: argparse.Namespace, name: str) -> RunFolder:
    """The folder of `--resume PATH`; else --experiment, or `name`, below --output.

    Raises `UserError` when there is no run at PATH.
    """
    if options.resume in (None, "auto"):
        return RunFolder(Path(options.output) / (options.experiment or name))
    run = RunFolder(Path(options.resume))
    if not run.arguments.is_file():
        raise UserError(
            f"no run to resume at {run.path}: it holds no args.yaml; give a run folder, or "
            "--resume auto to start where there is none"
        )
    return run


class RunFolder:
    """Paths and writers of one run.

    An existing folder is refused unless it is to be resumed; all writers are for the main process
    alone. `free` are the options that a resumed run may change.
    """

    free = frozenset(FREE)

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tensorboard"
        self.profile = path / "profile"
        self.arguments = path / "args.yaml"
        self.summary = path / "summary.csv"
        self.path_length = path / "path_length.csv"
        self.results = path / "results.json"
        self.log = path / "train.log"
        self._lock: IO | None = None
        self._claimed = self._begun = False
        self._later: frozenset[str] = frozenset()

    def check(self, *, resume: bool) -> None:
        """Raise early what `begin` would raise late; writes nothing."""
        if self.path.exists() and not resume:
            raise UsageError(
                f"run folder {self.path} exists; add --resume auto to go on with it, give another "
                "--experiment, or remove it"
            )
        place = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not place.is_dir() or not os.access(place, os.W_OK):
            raise UserError(f"cannot write run folder {self.path}; give another --output")

    @contextmanager
    def claimed(
        self,
        accelerator: Accelerator,
        arguments: dict[str, Any],
        *,
        resume: bool,
        later: Collection[str] = (),
    ) -> Iterator[None]:
        """Hold the folder for this run alone, checked against the `arguments` it was made with.

        Nothing but the summary's rows after the last checkpoint changes before `begin`. `later` are
        keys that only get a value within the claim: what the record has of them is put into
        `arguments`. A claim within the claim checks its own `arguments`, which then have them all.
        Raises `UsageError` when the folder is of another run, `UserError` when another process
        holds it or its record is damaged.
        """
        if self._claimed:
            on_main(accelerator, lambda: self.check_same(arguments))
            yield
            return
        self._claimed, self._later = True, frozenset(later)
        logs = journal.depth()
        try:
            on_main(accelerator, lambda: self._claim(arguments, resume))
            yield
        except UserError as error:
            if journal.depth() > logs:
                # Whoever reads the log later learns how the run ended.
                with suppress(OSError):
                    journal.note(f"error: {error}")
            raise
        finally:
            if journal.depth() > logs:
                journal.close_log()
            self._claimed = self._begun = False
            if self._lock is not None:
                self._lock.close()
                self._lock = None

    def _claim(self, arguments: dict[str, Any], resume: bool) -> None:
        self.check(resume=resume)
        if self.path.exists():
            self._take_lock()
            self.check_same(arguments)

    def begin(self, arguments: dict[str, Any]) -> None:
        """Make or enter the folder, record `arguments`, open the log unless it is open."""
        try:
            # Of two that find none at the same time one makes it.
            self.path.mkdir(parents=True, exist_ok=self._lock is not None)
        except OSError as error:
            raise UserError(
                f"cannot write run folder {self.path}: {error.strerror}; give another --output"
            ) from None
        self._take_lock()
        self.write_arguments(arguments)
        if not self._begun:
            journal.open_log(self.log)
            self._begun = True

    def _take_lock(self) -> None:
        if self._lock is not None:
            return
        self._lock = (self.path / ".lock").open("a")
        try:
            # A record lock: gone with the process that holds it, however that ends, and not
            # inherited by its loader processes.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                journal.say(f"note: {self.path} cannot be locked here ({error.strerror})")
                return
            raise UserError(
                f"run folder {self.path} is in use by another process; wait for it to end, or give "
                "another --experiment"
            ) from None

    def check_same(self, arguments: dict[str, Any]) -> None:
        """Refuse to go on with a run made with other options, those that are free aside."""
        if not self.arguments.exists():
            return
        try:
            record = yaml.safe_load(self.arguments.read_text())
            before, layout = record["options"], int(record.get("layout", 1))
            for key in self._later:
                if key in before:
                    arguments.setdefault(key, before[key])
                elif key in arguments:
                    before[key] = arguments[key]
            keys = [*_TELLING, *sorted((before.keys() | arguments.keys()) - self.free)]
            differing = [key for key in keys if before.get(key) != arguments.get(key)]
        except (
            UnicodeDecodeError, yaml.YAMLError, TypeError, ValueError, LookupError, AttributeError,
        ):  # fmt: skip
            raise UserError(f"{self.arguments} is damaged; the run cannot be resumed") from None
        if layout > LAYOUT:
            raise UserError(
                f"{self.path} was written by a newer kdfast (folder layout {layout}, this one "
                f"knows {LAYOUT}); update kdfast"
            )
        if differing:
            key = differing[0]
            theirs, ours = (
                f"{key} {values[key]}" if key in values else f"no {key}"
                for values in (before, arguments)
            )
            raise UsageError(
                f"cannot resume {self.path}: it was made with {theirs}, now there is {ours}; give "
                "the same options, or another --experiment to start anew"
            )

    def write_arguments(self, arguments: dict[str, Any]) -> None:
        content = {"layout": LAYOUT, "options": arguments, "environment": environment()}
        write_atomic(self.arguments, yaml.safe_dump(content, sort_keys=False))

    def set_rows(self, text: str) -> None:
        """Cut the summary back to `text`, what it was when a checkpoint was written."""
        if not text:
            self.summary.unlink(missing_ok=True)
        elif self.summary.read_text() != text:
            write_atomic(self.summary, text)

    def set_path_length(self, text: str) -> None:
        """Make path_length.csv what it is after the epochs so far."""
        if not self.path_length.exists() or self.path_length.read_text() != text:
            write_atomic(self.path_length, text)

    def append_row(self, row: dict[str, Any]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, row, lineterminator="\n")
        size = self.summary.stat().st_size if self.summary.exists() else 0
        if not size:
            writer.writeheader()
        writer.writerow(row)
        try:
            with self.summary.open("a") as file:
                file.write(text.getvalue())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if self.summary.exists():
                os.truncate(self.summary, size)
            raise _not_written(self.summary, error) from None

    def read_results(self, *keys: str) -> dict[str, Any]:
        """What `write_results` wrote, `keys` in it; raises `UserError` when it is not whole."""
        try:
            results = json.loads(self.results.read_text())
            for kind in ("last", "best"):
                float(results[kind]["top1"] + results[kind]["epoch"])
            whole = results.keys() >= set(keys)
        except (OSError, UnicodeDecodeError, ValueError, LookupError, TypeError):
            whole = False
        if not whole:
            raise UserError(f"{self.results} is damaged; put it back as it was")
        return results

    def write_results(self, results: dict[str, Any]) -> None:
        write_atomic(self.results, json.dumps(results, indent=2) + "\n")

    def weights(self, name: str) -> Path:
        return self.path / f"{name}.safetensors"

    def epoch_weights(self, epoch: int) -> Path:
        folder = self.path / "weights"
        folder.mkdir(exist_ok=True)
        return folder / f"epoch-{epoch:04d}.safetensors"


def environment() -> dict[str, Any]:
    """Versions, commit and devices that made a run."""
    found = about.versions() | about.devices()
    return found | {"commit": about.commit(), "ops": kdfast.ops.active()}
