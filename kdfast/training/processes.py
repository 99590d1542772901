"""What the processes of a run tell each other when one of them fails or falls silent.

Each beats once a second in the launcher's store. The first that fails leaves its reason there; the
others then end too, naming it, even when they hang in a collective operation that will never
return. A process that was killed leaves no reason, only a beat that stands still.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta

from torch import distributed

from kdfast.errors import Stopped

# A process that has not beaten for so long is dead, or as good as.
_SILENT_SECONDS = 20.0
# How long a process that knows of a failure may take to end by itself.
_GRACE_SECONDS = 5.0
_BEAT_SECONDS = 1.0
_LOOK_SECONDS = 0.1
_FAILURE = "kdfast/failure"

_watch: Watch | None = None
_waits = 0


class Watch:
    """The beating thread of one process; `name` is the script's, for the last line."""

    def __init__(self, name: str, rank: int, count: int):
        self.name, self.rank, self.count = name, rank, count
        self.store = distributed.distributed_c10d._get_default_store().clone()
        self.store.set_timeout(timedelta(seconds=10))
        self.lock = threading.Lock()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True)
        self.thread.start()

    def _key(self, rank: int) -> str:
        return f"kdfast/beat/{rank}"

    def beat_of(self, rank: int) -> int:
        """How often `rank` has beaten."""
        with self.lock:
            return self.store.add(self._key(rank), 0)

    def fail(self, reason: str) -> str:
        """Record that this run failed for `reason`; returns the reason recorded first."""
        with self.lock:
            return self.store.compare_set(_FAILURE, "", reason).decode()

    def reason(self) -> str | None:
        """Why the run failed, or None."""
        with self.lock:
            if not self.store.check([_FAILURE]):
                return None
            return self.store.get(_FAILURE).decode()

    def _beat(self) -> None:
        # In a ring: each watches the next one.
        other = (self.rank + 1) % self.count
        last, moved, failed = -1, time.monotonic(), None
        while not self.ended.wait(_BEAT_SECONDS):
            try:
                with self.lock:
                    self.store.add(self._key(self.rank), 1)
                beat, now = self.beat_of(other), time.monotonic()
                if beat != last:
                    last, moved = beat, now
                elif now - moved > _SILENT_SECONDS:
                    self.fail(f"process {other} does not answer; it was killed or hangs")
                if self.reason() is None:
                    continue
            except RuntimeError:
                # The store went with the launcher, or with the process that kept it.
                if not self.ended.wait(_GRACE_SECONDS):
                    self._leave("lost the launcher and with it the other processes")
                return
            failed = failed or now
            if now - failed > _GRACE_SECONDS:
                self._leave(self.reason())

    def _leave(self, reason: str) -> None:
        """End this process, whatever its main thread waits for."""
        sys.stderr.write(f"{self.name}: error: {reason}\n")
        sys.stderr.flush()
        os._exit(1)

    def dead(self) -> list[int]:
        """The processes that do not beat any more."""
        before = [self.beat_of(rank) for rank in range(self.count)]
        time.sleep(3 * _BEAT_SECONDS)
        return [r for r in range(self.count) if r != self.rank and self.beat_of(r) == before[r]]


class Terminated(Stopped):
    """SIGTERM where nothing waits for it: a launcher sends it when another process has failed."""


def wait_for_main() -> None:
    """Return when the main process is here too, however long that takes.

    All processes have to call this. A collective operation would give up after its timeout, which
    is to stay short: it also finds processes that beat, but do not come.
    """
    global _waits
    _waits += 1
    store = distributed.distributed_c10d._get_default_store()
    key = f"kdfast/main/{_waits}"
    if distributed.get_rank() == 0:
        store.set(key, "")
    while not store.check([key]):
        time.sleep(_LOOK_SECONDS)


def start(name: str) -> None:
    """Begin to watch, where there is more than one process."""
    global _watch
    if distributed.is_initialized() and distributed.get_world_size() > 1 and _watch is None:
        _watch = Watch(name, distributed.get_rank(), distributed.get_world_size())
        signal.signal(signal.SIGTERM, _terminate)


def _terminate(number: int, frame) -> None:
    raise Terminated(number, " outside training; nothing is lost that was saved")


def stop() -> None:
    """The script is over: silence means nothing any more."""
    global _watch
    if _watch is not None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _watch.ended.set()
        _watch.thread.join()
        _watch = None


def leave(code: int) -> None:
    """End this process without taking leave of the others, which may never answer."""
    sys.stdout.flush()
    os._exit(code)


def failed(reason: str) -> None:
    """Tell the others why this process ends."""
    if _watch is not None:
        # Without the launcher nobody is left to be told.
        with suppress(RuntimeError):
            _watch.fail(f"process {_watch.rank} failed: {reason}")


def why(error: BaseException) -> str | None:
    """The failure elsewhere that is behind `error`; None when there is none."""
    terminated = isinstance(error, Terminated)
    if _watch is None or not (terminated or _is_broken_link(error)):
        return None
    # The launcher ends what is left; there is a line to be said first.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with suppress(RuntimeError):
        deadline = time.monotonic() + _GRACE_SECONDS
        while time.monotonic() < deadline:
            if reason := _watch.reason():
                return reason
            if silent := _watch.dead():
                names = ", ".join(map(str, silent))
                return _watch.fail(f"process {names} died without a word: killed, or out of memory")
    return None


def _is_broken_link(error: BaseException) -> bool:
    words = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "Socket")
    lost = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return lost or isinstance(error, distributed.DistError)
