"""Instance-wise optimisation: known optima, stopping, certificate, noise, the encoder `svi`."""

from __future__ import annotations

import math

import pytest
import torch
from small_models import SHAPE, images, make
from torch import nn

import gpvae
from gpvae.config import ModelConfig
from gpvae.errors import ConfigError, DataError
from gpvae.noise import image_keys, image_noise, orthogonal_noise
from gpvae.posteriors import DiagonalGaussian
from gpvae.search import LARGEST_MOVE, BestSoFar, SearchOptions, search, whitened_step
from gpvae.svi import (
    SVI,
    Certificate,
    certify,
    gaussians,
    measured,
    optimise_posterior,
    prior,
    widened,
)


def optimum(known):
    """The best diagonal Gaussian of a Gaussian posterior, and its bound, in closed form."""
    mean, covariance = known.posterior(known.x)
    precision = torch.linalg.inv(covariance)
    gap = 0.5 * (precision.diagonal().log().sum() + covariance.logdet())
    return mean, precision.diagonal().rsqrt(), known.log_prob(known.x) - gap


def test_reaches_the_known_optimum_from_the_encoder_and_from_the_prior(linear_gaussian):
    known = linear_gaussian(gpvae.VAE, orthogonal=False)
    mean, std, bound = optimum(known)
    for start in (None, prior(known.x, 2)):
        found = optimise_posterior(known.model, known.x, start, elbo_samples=2000)
        torch.testing.assert_close(found.posterior.mean, mean, rtol=0, atol=2e-3)
        torch.testing.assert_close(found.posterior.std, std.expand(20, 2), rtol=0.05, atol=0)
        assert ((found.elbo.value - bound).abs() < 4.5 * found.elbo.stderr).all()
        assert found.converged.all()
        assert (found.steps < 200).all()


def test_bound_of_the_result_is_the_optimum_to_a_hundredth_of_a_nat(linear_gaussian):
    known = linear_gaussian(gpvae.VAE, orthogonal=False)
    q = optimise_posterior(known.model, known.x).posterior
    best_mean, best_std, _ = optimum(known)
    _, covariance = known.posterior(known.x)
    precision = torch.linalg.inv(covariance)
    moved = ((q.mean - best_mean) @ precision * (q.mean - best_mean)).sum(-1)
    ratio = (q.std / best_std) ** 2
    lost = 0.5 * (moved + (ratio - 1 - ratio.log()).sum(-1))
    assert 0 <= lost.max() < 0.01


@pytest.mark.parametrize("output", ["gaussian", "bernoulli"])
def test_bound_of_every_image_rises(output):
    model, x = make(output=output), images(30)
    found = optimise_posterior(model, x, elbo_samples=4000)
    with torch.no_grad():
        before = measured(model.generative, x, model(x), 4000, seed=99)
    error = torch.hypot(found.elbo.stderr, before.stderr)
    assert (found.elbo.value > before.value - 3 * error).all()
    assert found.elbo.mean > before.mean + 0.3


def test_gradient_of_the_bound_vanishes_at_the_result():
    model, x = make(), images(10)
    q = optimise_posterior(model, x, options=SearchOptions(tolerance=1e-4)).posterior
    mean, log_std = q.mean.clone().requires_grad_(), q.std.log().requires_grad_()
    noise = image_noise(x, 20_000, 3, seed=5)
    z = mean + log_std.exp() * noise
    bound = model.generative.log_likelihood(x, z).mean(0)
    bound = bound - DiagonalGaussian(mean, log_std.exp()).kl()
    by_mean, by_log_std = torch.autograd.grad(bound.sum(), (mean, log_std))
    assert (by_mean * q.std).abs().max() < 0.2  # about 0.2^2 / 2 nats from the optimum
    assert by_log_std.abs().max() < 0.2


