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
from gpvae.analysis import SCORE, rank_correlations
from gpvae.bench.report import place
from gpvae.comparison import devices
from gpvae.config import RunConfig, differences
from gpvae.profiles import FAMILIES, WIDTHS, Profile, get_profile
from gpvae.results import Results, Row
from gpvae.stats import Interval, mean_interval
from gpvae.stored import rows_of
from gpvae.tables import (
    LABELS,
    MISSING,
    best_other,
    by_encoder,
    check_one_version,
    format_interval,
    format_seeds,
    paired,
    select,
)

HOLDS, IN_PART, FAILS, UNKNOWN = (
    "holds",
    "holds in part",
    "does not hold here",
    "not measured",
)


SCORE_NAME = "Var f / E h²"
RIVAL_SCORES = {"−ELBO": "minus_elbo", "the negative encoder variance": "minus_q_var"}


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
    Without rows of every method and seed the claim holds in part at most.
    """
    evidence, wins, lacking = [], [], []
    for output in profile.outputs:
        methods = by_encoder(profile, output, rows)
        lacking += _lacking(output, methods, profile.seeds)
        ours = methods.get("gpvae", [])
        if not ours or not methods.get("vae"):
            continue
        for word, key in (("own", "log_likelihood"), ("neutral", "log_likelihood_neutral")):
            difference = paired(results, ours, methods["vae"], key)
            evidence.append(
                f"{output}, {word} proposal: GPVAE − VAE = {format_interval(difference, '+')}"
            )
            if difference.n > 1:
                wins.append(difference.low > 0)
        rivals = {encoder: own for encoder, own in methods.items() if encoder != "vae"}
        if best := best_other(rivals, "gpvae"):
            difference = paired(results, ours, rivals[best], "log_likelihood")
            evidence.append(
                f"{output}: GPVAE − {LABELS[best]}, the best rival = "
                f"{format_interval(difference, '+')} (own proposal)"
            )
            if difference.n > 1:
                wins.append(difference.low > 0)
    if lacking and evidence:
        evidence += [f"incomplete: {text}" for text in lacking]
    found = _verdict(wins)
    rivals = set(profile.encoders) - {"vae", "gpvae"}
    return Finding(
        f"1. Likelihood: higher than that of {'every rival' if rivals else 'the VAE'}",
        IN_PART if found == HOLDS and lacking else found,
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
    where = devices(rows)
    evidence, wins = [], []
    for device in where:
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
        f"{_networks(rows)}, measured in turns in one run on each of: {'; '.join(where)}. Far "
        "faster means in less than half of SA-VAE's time."
        if where
        else "",
    )


def _networks(rows: Sequence[Mapping[str, Any]]) -> str:
    """The networks of the benchmark, such as `MLP 784-500-500, D = 50`."""
    channels, height, width, *hidden, latent = rows[0]["facts"]["networks"]
    return f"MLP {'-'.join(map(str, [channels * height * width, *hidden]))}, D = {latent}"


def difficulty(profile: Profile, results: Results, rows: Sequence[Row]) -> Finding:
    """Claim 3: Var f / E h^2 marks the images whose posterior is hard to approximate.

    It should be correlated with the amortization gap, and more so than two scores that need no
    random function, by the differences of their correlations over seeds: -ELBO (which has an
    advantage: it is a part of the gap) and the encoder's mean posterior variance with a minus sign.
    A score that is not itself correlated gains nothing from a rival that does worse.
    """
    evidence, wins = [], []
    for output in profile.outputs:
        ours = by_encoder(profile, output, rows).get("gpvae", [])
        ours = [row for row in ours if "elbo_optimised" in row]
        if not ours:
            continue
        scores = rank_correlations(results, ours, SCORE)
        score = mean_interval(scores)
        evidence.append(
            f"{output}: rank correlation with the amortization gap {format_interval(score, '+')}"
        )
        marks = score.low > 0
        wins += [marks] if score.n > 1 else []
        for name, key in RIVAL_SCORES.items():
            theirs = rank_correlations(results, ours, key)
            if len(theirs) != len(scores):
                continue
            difference = mean_interval(np.subtract(scores, theirs))
            evidence.append(
                f"{output}: that of {name}, which needs no random function, is "
                f"{format_interval(mean_interval(theirs), '+')}; the score's minus it "
                f"{format_interval(difference, '+')}"
            )
            wins += [marks and difference.low > 0] if difference.n > 1 else []
    return Finding(
        "3. Difficulty: the model's uncertainty marks the hard images",
        _verdict(wins),
        tuple(evidence),
        conditions(profile, rows),
    )


def summary(profiles: Sequence[Profile]) -> pd.DataFrame:
    """One line per data set and output: what claims 1 and 3 rest on, with 95% over seeds.

    Likelihoods are log p(x), own proposal, in nats per image; correlations are Spearman's with
    GPVAE's amortization gap.

    Raises:
        DataError: rows of several versions in one profile.
    """
    lines = []
    for profile in profiles:
        rows = rows_of(profile.runs(), profile.name, stored=True, log=lambda line: None)
        check_one_version(rows)
        results = Results(profile.name)
        for output in profile.outputs:
            methods = by_encoder(profile, output, rows)
            ours, vae = methods.get("gpvae", []), methods.get("vae", [])
            if not ours:
                continue
            rivals = {encoder: own for encoder, own in methods.items() if encoder != "vae"}
            best = best_other(rivals, "gpvae")
            complete = sum(len(own) == len(profile.seeds) for own in methods.values())
            to_best = paired(results, ours, methods.get(best, []), "log_likelihood")
            scores = {
                name: mean_interval(rank_correlations(results, ours, key))
                for name, key in {SCORE_NAME: SCORE, **RIVAL_SCORES}.items()
            }
            lines.append(
                {
                    "profile": profile.name,
                    "output": output,
                    "seeds": format_seeds(ours, profile.seeds),
                    "complete methods": f"{complete} of {len(methods)}",
                    "GPVAE − VAE": format_interval(
                        paired(results, ours, vae, "log_likelihood"), "+"
                    ),
                    "GPVAE − best rival": f"{LABELS.get(best, '')} {format_interval(to_best, '+')}",
                    **{
                        f"correlation of {name}": format_interval(value, "+")
                        for name, value in scores.items()
                    },
                }
            )
    return pd.DataFrame(lines)


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
        check_one_version([*rows, *there])
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


def worth_of_noise(profile: Profile, results: Results, rows: Sequence[Row]) -> Interval:
    """GPVAE minus the same encoder without the weights' KL (temperature 0), in log p(x), own.

    Without that KL the posterior of the weights shrinks to a point: the encoder has as many
    parameters and (nearly) no noise. So this is what the doubt adds, whatever the size adds.
    """
    key = "model.gp.temperature"
    settings = {changes[key]: changes for changes in profile.variations.get("temperature", ())}
    with_noise, without = (
        select(rows, _runs(profile, "temperature", settings[t])) if t in settings else []
        for t in (1.0, 0.0)
    )
    return paired(results, with_noise, without, "log_likelihood")


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


def regimes_sentence(regimes: Mapping[str, Mapping[str, Interval]]) -> str:
    """How many settings lie above zero; what stands in several variations counts once."""
    measured = {d for found in regimes.values() for d in found.values() if d.n > 1}
    above, positive = sum(d.low > 0 for d in measured), sum(d.value > 0 for d in measured)
    below = sum(d.high < 0 for d in measured)
    return (
        f"{len(measured)} different settings, most of them against the same runs of the VAE and so "
        f"not independent: {above} interval{'s lie' if above != 1 else ' lies'} above zero and "
        f"{below} below (by chance about {0.025 * len(measured):.1f} on each side), {positive} "
        "means are positive."
    )


def scaling_table(shares: pd.DataFrame) -> pd.DataFrame:
    """Mean Var f / E h^2 over runs: a line for each N, a column for each M; see `noise_shares`."""
    groups = shares.groupby(["N", "M"]).share.agg(["mean", "count"])
    text = groups.apply(lambda g: f"{g['mean']:.4f} ({g['count']:.0f} runs)", axis=1).unstack()
    table = text.fillna(MISSING).rename(columns=lambda m: f"M = {m}").reset_index()
    return table.rename(columns={"N": "training images N"})


def scaling_slopes(shares: pd.DataFrame) -> dict[str, Interval]:
    """Exponents of M and N in Var f / E h^2 ~ M^a N^b, with 95% over seeds; a = 1 and b = -1 are
    those of M / N. Least squares in the logarithms, for each seed with enough runs.
    """
    fits = []
    for _, own in shares.groupby("seed"):
        design = np.column_stack([np.ones(len(own)), np.log(own["M"]), np.log(own["N"])])
        if np.linalg.matrix_rank(design) == 3:
            fits.append(np.linalg.lstsq(design, np.log(own["share"]), rcond=None)[0][1:])
    return {name: mean_interval([fit[i] for fit in fits]) for i, name in enumerate(("M", "N"))}


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


PUBLISHED = {1: -86.76, 50: -84.78}  # nats, Burda et al. (2016), table 1, one layer, S = 5000
PUBLISHED_EPOCHS, PUBLISHED_BATCH, PUBLISHED_STEP = 3280, 20, 1e-3


def literature() -> pd.DataFrame:
    """Our log p(x) of Burda et al.'s model beside theirs, a line for each run of `burda` and
    of its presets; what was not run prints as missing.

    Raises:
        DataError: the rows are of different code or data.
    """
    found = []
    for profile in map(
        get_profile, ("burda", *(f"burda/{preset}" for preset in FAMILIES["burda"]))
    ):
        jobs = profile.jobs()
        rows = rows_of(jobs, profile.name, stored=True, log=lambda line: None)
        named = {row["name"]: row for row in rows}
        found += [(job, named.get(job.name)) for job in jobs]
    check_one_version([row for _, row in found if row])
    found.sort(key=lambda each: (each[0].model.importance_samples, each[0].training.epochs))
    return pd.DataFrame([_beside_published(job, row) for job, row in found])


def _beside_published(job: RunConfig, row: Row | None) -> dict[str, Any]:
    k, t = job.model.importance_samples, job.training
    ours = row["log_likelihood"] if row else None
    epochs = row["epochs"] if row else t.epochs
    return {
        "objective": "ELBO (k = 1)" if k == 1 else f"importance-weighted (k = {k})",
        "our log p(x) ± standard error over images": (
            f"{ours['mean']:.2f} ± {ours['stderr']:.2f}" if ours else MISSING
        ),
        "published": f"{PUBLISHED[k]:.2f}",
        "ours − published": f"{ours['mean'] - PUBLISHED[k]:+.2f}" if ours else MISSING,
        "epochs, ours / theirs": f"{epochs} / {PUBLISHED_EPOCHS}",
        "batch, ours / theirs": f"{t.batch_size} / {PUBLISHED_BATCH}",
        "first step size, ours / theirs": f"{t.learning_rate} / {PUBLISHED_STEP}",
        "S": ours["samples"] if ours else job.evaluation.samples,
        "test images": ours["n"] if ours else MISSING,
    }


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


def _lacking(output: str, methods: Mapping[str, Sequence[Row]], seeds: Sequence[int]) -> list[str]:
    """One sentence about the methods and seeds that an output lacks; none if it lacks nothing."""
    gone = [LABELS[encoder] for encoder, own in methods.items() if not own]
    parts = [f"no rows of {', '.join(gone)}"] if gone else []
    for encoder, own in methods.items():
        if 0 < len(own) < len(seeds):
            parts.append(f"{LABELS[encoder]} {format_seeds(own, seeds)}")
    return [f"{output}, {'; '.join(parts)}"] if parts else []


def _verdict(wins: Sequence[bool]) -> str:
    if not wins:
        return UNKNOWN
    if all(wins):
        return HOLDS
    return IN_PART if any(wins) else FAILS
