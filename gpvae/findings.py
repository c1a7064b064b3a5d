"""What the evidence says about the paper's three claims, as sentences computed from rows.

Intervals are 95% over seeds, differences paired by seed and image, all in nats per image. A claim
`holds` if every comparison supports it for every output distribution of the profile, `holds in
part` if some do, and `does not hold here` otherwise; `not measured` says what is missing. A single
seed gives no interval and decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from gpvae import events, paths
from gpvae.analysis import SCORE
from gpvae.bench.report import place
from gpvae.config import RunConfig, differences
from gpvae.profiles import WIDTHS, Profile, get_profile
from gpvae.results import Results, Row
from gpvae.stats import Interval, mean_interval, spearman_interval
from gpvae.stored import rows_of
from gpvae.tables import LABELS, by_encoder, format_interval, mean_of, paired, select

HOLDS, IN_PART, FAILS, UNKNOWN = (
    "holds",
    "holds in part",
    "does not hold here",
    "not measured",
)


@dataclass(frozen=True)
class Finding:
    """A claim, what is known of it, and the verdict.

    Args:
        claim: one sentence.
        verdict: one of the four above.
        evidence: sentences with numbers.
        conditions: what the evidence was measured on.
    """

    claim: str
    verdict: str
    evidence: tuple[str, ...]
    conditions: str

    def markdown(self) -> str:
        """Half a page."""
        lines = [f"### {self.claim}", f"**Verdict: {self.verdict}.** {self.conditions}", ""]
        return "\n".join([*lines, *(f"- {sentence}" for sentence in self.evidence), ""])


def conditions(profile: Profile, rows: Sequence[Row]) -> str:
    """What the rows were measured on, in one sentence."""
    if not rows:
        return "No rows."
    base, first = profile.base, rows[0]
    counts = {
        output: len(by_encoder(profile, output, rows).get("gpvae", []))
        for output in profile.outputs
    }
    seeds = f"{max(counts.values())} seeds"
    if len(set(counts.values())) > 1:
        seeds = ", ".join(f"{count} seeds ({output})" for output, count in counts.items())
    e = base.evaluation
    devices = ", ".join(sorted({row.get("device", "cpu") for row in rows}))
    return (
        f"{base.data.name}, {first['split']['train']} training and {first['split']['test']} test "
        f"images, D = {base.model.latent_dim}, {seeds}, at most {base.training.epochs} "
        f"epochs, S = {e.samples}, computed on {devices}."
    )


def likelihood(profile: Profile, results: Results, rows: Sequence[Row]) -> Finding:
    """Claim 1: GPVAE's test likelihood is higher than the VAE's and than every rival's.

    By either proposal for the VAE; the best rival is the one with the highest mean, own proposal.
    """
    evidence, wins = [], []
    for output in profile.outputs:
        methods = by_encoder(profile, output, rows)
        ours, rivals = methods.get("gpvae", []), _others(methods)
        if not ours or not methods.get("vae"):
            continue
        for word, key in (("own", "log_likelihood"), ("neutral", "log_likelihood_neutral")):
            difference = paired(results, ours, methods["vae"], key)
            evidence.append(
                f"{output}, {word} proposal: GPVAE − VAE = {format_interval(difference, '+')}"
            )
            if difference.n > 1:
                wins.append(difference.low > 0)
        if rivals:
            best = max(rivals, key=lambda name: mean_of(rivals[name], "log_likelihood").value)
            difference = paired(results, ours, rivals[best], "log_likelihood")
            evidence.append(
                f"{output}: GPVAE − {LABELS[best]}, the best rival = "
                f"{format_interval(difference, '+')} (own proposal)"
            )
            if difference.n > 1:
                wins.append(difference.low > 0)
    return Finding(
        "1. Likelihood: higher than VAE, SA-VAE, flows and mixtures",
        _verdict(wins),
        tuple(evidence),
        conditions(profile, rows),
    )


def speed(bench: Sequence[Mapping[str, Any]]) -> Finding:
    """Claim 2: inference is one pass, far faster than that of semi-amortized methods.

    Args:
        bench: rows of `gpvae bench` (section "inference"), see `gpvae.bench`.

    "Far faster" means in less than half the time of SA-VAE with four steps.
    """
    rows = [row for row in bench if row["section"] == "inference" and row["ratio"]]
    devices = list(dict.fromkeys(place(row["facts"]) for row in rows))
    evidence, wins = [], []
    for device in devices:
        ratios = {row["case"]: row["ratio"] for row in rows if place(row["facts"]) == device}
        for case, ours in ratios.items():
            method, _, batch = case.partition(", ")
            theirs = ratios.get(f"savae4, {batch}")
            if method != "gpvae" or theirs is None:
                continue
            evidence.append(
                f"{device}, {batch}: GPVAE takes {ours:.2f} times as long as the VAE, SA-VAE with "
                f"4 steps {theirs:.1f} times"
            )
            wins.append(ours < 0.5 * theirs)
    return Finding(
        "2. Speed: inference is one pass, far faster than semi-amortized methods",
        _verdict(wins),
        tuple(evidence) or ("no rows: run `gpvae bench --save`",),
        f"{_networks(rows)}, measured in turns in one run on each of: {'; '.join(devices)}. Far "
        "faster means in less than half of SA-VAE's time."
        if devices
        else "",
    )


def _networks(rows: Sequence[Mapping[str, Any]]) -> str:
    """The networks of the benchmark, such as `MLP 784-500-500, D = 50`."""
    channels, height, width, *hidden, latent = rows[0]["facts"]["networks"]
    return f"MLP {'-'.join(map(str, [channels * height * width, *hidden]))}, D = {latent}"


def difficulty(profile: Profile, results: Results, rows: Sequence[Row]) -> Finding:
    """Claim 3: Var f / E h^2 marks the images whose posterior is hard to approximate.

    It should be correlated with the amortization gap, and more so than -ELBO, by the differences
    of their correlations over seeds. (-ELBO has an advantage: it is a part of the gap.)
    """
    evidence, wins = [], []
    for output in profile.outputs:
        ours = by_encoder(profile, output, rows).get("gpvae", [])
        ours = [row for row in ours if "elbo_optimised" in row]
        if not ours:
            continue
        scores, rivals = (correlations(results, ours, key) for key in (SCORE, "minus_elbo"))
        score, rival = mean_interval(scores), mean_interval(rivals)
        evidence.append(
            f"{output}: rank correlation with the amortization gap "
            f"{format_interval(score, '+')}; of −ELBO, which needs no random function, "
            f"{format_interval(rival, '+')}"
        )
        if score.n > 1:
            wins += [score.low > 0, mean_interval(np.subtract(scores, rivals)).low > 0]
    return Finding(
        "3. Difficulty: the model's uncertainty marks the hard images",
        _verdict(wins),
        tuple(evidence),
        conditions(profile, rows),
    )


def correlations(results: Results, rows: Sequence[Row], score: str) -> list[float]:
    """Spearman's correlation of a score with the amortization gap, for each seed."""
    values = []
    for row in rows:
        a = results.arrays(row)
        a["minus_elbo"] = -a["elbo"]
        gap = a["elbo_optimised"] - a["elbo"]
        values.append(spearman_interval(a[score], gap, resamples=1).value)
    return values


