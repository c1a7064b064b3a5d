"""Objectives beyond the ELBO: importance weights, the predictive density, a residual."""

from __future__ import annotations

import math

import pytest
import torch
from small_models import assert_gradients, images, loss, make

import gpvae
from gpvae.config import GPConfig
from gpvae.errors import ConfigError
from gpvae.iaf import IAFVAE
from gpvae.noise import ImageNoise
from gpvae.posteriors import RandomFunctionPosterior

KINDS = {"vae": gpvae.VAE, "gpvae": gpvae.GPVAE, "iaf": IAFVAE}


def total(model, x, source):
    return sum(model.loss_terms(x, 10, source).values())


@pytest.mark.parametrize("encoder", KINDS)
def test_importance_weighted_loss_is_minus_the_estimate_of_log_p(encoder):
    model, x = make(KINDS[encoder], encoder=encoder, importance_samples=6), images(5)
    weight_kl = model.encoder.weight_kl() * model.temperature / 10
    estimate = gpvae.log_likelihood(model, x, 6, seed=4).value
    found = total(model, x, ImageNoise(x, 4)) - weight_kl
    torch.testing.assert_close(found.detach(), -estimate.mean())
    x = images(4)
    loss(model, x).backward()
    assert_gradients(model, x)


def test_the_terms_of_a_weighted_loss_are_its_weighted_mean_and_the_rest():
    model, x = make(importance_samples=6), images(5)
    with torch.no_grad():
        z, log_q = model(x).rsample_with_log_prob((6,), ImageNoise(x, 4))
        log_lik = model.generative.log_likelihood(x, z)
        log_w = log_lik + model.generative.log_prior(z) - log_q
        weighted = (log_w.exp() * log_lik).sum(0) / log_w.exp().sum(0)
        bound = log_w.exp().mean(0).log()
        terms = model.loss_terms(x, 10, ImageNoise(x, 4))
    torch.testing.assert_close(terms["reconstruction"], -weighted.mean())
    torch.testing.assert_close(terms["kl"], (weighted - bound).mean())


def test_more_weights_tighten_the_bound_towards_log_p(linear_gaussian):
    losses = []
    for k in (2, 20, 2000):
        known = linear_gaussian(
            gpvae.VAE, orthogonal=False, std=1.0, **{"model.importance_samples": k}
        )
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            losses.append(-sum(total(known.model, known.x, generator).item() for _ in range(20)))
    truth = known.log_prob(known.x).mean().item()
    assert losses[0] < losses[1] < losses[2]
    assert abs(losses[2] / 20 - truth) < 0.1


@pytest.mark.parametrize("encoder", ["me", "rme", "savae"])
def test_encoders_without_a_weighted_objective_say_why(encoder):
    with pytest.raises(ConfigError, match=f"{encoder}.*another encoder"):
        gpvae.RunConfig().override(**{"model.encoder": encoder, "model.importance_samples": 5})


@torch.no_grad()
def test_marginal_bound_is_tighter_and_equal_without_noise():
    """The bounds share E log p(x | z), so their difference is that of the two KL terms."""
    x = images(6)
    model = make(gpvae.GPVAE, encoder="gpvae", gp=GPConfig(bound="marginal", initial_std=2.0))

    def gain():
        q = model(x)
        z, log_q = q.rsample_with_log_prob((20_000,), ImageNoise(x, 1))
        draws = log_q - model.generative.log_prior(z)
        assert q.kl() is None
        expected = RandomFunctionPosterior(q.f_mean, q.f_std, q.h_mean, q.h_std).kl()
        return expected - draws.mean(0), draws.std(0) / math.sqrt(len(draws))

    value, error = gain()
    assert (value > 10 * error).all()
    model.encoder.weights.log_std.fill_(-300)
    value, error = gain()
    assert (value.abs() < 5 * error).all()


@pytest.mark.parametrize("bound", ["expected", "marginal"])
def test_a_residual_adds_its_variance_to_that_of_f(bound):
    x = images(5)
    plain = make(gpvae.GPVAE, encoder="gpvae", gp=GPConfig(bound=bound))
    model = make(gpvae.GPVAE, encoder="gpvae", gp=GPConfig(bound=bound, residual=True))
    model.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        model.encoder.residual_head.weight.zero_()
        model.encoder.residual_head.bias.fill_(math.log(0.3))
    q, p = model(x), plain(x)
    torch.testing.assert_close(q.f_std**2, p.f_std**2 + 0.09)
    torch.testing.assert_close(q.mean, p.mean)
    with torch.no_grad():
        model.encoder.residual_head.bias.fill_(-300)
    torch.testing.assert_close(loss(model, x), loss(plain, x))
    loss(model, x).backward()
    with torch.no_grad():
        model.encoder.residual_head.bias.fill_(-1)
    model.zero_grad()
    loss(model, x).backward()
    assert_gradients(model, x)
