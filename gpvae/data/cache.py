"""A derived array on disk, built once by several processes; a killed build goes on where it was.

While it is built, the cache is a folder `NAME.build` with the array, the plan and a journal that
names each finished block of images and its sum. A restart trusts only blocks whose sum is still
right. When all are there, the folder is renamed to `NAME` in one step, so that `NAME` is always
complete. A failed build removes its folder; an interrupted or killed one leaves it to go on.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gpvae.data import workers
from gpvae.data.files import file_sum, locked, writing
from gpvae.errors import DataError

BLOCK = 500  # images that a worker hands in at once
VARIABLE = "GPVAE_CACHE"


@dataclass(frozen=True)
class Plan:
    """What is to be built.

    Args:
        folder: the finished cache.
        shape: (N, C, H, W) of the uint8 images.
        identity: JSON values that name the source; another identity is another cache.
        module: the workers' program, run as `python -m module`; it calls `workers.serve`.
        job: JSON values for the workers.
    """

    folder: Path
    shape: tuple[int, int, int, int]
    identity: dict[str, object]
    module: str
    job: dict[str, object]

    @property
    def build_folder(self) -> Path:
        """Where the unfinished cache is."""
        return self.folder.with_name(self.folder.name + ".build")

    def recorded(self) -> dict[str, object]:
        """What a cache must say of itself to be that of this plan."""
        return {"shape": list(self.shape), "identity": self.identity}


@dataclass(frozen=True)
class Cache:
    """A finished cache.

    Args:
        images: [N, C, H, W] uint8, a read-only memory map.
        sum: SHA-256 of the array's file, taken when it was built.
        bad: {row: reason} of images that could not be decoded; their rows are zero.
    """

    images: np.ndarray
    sum: str
    bad: dict[int, str]


def open_cache(plan: Plan) -> Cache | None:
    """The finished cache, or None if there is none or one of another plan or size."""
    try:
        meta = json.loads((plan.folder / "meta.json").read_text())
        images = np.load(plan.folder / "images.npy", mmap_mode="r", allow_pickle=False)
        if meta["plan"] != plan.recorded() or images.shape != plan.shape:
            return None
        return Cache(images, meta["sha256"], {int(k): v for k, v in meta["bad"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def check_cache(plan: Plan, cache: Cache) -> None:
    """Raise DataError unless the array's file still has the sum it was built with."""
    path = plan.folder / "images.npy"
    if file_sum(path, "sha256") != cache.sum:
        raise DataError(f"{path} has changed since it was built. Delete {plan.folder}.")


def ensure(
    plan: Plan,
    *,
    check: Callable[[], object] = lambda: None,
    skip_bad: bool = False,
    processes: int | None = None,
    block: int = BLOCK,
    progress: bool = True,
) -> Cache:
    """The finished cache, built if need be; of several processes one builds, the others wait.

    Args:
        plan: what is to be built.
        check: called before a build, to check the source.
        skip_bad: leave out images that cannot be decoded, in this call and in later ones.
        processes: number of workers; None for one per core, at most 16.
        block: images in a block.
        progress: show a bar on standard error.

    Raises:
        DataError: an image that cannot be decoded (named), no space, no permission, a worker
            that died.
    """
    cache = open_cache(plan)
    if cache is None:
        lock = plan.folder.with_name(plan.folder.name + ".lock")
        with locked(lock, f"builds {plan.folder}", VARIABLE):
            if open_cache(plan) is None:  # another process may have finished it meanwhile
                check()
                with _cleaned_up(plan), writing(plan.folder, VARIABLE):
                    _build(plan, skip_bad, processes, block, progress)
            cache = open_cache(plan)
    if cache is None:
        raise DataError(f"{plan.folder} was built but cannot be opened. Delete it and try again.")
    accepted = plan.folder / "damaged-images-are-left-out"
    if cache.bad and skip_bad and not accepted.exists():
        with writing(plan.folder, VARIABLE):
            accepted.touch()
    if cache.bad and not accepted.exists():
        raise DataError(describe_bad(list(cache.bad.values())))
    return cache


