"""What each encoder costs relative to the VAE: training, inference, capture, seeds at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gpvae.bench.measure import (
    LEVELS,
    N_TRAIN,
    Bench,
    Case,
    Row,
    built,
    compare,
    epoch_of,
    missing,
    repeated,
    row,
    train_case,
    training_step,
)
from gpvae.config import METHODS, RunConfig
from gpvae.ensemble import Ensemble

NO_GPU = "needs a GPU"
PROFILED = 10  # steps
SEEDS = 10
NOTES = {
    "svi": "trains as the VAE does: what its ratio differs from 1 is noise",
    "rme3": "with all components, in the last phase",
}


def training(bench: Bench) -> Iterator[Row]:
    """Milliseconds of a training step and images per second, for every encoder."""
    configs = methods(bench)
    cases = {name: train_case(bench, config) for name, config in configs.items()}
    for found in compare(bench, "training", cases, "vae", bench.steps, NOTES):
        batch = configs[found["case"]].training.batch_size
        yield found | {"value": 1000 * batch / found["ms"], "unit": "images/s"}


def methods(bench: Bench) -> dict[str, RunConfig]:
    """Every method by its name in tables, such as `iaf4`."""
    configs = [bench.config(encoder) for encoder in METHODS]
    return {config.model.method: config for config in configs}


def inference(bench: Bench) -> Iterator[Row]:
    """Posterior and one sample: for one image (latency) and for 1000 (throughput)."""
    configs = methods(bench)
    configs["savae8"] = bench.config("savae", **{"model.savae.steps": 8})
    configs["vlae1"] = bench.config("vlae", **{"model.vlae.steps": 1})
    for batch in (1, 20 if bench.quick else 1000):
        x = bench.binary(batch)
        timed = dict(configs)
        if batch > 1 and not bench.quick:
            del timed["svi"]
            yield missing("inference", f"svi, batch {batch}", "its searches take minutes a turn")
        cases = {name: done(bench, infer_case(bench, c, x)) for name, c in timed.items()}
        notes = {"svi": "searches for each image's optimum; random weights"}
        for found in compare(bench, "inference", cases, "vae", notes=notes):
            named = {
                "case": f"{found['case']}, batch {batch}",
                "relative_to": f"vae, batch {batch}",
            }
            yield found | named | {"value": 1000 * batch / found["ms"], "unit": "images/s"}


def infer_case(bench: Bench, config: RunConfig, x: Tensor) -> Case:
    """q(z | x) of the images and one sample of each."""
    model = built(bench, config).eval()
    generator = torch.cuda.default_generators[0] if bench.on_gpu else torch.Generator()

    @torch.no_grad()
    def infer() -> None:
        model(x).rsample((), generator)

    return infer


def done(bench: Bench, case: Case) -> Case:
    """The case, waiting for its result."""

    def waited() -> None:
        case()
        if bench.on_gpu:
            torch.cuda.synchronize()

    return waited


def capture(bench: Bench) -> Iterator[Row]:
    """The step as a CUDA graph, and compiled as well, against the eager one; operations of a step.

    The value of a timed row is an epoch of MNIST's size at that rate.
    """
    names = ("vae", "gpvae")
    ways = {
        "eager": {"training.capture": False},
        "captured": {},
        "captured, compiled": {"training.compile": True},
    }
    for name in names:
        configs = {f"{name} {way}": bench.config(name, **ways[way]) for way in ways}
        if not bench.on_gpu:
            yield from (missing("capture", case, NO_GPU) for case in list(configs)[1:])
            configs = {f"{name} eager": configs[f"{name} eager"]}
        else:
            yield from epochs(bench, configs, f"{name} eager")
        for case, config in configs.items():
            yield from operations(bench, case, config)
    if bench.on_gpu:
        yield from captured_inference(bench, names)


def captured_inference(bench: Bench, names: Sequence[str]) -> Iterator[Row]:
    """Posterior and one sample as a CUDA graph, which is what the kernels alone take."""
    for batch in (1, 1000):
        x = bench.binary(batch)
        cases = {f"{name} inference captured, batch {batch}": name for name in names}
        timed = {
            case: repeated(bench, infer_case(bench, bench.config(name), x))
            for case, name in cases.items()
        }
        yield from compare(bench, "capture", timed, next(iter(timed)), bench.steps)


def epochs(bench: Bench, configs: dict[str, RunConfig], base: str) -> list[Row]:
    """Training steps in turns."""
    cases = {name: train_case(bench, config) for name, config in configs.items()}
    for case in cases.values():
        case()  # compiling counts in no turn
    rows = compare(bench, "capture", cases, base, each=bench.steps)
    steps = -(-N_TRAIN // bench.config().training.batch_size)
    unit = f"s for an epoch of {N_TRAIN:,} images"
    return [found | {"value": found["ms"] / 1000 * steps, "unit": unit} for found in rows]


def operations(bench: Bench, case: str, config: RunConfig) -> Iterator[Row]:
    """Operators of a training step on a CPU; kernels and launches on a GPU."""
    step, pixels = training_step(bench, config), bench.images(config.training.batch_size).pixels
    for unit, count in profiled(bench, lambda: step(pixels)).items():
        yield row("capture", case, value=count / PROFILED, unit=f"{unit} per step")


def profiled(bench: Bench, step: Callable[[], object]) -> dict[str, int]:
    """What torch.profiler counts in `PROFILED` steps, after some that set everything up."""
    for _ in range(5):
        step()
    activities = [ProfilerActivity.CPU]
    if bench.on_gpu:
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with profile(activities=activities) as found:
        for _ in range(PROFILED):
            step()
        if bench.on_gpu:
            torch.cuda.synchronize()
    events = found.key_averages()
    if not bench.on_gpu:
        return {"aten operators": sum(e.count for e in events if e.key.startswith("aten::"))}
    return {
        "kernels": sum(e.count for e in events if e.device_type == DeviceType.CUDA),
        "launches": sum(e.count for e in events if "Launch" in e.key),
    }


def seeds(bench: Bench) -> Iterator[Row]:
    """A training step of one seed by itself, and of several seeds at once, per seed."""
    count = 2 if bench.quick else SEEDS
    for name in ("vae", "gpvae"):
        base, together = f"{name}, one seed", f"{name}, {count} seeds at once"
        cases = {
            base: train_case(bench, bench.config(name)),
            together: seeds_case(bench, bench.config(name), count),
        }
        each = {base: bench.steps, together: bench.steps * count}
        notes = {together: "time of one step of one seed"}
        yield from compare(bench, "seeds", cases, base, each, notes)


def seeds_case(bench: Bench, config: RunConfig, count: int) -> Case:
    """`bench.steps` steps of `gpvae.ensemble.train_seeds`."""
    configs = [config.override(seed=seed) for seed in range(count)]
    ensemble = Ensemble(configs, bench.shape, bench.device, images={})
    images, batch = (
        bench.images(bench.steps * config.training.batch_size),
        config.training.batch_size,
    )

    def batches() -> Iterator[Tensor]:
        orders = [images.batches(batch, g, scaled=False) for g in ensemble.generators]
        return (torch.stack(pixels) for pixels in zip(*orders, strict=True))

    return epoch_of(ensemble.step(LEVELS, N_TRAIN), batches)
