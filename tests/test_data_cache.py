"""CelebA's cache: built by several processes, killed, resumed, shared, damaged, refused."""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data_formats import image_bytes

from gpvae.data import cache, celeba, cli, load_dataset, split, workers
from gpvae.data.locate import state
from gpvae.data.sources import SOURCES, File
from gpvae.errors import DataError

COUNT = 23
PARTS = [0] * 15 + [1] * 4 + [2] * 4
SLOW = 400  # images, enough for a kill to come in the middle


@pytest.fixture(autouse=True)
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPVAE_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("GPVAE_CACHE", raising=False)


def make_set(folder: Path, count: int = COUNT, archive: bool = True) -> dict[str, Path]:
    """A small CelebA: image k has the colour (10 + k, 5 k, 255 - k), modulo 256."""
    folder.mkdir(parents=True)
    names = [f"{k + 1:06d}.jpg" for k in range(count)]
    parts = [PARTS[k % COUNT] for k in range(count)]
    partition = folder / celeba.PARTITION
    partition.write_text("".join(f"{n} {p}\n" for n, p in zip(names, parts, strict=True)))
    images = folder / celeba.FOLDER
    images.mkdir()
    for k, name in enumerate(names):
        pixels = np.full((218, 178, 3), ((10 + k) % 256, 5 * k % 256, (255 - k) % 256), np.uint8)
        (images / name).write_bytes(image_bytes(pixels, "JPEG", quality=95))
    if not archive:
        return {celeba.PARTITION: partition, celeba.FOLDER: images}
    path = folder / celeba.ARCHIVE
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.write(images / name, f"{celeba.FOLDER}{name}")
    return {celeba.PARTITION: partition, celeba.ARCHIVE: path}


def read(found: dict[str, Path], **options: object):
    return celeba.read_set(found, **{"processes": 1, "block": 4, "progress": False, **options})


def expected(k: int) -> np.ndarray:
    return np.array([(10 + k) % 256, 5 * k % 256, (255 - k) % 256])


def left_in(found: dict[str, Path]) -> set[str]:
    """What is in the cache's folder apart from its lock."""
    return {p.name for p in celeba.make_plan(found).folder.parent.iterdir()} - {"cache-64x64.lock"}


@pytest.mark.parametrize("archive", [True, False])
def test_parts_and_pixels(tmp_path: Path, archive: bool) -> None:
    raw = read(make_set(tmp_path / "in", archive=archive), processes=2)
    assert [len(raw.train), len(raw.valid), len(raw.test)] == [15, 4, 4]
    for rows, first in ((raw.train, 0), (raw.valid, 15), (raw.test, 19)):
        for k, image in enumerate(rows.read()):
            assert np.abs(image.reshape(3, -1).mean(1) - expected(first + k)).max() < 3


def test_standard_split_is_kept(tmp_path: Path) -> None:
    raw = read(make_set(tmp_path / "in"))
    data = split("celeba", raw)
    assert [len(data.train), len(data.valid), len(data.test)] == [15, 4, 4]
    streamed = split("celeba", raw, stream_above=0)
    for part in ("train", "valid", "test"):
        assert torch.equal(getattr(streamed, part).unit(), getattr(data, part).unit())
    with pytest.raises(DataError, match="validation images"):
        split("celeba", raw, valid_size=5)


def test_from_the_catalog(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = make_set(tmp_path / "data" / "celeba")
    layout = tuple(File(name) for name in (celeba.ARCHIVE, celeba.PARTITION))
    record = replace(SOURCES["celeba"], layouts=(layout,), train=15, valid=4, test=4)
    monkeypatch.setitem(SOURCES, "celeba", record)
    assert "cache not built yet" in state(record).text
    args = argparse.Namespace(name="celeba", skip_corrupt=False)
    assert cli.run_cache(args) == 0
    assert "cache built" in state(record).text
    data = load_dataset("celeba", test_size=2)
    assert (data.shape, len(data.valid), len(data.test)) == ((3, 64, 64), 4, 2)
    assert cli.run_verify(argparse.Namespace(names=["celeba"])) == 0
    assert "the cache is as it was built" in capsys.readouterr().out
    plan = celeba.make_plan(found)
    with (plan.folder / "images.npy").open("r+b") as file:
        file.seek(1000)
        file.write(b"\x07" * 64)
    assert cli.run_verify(argparse.Namespace(names=["celeba"])) == 1
    with pytest.raises(DataError, match="takes no resize"):
        load_dataset("celeba", resize=(32, 32))


def test_the_cache_is_used_again(tmp_path: Path) -> None:
    found = make_set(tmp_path / "in")
    first = read(found)
    calls: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "start", lambda *_: pytest.fail("no worker is needed"))
        second = read(found, check=lambda: calls.append(1))
    assert first.hash == second.hash
    assert not calls, "the sums of the source are checked only for a build"
    assert left_in(found) == {"cache-64x64"}


