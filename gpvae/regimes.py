"""Where random functions help: GPVAE against the VAE with one option changed at a time.

Differences are in log p(x), own proposal, in nats per image, paired by seed and image, with 95%
intervals over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from gpvae.config import RunConfig, differences
from gpvae.difficulty import SCORE, SCORE_NAME
from gpvae.profiles import WIDTHS, Profile, get_profile
from gpvae.results import Results, Row
from gpvae.stats import Interval, mean_interval
from gpvae.stored import find_rows
from gpvae.tables import (
    MISSING,
    by_encoder,
    check_one_version,
    format_interval,
    paired,
    select,
)


@dataclass(frozen=True)
class Setting:
    """One setting of one option, and what GPVAE gains there.

    Args:
        changes: what is set, by dotted key.
        config: GPVAE's configuration, with the first seed.
        difference: GPVAE - VAE.
    """

    changes: Mapping[str, Any]
    config: RunConfig
    difference: Interval

    @property
    def label(self) -> str:
        """What it changes, such as `features = 400`."""
        return label(self.changes)

    @property
    def is_control(self) -> bool:
        return _is_control(self.config)


def names(profile: Profile) -> list[str]:
    """The variations that change an option of GPVAE or of what it shares with the VAE."""
    found = []
    for name, settings in profile.variations.items():
        encoders = {changes.get("model.encoder") for changes in settings}
        searched = name.startswith("tuning") or name == "scaling"
        if "gpvae" in encoders and encoders <= {"vae", "gpvae"} and not searched:
            found.append(name)
    return found


def regime(profile: Profile, results: Results, rows: Sequence[Row], name: str) -> list[Setting]:
    """GPVAE - VAE for each setting of one variation.

    The VAE is that of the same setting where the variation has one, else that of the table.
    """
    usual = by_encoder(profile, profile.outputs[0], rows).get("vae", [])
    settings = profile.variations[name]
    found = []
    for changes in settings:
        if changes["model.encoder"] == "vae":
            continue
        same = {k: v for k, v in changes.items() if not k.startswith("model.gp.")}
        same["model.encoder"] = "vae"
        base = select(rows, profile.setting(name, same)) if same in settings else usual
        runs = profile.setting(name, changes)
        difference = paired(results, select(rows, runs), base, "log_likelihood")
        found.append(Setting(changes, runs[0], difference))
    return found


def widths(profile: Profile, results: Results, rows: Sequence[Row]) -> list[Setting]:
    """GPVAE - VAE for networks of other widths (profiles `regimes/small` and `regimes/large`).

    Raises:
        DataError: rows of several versions.
    """
    found = []
    for plan in (profile, *(get_profile(f"regimes/{preset}") for preset in WIDTHS)):
        runs = plan.runs(profile.outputs[0])
        own = rows if plan is profile else find_rows(runs, plan.name)
        check_one_version([*rows, *own])
        methods = by_encoder(plan, profile.outputs[0], own)
        where = results if plan is profile else Results(plan.name)
        difference = paired(where, methods["gpvae"], methods["vae"], "log_likelihood")
        config = next(run for run in runs if run.model.encoder == "gpvae")
        found.append(Setting({"model.hidden": config.model.hidden}, config, difference))
    return sorted(found, key=lambda setting: sum(setting.config.model.hidden))


def parts(changes: Mapping[str, Any]) -> dict[str, str]:
    """The value of each option that a setting changes; the encoder goes without saying."""
    return {
        key.rsplit(".", 1)[1]: "-".join(map(str, value)) if isinstance(value, tuple) else str(value)
        for key, value in changes.items()
        if key != "model.encoder"
    }


def label(changes: Mapping[str, Any]) -> str:
    """What a setting changes, such as `features = 400`."""
    return ", ".join(f"{option} = {value}" for option, value in parts(changes).items())


def table(regimes: Mapping[str, Sequence[Setting]], seeds: Sequence[int]) -> pd.DataFrame:
    """One line for each variation and setting."""
    return pd.DataFrame(
        [
            {
                "variation": name,
                "setting": setting.label + " (control)" * setting.is_control,
                "seeds": f"{setting.difference.n} of {len(seeds)}",
                "log p(x), GPVAE − VAE (nats)": format_interval(setting.difference, "+"),
            }
            for name, settings in regimes.items()
            for setting in settings
        ]
    )


def sentence(name: str, settings: Sequence[Setting]) -> str:
    """One plain sentence: where GPVAE lies above the VAE, if anywhere."""
    measured = [s for s in settings if s.difference.n > 1]
    if not measured:
        return f"{name}: not measured"
    best = max(measured, key=lambda s: s.difference.value)
    above = [s.label for s in measured if s.difference.low > 0]
    below = [s.label for s in measured if s.difference.high < 0]
    text = f"{name}: best at {best.label} with {format_interval(best.difference, '+')} nats; "
    text += f"above the VAE at {'; '.join(above)}" if above else "nowhere above the VAE"
    return text + (f"; below it at {'; '.join(below)}" if below else "")


def count(regimes: Mapping[str, Sequence[Setting]]) -> str:
    """How many settings lie above zero, in a sentence.

    What stands in several variations counts once, the control without noise not at all.
    """
    measured = {
        setting.config.hash(): setting.difference
        for settings in regimes.values()
        for setting in settings
        if setting.difference.n > 1 and not setting.is_control
    }.values()
    above, positive = sum(d.low > 0 for d in measured), sum(d.value > 0 for d in measured)
    below = sum(d.high < 0 for d in measured)
    head = (
        f"{len(measured)} different settings, most of them against the same runs of the VAE and so "
        "not independent"
        if len(measured) != 1
        else "1 setting"
    )
    return (
        f"{head}: {above} interval{'s lie' if above != 1 else ' lies'} above zero and "
        f"{below} below (by chance about {0.025 * len(measured):.1f} on each side), "
        f"{positive} mean{'s are' if positive != 1 else ' is'} positive."
    )


def shares(profile: Profile, results: Results, rows: Sequence[Row], name: str) -> dict[str, float]:
    """Mean Var f / E h^2 for each setting of one variation, by its label; NaN if missing."""
    found = {}
    for changes in profile.variations.get(name, ()):
        own = select(rows, profile.setting(name, changes))
        means = [float(np.mean(results.arrays(row)[SCORE])) for row in own]
        found[label(changes)] = mean_interval(means).value
    return found


def worth_of_noise(profile: Profile, results: Results, rows: Sequence[Row]) -> dict[str, Interval]:
    """GPVAE minus each control, in log p(x), own proposal, by the control's label.

    A control is the same encoder with temperature 0: without the weights' KL nothing holds their
    posterior open, so that it shrinks as far as training takes it. Its size stays; so this is what
    the noise that is gone adds, whatever the size adds. `shares` tells how much noise is left.
    """
    runs = {
        label(changes): profile.setting("temperature", changes)
        for changes in profile.variations.get("temperature", ())
    }
    usual = [own for own in runs.values() if own[0].model.gp.temperature == 1.0]
    own = select(rows, usual[0]) if usual else []
    worth = {
        name: paired(results, own, select(rows, control), "log_likelihood")
        for name, control in runs.items()
        if _is_control(control[0])
    }
    return {name: interval for name, interval in worth.items() if interval.n}


def worth_sentence(profile: Profile, results: Results, rows: Sequence[Row]) -> str:
    """What the noise is worth, in words; empty if no control was run."""
    worth = worth_of_noise(profile, results, rows)
    if not worth:
        return ""
    left = shares(profile, results, rows, "temperature")
    against = (
        f"{format_interval(interval, '+')} nats to {name} ({interval.n} seeds)"
        for name, interval in worth.items()
    )
    return (
        "What the noise is worth, GPVAE minus the same encoder with less of it (control): "
        + "; ".join(against)
        + f". {SCORE_NAME}: "
        + "; ".join(
            f"{share:.1e} at {setting}" for setting, share in left.items() if math.isfinite(share)
        )
        + "."
    )


def noise_shares(profile: Profile, results: Results, rows: Sequence[Row]) -> pd.DataFrame:
    """M, N, seed and share (mean Var f / E h^2 over test images) of every GPVAE row that differs
    from the base in nothing else, for the M / N argument of notebook 01.
    """
    known = {run.name: run for run in profile.jobs() if run.model.encoder == "gpvae"}
    plain = {"model.gp.features", "data.train_size", "model.encoder", "seed"}
    shares = []
    for row in rows:
        run = known.get(row["name"])
        if run is None or not _only(profile.base, run, plain):
            continue
        share = float(np.mean(results.arrays(row)[SCORE]))
        shares.append((run.model.gp.features, row["split"]["train"], run.seed, share))
    return pd.DataFrame(shares, columns=["M", "N", "seed", "share"])


def scaling_table(shares: pd.DataFrame) -> pd.DataFrame:
    """Mean Var f / E h^2 over runs: a line for each N, a column for each M; see `noise_shares`."""
    groups = shares.groupby(["N", "M"]).share.agg(["mean", "count"])
    text = groups.apply(lambda g: f"{g['mean']:.4f} ({g['count']:.0f} runs)", axis=1).unstack()
    table = text.fillna(MISSING).rename(columns=lambda m: f"M = {m}").reset_index()
    return table.rename(columns={"N": "training images N"})


def scaling_slopes(shares: pd.DataFrame) -> dict[str, Interval]:
    """Exponents of M and N in Var f / E h^2, by name, with 95% over seeds; +1 and -1 if the share
    went like M / N.

    That of M is fitted for each seed within equal N, those of N between neighbouring sizes over the
    M that both have, so that no power law in N is assumed.
    """
    logs = np.log(shares[["M", "N", "share"]]).assign(seed=shares.seed, size=shares.N)
    found: dict[str, list[float]] = {}
    for _, own in logs.groupby("seed"):
        inner = own[["M", "share"]] - own.groupby("size")[["M", "share"]].transform("mean")
        if inner.M.abs().max() > 1e-9:
            found.setdefault("M", []).append(float((inner.M @ inner.share) / (inner.M @ inner.M)))
        table = own.pivot_table(index="M", columns="size", values="share")
        for low, high in pairwise(table.columns):
            steps = (table[high] - table[low]).dropna() / np.log(high / low)
            if len(steps):
                found.setdefault(f"N, {low} to {high}", []).append(float(steps.mean()))
    return {name: mean_interval(values) for name, values in found.items()}


def _is_control(config: RunConfig) -> bool:
    """Whether nothing holds the weights' posterior open: a larger encoder with little noise."""
    return config.model.gp.temperature == 0.0


def _only(base: RunConfig, run: RunConfig, keys: set[str]) -> bool:
    """Whether two runs differ in these settings at most, gaps and output aside."""
    changed = differences(base.to_dict(), run.to_dict())
    names = {line.split(":", 1)[0] for line in changed}
    return names <= keys | {"evaluation.gaps"} and run.model.output == base.model.output
