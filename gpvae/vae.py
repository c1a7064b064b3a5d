"""The generative model, the VAE, and the bound that every model trains on.

Dimensions: S samples, B images, D latent, P pixels. All densities are in nats per image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

from gpvae.config import ModelConfig
from gpvae.errors import DataError
from gpvae.networks import Decoder, Trunk
from gpvae.noise import Source, normal
from gpvae.outputs import make_output
from gpvae.posteriors import LOG_2PI, DiagonalGaussian, Posterior


class Generative(nn.Module):
    """p(z) p(x | z) with p(z) = N(0, I); the same for every encoder.

    Args:
        shape: (C, H, W) of one image.
        config: networks and output distribution.
    """

    def __init__(self, shape: tuple[int, int, int], config: ModelConfig) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.latent_dim = config.latent_dim
        self.decoder = Decoder(shape, config)
        self.output = make_output(shape, config)

    def decode(self, z: Tensor) -> Tensor:
        """Raw output parameters, [..., P], for z [..., D]."""
        return self.decoder(z.flatten(0, -2)).unflatten(0, z.shape[:-1])

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x | z), [..., B], for images x [B, C, H, W] and z [..., B, D]."""
        return self.output.log_prob(self.decode(z), x.flatten(1))

    def log_prior(self, z: Tensor) -> Tensor:
        """log N(z; 0, I), [...], for z [..., D]."""
        return -0.5 * ((z**2).sum(-1) + z.shape[-1] * LOG_2PI)

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x, z), [..., B]."""
        return self.log_likelihood(x, z) + self.log_prior(z)

    def mean_image(self, z: Tensor) -> Tensor:
        """E[x | z] as images, [..., C, H, W]."""
        return self.output.mean(self.decode(z)).unflatten(-1, self.shape)


class GaussianEncoder(nn.Module):
    """x -> N(b(x), diag c(x)^2): one trunk, a head for the mean and one for log c."""

    def __init__(self, shape: tuple[int, int, int], config: ModelConfig) -> None:
        super().__init__()
        self.trunk = Trunk(shape, config)
        self.mean_head = nn.Linear(self.trunk.out_features, config.latent_dim)
        self.log_std_head = nn.Linear(self.trunk.out_features, config.latent_dim)

    def forward(self, x: Tensor, generative: Generative | None = None) -> DiagonalGaussian:
        """Posterior of images x [B, C, H, W]. Encoders that refine use `generative`."""
        features = self.trunk(x)
        return DiagonalGaussian(self.mean_head(features), self.log_std_head(features).exp())

    def weight_kl(self) -> Tensor:
        """KL of the posterior over encoder weights from its prior, in nats: none here."""
        return self.mean_head.weight.new_zeros(())


class VAE(nn.Module):
    """Variational autoencoder: a generative model and an encoder of its posterior.

    Subclasses change the encoder only. Calling the model on a batch returns its posterior.

    References:
        Auto-Encoding Variational Bayes (Kingma and Welling, 2014), https://arxiv.org/abs/1312.6114

    Args:
        shape: (C, H, W) of one image.
        config: networks, latent dimension, output distribution, encoder options.

    Example:
        >>> import gpvae, torch
        >>> model = gpvae.VAE((1, 8, 8), gpvae.ModelConfig(latent_dim=3))
        >>> model(torch.rand(5, 1, 8, 8)).rsample((7,)).shape
        torch.Size([7, 5, 3])
    """

    encoder_type: type[nn.Module] = GaussianEncoder

    def __init__(self, shape: tuple[int, int, int], config: ModelConfig | None = None) -> None:
        super().__init__()
        config = config or ModelConfig()
        self.temperature = 1.0
        self.importance_samples = config.importance_samples
        self.generative = Generative(shape, config)
        self.encoder = self.encoder_type(shape, config)

    def forward(self, x: Tensor) -> Posterior:
        """q(z | x) for images [B, C, H, W].

        Raises:
            DataError: images of another shape or type than the model was built for, or elsewhere.
        """
        self._check_form(x)
        return self.encoder(x, self.generative)

    def check_images(self, x: Tensor) -> None:
        """Raise DataError unless x [N, C, H, W] are images of which the model has a density: of its
        shape and type, at least one, finite, and as the output distribution expects them.
        """
        self._check_form(x)
        if not len(x):
            raise DataError("no images were given; expected at least one, [N, C, H, W].")
        finite = x.isfinite().flatten(1).all(1)
        if not bool(finite.all()):
            raise DataError(
                f"{int((~finite).sum())} of {len(x)} images have NaN or infinite pixels; leave "
                "them out."
            )
        self.generative.output.check(x)

    def _check_form(self, x: Tensor) -> None:
        """Raise DataError if the images have another shape or type than the model, or are not where
        it is: what is known without a look at the pixels.
        """
        if not isinstance(x, Tensor):
            raise DataError(
                f"images are a {type(x).__name__}; expected a float tensor [B, C, H, W] with "
                "pixels in [0, 1], as from Images.unit() or torch.from_numpy(array)."
            )
        if x.ndim != 4 or tuple(x.shape[1:]) != self.generative.shape:
            raise DataError(
                f"images have shape {tuple(x.shape)}; this model was built for "
                f"[B, {', '.join(map(str, self.generative.shape))}]."
            )
        parameter = next(self.parameters())
        if x.dtype != parameter.dtype:
            raise DataError(
                f"images are {x.dtype}; this model computes in {parameter.dtype}. Give pixels in "
                "[0, 1], as from Images.unit(), or convert with x.to(dtype)."
            )
        if x.device != parameter.device:
            raise DataError(
                f"images are on {x.device}, this model is on {parameter.device}. Move one: "
                "x.to(device) or model.cpu()."
            )

    def bound_terms(
        self, x: Tensor, samples: int = 1, source: Source = None
    ) -> tuple[Tensor, Tensor]:
        """The two terms of ELBO(x) = E_q log p(x | z) - KL, each sampled or exact.

        Returns:
            Log-likelihood [S, B] under posterior samples, and KL [B] (closed form) or [S, B]
            (sampled, for posteriors without one).
        """
        posterior = self(x)
        kl = posterior.kl()
        if kl is None:
            z, log_q = posterior.rsample_with_log_prob((samples,), source)
            kl = log_q - self.generative.log_prior(z)
        else:
            z = posterior.rsample((samples,), source)
        return self.generative.log_likelihood(x, z), kl

    def loss_terms(self, x: Tensor, n_train: int, source: Source = None) -> dict[str, Tensor]:
        """Terms of the loss, in nats per image, each averaged over the batch; their sum is
        minimised: -E log p(x | z) + KL + temperature * weight KL / N.

        With k > 1 importance samples the first two are replaced by minus the bound of
        importance-weighted autoencoders (Burda et al., 2016, https://arxiv.org/abs/1509.00519),
        split into its weighted mean of -log p(x | z) and the rest.
        """
        if self.importance_samples > 1:
            log_lik, kl = self.importance_weighted_terms(x, source)
        else:
            log_lik, kl = self.bound_terms(x, source=source)
        return {
            "reconstruction": -log_lik.mean(),
            "kl": kl.mean(),
            "weight_kl": self.encoder.weight_kl() * (self.temperature / n_train),
        }

    def for_validation(self) -> VAE:
        """The model in the mode in which its validation bound is measured."""
        return self.eval()

    def importance_weighted_terms(self, x: Tensor, source: Source = None) -> tuple[Tensor, Tensor]:
        """Two terms, [B] each, whose difference is log 1/k sum_k p(x, z_k) / q(z_k | x)."""
        k = self.importance_samples
        z, log_q = self(x).rsample_with_log_prob((k,), source)
        log_lik = self.generative.log_likelihood(x, z)
        log_w = log_lik + self.generative.log_prior(z) - log_q  # [k, B]
        bound = log_w.logsumexp(0) - math.log(k)
        mean_log_lik = (log_w.softmax(0) * log_lik).sum(0)
        return mean_log_lik, mean_log_lik - bound

    def phase_starts(self, epochs: int) -> list[int]:
        """Epochs at which the phases of training start; most models have one phase."""
        return [0]

    def start_epoch(
        self, epoch: int, epochs: int, best_weights: Mapping[str, Tensor]
    ) -> dict[str, float]:
        """Called before each epoch (counted from 0); returns what the history shows of it.

        Args:
            epoch: the one that starts.
            epochs: how many there are at most.
            best_weights: those of the best validation bound so far.
        """
        return {}

    def sample(self, count: int, source: Source = None) -> Tensor:
        """Mean images of latents drawn from the prior, [count, C, H, W]."""
        parameter = next(self.parameters())
        shape = (count, self.generative.latent_dim)
        z = normal(shape, parameter, source)
        return self.generative.mean_image(z)

    def bits_per_dim(self, nats: Tensor) -> Tensor:
        """A log-likelihood in nats per image as bits per dimension (see `Output`)."""
        return self.generative.output.bits_per_dim(nats, math.prod(self.generative.shape))
