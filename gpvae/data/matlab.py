"""Sets that come as MATLAB files: OMNIGLOT's `chardata.mat` and SVHN (for Frey see `frey`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gpvae.data.dataset import Raw
from gpvae.data.files import reading
from gpvae.data.mat5 import read_matrices
from gpvae.errors import DataError


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
    images = columns.T.reshape(-1, 1, 28, 28).swapaxes(2, 3)
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
