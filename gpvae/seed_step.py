"""The training step of K models that differ in their weights, as one step of batched operations.

Dimensions: K members, B images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from gpvae.config import RunConfig
from gpvae.data.dataset import to_unit
from gpvae.noise import Recorder, Replay, normal, uniform
from gpvae.step import BaseStep
from gpvae.vae import VAE


class LossTerms(nn.Module):
    """A model whose call is `loss_terms`, as `functional_call` needs it."""

    def __init__(self, model: VAE) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, n_train: int, source: Replay) -> dict[str, Tensor]:
        """See `VAE.loss_terms`."""
        return self.model.loss_terms(x, n_train, source)


class Stacked:
    """K models of one kind as one, whose weights have a first dimension more.

    Args:
        models: in training mode, all on one device; the first becomes the template, a model
            that holds any member's weights for a while.

    Attributes:
        parameters, buffers: by name, each [K, ...].
    """

    def __init__(self, models: Sequence[VAE]) -> None:
        wrapped = [LossTerms(model) for model in models]
        self.parameters, self.buffers = stack_module_state(wrapped)
        self.terms, self.template = wrapped[0], wrapped[0].model

    @torch.no_grad()
    def put(self, member: int, values: Sequence[Tensor] = ()) -> None:
        """Give the template a member's weights, or its part of other values [K, ...]."""
        values = [*(values or self.parameters.values()), *self.buffers.values()]
        places = [*self.terms.parameters(), *self.terms.buffers()]
        torch._foreach_copy_(places, [value[member] for value in values])


class SeedStep(BaseStep):
    """`gpvae.step.Step` of K models at once.

    Args:
        stacked: the models.
        optimizer: of the stacked parameters.
        config: any of the runs.
        levels: grey levels of the stored pixels.
        n_train: number of training images, N.
        generators: K, each of one member's random numbers, on the models' device.
        averages: moving average of each stacked parameter, updated here; empty for none.
    """

    def __init__(
        self,
        stacked: Stacked,
        optimizer: torch.optim.Optimizer,
        config: RunConfig,
        levels: int,
        n_train: int,
        generators: Sequence[torch.Generator],
        averages: list[Tensor],
    ) -> None:
        self.stacked = stacked
        self.weights = {name: p.detach() for name, p in stacked.parameters.items()}  # same memory
        self.asked: dict[tuple[int, ...], list[tuple[str, tuple[int, ...]]]] = {}
        self.gradients = vmap(grad(self._loss, has_aux=True))
        super().__init__(
            stacked.template,
            list(stacked.parameters.values()),
            optimizer,
            config,
            levels,
            n_train,
            generators,
            averages,
        )

    def eager(self, pixels: Tensor) -> Tensor:
        """One step on stored pixels [K, B, C, H, W]; the loss terms in nats per image, [K, terms].

        Each generator is drawn from in the order of a lone step: augmentation, then the model.
        """
        augment, unit = self.model.generative.output.augment, to_unit(pixels, self.levels)
        x = torch.stack([augment(own, g) for own, g in zip(unit, self.generators, strict=True)])
        gradients, terms = self.gradients(
            self.weights, self.stacked.buffers, x, self._draw(x, self._asked(x[0]))
        )
        clipped = clip(list(gradients.values()), self.training.clip_norm)
        for parameter, gradient in zip(self.parameters, clipped, strict=True):
            parameter.grad = gradient
        self.update()
        return terms

    def _loss(
        self,
        weights: dict[str, Tensor],
        buffers: dict[str, Tensor],
        x: Tensor,
        draws: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Loss and its terms of one member."""
        arguments = (x, self.n_train, Replay(draws))
        terms = functional_call(self.stacked.terms, (weights, buffers), arguments)
        return self.loss(terms), torch.stack(list(terms.values()))

    def _asked(self, x: Tensor) -> list[tuple[str, tuple[int, ...]]]:
        """What a step on images x [B, C, H, W] draws inside the model, in order."""
        shape = tuple(x.shape)
        if shape not in self.asked:
            recorder = Recorder(torch.Generator(x.device).manual_seed(0))
            loss = sum(self.model.loss_terms(x, self.n_train, recorder).values())
            # Backward, too: what is made once and kept must be made outside of vmap.
            torch.autograd.grad(loss, list(self.model.parameters()), allow_unused=True)
            self.asked[shape] = recorder.asked
        return self.asked[shape]

    def _draw(self, x: Tensor, asked: list[tuple[str, tuple[int, ...]]]) -> list[Tensor]:
        """These draws from every member's generator, each [K, ...]."""
        kinds = {"normal": normal, "uniform": uniform}
        return [
            torch.stack([kinds[kind](shape, x, g) for g in self.generators])
            for kind, shape in asked
        ]


def clip(gradients: list[Tensor], largest: float) -> list[Tensor]:
    """Gradients [K, ...], each member's scaled as `torch.nn.utils.clip_grad_norm_` would."""
    count = len(gradients[0])
    norms = [torch.linalg.vector_norm(g.reshape(count, -1), dim=1) for g in gradients]
    total = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    factor = (largest / (total + 1e-6)).clamp(max=1.0)
    # Fused optimisers walk through memory: a gradient must lie there like its parameter.
    return [(g * factor.view(-1, *[1] * (g.ndim - 1))).contiguous() for g in gradients]