def test_another_source_is_another_cache(tmp_path: Path) -> None:
    first = read(make_set(tmp_path / "in"))
    second = read(make_set(tmp_path / "more", count=COUNT + 1))
    assert len(second.train) == 16
    assert first.hash != second.hash


def test_number_of_processes_does_not_matter(tmp_path: Path) -> None:
    found = make_set(tmp_path / "in")
    first = read(found, processes=1, block=7)
    shutil.rmtree(celeba.make_plan(found).folder)
    assert read(found, processes=3, block=2).hash == first.hash


def test_damaged_image_is_named_and_skipped_only_on_request(tmp_path: Path) -> None:
    found = make_set(tmp_path / "in", archive=False)
    path = found[celeba.FOLDER] / "000007.jpg"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match=r"000007\.jpg.*skip_corrupt"):
        read(found)
    assert left_in(found) == set()
    raw = read(found, skip_corrupt=True)
    assert len(raw.train) == 14
    assert raw.skipped == {"train": 1, "valid": 0, "test": 0}
    means = raw.train.read()[:, 0].mean((1, 2))
    assert np.abs(means - [10 + k for k in range(15) if k != 6]).max() < 3
    assert split("celeba", raw).split["skipped"] == 1
    again = read(found)  # the request holds for the cache, as `gpvae data cache` makes it
    assert again.skipped == raw.skipped and again.hash == raw.hash
    accepted = celeba.make_plan(found).folder / "damaged-images-are-left-out"
    accepted.unlink()
    with pytest.raises(DataError, match=r"000007\.jpg"):  # the cache does not hide it
        read(found)


def test_a_build_that_is_killed_at_its_very_end_is_not_begun_anew(tmp_path, monkeypatch) -> None:
    found = make_set(tmp_path / "in")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            read(found)
    with counted_blocks() as blocks:
        raw = read(found)
    assert blocks == [] and len(raw.train) == 15
    assert left_in(found) == {"cache-64x64"}
    assert not (celeba.make_plan(found).folder / "journal.jsonl").exists()


def test_what_a_plugin_prints_is_no_report_of_a_worker(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "noisy.py").write_text("print('here I am')")
    monkeypatch.setenv("GPVAE_PLUGINS", "noisy")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert len(read(make_set(tmp_path / "in")).train) == 15
    assert "here I am" in capsys.readouterr().err


def test_missing_image_is_named(tmp_path: Path) -> None:
    found = make_set(tmp_path / "in", archive=False)
    (found[celeba.FOLDER] / "000003.jpg").unlink()
    with pytest.raises(DataError, match=r"000003\.jpg"):
        read(found)
    found = make_set(tmp_path / "zip")
    with zipfile.ZipFile(found[celeba.ARCHIVE], "w") as file:
        file.writestr("img_align_celeba/000001.jpg", b"")
    with pytest.raises(DataError, match=r"00000[1-5]\.jpg"):
        read(found)


def test_failed_check_builds_nothing(tmp_path: Path) -> None:
    found = make_set(tmp_path / "in")

    def check() -> None:
        raise DataError("wrong sum")

    with pytest.raises(DataError, match="wrong sum"):
        read(found, check=check)
    assert left_in(found) == set()
    assert len(read(found).train) == 15


BUILD = """
import json, sys
from pathlib import Path
from gpvae.data import cache, celeba
plan = celeba.make_plan({k: Path(v) for k, v in json.loads(sys.argv[1]).items()})
print(cache.ensure(plan, processes=1, block=4, progress=False).sum)
"""


