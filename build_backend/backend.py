"""Build backend: setuptools, compiling against the torch that is already installed.

With `requires = ["torch"]` pip would fetch the newest torch into its build environment and compile
against that one. pip hides the real environment only through PYTHONPATH, so a `python -E` child
still sees it: its path is appended (last, so that the build environment's setuptools wins) and
torch is requested only where there is none.
"""

import subprocess
import sys

from setuptools.build_meta import *  # noqa: F403

_PROBE = (
    "import sys; from importlib.util import find_spec;"
    "print(*(sys.path if find_spec('torch') else []), sep='\\n')"
)
_found = subprocess.run([sys.executable, "-E", "-c", _PROBE], capture_output=True, text=True).stdout
_paths = [path for path in _found.split("\n") if path]
sys.path += [path for path in _paths if path not in sys.path]


def get_requires_for_build_wheel(config_settings=None):
    """torch, unless it is installed. setuptools' own hook would run setup.py, which needs torch."""
    return [] if _paths else ["torch>=2.11"]


get_requires_for_build_editable = get_requires_for_build_wheel
get_requires_for_build_sdist = get_requires_for_build_wheel
