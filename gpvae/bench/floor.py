"""What the arithmetic alone would take, and the multiple of it that training and evaluation take.

Dimensions: B images, P pixels, D latent; a layer of I inputs and O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from gpvae.bench.measure import Bench, Case, Row, compare, repeated, row, train_case
from gpvae.config import ModelConfig
from gpvae.evaluate import DRAWS_PER_BLOCK, TEMPORARIES, log_likelihood
from gpvae.memory import Memory
from gpvae.timing import alternate
from gpvae.training import build_model

Layer = tuple[int, int]
Product = tuple[int, int, int]  # [m, k] times [k, n]

BYTES_PER_PARAMETER = 32  # Adam: weight and two moments read and written, gradient read; its norm
BYTES_PER_UNIT = 20  # activation: read and written; backward: both gradients and the unit itself


def encoder_layers(config: ModelConfig, pixels: int) -> list[Layer]:
    """(I, O) of the linear layers of the VAE's encoder, the first one first."""
    widths = [pixels, *config.hidden]
    return [*pairwise(widths), *[(widths[-1], config.latent_dim)] * 2]


def decoder_layers(config: ModelConfig, pixels: int) -> list[Layer]:
    """(I, O) of the linear layers of the decoder."""
    return list(pairwise([config.latent_dim, *reversed(config.hidden), pixels]))


def step_products(layers: Sequence[Layer], batch: int) -> list[Product]:
    """Matrix products of a training step: for each layer its output and the gradients of its
    weights and inputs; nobody needs the gradient of the first layer's inputs, the pixels.
    """
    products = []
    for index, (inputs, outputs) in enumerate(layers):
        products += [(batch, inputs, outputs), (outputs, batch, inputs)]
        if index:
            products.append((batch, outputs, inputs))
    return products


def flops(products: Sequence[Product]) -> int:
    """Floating-point operations of matrix products, 2 m k n each."""
    return sum(2 * m * k * n for m, k, n in products)


def step_bytes(layers: Sequence[Layer], batch: int) -> int:
    """Bytes that a training step moves outside of its matrix products, at least.

    `BYTES_PER_PARAMETER` for Adam and the gradient's norm, `BYTES_PER_UNIT` for what follows each
    layer in the forward and backward pass, and the stored pixels.
    """
    parameters = sum(inputs * outputs + outputs for inputs, outputs in layers)
    units = batch * sum(outputs for _, outputs in layers)
    return BYTES_PER_PARAMETER * parameters + BYTES_PER_UNIT * units + batch * layers[0][0]


def product_case(bench: Bench, products: Sequence[Product]) -> Case:
    """All of these products, each with operands and a result of its own."""
    operands = [
        (
            torch.randn(m, k, device=bench.device),
            torch.randn(n, k, device=bench.device).T,  # as weights lie in memory
            torch.empty(m, n, device=bench.device),
        )
        for m, k, n in products
    ]

    def multiply() -> None:
        for left, right, result in operands:
            torch.mm(left, right, out=result)

    return multiply


