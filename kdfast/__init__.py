"""Train and compare knowledge transfer between image classifiers."""

__version__ = "0.1.0"
