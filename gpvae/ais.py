"""Annealed importance sampling: a slow reference for log p(x), with a check from above.

Chains move through f_t(z) = q_0(z)^(1 - beta_t) p(x, z)^beta_t from the base q_0 (beta = 0) to the
posterior (beta = 1) by Hamiltonian Monte Carlo, and collect

    log w = sum_t (beta_t - beta_{t-1}) (log p(x, z_{t-1}) - log q_0(z_{t-1})),

so that E w = p(x) exactly, whatever the transitions, and E log mean w <= log p(x). Started from an
exact posterior sample and run backwards, the same chain gives an upper bound; both together are a
sandwich (bidirectional Monte Carlo). Exact posterior samples exist for images drawn from the model
itself, so `sandwich` measures there how well an `AISOptions` does.

References:
    Annealed Importance Sampling (Neal, 2001), https://arxiv.org/abs/physics/9803008
    On the Quantitative Analysis of Decoder-Based Generative Models (Wu et al., 2017),
    https://arxiv.org/abs/1611.04273
    Sandwiching the Marginal Likelihood Using Bidirectional Monte Carlo (Grosse et al., 2015),
    https://arxiv.org/abs/1511.02543

Step sizes are adapted, for each image and temperature, in a pilot run of a few chains and are then
frozen: adapting while estimating would bias the estimate. All noise belongs to its image, so an
image's estimate does not depend on its batch.

Dimensions: N images, B images in a block, M chains, D latent. Estimates are in nats per image.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from gpvae.errors import ConfigError, unknown
from gpvae.evaluate import Estimate, check_count
from gpvae.noise import image_noise
from gpvae.outputs import Bernoulli, DiscretisedLogistic, Gaussian, Output, PixelGaussian
from gpvae.posteriors import DiagonalGaussian, Posterior
from gpvae.search import in_blocks
from gpvae.svi import prior
from gpvae.vae import VAE, Generative

PILOT_CHAINS = 4
PILOT, FORWARD, REVERSE = range(3)  # keep the noise of the three kinds of run apart


@dataclass(frozen=True)
class AISOptions:
    """How to anneal.

    Args:
        temperatures: steps from beta = 0 to beta = 1, on a sigmoid schedule.
        chains: M, whose weights are averaged.
        leapfrog: leapfrog steps of each transition.
        step: first step size of the pilot run, in units of the base's standard deviation.
        acceptance: rate that the pilot run adapts the step size to.
        seed: of all noise.
    """

    temperatures: int = 300
    chains: int = 8
    leapfrog: int = 10
    step: float = 0.1
    acceptance: float = 0.7
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("temperatures", "chains", "leapfrog"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}; expected at least 1.")
        if not self.step > 0:
            raise ConfigError(f"step={self.step}; expected a positive number.")
        if not 0 < self.acceptance < 1:
            raise ConfigError(f"acceptance={self.acceptance}; expected a rate in (0, 1).")


@dataclass(frozen=True)
class Annealed:
    """Result of `annealed_log_likelihood` for N images.

    Args:
        estimate: of log p(x), a stochastic lower bound; `samples` is the number of chains.
        acceptance: [N], mean acceptance rate of the transitions.
    """

    estimate: Estimate
    acceptance: Tensor


@dataclass(frozen=True)
class Sandwich:
    """Bounds on log p(x) of N images drawn from the model.

    Args:
        x: the images.
        lower: from chains that start at the base.
        upper: from chains that start at the latent from which the image was drawn.
    """

    x: Tensor
    lower: Estimate
    upper: Estimate

    @property
    def gap(self) -> float:
        """Mean of upper minus lower bound, in nats; small means that the annealing suffices."""
        return self.upper.mean - self.lower.mean


def schedule(temperatures: int, steepness: float = 4.0) -> list[float]:
    """beta_0 = 0, ..., beta_T = 1, dense at both ends (Wu et al., 2017)."""
    points = torch.linspace(-steepness, steepness, temperatures + 1, dtype=torch.float64).sigmoid()
    return ((points - points[0]) / (points[-1] - points[0])).tolist()


def annealed_log_likelihood(
    model: VAE,
    x: Tensor,
    options: AISOptions | None = None,
    base: Posterior | None = None,
) -> Annealed:
    """log p(x) of N images by annealed importance sampling.

    Args:
        model: only its decoder is used.
        x: images [N, C, H, W]; binary for a Bernoulli output.
        options: see `AISOptions`. Costs temperatures x leapfrog x chains decoder passes and back
            for each image.
        base: posteriors of all images whose Gaussian stand-ins the chains start from; the prior
            by default. A good one needs fewer temperatures, but a narrow one hides other modes.

    Raises:
        DataError: images that the model has no density of (`VAE.check_images`), or not one base
            for each.
    """
    options = options or AISOptions()
    model.check_images(x)
    if base is not None:
        check_count("base posteriors", base, x)
    log_w, accepted = log_weights(model.generative, x, base, options, None)
    return Annealed(_mean_weight(log_w), accepted)


def sandwich(model: VAE, count: int, options: AISOptions | None = None) -> Sandwich:
    """Forward and reverse annealing of `count` images drawn from the model."""
    options = options or AISOptions()
    generative = model.generative
    parameter = next(model.parameters())
    generator = torch.Generator(parameter.device).manual_seed(options.seed)
    z = torch.randn(
        (count, generative.latent_dim),
        generator=generator,
        device=parameter.device,
        dtype=parameter.dtype,
    )
    with torch.no_grad():
        raw = generative.decode(z)
        x = sample_pixels(generative.output, raw, generator).unflatten(-1, generative.shape)
    up, _ = log_weights(generative, x, None, options, None)
    down, _ = log_weights(generative, x, None, options, z)
    inverse = _mean_weight(down)
    upper = Estimate(-inverse.value, inverse.stderr, inverse.samples)
    return Sandwich(x, _mean_weight(up), upper)


def sample_pixels(output: Output, raw: Tensor, generator: torch.Generator) -> Tensor:
    """One draw from p(x | raw), [B, P]."""
    uniform = torch.rand(raw.shape, generator=generator, dtype=torch.float64, device=raw.device)
    # Away from 0 and 1, where quantiles are infinite.
    uniform = uniform.clamp(1e-12, 1 - 1e-12)
    match output:
        case Bernoulli():
            x = (uniform < raw.sigmoid()).double()
        case Gaussian():
            x = raw + output.log_std.exp() * torch.special.ndtri(uniform)
        case PixelGaussian():
            x = raw + output.std() * torch.special.ndtri(uniform)
        case DiscretisedLogistic():
            levels = output.levels - 1
            x = raw + output.log_scale.exp() * torch.logit(uniform)
            x = (x.clamp(0, 1) * levels).round() / levels
        case _:
            known = ("Bernoulli", "DiscretisedLogistic", "Gaussian", "PixelGaussian")
            raise ConfigError(unknown("output to draw from", type(output).__name__, known))
    return x.to(raw.dtype)


def _mean_weight(log_w: Tensor) -> Estimate:
    """log of the mean weight and its standard error by the delta method, from [M, N]."""
    chains = len(log_w)
    value = log_w.logsumexp(0) - math.log(chains)
    relative = (log_w - value).exp().var(0) / chains if chains > 1 else value * math.nan
    return Estimate(value, relative.sqrt(), chains)


def log_weights(
    generative: Generative,
    x: Tensor,
    base: Posterior | None,
    options: AISOptions,
    exact: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Log weights [M, N] and acceptance [N]; reverse runs from `exact` latents [N, D] if given."""
    q = prior(x, generative.latent_dim) if base is None else base.gaussian()

    def of_block(index: slice) -> tuple[Tensor, Tensor]:
        path = AnnealingPath(generative, x[index], q[index], options)
        steps = path.pilot()
        return path.forward(steps) if exact is None else path.reverse(steps, exact[index])

    blocks = in_blocks(generative, x, options.chains, of_block)
    weights, accepted = zip(*blocks, strict=True)
    return torch.cat(weights, 1), torch.cat(accepted)


