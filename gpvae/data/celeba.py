"""CelebA: aligned faces, 178 x 218, cut to the centre 148 x 148 and averaged to 64 x 64.

The images come as one zip file or as the extracted folder, with `list_eval_partition.txt`
("000001.jpg 0": 0 training, 1 validation, 2 test). They are decoded once, by several processes,
into a cache of uint8 images in the order of that list; see `cache`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from gpvae.data import cache, places, workers
from gpvae.data.files import file_sum, reading, refuse_outside
from gpvae.data.resize import area_mean
from gpvae.data.rows import Rows
from gpvae.errors import DataError

if TYPE_CHECKING:
    from gpvae.data.dataset import Raw

WIDTH, HEIGHT = 178, 218
CROP = 148
SIZE = 64
LEFT, TOP = (WIDTH - CROP) // 2, (HEIGHT - CROP) // 2
PARTS = ("train", "valid", "test")
ARCHIVE, FOLDER, PARTITION = "img_align_celeba.zip", "img_align_celeba/", "list_eval_partition.txt"
MAX_JPEG = 2**20  # bytes; the images have about 7,000


def read_set(
    found: dict[str, Path],
    *,
    check: Callable[[], object] = lambda: None,
    skip_corrupt: bool = False,
    processes: int | None = None,
    block: int = cache.BLOCK,
    progress: bool = True,
) -> Raw:
    """All images as rows of the cache, which is built first if need be.

    Args:
        found: the partition list, and the zip file or the folder.
        check: called before a build, to check the published sums.
        skip_corrupt: leave out images that cannot be decoded.
        processes, block, progress: see `cache.ensure`.

    Raises:
        DataError: see `cache.ensure`; a partition list or archive that cannot be used.
    """
    from gpvae.data.dataset import Raw  # not at the top: the workers have no use for torch

    _, part = read_partition(found[PARTITION])
    plan = make_plan(found)
    built = cache.ensure(
        plan,
        check=check,
        skip_bad=skip_corrupt,
        processes=processes,
        block=block,
        progress=progress,
    )
    part[list(built.bad)] += len(PARTS)  # bad images belong to no part
    rows = {name: Rows(built.images, np.flatnonzero(part == k)) for k, name in enumerate(PARTS)}
    skipped = {name: int((part == len(PARTS) + k).sum()) for k, name in enumerate(PARTS)}
    return Raw(**rows, hash=built.sum, skipped=skipped)


def make_plan(found: dict[str, Path]) -> cache.Plan:
    """What the cache of these files is; another list, archive or resize is another cache."""
    names, _ = read_partition(found[PARTITION])
    archive = found.get(ARCHIVE)
    source = archive or found[FOLDER]
    return cache.Plan(
        folder=places.cache_root() / "celeba" / f"cache-{SIZE}x{SIZE}",
        shape=(len(names), 3, SIZE, SIZE),
        identity={
            "method": f"centre {CROP}, area mean {SIZE}",
            "partition": file_sum(found[PARTITION], "sha256"),
            "source": source.name,
            "bytes": source.stat().st_size if archive else 0,
        },
        module="gpvae.data.celeba",
        job={"source": str(source), "partition": str(found[PARTITION])},
    )


def read_partition(path: Path) -> tuple[list[str], np.ndarray]:
    """File names in order, and the part of each (0 training, 1 validation, 2 test).

    Raises:
        DataError: unreadable, empty, or a line that is not "name.jpg 0|1|2" (told).
    """
    with reading(path, "CelebA's partition list"):
        lines = path.read_text(encoding="ascii").splitlines()
        names, parts = [], []
        for number, line in enumerate(lines, 1):
            fields = line.split()
            if not fields:
                continue
            plain = len(fields) == 2 and not {"/", "\\"} & set(fields[0])
            if not plain or fields[1] not in ("0", "1", "2"):
                raise DataError(
                    f"{path}, line {number}: {line[:60]!r}; expected a file name and 0, 1 or 2."
                )
            names.append(fields[0])
            parts.append(int(fields[1]))
        if not names:
            raise DataError(f"{path} is empty; expected one line for each image.")
        if len(set(names)) != len(names):
            raise DataError(f"{path} names an image twice.")
    return names, np.array(parts)


def decode(path: Path, opener: Callable[[], object]) -> np.ndarray:
    """One image, cut and resized, [3, 64, 64] uint8.

    Args:
        path: its name in messages.
        opener: gives the JPEG file as a context manager.

    Raises:
        DataError: damaged, or not 178 x 218.
    """
    with reading(path, "a JPEG image"), opener() as file:
        image = Image.open(file, formats=["JPEG"])
        if image.size != (WIDTH, HEIGHT):
            raise DataError(
                f"{path} is {image.size[0]} x {image.size[1]}; expected {WIDTH} x {HEIGHT}."
            )
        pixels = np.asarray(image.convert("RGB"))
    pixels = pixels[TOP : TOP + CROP, LEFT : LEFT + CROP].transpose(2, 0, 1)
    return area_mean(pixels, SIZE)


def open_source(source: Path, stack: ExitStack) -> Callable[[str], np.ndarray]:
    """A function from file names to images, for a folder or a zip file.

    Raises:
        DataError: unreadable archive, a member outside its folder.
    """
    if source.is_dir():
        return lambda name: decode(source / name, lambda: (source / name).open("rb"))
    with reading(source, "a zip file of CelebA images"):
        archive = stack.enter_context(zipfile.ZipFile(source))
        refuse_outside(source, archive.namelist())

    def from_archive(name: str) -> np.ndarray:
        member = f"{FOLDER}{name}"
        place = source / member
        with reading(place, "a JPEG image"):
            if archive.getinfo(member).file_size > MAX_JPEG:
                raise DataError(f"{place} is too large for an aligned image.")
        return decode(place, lambda: archive.open(member))

    return from_archive


def make_work(job: dict) -> workers.Work:
    """The workers' part: images [start, stop) of the list, zero where they are damaged."""
    names, _ = read_partition(Path(job["partition"]))
    get = open_source(Path(job["source"]), ExitStack())

    def work(start: int, stop: int) -> tuple[np.ndarray, list[tuple[int, str]]]:
        pixels = np.zeros((stop - start, 3, SIZE, SIZE), np.uint8)
        bad = []
        for row in range(start, stop):
            try:
                pixels[row - start] = get(names[row])
            except DataError as error:
                bad.append((row, str(error)))
        return pixels, bad

    return work


if __name__ == "__main__":
    workers.serve(make_work)
