"""What the intervals over seeds of a table do not tell, as sentences computed from rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from scipy import stats

from gpvae.findings import JUDGED, SUPPORTS, answer
from gpvae.results import Results, Row
from gpvae.stats import Interval, mean_interval
from gpvae.tables import LABELS, format_interval, image_error, paired, paired_values

Pairs = Mapping[tuple[str, str, str], Mapping[str, Interval]]

VAGUE = 0.5  # nats of standard error of an image's log p(x)

Methods = Mapping[str, Mapping[str, Sequence[Row]]]  # rows by output and encoder


def caveats(results: Results, methods: Methods) -> str:
    """What belongs below a benchmark table, a paragraph for each of the three notes below.

    Args:
        results: with the per-image arrays.
        methods: rows by output and encoder.
    """
    notes = (vague_note, image_note, single_image_note)
    return "\n\n".join(filter(None, (note(results, methods) for note in notes)))


def vague_share(results: Results, rows: Sequence[Row]) -> float:
    """Share of the test images of these rows whose log p(x) by both proposals has a standard error
    above VAGUE nats; NaN without such an estimate.

    Where it is high, S is too small for either proposal, and the estimate too low on average.
    """
    errors = [results.arrays(row).get("log_px_stderr") for row in rows]
    errors = [each for each in errors if each is not None]
    return float((np.concatenate(errors) > VAGUE).mean()) if errors else math.nan


def vague_note(results: Results, methods: Methods) -> str:
    """The methods with a share (`vague_share`) of a tenth or more; empty for none."""
    listed = ", ".join(
        f"{LABELS[encoder]} ({output}) {share:.0%}"
        for output, found in methods.items()
        for encoder, rows in found.items()
        if (share := vague_share(results, rows)) >= 0.1
    )
    if not listed:
        return ""
    return (
        f"log p(x) by both proposals has a standard error above {VAGUE} nats for a tenth of the "
        f"test images or more: {listed}. There S is too small, and the estimates are too low on "
        "average."
    )


def image_note(results: Results, methods: Methods) -> str:
    """How well these test images stand for others, see `tables.image_error`."""
    outputs = []
    for output, found in methods.items():
        errors = {e: image_error(results, own, found.get("vae", [])) for e, own in found.items()}
        listed = ", ".join(
            f"{LABELS[encoder]} {error:.2f}"
            for encoder, error in errors.items()
            if encoder != "vae" and not math.isnan(error)
        )
        if listed:
            outputs.append(f"{output}: {listed}")
    if not outputs:
        return ""
    return (
        "The intervals are over seeds, on these test images. Standard error over images of the "
        f"difference to the VAE, own proposal, in nats: {'; '.join(outputs)}."
    )


def single_image_note(results: Results, methods: Methods) -> str:
    """The differences to the VAE whose interval holds zero or not because of one test image."""
    listed = "; ".join(
        f"{LABELS[encoder]} ({output}, {word}) {format_interval(rest, '+')}"
        for output, encoder, word, whole, rest in _without_one(results, methods)
        if answer(whole) != answer(rest)
    )
    if not listed:
        return ""
    return (
        "A single test image decides whether the interval of a difference to the VAE holds zero. "
        f"Without the image whose difference lies farthest from the median: {listed}."
    )


def _without_one(
    results: Results, methods: Methods
) -> Iterator[tuple[str, str, str, Interval, Interval]]:
    """Output, encoder, proposal, difference to the VAE, and the same without one image.

    SVI is left out: it has the VAE's decoder, so that by both proposals it is the VAE.
    """
    for output, found in methods.items():
        for encoder, own in found.items():
            for word, key in JUDGED.items() if encoder not in ("vae", "svi") else ():
                whole = paired(results, own, found.get("vae", []), key)
                if whole.n > 1:
                    rest = without_one_image(results, own, found["vae"], key)
                    yield output, encoder, word, whole, rest


def p_value(difference: Interval) -> float:
    """Two-sided p of Student's t for a mean of zero, from a 95% interval over seeds."""
    error = (difference.high - difference.value) / stats.t.ppf(0.975, difference.n - 1)
    return float(2 * stats.t.sf(abs(difference.value / error), difference.n - 1))


def chance_note(pairs: Pairs) -> str:
    """How many differences to the VAE would lie above zero by chance, and which do.

    Args:
        pairs: GPVAE minus each other method, by profile, output and proposal; see
            `findings.against`.
    """
    found = {key: line["vae"] for key, line in pairs.items() if "vae" in line}
    found = {key: difference for key, difference in found.items() if difference.n > 1}
    lines = len({(profile, output) for profile, output, _ in found})
    above = [
        f"{profile} ({output}, {word}) p = {p:.2g}, corrected {min(1.0, lines * p):.2g}"
        for (profile, output, word), difference in found.items()
        if answer(difference) == SUPPORTS
        for p in (p_value(difference),)
    ]
    return (
        f"GPVAE is compared with the VAE in {lines} lines by each proposal, of which "
        f"{0.025 * lines:.1f} would have an interval above zero by chance. Above zero "
        f"(corrected: Bonferroni, by the number of lines): {'; '.join(above) or 'none'}."
    )


def without_one_image(
    results: Results, a: Sequence[Row], b: Sequence[Row], quantity: str
) -> Interval:
    """The paired difference a - b without the one image whose difference, averaged over seeds, lies
    farthest from the median image's.
    """
    differences = np.array([left - right for left, right in paired_values(results, a, b, quantity)])
    of_image = differences.mean(0)
    farthest = np.abs(of_image - np.median(of_image)).argmax()
    return mean_interval(np.delete(differences, farthest, axis=1).mean(1))
