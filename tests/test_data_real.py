"""The real files, where GPVAE_DATA holds them; skipped otherwise."""

from __future__ import annotations

import os

import numpy as np
import pytest

from gpvae.data import load_dataset
from gpvae.data.idx import read_idx
from gpvae.data.locate import check_sums, locate, state
from gpvae.data.sources import SOURCES
from gpvae.data.verify import verify

# Mean intensity of all training and test images, in [0, 1]. MNIST's is the usual 0.1307.
MEANS = {
    "mnist": (0.1307, 0.1325),
    "omniglot-28x28-rederived": (0.0806, 0.0804),
    "cifar10-subset": (0.4729, 0.4781),
    "frey": (0.6057, None),
    "fashion-mnist": (0.2860, None),
    "cifar10": (0.4734, None),
}


def needs(name: str) -> None:
    if not os.environ.get("GPVAE_DATA"):
        pytest.skip("GPVAE_DATA is not set")
    if not state(SOURCES[name]).present:
        pytest.skip(f"{name} is not under GPVAE_DATA")


@pytest.mark.parametrize("name", sorted(set(SOURCES) - {"celeba", "digits"}))
def test_sums_counts_and_means(name: str) -> None:
    needs(name)
    source = SOURCES[name]
    check_sums(source, locate(source))
    assert f"train {source.train:,} x" in verify(source)
    data = load_dataset(name)
    assert data.shape == source.shape
    own_test = source.test > 0
    assert len(data.train) + len(data.valid) + (0 if own_test else len(data.test)) == source.train
    if name in MEANS:
        parts = [data.train, data.valid] if own_test else [data.train, data.valid, data.test]
        total = sum(float(part.pixels.double().sum()) for part in parts)
        mean = total / sum(part.pixels.numel() for part in parts) / 255
        assert mean == pytest.approx(MEANS[name][0], abs=6e-5)
        if own_test and MEANS[name][1] is not None:
            mean = float(data.test.pixels.double().mean()) / 255
            assert mean == pytest.approx(MEANS[name][1], abs=6e-5)


def test_first_mnist_labels() -> None:
    needs("mnist")
    found = locate(SOURCES["mnist"])
    labels = read_idx(found["train-labels-idx1-ubyte.gz"], 1)
    assert labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert np.bincount(labels).tolist() == [
        5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949,
    ]  # fmt: skip


def test_frey_frames_follow_each_other() -> None:
    """Neighbours are more alike than far frames, as in a video: the order is the original."""
    needs("frey")
    frames = load_dataset("frey", test_block=True).test.unit()
    near = (frames[1:] - frames[:-1]).abs().mean()
    far = (frames[100:] - frames[:-100]).abs().mean()
    assert near < 0.8 * far
