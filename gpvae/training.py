"""The training loop: one function, top to bottom, and the checkpoint that it continues from."""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpvae.config import RunConfig, differences
from gpvae.data import Dataset
from gpvae.errors import CheckpointError, ConfigError, TrainingError, unknown
from gpvae.evaluate import elbo
from gpvae.gp import GPVAE
from gpvae.householder import HouseholderVAE
from gpvae.iaf import IAFVAE
from gpvae.mixtures import MixtureVAE, RecursiveMixtureVAE
from gpvae.outputs import make_output
from gpvae.savae import SAVAE
from gpvae.svi import SVI
from gpvae.vae import VAE
from gpvae.vlae import VLAE

MODELS: dict[str, type[VAE]] = {
    "vae": VAE,
    "gpvae": GPVAE,
    "iaf": IAFVAE,
    "hf": HouseholderVAE,
    "me": MixtureVAE,
    "rme": RecursiveMixtureVAE,
    "savae": SAVAE,
    "svi": SVI,
    "vlae": VLAE,
}
VALID_SEED = 7  # the validation bound uses the same noise at every epoch


@dataclass
class Trained:
    """What `train` returns.

    Args:
        model: with the weights of the best validation bound, on its device, in eval mode.
        history: one row per validation: epoch, losses and bounds in nats per image, seconds.
        best_epoch: epoch of those weights.
        best_valid_elbo: their validation bound, nats per image.
    """

    model: VAE
    history: list[dict[str, float]]
    best_epoch: int
    best_valid_elbo: float


def build_model(config: RunConfig, shape: tuple[int, int, int]) -> VAE:
    """A fresh model; its weights depend on the configuration's seed and on nothing else.

    Raises:
        ConfigError: unknown encoder.
    """
    name = config.model.encoder
    if name not in MODELS:
        raise ConfigError(unknown("encoder", name, MODELS))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return MODELS[name](shape, config.model)


