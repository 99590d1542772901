"""The folder of a teacher's answers: whose answers to what they are, and who may write them."""

from __future__ import annotations

import errno
import fcntl
import json
from pathlib import Path
from typing import IO, Any

from kdfast.errors import UserError
from kdfast.training.answer_rows import writing
from kdfast.training.journal import say
from kdfast.training.run_folder import write_atomic

LAYOUT = 1
# Named first when several differ.
_TELLING = (
    "layout", "teacher", "teacher-checksum", "heads-checksum", "layers", "dataset", "images",
    "augmentation", "seed",
)  # fmt: skip
_PARTS = ("first-stage", "assistant-", "generation-", ".lock", ".meta.json.tmp")


class AnswerFolder:
    """The folder `path` for answers of which `record` tells all that they depend on.

    Its `meta.json` has the record. For the main process alone, but `release`.
    """

    def __init__(self, path: Path, record: dict[str, Any]):
        self.path = path
        # As it comes back from the file.
        self.record = json.loads(json.dumps({"layout": LAYOUT} | record))
        self._lock: IO | None = None

    def check(self) -> None:
        """Raise `UserError`, naming what differs, unless the folder is free or of this record."""
        meta = self.path / "meta.json"
        if not meta.exists():
            if self.path.exists() and not (self.path.is_dir() and self._is_free()):
                raise UserError(
                    f"{self.path} is no teacher cache: it has no meta.json; give --teacher-cache "
                    "another folder"
                )
            return
        try:
            before = json.loads(meta.read_text())
            keys = [*_TELLING, *sorted(before.keys() | self.record.keys())]
        except (OSError, ValueError, AttributeError):
            raise UserError(
                f"teacher cache {self.path}: meta.json is damaged; remove that folder, or give "
                "another --teacher-cache"
            ) from None
        for key in keys:
            if before.get(key) != self.record.get(key):
                theirs, ours = (_short(record.get(key)) for record in (before, self.record))
                raise UserError(
                    f"teacher cache {self.path} is stale: it is of {key} {theirs}, now there is "
                    f"{ours}; remove that folder, or give another --teacher-cache"
                )

    def _is_free(self) -> bool:
        """Whether nothing is in it, but parts of a chain and what a killed run leaves."""
        names = (entry.name for entry in self.path.iterdir())
        return all(name.startswith(_PARTS) for name in names)

    def claim(self, *, wait: bool) -> None:
        """Take the folder for this run alone, to `release` it; it then has the record.

        While another run has it, this waits, or raises `UserError`.
        """
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock(wait=wait)
        self.check()
        if not (self.path / "meta.json").exists():
            write_atomic(self.path / "meta.json", json.dumps(self.record, indent=2))

    def _take_lock(self, *, wait: bool) -> None:
        self._lock = (self.path / ".lock").open("a")
        try:
            # A record lock: gone with the process that holds it, however that ends.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                say(f"note: {self.path} cannot be locked here ({error.strerror})")
                return
            if not wait:
                self.release()
                raise UserError(
                    f"teacher cache {self.path} is in use by another run; wait for it to end, or "
                    "give another --teacher-cache"
                ) from None
            say(f"teacher cache {self.path} is being filled by another run; waiting for it")
            fcntl.lockf(self._lock, fcntl.LOCK_EX)

    def release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text[:12] if len(text) == 64 else text
