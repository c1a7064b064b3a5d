"""Which files of a data set are on disk, and whether they are the published ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gpvae.data.files import DamagedFileError, file_sum, is_html
from gpvae.data.places import data_root, describe_root
from gpvae.data.sources import SOURCES, File, Source
from gpvae.errors import DataError

LIST_LIMIT = 2**29  # bytes that the listing sums without being asked


def place(source: Source, file: File, root: Path | None = None) -> Path:
    """Where a file belongs, under its first name."""
    return (root or data_root()) / source.folder / file.name


def present(source: Source, file: File, root: Path | None = None) -> Path | None:
    """Where a file is, under any of its names; None if it is nowhere."""
    folder = (root or data_root()) / source.folder
    for name in (file.name, *file.also):
        path = folder / name
        if path.is_dir() if name.endswith("/") else path.is_file():
            return path
    return None


def found_files(source: Source, layout: tuple[File, ...]) -> dict[str, Path]:
    """{file name: path} of what is there of one layout."""
    paths = {file.name: present(source, file) for file in layout}
    return {name: path for name, path in paths.items() if path is not None}


def locate(source: Source) -> dict[str, Path]:
    """Files of the first layout that is complete.

    Raises:
        DataError: none is. The message names the missing place, the command and the sum.
    """
    if not source.layouts:
        return {}
    for layout in source.layouts:
        found = found_files(source, layout)
        if all(file.name in found for file in layout if file.needed):
            return found
    raise DataError(missing(source))


def fetchable(source: Source) -> tuple[File, ...] | None:
    """The layout that can be downloaded, if there is one."""
    for layout in source.layouts:
        if all(file.urls for file in layout):
            return layout
    return None


def missing(source: Source) -> str:
    """What to say about a data set that is not there."""
    layout = fetchable(source) or source.layouts[0]
    there = found_files(source, layout)
    file = next(file for file in layout if file.needed and file.name not in there)
    advice = (
        f"Fetch it with `gpvae data fetch {source.name}`, or put it there"
        if file.urls
        else "It cannot be fetched; put it there"
    )
    others = [" + ".join(f.name for f in other) for other in source.layouts if other != layout]
    instead = f" Also accepted in that folder: {'; '.join(others)}." if others else ""
    note = f" Note: {source.note}." if source.note and not file.urls else ""
    return (
        f"{source.name}: {place(source, file)} is missing. {advice} "
        f"({describe_sums(file)}).{instead}{note} Data root: {describe_root()}."
    )


def describe_sums(file: File) -> str:
    """The published sums of a file, for messages."""
    titles = {"md5": "MD5", "sha256": "SHA-256", "content-md5": "MD5 of the uncompressed content"}
    parts = [f"{titles[kind]} {value}" for kind, _, value in (s.partition(":") for s in file.sums)]
    return "; ".join(parts) or "no published sum recorded"


def matches(file: File, path: Path) -> bool:
    """Whether one of the published sums is that of the file at `path`."""
    for kind, _, value in (s.partition(":") for s in file.sums):
        try:
            if file_sum(path, kind) == value:
                return True
        except DamagedFileError:
            if not kind.startswith("content-"):
                raise
    return False  # content that cannot be unpacked has no sum


def check_sums(source: Source, found: dict[str, Path]) -> dict[str, Path]:
    """The same files, once every file with a published sum has proved to match it.

    Raises:
        DataError: a sum that differs; if the file is that of another set, its name is told.
    """
    for layout in source.layouts:
        for file in layout:
            path = found.get(file.name)
            if path is not None and file.sums and not matches(file, path):
                raise DataError(mismatch(source, file, path))
    return found


def mismatch(source: Source, file: File, path: Path) -> str:
    """What to say about a file with a wrong sum."""
    other = owner(path, source)
    if other is not None:
        return (
            f"{source.name}: {path} is the file of {other.name!r}, another set of the same layout. "
            f"Ask for {other.name!r}, or put the file of {source.name!r} in its place "
            f"({describe_sums(file)})."
        )
    kind, _, _ = file.sums[0].partition(":")
    page = " It is an HTML page, probably an error page saved as data." if is_html(path) else ""
    again = f" and run `gpvae data fetch {source.name}`" if file.urls else ""
    return (
        f"{source.name}: {path} is not the published file: its {kind} is "
        f"{file_sum(path, kind)}; expected {describe_sums(file)} ({source.sums_from}).{page} "
        f"Delete it{again}. To use it as data of your own, give it as .npy."
    )


def owner(path: Path, source: Source) -> Source | None:
    """The other data set, if any, whose file this is."""
    for other in SOURCES.values():
        if other.name == source.name:
            continue
        for file in (file for layout in other.layouts for file in layout):
            if file.sums and place(other, file) == path and matches(file, path):
                return other
    return None


@dataclass(frozen=True)
class State:
    """What the listing says of a data set.

    Args:
        present: whether it can be read.
        text: the same in words.
    """

    present: bool
    text: str


def state(source: Source, limit: int = LIST_LIMIT) -> State:
    """Presence and sums of a data set; files of more than `limit` bytes in all are not summed."""
    if not source.layouts:
        return State(True, "present (built in)")
    try:
        found = locate(source)
    except DataError:
        there = {n for layout in source.layouts for n in found_files(source, layout)}
        return State(False, f"incomplete: only {', '.join(sorted(there))}" if there else "absent")
    try:
        return _state_of(source, found, limit)
    except DataError as error:
        return State(False, f"unreadable: {error}")


def _state_of(source: Source, found: dict[str, Path], limit: int) -> State:
    """`state` of a data set whose files are there."""
    files = {f.name: f for layout in source.layouts for f in layout if f.name in found}
    size = sum(path.stat().st_size for path in found.values() if path.is_file())
    many = f"{len(found)} file{'s' if len(found) > 1 else ''}, {size / 1e6:,.1f} MB"
    if source.cached:
        many += _cache_state(found)
    if not any(file.sums for file in files.values()):
        return State(True, f"present ({many}; no published sum recorded)")
    if size > limit:
        return State(True, f"present ({many}; sums not checked, see `gpvae data verify`)")
    for name, file in files.items():
        if file.sums and not matches(file, found[name]):
            other = owner(found[name], source)
            what = f"holds {other.name}" if other else "is not the published file"
            return State(False, f"absent: {found[name].name} {what}")
    unsummed = sum(not file.sums for file in files.values())
    exception = f"; {unsummed} without a published sum" if unsummed else ""
    return State(True, f"present, verified ({many}; sums match{exception})")


def _cache_state(found: dict[str, Path]) -> str:
    from gpvae.data import cache, celeba  # only celeba has a cache

    try:
        plan = celeba.make_plan(found)
    except DataError:
        return ""
    if cache.open_cache(plan) is not None:
        return ", cache built"
    return ", cache interrupted" if plan.build_folder.exists() else ", cache not built yet"
