"""Kills: whatever a process was doing when it was killed, the same command ends with the same bits.

Processes fork from a server that has imported everything, so that a start costs nothing, and are
killed after random times, uniform over the duration of an undisturbed run. A run that ends before
its kill is compared with the undisturbed one, and another begins.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch

import gpvae
from gpvae import cli, experiment, profiles
from gpvae.checkpoint import load_checkpoint
from gpvae.mixtures import RecursiveMixtureVAE
from gpvae.results import Results

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills need a POSIX system")

KILLS = 8  # of each case that hit a process before its end
AFTER_CHECKPOINT = 3  # at least so many of them with work to lose
PROFILE = "kill"
LIMIT = 60.0  # seconds for whatever should take few

TINY = gpvae.RunConfig().override(
    **{
        "data.train_size": 64,
        "data.valid_size": 20,
        "data.test_size": 12,
        "model.latent_dim": 2,
        "model.hidden": (8,),
        "training.batch_size": 16,
        "training.evaluate_every": 1,
        "training.patience": 10_000,
        "training.device": "cpu",
        "evaluation.samples": 10,
        "evaluation.elbo_samples": 10,
        "evaluation.gaps": False,
    }
)
STAGED = TINY.override(**{"model.encoder": "rme", "training.epochs": 30})


def single_run() -> None:
    """A VAE and its evaluation."""
    experiment.run(TINY.override(**{"training.epochs": 50}), PROFILE)


def staged_run() -> None:
    """A mixture that grows in stages."""
    experiment.run(STAGED, PROFILE)


def sweep_of_three() -> None:
    """Three jobs, one after the other, by the command."""
    sweep(TINY.override(**{"training.epochs": 15}), seeds=(0, 1, 2))


def seeds_as_a_batch() -> None:
    """Two jobs whose weights are trained as one batch, as is otherwise done on a GPU only."""
    experiment._on_gpu = lambda config: True
    sweep(TINY.override(**{"training.epochs": 40}), seeds=(0, 1))


def sweep(base: gpvae.RunConfig, seeds: tuple[int, ...]) -> None:
    """Runs that differ in their seed, by the command."""
    profiles.PROFILES[PROFILE] = profiles.Profile(
        PROFILE, base, encoders=("vae",), seeds=seeds, outputs=("gaussian",)
    )
    assert cli.main(["sweep", "--profile", PROFILE, "--workers", "1"]) == 0


@dataclass(frozen=True)
class Case:
    """What a killed process was doing: a command, which is started again until it ends.

    Args:
        work: the command, a function of this module; everything it stores goes to `PROFILE`.
        rows: how many rows it makes.
        seed: of the moments.
    """

    work: Callable[[], None]
    rows: int
    seed: int


CASES = {
    "run": Case(single_run, rows=1, seed=0),
    "stages": Case(staged_run, rows=1, seed=1),
    "sweep": Case(sweep_of_three, rows=3, seed=2),
    "seeds": Case(seeds_as_a_batch, rows=2, seed=3),
}


@dataclass(frozen=True)
class Kill:
    """What a kill left: epochs that are kept (of all runs), the last stage, and rows."""

    epochs: int
    stage: int
    rows: int


@pytest.fixture(scope="module")
def server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "sklearn.datasets", "gpvae.sweep", "gpvae.cli"])
    return context


def child(work: Callable[[], None], root: Path, ready: Connection, hold: int | None) -> None:
    """Do the work; with `hold`, say so and wait for the end when that epoch begins."""
    os.environ["GPVAE_ROOT"] = str(root)
    original = RecursiveMixtureVAE.start_epoch

    def start_epoch(self, epoch, *rest):
        shown = original(self, epoch, *rest)
        if epoch == hold:
            ready.send("held")
            time.sleep(LIMIT)
        return shown

    RecursiveMixtureVAE.start_epoch = start_epoch
    ready.send("ready")
    with redirect_stdout(io.StringIO()):
        work()


def start(server, work, root, hold=None) -> tuple[BaseProcess, Connection]:
    """A process that has begun its work, and the end of its pipe."""
    receiver, sender = server.Pipe(duplex=False)
    process = server.Process(target=child, args=(work, root, sender, hold), daemon=True)
    process.start()
    sender.close()
    assert receiver.poll(LIMIT) and receiver.recv() == "ready"
    return process, receiver


def finish(server, work, root) -> float:
    """Start the command and let it end; returns its seconds."""
    process, _ = start(server, work, root)
    began = time.monotonic()
    process.join(LIMIT)
    assert process.exitcode == 0
    return time.monotonic() - began


def kill(process: BaseProcess, root: Path) -> Kill | None:
    """Kill a process and see what it left; None if it had ended by itself, successfully."""
    process.kill()
    process.join(LIMIT)
    if process.exitcode == 0:
        return None
    assert process.exitcode == -signal.SIGKILL
    results = results_in(root)
    last = [load_checkpoint(path)["history"][-1] for path in checkpoints(results)]
    for path in results.folder.glob("ensembles/*/ensemble.pt"):
        last += [member["history"][-1] for member in torch.load(path)["members"]]
    stage = max((row.get("stage", 1) for row in last), default=1)
    return Kill(sum(int(row["epoch"]) for row in last), int(stage), len(results.rows()))


def results_in(root: Path) -> Results:
    """What the processes stored under that root."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPVAE_ROOT", str(root))
        return Results(PROFILE)


