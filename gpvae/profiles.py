"""Sets of runs by name.

A `Profile` is what `gpvae reproduce`, `gpvae sweep` and the notebooks work through.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any

from gpvae.config import METHODS, OUTPUTS, RunConfig, check_names
from gpvae.errors import ConfigError, unknown
from gpvae.presets import CPU_PRESETS, PRESETS
from gpvae.variations import (
    DIGITS_SETTINGS,
    NOISELESS,
    candidates,
    gp_regimes,
    mnist_regimes,
    shared_candidates,
    step_counts,
)

DATA_TITLES = {
    "mnist": "MNIST",
    "fashion-mnist": "Fashion-MNIST",
    "omniglot": "OMNIGLOT",
    "omniglot-28x28-rederived": "OMNIGLOT (re-derived)",
    "cifar10-subset": "CIFAR-10 (subset)",
    "cifar10": "CIFAR-10",
    "frey": "Frey faces",
    "svhn": "SVHN",
    "celeba": "CelebA",
}


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

    Raises:
        ConfigError: a name that leaves the results folder, one value where a tuple is expected,
            settings of an encoder or an output that there is not.
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

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", self.name):
            raise ConfigError(
                f"the profile is called {self.name!r}; expected letters, digits, '-', '.' and '_', "
                "with '/' between parts, since its results lie in a folder of that name."
            )
        for key in ("encoders", "seeds", "outputs", "train_sizes"):
            value = getattr(self, key)
            if not isinstance(value, tuple | list):
                raise ConfigError(
                    f"{key} of the profile {self.name} is {value!r}; expected a tuple, such as "
                    f"{getattr(type(self), key)!r}."
                )
        if not 0 < self.notebook_scale <= 1 or (self.workers is not None and self.workers < 1):
            raise ConfigError(
                f"the profile {self.name} has notebook_scale={self.notebook_scale} and "
                f"workers={self.workers}; expected a number in (0, 1], and None or at least 1."
            )
        for encoder, output in self.settings:
            if encoder not in (*METHODS, *self.encoders):
                raise ConfigError(unknown("encoder in settings", encoder, METHODS))
            if output not in OUTPUTS:
                raise ConfigError(unknown("output distribution in settings", output, OUTPUTS))

    @property
    def title(self) -> str:
        """Data set, latent dimension and epochs in words, for figures."""
        return ", ".join(self.parts[:3])

    @property
    def parts(self) -> tuple[str, ...]:
        """Data set, latent dimension, epochs and step size in words."""
        base, training = self.base, self.base.training
        most = "up to " if training.patience < training.epochs / 2 else ""  # it may well stop early
        return (
            DATA_TITLES.get(base.data.name, base.data.name),
            f"D = {base.model.latent_dim}",
            f"{most}{training.epochs} epochs",
            f"step {training.learning_rate:g}",
        )

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
                    **self._chosen(encoder, out),
                }
            )
            for out in ([output] if output else self.outputs)
            for size in train_sizes
            for encoder in self.encoders
            for seed in self.seeds
        ]

    def _chosen(self, encoder: str, output: str) -> Mapping[str, Any]:
        """Settings of that encoder; SVI takes the VAE's weights, so it is trained as the VAE is."""
        return self.settings.get(("vae" if encoder == "svi" else encoder, output), {})

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
        chosen = self._chosen(encoder, changes["model.output"])
        changes = {**({} if name.startswith("tuning") else chosen), **changes}
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
        runs = [*self.runs(), *self.size_runs()]
        runs += [run for name in self.variations for run in self.variation(name)]
        jobs: dict[RunConfig, RunConfig] = {}
        for run in runs:
            # The training-size curve and the table share runs, of which only the table needs gaps.
            jobs.setdefault(run.override(**{"evaluation.gaps": False}), run)
        check_names(jobs.values())
        return list(jobs.values())


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
            settings=DIGITS_SETTINGS,
            variations={
                "steps": step_counts(),
                "tuning-each": candidates(2e-3, 200, ("gaussian", "bernoulli")),
            },
        ),
        "burda": _burda(),
        "regimes": Profile(
            "regimes",
            digits.override(**{"evaluation.gaps": False}),
            outputs=("gaussian",),
            variations=gp_regimes(),
        ),
        "cpu": Profile(
            "cpu",
            CPU_PRESETS["mnist"],
            encoders=METHODS,
            # What `tuning-each` chose on MNIST, where it is not the base configuration.
            settings={
                ("gpvae", "gaussian"): {"model.gp.features": 400},
                ("rme", "gaussian"): {"model.mixture.fit_share": 0.1},
                ("vlae", "gaussian"): {"model.vlae.rate": 1.0},
            },
            variations={
                "tuning": shared_candidates(),
                "tuning-each": candidates(4e-3, 15, ("gaussian",)),
            },
        ),
        "paper": Profile(
            "paper",
            PRESETS["mnist-d50"],
            encoders=METHODS,
            seeds=tuple(range(10)),
            train_sizes=(500, 2000, 10000, None),
            variations={"tuning-each": candidates(5e-4, 100, ("gaussian", "bernoulli"))},
        ),
    }


PROFILES = _profiles()


def titles(profiles: Sequence[Profile]) -> dict[str, str]:
    """Data sets by profile, with what tells profiles of one data set apart."""
    parts = {each.name: each.parts for each in profiles}
    found = {}
    for name, (data, *options) in parts.items():
        same = [other[1:] for other in parts.values() if other[0] == data]
        differ = [len(set(values)) > 1 for values in zip(*same, strict=True)]
        found[name] = ", ".join([data, *compress(options, differ)])
    return found


# A run's name does not tell widths apart, so each has a profile of its own.
WIDTHS = {
    name: PROFILES["regimes"].base.override(**{"model.hidden": hidden})
    for name, hidden in {"small": (20,), "large": (400, 400)}.items()
}
OTHERS = {
    "bernoulli": PROFILES["regimes"].base.override(**{"model.output": "bernoulli"}),
    "mnist": CPU_PRESETS["mnist"].override(
        **{"evaluation.gaps": False, "evaluation.outliers": "", "training.patience": 600}
    ),
}
# As many epochs as k = 50 had, and half of the published ones.
EPOCHS = {
    name: PROFILES["burda"].base.override(
        **{"training.epochs": epochs, "training.patience": epochs}
    )
    for name, epochs in {"short": 60, "long": 1640}.items()
}
# Is it the noise that helps, or the larger encoder?
PRESET_VARIATIONS = {
    "regimes/mnist": mnist_regimes(),
    "cpu/mnist-long": {
        "temperature": (
            NOISELESS,
            *({"model.encoder": "gpvae", "model.gp.temperature": t} for t in (0.0, 1.0)),
        )
    },
}
FAMILIES = {"paper": PRESETS, "cpu": CPU_PRESETS, "regimes": WIDTHS | OTHERS, "burda": EPOCHS}


def get_profile(name: str) -> Profile:
    """The profile of that name; `paper/PRESET` and `cpu/PRESET` choose data set and dimension,
    `regimes/small` and `regimes/large` the width of the networks, `regimes/bernoulli` the output,
    `regimes/mnist` the data set, `burda/short` and `burda/long` the number of epochs.

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
    # With a Bernoulli output MNIST's curves are flat after a quarter of these epochs.
    one = in_grey_levels or family == "regimes" or name == "cpu/mnist-longest"
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
