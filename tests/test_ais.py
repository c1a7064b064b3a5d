"""Annealed importance sampling against a model whose log p(x) is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import gpvae
from gpvae.ais import (
    AISOptions,
    AnnealingPath,
    annealed_log_likelihood,
    log_weights,
    sample_pixels,
    sandwich,
    schedule,
)
from gpvae.config import ModelConfig
from gpvae.errors import ConfigError, DataError
from gpvae.noise import image_noise
from gpvae.outputs import Bernoulli, DiscretisedLogistic, Gaussian, PixelGaussian
from gpvae.posteriors import DiagonalGaussian
from gpvae.svi import prior


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


QUICK = AISOptions(temperatures=60, chains=8, leapfrog=5)


def test_estimate_meets_the_known_log_p_within_its_error(linear_gaussian):
    known = linear_gaussian(gpvae.VAE, orthogonal=False)
    found = annealed_log_likelihood(known.model, known.x, AISOptions(100, 50, 5))
    estimate = found.estimate
    z = (estimate.value - known.log_prob(known.x)) / estimate.stderr
    assert estimate.samples == 50
    assert estimate.stderr.max() < 0.2
    assert z.abs().max() < 4.5, z
    assert ((found.acceptance > 0.5) & (found.acceptance < 0.95)).all()


def check_mean_is_one(w):
    """Columns of w [M, B] have mean 1 within their own standard error."""
    error = w.std(0) / math.sqrt(len(w))
    assert error.max() < 0.1
    assert ((w.mean(0) - 1).abs() < 4.5 * error).all(), w.mean(0)


@pytest.mark.parametrize("temperatures", [1, 2, 5])
def test_weights_are_unbiased_whatever_the_annealing(linear_gaussian, temperatures):
    """E w = p(x) forwards, and E w = 1 / p(x) backwards from exact posterior samples."""
    # A weak likelihood: the reverse weights of a strong one have no variance.
    known = linear_gaussian(gpvae.VAE, orthogonal=False, std=4.0)
    x, copies = known.x[:4], 3000
    forward, _ = log_weights(
        known.model.generative, x, None, AISOptions(temperatures, copies, 3), None
    )
    check_mean_is_one((forward - known.log_prob(x)).exp())

    mean, covariance = known.posterior(x)
    noise = torch.randn(copies, 4, 2, dtype=torch.float64, generator=generator())
    exact = mean + noise @ torch.linalg.cholesky(covariance).mT
    # Noise belongs to the image, so the copies differ in the tenth digit.
    shift = 1e-10 * torch.arange(copies, dtype=torch.float64)[:, None, None, None, None]
    images, options = (x + shift).flatten(0, 1), AISOptions(temperatures, 1, 3)
    backward, _ = log_weights(known.model.generative, images, None, options, exact.flatten(0, 1))
    check_mean_is_one((backward.view(copies, 4) + known.log_prob(x)).exp())


def test_leapfrog_can_be_walked_back_and_nearly_keeps_the_energy(linear_gaussian):
    known = linear_gaussian(gpvae.VAE, orthogonal=False)
    x = known.x[:3]
    path = AnnealingPath(known.model.generative, x, prior(x, 2), AISOptions(5, 4, 6))
    z, momentum = torch.randn(2, 4, 3, 2, dtype=torch.float64, generator=generator())
    errors = []
    for size in (0.02, 0.01):
        there, flipped, error = path.leapfrog(z, momentum, 0.7, torch.full((3, 2), size).double())
        back, again, other = path.leapfrog(there, -flipped, 0.7, torch.full((3, 2), size).double())
        torch.testing.assert_close(back, z)
        torch.testing.assert_close(again, -momentum)
        torch.testing.assert_close(other, -error)
        errors.append(error.abs().max())
    assert errors[1] < errors[0] / 3.5  # second order


def test_transitions_leave_the_posterior_as_it_is(linear_gaussian):
    known = linear_gaussian(gpvae.VAE, orthogonal=False, std=1.0)
    x, chains = known.x[:2], 20_000
    mean, covariance = known.posterior(x)
    factor = torch.linalg.cholesky(covariance)
    noise = torch.randn(chains, 2, 2, dtype=torch.float64, generator=generator())
    path = AnnealingPath(known.model.generative, x, prior(x, 2), AISOptions(5, chains, 3))
    z, start = mean + noise @ factor.mT, noise
    for t in range(1, 6):  # long steps, so that refusals matter
        z, rate = path.transition(z, 1.0, torch.full((2,), 0.55).double(), 1, t)
    assert 0.5 < rate.mean() < 0.9
    white = torch.linalg.solve_triangular(factor, (z - mean).mT, upper=False).mT
    assert (white.mean(0) * math.sqrt(chains)).abs().max() < 4.5
    second = torch.einsum("sbi,sbj->bij", white, white) / chains - torch.eye(2)
    assert (second * math.sqrt(chains / 2)).abs().max() < 4.5
    assert (white * start).mean().abs() < 0.2  # they have moved


def test_bounds_enclose_the_truth(linear_gaussian):
    known = linear_gaussian(gpvae.VAE, orthogonal=False)
    # Images and chains enough that the bounds below hold by several standard errors anywhere.
    loose, tight = (
        sandwich(known.model, count, options)
        for count, options in ((60, AISOptions(8, 4, 5)), (600, AISOptions(100, 8, 5)))
    )
    for found in (loose, tight):
        truth = known.log_prob(found.x)
        for difference in (truth - found.lower.value, found.upper.value - truth):
            assert difference.mean() > -3 * difference.std() / math.sqrt(len(difference))
    assert loose.gap > 0.3
    assert 0 < tight.gap < 0.2
    assert abs(tight.lower.mean - known.log_prob(tight.x).mean()) < 0.1


def test_one_temperature_is_importance_sampling_from_the_base(linear_gaussian):
    known = linear_gaussian(gpvae.VAE, orthogonal=False)
    options = AISOptions(temperatures=1, chains=7, leapfrog=1)
    found = annealed_log_likelihood(known.model, known.x, options)
    # Noise of the forward run's start: seed (0 * 3 + 1) * (1 + 2).
    z = image_noise(known.x, 7, 3, seed=3)[..., :-1]
    log_w = known.model.generative.log_likelihood(known.x, z)
    expected = log_w.logsumexp(0) - math.log(7)
    torch.testing.assert_close(found.estimate.value, expected.detach())
    relative = (log_w - expected).exp()
    stderr = relative.std(0) / math.sqrt(7)
    torch.testing.assert_close(found.estimate.stderr, stderr.detach())


def test_from_the_exact_posterior_every_weight_is_p(linear_gaussian):
    known = linear_gaussian(gpvae.VAE, orthogonal=True)
    mean, covariance = known.posterior(known.x)
    base = DiagonalGaussian(mean, covariance.diagonal().sqrt().expand_as(mean))
    found = annealed_log_likelihood(known.model, known.x, AISOptions(5, 3, 3), base)
    torch.testing.assert_close(found.estimate.value, known.log_prob(known.x))
    assert found.estimate.stderr.max() < 1e-9


def test_an_image_does_not_depend_on_its_batch(linear_gaussian, monkeypatch):
    known = linear_gaussian(gpvae.VAE, orthogonal=False)
    x, order = known.x, torch.randperm(20, generator=generator())
    options = AISOptions(20, 3, 3)
    whole = annealed_log_likelihood(known.model, x, options).estimate.value
    for index in (order, slice(7, 8)):
        other = annealed_log_likelihood(known.model, x[index], options).estimate.value
        torch.testing.assert_close(other, whole[index], rtol=1e-9, atol=0)
    monkeypatch.setattr("gpvae.search.CPU_BYTES", 1)  # one image at a time
    blocks = annealed_log_likelihood(known.model, x, options).estimate.value
    torch.testing.assert_close(blocks, whole, rtol=1e-9, atol=0)


def test_seeds_differ_and_repeat(linear_gaussian):
    known = linear_gaussian(gpvae.VAE, orthogonal=False)
    values = [
        annealed_log_likelihood(known.model, known.x, AISOptions(5, 2, 2, seed=seed)).estimate.value
        for seed in (0, 0, 1)
    ]
    assert torch.equal(values[0], values[1])
    assert not torch.allclose(values[0], values[2])


@pytest.mark.parametrize("rate", [0.5, 0.9])
def test_the_pilot_adapts_to_the_acceptance_that_is_asked_for(linear_gaussian, rate):
    known = linear_gaussian(gpvae.VAE, orthogonal=False)
    options = AISOptions(temperatures=150, chains=8, leapfrog=3, acceptance=rate)
    found = annealed_log_likelihood(known.model, known.x, options)
    assert abs(found.acceptance.mean() - rate) < 0.07


def test_the_first_step_size_is_the_one_asked_for(linear_gaussian):
    known = linear_gaussian(gpvae.VAE, orthogonal=False)
    q = prior(known.x, 2)
    for step in (0.01, 0.3):
        path = AnnealingPath(known.model.generative, known.x, q, AISOptions(2, 4, 2, step=step))
        first = path.pilot()[0] / step  # one adaptation away: exp(0.2 (rate - 0.7))
        assert ((first > math.exp(-0.2 * 0.7)) & (first <= math.exp(0.2 * 0.3))).all()


def test_schedule():
    betas = schedule(50)
    assert len(betas) == 51
    assert (betas[0], betas[-1]) == (0.0, 1.0)
    assert sorted(set(betas)) == betas


@pytest.mark.parametrize(
    "output",
    [Gaussian(), Bernoulli(), PixelGaussian(16), DiscretisedLogistic(17)],
    ids=lambda o: type(o).__name__,
)
def test_drawn_pixels_follow_the_output(output):
    """The mean of log p over draws is minus the entropy; both sides by independent means."""
    output = output.double()
    raw = torch.linspace(-0.2, 1.2, 16, dtype=torch.float64).expand(20_000, 16)
    x = sample_pixels(output, raw, generator())
    output.check(x)
    found = output.log_prob(raw, x)
    if isinstance(output, Gaussian):
        expected = -16 * (output.log_std + 0.5 * math.log(2 * math.pi * math.e))
    elif isinstance(output, PixelGaussian):
        expected = -(output.std().log() + 0.5 * math.log(2 * math.pi * math.e)).sum()
    else:
        levels = torch.arange(17 if isinstance(output, DiscretisedLogistic) else 2).double()
        grid = (levels / levels[-1])[:, None, None].expand(-1, 16, 1)
        log_p = torch.stack([output.log_prob(raw[0, :, None], g) for g in grid])
        expected = (log_p.exp() * log_p).sum()
    assert abs(found.mean() - expected) < 4.5 * found.std() / math.sqrt(20_000)


def test_unknown_outputs_cannot_be_drawn_from():
    with pytest.raises(ConfigError, match="output to draw from 'Other'"):
        sample_pixels(type("Other", (nn.Module,), {})(), torch.zeros(1, 1), torch.Generator())


@pytest.mark.parametrize("output", ["bernoulli", "logistic"])
def test_sandwich_closes_for_discrete_pixels(output):
    config = ModelConfig(latent_dim=2, hidden=(8,), activation="tanh", output=output, levels=5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = gpvae.VAE((1, 3, 3), config).double()
    found = sandwich(model, 30, QUICK)
    assert abs(found.gap) < 0.1
    assert found.upper.stderr.mean() < 0.2


def test_bad_input(linear_gaussian):
    known = linear_gaussian(gpvae.VAE, orthogonal=False)
    for name, value in (
        ("temperatures", 0),
        ("chains", 0),
        ("leapfrog", 0),
        ("step", 0.0),
        ("acceptance", 1.0),
    ):
        with pytest.raises(ConfigError, match=name):
            AISOptions(**{name: value})
    base = DiagonalGaussian(torch.zeros(3, 2), torch.ones(3, 2))
    with pytest.raises(DataError, match="3 base posteriors were given for 20 images"):
        annealed_log_likelihood(known.model, known.x, QUICK, base)
    with pytest.raises(DataError, match="20 images; give one for each"):
        annealed_log_likelihood(known.model, known.x, QUICK, base)
    binary = gpvae.VAE((1, 2, 3), ModelConfig(output="bernoulli"))
    with pytest.raises(DataError, match="binary"):
        annealed_log_likelihood(binary, torch.full((2, 1, 2, 3), 0.5), QUICK)