def checkpoints(results: Results) -> list[Path]:
    return sorted(results.folder.glob("runs/*/checkpoint.pt"))


def stored(root: Path) -> dict[str, object]:
    """Everything on the disk that has to be the same: rows, arrays and checkpoints, to the bit."""
    results = results_in(root)
    rows = results.rows()
    saved = {path.parent.name: load_checkpoint(path) for path in checkpoints(results)}
    return {
        "rows": [{k: v for k, v in plain(row).items() if k != "finished"} for row in rows],
        "arrays": [plain(results.arrays(row)) for row in rows],
        "checkpoints": plain(saved),
    }


def plain(value: object) -> object:
    """A value that `==` compares bit by bit, without times."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items() if key != "seconds"}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, torch.Tensor):
        value = value.numpy()
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    return value


@pytest.fixture(scope="module")
def undisturbed(server, tmp_path_factory) -> Callable[[str], tuple[float, dict[str, object]]]:
    """Seconds and results of a case that nobody killed."""

    @cache
    def run(name: str) -> tuple[float, dict[str, object]]:
        root = tmp_path_factory.mktemp("whole")
        seconds = finish(server, CASES[name].work, root)
        return seconds, stored(root)

    return run


@pytest.mark.parametrize("name", CASES)
def test_killed_processes_continue_to_the_same_bits(server, undisturbed, tmp_path, name):
    case = CASES[name]
    seconds, expected = undisturbed(name)
    assert len(expected["rows"]) == len(expected["checkpoints"]) == case.rows
    moments = random.Random(case.seed)
    kills: list[Kill] = []
    attempts = runs = 0
    while not enough(kills):
        root, ended = tmp_path / f"run {runs}", False
        runs += 1
        while not ended and not enough(kills):
            attempts += 1
            assert attempts <= 10 * KILLS, f"too few of the kills hit: {kills}"
            process, _ = start(server, case.work, root)
            process.join(moments.uniform(0, seconds))
            hit = kill(process, root)
            ended = hit is None
            kills += [hit] if hit else []
        if not ended:
            finish(server, case.work, root)
        assert stored(root) == expected
    assert enough(kills)
    print(f"{name}: {seconds:.2f} s undisturbed, {runs} runs, {kills}")


def enough(kills: list[Kill]) -> bool:
    """Whether enough kills hit, and enough of them a process with work to lose."""
    return len(kills) >= KILLS and sum(hit.epochs > 0 for hit in kills) >= AFTER_CHECKPOINT


def test_kills_between_and_within_stages(server, undisturbed, tmp_path):
    """At the beginning of each phase nothing of it is stored; an epoch later the first part is."""
    model = RecursiveMixtureVAE((1, 8, 8), STAGED.model)
    starts = model.phase_starts(STAGED.training.epochs)[1:]
    kills = []
    for epoch in [e for begin in starts for e in (begin, begin + 1)]:
        process, pipe = start(server, staged_run, tmp_path, hold=epoch)
        assert pipe.poll(LIMIT) and pipe.recv() == "held"
        kills.append(kill(process, tmp_path))
    assert [hit.epochs for hit in kills] == [e for begin in starts for e in (begin, begin + 1)]
    assert {hit.stage for hit in kills} == {1, 2, 3}
    finish(server, staged_run, tmp_path)
    assert stored(tmp_path) == undisturbed("stages")[1]
