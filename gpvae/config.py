"""Configurations as frozen dataclasses of plain values; a `RunConfig` is enough to repeat a run."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar

from gpvae.errors import ConfigError, unknown

T = TypeVar("T")

OUTPUTS = ("bernoulli", "gaussian", "logistic", "pixel-gaussian")
NETWORKS = ("conv", "mlp")
PRECISIONS = ("bfloat16", "float32", "tf32")
SCHEDULES = ("constant", "cosine")
BOUNDS = ("expected", "marginal")
COVARIANCES = ("diagonal", "full", "low-rank")
ACTIVATIONS = ("elu", "relu", "tanh")
MOST_STEPS = 1000  # of an encoder's refinement; far above any use, against typing errors
PARTS = ("test", "valid")
NOT_WEIGHTED = {  # encoders without an importance-weighted objective, and why
    "me": "samples of a mixture carry no gradient of its weights",
    "rme": "samples of a mixture carry no gradient of its weights",
    "savae": "its inner steps ascend the ELBO",
}
REFITS = ("all", "weights")
METHODS = ("vae", "gpvae", "svi", "savae", "iaf", "hf", "me", "rme", "vlae")


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they are split. Sizes of None mean all there is."""

    name: str = "digits"
    train_size: int | None = None
    valid_size: int | None = None
    test_size: int | None = None
    seed: int = 0  # of the split and of the fixed binarisation of validation and test images


@dataclass(frozen=True)
class GPConfig:
    """The random functions of GPVAE; other encoders ignore it.

    Args:
        features: M, the number of kernel features psi(x).
        amplitude: kernel amplitude a; psi = a tanh(.) / sqrt(M), so that k(x, x) <= a^2.
        temperature: factor on the weight KL; 1 is the plain Bayesian objective.
        covariance: form of each row's posterior covariance.
        rank: rank of the low-rank part.
        initial_std: posterior standard deviation of each weight at the start (prior: 1).
        random_mean, random_std: which of f and h is random; the other is deterministic.
        residual: give f(x) a further, independent error e(x) ~ N(0, r(x)^2) for each image, with
            r(x) from the encoder, which no posterior over weights can express.
        bound: "expected" is E_{f, h} ELBO, the paper's; "marginal" is the tighter ELBO of the
            predictive density q(z | x) = E_{f, h} q(z | x, f, h).
    """

    features: int = 100
    amplitude: float = 1.0
    temperature: float = 1.0
    covariance: str = "diagonal"
    rank: int = 4
    initial_std: float = 0.1
    random_mean: bool = True
    random_std: bool = True
    residual: bool = False
    bound: str = "expected"


@dataclass(frozen=True)
class FlowConfig:
    """The flows, IAF and Householder; other encoders ignore it.

    Args:
        steps: K, from 0 (the VAE) to 100.
        hidden: H, hidden units of each IAF step, at least the latent dimension.
        context: C, size of the encoder's message to the IAF steps.
    """

    steps: int = 4
    hidden: int = 100
    context: int = 50

    def __post_init__(self) -> None:
        _check_range("model.flow.steps", self.steps, 0, 100)
        _check_range("model.flow.hidden", self.hidden, 1, 100_000)
        _check_range("model.flow.context", self.context, 1, 100_000)


@dataclass(frozen=True)
class MixtureConfig:
    """The mixture encoders, joint (ME) and recursive (RME); the last four are RME's alone.

    Args:
        components: M, from 1 (the VAE) to 100.
        divergence_bound: C, in nats: most that a sample's log q - log Q counts for a new component.
        first_share: share of the epochs before the second component.
        fit_share: share of each later stage in which the new component alone is fitted.
        refit: what follows the mixture's bound afterwards, "all" or "weights" (and decoder).
    """

    components: int = 3
    divergence_bound: float = 1.0
    first_share: float = 0.5
    fit_share: float = 0.3
    refit: str = "all"

    def __post_init__(self) -> None:
        _check_range("model.mixture.components", self.components, 1, 100)
        _check_range("model.mixture.divergence_bound", self.divergence_bound, 0, 1e6)
        _check_range("model.mixture.first_share", self.first_share, 0, 1)
        _check_range("model.mixture.fit_share", self.fit_share, 0, 1)
        if self.refit not in REFITS:
            raise ConfigError(unknown("refit", self.refit, REFITS))


