"""The training loop: one function, top to bottom. The step that it takes is `gpvae.step`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from gpvae.checkpoint import State, load_checkpoint
from gpvae.config import RunConfig, TrainingConfig, from_dict
from gpvae.data import Dataset
from gpvae.errors import CheckpointError, ConfigError, DataError, TrainingError, unknown
from gpvae.evaluate import elbo
from gpvae.gp import GPVAE
from gpvae.householder import HouseholderVAE
from gpvae.iaf import IAFVAE
from gpvae.memory import is_out_of_memory
from gpvae.mixtures import MixtureVAE, RecursiveMixtureVAE
from gpvae.outputs import make_output
from gpvae.savae import SAVAE
from gpvae.step import Step, compiles, make_adam, matmul_precision, swapped
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


def with_weights(config: RunConfig, model: VAE, shape: tuple[int, int, int]) -> VAE:
    """A model of this configuration with the weights of `model`, on its device, in eval mode."""
    other = build_model(config, shape).to(next(model.parameters()).device)
    other.load_state_dict(model.state_dict())
    return other.eval()


def pick_device(name: str) -> torch.device:
    """The device that a configuration asks for; "auto" is cuda if there is one.

    Raises:
        ConfigError: cuda without a usable GPU, or an unknown or malformed name.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise ConfigError(unknown("device", name, ("auto", "cpu", "cuda")))
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r} was asked for, but torch sees no GPU; use 'auto'.")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"{name!r} is no device; expected such as 'cpu' or 'cuda:0'.") from error


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
        folder: where `checkpoint.pt` lives, one for each run; None keeps nothing.
        model: a model to train in place of a fresh one (for example with a frozen decoder).
        log: called with a line now and then.

    Raises:
        ConfigError: unknown encoder or device.
        DataError: no `Dataset`.
        CheckpointError: the folder's checkpoint is damaged, or of another configuration or other
            images.
        TrainingError: a loss that is not finite, no validation bound that is, or too little memory;
            the last good checkpoint stays.
    """
    check_dataset(data)
    t = config.training
    device = pick_device(t.device)
    model = (model or build_model(config, data.shape)).to(device).train()
    images = data.train.to(device)
    valid = evaluation_images(data, "valid", config).to(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_adam(parameters, config, model, compiles(config, model))
    generator = torch.Generator(device).manual_seed(config.seed)
    averages = [p.detach().clone() for p in parameters] if t.average else []
    state = State(model, optimizer, generator, averages, data.identity)
    if folder is not None:
        folder = Path(folder)
        state.load(folder, config)
    step = Step(model, optimizer, config, images.levels, len(images), generator, averages)
    started = last_log = time.monotonic()
    starts = model.phase_starts(t.epochs)  # patience counts in the last phase

    with matmul_precision(config.model.precision), memory_explained(config):
        while not finished(state, t, starts):
            stage = model.start_epoch(state.epoch, t.epochs, state.best_weights)
            step.start_epoch(state.epoch, t.epochs, new_phase=state.epoch in starts)
            batches = images.batches(t.batch_size, generator, scaled=False)
            losses = [step(pixels) for pixels in batches]  # see Step.eager
            state.epoch += 1
            epoch_losses = torch.stack(losses).cpu()  # the only synchronisation in an epoch
            check_finite(epoch_losses, step.names, state.epoch, config)

            if state.epoch % t.evaluate_every == 0 or state.epoch in (*starts, t.epochs):
                with swapped(parameters, averages):
                    bound = validation_bound(model, valid, t.valid_samples)
                    row = {"epoch": state.epoch, "valid_elbo": bound}
                    row |= stage | dict(zip(step.names, epoch_losses.mean(0).tolist(), strict=True))
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
            elif folder is not None and finished(state, t, starts):
                state.save(folder, config)  # patience ended between two bounds
    check_best(state, config)
    model.load_state_dict(state.best_weights)
    return Trained(model.eval(), state.history, state.best_epoch, state.best_valid_elbo)


def check_dataset(data: object) -> None:
    """Raise DataError if this is no `Dataset`."""
    if not isinstance(data, Dataset):
        raise DataError(
            f"the images are a {type(data).__name__}; expected a Dataset with its splits, as from "
            "gpvae.from_images(array) or gpvae.load_dataset(name)."
        )


def finished(state: State, training: TrainingConfig, starts: list[int]) -> bool:
    """Whether the epochs are over, or patience in the last phase of training is."""
    since = state.epoch - max(state.best_epoch, starts[-1])
    return state.epoch >= training.epochs or since >= training.patience


def validation_bound(model: VAE, valid: torch.Tensor, samples: int) -> float:
    """Mean ELBO of the validation images in nats, with the same noise at every call."""
    bound = elbo(model.for_validation(), valid, samples, seed=VALID_SEED).mean
    model.train()
    return bound


def evaluation_images(data: Dataset, part: str, config: RunConfig) -> torch.Tensor:
    """Validation or test images as the model's output expects them, [N, C, H, W].

    What training does anew at every step (binarisation, dequantisation) is done once here, with
    noise fixed by the data configuration's seed.

    Raises:
        ConfigError: dequantisation to another number of grey levels than the images'.
        DataError: images that the output has no density for.
    """
    images = getattr(data, part)
    if config.model.dequantise and images.levels != config.model.levels:
        raise ConfigError(
            f"model.dequantise would spread each pixel over one of model.levels = "
            f"{config.model.levels} grey levels, but these images have {images.levels}. Set "
            f"model.levels={images.levels}."
        )
    x = images.unit()
    output = make_output(data.shape, config.model)
    offset = {"valid": 1, "test": 2}[part]
    x = output.augment(x, torch.Generator().manual_seed(1000 * config.data.seed + offset))
    output.check(x)
    return x


def check_finite(losses: torch.Tensor, names: list[str], epoch: int, config: RunConfig) -> None:
    """Raise TrainingError if a loss term of an epoch, [steps, terms], is not finite."""
    bad = (~torch.isfinite(losses)).nonzero()
    if len(bad):
        step, term = bad[0].tolist()
        raise TrainingError(
            f"{config.name} (configuration {config.hash()}): the term {names[term]!r} of the loss "
            f"is {losses[step, term].item()} at epoch {epoch}, step {step + 1} of {len(losses)}. "
            f"The last good checkpoint is kept. Try a smaller training.learning_rate "
            f"(now {config.training.learning_rate:g})."
        )


def check_best(state: State, config: RunConfig) -> None:
    """Raise TrainingError if no validation bound was a finite number, so that none was the best."""
    if not state.best_epoch:
        raise TrainingError(
            f"{config.name} (configuration {config.hash()}): none of {len(state.history)} "
            "validation bounds is a finite number, so that no weights are the best. Try a smaller "
            f"training.learning_rate (now {config.training.learning_rate:g})."
        )


@contextmanager
def memory_explained(config: RunConfig) -> Iterator[None]:
    """Say what to do when a training step does not fit into memory."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(
            f"{config.name}: a step with training.batch_size = {config.training.batch_size} does "
            f"not fit into memory ({str(error).splitlines()[0]}). The last checkpoint is kept. Use "
            "a smaller batch or network, or free memory on the device."
        ) from error


def load_model(path: Path, shape: tuple[int, int, int]) -> tuple[VAE, RunConfig]:
    """The best model of a checkpoint, in eval mode on the CPU, and its configuration.

    Args:
        path: of a run's `checkpoint.pt`.
        shape: (C, H, W) of its images.

    Raises:
        CheckpointError: no such file, a damaged one, or images of another shape.
    """
    saved = load_checkpoint(path)
    config = from_dict(RunConfig, json.loads(saved["config"]))
    model = build_model(config, shape)
    try:
        model.load_state_dict(saved["best_weights"])
    except RuntimeError as error:
        raise CheckpointError(
            f"{path}, a {config.model.encoder} of {config.data.name}, does not fit images of shape "
            f"{shape}; give the (C, H, W) of the images that it was trained on."
        ) from error
    return model.eval(), config
