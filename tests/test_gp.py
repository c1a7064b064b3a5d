"""Weight space against function space, closed-form KLs, and the VAE as the limit."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import gpvae
from gpvae.errors import ConfigError
from gpvae.gp import WEIGHTS
from gpvae.posteriors import DiagonalGaussian

COVARIANCES = sorted(WEIGHTS)


def random_weights(covariance, rows=3, features=7):
    config = gpvae.GPConfig(features=features, covariance=covariance, rank=2)
    torch.manual_seed(0)
    weights = WEIGHTS[covariance](rows, features, config).double()
    with torch.no_grad():
        for parameter in weights.parameters():
            parameter.normal_(std=0.4)
    return weights


def models(covariance="diagonal", **gp):
    config = gpvae.RunConfig().override(
        **{
            "model.encoder": "gpvae",
            "model.hidden": (16,),
            "model.latent_dim": 3,
            "model.gp.features": 7,
            "model.gp.covariance": covariance,
            **{f"model.gp.{k}": v for k, v in gp.items()},
        }
    )
    torch.manual_seed(0)
    gp_model = gpvae.GPVAE((1, 4, 4), config.model).double()
    vae = gpvae.VAE((1, 4, 4), config.model).double()
    vae.load_state_dict(gp_model.state_dict(), strict=False)
    return gp_model, vae


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_weight_space_equals_function_space(covariance):
    weights = random_weights(covariance)
    psi = torch.randn(11, 7, dtype=torch.float64)
    mean, std = weights(psi)
    kernel = psi @ weights.covariance() @ psi.T  # [D, B, B]
    torch.testing.assert_close(std.T**2, kernel.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(mean, psi @ weights.mean.T)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_weight_kl_against_torch_distributions(covariance):
    weights = random_weights(covariance)
    q = torch.distributions.MultivariateNormal(weights.mean, weights.covariance())
    prior = torch.distributions.MultivariateNormal(
        torch.zeros(7, dtype=torch.float64), torch.eye(7, dtype=torch.float64)
    )
    expected = torch.distributions.kl_divergence(q, prior).sum()
    torch.testing.assert_close(weights.kl(), expected)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_covariance_forms_start_from_the_initial_std(covariance):
    config = gpvae.GPConfig(features=50, covariance=covariance, initial_std=0.3)
    start = WEIGHTS[covariance](2, 50, config).covariance().diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(start, torch.full((2, 50), 0.09), rtol=0.1, atol=0)


def test_local_reparameterisation_equals_sampling_weights():
    """Mean and variance of z over sampled weight matrices are those of the posterior."""
    model, _ = models("full")
    with torch.no_grad():
        model.encoder.weights.mean.normal_(std=0.5)
        model.encoder.weights.lower.normal_(std=0.3)
    x = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    encoder = model.encoder
    psi, trunk = encoder.psi(x), encoder.trunk(x)
    draws = 200_000

    def function_draws(own, offset):
        noise = torch.randn(draws, 3, 7, dtype=torch.float64)
        factor, mean = encoder.weights.cholesky()[own], encoder.weights.mean[own]
        rows = mean + torch.einsum("dmk,sdk->sdm", factor, noise)
        return torch.einsum("sdm,bm->sbd", rows, psi) + offset

    with torch.no_grad():
        f = function_draws(slice(3), encoder.mean_head(trunk))
        h = function_draws(slice(3, 6), encoder.log_std_head(trunk).exp())
        z = f + h * torch.randn_like(f)
        q = model(x)
        stderr = q.std / math.sqrt(draws)
        assert ((z.mean(0) - q.mean).abs() < 5 * stderr).all()
        torch.testing.assert_close(z.std(0), q.std, rtol=0.02, atol=0)
        kl = DiagonalGaussian(f, h.abs()).kl()
        error = kl.std(0) / math.sqrt(draws)
        assert ((kl.mean(0) - q.kl()).abs() < 5 * error).all()


def test_without_weight_covariance_it_is_the_vae():
    """Sigma = Gamma = 0 and mu = eta = 0: same posterior, bound and likelihood as the VAE."""
    model, vae = models()
    with torch.no_grad():
        model.encoder.weights.log_std.fill_(-math.inf)
    x = torch.rand(5, 1, 4, 4, dtype=torch.float64)
    q, reference = model(x), vae(x)
    torch.testing.assert_close(q.mean, reference.mean, rtol=0, atol=0)
    torch.testing.assert_close(q.std, reference.std, rtol=1e-14, atol=0)
    torch.testing.assert_close(q.kl(), reference.kl(), rtol=1e-13, atol=1e-13)
    z = torch.randn(4, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(q.log_prob(z), reference.log_prob(z), rtol=1e-12, atol=1e-12)


def test_both_functions_deterministic_is_the_vae_and_has_no_weight_kl():
    model, vae = models(random_mean=False, random_std=False)
    x = torch.rand(5, 1, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(model(x).kl(), vae(x).kl(), rtol=1e-13, atol=1e-13)
    assert model.encoder.weight_kl() == 0


@pytest.mark.parametrize(("switch", "part"), [("random_mean", "f_std"), ("random_std", "h_std")])
def test_each_function_can_be_made_deterministic(switch, part):
    model, _ = models(**{switch: False})
    q = model(torch.rand(5, 1, 4, 4, dtype=torch.float64))
    assert (getattr(q, part) == 0).all()
    assert (getattr(q, {"f_std": "h_std", "h_std": "f_std"}[part]) > 0).all()


def test_amplitude_scales_the_kernel_and_bounds_it():
    x = torch.rand(5, 1, 4, 4, dtype=torch.float64)
    one, _ = models(amplitude=1.0)
    three, _ = models(amplitude=3.0)
    k1 = (one.encoder.psi(x) ** 2).sum(1)
    k3 = (three.encoder.psi(x) ** 2).sum(1)
    torch.testing.assert_close(k3, 9 * k1)
    assert (k1 <= 1).all()


def test_weight_kl_enters_once_per_training_set_times_the_temperature():
    x = torch.rand(5, 1, 4, 4, dtype=torch.float64)
    plain, _ = models()
    tempered, _ = models(temperature=0.1)
    kl = plain.encoder.weight_kl()
    torch.testing.assert_close(plain.loss_terms(x, 50)["weight_kl"], kl / 50)
    torch.testing.assert_close(tempered.loss_terms(x, 50)["weight_kl"], 0.1 * kl / 50)


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("output", ["bernoulli", "gaussian"])
def test_every_parameter_receives_gradient(covariance, output):
    config = gpvae.RunConfig().override(
        **{"model.hidden": (16,), "model.gp.covariance": covariance, "model.output": output}
    )
    torch.manual_seed(0)
    model = gpvae.GPVAE((1, 4, 4), config.model)
    x = (torch.rand(8, 1, 4, 4) < 0.5).float()
    sum(model.loss_terms(x, 100).values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad != 0).any(), name


def test_inference_is_one_pass_through_the_trunk(monkeypatch):
    model, _ = models()
    calls = []
    model.encoder.trunk.register_forward_hook(lambda *_: calls.append(1))
    model(torch.rand(5, 1, 4, 4, dtype=torch.float64)).scores()
    assert len(calls) == 1


def test_rank_above_the_number_of_features_is_refused():
    with pytest.raises(ConfigError, match="rank"):
        models("low-rank", rank=8)


def test_building_a_model_leaves_the_global_generator_alone(blobs, tiny_config):
    config = tiny_config.override(**{"model.encoder": "gpvae", "model.gp.covariance": "low-rank"})
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a = gpvae.build_model(config, blobs.shape)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    b = gpvae.build_model(config, blobs.shape)
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert not torch.equal(
        next(copy.deepcopy(a).parameters()),
        next(gpvae.build_model(config.override(seed=1), blobs.shape).parameters()),
    )


@pytest.mark.parametrize("covariance", WEIGHTS)
def test_gradient_is_finite_where_the_features_are_zero(covariance):
    """There the variance is zero, at which the square root's own gradient is infinite."""
    weights = WEIGHTS[covariance](3, 5, gpvae.config.GPConfig(features=5, rank=2))
    psi = torch.zeros(4, 5, requires_grad=True)
    mean, std = weights(psi)
    (mean.sum() + std.sum()).backward()
    assert psi.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in weights.parameters() if p.grad is not None)
