"""Every emulated case once in this process, with the sanitised library; one JSON line at the end.

    LD_PRELOAD=... python tests/emulator/sanitised.py

`emulator.sanitised_environment` has the rest of the command. A finding ends the process; the last
line of the output is then the case it happened in.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from test_emulator import CASES

import emulator
from kdfast import ops


def main() -> None:
    ops.use("fused")
    for name, (function, _) in CASES.items():
        print(name, flush=True)
        with emulator.run("shuffled", 3, sanitise=True):
            function()
    ran = set(emulator.launches(sanitise=True))
    print(json.dumps({"never": sorted(emulator.instances(sanitise=True) - ran)}))


if __name__ == "__main__":
    main()
