"""Lines, table and figure of the benchmark's rows."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpvae import jsonl, paths
from gpvae.bench.measure import Row
from gpvae.config import METHODS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PROFILE, NAME = "bench", "speed"
DRAWN = ("training", "inference")


def format_facts(facts: Mapping[str, Any]) -> str:
    """The header, a line for each kind of fact."""
    quick = " (quick: tiny networks, numbers mean nothing)" if facts["quick"] else ""
    channels, height, width, *hidden, latent = facts["networks"]
    layers = "-".join(map(str, [channels * height * width, *hidden]))
    return "\n".join(
        [
            f"device {facts['device']}, CPU {facts['cpu']} with {facts['cores']} cores, "
            f"load {facts['load']}",
            f"torch {facts['versions']['torch']}, {facts['precision']}, threads {facts['threads']}",
            f"networks {layers}, D = {latent}, batch {facts['batch']}, turns {facts['repeats']}"
            + quick,
        ]
    )


def format_row(row: Row) -> str:
    """One line for the terminal."""
    found = cells(row)
    against = row["relative_to"] not in ("", row["case"])
    ratio = f"{found['ratio']} x {found['relative to']}" if against else ""
    time = f"{found['ms']} ms" if found["ms"] else ""
    parts = [part for part in (time, ratio, found["value"], found["note"]) if part]
    return f"  {found['case']:<38}" + "; ".join(parts)


def cells(row: Row) -> dict[str, str]:
    """The columns of the table, as text."""
    value = "" if row["value"] is None else f"{number(row['value'])} {row['unit']}"
    return {
        "section": row["section"],
        "case": row["case"],
        "ms": spread(row, "ms"),
        "ratio": spread(row, "ratio"),
        "relative to": row["relative_to"],
        "turns": row["turns"] or "",
        "value": value,
        "note": row["note"],
    }


def spread(row: Row, name: str) -> str:
    """`median [min, max]`, or nothing."""
    if row[name] is None:
        return ""
    middle, low, high = (number(row[f"{name}{end}"]) for end in ("", "_min", "_max"))
    return f"{middle} [{low}, {high}]"


def number(value: float) -> str:
    """Three significant digits, and not fewer than two decimals below 10."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return (
        f"{value:.1f}"
        if abs(value) >= 10
        else f"{value:.2f}"
        if abs(value) >= 1
        else f"{value:.3g}"
    )


def table(rows: Sequence[Row]) -> pd.DataFrame:
    """A line for each row, with its device and threads, and the code that was measured."""
    import pandas as pd

    return pd.DataFrame(
        {"device": place(facts := row["facts"]), **cells(row), "code": facts["code_hash"][:8]}
        for row in rows
    )


def place(facts: Mapping[str, Any]) -> str:
    """Device and, on the CPU, threads."""
    threads = f", {facts['threads']} thread" + "s" * (facts["threads"] > 1)
    return facts["cpu"] + threads if facts["device"] == "cpu" else facts["device"]


def save(rows: Sequence[Row], facts: Mapping[str, Any]) -> Path:
    """Write rows, table and `speed_cpu` or `speed_gpu` to `figures/bench/`; returns the folder.

    Rows of other devices, and of sections that were not measured now, stay.
    """
    from gpvae import plots, tables

    folder = paths.figures(PROFILE)
    folder.mkdir(parents=True, exist_ok=True)
    new = [row | {"facts": dict(facts)} for row in rows]
    measured = {key(row) for row in new}
    kept = [row for row in jsonl.read(folder / "rows.jsonl") if key(row) not in measured]
    everything = sorted([*kept, *new], key=lambda row: place(row["facts"]))
    jsonl.save(folder / "rows.jsonl", everything)
    tables.save_table(table(everything), NAME, PROFILE)
    here = [row for row in everything if place(row["facts"]) == place(facts)]
    if drawn := [row for row in here if row["section"] in DRAWN and row["ratio"] is not None]:
        plots.use_style()
        kind = "cpu" if facts["device"] == "cpu" else "gpu"
        known = {method(row) for row in everything if row["section"] in DRAWN}
        heading = f"{place(facts)}, training in batches of {facts['batch']}"
        plots.save(figure(drawn, known, heading), f"{NAME}_{kind}", PROFILE)
    return folder


