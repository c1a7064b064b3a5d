"""Sets of runs by name, and presets for the benchmark data sets.

A `Profile` is what `gpvae reproduce`, `gpvae sweep` and the notebooks work through.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from gpvae.config import METHODS, RunConfig, differences
from gpvae.errors import ConfigError, unknown


@dataclass(frozen=True)
class Profile:
    """A set of runs that share a base configuration.

    Args:
        base: configuration of every run, before encoder, seed and size are filled in.
        encoders: methods of the benchmark table.
        seeds: one run for each.
        outputs: output distributions of the benchmark table.
        train_sizes: sizes of the training-size curve; None is the base configuration's.
        settings: changes of the base configuration for single encoders, by encoder and output,
            as validation images chose them.
        variations: further runs by name of the question that they answer: changes of the base
            configuration, each run with every seed and the first output unless it names one.
        notebook_scale: in (0, 1], shrinks Monte Carlo sizes inside the notebooks.
        workers: processes that share the runs; None for one on each core. Starting them takes
            longer than very short runs.
    """

    name: str
    base: RunConfig
    encoders: tuple[str, ...] = ("vae", "gpvae")
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    outputs: tuple[str, ...] = ("gaussian", "bernoulli")
    train_sizes: tuple[int | None, ...] = (None,)
    settings: Mapping[tuple[str, str], Mapping[str, Any]] = field(default_factory=dict)
    variations: Mapping[str, tuple[Mapping[str, Any], ...]] = field(default_factory=dict)
    notebook_scale: float = 1.0
    workers: int | None = None

    def runs(
        self, output: str | None = None, train_sizes: tuple[int | None, ...] = (None,)
    ) -> list[RunConfig]:
        """All runs of the table (every encoder and seed), for one output or all of them."""
        return [
            self.base.override(
                **{
                    "data.train_size": size or self.base.data.train_size,
                    "model.encoder": encoder,
                    "model.output": out,
                    "seed": seed,
                    # SVI takes the VAE's weights, so it is trained as the VAE is.
                    **self.settings.get(("vae" if encoder == "svi" else encoder, out), {}),
                }
            )
            for out in ([output] if output else self.outputs)
            for size in train_sizes
            for encoder in self.encoders
            for seed in self.seeds
        ]

    def variation(self, name: str) -> list[RunConfig]:
        """The runs of one entry of `variations`, each once, seeds innermost."""
        runs = [run for changes in self.variations[name] for run in self.setting(name, changes)]
        return list(dict.fromkeys(runs))

    def setting(self, name: str, changes: Mapping[str, Any]) -> list[RunConfig]:
        """The runs of one setting of a variation, one for each seed unless it names its own.

        They start from the settings of their encoder, except for those that chose the settings,
        whose names begin with `tuning`.
        """
        changes = {"model.output": self.outputs[0], **changes}
        encoder = changes.get("model.encoder", self.base.model.encoder)
        chosen = {} if name.startswith("tuning") else self.settings
        changes = {**chosen.get((encoder, changes["model.output"]), {}), **changes}
        runs = [self.base.override(**{"seed": seed, **changes}) for seed in self.seeds]
        return list(dict.fromkeys(runs))

    def size_runs(self) -> list[RunConfig]:
        """The runs of the training-size curve that are not runs of the table, for one output."""
        sizes = tuple(n for n in self.train_sizes if n is not None)
        curve = ("vae", "gpvae")
        return [
            config.override(**{"evaluation.gaps": False})
            for config in self.runs(self.outputs[0], sizes)
            if config.model.encoder in curve
        ]

    def jobs(self) -> list[RunConfig]:
        """Every run of the profile, each once.

        Raises:
            ConfigError: two runs that differ in something which their names do not tell.
        """
        jobs = [*self.runs(), *self.size_runs()]
        jobs += [run for name in self.variations for run in self.variation(name)]
        by_name: dict[str, RunConfig] = {}
        for job in jobs:
            first = by_name.setdefault(job.name, job)
            # The training-size curve and the table share runs, of which only the table needs gaps.
            changed = [] if first == job else differences(first.to_dict(), job.to_dict())
            if any(not line.startswith("evaluation.gaps:") for line in changed):
                raise ConfigError(
                    f"two runs of the profile {self.name} are called {job.name} and differ: "
                    f"{'; '.join(changed)}. Give one of them a profile of its own."
                )
        return list(by_name.values())


def _paper_presets() -> dict[str, RunConfig]:
    """A configuration for each data set of the paper's line of work, at D = 20 and D = 50."""
    small = {"model.hidden": (500, 500)}
    grey = {"model.network": "conv", "model.channels": (32, 64), "model.hidden": (256,)}
    colour = {"model.network": "conv", "model.channels": (64, 128, 256), "model.hidden": (256,)}
    large = colour | {"model.channels": (32, 64, 128, 256)}
    networks = {
        "mnist": small,
        "mnist-conv": grey,
        "fashion-mnist": small,
        "omniglot": small,
        "omniglot-28x28-rederived": small,
        "frey": small,
        "frey-conv": grey,
        "svhn": colour,
        "cifar10": colour,
        "cifar10-subset": colour,
        "celeba": large,
    }
    common = {
        "training.epochs": 2000,
        "training.learning_rate": 5e-4,
        "training.compile": True,
        "evaluation.samples": 5000,
    }
    return {
        f"{name}-d{dim}": RunConfig().override(
            **{
                "data.name": name.removesuffix("-conv"),
                "model.latent_dim": dim,
                **common,
                **network,
            }
        )
        for name, network in networks.items()
        for dim in (20, 50)
    }