def start_build(found: dict[str, Path]) -> subprocess.Popen[str]:
    names = json.dumps({k: str(v) for k, v in found.items()})
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, names],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_blocks(process: subprocess.Popen[str], journal: Path, blocks: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if journal.exists() and journal.read_bytes().count(b"\n") >= blocks:
            return
        time.sleep(0.002)
    pytest.fail(f"no {blocks} blocks came; {process.stderr.read() if process.poll() else ''}")


def test_killed_build_goes_on_and_gives_the_same(tmp_path: Path) -> None:
    found = make_set(tmp_path / "in", count=SLOW)
    plan = celeba.make_plan(found)
    journal = plan.build_folder / "journal.jsonl"
    process = start_build(found)
    wait_for_blocks(process, journal, 5)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not plan.folder.exists(), "the build was over before the kill; make SLOW larger"
    wait_for_the_workers_to_end(plan)
    killed = tmp_path / "killed"
    shutil.copytree(plan.build_folder, killed)
    missing = SLOW // 4 - journal.read_bytes().count(b"\n")
    sums = set()
    for harm, redone in ((None, missing), (half_a_line, missing), (change_a_block, missing + 1)):
        shutil.rmtree(plan.build_folder, ignore_errors=True)
        shutil.rmtree(plan.folder, ignore_errors=True)
        shutil.copytree(killed, plan.build_folder)
        if harm:
            harm(plan.build_folder)
        with counted_blocks() as blocks:
            sums.add(read(found).hash)
        assert len(blocks) == redone
        assert left_in(found) == {"cache-64x64"}
    shutil.rmtree(plan.folder)
    sums.add(read(found).hash)  # never interrupted
    assert len(sums) == 1
    cache.check_cache(plan, cache.open_cache(plan))


def half_a_line(folder: Path) -> None:
    with (folder / "journal.jsonl").open("a") as file:
        file.write('{"block": 9')


def change_a_block(folder: Path) -> None:
    with (folder / "images.npy").open("r+b") as file:
        file.seek(500)
        file.write(b"\xaa" * 100)


@contextmanager
def counted_blocks() -> Iterator[list[int]]:
    """Blocks that workers are asked for."""
    blocks: list[int] = []
    start = workers.start
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            workers, "start", lambda name, job: (blocks.extend(job["blocks"]), start(name, job))[1]
        )
        yield blocks


def wait_for_the_workers_to_end(plan: cache.Plan) -> None:
    """Workers end by themselves when the builder is gone; no process must be left over."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if not any(str(plan.build_folder) in name for name in open_files()):
            return
        time.sleep(0.05)
    pytest.fail("a worker outlives its builder")


def open_files() -> list[str]:
    names = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            names.append(os.readlink(link))
        except OSError:
            continue
    return names


def test_two_builders_at_once(tmp_path: Path) -> None:
    found = make_set(tmp_path / "in", count=4 * COUNT)
    builders = [start_build(found) for _ in range(2)]
    out = [process.communicate(timeout=120) for process in builders]
    assert [process.returncode for process in builders] == [0, 0], out
    assert out[0][0] == out[1][0]
    assert sum("waiting for another process" in err for _, err in out) <= 1
    assert left_in(found) == {"cache-64x64"}


def test_damaged_cache_is_built_again_or_found_out(tmp_path: Path) -> None:
    found = make_set(tmp_path / "in")
    plan = celeba.make_plan(found)
    first = read(found)
    (plan.folder / "meta.json").write_text("{")
    assert read(found).hash == first.hash
    array = plan.folder / "images.npy"
    array.write_bytes(array.read_bytes()[:-100])
    assert read(found).hash == first.hash
    with array.open("r+b") as file:
        file.seek(1000)
        file.write(b"\x07" * 64)
    with pytest.raises(DataError, match="has changed"):
        cache.check_cache(plan, cache.open_cache(plan))


def test_no_space(tmp_path: Path) -> None:
    found = make_set(tmp_path / "in")
    full = type("usage", (), {"free": 1000})()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: full)
        with pytest.raises(DataError, match="are free there"):
            read(found)

    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "posix_fallocate", no_space)
        with pytest.raises(DataError, match=r"no space is left.*GPVAE_CACHE"):
            read(found)
    assert left_in(found) == set()
    assert len(read(found).train) == 15


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = make_set(tmp_path / "in")
    monkeypatch.setenv("GPVAE_CACHE", "/proc/no/such/place")
    with pytest.raises(DataError, match=r"cannot write /proc/no.*GPVAE_CACHE"):
        read(found)
    locked = tmp_path / "locked"
    locked.mkdir()
    monkeypatch.setenv("GPVAE_CACHE", str(locked))
    locked.chmod(0o500)
    if os.geteuid() != 0:  # the administrator may write anywhere
        with pytest.raises(DataError, match="no write permission"):
            read(found)
    locked.chmod(0o700)
    assert len(read(found).train) == 15
    assert (locked / "celeba" / "cache-64x64").is_dir()


def test_worker_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = make_set(tmp_path / "in")
    start = workers.start

    def dying(module: str, job: dict) -> subprocess.Popen[str]:
        worker = start(module, job)
        worker.kill()
        return worker

    monkeypatch.setattr(workers, "start", dying)
    with pytest.raises(DataError, match="ended with code -9"):
        read(found)
    assert left_in(found) == set()


def test_interrupt_keeps_what_is_finished(tmp_path: Path) -> None:
    found = make_set(tmp_path / "in")
    results = workers.results

    def interrupted(module: str, jobs: list[dict]):
        for k, line in enumerate(results(module, jobs)):
            if k == 2:
                raise KeyboardInterrupt
            yield line

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "results", interrupted)
        with pytest.raises(KeyboardInterrupt):
            read(found)
    assert left_in(found) == {"cache-64x64.build"}
    assert len(read(found).train) == 15
    assert left_in(found) == {"cache-64x64"}