class AnnealingPath:
    """The annealing path of a block of images."""

    def __init__(
        self, generative: Generative, x: Tensor, base: DiagonalGaussian, options: AISOptions
    ) -> None:
        self.generative, self.x, self.options = generative, x, options
        self.base = DiagonalGaussian(base.mean.detach(), base.std.detach())
        self.betas = schedule(options.temperatures)

    def pilot(self) -> Tensor:
        """Step sizes [T, B]: each temperature's, after adaptation at all earlier ones."""
        step = torch.full_like(self.base.mean[:, 0], self.options.step)
        z = self._start(min(PILOT_CHAINS, self.options.chains), PILOT)
        steps = []
        for t, beta in enumerate(self.betas[1:], 1):
            z, rate = self.transition(z, beta, step, PILOT, t)
            step = step * torch.exp(0.2 * (rate.mean(0) - self.options.acceptance))
            steps.append(step)
        return torch.stack(steps)

    def forward(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Log weights [M, B] of chains from the base, and mean acceptance [B]."""
        z = self._start(self.options.chains, FORWARD)
        return self._run(z, steps, range(1, len(self.betas)), FORWARD)

    def reverse(self, steps: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
        """Log inverse weights [M, B] of chains from an exact posterior sample [B, D]."""
        z = exact.expand(self.options.chains, -1, -1)
        return self._run(z, steps, range(len(self.betas) - 1, 0, -1), REVERSE)

    def _run(
        self, z: Tensor, steps: Tensor, order: Iterable[int], kind: int
    ) -> tuple[Tensor, Tensor]:
        log_w = torch.zeros(z.shape[:2], dtype=torch.float64, device=z.device)
        accepted = torch.zeros_like(self.base.mean[:, 0])
        for t in order:
            change = self.betas[t] - self.betas[t - 1]
            if kind == FORWARD:
                log_w = log_w + change * self._ratio(z)
            z, rate = self.transition(z, self.betas[t], steps[t - 1], kind, t)
            accepted = accepted + rate.mean(0) / len(steps)
            if kind == REVERSE:
                log_w = log_w - change * self._ratio(z)
        return log_w, accepted

    def _start(self, chains: int, kind: int) -> Tensor:
        return self.base.mean + self.base.std * self._noise(chains, kind, 0)[..., :-1]

    def _noise(self, chains: int, kind: int, t: int) -> Tensor:
        """[M, B, D + 1]: D numbers for the momentum and one for acceptance."""
        seed = (self.options.seed * 3 + kind) * (len(self.betas) + 1) + t
        return image_noise(self.x, chains, self.base.mean.shape[-1] + 1, seed)

    @torch.no_grad()
    def _ratio(self, z: Tensor) -> Tensor:
        """log p(x, z) - log q_0(z), [M, B]."""
        return (self.generative.log_joint(self.x, z) - self.base.log_prob(z)).double()

    def _energy(self, z: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        """-log f(z), [M, B], and its gradient [M, B, D]."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            log_f = beta * self.generative.log_joint(self.x, z)
            log_f = log_f + (1 - beta) * self.base.log_prob(z)
            gradient = torch.autograd.grad(log_f.sum(), z)[0]
        return -log_f.detach(), -gradient

    def transition(
        self, z: Tensor, beta: float, step: Tensor, kind: int, t: int
    ) -> tuple[Tensor, Tensor]:
        """One HMC step that leaves f invariant: new z, and acceptance probabilities [M, B].

        The mass matrix is that of the base, so that steps are in its standard deviations.
        """
        noise = self._noise(len(z), kind, t)
        momentum, uniform = noise[..., :-1], torch.special.ndtr(noise[..., -1])
        # A length that varies from step to step keeps orbits from closing on themselves.
        jitter = 0.8 + 0.4 * ((t * 0.6180339887) % 1)
        size = jitter * step[:, None] * self.base.std
        end, _, change = self.leapfrog(z, momentum, beta, size)
        rate = (-change).clamp_max(0).exp().nan_to_num(0)  # a diverged proposal is refused
        return torch.where((uniform < rate)[..., None], end, z), rate

    def leapfrog(
        self, z: Tensor, momentum: Tensor, beta: float, size: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Position and momentum [M, B, D] after all leapfrog steps, and the energy error [M, B]."""
        energy, gradient = self._energy(z, beta)
        before = energy + 0.5 * momentum.square().sum(-1)
        for _ in range(self.options.leapfrog):
            momentum = momentum - 0.5 * size * gradient
            z = z + size * momentum
            energy, gradient = self._energy(z, beta)
            momentum = momentum - 0.5 * size * gradient
        return z, momentum, energy + 0.5 * momentum.square().sum(-1) - before
