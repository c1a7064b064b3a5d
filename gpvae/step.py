"""One optimisation step: a function that can be read, and the same replayed as a CUDA graph.

On a GPU the step of a small VAE is some 120 kernels of a few microseconds each, and launching
them takes longer than running them. A captured step is one launch. What it replays is the eager
step itself, in the same order and with the same random numbers. Compiled as well, there are fewer
kernels; then sums are taken in another order.

References:
    CUDA graphs in PyTorch, https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from gpvae.config import RunConfig
from gpvae.data.dataset import to_unit
from gpvae.vae import VAE

NOT_COMPILED = ("rme", "savae", "vlae")  # they differentiate inside, or change with the epochs
EAGER_STEPS = 3  # of each batch shape before capture: libraries and the optimiser set themselves up


class BaseStep(ABC):
    """What the step of one model and that of several (`gpvae.ensemble`) have in common.

    Args:
        model: whose loss it is.
        parameters: that are trained, on their device.
        optimizer: of the parameters.
        config: the run.
        levels: grey levels of the stored pixels.
        n_train: number of training images, N.
        generators: of all random numbers, on the device.
        averages: moving average of each parameter, updated here; empty for none.

    Attributes:
        names: of the loss terms, known after the first call.
    """

    def __init__(
        self,
        model: VAE,
        parameters: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        config: RunConfig,
        levels: int,
        n_train: int,
        generators: Sequence[torch.Generator],
        averages: list[Tensor],
    ) -> None:
        self.model, self.optimizer, self.training = model, optimizer, config.training
        self.levels, self.n_train, self.generators = levels, n_train, list(generators)
        self.parameters, self.averages = list(parameters), averages
        self.names: list[str] = []
        self.kl_weight = torch.ones((), device=self.parameters[0].device)
        self.captured = captures(config, model)
        if self.captured:  # a number would be frozen into the graph
            for group in optimizer.param_groups:
                group["lr"] = torch.as_tensor(group["lr"], device=self.kl_weight.device).clone()
        self.run = self._fresh()

    def __call__(self, pixels: Tensor) -> Tensor:
        """`eager`, or the same replayed."""
        return self.run(pixels)

    @abstractmethod
    def eager(self, pixels: Tensor) -> Tensor:
        """The step itself on stored pixels; returns the loss terms in nats per image."""

    def start_epoch(self, epoch: int, epochs: int, new_phase: bool) -> None:
        """Set what is constant within an epoch (counted from 0), without waiting for a GPU."""
        rate = learning_rate(epoch, epochs, self.training.schedule, self.training.learning_rate)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self.kl_weight.fill_(min(1.0, (epoch + 1) / max(1, self.training.kl_warmup)))
        if new_phase:  # the model computes something else now, perhaps from other weights
            self.run = self._fresh()
            if self.averages:
                torch._foreach_copy_(self.averages, [p.detach() for p in self.parameters])

    def loss(self, terms: dict[str, Tensor]) -> Tensor:
        """The weighted sum of the terms, whose names are noted."""
        self.names[:] = terms
        return weighted_sum(terms, self.kl_weight if self.training.kl_warmup else None)

    @torch.no_grad()
    def update(self) -> None:
        """Step the optimiser and the averages, once the gradients are there."""
        self.optimizer.step()
        if self.averages:
            torch._foreach_lerp_(self.averages, self.parameters, 1 - self.training.average)

    def _fresh(self) -> Callable[[Tensor], Tensor]:
        return Captured(self.eager, *self.generators) if self.captured else self.eager


class Step(BaseStep):
    """Batch, loss, backward, clip, step, for a model on its device.

    Args:
        model: in training mode.
        optimizer: of its trainable parameters.
        config, levels, n_train: as for `BaseStep`.
        generator: of all random numbers, on the model's device.
        averages: moving average of each trainable parameter, updated here; empty for none.
    """

    def __init__(
        self,
        model: VAE,
        optimizer: torch.optim.Optimizer,
        config: RunConfig,
        levels: int,
        n_train: int,
        generator: torch.Generator,
        averages: list[Tensor],
    ) -> None:
        trainable = [p for p in model.parameters() if p.requires_grad]
        super().__init__(
            model, trainable, optimizer, config, levels, n_train, [generator], averages
        )
        self.loss_terms, self.finish = model.loss_terms, self.clip_and_update
        if compiles(config, model):
            self.loss_terms, self.finish = (
                torch.compile(self.loss_terms),
                torch.compile(self.finish),
            )

    def eager(self, pixels: Tensor) -> Tensor:
        """One step on stored pixels [B, C, H, W]; the loss terms in nats per image, [terms]."""
        (generator,) = self.generators
        x = self.model.generative.output.augment(to_unit(pixels, self.levels), generator)
        terms = self.loss_terms(x, self.n_train, generator)
        self.optimizer.zero_grad()
        self.loss(terms).backward()
        self.finish()
        return torch.stack([value.detach() for value in terms.values()])

    def clip_and_update(self) -> None:
        """Bound the gradient's norm, then step."""
        torch.nn.utils.clip_grad_norm_(self.parameters, self.training.clip_norm)
        self.update()


