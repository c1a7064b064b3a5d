"""MATLAB 5 files through SciPy: OMNIGLOT's `chardata.mat`, SVHN, the original Frey faces.

Only plain numeric matrices are read. The shapes are looked up first and compared with what the
set needs, so that a damaged header cannot make the reader allocate or build anything else.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import scipy.io

from gpvae.data.dataset import Raw
from gpvae.data.files import reading
from gpvae.errors import DataError

NUMERIC = {"double", "single", "uint8", "int8", "uint16", "int16", "uint32", "int32", "logical"}
MAX_BYTES = 2**33  # the largest matrix of these sets, SVHN's, has 0.2 GB
VERSION_5 = (b"\x00\x01IM", b"\x01\x00MI")  # version 1 and the byte order mark


def read_chardata(found: dict[str, Path]) -> Raw:
    """OMNIGLOT at 28 x 28 in Burda et al.'s layout: one column per image, stored by columns.

    Intensities are multiples of 1/255 in the re-derived file and are then kept as uint8;
    otherwise they stay float32.
    """
    path = found["chardata.mat"]
    arrays = read_matrices(path, {"data": (784, None), "testdata": (784, None)})
    with reading(path, "OMNIGLOT at 28 x 28"):
        return Raw(
            train=_characters(path, arrays["data"]), test=_characters(path, arrays["testdata"])
        )


def _characters(path: Path, columns: np.ndarray) -> np.ndarray:
    # float64 first: MATLAB stores a matrix of small integers as bytes, which would overflow
    images = columns.T.astype(np.float64).reshape(-1, 1, 28, 28).swapaxes(2, 3)
    if not np.isfinite(images).all() or images.min() < 0 or images.max() > 1:
        raise DataError(f"{path} holds intensities outside [0, 1].")
    levels = np.rint(images * 255)
    if np.abs(images * 255 - levels).max() < 1e-6:
        return np.ascontiguousarray(levels.astype(np.uint8))
    return np.ascontiguousarray(images.astype(np.float32))


def read_svhn(found: dict[str, Path]) -> Raw:
    """Street view house numbers, cropped digits."""
    return Raw(
        train=read_svhn_part(found["train_32x32.mat"]),
        test=read_svhn_part(found["test_32x32.mat"]),
    )


def read_svhn_part(path: Path) -> np.ndarray:
    """Images of one file, [N, 3, 32, 32] uint8 (stored as [32, 32, 3, N])."""
    pixels = read_matrices(path, {"X": (32, 32, 3, None)})["X"]
    if pixels.dtype != np.uint8:
        raise DataError(f"{path}: X has dtype {pixels.dtype}; expected uint8.")
    return np.ascontiguousarray(pixels.transpose(3, 2, 0, 1))


def read_matrices(path: Path, shapes: dict[str, tuple[int | None, ...]]) -> dict[str, np.ndarray]:
    """Numeric matrices by name; None in a shape matches any length.

    Raises:
        DataError: not a MATLAB 5 file, a matrix that is missing, of another shape or not
            numeric, damaged content.
    """
    with reading(path, "a MATLAB 5 file"):
        _check_header(path)
        there = {name: (shape, kind) for name, shape, kind in scipy.io.whosmat(path)}
        for name, shape in shapes.items():
            _check_matrix(path, name, shape, there)
        found = scipy.io.loadmat(path, variable_names=list(shapes))
        arrays = {}
        for name in shapes:
            array = found.get(name)
            if not isinstance(array, np.ndarray) or array.shape != there[name][0]:
                raise DataError(f"{path}: {name} is not the matrix that the header announces.")
            if array.dtype.kind not in "fiub":
                raise DataError(f"{path}: {name} has dtype {array.dtype}; expected real numbers.")
            arrays[name] = array
        return arrays


def _check_header(path: Path) -> None:
    with path.open("rb") as file:
        header = file.read(128)
    if header[124:] not in VERSION_5:
        kind = "a version 7.3 (HDF5) file" if header[124:126] == b"\x00\x02" else "something else"
        raise DataError(
            f"{path} is not a MATLAB 5 file but {kind}: bytes 125 to 128 are "
            f"{header[124:].hex(' ') or 'missing'}."
        )


def _check_matrix(
    path: Path,
    name: str,
    shape: tuple[int | None, ...],
    there: dict[str, tuple[tuple[int, ...], str]],
) -> None:
    wanted = " x ".join("N" if n is None else str(n) for n in shape)
    if name not in there:
        known = ", ".join(sorted(there)) or "none"
        raise DataError(
            f"{path} has no variable {name!r} (expected {wanted}); its variables: {known}."
        )
    given, kind = there[name]
    if kind not in NUMERIC:
        raise DataError(f"{path}: {name} is a MATLAB {kind}; expected a numeric matrix {wanted}.")
    fits = len(given) == len(shape) and all(
        b is None or a == b for a, b in zip(given, shape, strict=True)
    )
    if not fits or min(given) < 1 or 8 * math.prod(given) > MAX_BYTES:
        raise DataError(f"{path}: {name} has shape {given}; expected {wanted}.")
