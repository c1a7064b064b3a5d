"""Runs that differ only in their seed, trained together: seeds as a batch dimension.

One small network leaves most of a GPU idle. Here the weights of K networks are stacked, and one
batched step (`torch.func.vmap` of `torch.func.grad`) moves all of them. Every member is the run
that `gpvae.training.train` makes alone with that seed, up to rounding, since batched products sum
in another order: it has its own initial weights, order of images, noise, gradient norm, validation,
selection, patience and history. Adam works element by element, so that one over stacked weights
is K of them. It also divides by the size of the gradient: where that is nothing but rounding error,
a weight may differ by more than rounding.

References:
    Model ensembling in PyTorch, https://pytorch.org/tutorials/intermediate/ensembling.html

Dimensions: K members, B images.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpvae.checkpoint import State, load_checkpoint, save_checkpoint
from gpvae.config import RunConfig, differences
from gpvae.data import Dataset
from gpvae.errors import CheckpointError, ConfigError
from gpvae.seed_step import SeedStep, Stacked
from gpvae.step import make_adam, matmul_precision
from gpvae.training import (
    Trained,
    build_model,
    check_best,
    check_dataset,
    check_finite,
    evaluation_images,
    finished,
    memory_explained,
    pick_device,
    train,
    validation_bound,
)

Log = Callable[[str], None]

ALONE = {  # encoders whose seeds are trained one after another, and why
    "rme": "its phases load weights and change what is trained",
    "savae": "its encoder differentiates inside and looks at numbers",
    "vlae": "its encoder differentiates inside and looks at numbers",
}
KEYS = ("seeds", "model", "averages", "optimizer", "generators", "members", "ended")
MEMBER_KEYS = ("epoch", "best_epoch", "best_valid_elbo", "best_weights", "history")


def train_seeds(
    configs: Sequence[RunConfig],
    data: Dataset,
    folder: Path | None = None,
    folders: Sequence[Path] | None = None,
    log: Log | None = None,
) -> list[Trained]:
    """Train runs that differ in their seed only, all at once where the encoder allows it.

    With a folder, what was done is kept there and a call that was killed is continued by the same
    call; on the CPU, with the same number of threads, it ends with the same bits. Encoders that
    are not `batchable` go through `train` one after another.

    Args:
        configs: the runs.
        data: their images.
        folder: where `ensemble.pt` lives while they are trained together; None keeps nothing.
        folders: of the runs, one each. When all have ended, each gets the `checkpoint.pt` that
            `train` takes for a finished run.
        log: called with a line now and then.

    Returns:
        What `train` returns, for each run. The seconds of a history are the run's share, 1 / K.

    Raises:
        ConfigError: the runs differ in more than their seed.
        DataError: no `Dataset`.
        CheckpointError: a checkpoint is damaged or of other runs.
        TrainingError: as for `train`, naming the run; the last good `ensemble.pt` stays.
    """
    check_seeds(configs)
    check_dataset(data)
    folder = folder and Path(folder)
    folders = [each and Path(each) for each in folders] if folders else [None] * len(configs)
    reason = batchable(configs[0]) if configs else ""
    if reason and log and len(configs) > 1:
        log(f"{configs[0].name}: {len(configs)} seeds are trained one after another, as {reason}")
    if reason or len(configs) < 2:
        return [
            train(config, data, own, log=log) for config, own in zip(configs, folders, strict=True)
        ]
    files = [own and own / "checkpoint.pt" for own in folders]
    for config, file in zip(configs, files, strict=True):
        if file and file.exists():
            # It refuses what must not be overwritten.
            load_checkpoint(file, config, images=data.identity)
    device = pick_device(configs[0].training.device)
    ensemble = Ensemble(configs, data.shape, device, data.identity)
    if folder is not None:
        ensemble.load(folder)
    _train(ensemble, data, folder, log)
    for file, content in zip(files, ensemble.ended, strict=True):
        if file:
            save_checkpoint(file, content)
    return ensemble.results()


def batchable(config: RunConfig) -> str:
    """Why runs of this configuration cannot be trained together; empty if they can."""
    return ALONE.get(config.model.encoder, "")


def seed_groups(configs: Sequence[RunConfig]) -> list[list[RunConfig]]:
    """The batchable runs that have companions from which they differ in their seed only."""
    groups: dict[RunConfig, list[RunConfig]] = {}
    for config in dict.fromkeys(configs):
        groups.setdefault(config.override(seed=0), []).append(config)
    return [g for g in groups.values() if len(g) > 1 and not batchable(g[0])]


def check_seeds(configs: Sequence[RunConfig]) -> None:
    """Raise ConfigError, naming the fields, if the runs differ in more than their seed."""
    for config in configs[1:]:
        changed = differences(configs[0].to_dict(), config.override(seed=configs[0].seed).to_dict())
        if changed:
            raise ConfigError(
                "runs that are trained together may differ in their seed only, but here also in "
                f"{'; '.join(changed)}. Train them by separate calls."
            )


def _train(ensemble: Ensemble, data: Dataset, folder: Path | None, log: Log | None) -> None:
    """The loop of `gpvae.training.train`, for all members that have not ended."""
    config = ensemble.configs[0]
    t, device = config.training, ensemble.generators[0].device
    images = data.train.to(device)
    valid = evaluation_images(data, "valid", config).to(device)
    step = ensemble.step(images.levels, len(images))
    before, started, last_log = ensemble.seconds, time.monotonic(), time.monotonic()

    with matmul_precision(config.model.precision), memory_explained(config):
        while ensemble.running:
            step.start_epoch(ensemble.epoch, t.epochs, new_phase=ensemble.epoch == 0)
            orders = [images.batches(t.batch_size, g, scaled=False) for g in ensemble.generators]
            losses = [step(torch.stack(pixels)) for pixels in zip(*orders, strict=True)]
            epoch_losses = torch.stack(losses, 1).cpu()  # [K, steps, terms]
            ensemble.advance(epoch_losses, step.names)
            ensemble.seconds = before + time.monotonic() - started
            validates = ensemble.epoch % t.evaluate_every == 0 or ensemble.epoch == t.epochs
            if validates:
                ensemble.validate(valid, epoch_losses, step.names)
            if (ensemble.end() or validates) and folder is not None:
                ensemble.save(folder)
            if validates and log and time.monotonic() - last_log > 5:
                last_log = time.monotonic()
                best = ", ".join(f"{s.best_valid_elbo:.2f}" for s in ensemble.states)
                log(f"epoch {ensemble.epoch}/{t.epochs}: best validation ELBO {best} nats")


class Ensemble:
    """K runs between two epochs: stacked weights, one optimiser, and the state of each run.

    Args:
        configs: K runs that differ in their seed only.
        shape: (C, H, W) of one image.
        device: of everything.
        images: what tells the images from others, see `gpvae.data.Dataset.identity`.

    Attributes:
        states: of the members; their model is the template, their optimiser the common one.
        ended: for each member, None or the content of its last checkpoint.
        epoch: how many are done.
        seconds: spent so far.
    """

    def __init__(
        self,
        configs: Sequence[RunConfig],
        shape: tuple[int, int, int],
        device: torch.device,
        images: Mapping[str, Any],
    ) -> None:
        self.images = images
        self.configs, self.training = list(configs), configs[0].training
        self.stacked = Stacked([build_model(c, shape).to(device).train() for c in configs])
        self.model, self.parameters = self.stacked.template, list(self.stacked.parameters.values())
        self.optimizer = make_adam(self.parameters, configs[0], self.model)
        self.generators = [torch.Generator(device).manual_seed(c.seed) for c in configs]
        self.averages = (
            [p.detach().clone() for p in self.parameters] if self.training.average else []
        )
        self.states = [self._new_state(k) for k in range(len(configs))]
        self.ended: list[dict[str, Any] | None] = [None] * len(configs)
        self.epoch, self.seconds = 0, 0.0

    def _new_state(self, k: int) -> State:
        self.stacked.put(k)  # the first best weights are the initial ones
        averages = [average[k] for average in self.averages]
        generator = self.generators[k]
        return State(self.model, self.optimizer, generator, averages, self.images)

    @property
    def running(self) -> list[int]:
        """Members that have not ended. The others are computed, but nothing is kept of them."""
        return [k for k, ended in enumerate(self.ended) if ended is None]

    def step(self, levels: int, n_train: int) -> SeedStep:
        """The step of all members."""
        return SeedStep(
            self.stacked,
            self.optimizer,
            self.configs[0],
            levels,
            n_train,
            self.generators,
            self.averages,
        )

    def advance(self, losses: Tensor, names: list[str]) -> None:
        """Count an epoch whose loss terms were these, [K, steps, terms].

        Raises:
            TrainingError: one of a running member is not finite.
        """
        self.epoch += 1
        for k in self.running:
            check_finite(losses[k], names, self.epoch, self.configs[k])
            self.states[k].epoch = self.epoch

    def validate(self, valid: Tensor, losses: Tensor, names: list[str]) -> None:
        """Add a row to the history of every running member."""
        for k in self.running:
            self.stacked.put(k, self.averages)
            bound = validation_bound(self.model, valid, self.training.valid_samples)
            row = {"epoch": self.epoch, "valid_elbo": bound}
            row |= dict(zip(names, losses[k].mean(0).tolist(), strict=True))
            row["seconds"] = round(self.seconds / len(self.states), 3)
            self.states[k].record(row)

    def end(self) -> list[int]:
        """Keep the checkpoint of every member that has just ended; returns which.

        Raises:
            TrainingError: no validation bound of one was finite.
        """
        new = [k for k in self.running if finished(self.states[k], self.training, [0])]
        for k in new:
            check_best(self.states[k], self.configs[k])
            self.stacked.put(k)
            content = self.states[k].content(self.configs[k])
            self.ended[k] = _copied(content | {"optimizer": self._optimizer(k)})
        return new

    def _optimizer(self, k: int) -> dict[str, Any]:
        """The optimiser's state as that of member k alone."""
        whole = self.optimizer.state_dict()
        state = {
            index: {name: v if name == "step" else v[k] for name, v in each.items()}
            for index, each in whole["state"].items()
        }
        return whole | {"state": state}

    def results(self) -> list[Trained]:
        """What `train` returns, for every member."""
        found = []
        for state in self.states:
            model = copy.deepcopy(self.model)
            model.load_state_dict(state.best_weights)
            found.append(
                Trained(model.eval(), state.history, state.best_epoch, state.best_valid_elbo)
            )
        return found

    def save(self, folder: Path) -> None:
        """Write `ensemble.pt`."""
        save_checkpoint(
            folder / "ensemble.pt",
            {
                "config": json.dumps(self.configs[0].to_dict()),
                **self.images,
                "seeds": [config.seed for config in self.configs],
                "model": [p.detach() for p in self.parameters],
                "averages": self.averages,
                "optimizer": self.optimizer.state_dict(),
                "generators": [g.get_state() for g in self.generators],
                "epoch": self.epoch,
                "seconds": self.seconds,
                "members": [{key: getattr(s, key) for key in MEMBER_KEYS} for s in self.states],
                "ended": self.ended,
            },
        )

    def load(self, folder: Path) -> None:
        """Go on from `ensemble.pt` if there is one.

        Raises:
            CheckpointError: it is damaged, or of other runs or images.
        """
        path = folder / "ensemble.pt"
        if not path.exists():
            return
        saved = load_checkpoint(path, self.configs[0], KEYS, self.images)
        seeds = [config.seed for config in self.configs]
        if saved["seeds"] != seeds:
            raise CheckpointError(
                f"{path} belongs to the seeds {saved['seeds']}, not {seeds}. Delete it or use "
                "another folder."
            )
        places = [*(p.detach() for p in self.parameters), *self.averages]
        for place, value in zip(places, [*saved["model"], *saved["averages"]], strict=True):
            place.copy_(value)
        self.optimizer.load_state_dict(saved["optimizer"])
        for generator, state in zip(self.generators, saved["generators"], strict=True):
            generator.set_state(state)
        for state, member in zip(self.states, saved["members"], strict=True):
            vars(state).update(member)
        self.ended, self.epoch = saved["ended"], saved["epoch"]
        self.seconds = saved["seconds"]


def _copied(tree: Any) -> Any:
    """The same nested lists and dictionaries with copies of the tensors on the CPU."""
    if isinstance(tree, Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    return [_copied(value) for value in tree] if isinstance(tree, list) else tree
