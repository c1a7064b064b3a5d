"""Images, splits, a user's own arrays, and streams that equal images in memory."""

from __future__ import annotations

import doctest
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpvae.data import (
    Images,
    Raw,
    Streamed,
    catalog,
    digest,
    from_images,
    load_dataset,
    split,
    user,
)
from gpvae.data.rows import Rows
from gpvae.data.stream import benchmark, prefetch
from gpvae.errors import DataError

RNG = np.random.default_rng(0)


def numbered(count: int, shape: tuple[int, ...] = (1, 2, 3)) -> np.ndarray:
    """Image k has the value k everywhere."""
    return np.broadcast_to(
        np.arange(count, dtype=np.uint8).reshape(-1, 1, 1, 1), (count, *shape)
    ).copy()


def members(images: Images | Streamed) -> list[int]:
    """The k of `numbered` images."""
    return [int(x) for x in (images.unit()[:, 0, 0, 0] * 255).round()]


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(12, 250),
    seed=st.integers(0, 3),
    own_test=st.booleans(),
    block=st.booleans(),
    data=st.data(),
)
def test_parts_are_disjoint_and_stable(
    count: int, seed: int, own_test: bool, block: bool, data: st.DataObject
) -> None:
    test = numbered(5) if own_test else None
    raw = Raw(numbered(count), test)
    whole = split("set", raw, seed=seed, test_block=block)
    parts = [members(whole.train), members(whole.valid)]
    if not own_test:
        parts.append(members(whole.test))
    assert sorted(k for part in parts for k in part) == list(range(count))
    fewer = data.draw(st.integers(1, len(whole.train)))
    smaller = split("set", raw, seed=seed, test_block=block, train_size=fewer)
    assert members(smaller.train) == parts[0][:fewer]
    assert members(smaller.valid) == parts[1]
    assert members(smaller.test) == members(whole.test)
    assert smaller.split["valid_indices"] == whole.split["valid_indices"]
    assert (smaller.hash == whole.hash) == (fewer == len(whole.train))


def test_split_records_seed_sizes_and_indices() -> None:
    raw = Raw(numbered(50))
    a, b, c = split("set", raw), split("set", raw, seed=1), split("set", raw, valid_size=6)
    assert a.split == {
        "seed": 0,
        "train": 35,
        "valid": 5,
        "test": 10,
        "valid_indices": digest(np.random.default_rng(0).permutation(50)[:5].astype(np.int64)),
    }
    assert len({a.split["valid_indices"], b.split["valid_indices"], c.split["valid_indices"]}) == 3
    assert len({a.hash, b.hash, c.hash}) == 3


def test_block_split_holds_out_consecutive_frames() -> None:
    data = split("video", Raw(numbered(100)), test_block=True, seed=3)
    assert members(data.test) == list(range(20))
    assert members(data.valid) == list(range(20, 30))
    assert sorted(members(data.train)) == list(range(30, 100))


@pytest.mark.parametrize(
    "sizes",
    [
        {"train_size": 0},
        {"train_size": 71},
        {"valid_size": 0},
        {"valid_size": -3},
        {"valid_size": 100},
        {"test_size": 0},
        {"test_size": 21},
    ],
)
def test_impossible_sizes(sizes: dict[str, int]) -> None:
    with pytest.raises(DataError, match="set has"):
        split("set", Raw(numbered(100)), **sizes)


def test_batches_hold_every_image_once() -> None:
    images = Images(torch.from_numpy(numbered(23)))
    batches = list(images.batches(5, torch.Generator().manual_seed(0), scaled=False))
    assert [len(x) for x in batches] == [5, 5, 5, 5, 3]
    order = torch.cat(batches)[:, 0, 0, 0]
    assert order.dtype == torch.uint8
    assert sorted(order.tolist()) == list(range(23))
    assert order.tolist() == torch.randperm(23, generator=torch.Generator().manual_seed(0)).tolist()
    assert torch.cat(list(images.batches(4, scaled=False)))[:, 0, 0, 0].tolist() == list(range(23))


# --- streams ----------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path: Path) -> np.memmap:
    """300 random images on disk, read-only."""
    np.save(tmp_path / "a.npy", RNG.integers(0, 256, (300, 3, 8, 8), np.uint8))
    return np.load(tmp_path / "a.npy", mmap_mode="r")