def regime(
    profile: Profile, results: Results, rows: Sequence[Row], name: str
) -> dict[str, Interval]:
    """GPVAE − VAE in log p(x), own proposal, for each setting of one variation, by its label.

    The VAE is that of the same setting where the variation has one, else that of the table.
    """
    usual = by_encoder(profile, profile.outputs[0], rows)["vae"]
    settings = profile.variations[name]
    found = {}
    for changes in settings:
        if changes["model.encoder"] == "vae":
            continue
        same = {k: v for k, v in changes.items() if not k.startswith("model.gp.")}
        same["model.encoder"] = "vae"
        base = select(rows, _runs(profile, name, same)) if same in settings else usual
        ours = select(rows, _runs(profile, name, changes))
        found[label(changes)] = paired(results, ours, base, "log_likelihood")
    return found


def widths(profile: Profile, results: Results, rows: Sequence[Row]) -> dict[str, Interval]:
    """GPVAE − VAE for networks of other widths (profiles `regimes/small` and `regimes/large`)."""
    output = profile.outputs[0]
    found = {profile.base.model.hidden: (results, by_encoder(profile, output, rows))}
    for preset in WIDTHS:
        other = get_profile(f"regimes/{preset}")
        there = rows_of(other.runs(output), other.name, stored=True, log=lambda line: None)
        found[other.base.model.hidden] = Results(other.name), by_encoder(other, output, there)
    return {
        "hidden = " + "-".join(map(str, hidden)): paired(
            where, methods["gpvae"], methods["vae"], "log_likelihood"
        )
        for hidden, (where, methods) in sorted(found.items(), key=lambda item: sum(item[0]))
    }


