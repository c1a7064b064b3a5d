"""Files that are written whole or not at all, and troubles of the disk that a user can mend."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from gpvae.errors import NotebookError

# Any other OSError is a defect.
DISK = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
}


class RunError(NotebookError):
    """A run that cannot go on although it was well asked for, such as on a full disk."""

    exit_code = 1


@contextmanager
def replaced(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of `path` once it is complete and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.stem}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def check_writable(*folders: Path) -> None:
    """Make the folders and try to write to them before hours of work depend on it.

    Raises:
        RunError: one cannot be written to.
    """
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"x")
        except OSError as error:
            raise disk_error(error, folder) from error


def disk_error(error: OSError, folder: Path) -> RunError:
    """What to tell the user about an error of the disk of this folder."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(
            f"the disk of {folder} is full ({error.strerror}). Free some space and run the same "
            "command again: finished results are kept and reused."
        )
    return RunError(
        f"cannot write to {folder}: {error.strerror or error}. Mend the folder, or name another "
        "place in the environment variable GPVAE_ROOT."
    )