def test_an_image_does_not_depend_on_its_batch():
    model, x = make(), images(12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    whole, shuffled, one = (optimise_posterior(model, part) for part in (x, x[order], x[5:6]))
    for other, expected in ((shuffled, order), (one, slice(5, 6))):
        for name in ("mean", "std"):
            a = getattr(other.posterior, name)
            torch.testing.assert_close(
                a, getattr(whole.posterior, name)[expected], rtol=1e-8, atol=0
            )
        torch.testing.assert_close(other.elbo.value, whole.elbo.value[expected], rtol=1e-8, atol=0)
        assert torch.equal(other.steps, whole.steps[expected])


def test_blocks_of_images_do_not_change_the_result(monkeypatch):
    model, x = make(), images(7)
    whole = optimise_posterior(model, x)
    monkeypatch.setattr("gpvae.search.CPU_BYTES", 1)  # one image at a time
    monkeypatch.setattr("gpvae.svi.IMAGES_PER_BLOCK", 3)
    blocks = optimise_posterior(model, x)
    torch.testing.assert_close(blocks.posterior.mean, whole.posterior.mean)
    torch.testing.assert_close(blocks.elbo.value, whole.elbo.value)


def test_too_few_steps_are_reported_as_not_converged(linear_gaussian):
    known = linear_gaussian(gpvae.VAE, orthogonal=False)
    start = prior(known.x, 2)
    found = optimise_posterior(known.model, known.x, start, SearchOptions(max_steps=3))
    assert (found.steps == 3).all()
    assert not found.converged.any()


def test_an_image_that_cannot_be_used_keeps_its_start_and_disturbs_no_other():
    model, x = make(), images(5)
    broken = x.clone()
    broken[2, 0, 0, 0] = math.nan
    start = prior(x, 3)
    found, converged, steps = search(model.generative, broken, start, SearchOptions())
    assert not converged[2]
    assert steps[2] == SearchOptions().check_every  # it did not go on in vain
    assert torch.equal(found.mean[2], start.mean[2])
    assert torch.equal(found.std[2], start.std[2])
    others = [0, 1, 3, 4]
    assert converged[others].all()
    expected = optimise_posterior(model, x[others], start[others])
    torch.testing.assert_close(found.mean[others], expected.posterior.mean)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_runs_where_gradients_are_switched_off(context):
    model, x = make(), images(3)
    expected = optimise_posterior(model, x)
    with context():
        found = optimise_posterior(model, x)
    assert not found.posterior.mean.requires_grad
    torch.testing.assert_close(found.posterior.mean, expected.posterior.mean)


class TwoModes(nn.Module):
    """A one-dimensional latent whose likelihood has a high mode at 1 and a low one at -3."""

    def forward(self, z):
        high, low = torch.exp(-4 * (z - 1) ** 2), 0.8 * torch.exp(-4 * (z + 3) ** 2)
        return (high + low).expand(-1, 16)


class FirstImageAtThePoorMode(nn.Module):
    def forward(self, x, generative):
        mean = torch.ones(len(x), 1, dtype=x.dtype)
        mean[0] = -3
        return DiagonalGaussian(mean, torch.full_like(mean, 0.1))


def two_modes():
    """A model whose encoder puts the first of several images at the low mode."""
    model = gpvae.VAE(SHAPE, ModelConfig(latent_dim=1, hidden=(4,))).double().eval()
    model.generative.decoder = TwoModes()
    model.generative.output.log_std.data.fill_(math.log(0.4))
    model.encoder = FirstImageAtThePoorMode()
    return model, torch.ones(4, *SHAPE, dtype=torch.float64)


def test_a_search_that_falls_below_its_start_is_not_taken_for_converged():
    """With two samples a step the first steps from the prior lose hundreds of nats."""
    model, x = two_modes()
    found = optimise_posterior(model, x, prior(x, 1), SearchOptions(samples=2))
    assert found.converged.all()
    assert (found.elbo.value > -4).all()  # the start has -37


def test_an_unused_latent_keeps_its_prior():
    model, x = make(), images(3)
    for parameter in model.generative.decoder.parameters():
        parameter.data.zero_()
    start = DiagonalGaussian(torch.ones(3, 3).double(), torch.full((3, 3), 0.3).double())
    q = optimise_posterior(model, x, start, SearchOptions(tolerance=1e-5)).posterior
    torch.testing.assert_close(q.mean, torch.zeros(3, 3).double(), rtol=0, atol=1e-2)
    torch.testing.assert_close(q.std, torch.ones(3, 3).double(), rtol=0, atol=1e-2)


def test_newton_step_climbs_along_negative_curvature_and_is_bounded():
    precision = torch.diag_embed(torch.tensor([[-4.0, 9.0, 0.0], [4.0, 4.0, 4.0]]).double())
    gradient = torch.tensor([[2.0, 3.0, 1.0], [300.0, 0.0, 400.0]]).double()
    step = whitened_step(precision, gradient)
    torch.testing.assert_close(step[0], torch.tensor([0.5, 1 / 3, 1.0]).double())
    assert (2 * step[1]).norm() == pytest.approx(LARGEST_MOVE)  # in standard deviations of 1/2


def test_certificate_reports_the_image_whose_two_searches_disagree():
    model, x = two_modes()
    found = certify(model, x)
    assert found.disputed == [0]
    assert found.difference[0] < -1  # the prior's search wins
    ones = torch.ones(4, 1, dtype=torch.float64)
    torch.testing.assert_close(found.best.posterior.mean, ones, rtol=0, atol=0.1)


def test_certificate_of_a_convex_problem_disputes_nothing(linear_gaussian):
    known = linear_gaussian(gpvae.VAE, orthogonal=False)
    found = certify(known.model, known.x)
    assert found.disputed == []
    assert found.difference.abs().max() < 0.05
    assert found.best.converged.all()


def test_a_search_that_was_cut_short_is_not_certified():
    model, x = make(), images(4)
    cut = certify(model, x, SearchOptions(max_steps=1), tolerance=math.inf)
    assert sorted(cut.disputed) == [0, 1, 2, 3]
    assert (cut.best.steps == 2).all()  # one of each search


def test_images_in_dispute_are_named_by_how_far_the_searches_are_apart():
    difference = torch.tensor([0.2, -3.0, 0.01, 1.0])
    found = Certificate(None, difference, difference.abs() < 0.1, 0.1)
    assert found.disputed == [1, 3, 0]


def test_what_is_kept_is_not_chosen_by_the_noise_of_the_search():
    model, x = make(), images(2)
    q = gaussians(model, x)
    kept = BestSoFar(model.generative, x, q, seed=5).noise
    own = orthogonal_noise(len(kept), q.mean, torch.Generator().manual_seed(5))
    assert kept.shape == own.shape and not torch.equal(kept, own)


@pytest.mark.parametrize("option", [{"rate": 0.1}, {"forget": 0.9}, {"samples": 40}, {"seed": 3}])
def test_every_option_of_the_steps_reaches_the_search(option):
    model, x = make(), images(3)
    plain, other = (
        optimise_posterior(model, x, options=SearchOptions(max_steps=4, **o)) for o in ({}, option)
    )
    assert (plain.posterior.mean != other.posterior.mean).any()


def test_the_bound_is_measured_as_often_as_asked_for(linear_gaussian):
    known = linear_gaussian(gpvae.VAE, orthogonal=False)
    found = optimise_posterior(known.model, known.x, options=SearchOptions(check_every=7))
    assert (found.steps % 7 == 0).all() and (found.steps >= 14).all()


@pytest.mark.parametrize(
    "options",
    [
        {"samples": 1},
        {"rate": 0.0},
        {"rate": 1.5},
        {"forget": -0.1},
        {"max_steps": 0},
        {"check_every": 0},
        {"tolerance": 0.0},
    ],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        SearchOptions(**options)


def test_unusable_starts_are_refused():
    model, x = make(), images(3)
    with pytest.raises(DataError, match="2 starting posteriors were given for 3 images"):
        optimise_posterior(model, x, prior(x[:2], 3))
    nan = DiagonalGaussian(torch.full((3, 3), math.nan).double(), torch.ones(3, 3).double())
    with pytest.raises(DataError, match="3 of 3 images are not finite"):
        optimise_posterior(model, x, nan)
    flat = prior(x, 3)
    flat.std[1, 2] = 0
    with pytest.raises(DataError, match=r"1 of 3 images .* or have a standard deviation of 0"):
        optimise_posterior(model, x, flat)


def test_widened():
    q = DiagonalGaussian(torch.zeros(2, 3), torch.full((2, 3), 0.5))
    torch.testing.assert_close(widened(q, 1.4).std, torch.full((2, 3), 0.7))
    for factor in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="factor"):
            widened(q, factor)


# The encoder


def test_encoder_trains_as_the_vae():
    model, vae, x = make(SVI).train(), make().train(), images(6)
    terms = [m.loss_terms(x, 10, torch.Generator().manual_seed(0)) for m in (model, vae)]
    for name in terms[0]:
        assert torch.equal(terms[0][name], terms[1][name])


def test_encoder_is_optimal_at_evaluation():
    model, x = make(SVI), images(6)
    found = optimise_posterior(make(), x)
    q = model(x)
    torch.testing.assert_close(q.mean, found.posterior.mean)
    torch.testing.assert_close(q.std, found.posterior.std)
    assert not q.mean.requires_grad
    model.encoder.start = "prior"
    from_prior = optimise_posterior(make(), x, prior(x, 3))
    torch.testing.assert_close(model(x).mean, from_prior.posterior.mean)
    model.encoder.start = "nowhere"
    with pytest.raises(ConfigError, match="nowhere"):
        model(x)


# Noise


def test_image_noise_is_normal_and_uncorrelated():
    e = image_noise(images(400), 20, 5)
    assert e.shape == (20, 400, 5)
    n = e.numel()
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (4, 3, 96)):
        assert abs((e**power).mean() - expected) < 4.5 * math.sqrt(variance / n)
    for other in (e.roll(1, 0), e.roll(1, 1), e.roll(1, 2), image_noise(images(400), 20, 5, 1)):
        assert abs((e * other).mean()) < 4.5 / math.sqrt(n)


