"""IAF and Householder flows against identities, autograd and known answers."""

from __future__ import annotations

import pytest
import torch
from linear_gaussian import (
    assert_meets_evidence,
    exact_evidence,
    exact_posterior,
    images,
    linear_gaussian,
)
from torch import Tensor
from torch.autograd.functional import jacobian
from torch.distributions import MultivariateNormal, kl_divergence

from gpvae.config import FlowConfig, ModelConfig, RunConfig
from gpvae.errors import ConfigError
from gpvae.householder import HouseholderGaussian, HouseholderVAE, reflect, unit_vectors
from gpvae.iaf import IAFVAE, AutoregressiveStep
from gpvae.posteriors import DiagonalGaussian
from gpvae.training import MODELS, build_model
from gpvae.vae import VAE

SHAPE = (1, 4, 4)
FLOWS = [IAFVAE, HouseholderVAE]


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=gen(seed), dtype=torch.float64)


def pixels(count: int = 5) -> Tensor:
    return torch.rand((count, *SHAPE), generator=gen(1), dtype=torch.float64)


def build(kind: type[VAE], steps: int = 3, latent_dim: int = 4, scale: float = 1.0) -> VAE:
    """A float64 model; `scale` multiplies the flow's output weights, away from the identity."""
    flow = FlowConfig(steps=steps, hidden=9, context=5)
    config = ModelConfig(latent_dim=latent_dim, hidden=(8,), activation="tanh", flow=flow)
    torch.manual_seed(0)
    model = kind(SHAPE, config).double()
    with torch.no_grad():
        for step in getattr(model.encoder, "steps", []):
            step.outputs.weight.mul_(scale)
    return model


def independent(posterior):
    """A posterior without gradients, for numerical checks."""
    posterior.base = DiagonalGaussian(posterior.base.mean.detach(), posterior.base.std.detach())
    return posterior


# Both flows


@pytest.mark.parametrize("kind", FLOWS)
def test_no_steps_is_the_vae(kind: type[VAE]) -> None:
    vae, flow = build(VAE), build(kind, steps=0)
    flow.load_state_dict(vae.state_dict())  # strict: the parameters are the same ones
    x = pixels()
    for ours, reference in zip(
        flow.bound_terms(x, 3, gen(4)), vae.bound_terms(x, 3, gen(4)), strict=True
    ):
        assert torch.equal(ours, reference)


@pytest.mark.parametrize("kind", FLOWS)
def test_the_seed_gives_the_vaes_weights_to_the_shared_parts(kind: type[VAE]) -> None:
    vae, flow = build(VAE).state_dict(), build(kind).state_dict()
    assert set(vae) < set(flow)
    assert all(torch.equal(flow[name], vae[name]) for name in vae)


