"""Distillation methods, one file each; a file put into this folder is found by itself."""

from importlib import import_module
from pkgutil import iter_modules

from kdfast.methods.base import (
    Method,
    Option,
    Outputs,
    Pairing,
    expand,
    find_method,
    method,
    method_names,
    methods_table,
)

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "Method",
    "Option",
    "Outputs",
    "Pairing",
    "expand",
    "find_method",
    "method",
    "method_names",
    "methods_table",
]
