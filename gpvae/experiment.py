"""One run from configuration to result row, and many runs side by side."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from gpvae import events, paths
from gpvae.config import DataConfig, RunConfig
from gpvae.data import Dataset, load_dataset
from gpvae.ensemble import seed_groups, train_seeds
from gpvae.errors import DataError, GPVAEError, TrainingError
from gpvae.evaluate import Estimate, elbo, log_likelihood
from gpvae.gaps import decompose
from gpvae.processes import make_executor
from gpvae.refine import study
from gpvae.results import (
    Results,
    Row,
    checkpoint_name,
    code_digest,
    code_hash,
    is_whole,
    method_hash,
    not_finite,
    run_key,
    stale_reason,
    versions,
)
from gpvae.search import SearchOptions
from gpvae.step import matmul_precision
from gpvae.training import Trained, evaluation_images, train, with_weights
from gpvae.vae import VAE

Log = Callable[[str], None]
FORCED = "asked for"


def load_data(config: RunConfig) -> Dataset:
    """The data set of a run, split as its configuration says."""
    d = config.data
    return load_dataset(
        d.name,
        seed=d.seed,
        train_size=d.train_size,
        valid_size=d.valid_size,
        test_size=d.test_size,
    )


def trained(
    config: RunConfig, profile: str, data: Dataset | None = None, log: Log = print
) -> Trained:
    """The trained model of a run; from its checkpoint where there is one."""
    data = data or load_data(config)
    owner = replace(config, model=config.for_training().model)
    with cpu_threads(config.training.threads):
        found = train(owner, data, run_folder(config, profile, data), log=log)
    if owner == config:
        return found
    return replace(found, model=with_weights(config, found.model, data.shape))


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Compute with this many CPU threads; the last bits of sums depend on the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_folder(config: RunConfig, profile: str, data: Dataset) -> Path:
    """Checkpoint folder of a run: with other data or code, or where something else is trained, it
    has another name.
    """
    name = checkpoint_name(config, data.hash, code_hash(), method_hash(config))
    return paths.results(profile) / "runs" / name


def _discard_older(folder: Path, fresh_since: float) -> None:
    """Delete a checkpoint from before that time, so that what it is of starts anew."""
    times = [file.stat().st_mtime for file in folder.glob("*.pt")]
    if times and max(times) < fresh_since:
        shutil.rmtree(folder, ignore_errors=True)


def run(config: RunConfig, profile: str, fresh_since: float = 0.0, log: Log = print) -> Row:
    """Train, evaluate on test (or validation) images and store one row; an equal row is reused.

    Args:
        config: the run.
        profile: whose results folder holds rows, arrays and checkpoints.
        fresh_since: compute anew what was finished before this time (seconds since 1970).
        log: called with progress lines.

    Raises:
        TrainingError: training failed, or an estimate is no finite number.
    """
    data = load_data(config)
    results = Results(profile)
    results.renew(config.name, run_key(config, data.hash))
    status, reason = status_of(results, config, data, fresh_since)
    if status == "reused":
        events.record(profile, "row", config.name, status)
        return results.find(config.name, run_key(config, data.hash))
    if reason:
        log(f"{config.name}: computed again ({reason})")
    _discard_older(run_folder(config, profile, data), fresh_since)
    others = outlier_images(config, data.shape) if config.evaluation.outliers else None
    start = time.monotonic()
    model = trained(config, profile, data, log)
    seconds = {"train": model.history[-1]["seconds"]}
    x, began = evaluation_images(data, config.evaluation.part, config), time.monotonic()
    with cpu_threads(config.training.threads), matmul_precision(config.model.precision):
        estimates, arrays = evaluate(model.model, x, config)
        if others is not None:
            arrays |= evaluate_outliers(model.model, others[: len(x)], config)
    seconds["evaluate"] = round(time.monotonic() - began, 3)
    arrays["valid_index"] = data.valid_index
    row = _row(config, data, model, estimates, seconds)
    results.append(row, arrays)
    if wrong := not_finite(row):
        raise TrainingError(
            f"{config.name}: not a finite number: {wrong}. Its row is kept and counts as failed; "
            f"try a smaller training.learning_rate (now {config.training.learning_rate:g})."
        )
    events.record(profile, "row", config.name, status, reason, time.monotonic() - start)
    return row


def status_of(
    results: Results, config: RunConfig, data: Dataset, fresh_since: float
) -> tuple[str, str]:
    """What `run` would do ("made", "recomputed" or "reused") and why it computes again."""
    row = results.find(config.name, run_key(config, data.hash))
    if row is None:
        return "made", ""
    reason = stale_reason(row, config, data.hash)
    if row["finished"] < fresh_since:
        reason = FORCED
    if not reason and not is_whole(results.arrays_path(row)):
        reason = "its per-image arrays are missing or damaged"
    if not reason and not_finite(row):
        reason = "an estimate was no finite number"
    return ("recomputed", reason) if reason else ("reused", "")


def evaluate(
    model: VAE, x: torch.Tensor, config: RunConfig
) -> tuple[dict[str, Estimate], dict[str, np.ndarray]]:
    """All test-time estimates of a run, and everything that is kept for each image.

    Returns:
        Estimates in nats: `elbo` and `log_likelihood` (the model's own posterior as proposal),
        and where `config.evaluation.gaps` also `elbo_optimised`, `log_likelihood_neutral` and
        `log_px`, the reference of the gaps (see `gpvae.gaps`); and arrays [N] by name, with the
        scores of difficulty and, for a model that has some, what refinement would gain
        (`refine_bounds` and `refine_ranking`, [R, N] at `refine_steps`, [R]; see `gpvae.refine`).
    """
    e = config.evaluation
    x = x.to(next(model.parameters()).device)
    with torch.no_grad():
        posterior = model(x)
    arrays = posterior.scores()
    arrays["q_var"] = (posterior.std**2).mean(-1)
    if e.gaps:
        options = SearchOptions(seed=e.seed)
        gaps = decompose(model, x, e.samples, e.elbo_samples, options, seed=e.seed - 1)
        estimates = {
            "elbo": gaps.elbo,
            "log_likelihood": gaps.own,
            "elbo_optimised": gaps.elbo_optimised,
            "log_likelihood_neutral": gaps.neutral,
            "log_px": gaps.log_px,
        }
        arrays["converged"] = gaps.optimised.converged
        if posterior.scores():
            options, ranked_by = SearchOptions(seed=e.seed - 1), posterior.scores()
            refined = study(model, x, ranked_by, options=options, elbo_samples=e.elbo_samples)
            arrays["refine_steps"] = refined.steps
            arrays["refine_bounds"] = refined.bounds
            arrays["refine_ranking"] = refined.ranking_bounds
    else:
        estimates = {
            "elbo": elbo(model, x, e.elbo_samples, seed=e.seed),
            "log_likelihood": log_likelihood(model, x, e.samples, seed=e.seed),
        }
    for name, estimate in estimates.items():
        arrays[name] = estimate.value
        arrays[f"{name}_stderr"] = estimate.stderr
    return estimates, {k: _small(v) for k, v in arrays.items()}


def outlier_images(config: RunConfig, shape: tuple[int, int, int]) -> torch.Tensor:
    """Test images of the data set that `config.evaluation.outliers` names, [N, C, H, W].

    Raises:
        DataError: the images are not there or are not of that shape, (C, H, W).
    """
    other = replace(config, data=DataConfig(config.evaluation.outliers, seed=config.data.seed))
    data = load_data(other)
    if data.shape != shape:
        raise DataError(
            f"evaluation.outliers={other.data.name} has images of shape {data.shape}, those of "
            f"{config.data.name} have {shape}; name a data set of the same shape."
        )
    return evaluation_images(data, "test", other)


def evaluate_outliers(model: VAE, x: torch.Tensor, config: RunConfig) -> dict[str, np.ndarray]:
    """Bound and scores of another data set's images x, [N] each, as `outlier_...`."""
    x = x.to(next(model.parameters()).device)
    with torch.no_grad():
        arrays = model(x).scores()
    arrays["elbo"] = elbo(
        model, x, config.evaluation.elbo_samples, seed=config.evaluation.seed
    ).value
    return {f"outlier_{name}": _small(value) for name, value in arrays.items()}


def _small(values: torch.Tensor) -> np.ndarray:
    array = values.detach().cpu().numpy()
    return array.astype(np.float32) if array.dtype == np.float64 else array


def _row(
    config: RunConfig,
    data: Dataset,
    model: Trained,
    estimates: dict[str, Estimate],
    seconds: dict[str, float],
) -> Row:
    parameter = next(model.model.parameters())
    return {
        "name": config.name,
        "key": run_key(config, data.hash),
        "config": config.to_dict(),
        "config_hash": config.hash(),
        "data_hash": data.hash,
        "code_hash": code_hash(),
        "code_digest": code_digest(),
        **({"method_hash": own} if (own := method_hash(config)) else {}),
        "split": data.split,
        "seed": config.seed,
        "versions": versions(),
        "device": torch.cuda.get_device_name() if parameter.is_cuda else "cpu",
        "parameters": sum(p.numel() for p in model.model.parameters()),
        "epochs": int(model.history[-1]["epoch"]),
        "best_epoch": model.best_epoch,
        "valid_elbo": model.best_valid_elbo,
        "history": [{k: row[k] for k in ("epoch", "valid_elbo")} for row in model.history],
        "seconds": seconds,
        "finished": time.time(),
        **{
            name: {"mean": e.mean, "stderr": e.mean_stderr, "samples": e.samples, "n": len(e.value)}
            for name, e in estimates.items()
        },
    }


def run_all(
    configs: Sequence[RunConfig],
    profile: str,
    fresh_since: float = 0.0,
    workers: int | None = None,
    log: Log = print,
) -> list[Row]:
    """Run many configurations, on the CPU in several processes of one thread each.

    Small networks leave a second thread idle, so whole runs side by side are faster, and one
    thread makes the numbers independent of the number of cores. A run that fails does not stop
    the others.

    Args:
        configs: the runs.
        profile: see `run`.
        fresh_since: see `run`.
        workers: processes; by default the usable cores on the CPU and one on a GPU.
        log: called with a line for each finished run.

    Raises:
        TrainingError: at the end, naming the runs that failed; the others' rows are kept.
    """
    from gpvae.sweep import sweep  # which imports this module

    workers = min(workers or default_workers(configs), max(1, len(configs)))
    with make_executor(workers) as executor:
        outcome = sweep(
            {profile: configs},
            executor,
            log,
            fresh_since=fresh_since,
            catch=GPVAEError,
            log_done=True,
        )
    if outcome.failures:
        raise TrainingError(
            f"{len(outcome.failures)} of {len(configs)} runs failed; the others are kept.\n"
            + "\n".join(f"{name}: {f.message}" for (_, name), f in outcome.failures.items())
        )
    return [outcome.rows[profile, config.name] for config in configs]


def train_together(
    configs: Sequence[RunConfig], profile: str, fresh_since: float = 0.0, log: Log = print
) -> None:
    """Train runs that differ in their seed only side by side on a GPU, which one would leave idle.

    Their checkpoints then lie where `trained` finds them. It is left to `trained` to train what
    runs on the CPU, has no companion, has begun already or is not `gpvae.ensemble.batchable`, and
    everything that fails here.

    Args:
        configs: runs that are about to be made.
        profile: whose results folder holds their checkpoints.
        fresh_since: train anew what was trained before this time (seconds since 1970).
        log: called with progress lines.
    """
    for group in seed_groups([config.for_training() for config in configs]):
        if _on_gpu(group[0]):
            _train_group(group, profile, load_data(group[0]), fresh_since, log)


def _train_group(
    group: list[RunConfig], profile: str, data: Dataset, fresh_since: float, log: Log
) -> None:
    place = _group_folder(group, profile, data)
    folders = {config: run_folder(config, profile, data) for config in group}
    for folder in (place, *folders.values()):
        _discard_older(folder, fresh_since)
    if not place.exists():  # otherwise it was cut, perhaps while the runs' checkpoints were written
        group = [c for c in group if not (folders[c] / "checkpoint.pt").exists()]
        place = _group_folder(group, profile, data)
    if len(group) < 2:
        return
    log(f"{group[0].name}: trained together with {len(group) - 1} other seeds")
    try:
        with cpu_threads(group[0].training.threads):
            train_seeds(group, data, place, [folders[c] for c in group], log)
    except GPVAEError as error:
        log(f"seeds are trained one after another, as together they failed: {error}")
    shutil.rmtree(place, ignore_errors=True)


def _group_folder(group: list[RunConfig], profile: str, data: Dataset) -> Path:
    keys = "".join(run_key(config, data.hash) for config in group)
    return paths.results(profile) / "ensembles" / hashlib.sha256(keys.encode()).hexdigest()[:12]


def _on_gpu(config: RunConfig) -> bool:
    return torch.cuda.is_available() and config.training.device != "cpu"


def default_workers(configs: Sequence[RunConfig]) -> int:
    """One process on a GPU, which is shared badly; on the CPU one for each usable core."""
    if torch.cuda.is_available() and any(c.training.device != "cpu" for c in configs):
        return 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quiet(line: str) -> None:
    """Progress of a run in a worker process: its result is reported by the parent."""
