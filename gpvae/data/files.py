"""Reading, writing, summing and locking files, so that every failure is one DataError."""

from __future__ import annotations

import errno
import gzip
import hashlib
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath

from gpvae.errors import DataError

HTML = re.compile(rb"^\s*(<!doctype html|<html|<head|<body|<\?xml)", re.IGNORECASE)
WRITE_HINTS = {
    errno.ENOSPC: "no space is left there. Free some, or choose another folder with {variable}",
    errno.EDQUOT: "the disk quota is used up. Free some, or choose another folder with {variable}",
    errno.EACCES: "there is no write permission. Choose another folder with {variable}",
    errno.EPERM: "there is no write permission. Choose another folder with {variable}",
    errno.EROFS: "it is on a read-only file system. Choose another folder with {variable}",
}


class DamagedFileError(DataError):
    """A file whose bytes cannot be decoded, as against one of a wrong kind, shape or size."""


@contextmanager
def reading(path: Path, expected: str) -> Iterator[None]:
    """Turn whatever a parser raises on a damaged file into a DataError that names the file.

    Third-party parsers raise almost anything on damaged bytes (zlib.error, struct.error,
    MemoryError, RuntimeError, ...), hence the broad clause. An interrupt passes.
    """
    try:
        yield
    except Exception as error:
        if is_html(path):
            raise DamagedFileError(
                f"{path} holds an HTML page, not {expected}: probably an error page saved under "
                "the file's name. Delete it and fetch the file again."
            ) from error
        if isinstance(error, DataError):
            raise
        reason = str(error).strip().split("\n")[0] or "no further detail"
        raise DamagedFileError(
            f"{path} cannot be read as {expected} ({type(error).__name__}: {reason}). "
            f"{_read_hint(error)}"
        ) from error


def _read_hint(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "It is not there: check the path."
    if isinstance(error, PermissionError):
        return "It may not be read: change its permissions."
    return "Replace it with an undamaged copy."


@contextmanager
def writing(path: Path, variable: str = "GPVAE_DATA") -> Iterator[None]:
    """Turn a failed write under `path` into a DataError; `variable` would move the folder."""
    try:
        yield
    except OSError as error:
        fallback = f"{error.strerror or error}. Choose another folder with {{variable}}"
        hint = WRITE_HINTS.get(error.errno or 0, fallback).format(variable=variable)
        raise DataError(f"cannot write {path}: {hint}.") from error


def is_html(path: Path) -> bool:
    """Whether a file begins like a web page."""
    try:
        with path.open("rb") as file:
            return HTML.match(file.read(512)) is not None
    except OSError:
        return False


def refuse_outside(path: Path, names: Iterable[str]) -> None:
    """Raise DataError if an archive names a member outside its own folder.

    Nothing here extracts archives, so such a member could do no harm; but no distributor makes
    one, and the archive should not be trusted for its other members either.
    """
    for name in names:
        parts = PurePosixPath(name.replace("\\", "/")).parts
        if ".." in parts or name.startswith(("/", "\\")) or re.match(r"^[A-Za-z]:", name):
            raise DataError(
                f"{path} names a member outside its folder ({name!r}): it is not the original "
                "archive. Delete it and fetch it again."
            )


def file_sum(path: Path, kind: str) -> str:
    """Hexadecimal sum of a file; computed again only if its size or time has changed.

    Args:
        path: the file.
        kind: "md5", "sha256", or "content-md5" (of what a .gz file holds; other files as they
            are).
    """
    with reading(path, f"a file to sum ({kind})"):
        stat = path.stat()
        return _file_sum(path, kind, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=256)
def _file_sum(path: Path, kind: str, size: int, time: int) -> str:
    algorithm = kind.removeprefix("content-")
    compressed = kind.startswith("content-") and path.suffix == ".gz"
    with gzip.open(path) if compressed else path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


@contextmanager
def locked(path: Path, purpose: str, variable: str = "GPVAE_DATA") -> Iterator[None]:
    """Hold the lock file `path`; a second process waits, and a killed one lets go at once."""
    from filelock import FileLock, Timeout

    with writing(path, variable):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"waiting for another process that {purpose}", file=sys.stderr, flush=True)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()