def noise(profile: Profile, results: Results, rows: Sequence[Row], name: str) -> dict[str, float]:
    """Mean Var f / E h^2 for each setting of one variation, by its label; NaN if missing."""
    found = {}
    for changes in profile.variations.get(name, ()):
        shares = [
            float(np.mean(results.arrays(row)[SCORE]))
            for row in select(rows, _runs(profile, name, changes))
        ]
        found[label(changes)] = mean_interval(shares).value
    return found


def label(changes: Mapping[str, Any]) -> str:
    """What a setting changes, such as `features = 400`; the encoder goes without saying."""
    parts = [
        f"{key.rsplit('.', 1)[1]} = {value}"
        for key, value in changes.items()
        if key != "model.encoder"
    ]
    return ", ".join(parts)


def regime_sentence(name: str, found: Mapping[str, Interval]) -> str:
    """One plain sentence: where GPVAE lies above the VAE, if anywhere."""
    measured = {k: v for k, v in found.items() if v.n > 1}
    if not measured:
        return f"{name}: not measured"
    best = max(measured, key=lambda k: measured[k].value)
    above = [k for k, v in measured.items() if v.low > 0]
    below = [k for k, v in measured.items() if v.high < 0]
    text = f"{name}: best at {best} with {format_interval(measured[best], '+')} nats; "
    text += f"above the VAE at {'; '.join(above)}" if above else "nowhere above the VAE"
    return text + (f"; below it at {'; '.join(below)}" if below else "")


def noise_shares(
    profile: Profile, results: Results, rows: Sequence[Row]
) -> list[tuple[int, int, float]]:
    """(M, N, mean Var f / E h^2) of every GPVAE row, for the M / N argument of notebook 01."""
    known = {run.name: run for run in profile.jobs() if run.model.encoder == "gpvae"}
    plain = {"model.gp.features", "data.train_size", "model.encoder", "seed"}
    shares = []
    for row in rows:
        run = known.get(row["name"])
        if run is None or not _only(profile.base, run, plain):
            continue
        share = float(np.mean(results.arrays(row)[SCORE]))
        shares.append((run.model.gp.features, row["split"]["train"], share))
    return shares


PUBLISHED = {1: -86.76, 50: -84.78}  # nats, Burda et al. (2016), table 1, one layer, S = 5000
PUBLISHED_EPOCHS = 3280


def literature() -> pd.DataFrame:
    """Our log p(x) of Burda et al.'s model beside theirs; empty if it was not run."""
    profile = get_profile("burda")
    rows = rows_of(profile.jobs(), profile.name, stored=True, log=lambda line: None)
    lines = []
    for row in rows:
        k, found = row["config"]["model"]["importance_samples"], row["log_likelihood"]
        lines.append(
            {
                "objective": "ELBO (k = 1)" if k == 1 else f"importance-weighted (k = {k})",
                "our log p(x) ± standard error over images": (
                    f"{found['mean']:.2f} ± {found['stderr']:.2f}"
                ),
                "published": f"{PUBLISHED[k]:.2f}",
                "ours − published": f"{found['mean'] - PUBLISHED[k]:+.2f}",
                "our epochs": row["epochs"],
                "their epochs": PUBLISHED_EPOCHS,
                "S": found["samples"],
                "test images": found["n"],
            }
        )
    return pd.DataFrame(lines)


def save(text: str, profile: str) -> None:
    """Write `figures/<profile>/06_verdicts.md`."""
    folder = paths.figures(profile)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "06_verdicts.md").write_text(text, "utf-8")
    events.record(profile, "table", "06_verdicts", "made")


def _only(base: RunConfig, run: RunConfig, keys: set[str]) -> bool:
    """Whether two runs differ in these settings at most, gaps and output aside."""
    changed = differences(base.to_dict(), run.to_dict())
    names = {line.split(":", 1)[0] for line in changed}
    return names <= keys | {"evaluation.gaps"} and run.model.output == base.model.output


def _runs(profile: Profile, name: str, changes: Mapping[str, Any]) -> list[RunConfig]:
    wanted = profile.base.override(**{"model.output": profile.outputs[0], **changes})
    return [run for run in profile.variation(name) if run.override(seed=wanted.seed) == wanted]


def _others(methods: Mapping[str, Sequence[Row]]) -> dict[str, Sequence[Row]]:
    return {k: v for k, v in methods.items() if v and k not in ("vae", "gpvae")}


def _verdict(wins: Sequence[bool]) -> str:
    if not wins:
        return UNKNOWN
    if all(wins):
        return HOLDS
    return IN_PART if any(wins) else FAILS
