"""The three files of a run folder that reports rest on, read and checked.

`args.yaml`, `summary.csv` and `results.json` are read as text, never as code. Whatever is damaged
raises `UserError`, which names the file, the line where there is one, and what was expected.
"""

from __future__ import annotations

import csv
import json
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import yaml

from kdfast.errors import UserError
from kdfast.training.layout import LAYOUT

SCORES = ("top1", "top5", "loss")
# Ten times as fast where PyYAML was built with libyaml; equally safe.
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_arguments(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """`options` and `environment` of an args.yaml, both checked as far as they are used."""
    text = read_text(path)
    try:
        content = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or error
        raise UserError(f"{path}{where}: expected valid YAML: {reason}") from None
    wrong = partial(fail, path)
    if not isinstance(content, dict):
        wrong("", "a mapping with options and environment")
    layout = content.get("layout", 1)
    if not _is_count(layout, 1):
        wrong("layout", f"layout to be a whole number from 1 up, got {layout!r}")
    if layout > LAYOUT:
        raise UserError(
            f"{path} was written by a newer kdfast (folder layout {layout}, this one knows "
            f"{LAYOUT}); update kdfast"
        )
    for key in ("options", "environment"):
        if not isinstance(content.get(key), dict):
            wrong(key, f"{key} to be a mapping, got {content.get(key)!r}")
    options = content["options"]
    for key in ("dataset", "model", *(["teacher"] if "methods" in options else [])):
        if not isinstance(options.get(key), str):
            wrong(key, f"{key} to be a name, got {options.get(key)!r}")
    for key, least in (("seed", 0), ("epochs", 1)):
        if not _is_count(options.get(key), least):
            wrong(key, f"{key} to be a whole number from {least} up, got {options.get(key)!r}")
    for key, value in options.items():
        if not isinstance(key, str) or not _is_plain(value):
            wrong(str(key), f"{key} to be a plain value, a list or a mapping of such")
    methods = options.get("methods", {})
    if not isinstance(methods, dict) or not all(isinstance(v, dict) for v in methods.values()):
        wrong("methods", f"methods to map method names to their options, got {methods!r}")
    return options, content["environment"]


def read_results(path: Path) -> tuple[dict[str, Any], dict[str, float], dict[str, float]]:
    """A results.json, its `last` and its `best`."""
    text = read_text(path)
    wrong = partial(fail, path)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}: expected valid JSON: {error.msg.lower()}"
        ) from None
    except (ValueError, RecursionError):
        wrong("", "valid JSON")
    if not isinstance(content, dict):
        wrong("", "an object with last, best and parameters")
    for name in ("last", "best"):
        scores = content.get(name)
        if not isinstance(scores, dict) or not _is_count(scores.get("epoch"), 1):
            wrong(name, f"{name} to be {{epoch, {', '.join(SCORES)}}}, got {scores!r}")
        for score in SCORES:
            if not _is_number(scores.get(score)):
                wrong(name, f"{name} {score} to be a number, got {scores.get(score)!r}")
    if not _is_count(content.get("parameters"), 0):
        wrong("parameters", f"parameters to be a count, got {content.get('parameters')!r}")
    teacher = content.get("teacher_top1")
    if teacher is not None and not (_is_number(teacher) and 0 <= teacher <= 100):
        wrong("teacher_top1", f"teacher_top1 to lie in [0, 100], got {teacher!r}")
    return content, content["last"], content["best"]


def read_summary(path: Path) -> dict[str, list[float | None]]:
    """The columns of a summary.csv; rows are epochs 1..n, accuracies lie in [0, 100].

    The scores of an epoch that was not evaluated are None, all of them.
    """
    rows = csv.reader(read_text(path).splitlines(), strict=True)
    try:
        header, *lines = list(rows) or [[]]
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: expected CSV: {error}") from None
    for name in ("epoch", *(f"eval_{score}" for score in SCORES), *header):
        if header.count(name) != 1:
            raise UserError(f"{path}, line 1: expected one column {name}, got {','.join(header)}")
    curves: dict[str, list[float | None]] = {name: [] for name in header}
    scores = [name for name in header if name.startswith("eval_")]
    if not lines:
        raise UserError(f"{path}, line 2: expected epoch 1, got nothing")
    for epoch, cells in enumerate(lines, start=1):
        where = f"{path}, line {epoch + 1}"
        if len(cells) != len(header):
            raise UserError(f"{where}: expected {len(header)} values, got {len(cells)}")
        found = dict(zip(header, cells, strict=True))
        skipped = not any(found[name] for name in scores)
        for name, cell in found.items():
            if skipped and name in scores:
                curves[name].append(None)
                continue
            try:
                value = float(cell)
            except ValueError:
                raise UserError(f"{where}: expected {name} to be a number, got {cell!r}") from None
            curves[name].append(value)
        if curves["epoch"][-1] != epoch:
            raise UserError(f"{where}: expected epoch {epoch}, got {curves['epoch'][-1]:g}")
        for name in ("eval_top1", "eval_top5"):
            if not skipped and not 0 <= curves[name][-1] <= 100:
                raise UserError(f"{where}: expected {name} in [0, 100], got {curves[name][-1]:g}")
    return curves


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise UserError(f"cannot read {path}: {reason}") from None


def fail(path: Path, key: str, expected: str) -> NoReturn:
    """Raise for `path`, naming the first line of it that sets `key`."""
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if key and line.lstrip(' "').replace('"', "").startswith(f"{key}:"):
            raise UserError(f"{path}, line {number}: expected {expected}")
    raise UserError(f"{path}: expected {expected}")


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_plain(value: Any, depth: int = 4) -> bool:
    if isinstance(value, list | dict):
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        return depth > 0 and all(_is_plain(item, depth - 1) for item in inner)
    return value is None or isinstance(value, str | int | float)