def describe_bad(reasons: list[str]) -> str:
    """What to say about images that cannot be decoded."""
    more = f" (and {len(reasons) - 3} more)" if len(reasons) > 3 else ""
    return (
        f"{' '.join(reasons[:3])}{more} To leave such images out, once and for all: "
        "skip_corrupt=True, on the command line `gpvae data cache NAME --skip-corrupt`."
    )


@contextmanager
def _cleaned_up(plan: Plan) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:  # finished blocks are kept: the next build goes on from them
        raise
    except BaseException:
        shutil.rmtree(plan.build_folder, ignore_errors=True)
        raise


def _build(plan: Plan, skip_bad: bool, processes: int | None, block: int, progress: bool) -> None:
    folder = plan.build_folder
    array, offset = _open_build(plan, block)
    done = _finished_blocks(plan, block, offset)
    todo = [k for k in range(-(-plan.shape[0] // block)) if k not in done]
    count = min(processes or min(os.cpu_count() or 1, 16), max(1, len(todo)))
    jobs = [
        {
            **plan.job,
            "out": str(array),
            "offset": offset,
            "count": plan.shape[0],
            "block": block,
            "blocks": todo[k::count],
        }
        for k in range(count)
    ]
    with (folder / "journal.jsonl").open("w") as journal, _bar(plan, done, progress) as bar:
        journal.writelines(json.dumps(line) + "\n" for line in done.values())
        for line in workers.results(plan.module, jobs) if todo else ():
            if line["bad"] and not skip_bad:
                raise DataError(describe_bad([reason for _, reason in line["bad"]]))
            journal.write(json.dumps(line) + "\n")
            journal.flush()
            done[line["block"]] = line
            bar.update(line["images"])
    bad = {row: reason for line in done.values() for row, reason in line["bad"]}
    meta = {"plan": plan.recorded(), "sha256": file_sum(array, "sha256"), "bad": bad}
    (folder / "meta.json").write_text(json.dumps(meta))
    if plan.folder.exists():  # of another plan, or damaged
        shutil.rmtree(plan.folder)
    folder.rename(plan.folder)
    # Last: with its journal a build that is killed here is not begun anew.
    (plan.folder / "journal.jsonl").unlink(missing_ok=True)


def _open_build(plan: Plan, block: int) -> tuple[Path, int]:
    """Path of the growing array and the offset of its first pixel; begun anew if need be."""
    folder = plan.build_folder
    array, note = folder / "images.npy", folder / "plan.json"
    recorded = json.dumps({**plan.recorded(), "block": block}, sort_keys=True)
    size = int(np.prod(plan.shape, dtype=np.int64))
    with suppress(OSError, ValueError):
        if note.read_text() == recorded:
            images = np.load(array, mmap_mode="r", allow_pickle=False)
            if images.shape == plan.shape:
                return array, images.offset
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    free = shutil.disk_usage(folder).free
    if free < size:
        raise DataError(
            f"cannot write {plan.folder}: it needs {size / 1e9:.2f} GB and {free / 1e9:.2f} GB "
            f"are free there. Free some, or choose another folder with {VARIABLE}."
        )
    offset = np.lib.format.open_memmap(array, "w+", np.uint8, plan.shape).offset
    if hasattr(os, "posix_fallocate"):  # takes the space now, not in the middle of the work
        with array.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, offset + size)
    note.write_text(recorded)  # last: without it the folder is begun anew
    return array, offset


def _finished_blocks(plan: Plan, block: int, offset: int) -> dict[int, dict]:
    """Journal lines of the blocks whose bytes still have the sum that the journal tells."""
    done: dict[int, dict] = {}
    journal = plan.build_folder / "journal.jsonl"
    if not journal.exists():
        return done
    images = np.load(plan.build_folder / "images.npy", mmap_mode="r", allow_pickle=False)
    for text in journal.read_text().splitlines():
        with suppress(ValueError, KeyError, TypeError):  # the last line may be half-written
            line = json.loads(text)
            start = line["block"] * block
            if sha256(images[start : start + block]).hexdigest() == line["sha256"]:
                done[line["block"]] = line
    return done


def _bar(plan: Plan, done: dict[int, dict], progress: bool) -> tqdm:
    return tqdm(
        total=plan.shape[0],
        initial=sum(line["images"] for line in done.values()),
        desc=plan.folder.name,
        unit=" images",
        mininterval=2,
        disable=not progress,
    )
