"""The Frey faces: 1,965 consecutive video frames, 28 x 20, from an array file or the original."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gpvae.data.dataset import Raw
from gpvae.data.mat5 import read_matrices
from gpvae.data.user import read_npy
from gpvae.errors import DataError

HEIGHT, WIDTH = 28, 20


def read_set(found: dict[str, Path]) -> Raw:
    """All frames; there is no standard split.

    `split` cuts the test set at random, as is usual in the field. Neighbouring frames are almost
    equal, so a random split shows the model near copies of its test images; `test_block=True`
    holds out consecutive frames.
    """
    if "freyfaces.npy" in found:
        return Raw(train=read_array(found["freyfaces.npy"]))
    return Raw(train=read_original(found["frey_rawface.mat"]))


def read_array(path: Path) -> np.ndarray:
    """Frames of an array file [N, 28, 20] uint8, as [N, 1, 28, 20]."""
    frames = read_npy(path)
    if frames.dtype != np.uint8 or frames.shape[1:] != (HEIGHT, WIDTH):
        raise DataError(
            f"{path} holds {frames.dtype} of shape {frames.shape}; expected uint8 of shape "
            f"(N, {HEIGHT}, {WIDTH})."
        )
    return np.array(frames)[:, None]


def read_original(path: Path) -> np.ndarray:
    """Frames of the original `ff`, 560 x N with one frame in a column, as [N, 1, 28, 20]."""
    columns = read_matrices(path, {"ff": (HEIGHT * WIDTH, None)})["ff"]
    if columns.dtype != np.uint8:
        raise DataError(f"{path}: ff has dtype {columns.dtype}; expected uint8.")
    return np.ascontiguousarray(columns.T).reshape(-1, 1, HEIGHT, WIDTH)