def captures(config: RunConfig, model: VAE) -> bool:
    """Whether the steps of this run are replayed as CUDA graphs."""
    return config.training.capture and next(model.parameters()).is_cuda


def compiles(config: RunConfig, model: VAE) -> bool:
    """Whether the kernels of this run's steps are fused by torch.compile."""
    wanted = config.training.compile and config.model.encoder not in NOT_COMPILED
    return wanted and captures(config, model)


def make_adam(
    parameters: Sequence[Tensor], config: RunConfig, model: VAE, compiled: bool = False
) -> torch.optim.Adam:
    """Adam in the form that is fastest for the step: one kernel, or operations to be compiled."""
    form = {"foreach": True} if compiled else {"fused": True}
    return torch.optim.Adam(
        parameters,
        lr=config.training.learning_rate,
        capturable=captures(config, model),
        **form,
    )


def weighted_sum(terms: dict[str, Tensor], kl_weight: Tensor | None) -> Tensor:
    """The loss: all terms, the KL times its weight."""
    if kl_weight is not None:
        terms = terms | {"kl": kl_weight * terms["kl"]}
    return sum(terms.values())


def learning_rate(epoch: int, epochs: int, schedule: str, first: float) -> float:
    """The learning rate of an epoch, counted from 0."""
    return first * 0.5 * (1 + math.cos(math.pi * epoch / epochs)) if schedule == "cosine" else first


class Captured:
    """A function of one tensor, replayed as a CUDA graph for each shape of its argument.

    The first `EAGER_STEPS` calls of a shape run eagerly. They are real calls, not rehearsals, so
    the sequence of states is that of the eager function. It must not wait for the GPU or branch on
    the GPU's numbers, and what it reads besides its argument must stay in place.

    Args:
        function: from a tensor to a tensor.
        generators: those it draws from.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], *generators: torch.Generator) -> None:
        self.function, self.generators = function, generators
        self.calls: dict[tuple[int, ...], int] = {}
        self.graphs: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def __call__(self, argument: Tensor) -> Tensor:
        shape = tuple(argument.shape)
        self.calls[shape] = self.calls.get(shape, 0) + 1
        if self.calls[shape] <= EAGER_STEPS:
            return self._aside(argument)
        if shape not in self.graphs:
            self.graphs[shape] = self._capture(argument)
        graph, place, result = self.graphs[shape]
        place.copy_(argument)
        graph.replay()
        return result.clone()

    def _aside(self, argument: Tensor) -> Tensor:
        """Run on a stream of its own, as capture needs of the calls before it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), warnings.catch_warnings():
            # The optimiser, made for capture, wonders about eager steps.
            warnings.filterwarnings("ignore", message=".*capturable=True.*")
            result = self.function(argument)
        torch.cuda.current_stream().wait_stream(stream)
        return result

    def _capture(self, argument: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        """Record the function; nothing is computed and no random number drawn."""
        graph, place = torch.cuda.CUDAGraph(), argument.clone()
        for generator in self.generators:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph):
            result = self.function(place)
        # Capture resets the generators' place on a stream of its own. Unless that is over, the
        # first replay, which sets it, may draw other numbers than the eager step would.
        torch.cuda.synchronize()
        return graph, place, result


def capturing() -> bool:
    """Whether a CUDA graph is being recorded, when code must not look at numbers."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@contextmanager
def swapped(parameters: list[Tensor], values: list[Tensor]) -> Iterator[None]:
    """Parameters hold other values for a while; nothing happens without values."""
    if not values:
        yield
        return
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        torch._foreach_copy_(parameters, values)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(parameters, before)


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """float32 matrix products as TF32 where that is asked for and the GPU can."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