def copy_case(bench: Bench, moved: int) -> Case:
    """A copy that reads and writes `moved` bytes in all."""
    source = torch.zeros(max(1, moved // 8), device=bench.device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def floor(bench: Bench) -> Iterator[Row]:
    """Rates of the device, the floor of the VAE's training step, and the step as its multiple."""
    config, pixels = bench.config(), math.prod(bench.shape)
    batch = config.training.batch_size
    encoder, decoder = (f(config.model, pixels) for f in (encoder_layers, decoder_layers))
    layers = [*encoder, *decoder]
    yield from rates(bench, layers, batch)

    products, moved = step_products(layers, batch), step_bytes(layers, batch)
    cases = {
        "matrix products of a step": repeated(bench, product_case(bench, products)),
        "bytes of a step outside them": repeated(bench, copy_case(bench, moved)),
        "training step, vae": train_case(bench, config),
    }
    seconds = alternate(cases, bench.repeats, warmup=1)
    each = [[1000 * t / bench.steps for t in times] for times in seconds.values()]
    names, units = list(cases), [(flops(products) / 1e9, "GFLOP"), (moved / 1e6, "MB")]
    bounds = [a + b for a, b in zip(*each[:2], strict=True)]
    for name, ms, (value, unit) in zip(names, each, units, strict=False):
        yield row("floor", name, ms=ms, value=value, unit=unit)
    note = "products, then bytes at the rate of a copy"
    yield row("floor", "floor of the step", ms=bounds, note=note)
    ratios = [step / bound for step, bound in zip(each[2], bounds, strict=True)]
    yield row("floor", names[2], ms=each[2], ratios=ratios, relative_to="floor of the step")


def rates(bench: Bench, layers: Sequence[Layer], batch: int) -> Iterator[Row]:
    """GFLOP/s of products of several shapes, GB/s of copies of several sizes."""
    large = 64 if bench.quick else 8192 if bench.on_gpu else 1024
    shapes = [(batch, inputs, outputs) for inputs, outputs in dict.fromkeys(layers)]
    for shape in [*shapes, (large, large, large)]:
        name = "product " + "x".join(map(str, shape))
        yield from rate(bench, name, product_case(bench, [shape]), flops([shape]), "GFLOP/s")
    parameters = sum(inputs * outputs for inputs, outputs in layers)
    for size in (4 * parameters, 2**20 if bench.quick else 2**30 if bench.on_gpu else 2**27):
        name = f"copy of {size / 1e6:.3g} MB"
        yield from rate(bench, name, copy_case(bench, 2 * size), 2 * size, "GB/s")


def rate(bench: Bench, name: str, case: Case, amount: float, unit: str) -> Iterator[Row]:
    """The row of one case with its rate, amount / 1e9 in a second."""
    (found,) = compare(bench, "floor", {name: repeated(bench, case)}, name, bench.steps)
    found |= {"ratio": None, "ratio_min": None, "ratio_max": None, "relative_to": ""}
    yield found | {"value": amount / found["ms"] / 1e6, "unit": unit}


def likelihood(bench: Bench) -> Iterator[Row]:
    """Time of `log_likelihood` for an image and sample, relative to the decoder's products."""
    images, samples = (20, 5) if bench.quick else (200, 1000 if bench.on_gpu else 50)
    x, base = bench.binary(images), "decoder's matrix products"
    cases = {base: decoder_products(bench, images, samples)}
    for encoder in ("vae", "gpvae"):
        for output in ("bernoulli", "gaussian"):
            cases[f"{encoder}, {output}"] = likelihood_case(bench, encoder, output, x, samples)
    for found in compare(bench, "likelihood", cases, base, each=images * samples):
        whole = found["ms"] / 1000 * 10_000 * 5000
        yield found | {"value": whole, "unit": "s for 10,000 images, S = 5000 (extrapolated)"}


def likelihood_case(bench: Bench, encoder: str, output: str, x: Tensor, samples: int) -> Case:
    """log p(x) of the images with S samples."""
    config = bench.config(encoder, **{"model.output": output})
    model = build_model(config, bench.shape).to(bench.device).eval()
    return lambda: log_likelihood(model, x, samples)


def decoder_products(bench: Bench, images: int, samples: int) -> Case:
    """The decoder's matrix products for S samples of the images, in the evaluation's chunks."""
    pixels = math.prod(bench.shape)
    layers = decoder_layers(bench.config().model, pixels)
    fitting = Memory(None, bench.device).rows(pixels * 4 * TEMPORARIES * images)
    most = min(fitting, DRAWS_PER_BLOCK)
    rows = [images * min(most, samples - start) for start in range(0, samples, most)]
    return product_case(bench, [(r, inputs, outputs) for r in rows for inputs, outputs in layers])
