"""Numeric matrices of MATLAB 5 files (`save -v6` and `-v7`), and nothing else of them.

SciPy's `loadmat` reads more, but it builds whatever objects a file describes, takes the memory
that a header claims, and on damaged files can crash the interpreter (a few bit flips in a
`chardata.mat` are enough). Here every size is compared with what is there before it is used.

A file is a header of 128 bytes and a sequence of elements. An element is a tag (type and number
of bytes, 32 bits each; or, for up to four bytes, 16 bits each followed by the bytes) and its
bytes, padded to a multiple of eight. A matrix is an element of elements: flags with its class,
dimensions, name, values. With `-v7` each matrix is compressed by zlib.
"""

from __future__ import annotations

import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np

from gpvae.data.files import reading
from gpvae.errors import DataError

MATRIX, COMPRESSED = 14, 15
STORED = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8"}
STORED |= {12: "i8", 13: "u8"}
NUMERIC = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8"}
NUMERIC |= {15: "u8"}
OTHER = {1: "cell", 2: "struct", 3: "object", 4: "char", 5: "sparse", 16: "function", 17: "opaque"}
COMPLEX = 0x08
MAX_BYTES = 2**31  # the largest matrix of the sets that are read, SVHN's, has 0.2 GB
MAX_DIMENSIONS, MAX_NAME = 8, 63
PIECE = 2**16  # compressed bytes that are read at once


class Matrix(NamedTuple):
    """What a matrix says of itself before its values."""

    name: str
    shape: tuple[int, ...]
    kind: int
    is_complex: bool

    @property
    def title(self) -> str:
        """Its class in words."""
        numeric = np.dtype(NUMERIC[self.kind]).name if self.kind in NUMERIC else None
        words = numeric or OTHER.get(self.kind, f"matrix of class {self.kind}")
        return f"complex {words}" if self.is_complex else words


class Stream(Protocol):
    """Bytes in sequence."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes; fewer only at the end."""


def read_matrices(path: Path, shapes: dict[str, tuple[int | None, ...]]) -> dict[str, np.ndarray]:
    """Real numeric matrices by name, as float64 or in their integer class.

    Args:
        path: a MATLAB 5 file.
        shapes: the wanted names and shapes; None matches any length of at least one.

    Raises:
        DataError: not a MATLAB 5 file; a matrix that is missing, of another shape or class, or
            damaged.
    """
    arrays: dict[str, np.ndarray] = {}
    others: list[str] = []
    with reading(path, "a MATLAB 5 file"), path.open("rb") as file:
        order = _byte_order(path, file.read(128))
        while tag := file.read(8):
            kind, size = struct.unpack(order + "2I", tag)
            start = file.tell()
            stream: Stream = Inflated(file, size) if kind == COMPRESSED else file
            if kind == COMPRESSED:
                kind, _ = struct.unpack(order + "2I", stream.read(8))
            if kind != MATRIX:
                raise DataError(f"{path} holds an element of type {kind}; expected matrices.")
            matrix = _describe(path, stream, order)
            if matrix.name in shapes:
                _check(path, matrix, shapes[matrix.name])
                arrays[matrix.name] = _values(path, stream, order, matrix)
                if isinstance(stream, Inflated):
                    stream.finish()
            else:
                others.append(matrix.name)
            file.seek(start + size)
    for name, shape in shapes.items():
        if name not in arrays:
            there = ", ".join([*arrays, *others]) or "none"
            raise DataError(
                f"{path} has no variable {name!r} (expected {_words(shape)}); its variables: "
                f"{there}."
            )
    return arrays


def _byte_order(path: Path, header: bytes) -> str:
    for order, ending in (("<", b"\x00\x01IM"), (">", b"\x01\x00MI")):
        if header[124:] == ending:
            return order
    found = "a version 7.3 (HDF5) file" if header[124:126] == b"\x00\x02" else "something else"
    raise DataError(
        f"{path} is not a MATLAB 5 file but {found}: its bytes 125 to 128 are "
        f"{header[124:].hex(' ') or 'missing'}. Save it again with -v7."
    )


