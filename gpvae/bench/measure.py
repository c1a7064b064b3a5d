"""What every section of the benchmark shares: the setting, the rows, and the comparison in turns.

A row is a plain dictionary with the keys of `row`; what was not measured says why in its note.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from gpvae.config import RunConfig
from gpvae.data import Images
from gpvae.results import code_hash, versions
from gpvae.step import Step, compiles, make_adam, matmul_precision
from gpvae.timing import alternate
from gpvae.training import build_model
from gpvae.vae import VAE

Row = dict[str, Any]
Case = Callable[[], object]

N_TRAIN = 60_000  # images of MNIST, for the weight of GPVAE's weight KL and for an epoch
LEVELS = 256
SLOW = 2.0  # seconds; a case whose call takes longer is compared apart
PATIENCE = 30.0  # seconds that the turns of a slow case may take, of which it gets one at least
TURN = 0.02  # seconds that each case gets in a turn, at least


@dataclass(frozen=True)
class Bench:
    """The setting of one benchmark.

    Args:
        device: where everything runs.
        threads: of the CPU.
        repeats: turns of each comparison.
        quick: tiny networks, to see that everything runs.
        compile: also measure torch.compile.
    """

    device: torch.device
    threads: int = 1
    repeats: int = 15
    quick: bool = False
    compile: bool = False

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images: those of MNIST."""
        return (1, 8, 8) if self.quick else (1, 28, 28)

    @property
    def steps(self) -> int:
        """Training steps between two readings of the clock."""
        return 2 if self.quick else 64 if self.on_gpu else 4

    def config(self, encoder: str = "vae", **changes: object) -> RunConfig:
        """The networks of the literature's MNIST experiments, 784-500-500 and D = 50."""
        small = {"model.hidden": (16,), "model.latent_dim": 4}
        large = {"model.hidden": (500, 500), "model.latent_dim": 50}
        return RunConfig().override(
            **{
                **(small if self.quick else large),
                "model.encoder": encoder,
                "model.output": "bernoulli",
                "training.batch_size": 16 if self.quick else 128,
                "training.device": str(self.device),
                **changes,
            }
        )

    def images(self, count: int) -> Images:
        """Random 8-bit images on the device."""
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, LEVELS, (count, *self.shape), generator=generator)
        return Images(pixels.to(torch.uint8), LEVELS).to(self.device)

    def binary(self, count: int) -> Tensor:
        """Random binary images on the device, [count, C, H, W]."""
        return (self.images(count).unit() > 0.5).float()


def row(
    section: str,
    case: str,
    *,
    ms: Sequence[float] = (),
    ratios: Sequence[float] = (),
    relative_to: str = "",
    value: float | None = None,
    unit: str = "",
    note: str = "",
) -> Row:
    """One row of the table.

    Args:
        section: of the benchmark.
        case: what was measured.
        ms: milliseconds, one for each turn.
        ratios: of the same turn's times.
        relative_to: the case in the ratios' denominator.
        value: a further number, in `unit`.
        unit: of the value.
        note: how to read it.
    """
    found = {"section": section, "case": case, **spread("ms", ms), **spread("ratio", ratios)}
    found |= {"turns": len(ms), "relative_to": relative_to}
    return {**found, "value": value, "unit": unit, "note": note}


