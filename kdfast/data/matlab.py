"""Lists of strings from MATLAB files, of which nothing else is read.

scipy's reader is compiled code that a damaged file may crash; this one cannot do more than fail.
The format: "MAT-File Format", The MathWorks, chapter 1, level 5.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from kdfast.errors import UserError

_MOST_BYTES = 2**26
_MATRIX, _COMPRESSED = 14, 15
_CELL, _CHAR = 1, 4
# By the type of an element: what a char array's characters are stored as.
_ENCODINGS = {1: "latin-1", 2: "latin-1", 3: "utf-16", 4: "utf-16", 16: "utf-8", 17: "utf-16"}


def cell_strings(path: Path, variable: str, remedy: str) -> list[str]:
    """The strings in cell array `variable` of the level 5 MAT-file `path`.

    Raises `UserError`, ending in `remedy`, where the file has no such variable or is damaged.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        return _strings(content, variable)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {remedy}") from None
    except (struct.error, zlib.error, LookupError, ValueError):
        raise UserError(
            f"{path} is damaged, or no MATLAB file with a list of names '{variable}'; {remedy}"
        ) from None


def _strings(content: bytes, variable: str) -> list[str]:
    if len(content) > _MOST_BYTES:
        raise ValueError("too long")
    order = {b"IM": "<", b"MI": ">"}[content[126:128]]
    for kind, data in _elements(content[128:], order):
        if kind == _COMPRESSED:
            unpacked = zlib.decompressobj().decompress(data, _MOST_BYTES)
            kind, data = next(_elements(unpacked, order))
        if kind != _MATRIX:
            continue
        (_, flags), (_, shape), (_, name), *cells = _elements(data, order)
        if name.decode("latin-1") == variable:
            if flags[0 if order == "<" else 3] != _CELL or len(cells) != _count(shape, order):
                raise ValueError("not a cell array")
            return [_string(cell, order) for _, cell in cells]
    raise LookupError(variable)


def _string(data: bytes, order: str) -> str:
    """The text of one cell, a row of characters."""
    (_, flags), (_, shape), _, (kind, characters) = _elements(data, order)
    if flags[0 if order == "<" else 3] != _CHAR:
        raise ValueError("not text")
    encoding = _ENCODINGS[kind]
    if encoding == "utf-16":
        encoding += "-le" if order == "<" else "-be"
    text = characters.decode(encoding)
    if len(text) != _count(shape, order):
        raise ValueError("cut short")
    return text


def _count(shape: bytes, order: str) -> int:
    return math.prod(struct.unpack(f"{order}{len(shape) // 4}i", shape))


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """Type and content of the elements that `data` consists of."""
    place = 0
    while place < len(data):
        kind, size = struct.unpack_from(f"{order}2I", data, place)
        start = place + 8
        if kind >> 16:  # a small element: size, type and up to four bytes in eight
            kind, size, start = kind & 0xFFFF, kind >> 16, place + 4
        if start + size > len(data) or (start == place + 4 and size > 4):
            raise ValueError("cut short")
        yield kind, data[start : start + size]
        end = start + size
        place = end if kind == _COMPRESSED else -(-end // 8) * 8
