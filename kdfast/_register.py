"""kdfast's models are known to timm from the moment both are imported, in either order.

Importing kdfast alone costs nothing, so that what only reads run folders starts at once.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder


class _AfterTimm(MetaPathFinder):
    """Finds timm as it would be found anyway, and has `kdfast.models` follow it."""

    looking = False

    def find_spec(self, name, path=None, target=None):
        if name != "timm" or self.looking:
            return None
        self.looking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.looking = False
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(module) -> None:
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                execute(module)
                importlib.import_module("kdfast.models")

            spec.loader.exec_module = exec_module
        return spec


def register() -> None:
    """Import `kdfast.models` now if timm is there, else as soon as it is."""
    if "timm" in sys.modules:
        importlib.import_module("kdfast.models")
    elif not any(isinstance(finder, _AfterTimm) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTimm())
