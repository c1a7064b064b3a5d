"""Result rows: appended atomically to JSON lines, reused while they still fit.

A row is one (configuration, seed) with everything that made it: full configuration and its hash,
the data's hash, a hash of the code that computes numbers, package versions, device, sample
counts, estimates and standard errors. Tables and figures are pure functions of rows and of the
per-image arrays beside them.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import math
import platform
import zipfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from gpvae import jsonl, paths
from gpvae.config import RunConfig, differences
from gpvae.disk import replaced
from gpvae.errors import DataError
from gpvae.plugins import METHOD_HASHES

Row = dict[str, Any]

# Modules that choose, store or show numbers but do not compute them. Any other counts.
NOT_NUMERICAL = {
    "__init__",
    "__main__",
    "analysis",
    "arguments",
    "caveats",
    "cli",
    "comparison",
    "config",
    "difficulty",
    "disk",
    "errors",
    "events",
    "findings",
    "jobs",
    "jsonl",
    "kernel",
    "notebooks",
    "paths",
    "plots",
    "plugins",
    "presets",
    "processes",
    "profiles",
    "regimes",
    "reproduce",
    "results",
    "selective",
    "stats",
    "stored",
    "sweep",
    "sweep_command",
    "tables",
    "train_command",
    "variations",
}

# Versions that differ in checks and messages only: digest of the code -> that of the older version
# which computes the same numbers bit for bit (shown by `tests/same_numbers.py`), in whose name it
# writes its rows. One exception, stated in `figures/README.md`: in the rows of SA-VAE's searches
# its posterior at evaluation had other inner noise, with which its ELBO is too high by less than
# 0.1 nats.
CONTINUED = {"2c5facf6f14ba1cf": "a0634a028104942f"}


@cache
def code_hash() -> str:
    """Version of the code that numbers depend on, as rows store it: its digest, or that of the
    version which it continues.
    """
    return CONTINUED.get(digest := code_digest(), digest)


@cache
def code_digest() -> str:
    """Digest of the modules that numbers depend on; comments and docstrings do not count.

    Readers are left out: the pixels that they give have a hash of their own in every row.
    """
    sha = hashlib.sha256()
    folder = Path(__file__).parent
    files = [path for path in folder.glob("*.py") if path.stem not in NOT_NUMERICAL]
    for path in sorted([*files, folder / "data" / "dataset.py"]):
        tree = ast.parse(path.read_text("utf-8"))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and _is_docstring(body[0]):
                body[0] = ast.Pass()
        sha.update(repr(_plain(tree)).encode())
    return sha.hexdigest()[:16]


def _plain(node: object) -> object:
    """A syntax tree as nested lists. What is empty is left out: newer versions of Python have
    fields that older ones have not, and the digest must not depend on the version.
    """
    if isinstance(node, list):
        return [_plain(each) for each in node]
    if not isinstance(node, ast.AST):
        return node
    fields = [(name, _plain(value)) for name, value in ast.iter_fields(node)]
    return [type(node).__name__, *(pair for pair in fields if pair[1] not in (None, []))]


def _is_docstring(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    packages = ("gpvae", "torch", "numpy", "scipy", "scikit-learn")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def run_key(config: RunConfig, data_hash: str) -> str:
    """Digest of what a result depends on: configuration, data and code."""
    return _key(config, data_hash, code_hash(), method_hash(config))


def checkpoint_name(config: RunConfig, data_hash: str, code: str, method: str) -> str:
    """Name of the folder in which a run's checkpoint lies, by the hashes that its row has."""
    config = config.for_training()
    return f"{config.name}-{_key(config, data_hash, code, method)}"


def _key(config: RunConfig, *hashes: str) -> str:
    return hashlib.sha256("".join((config.hash(), *hashes)).encode()).hexdigest()[:12]


def method_hash(config: RunConfig) -> str:
    """Digest of the source of the run's method where it is not gpvae's own, else empty."""
    return METHOD_HASHES.get(config.model.encoder, "")


def stale_reason(row: Row, config: RunConfig, data_hash: str) -> str:
    """Why a row of the same name cannot be reused; empty if it can."""
    reasons = differences(row["config"], config.to_dict())
    if row["data_hash"] != data_hash:
        reasons.append(f"data: {row['data_hash']} -> {data_hash}")
    if row["code_hash"] != code_hash():
        reasons.append(f"code: {row['code_hash']} -> {code_hash()}")
    if row.get("method_hash", "") != method_hash(config):
        reasons.append(f"the source of the method {config.model.encoder}")
    return "; ".join(reasons)


