"""The estimators against a model whose log p(x) is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from small_models import images, make

import gpvae
from gpvae.config import GPConfig
from gpvae.errors import ConfigError, DataError
from gpvae.evaluate import IMAGES_PER_BLOCK, elbo, log_likelihood
from gpvae.iaf import IAFVAE
from gpvae.mixtures import MixtureVAE
from gpvae.noise import ImageNoise
from gpvae.posteriors import DiagonalGaussian

KINDS = [gpvae.VAE, gpvae.GPVAE]


def near_exact(known):
    """The exact posterior's moments as a diagonal Gaussian, somewhat widened."""
    mean, covariance = known.posterior(known.x)
    return DiagonalGaussian(mean, 1.3 * covariance.diagonal().sqrt().expand_as(mean))


def test_with_the_exact_posterior_bound_and_weights_are_log_p_exactly(linear_gaussian):
    known = linear_gaussian(gpvae.VAE, orthogonal=True)
    mean, covariance = known.posterior(known.x)
    exact = DiagonalGaussian(mean, covariance.diagonal().sqrt().expand_as(mean))
    estimate = log_likelihood(known.model, known.x, 1, proposal=exact)
    torch.testing.assert_close(estimate.value, known.log_prob(known.x), rtol=0, atol=1e-10)
    many = log_likelihood(known.model, known.x, 10, proposal=exact)
    assert (many.stderr < 1e-6).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("proposal", ["exact", "gaussian"])
def test_importance_weighting_meets_the_known_log_p_within_its_error(
    linear_gaussian, kind, proposal
):
    known = linear_gaussian(kind, orthogonal=False, std=1.5)
    with torch.no_grad():  # wider than the posterior, so that the weights have a finite variance
        known.model.encoder.log_std_head.bias.fill_(0.7)
    estimate = log_likelihood(known.model, known.x, 20_000, proposal=proposal)
    z = (estimate.value - known.log_prob(known.x)) / estimate.stderr
    assert estimate.stderr.max() < 0.1
    assert z.abs().max() < 4.5, z
    assert 0.5 < (z**2).mean() < 2, z


def test_standard_errors_cover_the_truth(linear_gaussian):
    known = linear_gaussian(gpvae.VAE, orthogonal=False)
    truth, q = known.log_prob(known.x), near_exact(known)
    inside = []
    for seed in range(40):
        estimate = log_likelihood(known.model, known.x, 400, proposal=q, seed=seed)
        inside.append(((estimate.value - truth).abs() < 1.96 * estimate.stderr).double())
    coverage = torch.stack(inside).mean().item()
    assert 0.92 < coverage < 0.98, coverage


@pytest.mark.parametrize("kind", KINDS)
def test_elbo_is_below_log_p_and_equals_its_closed_form(linear_gaussian, kind):
    """E log p(x | z) is a Gaussian integral here, so the bound is known exactly."""
    known = linear_gaussian(kind, orthogonal=False)
    estimate = elbo(known.model, known.x, 20_000)
    with torch.no_grad():
        q = known.model(known.x)
        fit = q.mean @ known.matrix.T + known.offset
        square = ((known.x.flatten(1) - fit) ** 2).sum(1) + (q.std**2 @ (known.matrix**2).sum(0))
        constant = 6 * (math.log(known.std) + 0.5 * math.log(2 * math.pi))
        exact = -0.5 * square / known.std**2 - constant - q.kl()
    assert ((estimate.value - exact).abs() < 5 * estimate.stderr).all()
    assert (exact < known.log_prob(known.x)).all()


def test_more_samples_raise_the_importance_weighted_bound(linear_gaussian):
    known = linear_gaussian(gpvae.VAE, orthogonal=False, std=1.0)
    bounds = [
        np.mean([log_likelihood(known.model, known.x, s, seed=i).mean for i in range(30)])
        for s in (1, 10, 100)
    ]
    truth = known.log_prob(known.x).mean().item()
    assert bounds[0] < bounds[1] < bounds[2] < truth + 0.05


def test_one_sample_importance_bound_is_the_sampled_elbo(linear_gaussian):
    known = linear_gaussian(gpvae.VAE, orthogonal=False)
    with torch.no_grad():
        q = known.model(known.x)
        z = q.rsample((1,), ImageNoise(known.x, 3))
        expected = known.model.generative.log_joint(known.x, z) - q.log_prob(z)
    estimate = log_likelihood(known.model, known.x, 1, seed=3)
    torch.testing.assert_close(estimate.value, expected[0])
    assert estimate.stderr.isnan().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", [elbo, log_likelihood])
