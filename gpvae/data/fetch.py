"""Explicit downloads: `gpvae data fetch NAME`. Nothing else in the project opens a connection.

A file is downloaded into a folder of its own, its sum (or, without a published sum, its content)
is checked there, and only then is it moved to its place. A fetch that fails leaves nothing; one
that was killed is begun anew for the file it was at, and keeps the files before it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from gpvae.data.files import file_sum, locked, writing
from gpvae.data.locate import describe_sums, fetchable, matches, mismatch, place, present
from gpvae.data.places import data_root
from gpvae.data.sources import File, Source
from gpvae.errors import DataError

STAGING = ".fetch"
CHUNK = 2**20  # bytes
TIMEOUT = 30  # seconds without an answer


def fetch(
    source: Source,
    *,
    replace: bool = False,
    progress: bool = True,
    log: Callable[[str], None] = print,
) -> list[Path]:
    """Download the files of a data set that are not there yet.

    Args:
        source: its record.
        replace: also replace files that are there with a wrong sum.
        progress: show a bar on standard error.
        log: called with a line for each file.

    Returns:
        The places of the files.

    Raises:
        DataError: no address, no address that answers, another sum, no permission or space.
    """
    if not source.layouts:
        log(f"{source.name} is part of scikit-learn; nothing to fetch")
        return []
    layout = fetchable(source)
    if layout is None:
        raise DataError(f"{source.name} cannot be fetched: {source.note or 'no address'}.")
    folder = data_root() / source.folder
    with locked(folder / ".lock", f"fetches into {folder}"):
        return [_fetch_file(source, file, replace, progress, log) for file in layout]


def _fetch_file(
    source: Source, file: File, replace: bool, progress: bool, log: Callable[[str], None]
) -> Path:
    there = present(source, file)
    if there is not None and (not file.sums or matches(file, there)):
        log(f"{there}: already there")
        return there
    if there is not None and not replace:
        raise DataError(f"{mismatch(source, file, there)} To overwrite it: --replace.")
    target = place(source, file)
    staging = target.parent / STAGING
    with writing(target):
        shutil.rmtree(staging, ignore_errors=True)  # of a fetch that was killed
        staging.mkdir(parents=True)
    try:
        path = _first_that_answers(source, file, staging, progress, log)
        with writing(target):
            os.replace(path, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    log(f"{target}: {target.stat().st_size:,} bytes, sha256 {file_sum(target, 'sha256')}")
    return target


def _first_that_answers(
    source: Source, file: File, staging: Path, progress: bool, log: Callable[[str], None]
) -> Path:
    failures = []
    for url in file.urls:
        log(f"fetching {url}")
        try:
            return _download(source, file, url, staging, progress)
        except DataError as error:
            failures.append(f"{url}: {error}")
            log(f"failed: {error}")
    raise DataError(
        f"{source.name}: {file.name} could not be fetched. Put it at {place(source, file)} "
        f"yourself ({describe_sums(file)}). Tried: " + " | ".join(failures)
    )


def _download(source: Source, file: File, url: str, staging: Path, progress: bool) -> Path:
    import pooch
    import requests

    pooch.get_logger().setLevel("WARNING")
    known = next((s for s in file.sums if not s.startswith("content-")), None)
    downloader = pooch.HTTPDownloader(progressbar=progress, chunk_size=CHUNK, timeout=TIMEOUT)
    with writing(staging):
        try:
            path = pooch.retrieve(url, known, Path(file.name).name, staging, None, downloader)
        except requests.RequestException as error:  # an OSError, but not one of writing
            raise DataError(f"{type(error).__name__}: {error}") from error
        except ValueError as error:  # another sum, or an address that is none
            raise DataError(str(error).strip().split("\n")[0]) from error
    if known is None:
        _check_content(source, file, Path(path))
    return Path(path)


def _check_content(source: Source, file: File, path: Path) -> None:
    """Read a file without a published sum as it will be read; only sets of one file have such."""
    from gpvae.data.catalog import read_found

    read_found(source, {file.name: path}, lambda: None, {})