def spread(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """Median, smallest and largest value; None where there is none."""
    low, middle, high = (min(values), median(values), max(values)) if values else (None,) * 3
    return {name: middle, f"{name}_min": low, f"{name}_max": high}


def missing(section: str, case: str, reason: str) -> Row:
    """The row of what cannot be measured here."""
    return row(section, case, note=f"not measured ({reason})")


def compare(
    bench: Bench,
    section: str,
    cases: Mapping[str, Case],
    base: str,
    each: Mapping[str, float] | float = 1,
    notes: Mapping[str, str] | None = None,
) -> list[Row]:
    """Run the cases in turns and return a row for each, with its ratio to `base` in each turn.

    A case whose call takes longer than `SLOW` seconds is compared with `base` apart, in as many
    turns as `PATIENCE` allows.

    Args:
        bench: the setting.
        section: of the rows.
        cases: by name, `base` among them.
        base: the case to which the others are compared.
        each: how many units of work (steps, images) a call does; times are given for one unit.
        notes: by case.
    """
    first = {name: duration(case) for name, case in cases.items()}
    slow = [name for name in cases if first[name] > SLOW and name != base]
    fast = {name: case for name, case in cases.items() if name not in slow}
    together = times(bench, fast, first, bench.repeats)
    rows = []
    for name in cases:
        seconds = together
        if name in slow:
            pair = {base: cases[base], name: cases[name]}
            turns = max(1, min(bench.repeats, int(PATIENCE / first[name])))
            seconds = times(bench, pair, first, turns, warmup=0)
        units = each if isinstance(each, int | float) else each[name]
        base_units = each if isinstance(each, int | float) else each[base]
        own = [t / units for t in seconds[name]]
        reference = [t / base_units for t in seconds[base]]
        rows.append(
            row(
                section,
                name,
                ms=[1000 * t for t in own],
                ratios=[t / b for t, b in zip(own, reference, strict=True)],
                relative_to=base,
                note=(notes or {}).get(name, ""),
            )
        )
    return rows


def times(
    bench: Bench,
    cases: Mapping[str, Case],
    first: Mapping[str, float],
    repeats: int,
    warmup: int = 1,
) -> dict[str, list[float]]:
    """Seconds of a call of each case, in turns; fast ones are called several times in a turn."""
    calls = {name: max(1, round(TURN / max(first[name], 1e-7))) for name in cases}
    if bench.quick:
        calls = dict.fromkeys(cases, 1)
    turns = {name: again(case, calls[name]) for name, case in cases.items()}
    seconds = alternate(turns, repeats, warmup)
    return {name: [t / calls[name] for t in each] for name, each in seconds.items()}


def again(case: Case, calls: int) -> Case:
    """The case, called several times."""

    def often() -> None:
        for _ in range(calls):
            case()

    return often


def duration(case: Case) -> float:
    """Seconds of one call; of a fast one, after a call that sets everything up."""
    (first,) = alternate({"": case}, repeats=1, warmup=0)[""]
    return first if first > SLOW else alternate({"": case}, repeats=1, warmup=0)[""][0]


def built(bench: Bench, config: RunConfig) -> VAE:
    """A fresh model on the device, in the last phase of its training."""
    model = build_model(config, bench.shape)
    for epoch in range(100):  # a recursive mixture, up to its last component
        model.start_epoch(epoch, 100, model.state_dict())
    return model.to(bench.device)


def training_step(
    bench: Bench, config: RunConfig, adam: Mapping[str, object] | None = None
) -> Step:
    """The step that `gpvae.training.train` makes, or one with another Adam."""
    model = built(bench, config).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    if adam:
        optimizer = torch.optim.Adam(parameters, lr=config.training.learning_rate, **adam)
    else:
        optimizer = make_adam(parameters, config, model, compiles(config, model))
    generator = torch.Generator(bench.device).manual_seed(config.seed)
    return Step(model, optimizer, config, LEVELS, N_TRAIN, generator, [])


def epoch_of(
    step: Callable[[Tensor], Tensor],
    batches: Callable[[], Iterator[Tensor]],
    precision: str = "float32",
) -> Case:
    """An epoch as `gpvae.training.train` does it: its losses are read once, at the end."""

    def epoch() -> Tensor:
        with matmul_precision(precision):
            return torch.stack([step(pixels) for pixels in batches()]).cpu()

    return epoch


def repeated(bench: Bench, case: Case) -> Case:
    """The case `bench.steps` times; on a GPU as one CUDA graph, so that launches do not count."""
    often = again(case, bench.steps)
    if not bench.on_gpu:
        return often
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):  # libraries set themselves up
        often()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        often()

    def replay(work: Case = often) -> None:  # which keeps the graph's tensors alive
        graph.replay()
        torch.cuda.synchronize()

    return replay


def train_case(bench: Bench, config: RunConfig) -> Case:
    """`bench.steps` training steps on stored pixels."""
    images = bench.images(bench.steps * config.training.batch_size)
    generator = torch.Generator(bench.device).manual_seed(0)

    def batches() -> Iterator[Tensor]:
        return images.batches(config.training.batch_size, generator, scaled=False)

    return epoch_of(training_step(bench, config), batches, config.model.precision)


def facts(bench: Bench) -> dict[str, Any]:
    """What the numbers depend on."""
    config = bench.config()
    gpu = torch.cuda.get_device_name(bench.device) if bench.on_gpu else None
    return {
        "device": gpu or "cpu",
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "threads": bench.threads,
        "precision": "float32",
        "networks": [*bench.shape, *config.model.hidden, config.model.latent_dim],
        "batch": config.training.batch_size,
        "repeats": bench.repeats,
        "quick": bench.quick,
        "versions": versions(),
        "code_hash": code_hash(),
    }


def cpu_name() -> str:
    """Model of the CPU, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