def pick_device(name: str) -> torch.device:
    """The device that a configuration asks for; "auto" is cuda if there is one.

    Raises:
        ConfigError: cuda without a usable GPU, or an unknown name.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise ConfigError(unknown("device", name, ("auto", "cpu", "cuda")))
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r} was asked for, but torch sees no GPU; use 'auto'.")
    return torch.device(name)


def train(
    config: RunConfig,
    data: Dataset,
    folder: Path | None = None,
    model: VAE | None = None,
    log: Callable[[str], None] | None = None,
) -> Trained:
    """Train one model; the weights with the best validation bound are returned.

    With a folder, a checkpoint is kept there and a run that was killed continues from it. On the
    CPU, with the same number of threads, the continued run ends with the same bits.

    Args:
        config: the run.
        data: its images; kept on the device as a whole.
        folder: where `checkpoint.pt` lives; None keeps nothing.
        model: a model to train in place of a fresh one (for example with a frozen decoder).
        log: called with a line now and then.

    Raises:
        ConfigError: unknown encoder or device.
        CheckpointError: the folder's checkpoint is damaged or of another configuration.
        TrainingError: a loss that is not finite; the last good checkpoint stays.
    """
    t = config.training
    device = pick_device(t.device)
    model = (model or build_model(config, data.shape)).to(device).train()
    images = data.train.to(device)
    valid = evaluation_images(data, "valid", config).to(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=t.learning_rate, fused=True)
    generator = torch.Generator(device).manual_seed(config.seed)
    state = _State(model, optimizer, generator)
    if folder is not None:
        state.load(folder, config)
    started = last_log = time.monotonic()
    starts = model.phase_starts(t.epochs)  # patience counts in the last phase

    while state.epoch < t.epochs and state.epoch - max(state.best_epoch, starts[-1]) < t.patience:
        stage = model.start_epoch(state.epoch, t.epochs, state.best_weights)
        losses = []
        for x in images.batches(t.batch_size, generator):
            x = model.generative.output.augment(x, generator)
            terms = model.loss_terms(x, len(images), generator)
            loss = sum(terms.values())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, t.clip_norm)
            optimizer.step()
            losses.append(torch.stack([v.detach() for v in terms.values()]))
        state.epoch += 1
        epoch_losses = torch.stack(losses).cpu()  # the only synchronisation in an epoch
        _check_finite(epoch_losses, list(terms), state.epoch, config)

        if state.epoch % t.evaluate_every == 0 or state.epoch in (*starts, t.epochs):
            model.eval()
            bound = elbo(model, valid, t.valid_samples, seed=VALID_SEED).mean
            model.train()
            row = {"epoch": state.epoch, "valid_elbo": bound}
            row |= stage | dict(zip(terms, epoch_losses.mean(0).tolist(), strict=True))
            row["seconds"] = round(time.monotonic() - started + state.seconds_before, 3)
            state.record(row)
            if folder is not None:
                state.save(folder, config)
            if log and time.monotonic() - last_log > 5:
                last_log = time.monotonic()
                log(
                    f"epoch {state.epoch}/{t.epochs}: validation ELBO {bound:.2f} nats "
                    f"(best {state.best_valid_elbo:.2f} at {state.best_epoch})"
                )
    model.load_state_dict(state.best_weights)
    return Trained(model.eval(), state.history, state.best_epoch, state.best_valid_elbo)


def evaluation_images(data: Dataset, part: str, config: RunConfig) -> torch.Tensor:
    """Validation or test images as the model's output expects them, [N, C, H, W].

    What training does anew at every step (binarisation, dequantisation) is done once here, with
    noise fixed by the data configuration's seed.
    """
    x = getattr(data, part).unit()
    output = make_output(data.shape, config.model)
    offset = {"valid": 1, "test": 2}[part]
    x = output.augment(x, torch.Generator().manual_seed(1000 * config.data.seed + offset))
    output.check(x)
    return x


def _check_finite(losses: torch.Tensor, names: list[str], epoch: int, config: RunConfig) -> None:
    bad = (~torch.isfinite(losses)).nonzero()
    if len(bad):
        step, term = bad[0].tolist()
        raise TrainingError(
            f"{config.name} (configuration {config.hash()}): the term {names[term]!r} of the loss "
            f"is {losses[step, term].item()} at epoch {epoch}, step {step + 1} of {len(losses)}. "
            f"The last good checkpoint is kept. Try a smaller training.learning_rate "
            f"(now {config.training.learning_rate:g})."
        )


class _State:
    """Everything that a run needs to go on; saved and loaded as one file."""

    def __init__(
        self, model: VAE, optimizer: torch.optim.Optimizer, generator: torch.Generator
    ) -> None:
        self.model, self.optimizer, self.generator = model, optimizer, generator
        self.epoch = self.best_epoch = 0
        self.best_valid_elbo = -math.inf
        self.best_weights = copy.deepcopy(model.state_dict())
        self.history: list[dict[str, float]] = []
        self.seconds_before = 0.0

    def record(self, row: dict[str, float]) -> None:
        self.history.append(row)
        if row["valid_elbo"] > self.best_valid_elbo:
            self.best_valid_elbo, self.best_epoch = row["valid_elbo"], int(row["epoch"])
            self.best_weights = copy.deepcopy(self.model.state_dict())

    def save(self, folder: Path, config: RunConfig) -> None:
        save_checkpoint(
            folder / "checkpoint.pt",
            {
                "config": json.dumps(config.to_dict()),
                "model": self.model.state_dict(),
                "best_weights": self.best_weights,
                "optimizer": self.optimizer.state_dict(),
                "generator": self.generator.get_state(),
                "epoch": self.epoch,
                "best_epoch": self.best_epoch,
                "best_valid_elbo": self.best_valid_elbo,
                "history": self.history,
            },
        )

    def load(self, folder: Path, config: RunConfig) -> None:
        path = folder / "checkpoint.pt"
        if not path.exists():
            return
        saved = load_checkpoint(path, config)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.generator.set_state(saved["generator"])
        self.best_weights = saved["best_weights"]
        self.epoch, self.best_epoch = saved["epoch"], saved["best_epoch"]
        self.best_valid_elbo, self.history = saved["best_valid_elbo"], saved["history"]
        self.seconds_before = self.history[-1]["seconds"] if self.history else 0.0


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write atomically: a reader sees the old file or the new one, never half of one.

    Raises:
        CheckpointError: the folder cannot be written or the disk is full; the old file stays.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"cannot write {path}: {error}. Free some space or make the folder writable, then "
            "run the same command again; it continues from the last checkpoint."
        ) from error


def load_checkpoint(path: Path, config: RunConfig | None = None) -> dict[str, Any]:
    """Read a checkpoint without unpickling code, and compare its configuration if one is given.

    Raises:
        CheckpointError: missing, truncated, foreign, or of another configuration.
    """
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")
        old = json.loads(saved["config"])
        missing = {"model", "best_weights", "optimizer", "generator", "history"} - set(saved)
        if missing:
            raise KeyError(", ".join(sorted(missing)))
    except Exception as error:  # damaged files fail inside torch in many ways
        raise CheckpointError(
            f"{path} is not a checkpoint of gpvae, or is damaged "
            f"({type(error).__name__}). Delete it to start this run again."
        ) from error
    changed = differences(old, config.to_dict()) if config else []
    if changed:
        raise CheckpointError(
            f"{path} belongs to another configuration ({'; '.join(changed)}). "
            "Delete it or use another folder."
        )
    return saved


def load_model(path: Path, shape: tuple[int, int, int]) -> tuple[VAE, RunConfig]:
    """The best model of a checkpoint, in eval mode on the CPU, and its configuration."""
    from gpvae.config import from_dict

    saved = load_checkpoint(path)
    config = from_dict(RunConfig, json.loads(saved["config"]))
    model = build_model(config, shape)
    try:
        model.load_state_dict(saved["best_weights"])
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit images of shape {shape}.") from error
    return model.eval(), config
