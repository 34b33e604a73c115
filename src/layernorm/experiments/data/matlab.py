"""A matrix out of a MATLAB file of level 5, read so that no content can do more than raise an error.

Only what data sets are stored as: full, real matrices of numbers, compressed or not, of either byte order.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Final

import numpy as np

_HEADER: Final = 128
_MATRIX, _COMPRESSED = 14, 15
# The types of stored numbers, and of those the name, the shape and the flags are made of.
_NUMBERS: Final = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_INT8, _INT32, _UINT32 = 1, 5, 6
# The classes of matrices of numbers: float64, float32, and integers of 8 to 64 bits.
_CLASSES: Final = range(6, 16)
_IS_COMPLEX: Final = 0x0800


def matrix(content: bytes, name: str, limit: int) -> np.ndarray:
    """Return the matrix of a name.

    Args:
        content: the file.
        name: of the variable.
        limit: the most bytes that it may unpack to.

    Returns:
        An array (rows, columns) of the type it is stored as.

    Raises:
        ValueError: the file is damaged, of another version, or has no such matrix.
    """
    if content[:10] == b"MATLAB 7.3":
        raise ValueError("it is of MATLAB 7.3, which is HDF5; save it with -v7, or as text")
    order = {b"IM": "<", b"MI": ">"}.get(content[126:128])
    if len(content) < _HEADER or order is None or not content.startswith(b"MATLAB 5.0"):
        raise ValueError("it is no MATLAB file of level 5")
    for kind, data in _elements(content[_HEADER:], order, aligned=False):
        if kind == _COMPRESSED:
            kind, data = _unpacked(data, order, limit)
        if kind == _MATRIX and (found := _matrix(data, order, name)) is not None:
            return found
    raise ValueError(f"it has no matrix {name}")


def _elements(content: bytes, order: str, aligned: bool = True) -> Iterator[tuple[int, bytes]]:
    """Yield the type and the data of each element; inside of a matrix all begin at multiples of 8 bytes."""
    at = 0
    while at < len(content):
        if at + 8 > len(content):
            raise ValueError("it is cut off")
        word, length = (int(n) for n in np.frombuffer(content, f"{order}u4", 2, at))
        if word >> 16:  # up to four bytes in the tag itself
            kind, length, start, end = word & 0xFFFF, word >> 16, at + 4, at + 8
            if length > 4:
                raise ValueError("a small element is too long")
        else:
            kind, start = word, at + 8
            end = start + length + (-length % 8 if aligned or kind != _COMPRESSED else 0)
        if start + length > len(content):
            raise ValueError("it is cut off")
        yield kind, content[start : start + length]
        at = end


def _unpacked(data: bytes, order: str, limit: int) -> tuple[int, bytes]:
    unpacker = zlib.decompressobj()
    unpacked = unpacker.decompress(data, limit)
    if not unpacker.eof:
        raise ValueError(f"a compressed part is cut off, or larger than {limit} bytes")
    ((kind, content),) = _elements(unpacked, order)
    return kind, content


def _matrix(data: bytes, order: str, name: str) -> np.ndarray | None:
    """Return the matrix in an element, or None where it has another name."""
    parts = list(_elements(data, order))
    if len(parts) < 3 or [kind for kind, _ in parts[:3]] != [_UINT32, _INT32, _INT8]:
        raise ValueError("a matrix lacks its flags, shape or name")
    flags, shape, label = (content for _, content in parts[:3])
    if label != name.encode():
        return None
    if len(flags) != 8 or len(shape) != 8 or len(parts) != 4:
        raise ValueError(f"{name} is no full, real matrix of two dimensions")
    flag = int(np.frombuffer(flags, f"{order}u4")[0])
    rows, columns = (int(n) for n in np.frombuffer(shape, f"{order}i4"))
    kind, numbers = parts[3]
    if flag & 0xFF not in _CLASSES or flag & _IS_COMPLEX or kind not in _NUMBERS:
        raise ValueError(f"{name} is no real matrix of numbers")
    values = np.frombuffer(numbers, order + _NUMBERS[kind])
    if rows < 0 or columns < 0 or rows * columns != values.size:
        raise ValueError(f"{name} is {rows} by {columns}, but has {values.size} numbers")
    return values.reshape(rows, columns, order="F")