def test_a_stream_gives_what_images_give(stored: np.memmap) -> None:
    images, stream = Images(torch.from_numpy(stored.copy())), Streamed(Rows.all(stored))
    assert (len(stream), stream.shape, stream.levels) == (len(images), images.shape, 256)
    for scaled in (True, False):
        pairs = [
            x.batches(32, torch.Generator().manual_seed(7), scaled=scaled) for x in (images, stream)
        ]
        for a, b in zip(*pairs, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
    index = torch.tensor([5, 299, 0, 5])
    assert torch.equal(images.unit(index), stream.unit(index))
    assert torch.equal(images[10:20].unit(), stream[10:20].unit())
    assert torch.equal(images[index].unit(), stream.to("cpu")[index].unit())


def test_a_large_set_is_split_without_reading_it(stored: np.memmap) -> None:
    resident = split("set", Raw(np.array(stored)))
    streamed = split("set", Raw(stored), stream_above=20_000)
    assert isinstance(streamed.train, Streamed)
    assert np.shares_memory(streamed.train.rows.array, stored)
    assert isinstance(streamed.valid, Images)  # 30 images are below the limit
    for part in ("train", "valid", "test"):
        assert torch.equal(getattr(resident, part).unit(), getattr(streamed, part).unit())
    again = split("set", Raw(stored), stream_above=20_000)
    assert streamed.hash == again.hash
    assert streamed.hash != split("set", Raw(stored, hash="x"), stream_above=20_000).hash
    assert streamed.hash != split("set", Raw(stored), stream_above=20_000, seed=1).hash


def test_a_stream_checks_ranges(tmp_path: Path) -> None:
    bad = np.zeros((9, 1, 2, 2), np.float32)
    bad[7] = 1.5
    with pytest.raises(DataError, match="range"):
        Streamed(Rows.all(bad))
    with pytest.raises(DataError, match="levels=17"):
        Streamed(Rows.all(np.full((9, 1, 2, 2), 17, np.uint8)), levels=17)
    with pytest.raises(DataError, match="shape"):
        Streamed(Rows.all(np.zeros((9, 2, 2), np.uint8)))


def test_leaving_a_stream_early_stops_its_thread(stored: np.memmap) -> None:
    before = threading.active_count()
    for _ in range(5):
        for _ in Streamed(Rows.all(stored)).batches(2):
            break
    assert threading.active_count() == before


def test_an_error_in_the_thread_comes_out(stored: np.memmap) -> None:
    class Broken(Rows):
        def view(self, index: np.ndarray) -> Rows:
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="disk is gone"):
        list(prefetch(Broken(stored, np.arange(9)), [np.arange(3)], torch.device("cpu")))


def test_benchmark_runs() -> None:
    speed = benchmark(count=200, shape=(1, 8, 8), batch=20, repeats=3, device="cpu")
    assert speed.resident > 0 and speed.streamed > 0 and speed.ratio > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_stream_to_the_gpu(stored: np.memmap) -> None:
    images = Images(torch.from_numpy(stored.copy())).to("cuda")
    stream = Streamed(Rows.all(stored)).to("cuda")
    for _ in range(20):  # buffers are used again and again
        pairs = [x.batches(7, torch.Generator().manual_seed(1)) for x in (images, stream)]
        for a, b in zip(*pairs, strict=True):
            assert b.device.type == "cuda"
            assert torch.equal(a, b)


# --- a user's own arrays ----------------------------------------------------------------------


def test_own_arrays_and_tensors() -> None:
    pixels = RNG.integers(0, 256, (30, 1, 4, 5), np.uint8)
    a, b = from_images(pixels), from_images(torch.from_numpy(pixels))
    assert a.hash == b.hash
    assert a.shape == (1, 4, 5)
    assert a.name == "own"
    floats = from_images(pixels / 255)  # float64 becomes float32
    assert floats.train.pixels.dtype == torch.float32
    assert torch.allclose(floats.train.unit(), a.train.unit())
    few = from_images(
        Images(torch.from_numpy(pixels // 16), levels=16), pixels[:3] // 16, levels=16
    )
    assert few.train.levels == 16
    assert len(few.test) == 3
    binary = from_images(pixels > 127)
    assert set(binary.train.unit().unique().tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((5, 4, 4), np.uint8), "x\\[:, None\\]"),
        (np.zeros((5, 4, 4, 3), np.uint8), "channels last"),
        (np.zeros((0, 1, 4, 4), np.uint8), "empty"),
        (np.eye(4, dtype=np.uint8)[None, None], "only 0 and 1.*astype\\(bool\\)"),
        (np.zeros((5, 1, 4, 4), np.int64), "int64"),
        (np.full((5, 1, 4, 4), 200.0), "divide by 255"),
        (np.full((5, 1, 4, 4), np.nan, np.float32), "NaN"),
        (np.full((5, 1, 4, 4), "a"), "dtype"),
        ([[1, 2], [3, 4]], "int64"),
    ],
)
def test_unusable_own_images(images: object, words: str) -> None:
    with pytest.raises(DataError, match=words):
        from_images(images)


def test_own_test_images_must_fit() -> None:
    with pytest.raises(DataError, match="expected the same"):
        from_images(np.zeros((9, 1, 4, 4), np.uint8), np.zeros((9, 1, 4, 5), np.uint8))


def test_load_dataset_takes_paths(tmp_path: Path) -> None:
    np.save(tmp_path / "mine.npy", numbered(40))
    data = load_dataset(tmp_path / "mine.npy", valid_size=3)
    assert (data.name, len(data.valid)) == ("mine", 3)
    assert load_dataset(str(tmp_path / "mine.npy"), valid_size=3).hash == data.hash
    for bad, words in (
        ("no/such.npy", "does not exist"),
        (str(tmp_path), "no images"),
        (tmp_path / "mine.txt", "does not exist"),
    ):
        with pytest.raises(DataError, match=words):
            load_dataset(bad)
    (tmp_path / "mine.txt").write_text("1 2 3")
    with pytest.raises(DataError, match=r"not an \.npy"):
        load_dataset(tmp_path / "mine.txt")
    with pytest.raises(DataError, match="resize"):
        load_dataset(tmp_path / "mine.npy", resize=(2, 2))


@pytest.mark.parametrize("module", [catalog, user])
def test_examples(module: object) -> None:
    result = doctest.testmod(module)
    assert result.attempted and not result.failed
