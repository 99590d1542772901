"""Where the time of a training step goes: `--profile N`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from kdfast.training import journal

# Steps before the profiled ones: allocations, autotuning, compilation.
_WARM_UP = 3


class Profile:
    """Records `steps` training steps after the first few, on the main process; None records none.

    Leaves `trace.json` (for chrome://tracing or Perfetto) and `operators.txt`, operators by the
    time they took themselves, in `folder`.
    """

    def __init__(self, folder: Path, steps: int | None):
        self.folder, self.profile = folder, None
        if steps:
            gpu = torch.cuda.is_available()
            self.order = "self_cuda_time_total" if gpu else "self_cpu_time_total"
            self.profile = profile(
                activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu,
                schedule=schedule(wait=0, warmup=_WARM_UP, active=steps, repeat=1),
                on_trace_ready=self._write,
            )

    def __enter__(self) -> Profile:
        if self.profile is not None:
            self.profile.start()
        return self

    def __exit__(self, *error) -> None:
        if self.profile is not None:
            self.profile.stop()
            if not self.folder.exists():
                journal.say(f"note: nothing profiled, the run has {_WARM_UP} steps or fewer")

    def step(self) -> None:
        """A training step has ended."""
        if self.profile is not None:
            self.profile.step()

    def _write(self, recorded: profile) -> None:
        self.folder.mkdir(exist_ok=True)
        recorded.export_chrome_trace(str(self.folder / "trace.json"))
        table = recorded.key_averages().table(sort_by=self.order, row_limit=40)
        (self.folder / "operators.txt").write_text(table)
