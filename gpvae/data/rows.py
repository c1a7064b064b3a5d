"""Some rows of an array, by index: a split of a memory map copies nothing until it is read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rows:
    """The images `array[index]`, not yet read.

    Args:
        array: [M, C, H, W], often a memory map.
        index: [N] integers in [0, M).
    """

    array: np.ndarray
    index: np.ndarray

    @classmethod
    def all(cls, array: np.ndarray | Rows) -> Rows:
        """Every row of an array; rows as they are."""
        return array if isinstance(array, Rows) else cls(array, np.arange(len(array)))

    def __len__(self) -> int:
        return len(self.index)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, C, H, W)."""
        return (len(self.index), *self.array.shape[1:])

    @property
    def dtype(self) -> np.dtype:
        """Type of a pixel."""
        return self.array.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that `read` would need."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def view(self, index: np.ndarray | slice) -> Rows:
        """Some of these rows, still not read."""
        return Rows(self.array, self.index[index])

    def read(self, out: np.ndarray | None = None) -> np.ndarray:
        """The rows as an array in memory, [N, C, H, W]; into `out` if it is given."""
        if out is None:
            out = np.empty(self.shape, self.dtype)
        # A plain view: a memmap's own take would wrap every batch in another memmap. "clip"
        # writes straight into `out`; the default mode goes through a buffer.
        return np.take(np.asarray(self.array), self.index, axis=0, out=out, mode="clip")
