"""The data sets by name."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gpvae.data.dataset import Dataset, Raw, split
from gpvae.errors import DataError, unknown


def read_digits() -> Raw:
    """Scikit-learn's 1,797 handwritten digits, 8 x 8, 17 grey levels; part of the package."""
    from sklearn.datasets import load_digits

    pixels = load_digits().images.astype(np.uint8)[:, None]
    return Raw(train=pixels, levels=17)


READERS: dict[str, Callable[[], Raw]] = {"digits": read_digits}


def names() -> list[str]:
    """Names that `load_dataset` takes."""
    return sorted(READERS)


def load_dataset(name: str, **sizes: int | None) -> Dataset:
    """Read a data set and split it; keyword arguments are those of `split`.

    Raises:
        DataError: unknown name, missing or damaged file, impossible sizes.
    """
    if name not in READERS:
        raise DataError(unknown("data set", name, READERS))
    return split(name, READERS[name](), **sizes)
