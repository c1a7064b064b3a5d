"""Files of JSON lines, which many processes append to and any of them may be killed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gpvae.disk import replaced
from gpvae.errors import DataError


def append(path: Path, value: dict[str, Any]) -> None:
    """Append one line in a single write; a line cut short by a crash is closed first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(value) + "\n"
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = "\n" + line
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def save(path: Path, values: Iterable[dict[str, Any]]) -> None:
    """Write a file with one line for each value, atomically."""
    with replaced(path) as file:
        file.write("".join(json.dumps(value) + "\n" for value in values).encode())


def read(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, oldest first; none if it does not exist.

    A line that is no JSON object is what a killed process or a damaged disk left; it is passed
    over, since what it was to tell is not known and will be computed again.

    Raises:
        DataError: a file that cannot be read.
    """
    if not path.exists():
        return []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error}. Mend the file, or move it away: what it holds is then "
            "computed again."
        ) from error
    return [value for line in lines if (value := _parse(line)) is not None]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:  # no JSON, or no text at all
        return None
    return value if isinstance(value, dict) else None
