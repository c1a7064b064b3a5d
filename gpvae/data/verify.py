"""`gpvae data verify`: sums, counts and shapes of a data set, and what its pixels look like."""

from __future__ import annotations

import numpy as np

from gpvae.data.catalog import read
from gpvae.data.dataset import Raw
from gpvae.data.idx import read_idx
from gpvae.data.locate import check_sums, locate
from gpvae.data.rows import Rows
from gpvae.data.sources import Source

AT_ONCE = 4096  # images


def verify(source: Source) -> str:
    """Check the sums, read all images, and describe them in one line.

    Raises:
        DataError: a missing file, a wrong sum, unreadable or unexpected content.
    """
    found = check_sums(source, locate(source))
    raw = read(source)
    parts = [f"{describe_sums_of(source, found)}"]
    if source.cached:
        from gpvae.data import cache, celeba

        plan = celeba.make_plan(found)
        cache.check_cache(plan, cache.ensure(plan, skip_bad=True))
        parts.append("the cache is as it was built")
    for part in ("train", "valid", "test"):
        if getattr(raw, part) is not None:
            parts.append(describe_part(part, raw))
    labels = found.get("train-labels-idx1-ubyte.gz")
    if labels is not None:
        parts.append(f"first labels {read_idx(labels, 1)[:5].tolist()}")
    return "; ".join(parts)


def describe_sums_of(source: Source, found: dict[str, object]) -> str:
    """How many of the files have a published sum, which all match."""
    if not found:
        return "built in"
    files = {f.name: f for layout in source.layouts for f in layout if f.name in found}
    summed = sum(bool(file.sums) for file in files.values())
    without = f", {len(files) - summed} without a published sum" if summed < len(files) else ""
    return f"{summed} of {len(files)} sums match" if summed else f"readable{without}"


def describe_part(name: str, raw: Raw) -> str:
    """Number, shape and mean intensity of one part."""
    rows = Rows.all(getattr(raw, name))
    total = 0.0
    for start in range(0, len(rows), AT_ONCE):
        total += float(rows.view(slice(start, start + AT_ONCE)).read().sum(dtype=np.float64))
    scale = raw.levels - 1 if rows.dtype == np.uint8 else 1
    mean = total / scale / max(1, int(np.prod(rows.shape)))
    shape = " x ".join(map(str, rows.shape[1:]))
    return f"{name} {len(rows):,} x {shape} {rows.dtype}, mean intensity {mean:.4f}"
