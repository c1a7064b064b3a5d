"""A user's own images: an array or tensor, an .npy or .npz file, or a folder of image files.

data = from_images(x)                        # [N, C, H, W], uint8 or floats in [0, 1]
data = load_dataset("my/images.npy")         # the same, from a file
data = load_dataset("my/folder", resize=(64, 64), channels=3)
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gpvae.data.dataset import Dataset, Images, Raw, check_images, split
from gpvae.data.files import DamagedFileError, reading
from gpvae.errors import DataError

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
FORMATS = ["BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"]  # no format that runs a program
MODES = {"1": 1, "L": 1, "RGB": 3}
CONVERTIBLE = {*MODES, "CMYK", "LA", "P", "PA", "RGBA", "YCbCr"}  # 8 bits; others would be cut off
MAX_PIXELS = 2**26  # per image


def from_images(
    images: Images | Tensor | np.ndarray,
    test: Images | Tensor | np.ndarray | None = None,
    *,
    name: str = "own",
    levels: int = 256,
    **sizes: int | None,
) -> Dataset:
    """A data set from images in memory.

    Args:
        images: [N, C, H, W]: uint8 in {0, ..., levels - 1}, booleans, or floats in [0, 1] (kept
            as float32).
        test: test images of the same shape; cut from `images` if None.
        name: of the set in messages and `Dataset.name`. Rows and checkpoints of `gpvae train` go by
            `data.name` of the configuration: save the array as `.npy` and give its path there.
        levels: number of grey levels of uint8 pixels.
        sizes: keyword arguments of `split`.

    Raises:
        DataError: another type, shape or range; an impossible size.

    >>> from_images(np.zeros((20, 1, 8, 8), np.uint8), train_size=10).shape
    (1, 8, 8)
    """
    train, levels = as_pixels(images, levels)
    if test is not None:
        test, test_levels = as_pixels(test, levels)
        if test.shape[1:] != train.shape[1:] or test_levels != levels or test.dtype != train.dtype:
            raise DataError(
                f"test images are {test.dtype} {test.shape[1:]} of {test_levels} levels, training "
                f"images {train.dtype} {train.shape[1:]} of {levels}; expected the same."
            )
    return split(name, Raw(train, test, levels), **sizes)


def as_pixels(images: Images | Tensor | np.ndarray, levels: int) -> tuple[np.ndarray, int]:
    """Checked pixels as uint8 or float32 [N, C, H, W], and their number of levels."""
    if isinstance(images, Images):
        return images.pixels.cpu().numpy(), images.levels
    array = images.detach().cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
    if array.dtype == bool:
        array, levels = array.astype(np.uint8), 2
    elif array.dtype == np.uint8 and levels == 256 and _is_binary(array):
        raise DataError(
            "the images hold only 0 and 1, which as 8-bit grey levels are all but black. Convert "
            "binary images with x.astype(bool)."
        )
    elif array.dtype.kind == "f" and array.dtype != np.float32:
        array = array.astype(np.float32)
    if array.dtype not in (np.uint8, np.float32):
        raise DataError(
            f"images have dtype {array.dtype}; expected uint8, or floats in [0, 1]. Convert 8-bit "
            "values with x.astype(np.uint8)."
        )
    if array.ndim == 4 and array.shape[1] not in (1, 3) and array.shape[3] in (1, 3):
        raise DataError(
            f"images have shape {array.shape}, with channels last; expected [N, C, H, W]. Use "
            "x.transpose(0, 3, 1, 2), for a tensor x.permute(0, 3, 1, 2)."
        )
    check_pixels(array, levels)
    return array, levels


def _is_binary(array: np.ndarray) -> bool:
    """Whether pixels are 0 and 1 only; a file is not read to its end if its first images tell."""
    return array.ndim > 0 and array[:64].max(initial=0) <= 1 and array.max(initial=0) == 1


def check_pixels(array: np.ndarray, levels: int, bytes_at_once: int = 2**26) -> None:
    """`check_images` in pieces: an array larger than memory is never read as a whole."""
    if array.ndim != 4 or 0 in array.shape:
        check_images(torch.empty(array.shape, dtype=torch.uint8), levels)
    if array.dtype == np.uint8 and levels == 256:
        return
    step = max(1, bytes_at_once // max(1, array[0].nbytes))
    for start in range(0, len(array), step):
        check_images(torch.from_numpy(np.array(array[start : start + step])), levels)


def is_path(name: str | Path) -> bool:
    """Whether a name of a data set is meant as a place on disk."""
    text = str(name)
    return (
        isinstance(name, Path)
        or "/" in text
        or "\\" in text
        or Path(text).suffix in (".npy", ".npz")
    )


def load_path(path: str | Path, options: dict[str, object], **sizes: int | None) -> Dataset:
    """A data set from a file or folder; `options` are those of `read_folder`, for a folder only.

    Raises:
        DataError: nothing there, an unknown kind of file, unusable content or options.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return from_images(read_folder(path, **options), name=path.name, **sizes)
    if options:
        raise DataError(f"{', '.join(options)} can be given for a folder of images, not {path}.")
    if not path.exists():
        raise DataError(f"{path} does not exist; expected an .npy or .npz file or a folder.")
    if path.suffix == ".npy":
        return from_images(read_npy(path), name=path.stem, **sizes)
    if path.suffix == ".npz":
        arrays = read_npz(path)
        return from_images(arrays["images"], arrays.get("test"), name=path.stem, **sizes)
    raise DataError(f"{path} is not an .npy or .npz file or a folder of images.")


