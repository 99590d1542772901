"""Where the time of a training step goes: self time of operations, by what they are for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from common import markdown
from torch.profiler import ProfilerActivity, profile

# The first group one of whose words is in an operation's name has it.
GROUPS = {
    "convolutions": ("conv",),
    "batch normalisation": ("batch_norm",),
    "ReLU and sums": ("clamp_min", "threshold", "relu", "aten::add", "Add"),
    "kdfast's own": ("kdfast::",),
    "optimizer": ("Optimizer", "_foreach", "_fused", "sgd"),
    "products and gathers": ("mm", "index", "gather", "linear"),
    "elementwise, reductions": (
        "mul", "div", "pow", "exp", "log", "softmax", "sum", "mean", "norm", "sub", "kl_div", "nll",
        "neg", "fill", "zero_", "sqrt", "rsqrt", "topk", "eq", "copy_", "cat", "_to_copy", "pool",
        "xlogy", "where", "isfinite", "isinf", "bitwise",
    ),
}  # fmt: skip
OTHERS, REST = "other operations", "between operations"


@contextmanager
def watching(steps: int, device: str, found: list[dict[str, float]]) -> Iterator[None]:
    """Append to `found` what a block of so many steps spends: milliseconds a step by group."""
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device == "cuda")]
    with profile(activities=activities) as record:
        begin = time.perf_counter()
        yield
        if device == "cuda":
            torch.cuda.synchronize()
        wall = time.perf_counter() - begin
    spent = dict.fromkeys([*GROUPS, OTHERS], 0.0)
    for event in record.key_averages():
        own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        group = next(
            (g for g, words in GROUPS.items() if any(w in event.key for w in words)), OTHERS
        )
        spent[group] += own / 1e3 / steps
    spent[REST] = max(0.0, 1e3 * wall / steps - sum(spent.values()))
    found.append(spent)


def table(profiles: dict[str, dict[str, dict[str, float]]]) -> str:
    """Of `profiles` by row and form: a column each, milliseconds a step."""
    columns = [(row, form) for row, forms in profiles.items() for form in forms]
    lines = [
        {"ms a step": group}
        | {f"{row}, {form}": f"{profiles[row][form][group]:.1f}" for row, form in columns}
        for group in [*GROUPS, OTHERS, REST]
    ]
    totals = {f"{row}, {form}": f"{sum(profiles[row][form].values()):.1f}" for row, form in columns}
    return markdown([*lines, {"ms a step": "all"} | totals])
