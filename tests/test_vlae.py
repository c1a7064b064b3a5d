"""VLAE and its full-covariance Gaussian: exact cases, derivatives, refusals, divergence."""

from __future__ import annotations

import math

import pytest
import torch
from small_models import assert_gradients, images, loss
from torch import nn
from torch.autograd.functional import hessian, jacobian
from torch.distributions import MultivariateNormal, kl_divergence

import gpvae
from gpvae.config import ModelConfig, VLAEConfig
from gpvae.errors import ConfigError, TrainingError
from gpvae.evaluate import log_likelihood
from gpvae.full_gaussian import FullGaussian
from gpvae.outputs import Bernoulli, DiscretisedLogistic, Gaussian, PixelGaussian
from gpvae.vlae import (
    VLAE,
    JacobianProducts,
    check_jacobian,
    decoder_jacobian,
    newton_terms,
    pixel_derivatives,
)

SHAPE = (1, 4, 4)


def make(kind=VLAE, activation="tanh", network="mlp", output="gaussian", **options):
    """A small float64 model."""
    config = ModelConfig(
        latent_dim=3,
        hidden=(6,),
        activation=activation,
        network=network,
        channels=(2, 3),
        output=output,
        levels=17,
        vlae=VLAEConfig(**({"steps": 3} | options)),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(SHAPE, config).double()


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def full(batch=4, dim=3):
    """A FullGaussian and the same distribution by torch."""
    factor = randn(batch, dim, dim)
    precision = factor @ factor.mT + torch.eye(dim)
    mean = randn(batch, dim, seed=1)
    return (
        FullGaussian.from_precision(mean, precision),
        MultivariateNormal(mean, precision_matrix=precision),
    )


# The posterior


def test_full_gaussian_against_torch():
    q, expected = full()
    z = randn(7, 2, 4, 3, seed=2)
    torch.testing.assert_close(q.log_prob(z), expected.log_prob(z))
    torch.testing.assert_close(q.log_prob(z[0, 0]), expected.log_prob(z[0, 0]))
    torch.testing.assert_close(q.covariance(), expected.covariance_matrix)
    torch.testing.assert_close(q.std, expected.stddev)
    prior = MultivariateNormal(torch.zeros(3).double(), torch.eye(3).double())
    torch.testing.assert_close(q.kl(), kl_divergence(expected, prior))
    assert torch.equal(q.scale_tril, q.scale_tril.tril())


def test_full_gaussian_samples_have_its_moments_and_density():
    q, _ = full()
    z, log_q = q.rsample_with_log_prob((100_000,), torch.Generator().manual_seed(0))
    torch.testing.assert_close(log_q, q.log_prob(z))
    assert torch.equal(z, q.rsample((100_000,), torch.Generator().manual_seed(0)))
    centred = z - z.mean(0)
    covariance = torch.einsum("sbi,sbj->bij", centred, centred) / len(z)
    torch.testing.assert_close(z.mean(0), q.mean, rtol=0, atol=0.02)
    torch.testing.assert_close(covariance, q.covariance(), rtol=0, atol=0.02)


def test_full_gaussian_parts_and_shapes():
    q, _ = full()
    z = randn(5, 4, 3)
    torch.testing.assert_close(q[1:3].log_prob(z[:, 1:3]), q.log_prob(z)[:, 1:3])
    assert q.rsample().shape == (4, 3)
    assert q.gaussian().std.shape == (4, 3)
    with pytest.raises(ValueError, match="scale_tril has shape"):
        FullGaussian(torch.zeros(4, 3), torch.eye(3))


# Identities


def test_no_steps_are_the_vae_to_the_last_bit():
    model, vae, x = make(steps=0), make(gpvae.VAE), images()
    vae.load_state_dict(model.state_dict())
    assert torch.equal(model(x).std, vae(x).std)
    assert torch.equal(loss(model, x), loss(vae, x))


def test_trunk_mean_and_decoder_start_as_those_of_the_vae():
    own, vae = make().state_dict(), make(gpvae.VAE).state_dict()
    assert set(vae) - set(own) == {"encoder.log_std_head.weight", "encoder.log_std_head.bias"}
    assert all(torch.equal(value, vae[name]) for name, value in own.items())


def test_one_undamped_step_is_exact_for_a_linear_gaussian_decoder(linear_gaussian):
    options = {"model.vlae.steps": 1, "model.vlae.rate": 1.0}
    known = linear_gaussian(VLAE, orthogonal=False, **options)
    mean, covariance = known.posterior(known.x)
    for offset in (0.0, 30.0):  # wherever it starts
        with torch.no_grad():
            known.model.encoder.mean_head.bias += offset
            q = known.model(known.x)
        torch.testing.assert_close(q.mean, mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(q.covariance(), covariance.expand(20, 2, 2))
    estimate = log_likelihood(known.model, known.x, 5)
    torch.testing.assert_close(estimate.value, known.log_prob(known.x), rtol=1e-9, atol=1e-9)


def test_damping_takes_its_fraction_of_the_way(linear_gaussian):
    """For a linear decoder step t shrinks the distance to the mode by 1 - rate / (t + 1)^decay."""
    known = linear_gaussian(gpvae.VAE, orthogonal=False)
    start, mode = known.model(known.x).mean, known.posterior(known.x)[0]
    cases = ((1, 0.0, 0.6), (3, 0.0, 0.6**3), (3, 1.0, 0.6 * 0.8 * (1 - 0.4 / 3)))
    for steps, decay, left in cases:
        options = {"steps": steps, "rate": 0.4, "decay": decay}
        options = {f"model.vlae.{name}": value for name, value in options.items()}
        damped = linear_gaussian(VLAE, orthogonal=False, **options).model(known.x).mean
        torch.testing.assert_close(damped, mode + left * (start - mode))


@pytest.mark.parametrize("output", ["bernoulli", "gaussian"])
def test_many_steps_reach_the_mode_and_its_curvature(output, linear_gaussian):
    """For a decoder that is linear in z, Lambda is minus the Hessian of log p(x, z)."""
    options = {"model.output": "gaussian", "model.vlae.steps": 30, "model.vlae.rate": 1.0}
    known = linear_gaussian(VLAE, orthogonal=False, **options)
    x = known.x
    if output == "bernoulli":
        known.model.generative.output, x = Bernoulli(), (x > 0).double()
    q = known.model(x)
    for i in range(3):
        joint = lambda z, i=i: known.model.generative.log_joint(x[i : i + 1], z[None])[0]  # noqa: E731
        z = q.mean[i].detach()
        assert jacobian(joint, z).abs().max() < 1e-9
        torch.testing.assert_close(q.covariance()[i], torch.linalg.inv(-hessian(joint, z)))


# Derivatives


@pytest.mark.parametrize("activation", ["relu", "tanh", "elu"])
@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_jacobian_against_reverse_mode(activation, network):
    generative = make(activation=activation, network=network).generative
    z = randn(5, 3)
    raw, found = decoder_jacobian(generative, z)
    torch.testing.assert_close(raw, generative.decode(z))
    for i in range(5):
        expected = jacobian(lambda z: generative.decode(z[None])[0], z[i])
        torch.testing.assert_close(found[i], expected)


OUTPUTS = [Gaussian(), Bernoulli(), PixelGaussian(16), DiscretisedLogistic(17)]


@pytest.mark.parametrize("output", OUTPUTS, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("grad", [False, True])
def test_pixel_derivatives_against_the_whole_hessian(output, grad):
    output = output.double()
    x = images(3).flatten(1)
    x[0] = torch.arange(16) / 16 if isinstance(output, DiscretisedLogistic) else x[0]
    raw = randn(3, 16)
    with torch.set_grad_enabled(grad):
        first, second = pixel_derivatives(output, raw, x)
    for i in range(3):
        log_prob = lambda r, i=i: output.log_prob(r[None], x[i : i + 1])[0]  # noqa: E731
        torch.testing.assert_close(first[i], jacobian(log_prob, raw[i]))
        torch.testing.assert_close(second[i].diag(), -hessian(log_prob, raw[i]))
    assert (second >= 0).all()


def test_pixel_derivatives_are_the_formulas_of_the_docstring():
    raw, x = randn(3, 16), images(3).flatten(1)
    d, w = pixel_derivatives(Gaussian(initial_std=0.3).double(), raw, x)
    torch.testing.assert_close(d, (x - raw) / 0.09, rtol=1e-6, atol=0)
    torch.testing.assert_close(w, torch.full_like(w, 1 / 0.09), rtol=1e-6, atol=0)
    d, w = pixel_derivatives(Bernoulli(), raw, x)
    p = raw.sigmoid()
    torch.testing.assert_close(d, x - p)
    torch.testing.assert_close(w, p * (1 - p))


def test_newton_gradient_is_that_of_the_log_joint():
    model, x, z = make(), images(), randn(6, 3)
    gradient, precision = newton_terms(model.generative, x, z)
    expected = jacobian(lambda z: model.generative.log_joint(x, z).sum(), z)
    torch.testing.assert_close(gradient, expected)
    assert (torch.linalg.eigvalsh(precision) >= 1 - 1e-9).all()


@pytest.mark.parametrize("output", ["gaussian", "bernoulli"])
def test_gradient_passes_through_steps_jacobians_and_factor(output):
    model, x = make(output=output, steps=2), images()
    loss(model, x).backward()
    assert_gradients(model, x)


@pytest.mark.parametrize("output", ["gaussian", "bernoulli", "pixel-gaussian", "logistic"])
@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_every_parameter_receives_a_gradient(output, network):
    model = make(output=output, network=network)
    loss(model, images()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


# Evaluation


def test_an_image_does_not_depend_on_its_batch():
    model, x = make(), images(12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        q = model(x)
        for index in (order, slice(4, 5)):
            other = model(x[index])
            torch.testing.assert_close(other.mean, q.mean[index], rtol=1e-11, atol=1e-13)
            torch.testing.assert_close(other.scale_tril, q.scale_tril[index])


def test_long_batches_are_worked_off_in_blocks(monkeypatch):
    model, x = make(), images(12)
    with torch.no_grad():
        whole = model(x)
        monkeypatch.setattr("gpvae.vlae.IMAGES_PER_BLOCK", 5)
        blocks = model(x)
    torch.testing.assert_close(blocks.mean, whole.mean)
    torch.testing.assert_close(blocks.scale_tril, whole.scale_tril)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_without_gradients_gives_the_same_posterior(context):
    model, x = make(), images()
    expected = model(x)
    with context():
        q = model(x)
    assert not q.mean.requires_grad
    torch.testing.assert_close(q.scale_tril, expected.scale_tril)


def test_importance_weighting_meets_the_known_log_p(linear_gaussian):
    known = linear_gaussian(VLAE, orthogonal=False, std=1.5, **{"model.vlae.steps": 2})
    estimate = log_likelihood(known.model, known.x, 20_000)
    z = (estimate.value - known.log_prob(known.x)) / estimate.stderr
    assert estimate.stderr.max() < 0.1
    assert z.abs().max() < 4.5, z


# Refusals


class Rounded(nn.Module):
    def forward(self, z):
        return (10 * z).round().repeat(1, 6)[:, :16]


class Detached(nn.Module):
    def forward(self, z):
        return z.detach().repeat(1, 6)[:, :16]


class Opaque(nn.Module):
    def forward(self, z):
        return torch.from_numpy(z.detach().numpy()).repeat(1, 6)[:, :16]


class NoForwardMode(nn.Module):
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(z):
            return 2 * z

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    def forward(self, z):
        return self.Double.apply(z).repeat(1, 6)[:, :16]


@pytest.mark.parametrize("decoder", [Rounded, Detached, Opaque, NoForwardMode])
def test_decoders_without_a_jacobian_are_refused(decoder):
    model = make()
    model.generative.decoder = decoder()
    with pytest.raises(ConfigError, match="Jacobian"):
        check_jacobian(model.generative)


def test_a_constant_decoder_is_no_error():
    model = make()
    with torch.no_grad():
        for parameter in model.generative.decoder.parameters():
            parameter.zero_()
    check_jacobian(model.generative)
    q = model(images())
    torch.testing.assert_close(q.covariance(), torch.eye(3).double().expand(6, 3, 3))


@pytest.mark.parametrize(
    "options", [{"steps": -1}, {"steps": 10**6}, {"rate": 0.0}, {"rate": 1.1}, {"decay": -1.0}]
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ConfigError, match=f"model.vlae.{next(iter(options))}"):
        VLAEConfig(**options)


# Divergence


def test_divergence_in_training_is_named():
    model, x = make(), images()
    x[2, 0, 0, 0] = math.nan
    model.encoder.trunk.layers[1].weight.data.zero_()
    with pytest.raises(TrainingError, match=r"VLAE's Newton steps are not finite"):
        loss(model, x)


def test_divergence_at_evaluation_falls_back_to_the_start_and_is_counted():
    model, x = make(), images()
    x[2, 0, 0, 0] = math.nan
    model.encoder.trunk.layers[1] = Constant(6)
    with torch.no_grad():
        q, others = model(x), model(x[[0, 1, 3, 4, 5]])
        start = model.encoder.mean_head(model.encoder.trunk(x))
    assert model.encoder.fallbacks == 1
    assert torch.equal(q.mean[2], start[2])
    torch.testing.assert_close(q.mean[[0, 1, 3, 4, 5]], others.mean)
    torch.testing.assert_close(q.scale_tril[[0, 1, 3, 4, 5]], others.scale_tril)
    assert torch.isfinite(q.scale_tril).all()


def test_a_broken_encoder_stops_the_evaluation():
    model = make()
    model.encoder.mean_head.bias.data[0] = math.inf
    with torch.no_grad(), pytest.raises(TrainingError, match="even at the encoder's mean"):
        model(images())


class Constant(nn.Module):
    """Hides the pixels from the layers above."""

    def __init__(self, width):
        super().__init__()
        self.width = width

    def forward(self, x):
        return torch.ones(len(x), self.width, dtype=x.dtype)


def test_products_with_the_jacobian_and_their_gradients():
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 2, 7), (3, 7), (3, 7))
    j, d, w = (
        torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes
    )
    product, gram = JacobianProducts.apply(j, d, w)
    torch.testing.assert_close(product, torch.einsum("bdp,bp->bd", j, d))
    torch.testing.assert_close(gram, torch.einsum("bdp,bp,bep->bde", j, w, j))
    assert torch.autograd.gradcheck(JacobianProducts.apply, (j, d, w))
