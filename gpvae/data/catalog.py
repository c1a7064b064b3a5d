"""The data sets by name: found on disk, checked against their published sums, read and split."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np

from gpvae.data.dataset import Dataset, Raw, split
from gpvae.data.locate import check_sums, locate
from gpvae.data.sources import SOURCES, Source
from gpvae.errors import DataError, unknown


def names() -> list[str]:
    """Names that `load_dataset` takes."""
    return sorted(SOURCES)


def get_source(name: str) -> Source:
    """The record of a data set.

    Raises:
        DataError: unknown name.
    """
    if name not in SOURCES:
        raise DataError(
            f"{unknown('data set', name, SOURCES)} For images of your own give a path that "
            "contains a slash or ends in .npy or .npz."
        )
    return SOURCES[name]


def load_dataset(
    name: str | Path,
    *,
    resize: tuple[int, int] | None = None,
    channels: int | None = None,
    skip_corrupt: bool = False,
    **sizes: int | None,
) -> Dataset:
    """Read a data set and split it. Nothing is ever downloaded here.

    Args:
        name: a name in the catalog; or the path of an .npy file, an .npz file or a folder of
            images (see `gpvae.data.user`).
        resize, channels: for a folder of images, see `user.read_folder`.
        skip_corrupt: for a folder of images and for CelebA: leave out damaged images.
        sizes: keyword arguments of `split`: seed, train_size, valid_size, test_size, ...

    Raises:
        DataError: unknown name; a missing file (the message names its place, its sum and the
            command that fetches it); a damaged one; impossible sizes.

    >>> load_dataset("digits", train_size=100).shape
    (1, 8, 8)
    """
    from gpvae.data import user

    given = {"resize": resize, "channels": channels, "skip_corrupt": skip_corrupt or None}
    options = {key: value for key, value in given.items() if value is not None}
    if user.is_path(name):
        return user.load_path(name, options, **sizes)
    source = get_source(name)
    return split(name, read(source, options), **sizes)


def read(source: Source, options: dict[str, object] | None = None) -> Raw:
    """Find, check and read a data set as its distributor gives it.

    Args:
        source: its record.
        options: `skip_corrupt`, for a set with a cache.
    """
    found = locate(source)
    check = partial(check_sums, source, found)
    if not source.cached:
        check()
    return read_found(source, found, check, options or {})


def read_found(
    source: Source, found: dict[str, Path], check: Callable[[], object], options: dict[str, object]
) -> Raw:
    """Read files that are known to be there, and compare the images with the record."""
    reader = find_reader(source)
    if source.cached:
        _refuse_options(source, {k: v for k, v in options.items() if k != "skip_corrupt"})
        raw = reader(found, check=check, **options)
    else:
        _refuse_options(source, options)
        raw = reader(found)
    _check_counts(source, raw)
    return raw


def find_reader(source: Source) -> Callable[..., Raw]:
    """The function that a record names."""
    module, _, function = source.reader.partition(":")
    return getattr(import_module(module), function)


def _refuse_options(source: Source, options: dict[str, object]) -> None:
    if options:
        raise DataError(f"{source.name} takes no {', '.join(options)}; a folder of images does.")


def _check_counts(source: Source, raw: Raw) -> None:
    for part, expected in (("train", source.train), ("valid", source.valid), ("test", source.test)):
        images = getattr(raw, part)
        given = 0 if images is None else len(images) + (raw.skipped.get(part, 0))
        shape = source.shape if images is None else tuple(images.shape[1:])
        if given != expected or shape != source.shape:
            raise DataError(
                f"{source.name}: {given:,} {part} images of shape {shape} were read; expected "
                f"{expected:,} of shape {source.shape}. The files are of another set or damaged."
            )


def read_digits(found: dict[str, Path]) -> Raw:
    """Scikit-learn's 1,797 handwritten digits, 8 x 8, 17 grey levels; part of the package."""
    from sklearn.datasets import load_digits

    pixels = load_digits().images.astype(np.uint8)[:, None]
    return Raw(train=pixels, levels=17)
