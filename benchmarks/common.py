"""Timing side by side in one process, the copy bandwidth, and where a number was measured."""

from __future__ import annotations

import ctypes
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from kdfast.about import devices, versions

COPY_BYTES = 256 << 20


def environment(device: str) -> dict[str, object]:
    """Device, versions and thread count that a row was measured with."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{cpu_name()}, {devices()['cpu']}"
    return {"device": name, **versions(), "cuda": torch.version.cuda if device == "cuda" else None}


def cpu_name() -> str:
    for line in (
        Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else ()
    ):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def sample_ms(step: Callable[[], object], device: str, calls: int) -> float:
    """Milliseconds a call, over `calls` calls."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls
    begin = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - begin) * 1e3 / calls


def side_by_side(
    steps: dict[str, Callable[[], object]], device: str, *, rounds: int, sample: float = 2.0
) -> dict[str, list[float]]:
    """`rounds` samples of every step, interleaved so that a disturbance meets all of them alike.

    A sample is as many calls as last `sample` milliseconds; three unmeasured calls come first.
    """
    calls = {}
    for name, step in steps.items():
        for _ in range(3):
            step()
        calls[name] = max(1, round(sample / sample_ms(step, device, 1)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(sample_ms(step, device, calls[name]))
    return times


def copy_bandwidth(device: str, rounds: int = 15) -> float:
    """Bytes per second, read plus written, of a copy between two arrays already written."""
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.zeros_like(source)
    times = side_by_side({"copy": lambda: target.copy_(source)}, device, rounds=rounds)["copy"]
    return 2 * COPY_BYTES / (statistics.median(times) * 1e-3)


def matmul_rate(device: str, rounds: int = 15) -> float:
    """Operations per second (a multiplication and an addition are two) of a float32 product."""
    edge = 4096 if device == "cuda" else 1024
    a, b = (torch.randn(edge, edge, device=device) for _ in range(2))
    times = side_by_side({"product": lambda: a @ b}, device, rounds=rounds)["product"]
    return 2 * edge**3 / (statistics.median(times) * 1e-3)


def peak_bytes(step: Callable[[], object], device: str) -> int:
    """The most memory one call holds beyond what was held before it, its result included.

    On the CPU it is that of the process, to be asked of a process that has not run the step yet.
    """
    if device == "cuda":
        step()
    rise = peak_from_now(device)
    step()
    return rise()


def peak_from_now(device: str) -> Callable[[], int]:
    """A function that tells the most bytes held since, beyond what is held now."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        return lambda: torch.cuda.max_memory_allocated() - allocated
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not serve what comes
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is held now
    before = _resident("VmRSS")
    return lambda: _resident("VmHWM") - before


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def summary(times: list[float]) -> dict[str, float]:
    """Median with the 10th and 90th percentile, in milliseconds."""
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return {
        "ms": round(statistics.median(times), 4),
        "p10": round(tenths[0], 4),
        "p90": round(tenths[-1], 4),
    }


def write_results(path: Path | None, results: list[dict], text: str) -> None:
    """Write `results` as JSON lines to `path`, and `text` beside them as Markdown."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(result) + "\n" for result in results))
        path.with_suffix(".md").write_text(text)


def kept(path: Path | None, rows: list[str]) -> list[dict]:
    """What `path` holds of other rows."""
    if path is None or not path.exists():
        return []
    found = map(json.loads, path.read_text().splitlines())
    return [result for result in found if result["row"] not in rows]


def markdown(rows: list[dict[str, object]]) -> str:
    """A table of rows with equal keys."""
    lines = [
        list(rows[0]),
        ["---"] * len(rows[0]),
        *([str(v) for v in row.values()] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
