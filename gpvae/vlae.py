"""VLAE: T Newton-like steps to the posterior's mode, then the Laplace approximation there.

With the decoder's raw output r(z), its Jacobian J = dr/dz, and for one image

    residual  d = d log p(x | r) / dr          Gaussian (x - r) / sigma^2,  Bernoulli x - p
    weight    w = -d^2 log p(x | r) / dr^2     Gaussian 1 / sigma^2,        Bernoulli p (1 - p)

    Lambda(z) = I + J^T diag(w) J
    z_{t+1} = z_t + alpha_t Lambda(z_t)^-1 (J^T d - z_t),   z_0 = b(x),   t = 0 .. T - 1
    q(z | x) = N(z_T, Lambda(z_T)^-1)

For a decoder that is linear in z with a Gaussian output, one undamped step (alpha_0 = 1) gives the
exact posterior; a ReLU decoder is linear in pieces. alpha_t = rate / (t + 1)^decay: the authors'
code has 0.5 / (t + 1); the default here is 0.5 at every step, which gave a better validation bound
on digits. With T = 0 it is the VAE.

References:
    Variational Laplace Autoencoders (Park, Kim and Kim, ICML 2019),
    https://proceedings.mlr.press/v97/park19a.html

Nothing is detached: the training gradient passes through every step, Jacobian and Cholesky factor,
as in the authors' code. (Theirs has the Jacobian of a ReLU network in closed form; here it is
computed by forward-mode differentiation for any decoder.) The covariance is never formed and
nothing is inverted.

Cost: T + 1 Jacobians, each D forward derivatives of the decoder in one batch (about D + 1 decoder
passes and B P D numbers of memory), and T + 1 Cholesky factors of D x D matrices.

Dimensions: B images, D latent, P pixels, T steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpvae.config import ModelConfig
from gpvae.errors import ConfigError, TrainingError
from gpvae.evaluate import IMAGES_PER_BLOCK
from gpvae.full_gaussian import FullGaussian
from gpvae.outputs import Output
from gpvae.posteriors import DiagonalGaussian
from gpvae.step import capturing
from gpvae.vae import VAE, GaussianEncoder, Generative


def pixel_derivatives(output: Output, raw: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """d log p(x | r) / dr and -d^2 log p(x | r) / dr^2, each [B, P], for raw r and x [B, P].

    Reverse mode twice. The second derivative is the diagonal one because every output treats the
    pixels as independent, each with its own r; and not negative because every output is
    log-concave in r.
    """

    def first(raw: Tensor) -> Tensor:
        return torch.func.grad(lambda r: output.log_prob(r, x).sum())(raw)

    return first(raw), -torch.func.grad(lambda r: first(r).sum())(raw)


def decoder_jacobian(generative: Generative, z: Tensor) -> tuple[Tensor, Tensor]:
    """Raw outputs [B, P] and their Jacobians [B, P, D] at z [B, D], by forward mode."""
    basis = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
    tangents = basis[:, None, :].expand(-1, len(z), -1)

    def along(tangent: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(generative.decode, (z,), (tangent,))

    raw, columns = torch.func.vmap(along, out_dims=(None, 0))(tangents)
    return raw, columns.movedim(0, -1)


def newton_terms(generative: Generative, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """grad_z log p(x, z) = J^T d - z, [B, D], and Lambda, [B, D, D], at z [B, D]."""
    raw, jacobian = decoder_jacobian(generative, z)
    residual, weight = pixel_derivatives(generative.output, raw, x.flatten(1))
    ascent, curvature = JacobianProducts.apply(jacobian.mT, residual, weight)
    eye = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
    return ascent - z, eye + curvature


class JacobianProducts(torch.autograd.Function):
    """J^T d, [B, D], and J^T diag(w) J, [B, D, D], for J^T [B, D, P], d and w [B, P].

    The same by tensor operations would spend most of a training step on rearranging B P D numbers
    in its backward pass; this one keeps each row of P pixels together.
    """

    @staticmethod
    def forward(ctx, transposed: Tensor, d: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(transposed, d, w)
        product = (transposed @ d[..., None])[..., 0]
        return product, (transposed * w[:, None]) @ transposed.mT

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, by_product: Tensor, by_gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        transposed, d, w = ctx.saved_tensors
        turned = (by_gram + by_gram.mT) @ transposed  # [B, D, P]
        by_w = 0.5 * (turned * transposed).sum(1)
        by_d = (by_product[:, None] @ transposed)[:, 0]
        by_transposed = turned.mul_(w[:, None]).addcmul_(by_product[..., None], d[:, None])
        return by_transposed, by_d, by_w


def newton_step(gradient: Tensor, precision: Tensor) -> tuple[Tensor, Tensor]:
    """Lambda^-1 gradient, [B, D], and where it could be computed, [B]."""
    factor, info = torch.linalg.cholesky_ex(precision)
    half = torch.linalg.solve_triangular(factor, gradient[..., None], upper=False)
    step = torch.linalg.solve_triangular(factor.mT, half, upper=True)[..., 0]
    return step, (info == 0) & torch.isfinite(step).all(-1)


class LaplaceEncoder(GaussianEncoder):
    """x -> N(mode, Lambda^-1), the mode approached by T steps from the VAE's mean.

    With T > 0 there is no head for the standard deviation, since Lambda takes its place.

    Attributes:
        fallbacks: images so far whose steps diverged at evaluation; they keep the Laplace
            approximation at the encoder's own mean. In training, divergence raises TrainingError.
    """

    def __init__(self, shape: tuple[int, int, int], config: ModelConfig) -> None:
        super().__init__(shape, config)
        self.options = config.vlae
        self.fallbacks = 0
        if self.options.steps:
            self.log_std_head = None

    def forward(self, x: Tensor, generative: Generative) -> DiagonalGaussian | FullGaussian:
        """Posterior of images x [B, C, H, W].

        Raises:
            TrainingError: a step is not finite while gradients are recorded, or even the
                encoder's own mean gives no finite Laplace approximation.
        """
        if not self.options.steps:
            return super().forward(x)
        if torch.is_grad_enabled() or len(x) <= IMAGES_PER_BLOCK:
            return self._laplace(x, generative)
        parts = [self._laplace(block, generative) for block in x.split(IMAGES_PER_BLOCK)]
        mean = torch.cat([q.mean for q in parts])
        return FullGaussian(mean, torch.cat([q.scale_tril for q in parts]))

    def _laplace(self, x: Tensor, generative: Generative) -> FullGaussian:
        z = start = self.mean_head(self.trunk(x))
        fine = torch.ones(len(z), dtype=torch.bool, device=z.device)
        for t in range(self.options.steps):
            step, ok = newton_step(*newton_terms(generative, x, z))
            z = z + self.options.rate / (t + 1) ** self.options.decay * step
            fine &= ok
        precision = newton_terms(generative, x, z)[1]
        if capturing():  # there the loss tells, at the end of the epoch
            return FullGaussian.from_precision(z, precision)
        fine &= usable(precision)
        if bool(fine.all()):
            return FullGaussian.from_precision(z, precision)
        return self._fallback(x, generative, start, z, fine)

    def _fallback(
        self, x: Tensor, generative: Generative, start: Tensor, z: Tensor, fine: Tensor
    ) -> FullGaussian:
        advice = (
            f"Try a smaller model.vlae.rate (now {self.options.rate:g}) or training.learning_rate."
        )
        count = int((~fine).sum())
        if torch.is_grad_enabled():
            raise TrainingError(
                f"VLAE's Newton steps are not finite for {count} of {len(x)} images of a batch. "
                + advice
            )
        z = torch.where(fine[:, None], z, start)
        precision = newton_terms(generative, x, z)[1]
        if not bool(usable(precision).all()):
            raise TrainingError(
                "VLAE has no finite Laplace approximation even at the encoder's mean, for "
                f"{int((~usable(precision)).sum())} of {len(x)} images. " + advice
            )
        self.fallbacks += count
        return FullGaussian.from_precision(z, precision)


def usable(precision: Tensor) -> Tensor:
    """Whether each matrix of [B, D, D] is finite and numerically positive definite, [B]."""
    # The factor that `FullGaussian.from_precision` takes, so that the answer holds for it.
    info = torch.linalg.cholesky_ex(precision.detach().flip(-1, -2)).info
    return (info == 0) & torch.isfinite(precision).flatten(1).all(-1)


class VLAE(VAE):
    """Variational Laplace autoencoder (see the module's docstring).

    Args:
        shape: (C, H, W) of one image.
        config: as for `VAE`, with `config.vlae`.

    Raises:
        ConfigError: a decoder without a usable Jacobian.

    Example:
        >>> import gpvae
        >>> model = VLAE((1, 8, 8), gpvae.ModelConfig(encoder="vlae", latent_dim=3))
        >>> model(torch.rand(5, 1, 8, 8)).scale_tril.shape
        torch.Size([5, 3, 3])
    """

    encoder_type = LaplaceEncoder

    def __init__(self, shape: tuple[int, int, int], config: ModelConfig | None = None) -> None:
        super().__init__(shape, config or ModelConfig(encoder="vlae"))
        check_jacobian(self.generative)


@torch.no_grad()
def check_jacobian(generative: Generative) -> None:
    """Raise ConfigError if the decoder's Jacobian is missing, or zero where its output changes.

    The second case is a decoder that rounds or detaches: torch answers with zeros, silently.
    """
    parameter = next(generative.parameters())
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(8, generative.latent_dim, generator=generator).to(parameter)
    try:
        jacobian = decoder_jacobian(generative, z)[1]
    except (NotImplementedError, RuntimeError) as error:
        raise ConfigError(
            "VLAE needs the Jacobian of the decoder, and this one has none that torch can compute "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). Use a decoder made of "
            "differentiable operations, or another encoder."
        ) from error
    changes = bool((generative.decode(z) != generative.decode(-z)).any())
    if changes and not bool(jacobian.any()):
        raise ConfigError(
            "the decoder's output changes with z, but its Jacobian is zero everywhere, as of a "
            "decoder that rounds or detaches. VLAE needs a differentiable decoder."
        )
