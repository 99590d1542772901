"""Image files and labels in three lists: training, validation and, where there is one, test."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from os.path import isfile, normpath
from pathlib import Path
from typing import NamedTuple

from kdfast.data.sources import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    FileSource,
    ImageData,
    Splits,
    lines_of,
)
from kdfast.errors import UsageError, UserError

_SUFFIXES = (".txt", ".csv", ".tsv")
_HEADERS = (
    {"file", "files", "filename", "file_name", "file name", "image", "img", "path", "filepath"},
    {"label", "labels", "class", "target", "category", "class_name", "class name"},
)
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")


def lists(data_dir: Path | None, download: bool, splits: Splits) -> ImageData:
    """Three lists in `data_dir`, by default train.txt, val.txt and test.txt (or .csv, .tsv).

    A row is an image file and its label, with a tab, a comma or the last blank between; the first
    may be a header. Files are looked for in `data_dir` and in its images/. The class index is the
    label's rank among the sorted labels of the training list, as numbers when all are integers.
    A file is in one list, once.
    """
    if data_dir is None:
        raise UsageError(
            "--dataset lists needs --data-dir, the folder of train.txt, val.txt and, for a test "
            "of what was selected, test.txt"
        )
    training = _find(data_dir, "--train-split", splits[0], ["train"])
    validation = _find(data_dir, "--val-split", splits[1], ["val", "validation"])
    test = _find(data_dir, "--test-split", splits[2], ["test"], needed=False)
    if test == validation and not splits[2]:
        test = None
    paths = [path for path in (training, validation, test) if path]
    tables = [_read(path, data_dir) for path in paths]
    for (first, before), (second, after) in combinations(zip(paths, tables, strict=True), 2):
        for file in filter(before.__contains__, after):
            raise UserError(
                f"{second} line {after[file].line}: {file} is also in {first} line "
                f"{before[file].line}; a file belongs to one list"
            )
    classes, key = _classes({row.label for row in tables[0].values()})
    sources = []
    for path, table in zip(paths, tables, strict=True):
        for row in table.values():
            if key(row.label) not in classes:
                raise UserError(
                    f"{path} line {row.line}: label '{row.label}' is not in {training}, which "
                    "lists the classes"
                )
        samples = [(file, classes[key(row.label)]) for file, row in table.items()]
        sources.append(FileSource(samples))
    return ImageData(
        "lists",
        *sources[:2],
        len(classes),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        test=sources[2] if test else None,
    )


def _find(
    root: Path, flag: str, named: str | None, usual: Sequence[str], *, needed: bool = True
) -> Path | None:
    if named and (root / named).is_file():
        return root / named
    tried = [
        root / f"{stem}{suffix}" for stem in ([named] if named else usual) for suffix in _SUFFIXES
    ]
    found = [path for path in tried if path.is_file()]
    if len(found) > 1:
        raise UserError(f"both {found[0]} and {found[1]} are there; name the list by {flag}")
    if not found and (named or needed):
        names = ", ".join(([named] if named else []) + [path.name for path in tried])
        raise UserError(
            f"no list {names} in {root}; give --data-dir the folder of the lists, or {flag} the "
            "list's name"
        )
    return found[0] if found else None


class _Row(NamedTuple):
    label: str
    line: int


def _read(path: Path, root: Path) -> dict[str, _Row]:
    """Rows by image file, in the order of the list."""
    table: dict[str, _Row] = {}
    for number, fields in _rows(path):
        name, label = fields if len(fields) == 2 else ("", "")
        file = next(
            (f for f in (root / name, root / "images" / name) if name and isfile(f)), Path()
        )
        place = normpath(file)
        if len(fields) > 2:
            problem = f"has {len(fields)} columns, not a file name and a label"
        elif not (name and label):
            problem = "does not have a file name and a label"
        elif not isfile(file):
            problem = f"names {name}, which is no file in {root} or {root / 'images'}"
        elif place in table:
            problem = f"names {name} again, after line {table[place].line}"
        else:
            table[place] = _Row(label, number)
            continue
        raise UserError(f"{path} line {number} {problem}; correct the list")
    if not table:
        raise UserError(f"{path} lists no image")
    return table


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and fields, without blank lines and a header."""
    first = True
    for number, line in enumerate(lines_of(path, "give lists in UTF-8 text"), 1):
        if not line.strip():
            continue
        fields = _fields(line.strip())
        header = len(fields) == 2 and all(
            word.lower() in known for word, known in zip(fields, _HEADERS, strict=True)
        )
        if not (first and header):
            yield number, fields
        first = False


def _fields(line: str) -> list[str]:
    separator = next((s for s in "\t," if s in line), None)
    if separator is None:
        return line.rsplit(None, 1)
    try:
        fields = next(csv.reader([line], delimiter=separator, skipinitialspace=True))
    except csv.Error:
        return []
    return [field.strip() for field in fields]


def _classes(labels: set[str]) -> tuple[dict[str | int, int], Callable[[str], str | int]]:
    """Class index by key, and the key of a label: its number when all `labels` are integers."""

    def number(label: str) -> str | int:
        return int(label) if _INTEGER.fullmatch(label) else label

    key = number if all(map(_INTEGER.fullmatch, labels)) else str
    return {value: i for i, value in enumerate(sorted(set(map(key, labels))))}, key
