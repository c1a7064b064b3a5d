"""What the runs of a profile vary: searched settings, options of GPVAE, numbers of steps.

A setting is a dictionary of changes to the profile's base configuration, by dotted key.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

VALIDATION = {"evaluation.part": "valid", "evaluation.gaps": False, "evaluation.outliers": ""}


def shared_candidates() -> tuple[dict[str, Any], ...]:
    """Of these the VAE's validation bound picks one, with which all methods start."""
    return tuple(
        {
            "training.learning_rate": rate,
            "training.schedule": schedule,
            "model.activation": activation,
            "seed": 0,
            **VALIDATION,
        }
        for activation in ("relu", "elu")
        for schedule in ("constant", "cosine")
        for rate in (1e-3, 2e-3, 4e-3, 8e-3)
    )


def candidates(
    first_rate: float, epochs: int, outputs: tuple[str, ...]
) -> tuple[dict[str, Any], ...]:
    """Eight for each method and output; its own validation bound picks one (`settings`).

    Args:
        first_rate: the step size of the base configuration; half and multiples of it are tried.
        epochs: of each candidate; of RME's at least 30, since its phases are shares of them that
            must be some epochs long to differ.
        outputs: output distributions.
    """
    rate, warmup, gp = "training.learning_rate", "training.kl_warmup", "model.gp."
    two = (0.5 * first_rate, first_rate)
    plain = grid({rate: (*two, 2 * first_rate, 4 * first_rate), warmup: (0, 5)})
    iaf = {rate: two, "model.flow.hidden": (100, 200), "model.flow.context": (20, 50)}
    rme = {"first_share": (0.3, 0.5), "fit_share": (0.1, 0.3), "divergence_bound": (1.0, 5.0)}
    savae = {"learning_rate": (0.05, 0.2), "momentum": (0.5, 0.9), "clip": (0.0, 5.0)}
    each = {
        "vae": plain,
        "hf": plain,
        "me": plain,
        "iaf": grid(iaf),
        "rme": tuple(
            {**changes, "training.epochs": max(epochs, 30)}
            for changes in grid({f"model.mixture.{key}": values for key, values in rme.items()})
        ),
        "savae": grid({f"model.savae.{key}": values for key, values in savae.items()}),
        "vlae": grid({rate: two, "model.vlae.rate": (0.5, 1.0), warmup: (0, 5)}),
        "gpvae": (
            {},
            {gp + "features": 400},
            {gp + "amplitude": 0.3},
            {gp + "amplitude": 3.0},
            {gp + "temperature": 0.1},
            {gp + "covariance": "low-rank"},
            {gp + "initial_std": 0.01},
            {gp + "features": 400, gp + "amplitude": 3.0, gp + "temperature": 0.1},
        ),
    }
    common = {"training.epochs": epochs, "seed": 0, **VALIDATION}
    return tuple(
        {"model.encoder": encoder, "model.output": output, **common, **changes}
        for output in outputs
        for encoder, candidates in each.items()
        for changes in candidates
    )


def grid(values: Mapping[str, tuple[Any, ...]]) -> tuple[dict[str, Any], ...]:
    """Every combination of the values of some keys."""
    return tuple(dict(zip(values, chosen, strict=True)) for chosen in product(*values.values()))


# Nothing holds the weights' posterior open, and it starts all but shut: GPVAE's larger encoder as
# a plain function. With temperature 0 alone some of the noise of the start stays.
NOISELESS = {"model.encoder": "gpvae", "model.gp.temperature": 0.0, "model.gp.initial_std": 1e-6}


def _each(option: str, *values: Any, **more: Any) -> tuple[dict[str, Any], ...]:
    """GPVAE with each of these values of one option, and `more` changes."""
    return tuple({"model.encoder": "gpvae", f"model.gp.{option}": v, **more} for v in values)


_BOTH = ({"model.encoder": "vae"}, {"model.encoder": "gpvae"})
_MARGINAL = {"model.gp.bound": "marginal"}


