"""Work in chunks that fit into memory, and in smaller ones when they turn out not to."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

from gpvae.errors import OutOfMemory

T = TypeVar("T")

CPU_BYTES = 32 * 2**20  # larger temporaries leave the caches and are slower
GPU_SHARE = 0.25  # of what is free; the rest is for what the estimate of a row leaves out


class Memory:
    """A bound on the bytes that temporaries take at once; it shrinks when the device has less.

    Args:
        limit: bytes; None takes `CPU_BYTES`, or on a GPU `GPU_SHARE` of what is free now.
        device: where the work is done.
    """

    def __init__(self, limit: int | None, device: torch.device) -> None:
        if limit is None and device.type == "cuda":
            limit = int(GPU_SHARE * torch.cuda.mem_get_info(device)[0])
        self.bytes = limit or CPU_BYTES

    def rows(self, row_bytes: int) -> int:
        """How many rows of so many bytes fit; at least one."""
        return max(1, self.bytes // row_bytes)

    def chunks(self, function: Callable[[slice], T], total: int, row_bytes: int) -> list[T]:
        """Results of `function` for consecutive slices of range(total).

        A chunk that runs out of memory is halved and tried again with a warning; what is done
        stays done, and later chunks are as small.

        Raises:
            OutOfMemory: even a single row does not fit.
        """
        parts, start = [], 0
        while start < total:
            size = min(self.rows(row_bytes), total - start)
            try:
                parts.append(function(slice(start, start + size)))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if size == 1:
                    raise OutOfMemory(
                        f"out of memory with a single row of about {row_bytes:,} bytes: {error} "
                        "Free some memory, or use smaller images or fewer samples."
                    ) from error
                self.bytes = row_bytes * size // 2
            else:
                start += size
                continue
            # Outside the handler, whose traceback would keep the failed chunk's tensors alive.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            warnings.warn(
                f"out of memory with {size} rows at once; going on with {size // 2}.", stacklevel=2
            )
        return parts


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch failed to allocate, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
