"""Image tensors and their splits. Dimensions: N images, C channels, H x W pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gpvae.data.rows import Rows
from gpvae.errors import DataError

if TYPE_CHECKING:
    from gpvae.data.stream import Streamed

VALID_FRACTION = 0.1  # of the training images, where a set has no split of its own
TEST_FRACTION = 0.2
STREAM_ABOVE = 2**30  # bytes; a larger part of a set is read batch by batch


@dataclass(frozen=True)
class Images:
    """A set of images of one shape, kept in its smallest faithful form.

    Args:
        pixels: [N, C, H, W], either uint8 in {0, ..., levels - 1} or float32 in [0, 1].
        levels: number of grey levels of uint8 pixels (17 for digits, 256 for 8-bit images).

    Raises:
        DataError: wrong dtype, number of dimensions or range; NaN or infinite pixels.
    """

    pixels: Tensor
    levels: int = 256

    def __post_init__(self) -> None:
        check_images(self.pixels, self.levels)

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return tuple(self.pixels.shape[1:])

    def __getitem__(self, index: Tensor | slice) -> Images:
        return replace(self, pixels=self.pixels[index])

    def to(self, device: torch.device | str) -> Images:
        """The same images on another device."""
        return replace(self, pixels=self.pixels.to(device))

    def unit(self, index: Tensor | slice = slice(None)) -> Tensor:
        """Pixels scaled to [0, 1] as float32, [B, C, H, W]; made on the images' device."""
        return to_unit(self.pixels[index], self.levels)

    def batches(
        self, size: int, generator: torch.Generator | None = None, scaled: bool = True
    ) -> Iterator[Tensor]:
        """All images once, in batches [B, C, H, W] on their device; the last may be smaller.

        Args:
            size: images in a batch.
            generator: draws the order; without one, the order is that of storage.
            scaled: give float32 in [0, 1]; otherwise pixels as they are stored.
        """
        for index in batch_order(len(self), generator).to(self.pixels.device).split(size):
            pixels = self.pixels[index]
            yield to_unit(pixels, self.levels) if scaled else pixels


def batch_order(count: int, generator: torch.Generator | None) -> Tensor:
    """A permutation of range(count) from the generator, on its device; without one, in order."""
    if generator is None:
        return torch.arange(count)
    return torch.randperm(count, generator=generator, device=generator.device)


def to_unit(pixels: Tensor, levels: int = 256) -> Tensor:
    """uint8 levels as float32 in [0, 1]; float pixels as they are."""
    if pixels.dtype == torch.uint8:
        return pixels.float() / (levels - 1)
    return pixels


def check_images(pixels: Tensor, levels: int = 256) -> None:
    """Raise DataError unless pixels are a usable [N, C, H, W] tensor (see `Images`)."""
    expected = "expected uint8 levels or float32 in [0, 1] of shape [N, C, H, W]"
    if not isinstance(pixels, Tensor):
        raise DataError(f"images are a {type(pixels).__name__}; {expected} as a torch tensor.")
    if pixels.ndim != 4:
        raise DataError(
            f"images have shape {tuple(pixels.shape)}; {expected}. "
            "To grey images [N, H, W] add a channel with x[:, None]."
        )
    if 0 in pixels.shape:
        raise DataError(f"images have shape {tuple(pixels.shape)}, which is empty; {expected}.")
    if pixels.dtype == torch.uint8:
        if levels < 256 and int(pixels.max()) >= levels:
            raise DataError(f"pixel value {int(pixels.max())} is not below levels={levels}.")
        return
    if pixels.dtype != torch.float32:
        raise DataError(f"images have dtype {pixels.dtype}; {expected}. Convert with x.float().")
    bad = int((~torch.isfinite(pixels)).sum())
    if bad:
        raise DataError(f"{bad} pixels are NaN or infinite; {expected}. Clean or drop the images.")
    low, high = float(pixels.min()), float(pixels.max())
    if low < 0 or high > 1:
        raise DataError(
            f"pixels range over [{low:g}, {high:g}]; {expected}. For 8-bit values divide by 255."
        )


def binarise(x: Tensor, generator: torch.Generator) -> Tensor:
    """Draw each pixel from Bernoulli(x) (dynamic binarisation, Burda et al. 2016)."""
    noise = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return (noise < x).to(x.dtype)


@dataclass(frozen=True)
class Raw:
    """What a reader returns: a set as distributed, before any validation split.

    Args:
        train: uint8 or float32 array, [N, C, H, W]; a memory map or rows of one if it is large.
        test: the distributor's test images, or None where there is no standard split.
        levels: see `Images`.
        valid: the distributor's validation images, or None where there are none.
        hash: digest of the pixels where they are too many to be read for it; see `split`.
        skipped: for each part, how many damaged images were left out on request.
    """

    train: np.ndarray | Rows
    test: np.ndarray | Rows | None = None
    levels: int = 256
    valid: np.ndarray | Rows | None = None
    hash: str = ""
    skipped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Dataset:
    """Training, validation and test images with what is needed to name them exactly.

    A part of more than `STREAM_ABOVE` bytes is a `Streamed`, which offers what `Images` offers
    except `pixels`, and is read from disk batch by batch.

    Args:
        name: name in the catalog.
        train, valid, test: disjoint image sets.
        split: how the sets were cut: seed, sizes and a digest of the validation indices.
        hash: digest of all pixels in order; a result row stores it.
        valid_index: places of the validation images among the distributor's training images (or
            its validation images, where it has some); stored beside each result row.
    """

    name: str
    train: Images | Streamed
    valid: Images | Streamed
    test: Images | Streamed
    split: dict[str, int | str]
    hash: str
    valid_index: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.train.shape

    @property
    def identity(self) -> dict[str, str | int]:
        """What tells these images from others, as checkpoints hold it."""
        return {"data_hash": self.hash, "levels": self.train.levels}