def read_npy(path: Path) -> np.ndarray:
    """The array of an .npy file as a memory map; arrays of Python objects are refused."""
    with reading(path, "an .npy array"):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.memmap):
            raise DataError(f"{path} is an archive, not a single .npy array.")
        return array


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Arrays of an .npz file: "images" and perhaps "test"; a single array is the images.

    Raises:
        DataError: unreadable, no such names, an array of another size than its header claims.
    """
    with reading(path, "an .npz file of arrays"), zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        if "images" in names:
            wanted = {name: name for name in ("images", "test") if name in names}
        elif len(names) == 1:
            wanted = {"images": names[0]}
        else:
            raise DataError(
                f"{path} holds {', '.join(names) or 'nothing'}; expected 'images' (and 'test'), "
                "or a single array."
            )
        return {key: _member(path, archive, f"{name}.npy") for key, name in wanted.items()}


def _member(path: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One array of an .npz file: the bytes that are there, shaped as its header says.

    `np.load` would first take the memory that the header claims.
    """
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran, dtype = read_header(file)
        if dtype.hasobject:
            raise DataError(f"{path}: {name} holds Python objects; expected numbers.")
        return np.frombuffer(file.read(), dtype).reshape(shape, order="F" if fortran else "C")


def read_folder(
    folder: Path,
    *,
    resize: tuple[int, int] | None = None,
    channels: int | None = None,
    skip_corrupt: bool = False,
    log: Callable[[str], None] = print,
) -> np.ndarray:
    """All image files of a folder, sorted by name.

    Args:
        folder: with files of one size (or give `resize`); other files are left alone.
        resize: (height, width) to resize every image to, by averaging where it shrinks.
        channels: 1 or 3 to convert every image to grey or RGB; None takes grey or RGB images as
            they are, all of one kind.
        skip_corrupt: leave out images that cannot be decoded, and say which.
        log: called with the names that were left out.

    Returns:
        [N, C, H, W] uint8.

    Raises:
        DataError: no images, one that cannot be decoded, sizes or kinds that differ.
    """
    with reading(folder, "a folder of images"):
        paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise DataError(f"{folder} holds no images ({', '.join(sorted(SUFFIXES))}).")
    pixels: list[np.ndarray] = []
    skipped = []
    for path in paths:
        try:
            image = read_image(path, resize, channels)
        except DamagedFileError as error:
            if not skip_corrupt:
                raise DataError(f"{error} To leave such images out: skip_corrupt=True.") from error
            skipped.append(path.name)
            continue
        if pixels and image.shape != pixels[0].shape:
            raise DataError(
                f"{path} has (channels, height, width) {image.shape}, earlier images have "
                f"{pixels[0].shape}. Give resize=(height, width) and channels=1 or 3."
            )
        pixels.append(image)
    if not pixels:
        raise DataError(f"none of the {len(paths)} images in {folder} can be decoded.")
    if skipped:
        log(f"{folder}: left out {len(skipped)} damaged images: {', '.join(skipped)}")
    return np.stack(pixels)


def read_image(
    path: Path, resize: tuple[int, int] | None = None, channels: int | None = None
) -> np.ndarray:
    """One image file, [C, H, W] uint8; arguments as for `read_folder`."""
    from PIL import Image

    if channels not in (None, 1, 3):
        raise DataError(f"channels={channels}; expected 1, 3 or None.")
    with reading(path, "an image"), Image.open(path, formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise DataError(f"{path} has {image.width} x {image.height} pixels; too many.")
        if image.mode not in (MODES if channels is None else CONVERTIBLE):
            advice = "Give channels=1 or 3." if image.mode in CONVERTIBLE else "Convert it first."
            raise DataError(
                f"{path} has the mode {image.mode}; expected 8-bit grey or RGB. {advice}"
            )
        mode = {1: "L", 3: "RGB"}[channels or MODES[image.mode]]
        image = image.convert(mode)
        if resize is not None:
            image = image.resize(resize[::-1], Image.Resampling.BOX)
        array = np.asarray(image)
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))