PRESETS = _paper_presets()


def _cpu_presets() -> dict[str, RunConfig]:
    """Real images, small enough for every method and seed on two CPU cores in hours."""
    common = {
        "data.train_size": 10_000,
        "data.valid_size": 1000,
        "data.test_size": 500,
        "model.latent_dim": 20,
        "model.hidden": (200, 200),
        "model.activation": "elu",
        "model.vlae.steps": 1,
        "training.epochs": 30,
        "training.learning_rate": 4e-3,
        "training.schedule": "cosine",
        "training.evaluate_every": 5,
        "training.valid_samples": 4,
        "evaluation.samples": 1000,
        "evaluation.elbo_samples": 200,
    }
    mnist, omniglot = "mnist", "omniglot-28x28-rederived"
    colour = {"data.name": "cifar10-subset", "data.train_size": 7000}
    sets = {
        "mnist": {"data.name": mnist, "evaluation.outliers": omniglot},
        "mnist-d50": {"data.name": mnist, "model.latent_dim": 50},
        # At 30 epochs the bound still rises: does the comparison change when it does not?
        "mnist-long": {"data.name": mnist, "training.epochs": 120},
        "omniglot": {"data.name": omniglot, "evaluation.outliers": mnist},
        "cifar10": colour,
        # MNIST's step size leaves the seeds on different plateaus: half of it.
        "cifar10-slow": colour | {"training.learning_rate": 2e-3},
        # 1,965 images: more epochs, so that there are as many steps.
        "frey": {"data.name": "frey", "training.epochs": 200, "data.train_size": None}
        | {"data.valid_size": None, "data.test_size": None},
    }
    return {key: RunConfig().override(**{**common, **changes}) for key, changes in sets.items()}


CPU_PRESETS = _cpu_presets()


VALIDATION = {"evaluation.part": "valid", "evaluation.gaps": False, "evaluation.outliers": ""}


def _shared_candidates() -> tuple[dict[str, Any], ...]:
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