def _describe(path: Path, stream: Stream, order: str) -> Matrix:
    """Class, shape and name of the matrix that comes next."""
    _, flags = _element(path, stream, order, 8)
    word = struct.unpack(order + "I", flags[:4])[0]
    kind, is_complex = word & 0xFF, bool((word >> 8) & COMPLEX)
    if kind in (16, 17):  # these have no shape, and a name only by other rules
        return Matrix("(unnamed)", (), kind, False)
    _, lengths = _element(path, stream, order, 4 * MAX_DIMENSIONS)
    shape = struct.unpack(f"{order}{len(lengths) // 4}i", lengths)
    _, name = _element(path, stream, order, MAX_NAME)
    return Matrix(name.decode("ascii"), shape, kind, is_complex)


def _check(path: Path, matrix: Matrix, shape: tuple[int | None, ...]) -> None:
    name, wanted = matrix.name, _words(shape)
    if matrix.kind not in NUMERIC or matrix.is_complex:
        raise DataError(
            f"{path}: {name} is a MATLAB {matrix.title}; expected a real numeric matrix {wanted}."
        )
    given = matrix.shape
    fits = len(given) == len(shape) and all(
        b is None or a == b for a, b in zip(given, shape, strict=True)
    )
    if not fits or min(given) < 1 or 8 * math.prod(given) > MAX_BYTES:
        raise DataError(f"{path}: {name} has shape {given}; expected {wanted}.")


def _words(shape: tuple[int | None, ...]) -> str:
    return " x ".join("N" if length is None else str(length) for length in shape)


def _values(path: Path, stream: Stream, order: str, matrix: Matrix) -> np.ndarray:
    """The values in the matrix's class; whole numbers are often stored in fewer bytes."""
    kind, data = _element(path, stream, order, 8 * math.prod(matrix.shape))
    if kind not in STORED:
        raise DataError(f"{path}: {matrix.name} holds values of unknown type {kind}.")
    stored = np.frombuffer(data, order + STORED[kind])
    return stored.astype(NUMERIC[matrix.kind]).reshape(matrix.shape, order="F")


def _element(path: Path, stream: Stream, order: str, limit: int) -> tuple[int, bytes]:
    """Type and bytes of the next element, which may have at most `limit` bytes."""
    tag = stream.read(8)
    kind, size = struct.unpack(order + "2I", tag)
    if kind >> 16:  # the short form
        return kind & 0xFFFF, tag[4 : 4 + min(kind >> 16, 4)]
    if size > limit:
        raise DataError(f"{path} is damaged: an element claims {size:,} bytes, {limit:,} at most.")
    data = stream.read(size + -size % 8)
    if len(data) < size:
        raise DataError(f"{path} ends early: {len(data):,} of {size:,} bytes of an element.")
    return kind, data[:size]


class Inflated:
    """What a compressed element of `size` bytes at the file's position holds, read in sequence."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._left = file, size
        self._inflater = zlib.decompressobj()

    def read(self, size: int) -> bytes:
        """At most `size` bytes; no more than that are inflated."""
        pieces, missing = [], size
        while missing > 0 and not self._inflater.eof:
            packed = self._inflater.unconsumed_tail or self._more()
            piece = self._inflater.decompress(packed, missing)
            if not piece and not packed:
                break
            pieces.append(piece)
            missing -= len(piece)
        return b"".join(pieces)

    def finish(self) -> None:
        """Go to the end, where zlib compares its check sum; a few bytes of padding may remain."""
        self.read(16)
        if not self._inflater.eof:
            raise DataError(f"{self._file.name}: a compressed matrix does not end where it should.")

    def _more(self) -> bytes:
        data = self._file.read(min(PIECE, self._left))
        self._left -= len(data)
        return data