def gp_regimes() -> dict[str, tuple[dict[str, Any], ...]]:
    """GPVAE with one option changed at a time: where might random functions help?"""

    def features(**more: Any) -> tuple[dict[str, Any], ...]:
        return _each("features", 20, 100, 400, 1600, **more)

    tempered = {"model.gp.temperature": 0.1}
    dims = [{"model.latent_dim": dim} for dim in (2, 10, 32)]
    sizes = [{"data.train_size": size} for size in (100, 250, 600)]
    return {
        "features": features(),
        "amplitude": _each("amplitude", 0.3, 1.0, 3.0, 10.0),
        "temperature": (NOISELESS, *_each("temperature", 0.0, 0.1, 1.0, 10.0)),
        "initial-std": _each("initial_std", 0.01, 0.1, 1.0),
        "covariance": _each("covariance", "diagonal", "low-rank", "full"),
        "residual": _each("residual", False, True) + _each("residual", False, True, **_MARGINAL),
        # The VAE of that dimension or size is what it is compared with.
        "latent-dim": tuple(method | dim for method in _BOTH for dim in dims),
        "train-size": tuple(
            method | size for method in (*_BOTH, _BOTH[1] | tempered) for size in sizes
        ),
        "scaling": tuple(change for size in sizes for change in features(**size)),
    }


def mnist_regimes() -> dict[str, tuple[dict[str, Any], ...]]:
    """The same question on MNIST: fewer settings, and as many training steps for every size."""
    few = {"data.train_size": 500, "training.epochs": 600}
    some = {"data.train_size": 2000, "training.epochs": 150}
    return {
        "features": _each("features", 50, 100, 400, 1600, 4000),
        "amplitude": _each("amplitude", 0.3, 1.0, 3.0),
        "temperature": (NOISELESS, *_each("temperature", 0.1, 1.0, 10.0)),
        "covariance": _each("covariance", "diagonal", "full"),
        "residual": _each("residual", False) + _each("residual", True, **_MARGINAL),
        "train-size": tuple(method | size for method in _BOTH for size in (few, some))
        + _each("features", 1600, **few),
    }


def step_counts() -> tuple[dict[str, Any], ...]:
    """Every rival at each number of steps, flows or components of its paper's tables."""
    keys = {
        "savae": ("model.savae.steps", (1, 2, 4, 8)),
        "iaf": ("model.flow.steps", (1, 2, 4, 8)),
        "hf": ("model.flow.steps", (1, 2, 4, 8)),
        "me": ("model.mixture.components", (2, 3, 4, 5)),
        "rme": ("model.mixture.components", (2, 3, 4, 5)),
        "vlae": ("model.vlae.steps", (1, 2, 4, 8)),
    }
    return tuple(
        {"model.encoder": encoder, key: count}
        for encoder, (key, counts) in keys.items()
        for count in counts
    )


# What `tuning-each` of the profile `rivals` chose on digits, where it is not the base's value.
DIGITS_SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    ("vae", "gaussian"): {"training.learning_rate": 4e-3, "training.kl_warmup": 5},
    ("gpvae", "gaussian"): {"model.gp.temperature": 0.1},
    ("hf", "gaussian"): {"training.learning_rate": 4e-3},
    ("me", "gaussian"): {"training.kl_warmup": 5},
    ("rme", "gaussian"): {"model.mixture.first_share": 0.3, "model.mixture.fit_share": 0.1},
    ("gpvae", "bernoulli"): {"model.gp.amplitude": 0.3},
    ("hf", "bernoulli"): {"training.learning_rate": 4e-3},
    ("me", "bernoulli"): {"training.kl_warmup": 5},
    ("iaf", "bernoulli"): {"model.flow.hidden": 200},
    ("rme", "bernoulli"): {
        "model.mixture.fit_share": 0.1,
        "model.mixture.divergence_bound": 5.0,
    },
    ("savae", "bernoulli"): {"model.savae.learning_rate": 0.2, "model.savae.clip": 0.0},
    ("vlae", "bernoulli"): {"training.kl_warmup": 5},
}