def split(
    name: str,
    raw: Raw,
    *,
    seed: int = 0,
    train_size: int | None = None,
    valid_size: int | None = None,
    test_size: int | None = None,
    test_block: bool = False,
    stream_above: int = STREAM_ABOVE,
) -> Dataset:
    """Cut a validation set (and a test set where there is none) from the training images.

    One permutation, fixed by `seed`, orders the training images: validation first, then test if
    needed, then training. A smaller `train_size` therefore is a subset of a larger one, and
    validation and test stay the same. `test_size` keeps only the first test images. A set with
    validation images of its own keeps them; `valid_size` then keeps the first of them.

    Args:
        name: name of the set, for messages and result rows.
        raw: the set as distributed.
        seed: of the permutation.
        train_size, valid_size, test_size: numbers of images; None for all, or for a tenth of the
            training images for validation. A test set that has to be cut is a fifth.
        test_block: where validation and test have to be cut, take the first images in stored
            order as test and the next ones as validation, not a random choice. Consecutive
            video frames are almost equal, so that a random split puts near copies of test
            images into training; the field's usual split of the Frey faces is random all the
            same, and so is the default here.
        stream_above: bytes above which a part stays on disk.

    Raises:
        DataError: a size that is not positive or exceeds what there is.
    """
    train = Rows.all(raw.train)
    total = len(train)
    n_test = 0 if raw.test is not None else max(1, round(TEST_FRACTION * total))
    n_valid = _valid_count(name, raw, total, valid_size)
    n_cut = 0 if raw.valid is not None else n_valid
    available = total - n_cut - n_test
    n_train = train_size if train_size is not None else available
    if n_valid < 1 or not 1 <= n_train <= available:
        asked = {"train_size": train_size, "valid_size": valid_size}
        given = ", ".join(f"{k}={v}" for k, v in asked.items() if v is not None)
        raise DataError(
            f"{name} has {total} training images: {n_cut} for validation and {n_test} for test "
            f"leave {max(available, 0)} to train on; given was {given or 'no size'}. Each part "
            "needs at least one image."
        )
    order = _cut_order(total, n_cut, n_test, seed, test_block)
    valid_index = order[:n_cut] if raw.valid is None else np.arange(n_valid)
    valid = (train if raw.valid is None else Rows.all(raw.valid)).view(valid_index)
    test = train.view(order[n_cut : n_cut + n_test]) if raw.test is None else Rows.all(raw.test)
    if test_size is not None:
        if not 1 <= test_size <= len(test):
            raise DataError(f"test_size={test_size}, but {name} has {len(test)} test images.")
        test = test.view(slice(test_size))
    parts = {"train": train.view(order[n_cut + n_test :][:n_train]), "valid": valid, "test": test}
    info: dict[str, int | str] = {
        "seed": seed,
        "train": n_train,
        "valid": n_valid,
        "test": len(test),
        "valid_indices": digest(valid_index.astype(np.int64)),
    }
    if test_block:
        info["test_block"] = True
    if any(raw.skipped.values()):
        info["skipped"] = sum(raw.skipped.values())
    held = {key: _hold(rows, raw, stream_above) for key, rows in parts.items()}
    images = {key: part for key, (part, _) in held.items()}
    pieces = [array for _, arrays in held.values() for array in arrays]
    return Dataset(
        name,
        **images,
        split=info,
        hash=digest(*pieces),
        valid_index=valid_index.astype(np.int64),
    )


def _cut_order(total: int, n_valid: int, n_test: int, seed: int, block: bool) -> np.ndarray:
    """The training images in order: first those cut for validation, then those for test."""
    order = np.random.default_rng(seed).permutation(total)
    if not block:
        return order
    cut = np.r_[n_test : n_test + n_valid, :n_test]
    return np.concatenate([cut, order[order >= n_test + n_valid]])


def _valid_count(name: str, raw: Raw, total: int, asked: int | None) -> int:
    if raw.valid is None:
        return asked if asked is not None else max(1, round(VALID_FRACTION * total))
    there = len(raw.valid)
    if asked is not None and not 1 <= asked <= there:
        raise DataError(f"valid_size={asked}, but {name} has {there} validation images.")
    return asked if asked is not None else there


def _hold(
    rows: Rows, raw: Raw, stream_above: int
) -> tuple[Images | Streamed, tuple[np.ndarray, ...]]:
    """Images in memory or a stream, and the arrays whose digest names them."""
    if rows.nbytes <= stream_above:
        pixels = rows.read()
        return Images(torch.from_numpy(pixels), raw.levels), (pixels,)
    from gpvae.data.stream import Streamed

    source = raw.hash or digest(rows.array)
    return Streamed(rows, raw.levels), (np.frombuffer(source.encode(), np.uint8), rows.index)


def digest(*arrays: np.ndarray) -> str:
    """First 16 hexadecimal digits of SHA-256 over the arrays' types, shapes and bytes."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(f"{array.dtype.str}{array.shape}".encode())
        sha.update(np.ascontiguousarray(array).data)
    return sha.hexdigest()[:16]
