"""Everything that a run needs to go on, in one file that is written atomically."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpvae.config import RunConfig, differences
from gpvae.disk import replaced
from gpvae.errors import CheckpointError, StorageError
from gpvae.vae import VAE


class State:
    """Where a run is: model, optimiser, random numbers, what was best and the history.

    Args:
        model: the model that is trained.
        optimizer: of its parameters.
        generator: of all random numbers.
        averages: moving averages of the parameters, or an empty list.
        images: what tells the images from others, see `gpvae.data.Dataset.identity`.
    """

    def __init__(
        self,
        model: VAE,
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator,
        averages: list[Tensor],
        images: Mapping[str, Any],
    ) -> None:
        self.model, self.optimizer, self.generator = model, optimizer, generator
        self.averages, self.images = averages, images
        self.epoch = self.best_epoch = 0
        self.best_valid_elbo = -math.inf
        self.best_weights = copy.deepcopy(model.state_dict())
        self.history: list[dict[str, float]] = []
        self.seconds_before = 0.0

    def record(self, row: dict[str, float]) -> None:
        """Keep a row of the history, and the model's present weights if its bound is the best."""
        self.history.append(row)
        if row["valid_elbo"] > self.best_valid_elbo:
            self.best_valid_elbo, self.best_epoch = row["valid_elbo"], int(row["epoch"])
            self.best_weights = copy.deepcopy(self.model.state_dict())

    def content(self, config: RunConfig) -> dict[str, Any]:
        """What `save` writes; the tensors are those in use, not copies."""
        return {
            "config": json.dumps(config.to_dict()),
            **self.images,
            "model": self.model.state_dict(),
            "best_weights": self.best_weights,
            "averages": self.averages,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "epoch": self.epoch,
            "best_epoch": self.best_epoch,
            "best_valid_elbo": self.best_valid_elbo,
            "history": self.history,
        }

    def save(self, folder: Path, config: RunConfig) -> None:
        """Write `checkpoint.pt`."""
        save_checkpoint(folder / "checkpoint.pt", self.content(config))

    def load(self, folder: Path, config: RunConfig) -> None:
        """Go on from `checkpoint.pt` if there is one."""
        path = folder / "checkpoint.pt"
        if not path.exists():
            return
        saved = load_checkpoint(path, config, images=self.images)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.generator.set_state(saved["generator"])
        for average, value in zip(self.averages, saved["averages"], strict=True):
            average.copy_(value)
        self.best_weights = saved["best_weights"]
        self.epoch, self.best_epoch = saved["epoch"], saved["best_epoch"]
        self.best_valid_elbo, self.history = saved["best_valid_elbo"], saved["history"]
        self.seconds_before = self.history[-1]["seconds"] if self.history else 0.0


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write atomically: a reader sees the old file or the new one, never half of one.

    Raises:
        StorageError: the folder cannot be written or the disk is full; the old file stays.
    """
    try:
        with replaced(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise StorageError(
            f"cannot write {path}: {error}. Free some space or make the folder writable, then "
            "run the same command again; it continues from the last checkpoint."
        ) from error


STATE_KEYS = ("model", "best_weights", "averages", "optimizer", "generator", "history")


def load_checkpoint(
    path: Path,
    config: RunConfig | None = None,
    keys: Sequence[str] = STATE_KEYS,
    images: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Read a checkpoint without unpickling code, and compare what it belongs to.

    Args:
        path: of the file.
        config: of the run; None compares nothing.
        keys: what it must hold.
        images: what tells the run's images from others; None compares nothing.

    Raises:
        CheckpointError: missing, truncated, foreign, or of another configuration or other images.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise CheckpointError(
            f"{path} {what}. Give the file `checkpoint.pt` of a run; those of a profile lie in "
            "results/<profile>/runs/."
        )
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")
        old = json.loads(saved["config"])
        missing = sorted(set(keys) - set(saved))
    except Exception as error:  # damaged files fail inside torch in many ways
        raise CheckpointError(
            f"{path} is not a checkpoint of gpvae, or is damaged "
            f"({type(error).__name__}). Delete it to start this run again."
        ) from error
    if missing:
        raise CheckpointError(
            f"{path} lacks {', '.join(missing)}, so that it is of another version of gpvae, or not "
            "of a run. Delete it to start this run again."
        )
    changed = _changed(old, config) if config else []
    if changed:
        raise CheckpointError(
            f"{path} belongs to another configuration ({'; '.join(changed)}). "
            "Delete it or use another folder."
        )
    # Older files do not hold everything.
    others = [f"{k}: {saved[k]} -> {v}" for k, v in (images or {}).items() if saved.get(k, v) != v]
    if others:
        raise CheckpointError(
            f"{path} belongs to other images ({'; '.join(others)}). Delete it or use another "
            "folder: one for each data set."
        )
    return saved


def _changed(old: dict[str, Any], config: RunConfig) -> list[str]:
    """What differs; how the model is evaluated afterwards does not matter."""
    new = config.to_dict()
    return differences({**old, "evaluation": new["evaluation"]}, new)