def key(row: Row) -> tuple[str, str]:
    """What a new row replaces: the same section on the same device."""
    return place(row["facts"]), row["section"]


def figure(rows: Sequence[Row], known: Collection[str] = (), heading: str = "") -> Figure:
    """Ratios to the VAE of every encoder, as medians and ranges over turns, on a log axis.

    Args:
        rows: of the sections `training` and `inference`, measured ones of one device only; what a
            method lacks is marked.
        known: methods that were measured on some device.
        heading: a line on top.
    """
    import matplotlib.pyplot as plt

    from gpvae import plots

    order = sorted({method(row) for row in rows} | set(known), key=rank)
    found, axes = plt.subplots(1, 2, figsize=(plots.TEXT, 2.8), sharey=True)
    for ax, section in zip(axes, DRAWN, strict=True):
        here = {(method(row), batch(row)): row for row in rows if row["section"] == section}
        sizes = sorted({size for _, size in here})
        for line, name in enumerate(order):
            measured = [size for size in sizes if (name, size) in here]
            for size in measured:
                whisker(ax, here[name, size], line)
            for size in [s for s in sizes if s not in measured] if measured else [""]:
                plots.mark_missing(ax, line + offset(size), "not measured")
        ax.set(
            xscale="log", xlabel=f"{section}: time relative to the VAE\n(median and range of turns)"
        )
        ax.xaxis.set_major_formatter("{x:g}")
        ax.grid(axis="y", visible=False)
    axes[0].set_yticks(range(len(order)), [label(name) for name in order])
    axes[0].set_ylim(len(order) - 0.5, -0.5)
    for size in filter(None, dict.fromkeys(map(batch, rows))):
        axes[1].plot([], [], "o", color="0.3", mfc=fill(size, "0.3"), label=size)
    found.suptitle(heading, fontsize=7, color="0.4")
    if axes[1].get_legend_handles_labels()[0]:
        axes[1].legend(loc="upper right")
    return found


def whisker(ax: Axes, row: Row, line: int) -> None:
    """Median and range of a row's ratios; latency (batch 1) above, with an open marker."""
    from gpvae import plots

    y, colour = line + offset(batch(row)), plots.COLOURS[encoder(method(row))[0]]
    ax.plot([row["ratio_min"], row["ratio_max"]], [y, y], color=colour, lw=1)
    ax.plot(row["ratio"], y, "o", color=colour, mfc=fill(batch(row), colour))


def batch(row: Row) -> str:
    """Batch of a row, such as `batch 1000`; empty where there is only one."""
    return row["case"].partition(", ")[2]


def offset(size: str) -> float:
    """Where in its line a batch is drawn."""
    return {"": 0.0, "batch 1": -0.15}.get(size, 0.15)


def fill(size: str, colour: object) -> object:
    """Colour of a marker's face."""
    return "white" if size == "batch 1" else colour


def method(row: Row) -> str:
    """Method of a row, such as `iaf4`."""
    return row["case"].partition(", ")[0]


def encoder(name: str) -> tuple[str, str]:
    """Encoder of a method, and its number of steps or components if it has one."""
    bare = name.rstrip("0123456789")
    return bare, name[len(bare) :]


def rank(name: str) -> tuple[int, str]:
    """The place of a method in tables."""
    bare, count = encoder(name)
    return METHODS.index(bare), count


def label(name: str) -> str:
    """A method's name for readers."""
    from gpvae.tables import LABELS

    bare, count = encoder(name)
    return f"{LABELS[bare]} {count}".strip()
