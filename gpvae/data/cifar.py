"""The binary distribution of CIFAR-10, as the original archive or extracted.

Records of 3,073 bytes: a label (0 to 9), then 1,024 red, green and blue bytes each, row-major.
The Python distribution is a pickle and is not read.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gpvae.data.dataset import Raw
from gpvae.data.files import reading, refuse_outside
from gpvae.errors import DataError

RECORD = 1 + 3 * 32 * 32
BATCH = 10_000  # records in a batch of the original; a subset has fewer
TRAIN_NAMES = [f"data_batch_{k}.bin" for k in range(1, 6)]
TEST_NAME = "test_batch.bin"


def read_set(found: dict[str, Path]) -> Raw:
    """CIFAR-10 or a subset of it, from one archive or from the extracted files."""
    if len(found) == 1:
        (path,) = found.values()
        return assemble(path, dict(read_archive(path)))
    batches = {path.name: read_batch(path) for path in found.values()}
    return assemble(next(iter(found.values())).parent, batches)


def assemble(path: Path, batches: dict[str, np.ndarray]) -> Raw:
    """Training batches in order and the test batch; a subset may lack later training batches."""
    train = [batches[name] for name in TRAIN_NAMES if name in batches]
    if not train or TEST_NAME not in batches:
        raise DataError(
            f"{path} holds {', '.join(sorted(batches)) or 'no batches'}; expected "
            f"{TRAIN_NAMES[0]} (and more) and {TEST_NAME}."
        )
    return Raw(train=np.concatenate(train), test=batches[TEST_NAME])


def read_archive(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Name and images of each batch in a .tar.gz; nothing is extracted to disk."""
    wanted = {*TRAIN_NAMES, TEST_NAME}
    with reading(path, "the binary CIFAR-10 archive"), tarfile.open(path, "r:gz") as archive:
        for member in archive:
            refuse_outside(path, [member.name])
            name = member.name.rpartition("/")[2]
            if name not in wanted:
                continue
            if not member.isfile() or member.size > BATCH * RECORD:
                raise DataError(f"{path}: {member.name} is not a batch of at most {BATCH} images.")
            yield name, parse(f"{path}: {name}", archive.extractfile(member).read(member.size))


def read_batch(path: Path) -> np.ndarray:
    """Images of one extracted batch, [N, 3, 32, 32] uint8."""
    with reading(path, "a binary CIFAR-10 batch"):
        if path.stat().st_size > BATCH * RECORD:
            raise DataError(f"{path} is longer than {BATCH} records of {RECORD} bytes.")
        return parse(str(path), path.read_bytes())


def parse(place: str, data: bytes) -> np.ndarray:
    """Images of a batch's bytes, [N, 3, 32, 32] uint8.

    Raises:
        DataError: not whole records, or a label above 9 (bytes that are out of step).
    """
    if not data or len(data) % RECORD:
        raise DataError(f"{place} has {len(data):,} bytes; expected a multiple of {RECORD}.")
    records = np.frombuffer(data, np.uint8).reshape(-1, RECORD)
    if records[:, 0].max() > 9:
        raise DataError(
            f"{place} has the label {records[:, 0].max()}; expected 0 to 9. "
            "It is damaged, or not the binary version of CIFAR-10."
        )
    return records[:, 1:].reshape(-1, 3, 32, 32).copy()