@pytest.mark.parametrize("kind", FLOWS)
def test_every_parameter_receives_gradient(kind: type[VAE]) -> None:
    model = build(kind)
    sum(model.loss_terms(pixels(), 10, gen()).values()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and float(p.grad.abs().max()) > 0, name


@pytest.mark.parametrize("kind", FLOWS)
def test_samples_carry_their_density(kind: type[VAE]) -> None:
    posterior = build(kind, scale=4)(pixels())
    z, log_q = posterior.rsample_with_log_prob((6,), gen())
    assert z.shape == (6, 5, 4) and log_q.shape == (6, 5)
    torch.testing.assert_close(posterior.log_prob(z), log_q, rtol=0, atol=1e-10)
    assert torch.equal(posterior.rsample((6,), gen()), z)


@pytest.mark.parametrize("kind", FLOWS)
def test_density_integrates_to_one(kind: type[VAE]) -> None:
    posterior = build(kind, latent_dim=2, scale=4)(pixels(2))
    axis = torch.linspace(-12, 12, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)[:, None]
    with torch.no_grad():
        total = posterior.log_prob(grid.expand(-1, 2, -1)).exp().sum(0) * (axis[1] - axis[0]) ** 2
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", FLOWS)
def test_moments_against_samples(kind: type[VAE]) -> None:
    posterior = build(kind, scale=4)(pixels(3))
    with torch.no_grad():
        z = posterior.rsample((40_000,), gen())
    # 512 draws behind IAF's moments: a standard error of up to 1/16, and a few percent.
    torch.testing.assert_close(posterior.mean, z.mean(0), rtol=0, atol=0.15)
    torch.testing.assert_close(posterior.std, z.std(0), rtol=0.15, atol=0)
    if kind is HouseholderVAE:
        torch.testing.assert_close(posterior.mean, z.mean(0), rtol=0, atol=0.03)
        torch.testing.assert_close(posterior.std, z.std(0), rtol=0.03, atol=0)


@pytest.mark.parametrize("kind", FLOWS)
def test_an_image_does_not_depend_on_its_batch(kind: type[VAE]) -> None:
    model, x, z = build(kind, scale=4), pixels(6), randn(7, 6, 4)
    whole, order = model(x), torch.tensor([4, 0, 5])
    for part in (model(x[order]), whole[order]):
        for quantity in ("mean", "std"):
            torch.testing.assert_close(
                getattr(part, quantity), getattr(whole, quantity)[order], rtol=0, atol=1e-12
            )
        torch.testing.assert_close(
            part.log_prob(z[:, order]), whole.log_prob(z)[:, order], rtol=0, atol=1e-11
        )


@pytest.mark.parametrize("kind", FLOWS)
def test_importance_weighting_meets_the_known_evidence(kind: type[VAE]) -> None:
    assert_meets_evidence(linear_gaussian(kind, flow=FlowConfig(steps=2, hidden=6, context=3)))


@pytest.mark.parametrize("name", ["iaf", "hf"])
@pytest.mark.parametrize("steps", [-1, 101])
def test_impossible_step_counts_are_refused(name: str, steps: int) -> None:
    with pytest.raises(ConfigError, match=rf"model\.flow\.steps is {steps}"):
        RunConfig().override(**{"model.encoder": name, "model.flow.steps": steps})


@pytest.mark.parametrize("name", ["iaf", "hf"])
def test_one_latent_dimension_is_refused_with_the_reason(name: str) -> None:
    config = RunConfig().override(**{"model.encoder": name, "model.latent_dim": 1})
    with pytest.raises(ConfigError, match=r"model\.latent_dim is 1.* [eE]xpected"):
        build_model(config, SHAPE)
    build_model(config.override(**{"model.flow.steps": 0}), SHAPE)


def test_models_are_listed() -> None:
    assert MODELS["iaf"] is IAFVAE and MODELS["hf"] is HouseholderVAE


# IAF


def test_context_reaches_every_step_and_dimension() -> None:
    encoder = build(IAFVAE).encoder
    for step in encoder.steps:
        context = randn(1, 5, seed=2).requires_grad_()
        for value in torch.cat(step(randn(1, 4), context), -1)[0]:
            (gradient,) = torch.autograd.grad(value, context, retain_graph=True)
            assert bool((gradient != 0).all())


def test_images_reach_every_dimension_through_the_context_alone() -> None:
    model, x = build(IAFVAE), pixels(1).requires_grad_()
    posterior = independent(model(x))
    for value in posterior.rsample((), gen())[0]:
        (gradient,) = torch.autograd.grad(value, x, retain_graph=True)
        assert bool((gradient != 0).all())


def test_steps_are_triangular_in_alternating_orders() -> None:
    steps, context = build(IAFVAE, scale=4).encoder.steps, randn(1, 5)
    for k, step in enumerate(steps):
        matrix = jacobian(lambda z, s=step: s.push(z, context)[0], randn(1, 4))[0, :, 0]
        if k % 2:
            matrix = matrix.T
        assert torch.equal(matrix.triu(1), torch.zeros_like(matrix))
        assert bool((matrix.tril(-1)[1:, :-1].tril() != 0)[torch.ones(3, 3).tril() > 0].all())
        assert bool((matrix.diagonal() > 0).all())


def test_log_determinant_against_autograd() -> None:
    posterior = independent(build(IAFVAE, scale=4)(pixels(1)))

    def push(z: Tensor) -> Tensor:
        for step in posterior.steps:
            z = step.push(z, posterior.context)[0]
        return z

    z0 = posterior.base.rsample((), gen())
    _, log_q = posterior.rsample_with_log_prob((), gen())
    expected = (
        posterior.base.log_prob(z0) - torch.linalg.slogdet(jacobian(push, z0)[0, :, 0]).logabsdet
    )
    torch.testing.assert_close(log_q, expected, rtol=0, atol=1e-12)


def test_pull_inverts_push() -> None:
    for step in build(IAFVAE, scale=10).encoder.steps:
        z, context = 3 * randn(7, 2, 4), randn(2, 5)
        y, log_det = step.push(z, context)
        back, log_det_back = step.pull(y, context)
        torch.testing.assert_close(back, z, rtol=0, atol=1e-8)
        torch.testing.assert_close(log_det_back, log_det, rtol=0, atol=1e-8)


def test_closed_and_open_gates_stay_finite() -> None:
    step = AutoregressiveStep(3, 6, 2, False, "tanh")
    z, context = torch.randn((5, 3), generator=gen()), torch.zeros(5, 2)
    for raw in (-1e4, 1e4):
        with torch.no_grad():
            step.outputs.bias[3:] = raw
        y, log_det = step.push(z, context)
        (y.sum() + log_det.sum()).backward()
        assert bool(torch.isfinite(y).all() and torch.isfinite(log_det).all())
        assert all(bool(torch.isfinite(p.grad).all()) for p in step.parameters())
    torch.testing.assert_close(y, z)  # open: the identity


def test_moments_of_an_affine_flow_are_exact() -> None:
    model = build(IAFVAE, scale=0)  # no dependence on z: every step scales and shifts
    posterior = model(pixels(3))
    scale, shift = torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for step in posterior.steps:
        m, raw = step.outputs.bias.detach().chunk(2)
        gate = (raw + 2).sigmoid()
        scale, shift = gate * scale, gate * shift + (1 - gate) * m
    mean, std = posterior.base.mean.detach(), posterior.base.std.detach()
    torch.testing.assert_close(posterior.mean, scale * mean + shift, rtol=0, atol=1e-12)
    torch.testing.assert_close(posterior.std, scale * std, rtol=0, atol=1e-12)


def test_too_few_hidden_units_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.flow\.hidden is 3, below .* = 4"):
        IAFVAE(SHAPE, ModelConfig(latent_dim=4, flow=FlowConfig(hidden=3)))


# Householder


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("length", [1e-30, 1e-3, 1.0, 1e30])
def test_rotation_is_orthogonal(dtype: torch.dtype, tolerance: float, length: float) -> None:
    base = DiagonalGaussian(randn(3, 5).to(dtype), randn(3, 5).exp().to(dtype))
    vectors = randn(3, 4, 5)
    rotation = HouseholderGaussian(base, (length * vectors).to(dtype)).rotation()
    same = HouseholderGaussian(base, vectors.to(dtype)).rotation()
    torch.testing.assert_close(rotation, same, rtol=0, atol=2 * tolerance)
    product = rotation @ rotation.mT - torch.eye(5, dtype=dtype)
    assert float(product.abs().max()) < tolerance
    assert float((torch.linalg.det(rotation) - 1).abs().max()) < 10 * tolerance  # K is even


def test_a_reflection_reflects() -> None:
    v, z = randn(3, 5), randn(3, 5, seed=1)
    u = unit_vectors(v)
    torch.testing.assert_close(reflect(v, u), -v)
    matrix = torch.eye(5, dtype=v.dtype) - 2 * u[..., None] * u[..., None, :]
    torch.testing.assert_close(reflect(z, u), (matrix @ z[..., None])[..., 0])
    assert torch.equal(reflect(z, unit_vectors(torch.zeros_like(v))), z)


def test_rotation_takes_the_reflections_in_order() -> None:
    v = randn(1, 2, 3)
    posterior = HouseholderGaussian(DiagonalGaussian(randn(1, 3), randn(1, 3).exp()), v)
    first, second = (torch.eye(3, dtype=v.dtype) - 2 * torch.outer(w, w) / (w @ w) for w in v[0])
    torch.testing.assert_close(posterior.rotation()[0], second @ first)
    torch.testing.assert_close(posterior.mean[0], second @ first @ posterior.base.mean[0])


@torch.no_grad()
def test_householder_density_covariance_and_kl_against_torch() -> None:
    posterior = build(HouseholderVAE)(pixels())
    factor = posterior.rotation() @ torch.diag_embed(posterior.base.std)
    cov = factor @ factor.mT
    torch.testing.assert_close(posterior.covariance(), cov, rtol=0, atol=1e-12)
    assert float((cov - torch.diag_embed(cov.diagonal(dim1=-2, dim2=-1))).abs().max()) > 0.01
    torch.testing.assert_close(posterior.std**2, cov.diagonal(dim1=-2, dim2=-1))
    reference = MultivariateNormal(posterior.mean, cov)
    z = 2 * randn(7, 5, 4)
    torch.testing.assert_close(posterior.log_prob(z), reference.log_prob(z), rtol=0, atol=1e-10)
    prior = MultivariateNormal(torch.zeros(4, dtype=z.dtype), torch.eye(4, dtype=z.dtype))
    torch.testing.assert_close(posterior.kl(), kl_divergence(reference, prior), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("steps", "reaches"), [(0, False), (3, True)])
def test_enough_reflections_reach_the_exact_posterior(steps: int, reaches: bool) -> None:
    model, x = linear_gaussian(HouseholderVAE, latent_dim=3, sigma=0.3), images(2)
    parameters = [randn(2, 3), randn(2, 3, seed=1), randn(2, steps, 3, seed=2)]
    search = torch.optim.LBFGS(
        [p.requires_grad_() for p in parameters], max_iter=300, line_search_fn="strong_wolfe",
        tolerance_grad=1e-10, tolerance_change=1e-14,
    )  # fmt: skip
    q = HouseholderGaussian
    z = exact_posterior(model, x)

    def posterior() -> HouseholderGaussian:
        mean, log_std, vectors = parameters
        return q(DiagonalGaussian(mean, log_std.exp()), vectors)

    def gap() -> Tensor:
        """KL(q || p(z | x)) = log p(x) - ELBO, in closed form."""
        return kl_divergence(MultivariateNormal(posterior().mean, posterior().covariance()), z)

    def closure() -> Tensor:
        search.zero_grad()
        loss = gap().sum()
        loss.backward()
        return loss

    search.step(closure)
    assert bool((gap() < 1e-6).all()) is reaches
    if reaches:
        torch.testing.assert_close(posterior().covariance(), z.covariance_matrix, rtol=0, atol=1e-3)
        with torch.no_grad():  # then every sample has the same weight, log p(x)
            samples, log_q = posterior().rsample_with_log_prob((5,), gen())
            log_w = model.generative.log_joint(x, samples) - log_q
        torch.testing.assert_close(log_w, exact_evidence(model, x).expand(5, -1), rtol=0, atol=1e-2)


def test_the_density_far_from_all_samples_is_zero_and_a_number() -> None:
    """The inverse overflows there; near the samples nothing changes."""
    model = build(IAFVAE, scale=4.0).float()
    posterior = model(pixels(2).float())
    z, log_q = posterior.rsample_with_log_prob((3,), gen())
    far = posterior.log_prob(torch.full_like(z, 1e38))
    assert (far == -torch.inf).all()
    torch.testing.assert_close(posterior.log_prob(z), log_q, rtol=1e-3, atol=1e-3)
