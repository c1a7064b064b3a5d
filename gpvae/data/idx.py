"""The IDX format of MNIST and Fashion-MNIST, plain or gzip-compressed.

Two zero bytes, a type code (8: unsigned byte), the number of dimensions, each dimension as a
big-endian 32-bit integer, then the values in row-major order.
"""

from __future__ import annotations

import gzip
import math
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gpvae.data.dataset import Raw
from gpvae.data.files import reading
from gpvae.errors import DataError

UNSIGNED_BYTE = 8
MAX_VALUES = 2**31  # a header that claims more is damaged


def read_set(found: dict[str, Path]) -> Raw:
    """Images of MNIST or Fashion-MNIST; the labels are left alone."""
    train = read_images(found["train-images-idx3-ubyte.gz"])
    return Raw(train=train, test=read_images(found["t10k-images-idx3-ubyte.gz"]))


def read_images(path: Path) -> np.ndarray:
    """Images of one file, [N, 1, H, W] uint8.

    Raises:
        DataError: unreadable, truncated or over-long, wrong magic number, not three dimensions.
    """
    return read_idx(path, dimensions=3)[:, None]


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of an IDX file (.gz or plain) with the given number of dimensions.

    Raises:
        DataError: see `read_images`.
    """
    with (
        reading(path, f"an IDX file of {dimensions} dimensions"),
        gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file,
    ):
        return _parse(path, file, dimensions)


def _parse(path: Path, file: BinaryIO, dimensions: int) -> np.ndarray:
    header = file.read(4 + 4 * dimensions)
    expected = bytes([0, 0, UNSIGNED_BYTE, dimensions])
    if header[:4] != expected:
        raise DataError(
            f"{path} begins with {header[:4].hex(' ') or 'nothing'}; expected the magic number "
            f"{expected.hex(' ')} of an IDX file of unsigned bytes with {dimensions} dimensions."
        )
    shape = struct.unpack(f">{dimensions}I", header[4:])
    count = math.prod(shape)
    if not 0 < count <= MAX_VALUES:
        raise DataError(f"{path} claims the shape {shape}, which cannot be right.")
    # One byte more than claimed shows a file that is too long; reading to the end checks the CRC.
    data = file.read(count + 1)
    if len(data) != count:
        size = "more" if len(data) > count else f"{len(data):,}"
        raise DataError(f"{path} claims {count:,} values of shape {shape} but holds {size}.")
    return np.frombuffer(data, np.uint8).reshape(shape).copy()
