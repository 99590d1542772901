"""Train, compare and explain knowledge transfer between image classifiers.

Importing kdfast registers its models with timm.
"""

import importlib

from kdfast._register import register

__version__ = "0.1.0"
__all__ = ["models", "ops"]


def __getattr__(name: str):
    if name in __all__:
        return importlib.import_module(f"kdfast.{name}")
    raise AttributeError(f"module 'kdfast' has no attribute '{name}'")


register()
