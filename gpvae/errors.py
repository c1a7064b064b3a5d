"""The errors that a user can cause; the command line shows their text without a traceback."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class GPVAEError(Exception):
    """Base class. The message says what was given, what was expected and what to do next."""


class ConfigError(GPVAEError):
    """An unknown name or an impossible value in a configuration."""


class DataError(GPVAEError):
    """An image tensor or a data file that cannot be used as it is."""


class CheckpointError(GPVAEError):
    """A checkpoint that is truncated, foreign or of another configuration."""


class StorageError(CheckpointError):
    """A checkpoint that cannot be written, such as on a full disk."""

    exit_code = 1  # it was well asked for


class TrainingError(GPVAEError):
    """Training that cannot go on, such as a loss that is not finite."""


class NotebookError(GPVAEError):
    """A notebook that is missing, failed or was given an unknown parameter."""


class OutOfMemory(GPVAEError):
    """Not even the smallest piece of work fits into memory."""


def unknown(kind: str, given: str, known: Iterable[str]) -> str:
    """Message for an unknown name: what was given, the nearest known one, and all of them."""
    known = sorted(known)
    nearest = get_close_matches(given, known, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return f"unknown {kind} {given!r}.{hint} Known: {', '.join(known)}."
