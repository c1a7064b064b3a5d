"""SA-VAE: the encoder's Gaussian is refined by T gradient steps on each image's own bound.

    lambda_0 = (b(x), log c(x)),   v_t = momentum v_{t-1} + clip(grad ELBO(x; lambda_{t-1})),
    lambda_t = lambda_{t-1} + rate v_t,   q(z | x) = N(lambda_T)

Training differentiates the bound at lambda_T through all steps (exact double backward), so the
encoder learns to be refined and the decoder to be refined against. With T = 0 it is the VAE.

References:
    Semi-Amortized Variational Autoencoders (Kim et al., 2018), https://arxiv.org/abs/1802.02550

Departures from the authors' code: the step ascends each image's own bound, not the mean over the
batch, so it does not shrink with the batch size (their rate 1 at batch 50 is 0.02 here); gradients
are clipped for each image, not over the batch; Hessian-vector products are exact, not finite
differences; parameters see the final bound only. As there, the gradients of the mean and of the
log std are clipped apart.

Dimensions: S samples, B images, D latent, T steps. Bounds are in nats per image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpvae.config import ModelConfig, SAVAEConfig
from gpvae.errors import TrainingError
from gpvae.noise import ImageNoise, Source, image_noise, uniform
from gpvae.posteriors import DiagonalGaussian
from gpvae.search import gaussian_elbo
from gpvae.step import capturing
from gpvae.vae import VAE, GaussianEncoder, Generative

# Of the inner noise whenever no training step has set another. No evaluation has this seed: a bound
# that is measured with the draws that the inner loop has ascended is too high.
EVALUATION_SEED = -0x5A7AE


class SemiAmortizedEncoder(GaussianEncoder):
    """x -> the VAE's Gaussian after T steps of gradient ascent on ELBO(x).

    The noise of the inner bounds is a function of the image's pixels, a seed and the step. In
    training the seed is new at every step (see `SAVAE.bound_terms`); otherwise it is fixed. Either
    way the posterior of an image does not depend on the other images of its batch.

    Attributes:
        fallbacks: images so far whose inner loop diverged at evaluation; they keep the encoder's
            own Gaussian. In training, divergence raises TrainingError instead.
    """

    def __init__(self, shape: tuple[int, int, int], config: ModelConfig) -> None:
        super().__init__(shape, config)
        self.options = config.savae
        self.seed: int | Tensor = EVALUATION_SEED
        self.fallbacks = 0

    def forward(self, x: Tensor, generative: Generative) -> DiagonalGaussian:
        """Posterior of images x [B, C, H, W].

        Gradients are recorded only if the caller records them, through the inner steps as well
        unless `detach`; under `torch.no_grad` the inner gradients are still computed.

        Raises:
            TrainingError: the inner loop left finite numbers while gradients are recorded.
        """
        start = super().forward(x)
        if not self.options.steps:
            return start
        noise = self._noise(x, start.mean.shape[-1])
        if torch.is_grad_enabled():
            q, failed_at = refine(generative, x, start, noise, self.options)
            if not capturing():  # there the loss tells, at the end of the epoch
                self._raise_if(failed_at)
            return q
        # Copies, since tensors made under inference mode cannot take part in a gradient.
        with torch.inference_mode(False), torch.enable_grad():
            x, noise = x.clone(), noise.clone()
            start = DiagonalGaussian(start.mean.clone(), start.std.clone())
            q, failed_at = refine(generative, x, start, noise, self.options, record=False)
        failed = (failed_at >= 0)[:, None]
        self.fallbacks += int(failed.sum())
        mean = torch.where(failed, start.mean, q.mean)
        return DiagonalGaussian(mean.detach(), torch.where(failed, start.std, q.std).detach())

    def _noise(self, x: Tensor, dim: int) -> Tensor:
        """Inner noise, [T, S, B, D]."""
        steps, samples = self.options.steps, self.options.samples
        return image_noise(x, steps * samples, dim, self.seed).unflatten(0, (steps, samples))

    def _raise_if(self, failed_at: Tensor) -> None:
        failed = failed_at[failed_at >= 0]
        if not len(failed):
            return
        step, o = int(failed.min()), self.options
        where = "the encoder's own output is" if step == 0 else f"from step {step} of {o.steps} on,"
        raise TrainingError(
            f"SA-VAE's inner loop: {where} not finite for {len(failed)} of {len(failed_at)} images "
            f"of a batch. Try a smaller model.savae.learning_rate (now {o.learning_rate:g}) or "
            f"model.savae.clip (now {o.clip:g})."
        )


def refine(
    generative: Generative,
    x: Tensor,
    q: DiagonalGaussian,
    noise: Tensor,
    options: SAVAEConfig,
    record: bool = True,
) -> tuple[DiagonalGaussian, Tensor]:
    """Take T steps from q for images x [B, C, H, W].

    Args:
        generative: the model whose bound is ascended.
        x: images.
        q: where to start.
        noise: of the inner bounds, [T, S, B, D].
        options: step size, momentum, clip, detach.
        record: keep the graph of the inner gradients, for double backward.

    Returns:
        The refined Gaussians, and for each image the first step whose result was not finite
        (0: the start itself), or -1, [B].
    """
    mean, log_std = q.mean, q.std.log()
    if not mean.requires_grad:
        mean, log_std = mean.detach().requires_grad_(), log_std.detach().requires_grad_()
    record = record and not options.detach
    velocity: tuple[Tensor, Tensor] = (torch.zeros_like(mean), torch.zeros_like(mean))
    failed_at = _first_failure(torch.full_like(mean[:, 0], -1, dtype=torch.int64), 0, mean, log_std)
    for step, e in enumerate(noise, 1):
        # A sum over images: the gradient of one image does not know how many others there are.
        bound = gaussian_elbo(generative, x, DiagonalGaussian(mean, log_std.exp()), e)
        ascent = torch.autograd.grad(bound.mean(0).sum(), (mean, log_std), create_graph=record)
        velocity = tuple(
            options.momentum * v + clipped(g, options.clip)
            for v, g in zip(velocity, ascent, strict=True)
        )
        mean = mean + options.learning_rate * velocity[0]
        log_std = log_std + options.learning_rate * velocity[1]
        failed_at = _first_failure(failed_at, step, mean, log_std)
    return DiagonalGaussian(mean, log_std.exp()), failed_at


def clipped(gradient: Tensor, largest: float) -> Tensor:
    """Rows of [B, D] scaled to a norm of at most `largest`; 0 means no clipping.

    Written without a square root of zero, so that its own gradient is finite everywhere.
    """
    if not largest:
        return gradient
    square = gradient.square().sum(-1, keepdim=True)
    return gradient * (largest * square.clamp_min(largest**2).rsqrt())


def _first_failure(failed_at: Tensor, step: int, mean: Tensor, log_std: Tensor) -> Tensor:
    std = log_std.exp()
    fine = (torch.isfinite(mean) & torch.isfinite(std) & (std > 0)).all(-1)
    return torch.where((failed_at < 0) & ~fine, step, failed_at)


class SAVAE(VAE):
    """Semi-amortized VAE (see the module's docstring). Inference costs T decoder passes and back.

    Args:
        shape: (C, H, W) of one image.
        config: as for `VAE`, with `config.savae`.

    Example:
        >>> import gpvae
        >>> model = SAVAE((1, 8, 8), gpvae.ModelConfig(encoder="savae", latent_dim=3))
        >>> model(torch.rand(5, 1, 8, 8)).mean.shape
        torch.Size([5, 3])
    """

    encoder_type = SemiAmortizedEncoder

    def bound_terms(
        self, x: Tensor, samples: int = 1, source: Source = None
    ) -> tuple[Tensor, Tensor]:
        """As for `VAE`; the seed of the inner noise comes from the source, too, if it is a stream:
        noise that belongs to the images leaves them the posterior that they have at evaluation.
        """
        if not self.encoder.options.steps or isinstance(source, ImageNoise):
            return super().bound_terms(x, samples, source)
        self.encoder.seed = (uniform((1,), x, source)[0] * 2**24).int()
        try:
            return super().bound_terms(x, samples, source)
        finally:
            self.encoder.seed = EVALUATION_SEED