@dataclass(frozen=True)
class SAVAEConfig:
    """The refinement steps of SA-VAE; other encoders ignore it.

    Args:
        steps: T; 0 is the VAE.
        learning_rate: of gradient ascent on each image's bound (mean and log std).
        momentum: of the ascent, in [0, 1).
        clip: largest norm of an image's gradient in one step; 0 does not clip.
        samples: posterior samples for each inner gradient.
        detach: leave the inner gradients out of the training gradient (first order).
    """

    steps: int = 4
    learning_rate: float = 0.05
    momentum: float = 0.5
    clip: float = 5.0
    samples: int = 1
    detach: bool = False

    def __post_init__(self) -> None:
        _check_steps("model.savae.steps", self.steps)
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ConfigError(
                f"model.savae.learning_rate is {self.learning_rate}; expected a positive number."
            )
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"model.savae.momentum is {self.momentum}; expected 0 <= it < 1.")
        if not self.clip >= 0:
            raise ConfigError(f"model.savae.clip is {self.clip}; expected 0 (none) or more.")
        if self.samples < 1:
            raise ConfigError(f"model.savae.samples is {self.samples}; expected at least 1.")


@dataclass(frozen=True)
class VLAEConfig:
    """The Newton-like steps of VLAE; other encoders ignore it.

    Args:
        steps: T; 0 is the VAE.
        rate: fraction of the first Newton step that is taken; 1 is undamped.
        decay: step t = 0, 1, ... takes the fraction rate / (t + 1)^decay; 1 in the authors' code.
    """

    steps: int = 4
    rate: float = 0.5
    decay: float = 0.0

    def __post_init__(self) -> None:
        _check_steps("model.vlae.steps", self.steps)
        if not 0 < self.rate <= 1:
            raise ConfigError(f"model.vlae.rate is {self.rate}; expected a number in (0, 1].")
        if not 0 <= self.decay < math.inf:
            raise ConfigError(f"model.vlae.decay is {self.decay}; expected 0 or more.")


def _check_steps(key: str, steps: int) -> None:
    if not 0 <= steps <= MOST_STEPS:
        raise ConfigError(f"{key} is {steps}; expected 0 (the VAE) to {MOST_STEPS}.")


