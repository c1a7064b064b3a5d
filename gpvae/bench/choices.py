"""The choices that made training as fast as it is, each against its alternatives."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gpvae.bench.measure import (
    Bench,
    Case,
    Row,
    compare,
    epoch_of,
    missing,
    row,
    train_case,
    training_step,
)
from gpvae.data import load_dataset
from gpvae.evaluate import log_likelihood
from gpvae.experiment import cpu_threads
from gpvae.profiles import get_profile
from gpvae.stats import paired_interval
from gpvae.step import matmul_precision
from gpvae.tables import format_interval
from gpvae.training import evaluation_images, train

NAIVE = "naive loop"
DEFAULT = "uint8 pixels, Adam fused (default)"


def variants(bench: Bench) -> Iterator[Row]:
    """Training loops of the VAE on the CPU, each relative to the naive one.

    The naive loop reads float images from a DataLoader with its default collation and steps Adam
    one tensor after the other. The lines below change one thing after the other up to the default,
    the further ones change one thing of the default.
    """
    if bench.on_gpu:
        yield missing("variants", "all", "about the CPU")
        return
    loops: dict[str, Mapping[str, bool]] = {
        "uint8 pixels, Adam one by one": {"foreach": False, "fused": False},
        "uint8 pixels, Adam foreach": {"foreach": True},
        DEFAULT: {"fused": True},
    }
    cases = {NAIVE: naive(bench)}
    cases |= {name: loop(bench, adam) for name, adam in loops.items()}
    default = cases[DEFAULT]
    cases["default, matmul precision medium"] = with_medium(default)
    cases["default, bfloat16"] = train_case(bench, bench.config(**{"model.precision": "bfloat16"}))
    for threads in (1, 2):
        if bench.threads != threads <= (os.cpu_count() or 1):
            cases[f"default, threads {threads}"] = with_threads(default, threads)
    if bench.compile and shutil.which("c++"):
        cases["default, torch.compile"] = compiled(bench)
    yield from compare(bench, "variants", cases, NAIVE, bench.steps)
    for name, reason in {
        "default, threads 2": "the default has two" if bench.threads == 2 else "one core",
        "default, torch.compile": "no C++ compiler" if bench.compile else "asked for by --compile",
    }.items():
        if name not in cases:
            yield missing("variants", name, reason)


def naive(bench: Bench) -> Case:
    """The loop of most tutorials."""
    config = bench.config()
    step = training_step(bench, config, {"foreach": False, "fused": False})
    images = list(bench.images(bench.steps * config.training.batch_size).unit())
    loader = DataLoader(images, batch_size=config.training.batch_size, shuffle=True)
    return epoch_of(step, lambda: iter(loader))


def loop(bench: Bench, adam: Mapping[str, bool]) -> Case:
    """The project's loop with another Adam."""
    config = bench.config()
    step = training_step(bench, config, adam)
    return epoch_of(step, stored(bench, config.training.batch_size))


def stored(bench: Bench, batch: int) -> Callable[[], Iterator[Tensor]]:
    """Batches of the pixels in memory."""
    images, generator = bench.images(bench.steps * batch), torch.Generator().manual_seed(0)
    return lambda: images.batches(batch, generator, scaled=False)


def with_medium(case: Case) -> Case:
    """The case with PyTorch's least precise float32 products."""

    def run() -> None:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            case()
        finally:
            torch.set_float32_matmul_precision(before)

    return run


def with_threads(case: Case, threads: int) -> Case:
    """The case on so many threads."""

    def run() -> None:
        with cpu_threads(threads):
            case()

    return run


def compiled(bench: Bench) -> Case:
    """The default loop with a compiled loss."""
    config = bench.config()
    step = training_step(bench, config)
    step.loss_terms = torch.compile(step.loss_terms)
    return epoch_of(step, stored(bench, config.training.batch_size))


def precision(bench: Bench) -> Iterator[Row]:
    """Speed of a training step in each precision, and its effect on the likelihood."""
    types = ["float32", "tf32", "bfloat16"] if bench.on_gpu else ["float32", "bfloat16"]
    for name in ("vae", "gpvae"):
        cases = {
            f"{name}, {kind}": train_case(bench, bench.config(name, **{"model.precision": kind}))
            for kind in types
        }
        yield from compare(bench, "precision", cases, f"{name}, float32", bench.steps)
        if not bench.on_gpu:
            yield missing("precision", f"{name}, tf32", "needs a GPU")
        yield from effects(bench, name, types)


def effects(bench: Bench, encoder: str, types: list[str]) -> Iterator[Row]:
    """Difference of log p(x) to float32 after the same short training on digits."""
    seeds, epochs = (2, 2) if bench.quick else (3, 60)
    data = load_dataset("digits")
    values: dict[str, list[Tensor]] = {kind: [] for kind in types}
    for kind in types:
        for seed in range(seeds):
            config = get_profile("smoke" if bench.quick else "digits").base.override(
                **{
                    "model.encoder": encoder,
                    "model.precision": kind,
                    "training.epochs": epochs,
                    "training.device": str(bench.device),
                    "seed": seed,
                }
            )
            model = train(config, data).model
            x = evaluation_images(data, "test", config).to(bench.device)
            with matmul_precision(kind):
                estimate = log_likelihood(model, x, config.evaluation.samples)
            values[kind].append(estimate.value.cpu().numpy())
    for kind in types[1:]:
        difference = paired_interval(values[kind], values["float32"])
        yield row(
            "precision",
            f"{encoder}, {kind} - float32, log p(x)",
            value=difference.value,
            unit="nats per image",
            note=f"digits, {epochs} epochs, {seeds} seeds: {format_interval(difference, '+')}",
        )
