"""The same VAE in pythae, a published library of autoencoders, trained by its own trainer.

References:
    Pythae: Unifying Generative Autoencoders in Python (Chadebec et al., 2022),
    https://arxiv.org/abs/2206.08309
"""

from __future__ import annotations

import copy
import io
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.metadata import version
from itertools import count

import torch
from torch import Tensor

from gpvae.bench.measure import Bench, Case, Row, compare, epoch_of, missing, training_step
from gpvae.vae import VAE

OURS, THEIRS = "gpvae's VAE", "pythae's VAE"


def pythae(bench: Bench) -> Iterator[Row]:
    """Epochs of both in turns, and the mean loss of the last one, after equally many steps.

    Both start from the same weights and see the same binary images in batches of the same size, and
    both losses are nats per image, summed over pixels and averaged over the batch. Ours also draws
    binary pixels at every step and clips the gradient's norm.
    """
    try:
        with silence():
            import pythae.trainers  # noqa: F401
    except ImportError as error:
        absent = error.name == "pythae"
        reason = "pythae is not installed" if absent else f"pythae cannot be imported: {error}"
        yield missing("pythae", THEIRS, reason)
        return
    config, steps = bench.config(), 2 if bench.quick else 20
    batch = config.training.batch_size
    x = bench.binary(steps * batch)
    step = training_step(bench, config)
    generator = torch.Generator(bench.device).manual_seed(0)

    def batches() -> Iterator[Tensor]:
        order = torch.randperm(len(x), generator=generator, device=bench.device)
        return (pixels[index] for index in order.split(batch))

    pixels = (255 * x).to(torch.uint8)
    with silence(), tempfile.TemporaryDirectory() as folder:
        theirs = their_epoch(bench, step.model, x, folder)
        ours = epoch_of(step, batches)
        runs = {OURS: Losses(lambda: float(ours().sum(1).mean())), THEIRS: Losses(theirs)}
        notes = {THEIRS: f"version {version('pythae')}, its trainer and data loader"}
        rows = compare(bench, "pythae", runs, OURS, steps, notes)
    done = min(len(run.losses) for run in runs.values())
    for found in rows:
        loss = runs[found["case"]].losses[done - 1]
        yield found | {"value": loss, "unit": f"nats, training loss after {done * steps} steps"}


class Losses:
    """A case that remembers what its calls returned."""

    def __init__(self, epoch: Callable[[], float]) -> None:
        self.epoch, self.losses = epoch, []

    def __call__(self) -> None:
        self.losses.append(self.epoch())


def their_epoch(bench: Bench, model: VAE, x: Tensor, folder: str) -> Case:
    """An epoch of pythae's trainer on the images, starting from the model's weights."""
    from pythae.data.datasets import BaseDataset
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    training = bench.config().training
    trainer = BaseTrainer(
        their_model(model),
        train_dataset=BaseDataset(x.cpu(), torch.zeros(len(x))),
        training_config=BaseTrainerConfig(
            output_dir=folder,
            per_device_train_batch_size=training.batch_size,
            learning_rate=training.learning_rate,
            no_cuda=not bench.on_gpu,
        ),
    )
    trainer.prepare_training()
    epochs = count(1)
    return lambda: trainer.train_step(next(epochs))


def their_model(model: VAE) -> torch.nn.Module:
    """pythae's VAE with copies of the model's layers."""
    from pythae.models import VAE as TheirVAE
    from pythae.models import VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.layers = copy.deepcopy(model.encoder)
            with torch.no_grad():  # log variance, where ours is the log of the standard deviation
                for parameter in self.layers.log_std_head.parameters():
                    parameter.mul_(2)

        def forward(self, x: Tensor) -> ModelOutput:
            features = self.layers.trunk(x)
            mean, log_var = self.layers.mean_head(features), self.layers.log_std_head(features)
            return ModelOutput(embedding=mean, log_covariance=log_var)

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.layers = copy.deepcopy(model.generative.decoder)

        def forward(self, z: Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=self.layers(z).sigmoid())

    shape, latent_dim = model.generative.shape, model.generative.latent_dim
    config = VAEConfig(input_dim=shape, latent_dim=latent_dim, reconstruction_loss="bce")
    return TheirVAE(config, encoder=Encoder(), decoder=Decoder())


@contextmanager
def silence() -> Iterator[None]:
    """Without the library's progress bars and messages."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