@dataclass(frozen=True)
class ModelConfig:
    """Encoder, decoder and output distribution.

    Args:
        encoder: name of the method.
        latent_dim: D.
        network: "mlp", or "conv" for convolutions below the hidden layers.
        hidden: widths of the encoder's fully connected layers; the decoder mirrors them.
        channels: of the convolutions, each of which halves the image; for "conv" only.
        activation: after every layer.
        output: distribution of the pixels.
        levels: grey levels of the data, for the "logistic" output and for dequantisation.
        dequantise: add uniform noise of one grey level; for the "gaussian" output only.
        importance_samples: k of the training objective E log 1/k sum_k p(x, z) / q(z | x) of
            importance-weighted autoencoders; 1 is the ELBO.
        precision: of the arithmetic inside the networks: "float32" (the reference), "tf32" (its
            matrix products rounded to 10 bits on GPUs that can) or "bfloat16"; densities are
            never below float32.
        gp, flow, mixture, savae, vlae: options of single encoders.
    """

    encoder: str = "vae"
    latent_dim: int = 10
    network: str = "mlp"
    hidden: tuple[int, ...] = (100, 100)
    channels: tuple[int, ...] = (32, 64)
    activation: str = "relu"
    output: str = "gaussian"
    levels: int = 256
    dequantise: bool = False
    importance_samples: int = 1
    precision: str = "float32"
    gp: GPConfig = field(default_factory=GPConfig)
    savae: SAVAEConfig = field(default_factory=SAVAEConfig)
    vlae: VLAEConfig = field(default_factory=VLAEConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    mixture: MixtureConfig = field(default_factory=MixtureConfig)

    @property
    def count(self) -> int | None:
        """T, K or M: the number of steps, flows or components; None for encoders without one."""
        return {
            "hf": self.flow.steps,
            "iaf": self.flow.steps,
            "me": self.mixture.components,
            "rme": self.mixture.components,
            "savae": self.savae.steps,
            "vlae": self.vlae.steps,
        }.get(self.encoder)

    @property
    def method(self) -> str:
        """The encoder with its number of steps or components, such as `iaf4`; for GPVAE with the
        options that differ from the defaults, such as `gpvae-features800`.
        """
        weighted = f"-iw{self.importance_samples}" if self.importance_samples > 1 else ""
        if self.encoder == "gpvae":
            defaults = asdict(GPConfig())
            changed = {k: v for k, v in asdict(self.gp).items() if v != defaults[k]}
            return "-".join(["gpvae", *(f"{k}{v}" for k, v in changed.items())]) + weighted
        count = "" if self.count is None else self.count
        return f"{self.encoder}{count}{weighted}"


@dataclass(frozen=True)
class TrainingConfig:
    """Optimisation. Adam 5e-4 and batch 128 follow Park et al. (2019).

    Args:
        epochs: at most this many passes over the training images.
        patience: stop after this many epochs without a better validation bound.
        evaluate_every: epochs between two validation bounds (and checkpoints).
        valid_samples: posterior samples per image for the validation bound.
        clip_norm: largest gradient norm.
        schedule: of the learning rate over the epochs: "constant", or "cosine" down to zero.
        kl_warmup: epochs over which the factor of the KL rises from 0 to 1.
        average: decay of a moving average of the weights, per step; it is what is validated and
            kept. 0 keeps the weights themselves.
        capture: replay the training step as a CUDA graph; the eager loop is the reference.
        compile: fuse the kernels of a captured step with torch.compile, which takes some ten
            seconds first and pays in long runs; not for `savae`, `vlae` and `rme`, nor for seeds
            that are trained together.
        device: "cpu", "cuda" or "auto" (cuda if there is one).
        threads: CPU threads of one run; one suits small networks, and whole runs side by side
            use the other cores.
    """

    epochs: int = 500
    batch_size: int = 128
    learning_rate: float = 5e-4
    patience: int = 100
    evaluate_every: int = 10
    valid_samples: int = 8
    clip_norm: float = 100.0
    schedule: str = "constant"
    kl_warmup: int = 0
    average: float = 0.0
    capture: bool = True
    compile: bool = False
    device: str = "auto"
    threads: int = 1


@dataclass(frozen=True)
class EvaluationConfig:
    """Estimates of the trained model.

    Args:
        part: images that they are made on: "test", or "valid" for runs that choose
            hyperparameters and must not see the test images.
        samples: S, importance samples; even with `gaps`, where two proposals share them.
        elbo_samples: posterior samples of each bound.
        gaps: whether to optimise each image's posterior.
        outliers: name of a data set of the same image shape, as many of whose test images get a
            bound and scores, to see whether these tell them apart; empty for none.
        seed: of the noise of bounds and estimates, whatever the training's seed; from 1 (at which
            the optimised bound and the own log p(x) share their draws), as 0 would share those of
            log p(x) and the optimised bound, which are subtracted.
    """

    part: str = "test"
    samples: int = 500
    elbo_samples: int = 1000
    gaps: bool = True
    outliers: str = ""
    seed: int = 1


@dataclass(frozen=True)
class RunConfig:
    """One run: data, model, training, evaluation and the seed of weights, order and noise."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self)

    @property
    def name(self) -> str:
        """What the run is called in rows and folders; its hash tells configurations apart."""
        size = self.data.train_size or "all"
        model = self.model
        candidate = f"-tuning{self.hash()[:6]}" if self.evaluation.part == "valid" else ""
        return (
            f"{_label(self.data.name)}-{model.output}-d{model.latent_dim}-n{size}"
            f"-{model.method}{candidate}-s{self.seed}"
        )

    def override(self, values: Mapping[str, Any] | None = None, /, **more: Any) -> RunConfig:
        """A changed copy; nested keys are dotted: `override({"model.gp.features": 50}, seed=1)`."""
        tree = asdict(self)
        for key, value in {**(values or {}), **more}.items():
            _set(tree, key, value)
        return from_dict(RunConfig, tree)

    def for_training(self) -> RunConfig:
        """What is trained for this run: runs for which it is equal share their weights.

        How a model is evaluated does not matter, and SVI is the VAE until it is evaluated.
        """
        encoder = "vae" if self.model.encoder == "svi" else self.model.encoder
        model = replace(self.model, encoder=encoder)
        return replace(self, model=model, evaluation=EvaluationConfig())

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionary, as stored in rows and checkpoints (tuples become lists)."""
        return json.loads(json.dumps(asdict(self)))

    def hash(self) -> str:
        """First 16 hexadecimal digits of SHA-256 over the canonical JSON form."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _label(data: str) -> str:
    """A data set in a run's name: of a path its last part and a digest of the whole, since names
    become those of files.
    """
    if not set(data) & set("/\\"):
        return data
    last = data.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
    return f"{last}-{hashlib.sha256(data.encode()).hexdigest()[:6]}"


def check_names(configs: Iterable[RunConfig]) -> None:
    """Raise ConfigError if two of these runs differ in something that their names do not tell."""
    by_name: dict[str, RunConfig] = {}
    for config in configs:
        first = by_name.setdefault(config.name, config)
        if first != config:
            changed = "; ".join(differences(first.to_dict(), config.to_dict()))
            raise ConfigError(
                f"two runs are called {config.name} and differ: {changed}. Rows are told apart by "
                "name: do them one after the other, or give one a profile of its own."
            )


def from_dict(kind: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """Build a configuration from nested plain values.

    Raises:
        ConfigError: a key that the dataclass does not have (the nearest is suggested) or a value
            of the wrong type.
    """
    known = {f.name: f for f in fields(kind)}
    defaults = kind()
    result: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise ConfigError(unknown("configuration key", prefix + key, _paths(kind, prefix)))
        result[key] = _convert(getattr(defaults, key), value, prefix + key)
    return kind(**result)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What changed between two configurations, as `key: old -> new` lines."""
    lines = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a} -> {b}")
    return lines


