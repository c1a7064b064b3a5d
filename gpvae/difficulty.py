"""Does a score mark the images whose posterior is guessed badly, and unlike images?

Everything is in nats per image, with intervals over seeds. A row that lacks what is asked for (an
older one, or one without gaps) is left out, and a method without any prints as missing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from gpvae.profiles import Profile
from gpvae.results import Results, Row
from gpvae.stats import Interval, auroc, mean_interval, spearman
from gpvae.tables import MISSING, by_encoder, format_interval, format_seeds

SCORE, SCORE_NAME = "relative_f_var", "Var f / E h²"
GAPS = {"amortization gap": "amortization_gap", "inference gap": "inference_gap"}
# label -> score, and whose it is; each is meant to be larger where the gap is
_OF_RANDOM_FUNCTIONS = {
    SCORE_NAME: (SCORE, "gpvae"),
    "Var f": ("f_var", "gpvae"),
    "Var h": ("h_var", "gpvae"),
    "expected gap": ("expected_gap", "gpvae"),
}
OWN_SCORES = tuple(_OF_RANDOM_FUNCTIONS)
SCORES = _OF_RANDOM_FUNCTIONS | {
    "−ELBO": ("minus_elbo", "gpvae"),
    "−encoder variance": ("minus_q_var", "gpvae"),
    "−encoder variance (VAE)": ("minus_q_var", "vae"),
}
# With outliers stand the arrays themselves, so that the bound is not negated there.
OUTLIER_SCORES = _OF_RANDOM_FUNCTIONS | {
    "−ELBO of GPVAE": ("elbo", "gpvae"),
    "−ELBO of VAE": ("elbo", "vae"),
}


def per_image(results: Results, row: Row) -> dict[str, np.ndarray]:
    """Arrays of a row, with both gaps and the scores that need no random function, [N] each."""
    a = results.arrays(row)
    a["minus_elbo"] = -a["elbo"]
    if "q_var" in a:
        a["minus_q_var"] = -a["q_var"]
    if "elbo_optimised" in a:
        a["amortization_gap"] = a["elbo_optimised"] - a["elbo"]
    if "log_px" in a:
        a["inference_gap"] = a["log_px"] - a["elbo"]
    return a


def rank_correlations(
    results: Results, rows: Sequence[Row], score: str, gap: str = "amortization_gap"
) -> list[float]:
    """Spearman's correlation over images of a score with a gap, for each row that has both."""
    images = [per_image(results, row) for row in rows]
    return [spearman(a[score], a[gap]) for a in images if score in a and gap in a]


def noise_share(results: Results, rows: Sequence[Row]) -> float:
    """Part of the amortization gap's variance over images that is Monte Carlo noise of the two
    bounds, averaged over rows; NaN without any that has gaps.
    """
    shares = []
    for a in (per_image(results, row) for row in rows):
        if "amortization_gap" in a:
            noise = a["elbo_stderr"] ** 2 + a["elbo_optimised_stderr"] ** 2
            shares.append(noise.mean() / a["amortization_gap"].var())
    return mean_interval(shares).value


def outlier_table(profile: Profile, results: Results, rows: Sequence[Row]) -> pd.DataFrame:
    """AUROC of each score between test images and those of another data set, over seeds.

    Empty if no row has outliers.
    """
    lines = []
    for output in profile.outputs:
        methods = by_encoder(profile, output, rows)
        for label, (score, encoder) in OUTLIER_SCORES.items():
            arrays = [results.arrays(row) for row in methods.get(encoder, [])]
            sign = -1 if score == "elbo" else 1
            areas = [
                auroc(sign * a[score], sign * a[f"outlier_{score}"])
                for a in arrays
                if f"outlier_{score}" in a
            ]
            if areas:
                name = profile.base.evaluation.outliers
                line = {"output": output, "outliers": name, "score": label}
                lines.append(line | {"AUROC": format_interval(mean_interval(areas), digits=3)})
    return pd.DataFrame(lines)


def calibration(
    results: Results, rows: Sequence[Row], bins: int = 10
) -> tuple[np.ndarray, list[Interval]]:
    """Expected against observed amortization gap by decile of the expected one.

    The bound of GPVAE averages over the random functions. If an image's best Gaussian is a draw of
    them, too, the gap is the divergence of two independent draws, for small noise twice that of one
    from the Gaussian of the predictive moments, which the posterior's score `expected_gap` is.

    Args:
        results: whose arrays.
        rows: of GPVAE for one output, one for each seed; those without gaps are left out.
        bins: number of equal groups of images.

    Returns:
        Mean expected gap of each group, averaged over seeds, [bins], and the observed mean with
        its interval over seeds, both in nats.
    """
    expected, observed = [], []
    for row in rows:
        a = per_image(results, row)
        if "expected_gap" in a and "amortization_gap" in a:
            groups = np.array_split(a["expected_gap"].argsort(kind="stable"), bins)
            gap = a["amortization_gap"]
            expected.append([2 * a["expected_gap"][g].mean() for g in groups])
            observed.append([gap[g].mean() for g in groups])
    if not expected:
        return np.full(bins, np.nan), [mean_interval([])] * bins
    return np.mean(expected, 0), [mean_interval(values) for values in zip(*observed, strict=True)]


def calibration_table(profile: Profile, results: Results, rows: Sequence[Row]) -> pd.DataFrame:
    """One line per output: how many times the expected gap the observed one is, over seeds."""
    lines = []
    for output in profile.outputs:
        own = by_encoder(profile, output, rows)["gpvae"]
        images = [a for row in own if "expected_gap" in (a := per_image(results, row))]
        images = [a for a in images if "amortization_gap" in a]
        ratios = [a["amortization_gap"].mean() / (2 * a["expected_gap"].mean()) for a in images]
        steps = np.diff([gap.value for gap in calibration(results, own)[1]])
        ratio = format_interval(mean_interval(ratios), digits=0)
        lines.append(
            {
                "output": output,
                "seeds": format_seeds([row for row in own if "log_px" in row], profile.seeds),
                "observed gap / (2 × expected gap)": ratio,
                "deciles over which it rises": (
                    f"{int((steps > 0).sum())} of {len(steps)}" if images else MISSING
                ),
            }
        )
    return pd.DataFrame(lines)
