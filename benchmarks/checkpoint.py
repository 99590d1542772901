#!/usr/bin/env python
"""What saving a checkpoint after every epoch costs the digits run.

    python benchmarks/checkpoint.py [--epochs N]

Trains the teacher of the digits recipe, times `checkpoint.save` in it, and prints its share of the
run; writes benchmarks/results/checkpoint.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
from pathlib import Path

from kdfast.about import devices, versions
from kdfast.training import checkpoint

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=8)
    epochs = parser.parse_args().epochs
    spec = importlib.util.spec_from_file_location("classifier", ROOT / "train/classifier.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    times: list[float] = []
    genuine = checkpoint.save

    def timed(*args, **kwargs):
        started = time.perf_counter()
        path = genuine(*args, **kwargs)
        times.append(time.perf_counter() - started)
        return path

    checkpoint.save = timed
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        code = script.main(["--epochs", str(epochs), "--output", folder])
        whole = time.perf_counter() - started
    assert code == 0 and len(times) == epochs
    text = (
        f"Checkpoint after every epoch, cifar_resnet20 on digits, {epochs} epochs: "
        f"{sum(times):.2f} s of {whole:.1f} s, {100 * sum(times) / whole:.2f} % of the run; "
        f"a checkpoint takes {1000 * statistics.median(times):.0f} ms (median; "
        f"{1000 * max(times):.0f} at most). {devices()['cpu']}, torch {versions()['torch']}.\n"
    )
    (ROOT / "benchmarks/results/checkpoint.md").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
