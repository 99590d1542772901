"""Train, compare and explain knowledge transfer between image classifiers.

Importing kdfast registers its models with timm.
"""

__version__ = "0.1.0"

from kdfast import models, ops

__all__ = ["models", "ops"]
