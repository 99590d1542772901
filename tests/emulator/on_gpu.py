"""Every emulated case once on the GPU, for compute-sanitizer (benchmarks/gpu.sh).

compute-sanitizer --tool racecheck python tests/emulator/on_gpu.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from test_emulator import CASES

import emulator
from kdfast import ops


def main() -> None:
    ops.use("fused")
    for name, (function, _) in CASES.items():
        with emulator.OnDevice("cuda"):
            function()
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            sys.exit(f"{name}: {error}")
    print(f"{len(CASES)} cases")


if __name__ == "__main__":
    main()
