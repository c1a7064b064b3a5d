"""OMNIGLOT's official drawings: zip files of 105 x 105 one-bit PNG images, black on white."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from gpvae.data.dataset import Raw
from gpvae.data.files import reading, refuse_outside
from gpvae.data.resize import area_mean
from gpvae.errors import DataError

SIDE = 105
MAX_PNG = 2**16  # bytes; the drawings have a few hundred
CHUNK = 1024  # images that are resized at once


def read_set(found: dict[str, Path]) -> Raw:
    """Background alphabets as training, evaluation alphabets as test images, at 28 x 28."""
    return Raw(
        train=read_zip(found["images_background.zip"]),
        test=read_zip(found["images_evaluation.zip"]),
    )


def read_zip(path: Path, size: int = 28) -> np.ndarray:
    """Drawings of one archive in sorted order (alphabet, character, drawer).

    Args:
        path: `images_background.zip` or `images_evaluation.zip`.
        size: side to average to; 105 keeps the drawings.

    Returns:
        [N, 1, size, size] uint8, 255 = ink: the share of each pixel's area that is inked.

    Raises:
        DataError: unreadable archive, a member outside its folder, no drawings, or a drawing
            that is damaged or not 105 x 105 one-bit (named).
    """
    with reading(path, "a zip file of drawings"), zipfile.ZipFile(path) as archive:
        refuse_outside(path, archive.namelist())
        names = sorted(
            name
            for name in archive.namelist()
            if name.endswith(".png") and not name.startswith("__MACOSX/")
        )
        if not names:
            raise DataError(f"{path} holds no .png drawing.")
        parts = []
        for start in range(0, len(names), CHUNK):
            chunk = [_drawing(path, archive, name) for name in names[start : start + CHUNK]]
            parts.append(area_mean(np.stack(chunk), size))
        return np.concatenate(parts)[:, None]


def _drawing(path: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One drawing, [105, 105] uint8, 255 = ink."""
    if archive.getinfo(name).file_size > MAX_PNG:
        raise DataError(f"{path}: {name} is too large for a drawing.")
    with reading(path, f"a drawing ({name})"), archive.open(name) as file:
        image = Image.open(file, formats=["PNG"])
        if image.size != (SIDE, SIDE) or image.mode != "1":
            raise DataError(
                f"{path}: {name} is {image.size[0]} x {image.size[1]}, mode {image.mode}; "
                f"expected {SIDE} x {SIDE}, one bit."
            )
        return np.where(np.asarray(image), np.uint8(0), np.uint8(255))
