"""Types of flag values, each with the range it allows."""

from __future__ import annotations

import argparse
import math

import yaml


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {value}")
    return value


def amount(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number from 0 up, got {text}")
    return value


def factor(text: str) -> float:
    value = float(text)
    if not 1 <= value <= 10:
        raise argparse.ArgumentTypeError(f"must lie in [1, 10], got {text}")
    return value


def fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must lie in [0, 1], got {text}")
    return value


def share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return value


def inner(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, not at them, got {text}")
    return value


def number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text}")
    return value


def orders(text: str) -> str:
    """A mask of orders such as `110`: a digit each, 1 to keep it, at least one kept."""
    if not text or set(text) - {"0", "1"}:
        raise argparse.ArgumentTypeError(f"a mask has a digit 0 or 1 for each order, got '{text}'")
    if "1" not in text:
        raise argparse.ArgumentTypeError(f"{text} keeps no order; at least one digit must be 1")
    return text


def assignment(text: str) -> tuple[str, object]:
    """`key=value`, the value read as YAML (so `7`, `0.5`, `true`, `xavier` do what they say)."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"expected key=value, got '{text}'")
    flag = _ARGUMENTS_WITH_FLAGS.get(key)
    if flag:
        raise argparse.ArgumentTypeError(f"{key} has a flag of its own, {flag}")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        raise argparse.ArgumentTypeError(f"'{text}': the value is not valid YAML") from None


_ARGUMENTS_WITH_FLAGS = {
    "name": "--model",
    "num_classes": "--num-classes",
    "pretrained": "--pretrained",
    "img_size": "--img-size",
}
