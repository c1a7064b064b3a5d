"""Troubles of the disk that a user can mend, and what to say about them."""

from __future__ import annotations

import errno
from pathlib import Path

from gpvae.errors import NotebookError

# Any other OSError is a defect.
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EISDIR}


class RunError(NotebookError):
    """A run that cannot go on although it was well asked for, such as on a full disk."""

    exit_code = 1


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
