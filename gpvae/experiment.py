"""One run from configuration to result row, and many runs side by side."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from gpvae import events, paths
from gpvae.config import RunConfig
from gpvae.data import Dataset, load_dataset
from gpvae.errors import GPVAEError, TrainingError
from gpvae.evaluate import Estimate, elbo, log_likelihood
from gpvae.gaps import decompose
from gpvae.refine import study
from gpvae.results import Results, Row, code_hash, run_key, stale_reason, versions
from gpvae.search import SearchOptions
from gpvae.step import matmul_precision
from gpvae.training import Trained, build_model, evaluation_images, train
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
    """The trained model of a run; from its checkpoint where there is one.

    SVI is the VAE until it is evaluated, so it takes the weights of the VAE's run.
    """
    data = data or load_data(config)
    if config.model.encoder == "svi":
        found = trained(config.override(**{"model.encoder": "vae"}), profile, data, log)
        model = build_model(config, data.shape).to(next(found.model.parameters()).device)
        model.load_state_dict(found.model.state_dict())
        return replace(found, model=model.eval())
    with cpu_threads(config.training.threads):
        return train(config, data, run_folder(config, profile, data), log=log)


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
    """Checkpoint folder of a run; another configuration, data or code has another folder."""
    return paths.results(profile) / "runs" / f"{config.name}-{run_key(config, data.hash)}"


def run(config: RunConfig, profile: str, fresh_since: float = 0.0, log: Log = print) -> Row:
    """Train, evaluate on the test images and store one row; an equal row is reused.

    Args:
        config: the run.
        profile: whose results folder holds rows, arrays and checkpoints.
        fresh_since: compute anew what was finished before this time (seconds since 1970).
        log: called with progress lines.
    """
    data = load_data(config)
    results = Results(profile)
    status, reason = _status(results, config, data, fresh_since)
    if status == "reused":
        events.record(profile, "row", config.name, status)
        return results.find(config.name)
    if reason:
        log(f"{config.name}: computed again ({reason})")
    if reason == FORCED:
        shutil.rmtree(run_folder(config, profile, data), ignore_errors=True)
    start = time.monotonic()
    model = trained(config, profile, data, log)
    seconds = {"train": model.history[-1]["seconds"]}
    x = evaluation_images(data, config.evaluation.part, config)
    with cpu_threads(config.training.threads), matmul_precision(config.model.precision):
        estimates, arrays = evaluate(model.model, x, config)
    seconds["evaluate"] = round(time.monotonic() - start, 3) - seconds["train"]
    arrays["valid_index"] = data.valid_index
    row = _row(config, data, model, estimates, seconds)
    results.append(row, arrays)
    events.record(profile, "row", config.name, status, reason, time.monotonic() - start)
    return row


def _status(
    results: Results, config: RunConfig, data: Dataset, fresh_since: float
) -> tuple[str, str]:
    row = results.find(config.name)
    if row is None:
        return "made", ""
    reason = stale_reason(row, config, data.hash)
    if row["finished"] < fresh_since:
        reason = FORCED
    if not reason and not results.arrays_path(row).exists():
        reason = "its per-image arrays are missing"
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
        gaps = decompose(model, x, e.samples, e.elbo_samples, SearchOptions(seed=e.seed))
        estimates = {
            "elbo": gaps.elbo,
            "log_likelihood": gaps.own,
            "elbo_optimised": gaps.elbo_optimised,
            "log_likelihood_neutral": gaps.neutral,
            "log_px": gaps.log_px,
        }
        arrays["converged"] = gaps.optimised.converged
        if posterior.scores():
            refined = study(model, x, posterior.scores(), elbo_samples=e.elbo_samples)
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
    workers = workers or default_workers(configs)
    results = Results(profile)
    rows: dict[str, Row] = {}
    failures: list[str] = []
    started = time.monotonic()

    def finished(config: RunConfig, result: Callable[[], Row]) -> None:
        try:
            row = rows[config.name] = result()
        except GPVAEError as error:
            failures.append(f"{config.name}: {error}")
            events.record(profile, "row", config.name, "failed", str(error))
            return
        done = len(rows) + len(failures)
        log(
            f"[{time.monotonic() - started:6.1f} s] {done}/{len(configs)} {config.name}: "
            f"log p(x) >= {row['log_likelihood']['mean']:.2f} nats"
        )

    pending = []
    for config in configs:
        if _status(results, config, load_data(config), fresh_since)[0] == "reused":
            finished(config, lambda c=config: run(c, profile, fresh_since, log))
        else:
            pending.append(config)
    if workers == 1 or len(pending) <= 1:
        for config in pending:
            finished(config, lambda c=config: run(c, profile, fresh_since, log))
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(workers, len(pending)), context) as pool:
            futures = {pool.submit(run, c, profile, fresh_since, _quiet): c for c in pending}
            try:
                for future in as_completed(futures):
                    finished(futures[future], future.result)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    if failures:
        raise TrainingError(
            f"{len(failures)} of {len(configs)} runs failed; the others are kept.\n"
            + "\n".join(failures)
        )
    return [rows[config.name] for config in configs]


def default_workers(configs: Sequence[RunConfig]) -> int:
    """One process on a GPU, which is shared badly; on the CPU one for each usable core."""
    if torch.cuda.is_available() and any(c.training.device != "cpu" for c in configs):
        return 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quiet(line: str) -> None:
    """Progress of a run in a worker process: its result is reported by the parent."""