def _paths(kind: type, prefix: str = "") -> Iterator[str]:
    defaults = kind()
    for f in fields(kind):
        value = getattr(defaults, f.name)
        if is_dataclass(value):
            yield from _paths(type(value), f"{prefix}{f.name}.")
        else:
            yield prefix + f.name


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    node: Any = tree
    for parent in parents:
        node = node.get(parent) if isinstance(node, dict) else None
    if not isinstance(node, dict) or last not in node or isinstance(node[last], dict):
        raise ConfigError(unknown("configuration key", key, _paths(RunConfig)))
    node[last] = value


def _convert(default: Any, value: Any, key: str) -> Any:
    """Accept a value of the default's type; JSON's lists become tuples, ints become floats."""
    if is_dataclass(default):
        if is_dataclass(value):
            return value
        return from_dict(type(default), value, key + ".")
    if isinstance(default, tuple) and isinstance(value, list | tuple):
        return tuple(_convert(default[0], each, f"{key}[{i}]") for i, each in enumerate(value))
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if default is None:
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            return value
    elif type(value) is type(default):
        return value
    example = f", such as {json.dumps(default)}" if isinstance(default, tuple) else ""
    expected = ("int or None" if default is None else type(default).__name__) + example
    raise ConfigError(f"{key} is {value!r} ({type(value).__name__}); expected {expected}.")


def _check_range(key: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{key} is {value}; expected a number from {low} to {high}.")


def _check(config: RunConfig) -> None:
    m, gp, t, e = config.model, config.model.gp, config.training, config.evaluation
    for kind, value, known in (
        ("output distribution", m.output, OUTPUTS),
        ("activation", m.activation, ACTIVATIONS),
        ("network", m.network, NETWORKS),
        ("precision", m.precision, PRECISIONS),
        ("schedule", t.schedule, SCHEDULES),
        ("part of the data for evaluation", e.part, PARTS),
        ("covariance", gp.covariance, COVARIANCES),
        ("bound", gp.bound, BOUNDS),
    ):
        if value not in known:
            raise ConfigError(unknown(kind, value, known))
    positive = {
        "model.latent_dim": m.latent_dim,
        "model.importance_samples": m.importance_samples,
        "model.gp.features": gp.features,
        "model.gp.rank": gp.rank,
        "model.gp.amplitude": gp.amplitude,
        "model.gp.initial_std": gp.initial_std,
        "training.epochs": t.epochs,
        "training.batch_size": t.batch_size,
        "training.learning_rate": t.learning_rate,
        "training.patience": t.patience,
        "training.evaluate_every": t.evaluate_every,
        "training.valid_samples": t.valid_samples,
        "training.clip_norm": t.clip_norm,
        "training.threads": t.threads,
        "evaluation.samples": e.samples,
        "evaluation.elbo_samples": e.elbo_samples,
        "evaluation.seed": e.seed,
    }
    sizes = {name: getattr(config.data, name) for name in ("train_size", "valid_size", "test_size")}
    positive |= {f"data.{name}": size for name, size in sizes.items() if size is not None}
    positive["model.levels - 1"] = m.levels - 1
    for name in ("hidden", "channels"):
        widths = enumerate(getattr(m, name))
        positive |= {f"model.{name}[{i}]": width for i, width in widths}
    for key, value in positive.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"{key} is {value}; expected a positive number.")
    if e.gaps and e.samples % 2:
        raise ConfigError(
            f"evaluation.samples is {e.samples}; with evaluation.gaps expected an even number, "
            "half for each of two proposals."
        )
    if m.network == "conv" and not m.channels:
        raise ConfigError("model.network is 'conv', but model.channels is empty.")
    if m.dequantise and m.output != "gaussian":
        raise ConfigError(f"model.dequantise goes with a gaussian output, not with {m.output}.")
    if m.importance_samples > 1 and m.encoder in NOT_WEIGHTED:
        raise ConfigError(
            f"model.importance_samples is {m.importance_samples} with encoder {m.encoder!r}: "
            f"{NOT_WEIGHTED[m.encoder]}. Expected 1, or another encoder."
        )
    if not 0 <= t.average < 1:
        raise ConfigError(f"training.average is {t.average}; expected 0 <= it < 1.")
    if t.kl_warmup < 0:
        raise ConfigError(f"training.kl_warmup is {t.kl_warmup}; expected 0 epochs or more.")
    for key, seed in (("seed", config.seed), ("data.seed", config.data.seed)):
        _check_range(key, seed, 0, 2**63 - 1)
    if gp.temperature < 0:
        raise ConfigError(f"model.gp.temperature is {gp.temperature}; expected 0 or more.")