def test_image_noise_belongs_to_the_image():
    x = images(20)
    e = image_noise(x, 4, 3, seed=7)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(image_noise(x[order], 4, 3, seed=7), e[:, order])
    assert torch.equal(image_noise(x[3:4], 4, 3, seed=7), e[:, 3:4])
    assert torch.equal(image_noise(x, 4, 3, seed=torch.tensor(7)), e)
    assert not torch.equal(image_noise(x, 4, 3, seed=8), e)
    assert torch.equal(image_keys(x), image_keys(x.float()))


def test_image_keys_tell_single_pixels_apart():
    x = torch.zeros(17, 16, dtype=torch.float64)
    x[range(16), range(16)] = 1
    assert len(image_keys(x.view(17, *SHAPE)).unique()) == 17


def test_orthogonal_noise():
    generator = torch.Generator().manual_seed(0)
    like = torch.zeros(1, 4, dtype=torch.float64)
    e = torch.stack([orthogonal_noise(8, like, generator)[:, 0] for _ in range(3000)])
    assert torch.equal(e[:, :4], -e[:, 4:])
    gram = e[:, :4] @ e[:, :4].mT
    assert gram.sub(gram.diagonal(dim1=1, dim2=2).diag_embed()).abs().max() < 1e-12
    assert abs((e[:, 0] ** 2).mean() - 1) < 0.05
    assert abs((e[:, 0] ** 4).mean() - 3) < 0.3
    assert orthogonal_noise(5, like, generator).shape == (6, 1, 4)