def test_numbers_do_not_depend_on_the_memory_bound(linear_gaussian, kind, function):
    known = linear_gaussian(kind, orthogonal=False)
    free = function(known.model, known.x, 120)
    for memory in (1, 2000, 40_000):
        tight = function(known.model, known.x, 120, memory=memory)
        torch.testing.assert_close(tight.value, free.value, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(tight.stderr, free.stderr, rtol=1e-9, atol=1e-12)


def test_first_images_do_not_depend_on_how_many_blocks_follow(linear_gaussian):
    known = linear_gaussian(gpvae.GPVAE, orthogonal=False)
    x = known.sample(IMAGES_PER_BLOCK + 7, torch.Generator().manual_seed(1))
    whole = log_likelihood(known.model, x, 3)
    first = log_likelihood(known.model, x[:IMAGES_PER_BLOCK], 3)
    assert len(whole.value) == len(x)
    torch.testing.assert_close(whole.value[:IMAGES_PER_BLOCK], first.value)


@pytest.mark.parametrize("samples", [1, 7, 50, 51, 130])
def test_exactly_s_samples_are_drawn(linear_gaussian, samples, monkeypatch):
    known = linear_gaussian(gpvae.VAE, orthogonal=False)
    drawn = []
    original = DiagonalGaussian.rsample

    def counting(self, shape=(), generator=None):
        drawn.append(shape[0])
        return original(self, shape, generator)

    monkeypatch.setattr(DiagonalGaussian, "rsample", counting)
    assert log_likelihood(known.model, known.x, samples).samples == samples
    assert sum(drawn) == samples


def test_decoding_stays_within_the_memory_bound(linear_gaussian):
    known = linear_gaussian(gpvae.VAE, orthogonal=False)
    rows = []
    decoder = known.model.generative.decoder
    decoder.register_forward_hook(lambda m, args, out: rows.append(out.numel() * 8 * 4))
    log_likelihood(known.model, known.x, 100, memory=5000)
    assert max(rows) <= 5000


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (IAFVAE, {}),
        (MixtureVAE, {}),
        (gpvae.GPVAE, {"gp": GPConfig(bound="marginal")}),
    ],
)
def test_a_bound_without_a_closed_form_is_that_of_its_samples(kind, options):
    """IAF, the mixtures and the predictive density: mean of log p(x, z) - log q(z | x)."""
    model, x = make(kind, **options), images(4)
    with torch.no_grad():
        assert model(x).kl() is None
        z, log_q = model(x).rsample_with_log_prob((20,), ImageNoise(x, 3))
        draws = model.generative.log_joint(x, z) - log_q
    found = elbo(model, x, 20, seed=3)
    torch.testing.assert_close(found.value, draws.mean(0))
    torch.testing.assert_close(found.stderr, draws.std(0) / math.sqrt(20))


def test_a_sampled_kl_gives_the_bound_of_the_exact_one(monkeypatch):
    model, x = make(output="bernoulli"), images(4)
    with torch.no_grad():
        model.encoder.log_std_head.bias.fill_(-1)
        kl = model(x).kl()
    exact = elbo(model, x, 4000, seed=1)
    monkeypatch.setattr(DiagonalGaussian, "kl", lambda self: None)
    sampled = elbo(model, x, 4000, seed=2)
    error = torch.hypot(exact.stderr, sampled.stderr)
    assert (kl > 10 * error).all()
    assert ((sampled.value - exact.value).abs() < 4.5 * error).all()


def test_bad_input_is_refused():
    model = gpvae.VAE((1, 4, 4), gpvae.ModelConfig(output="bernoulli", hidden=(8,)))
    x = (torch.rand(3, 1, 4, 4) < 0.5).float()
    with pytest.raises(DataError, match="0 and 1"):
        log_likelihood(model, torch.rand(3, 1, 4, 4))
    with pytest.raises(DataError, match=r"\[B, 1, 4, 4\]"):
        elbo(model, x[:, :, :3])
    with pytest.raises(DataError, match=r"uint8.*float32"):
        elbo(model, x.byte())
    broken = x.clone()
    broken[1, 0, 2, 2] = math.nan
    with pytest.raises(DataError, match="1 of 3 images have NaN"):
        elbo(model, broken)
    for function in (elbo, log_likelihood):
        with pytest.raises(DataError, match="images are a ndarray; expected a float tensor"):
            function(model, x.numpy(), 2)
        with pytest.raises(DataError, match="no images were given; expected at least one"):
            function(model, x[:0], 2)
    with pytest.raises(ConfigError, match="at least 1"):
        elbo(model, x, 0)
    with pytest.raises(ConfigError, match="'exact'"):
        log_likelihood(model, x, 2, proposal="exakt")
    with pytest.raises(DataError, match=r"2 proposals were given for 3 images; give one for each"):
        log_likelihood(model, x, 2, proposal=model(x[:2]))


def test_mean_and_its_error_over_images():
    estimate = gpvae.Estimate(torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3), 5)
    assert estimate.mean == 2
    assert estimate.mean_stderr == pytest.approx(1 / math.sqrt(3))
