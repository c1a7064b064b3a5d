"""What the evidence says about the paper's three claims, as sentences computed from rows.

Intervals are 95% over seeds, differences paired by seed and image, all in nats per image. Each
claim is a number of comparisons. One supports it if its interval lies wholly on the claim's side,
contradicts it if wholly on the other, and leaves it open otherwise; a single seed gives no
interval, so that it counts as missing. See `decide` for the verdict.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from gpvae import events, paths
from gpvae.bench.report import place
from gpvae.comparison import devices, timed_versions
from gpvae.config import RunConfig
from gpvae.difficulty import SCORE, SCORE_NAME, rank_correlations
from gpvae.profiles import FAMILIES, Profile, get_profile
from gpvae.results import Results, Row
from gpvae.stats import Interval, mean_interval
from gpvae.stored import find_rows
from gpvae.tables import (
    LABELS,
    MISSING,
    by_encoder,
    check_one_version,
    differences,
    format_interval,
    format_seeds,
    least,
    paired,
)

HOLDS, IN_PART, FAILS, OPEN, UNKNOWN = (
    "holds",
    "holds in part",
    "does not hold here",
    "not decided here",
    "not measured",
)
SUPPORTS, CONTRADICTS, LEAVES_OPEN, LACKS = "in support", "against", "open", "missing"

HEADER = (
    "Differences of log p(x) are in nats per image, paired by seed and image; brackets are 95% "
    "intervals over seeds.\n\n"
)
RIVAL_SCORES = {"−ELBO": "minus_elbo", "the negative encoder variance": "minus_q_var"}
# What the literature reports, and the best estimate of the model's log p(x).
JUDGED = {"own proposal": "log_likelihood", "both proposals": "log_px"}


@dataclass(frozen=True)
class Finding:
    """A claim, what is known of it, and the verdict.

    Args:
        claim: one sentence.
        answers: what each comparison says, one of the four words above.
        evidence: sentences with numbers.
        conditions: what the evidence was measured on.
    """

    claim: str
    answers: tuple[str, ...]
    evidence: tuple[str, ...]
    conditions: str

    @property
    def verdict(self) -> str:
        """One of the five above."""
        return decide(self.answers)

    def markdown(self) -> str:
        """Half a page."""
        words = dict.fromkeys((SUPPORTS, CONTRADICTS, LEAVES_OPEN, *self.answers))
        counts = ", ".join(f"{self.answers.count(word)} {word}" for word in words)
        lines = [
            f"### {self.claim}",
            f"**Verdict: {self.verdict}** ({len(self.answers)} comparisons: {counts}). "
            f"{self.conditions}",
            "",
        ]
        return "\n".join([*lines, *(f"- {sentence}" for sentence in self.evidence), ""])


def decide(answers: Sequence[str]) -> str:
    """The verdict: a claim `holds` if every comparison supports it, `holds in part` if some do,
    `does not hold here` if none does and one contradicts it, and is `not decided here` if all that
    are there leave it open. With something missing it holds in part at most.
    """
    if all(answer == LACKS for answer in answers):
        return UNKNOWN
    if all(answer == SUPPORTS for answer in answers):
        return HOLDS
    if SUPPORTS in answers:
        return IN_PART
    return FAILS if CONTRADICTS in answers else OPEN


def answer(interval: Interval) -> str:
    """What a difference that the claim says is positive says of it; NaN says nothing."""
    if not interval.n > 1 or math.isnan(interval.low):
        return LACKS
    if interval.low > 0:
        return SUPPORTS
    return CONTRADICTS if interval.high < 0 else LEAVES_OPEN


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
    places = ", ".join(sorted({row.get("device", "cpu") for row in rows}))
    return (
        f"{base.data.name}, {first['split']['train']} training and {first['split']['test']} test "
        f"images, D = {base.model.latent_dim}, {seeds}, at most {base.training.epochs} "
        f"epochs, S = {e.samples}, computed on {places}."
    )


def likelihood(profile: Profile, results: Results, rows: Sequence[Row]) -> Finding:
    """Claim 1: GPVAE's test likelihood is higher than the VAE's and than every rival's.

    By its own proposal, as in the literature, and by both, the best estimate of log p(x). That it
    is higher than every rival's is one comparison, which one rival is enough to contradict.
    """
    evidence, answers = [], []
    rivals = [encoder for encoder in profile.encoders if encoder not in ("vae", "gpvae")]
    for output in profile.outputs:
        methods = _methods(profile, output, rows)
        said = []
        for word, key in JUDGED.items():
            difference = paired(results, methods["gpvae"], methods["vae"], key)
            said.append(answer(difference))
            evidence.append(f"{output}, {word}: GPVAE − VAE = {format_interval(difference, '+')}")
            if rivals:
                verdict, text = _against_rivals(results, methods, rivals, key)
                said.append(verdict)
                evidence.append(f"{output}, {word}: {text}")
        incomplete = _lacking(output, methods, profile.seeds)
        answers += _with_lack(said, incomplete)
        evidence += incomplete
    return Finding(
        f"1. Likelihood: higher than that of {'every rival' if rivals else 'the VAE'}",
        tuple(answers),
        tuple(evidence),
        conditions(profile, rows),
    )


def _against_rivals(
    results: Results, methods: Mapping[str, Sequence[Row]], rivals: Sequence[str], key: str
) -> tuple[str, str]:
    """Whether GPVAE lies above every rival, and the sentence that says so."""
    shown = {encoder: methods[encoder] for encoder in ("gpvae", *rivals)}
    found = differences(results, shown, "gpvae", key)
    best, difference = least(found)
    if not best:
        return LACKS, f"GPVAE − rivals {MISSING}"
    answers = {rival: answer(each) for rival, each in found.items()}
    sides = {
        word: ", ".join(LABELS[rival] for rival, said in answers.items() if said == side)
        for word, side in (("above", SUPPORTS), ("below", CONTRADICTS))
    }
    text = (
        f"GPVAE − {LABELS[best]}, the best rival = {format_interval(difference, '+')} (above "
        f"{sides['above'] or 'none'}; below {sides['below'] or 'none'})"
    )
    if CONTRADICTS in answers.values():
        return CONTRADICTS, text
    if set(answers) < set(rivals) or LACKS in answers.values():
        return LACKS, text
    return (LEAVES_OPEN if LEAVES_OPEN in answers.values() else SUPPORTS), text


def speed(bench: Sequence[Mapping[str, Any]]) -> Finding:
    """Claim 2: inference is one pass, far faster than that of semi-amortized methods.

    Args:
        bench: rows of `gpvae bench` (section "inference"), see `gpvae.bench`.

    "Far faster" means in less than half the time of SA-VAE with four steps.
    """
    rows = [row for row in bench if row["section"] == "inference" and row["ratio"]]
    evidence, answers = [], []
    for device in devices(rows):
        own = [row for row in rows if place(row["facts"]) == device]
        ratios = {row["case"]: row["ratio"] for row in own}
        for case, ours in ratios.items():
            method, _, batch = case.partition(", ")
            if method != "gpvae":
                continue
            theirs = ratios.get(f"savae4, {batch}")
            evidence.append(
                f"{device}, {_networks(own[0])}, {batch}: GPVAE takes {ours:.2f} times as long as "
                f"the VAE, SA-VAE with 4 steps "
                + (f"{theirs:.1f} times" if theirs else f"{MISSING}")
            )
            fast = theirs is not None and ours < 0.5 * theirs
            answers.append(LACKS if theirs is None else SUPPORTS if fast else CONTRADICTS)
    return Finding(
        "2. Speed: inference is one pass, far faster than semi-amortized methods",
        tuple(answers),
        tuple(evidence) or ("no rows: run `gpvae bench --save`",),
        "Measured in turns, in one run on each device; no intervals. Far faster means in less than "
        "half of SA-VAE's time. Version of the code that was timed: "
        + (
            ", ".join(f"{v} ({d})" for d in devices(rows) for v in sorted(timed_versions(rows, d)))
            or MISSING
        )
        + ".",
    )


def _networks(row: Mapping[str, Any]) -> str:
    """The networks of a benchmark, such as `MLP 784-500-500, D = 50`."""
    channels, height, width, *hidden, latent = row["facts"]["networks"]
    return f"MLP {'-'.join(map(str, [channels * height * width, *hidden]))}, D = {latent}"


def difficulty(profile: Profile, results: Results, rows: Sequence[Row]) -> Finding:
    """Claim 3: Var f / E h^2 marks the images whose posterior is hard to approximate.

    It should be correlated with the amortization gap, and more so than two scores that need no
    random function, by the differences of their correlations over seeds: -ELBO (which has an
    advantage: it is a part of the gap) and the encoder's mean posterior variance with a minus sign.
    A score that is not itself correlated gains nothing from a rival that does worse.
    """
    evidence, answers = [], []
    for output in profile.outputs:
        ours = _methods(profile, output, rows)["gpvae"]
        ours = [row for row in ours if "elbo_optimised" in row]
        scores = rank_correlations(results, ours, SCORE)
        score = mean_interval(scores)
        said = [answer(score)]
        evidence.append(
            f"{output}: rank correlation with the amortization gap {format_interval(score, '+')}"
        )
        for name, key in RIVAL_SCORES.items() if scores else ():
            theirs = rank_correlations(results, ours, key)
            if len(theirs) != len(scores):
                theirs = []
            difference = mean_interval(np.subtract(scores, theirs) if theirs else [])
            better = answer(difference)
            gains = better != SUPPORTS or said[0] == SUPPORTS
            said.append(better if gains else LEAVES_OPEN)
            evidence.append(
                f"{output}: that of {name}, which needs no random function, is "
                f"{format_interval(mean_interval(theirs), '+')}; the score's minus it "
                f"{format_interval(difference, '+')}"
            )
        incomplete = _lacking(output, {"gpvae": ours}, profile.seeds)
        answers += _with_lack(said, incomplete)
        evidence += incomplete
    return Finding(
        "3. Difficulty: the model's uncertainty marks the hard images",
        tuple(answers),
        tuple(evidence),
        conditions(profile, rows),
    )


def summary(
    profile: Profile, pairs: Mapping[tuple[str, str], Mapping[str, Interval]]
) -> pd.DataFrame:
    """One line per output: what claims 1 and 3 rest on, with 95% over seeds.

    Differences of log p(x) are in nats per image; correlations are Spearman's with GPVAE's
    amortization gap.

    Args:
        profile: whose stored rows.
        pairs: its differences, see `against`.

    Raises:
        DataError: rows of several versions.
    """
    lines = []
    rows, results = find_rows(profile.runs(), profile.name), Results(profile.name)
    check_one_version(rows)
    for output in profile.outputs:
        methods = _methods(profile, output, rows)
        ours = methods["gpvae"]
        if not ours:
            continue
        complete = sum(len(own) == len(profile.seeds) for own in methods.values())
        line = {
            "profile": profile.name,
            "output": output,
            "seeds": format_seeds(ours, profile.seeds),
            "complete methods": f"{complete} of {len(methods)}",
        }
        for word in JUDGED:
            found = pairs[output, word]
            rivals = {e: each for e, each in found.items() if e != "vae" and each.n}
            best, nearest = least(rivals)
            line[f"GPVAE − VAE, {word}"] = format_interval(found["vae"], "+")
            line[f"GPVAE − best rival, {word}"] = (
                f"{LABELS[best]}: {format_interval(nearest, '+')}"
                + (f" ({nearest.n} seeds)" if 1 < nearest.n < len(profile.seeds) else "")
                if best
                else MISSING
            )
        for name, key in {SCORE_NAME: SCORE, **RIVAL_SCORES}.items():
            score = mean_interval(rank_correlations(results, ours, key))
            line[f"correlation of {name}"] = format_interval(score, "+")
        lines.append(line)
    return pd.DataFrame(lines)


def against(profile: Profile) -> dict[tuple[str, str], dict[str, Interval]]:
    """GPVAE minus each other method in log p(x), by output and proposal, in nats per image with 95%
    over seeds. An interval from no pair of seeds (`n` is 0) stands for what is missing.

    Raises:
        DataError: rows of several versions.
    """
    rows, results = find_rows(profile.runs(), profile.name), Results(profile.name)
    check_one_version(rows)
    return {
        (output, word): {
            encoder: paired(results, methods["gpvae"], own, key)
            for encoder, own in methods.items()
            if encoder != "gpvae"
        }
        for output in profile.outputs
        for methods in [_methods(profile, output, rows)]
        for word, key in JUDGED.items()
    }


def against_table(found: Mapping[tuple[str, str, str], Mapping[str, Interval]]) -> pd.DataFrame:
    """A line for each profile, output and proposal, a column for each method; see `against`."""
    lines = [
        {"profile": profile, "output": output, "proposal": word.split()[0]}
        | {f"GPVAE − {LABELS[e]}": format_interval(each, "+") for e, each in line.items()}
        for (profile, output, word), line in found.items()
    ]
    return pd.DataFrame(lines).fillna(MISSING)


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
        named = {row["name"]: row for row in find_rows(jobs, profile.name)}
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


def _methods(profile: Profile, output: str, rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by encoder, with an entry for VAE and GPVAE even where the profile has none of them."""
    return {"vae": [], "gpvae": [], **by_encoder(profile, output, rows)}


def _with_lack(answers: Sequence[str], incomplete: Sequence[str]) -> list[str]:
    """The answers of one output, with one more that is missing if rows are and none says so."""
    return [*answers, *([LACKS] if incomplete and LACKS not in answers else [])]


def _lacking(output: str, methods: Mapping[str, Sequence[Row]], seeds: Sequence[int]) -> list[str]:
    """One sentence about the methods and seeds that an output lacks; none if it lacks nothing."""
    gone = [LABELS[encoder] for encoder, own in methods.items() if not own]
    parts = [f"no rows of {', '.join(gone)}"] if gone else []
    for encoder, own in methods.items():
        if 0 < len(own) < len(seeds):
            parts.append(f"{LABELS[encoder]} {format_seeds(own, seeds)}")
    return [f"incomplete: {output}, {'; '.join(parts)}"] if parts else []
