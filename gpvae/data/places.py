"""Where data lie: `GPVAE_DATA` if it is set, otherwise a per-user cache folder.

`GPVAE_CACHE` moves the derived caches (resized CelebA), for a data folder that is read-only.
"""

from __future__ import annotations

import os
from pathlib import Path

from gpvae.errors import DataError


def data_root() -> Path:
    """Folder that holds one subfolder for each data set.

    Raises:
        DataError: GPVAE_DATA is a file.
    """
    given = os.environ.get("GPVAE_DATA")
    root = Path(given).expanduser().absolute() if given else user_cache()
    if root.is_file():
        raise DataError(f"GPVAE_DATA is {root}, a file; expected the folder that holds the sets.")
    return root


def cache_root() -> Path:
    """Folder under which derived caches are written; the data root unless `GPVAE_CACHE` is set."""
    given = os.environ.get("GPVAE_CACHE")
    return Path(given).expanduser().absolute() if given else data_root()


def user_cache() -> Path:
    """The operating system's per-user cache folder for this project."""
    import pooch  # not at the top: it costs every import of the package 60 ms

    return Path(pooch.os_cache("gpvae"))


def describe_root() -> str:
    """The data root and where the choice came from, for messages."""
    origin = "GPVAE_DATA" if os.environ.get("GPVAE_DATA") else "GPVAE_DATA is not set"
    return f"{data_root()} ({origin})"