def not_finite(row: Row) -> str:
    """The estimates of a row that are no finite numbers, as a list in words; empty for none."""
    means = {key: value["mean"] for key, value in row.items() if _is_estimate(value)}
    return ", ".join(key for key, mean in means.items() if not math.isfinite(mean))


def _is_estimate(value: object) -> bool:
    return isinstance(value, dict) and "mean" in value


class Results:
    """The rows and arrays of one profile, in `results/<profile>/`.

    The evidence behind committed tables, in `figures/<profile>/`, is only read: its arrays where
    `results/` lacks them, its rows where `everything` is asked for. `rows` and `find` leave it
    out, so that a committed row is never taken for one that was computed here.
    """

    def __init__(self, profile: str) -> None:
        self.folder = paths.results(profile)
        self.path = self.folder / "rows.jsonl"
        self.evidence = paths.figures(profile)

    def rows(self) -> list[Row]:
        """The newest row of each name, in order of first appearance."""
        return list({row["name"]: row for row in self.stored()}.values())

    def stored(self) -> list[Row]:
        """All rows that were computed here, oldest first."""
        return _rows_of(self.path)

    def find(self, name: str, key: str = "") -> Row | None:
        """The newest row of that name and key, else the newest of that name."""
        named = [row for row in self.stored() if row["name"] == name]
        return next((row for row in reversed(named) if row["key"] == key), (named or [None])[-1])

    def renew(self, name: str, key: str) -> None:
        """Make the row of that name and key the newest of its name, if there is one: runs whose
        configurations differ in something that names do not tell take turns.
        """
        rows = [row for row in self.stored() if row["name"] == name]
        same = [row for row in rows if row["key"] == key]
        if same and same[-1] is not rows[-1]:
            jsonl.append(self.path, same[-1])

    def committed(self) -> list[Row]:
        """All rows that are committed with the figures."""
        return _rows_of(self.evidence / "rows.jsonl")

    def everything(self) -> list[Row]:
        """All rows that were ever stored, committed ones first, then oldest first."""
        return self.committed() + self.stored()

    def append(self, row: Row, arrays: dict[str, np.ndarray]) -> None:
        """Add a row and its per-image arrays; the row comes last, so it never lacks them."""
        _save_arrays(self.arrays_path(row), arrays)
        jsonl.append(self.path, row)

    def arrays_path(self, row: Row) -> Path:
        """File of the row's per-image arrays."""
        return self.folder / "arrays" / f"{row['name']}-{row['key']}.npz"

    def committed_path(self, row: Row) -> Path:
        """File of the copy that is committed with the figures."""
        return self.evidence / "arrays" / self.arrays_path(row).name

    def has_arrays(self, row: Row) -> bool:
        """Whether the row's per-image arrays are here or committed."""
        return is_whole(self.arrays_path(row)) or is_whole(self.committed_path(row))

    def arrays(self, row: Row) -> dict[str, np.ndarray]:
        """Per-image arrays of a row, by name.

        Raises:
            DataError: there are none, or damaged ones.
        """
        own, committed = self.arrays_path(row), self.committed_path(row)
        path = own if is_whole(own) or not is_whole(committed) else committed
        try:
            with np.load(path, allow_pickle=False) as file:
                return dict(file)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(
                f"the per-image arrays of {row['name']} cannot be read ({path}: {error}). Delete "
                "that file and do the run again: `gpvae sweep` takes it for missing then."
            ) from error

    def keep_arrays(self, rows: Sequence[Row]) -> None:
        """Copy the rows' arrays to where they are committed, and remove those of other rows."""
        wanted = {self.committed_path(row): row for row in rows if self.has_arrays(row)}
        for path in set((self.evidence / "arrays").glob("*.npz")) - wanted.keys():
            path.unlink(missing_ok=True)  # another process may be at it
        for path, row in wanted.items():
            if is_whole(self.arrays_path(row)):
                # The split can be made again, and its digest stands in the row.
                kept = {k: v for k, v in self.arrays(row).items() if k != "valid_index"}
                _save_arrays(path, {k: _single(v) for k, v in kept.items()})


def is_whole(path: Path) -> bool:
    """Whether a file of arrays is there and was not cut short."""
    return zipfile.is_zipfile(path)


def _rows_of(path: Path) -> list[Row]:
    """The rows of a file, without lines that are none."""
    return [row for row in jsonl.read(path) if row.keys() >= {"name", "key"}]


def _single(array: np.ndarray) -> np.ndarray:
    """Floats in single precision."""
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def _save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a compressed file atomically."""
    with replaced(path) as file:
        np.savez_compressed(file, **arrays)
