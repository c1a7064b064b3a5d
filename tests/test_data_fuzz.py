"""Mutated files of every format: the only exception that may come out is DataError."""

from __future__ import annotations

import os
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_data_formats import FORMATS, HTML, Format

from gpvae.errors import DataError

# A longer run: GPVAE_FUZZ=5000 pytest tests/test_data_fuzz.py
PER_FORMAT = int(os.environ.get("GPVAE_FUZZ", "100"))

Mutation = Callable[[bytes, np.random.Generator], bytes]


def truncate(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: rng.integers(0, len(data))]


def flip_bits(data: bytes, rng: np.random.Generator) -> bytes:
    out = bytearray(data)
    for k in rng.integers(0, len(out), rng.integers(1, 9)):
        out[k] ^= 1 << rng.integers(0, 8)
    return bytes(out)


def damage_header(data: bytes, rng: np.random.Generator) -> bytes:
    """Headers are where sizes, types and offsets stand: most bytes change little elsewhere."""
    out = bytearray(data)
    for k in rng.integers(0, min(256, len(out)), rng.integers(1, 5)):
        out[k] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.integers(0, 256)])
    return bytes(out)


def damage_end(data: bytes, rng: np.random.Generator) -> bytes:
    """A zip file's directory stands at its end."""
    return damage_header(data[::-1], rng)[::-1]


def large_number(data: bytes, rng: np.random.Generator) -> bytes:
    """Overwrite four aligned bytes by a size that no small file has."""
    value = int(rng.choice([2**31 - 1, 2**31, 2**32 - 1, 2**24, 0]))
    at = 4 * int(rng.integers(0, max(1, min(len(data), 512) // 4)))
    return data[:at] + value.to_bytes(4, str(rng.choice(["little", "big"]))) + data[at + 4 :]


def insert(data: bytes, rng: np.random.Generator) -> bytes:
    at = int(rng.integers(0, len(data)))
    return data[:at] + rng.bytes(int(rng.integers(1, 40))) + data[at:]


def cut_out(data: bytes, rng: np.random.Generator) -> bytes:
    at = int(rng.integers(0, len(data)))
    return data[:at] + data[at + int(rng.integers(1, 100)) :]


def zero_run(data: bytes, rng: np.random.Generator) -> bytes:
    at, length = int(rng.integers(0, len(data))), int(rng.integers(1, 200))
    return (data[:at] + bytes(length) + data[at + length :])[: len(data)]


def other_header(data: bytes, rng: np.random.Generator) -> bytes:
    other = FORMATS[str(rng.choice(sorted(FORMATS)))].data
    return other[: int(rng.integers(1, 140))] + data[int(rng.integers(1, 140)) :]


def web_page(data: bytes, rng: np.random.Generator) -> bytes:
    return HTML + data[: rng.integers(0, len(data))]


def empty(data: bytes, rng: np.random.Generator) -> bytes:
    return b""


def inside_compression(data: bytes, rng: np.random.Generator) -> bytes:
    """Damage what a compressed file holds and compress it again, so that its check sum is right."""
    if data[:2] == b"\x1f\x8b":
        plain = zlib.decompress(data, 31)
        packer = zlib.compressobj(wbits=31)
    elif data[128:132] == b"\x0f\0\0\0":  # the first compressed element of a MATLAB 5 file
        size = int.from_bytes(data[132:136], "little")
        packed = zlib.compress(damage_header(zlib.decompress(data[136 : 136 + size]), rng))
        return data[:132] + len(packed).to_bytes(4, "little") + packed + data[136 + size :]
    else:
        return flip_bits(data, rng)
    mutate = [damage_header, flip_bits, truncate, large_number][rng.integers(0, 4)]
    return packer.compress(mutate(plain, rng)) + packer.flush()


MUTATIONS: list[Mutation] = [
    truncate,
    flip_bits,
    damage_header,
    damage_end,
    large_number,
    insert,
    cut_out,
    zero_run,
    other_header,
    web_page,
    inside_compression,
    empty,
]


def survives(case: Format, path: Path, data: bytes) -> bool:
    """Read the bytes; True if they were refused, False if they still give images."""
    path.write_bytes(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.read(path)
    except DataError as error:
        assert str(error).strip()
        return True
    return False


@pytest.mark.parametrize("kind", FORMATS)
def test_mutations(tmp_path: Path, kind: str) -> None:
    case = FORMATS[kind]
    rng = np.random.default_rng(zlib.crc32(kind.encode()))
    refused = 0
    for k in range(PER_FORMAT):
        mutate = MUTATIONS[k % len(MUTATIONS)]
        data = mutate(case.data, rng)
        (tmp_path / "last").write_bytes(data)  # what to look at if the interpreter itself dies
        refused += survives(case, tmp_path / case.name, data)
    assert refused >= PER_FORMAT // 5, "the mutations hardly did anything"
    assert {p.name for p in tmp_path.iterdir()} == {case.name, "last"}