def _candidates(
    first_rate: float, epochs: int, outputs: tuple[str, ...]
) -> tuple[dict[str, Any], ...]:
    """Eight for each method and output; its own validation bound picks one (`settings`).

    Args:
        first_rate: the step size of the base configuration; half and multiples of it are tried.
        epochs: of each candidate.
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
        "rme": grid({f"model.mixture.{key}": values for key, values in rme.items()}),
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
        {"model.encoder": encoder, "model.output": output, **changes, **common}
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


def _gp_regimes() -> dict[str, tuple[dict[str, Any], ...]]:
    """GPVAE with one option changed at a time: where might random functions help?"""

    def each(key: str, values: tuple[Any, ...], **more: Any) -> tuple[dict[str, Any], ...]:
        return tuple({"model.encoder": "gpvae", key: value, **more} for value in values)

    def scarce(size: int) -> tuple[dict[str, Any], ...]:
        return each("model.gp.features", (20, 100, 400, 1600), **{"data.train_size": size})

    marginal = {"model.gp.bound": "marginal"}
    both = ({"model.encoder": "vae"}, {"model.encoder": "gpvae"})
    tempered = {"model.gp.temperature": 0.1}
    dims = [{"model.latent_dim": dim} for dim in (2, 10, 32)]
    sizes = [{"data.train_size": size} for size in (100, 250, 600)]
    return {
        "features": each("model.gp.features", (20, 100, 400, 1600)),
        "amplitude": each("model.gp.amplitude", (0.3, 1.0, 3.0, 10.0)),
        "temperature": (
            NOISELESS,
            *each("model.gp.temperature", (0.0, 0.1, 1.0, 10.0)),
        ),
        "initial-std": each("model.gp.initial_std", (0.01, 0.1, 1.0)),
        "covariance": each("model.gp.covariance", ("diagonal", "low-rank", "full")),
        "residual": each("model.gp.residual", (False, True))
        + each("model.gp.residual", (False, True), **marginal),
        # The VAE of that dimension or size is what it is compared with.
        "latent-dim": tuple(method | dim for method in both for dim in dims),
        "train-size": tuple(
            method | size for method in (*both, both[1] | tempered) for size in sizes
        ),
        "scaling": tuple(c for size in (100, 250, 600) for c in scarce(size)),
    }


def _burda() -> Profile:
    """The one-layer model of Burda et al. (2016), table 1, on dynamically binarised MNIST.

    Published log p(x), S = 5000: -86.76 nats for k = 1, -84.78 for k = 50 importance samples, after
    3,280 epochs of batches of 20 at a learning rate that falls from 0.001 to 0.0001.
    """
    base = RunConfig().override(
        **{
            "data.name": "mnist",
            "data.valid_size": 1000,
            "model.latent_dim": 50,
            "model.hidden": (200, 200),
            "model.activation": "tanh",
            "model.output": "bernoulli",
            "training.epochs": 200,
            "training.batch_size": 100,
            "training.learning_rate": 1e-3,
            "training.schedule": "cosine",
            "training.patience": 200,
            "training.compile": True,
            "evaluation.samples": 5000,
            "evaluation.elbo_samples": 100,
            "evaluation.gaps": False,
        }
    )
    weighted = {
        "model.importance_samples": 50,
        "training.epochs": 60,
        "training.valid_samples": 50,
    }
    return Profile(
        "burda",
        base,
        encoders=("vae",),
        seeds=(0,),
        outputs=("bernoulli",),
        variations={"importance-weighted": (weighted,)},
    )


def _step_counts() -> tuple[dict[str, Any], ...]:
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
}


def _profiles() -> dict[str, Profile]:
    # Few steps an epoch, hence the step size; both values by the VAE's validation bound.
    digits = RunConfig().override(
        **{
            "model.activation": "elu",
            "training.learning_rate": 2e-3,
            "training.patience": 80,
        }
    )
    smoke = digits.override(
        **{
            "data.train_size": 256,
            "data.test_size": 64,
            "model.hidden": (32,),
            "model.latent_dim": 4,
            "model.gp.features": 20,
            "training.epochs": 20,
            "evaluation.samples": 20,
            "evaluation.elbo_samples": 10,
        }
    )
    return {
        "smoke": Profile(
            "smoke",
            smoke,
            seeds=(0, 1),
            train_sizes=(64, None),
            variations={
                "features": tuple(
                    {"model.encoder": "gpvae", "model.gp.features": m} for m in (5, 20)
                ),
                "scaling": (
                    {"model.encoder": "gpvae", "model.gp.features": 5, "data.train_size": 64},
                ),
            },
            notebook_scale=0.05,
            workers=1,
        ),
        "digits": Profile(
            "digits", digits, train_sizes=(100, 250, 600, None), settings=DIGITS_SETTINGS
        ),
        "rivals": Profile(
            "rivals",
            digits,
            encoders=METHODS,
            seeds=(0, 1, 2),
            settings=DIGITS_SETTINGS,
            variations={
                "steps": _step_counts(),
                "tuning-each": _candidates(2e-3, 200, ("gaussian", "bernoulli")),
            },
        ),
        "burda": _burda(),
        "regimes": Profile(
            "regimes",
            digits.override(**{"evaluation.gaps": False}),
            outputs=("gaussian",),
            variations=_gp_regimes(),
        ),
        "cpu": Profile(
            "cpu",
            CPU_PRESETS["mnist"],
            encoders=METHODS,
            # What `tuning-each` chose on MNIST, where it is not the base configuration.
            settings={
                ("gpvae", "gaussian"): {"model.gp.features": 400},
                ("vlae", "gaussian"): {"model.vlae.rate": 1.0},
            },
            variations={
                "tuning": _shared_candidates(),
                "tuning-each": _candidates(4e-3, 15, ("gaussian",)),
            },
        ),
        "paper": Profile("paper", PRESETS["mnist-d50"], train_sizes=(500, 2000, 10000, None)),
    }


PROFILES = _profiles()


# A run's name does not tell widths apart, so each has a profile of its own.
WIDTHS = {
    name: PROFILES["regimes"].base.override(**{"model.hidden": hidden})
    for name, hidden in {"small": (20,), "large": (400, 400)}.items()
}
BERNOULLI = {"bernoulli": PROFILES["regimes"].base.override(**{"model.output": "bernoulli"})}
# As many epochs as k = 50 had, and half of the published ones.
EPOCHS = {
    name: PROFILES["burda"].base.override(
        **{"training.epochs": epochs, "training.patience": epochs}
    )
    for name, epochs in {"short": 60, "long": 1640}.items()
}
# Is it the noise that helps, or the larger encoder?
PRESET_VARIATIONS = {
    "cpu/mnist-long": {
        "temperature": (
            NOISELESS,
            *({"model.encoder": "gpvae", "model.gp.temperature": t} for t in (0.0, 1.0)),
        )
    }
}
FAMILIES = {"paper": PRESETS, "cpu": CPU_PRESETS, "regimes": WIDTHS | BERNOULLI, "burda": EPOCHS}


def get_profile(name: str) -> Profile:
    """The profile of that name; `paper/PRESET` and `cpu/PRESET` choose data set and dimension,
    `regimes/small` and `regimes/large` the width of the networks, `regimes/bernoulli` the output,
    `burda/short` and `burda/long` the number of epochs.

    Raises:
        ConfigError: unknown name; the nearest is suggested. A family without a preset.
    """
    family, _, preset = name.partition("/")
    if family not in PROFILES:
        raise ConfigError(unknown("profile", name, [*PROFILES, *(f"{f}/PRESET" for f in FAMILIES)]))
    presets = FAMILIES.get(family, {})
    if not preset and PROFILES[family].base in presets.values():  # two folders for one profile
        choice = ", ".join(f"{family}/{p}" for p in presets)
        raise ConfigError(f"profile {name!r} is a family; choose one of {choice}.")
    if not preset:
        return PROFILES[family]
    if preset not in presets:
        known = [f"{f}/{p}" for f, each in FAMILIES.items() for p in each]
        raise ConfigError(unknown("preset", name, known))
    found = PROFILES[family]
    base = presets[preset]
    in_grey_levels = family == "cpu" and base.data.name in ("cifar10-subset", "frey")
    one = in_grey_levels or family == "regimes"
    outputs = (base.model.output,) if one else found.outputs
    same = base.override(**{"model.output": found.base.model.output}) == found.base
    # What was chosen on the family's first data set holds for the others, and is not chosen again.
    variations = found.variations if same else PRESET_VARIATIONS.get(name, {})
    return replace(
        found,
        name=name,
        base=base,
        outputs=outputs,
        variations=variations,
        train_sizes=found.train_sizes if same else (None,),
    )
