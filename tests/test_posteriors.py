"""Identities and limits of the posteriors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from gpvae.posteriors import DiagonalGaussian, RandomFunctionPosterior
from gpvae.special import expected_log_square

CASES = [  # F, S, H, T
    (0.4, 0.5, 0.8, 0.3),
    (-1.0, 0.0, 0.6, 0.1),
    (0.0, 0.3, -0.5, 0.2),
    (2.0, 0.05, 1.5, 0.5),
    (0.3, 1.0, 0.0, 0.5),
]


def make(case, **options):
    return RandomFunctionPosterior(
        *(torch.tensor([[v]], dtype=torch.float64) for v in case), **options
    )


def density(case, z):
    """Predictive density by adaptive quadrature over h."""
    f, s, h, t = case

    def integrand(e):
        var = s**2 + (h + t * e) ** 2
        return math.exp(-0.5 * e**2 - 0.5 * (z - f) ** 2 / var) / (2 * math.pi * math.sqrt(var))

    points = [-h / t] if abs(h / t) < 10 else None
    return integrate.quad(integrand, -10, 10, points=points, epsabs=1e-13, limit=400)[0]


@pytest.mark.parametrize("case", CASES)
def test_predictive_density_against_adaptive_quadrature(case):
    q = make(case)
    for offset in (-3.0, -1.0, -0.2, 0.4, 2.0):
        z = case[0] + offset * q.std.item()
        ours = q.log_prob(torch.tensor([[z]], dtype=torch.float64)).item()
        assert ours == pytest.approx(math.log(density(case, z)), abs=3e-5), (case, offset)


def test_quadrature_is_accurate_at_every_scale():
    """Against the same mixture with 20,000 nodes, from certain h to h hidden in noise."""
    ratios = torch.tensor([0, 0.5, 1, 2, 3, 5, 7, 20, 1e3, 1e7], dtype=torch.float64)
    shares = torch.tensor([0, 0.01, 0.1, 0.3, 1, 10, 1e3], dtype=torch.float64)
    h, s = (v.reshape(-1, 1) for v in torch.meshgrid(ratios, shares, indexing="ij"))
    zero, one = torch.zeros_like(h), torch.ones_like(h)
    q, fine = (RandomFunctionPosterior(zero, s, h, one, nodes=n) for n in (48, 20_000))
    z = q.std * torch.tensor([-6, -3, -1, -0.3, -0.1], dtype=torch.float64)[:, None, None]
    error = (q.log_prob(z) - fine.log_prob(z)).abs()
    assert error.max() < 3e-5, error.max(0)
    near = q.std * torch.tensor([0, 1e-3, 0.01, 0.05], dtype=torch.float64)[:, None, None]
    sharp = (s < 0.1)[:, 0] & (s > 0)[:, 0]  # the peak at F is resolved unless S is small
    error = (q.log_prob(near) - fine.log_prob(near)).abs().amax(0)
    assert error[~sharp & (s > 0)[:, 0]].max() < 3e-5
    assert error[sharp].max() < 1


@pytest.mark.parametrize("case", CASES)
def test_predictive_density_integrates_to_one(case):
    q = make(case)
    z = q.mean + q.std * torch.linspace(-14, 14, 200_001, dtype=torch.float64)[:, None, None]
    p = q.log_prob(z).exp()[:, 0]
    total = torch.trapezoid(p, z[:, 0, 0]).item()
    assert total == pytest.approx(1, abs=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_samples_follow_the_predictive_density(case):
    q = make(case)
    z = q.rsample((20_000,), torch.Generator().manual_seed(0))[:, 0, 0].numpy()
    grid = q.mean.item() + q.std.item() * np.linspace(-12, 12, 40_001)
    p = q.log_prob(torch.from_numpy(grid)[:, None, None]).exp()[:, 0].numpy()
    cdf = integrate.cumulative_trapezoid(p, grid, initial=0)
    assert stats.kstest(z, lambda v: np.interp(v, grid, cdf)).pvalue > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_mean_and_variance_match_the_density(case):
    q = make(case)
    f, s, h, t = case
    assert q.mean.item() == f
    assert q.std.item() ** 2 == pytest.approx(s**2 + h**2 + t**2)
    assert torch.equal(q.gaussian().std, q.std)


@pytest.mark.parametrize("case", CASES)
def test_expected_kl_against_quadrature(case):
    f, s, h, t = case

    def integrand(e):
        value = h + t * e
        kl = 0.5 * (f**2 + s**2 + value**2 - 1 - math.log(value**2))
        return kl * stats.norm.pdf(e)

    points = [-h / t] if abs(h / t) < 12 else None
    exact = integrate.quad(integrand, -12, 12, points=points, epsabs=1e-12, limit=400)[0]
    assert make(case).kl().item() == pytest.approx(exact, abs=1e-8)


@pytest.mark.parametrize("case", CASES)
def test_expected_kl_is_at_least_the_predictive_kl(case):
    q = make(case)
    z = q.mean + q.std * torch.linspace(-14, 14, 100_001, dtype=torch.float64)[:, None, None]
    log_q = q.log_prob(z)[:, 0]
    log_p = stats.norm.logpdf(z[:, 0, 0].numpy())
    kl = torch.trapezoid(log_q.exp() * (log_q - torch.from_numpy(log_p)), z[:, 0, 0])
    assert q.kl().item() > kl.item()


def test_without_function_variance_it_is_the_gaussian_exactly():
    torch.manual_seed(0)
    mean, std = torch.randn(5, 3).double(), torch.rand(5, 3).double() + 0.1
    q = RandomFunctionPosterior(mean, torch.zeros_like(mean), std, torch.zeros_like(mean))
    normal = DiagonalGaussian(mean, std)
    z = torch.randn(7, 5, 3).double()
    torch.testing.assert_close(q.log_prob(z), normal.log_prob(z), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(q.kl(), normal.kl(), rtol=1e-13, atol=1e-13)


def test_sign_of_h_is_free():
    case = (0.4, 0.5, 0.8, 0.3)
    flipped = (0.4, 0.5, -0.8, 0.3)
    z = torch.tensor([[0.9]], dtype=torch.float64)
    assert make(case).log_prob(z).item() == pytest.approx(make(flipped).log_prob(z).item())
    assert make(case).kl().item() == pytest.approx(make(flipped).kl().item())


def test_gaussian_against_torch_distributions():
    torch.manual_seed(0)
    mean, std = torch.randn(5, 3).double(), torch.rand(5, 3).double() + 0.1
    q = DiagonalGaussian(mean, std)
    normal = torch.distributions.Independent(torch.distributions.Normal(mean, std), 1)
    prior = torch.distributions.Independent(
        torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(std)), 1
    )
    z = torch.randn(4, 5, 3).double()
    torch.testing.assert_close(q.log_prob(z), normal.log_prob(z))
    torch.testing.assert_close(q.kl(), torch.distributions.kl_divergence(normal, prior))


def test_scores_are_their_definitions():
    s, h, t = (torch.rand(4, 3).double() + 0.1 for _ in range(3))
    q = RandomFunctionPosterior(torch.zeros(4, 3).double(), s, h, t)
    scores = q.scores()
    torch.testing.assert_close(scores["relative_f_var"], (s**2 / (h**2 + t**2)).mean(1))
    torch.testing.assert_close(scores["f_var"], (s**2).sum(1))
    torch.testing.assert_close(scores["h_var"], (t**2).sum(1))


def test_expected_gap_is_the_mean_kl_to_the_gaussian_of_the_same_moments():
    torch.manual_seed(0)
    s, h, t = (torch.rand(4, 3).double() + 0.1 for _ in range(3))
    mean = torch.randn(4, 3).double()
    q = RandomFunctionPosterior(mean, s, h, t)
    draws = mean + s * torch.randn(20_000, 4, 3), (h + t * torch.randn(20_000, 4, 3)).abs()
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(*draws), normal(q.mean, q.std)).sum(-1)
    error = kl.std(0) / math.sqrt(len(kl))
    assert ((q.scores()["expected_gap"] - kl.mean(0)).abs() < 4 * error).all()
    certain = RandomFunctionPosterior(mean, 0 * s, h, 0 * t).scores()["expected_gap"]
    torch.testing.assert_close(certain, torch.zeros_like(certain), rtol=0, atol=1e-12)


def test_gradient_of_the_expected_kl():
    torch.manual_seed(0)
    parts = [(torch.rand(4, 3).double() + 0.1).requires_grad_() for _ in range(4)]
    assert torch.autograd.gradcheck(lambda *p: RandomFunctionPosterior(*p).kl(), parts)
    f, s, h, t = parts
    value = 0.5 * (f**2 + s**2 + h**2 + t**2 - 1 - expected_log_square(h, t)).sum(-1)
    torch.testing.assert_close(RandomFunctionPosterior(*parts).kl(), value)


@pytest.mark.parametrize("kind", ["gaussian", "random"])
def test_shapes_and_indexing(kind):
    parts = [torch.rand(6, 3) + 0.1 for _ in range(4)]
    q = DiagonalGaussian(*parts[:2]) if kind == "gaussian" else RandomFunctionPosterior(*parts)
    z = q.rsample((5,))
    assert z.shape == (5, 6, 3)
    assert q.rsample().shape == (6, 3)
    assert q.log_prob(z).shape == (5, 6)
    assert q.kl().shape == (6,)
    torch.testing.assert_close(q[2:4].log_prob(z[:, 2:4]), q.log_prob(z)[:, 2:4])


def test_a_part_of_the_images_keeps_the_rule_and_the_kind_of_bound():
    parts = [torch.rand(6, 3) + 0.1 for _ in range(4)]
    part = RandomFunctionPosterior(*parts, nodes=5, marginal=True)[2:4]
    assert part.nodes == 5 and part.kl() is None


def test_samples_are_reparameterised():
    parts = [(torch.rand(2, 3) + 0.1).requires_grad_() for _ in range(4)]
    q = RandomFunctionPosterior(*parts)
    (q.rsample((8,)) ** 2).sum().backward()
    assert all(p.grad is not None and (p.grad != 0).all() for p in parts)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_density_on_a_gpu_is_that_of_the_cpu():
    torch.manual_seed(0)
    parts = [torch.randn(5, 3).double() for _ in range(4)]
    z = torch.randn(7, 2, 5, 3).double()
    ours = RandomFunctionPosterior(*(p.abs().cuda() for p in parts)).log_prob(z.cuda())
    theirs = RandomFunctionPosterior(*(p.abs() for p in parts)).log_prob(z)
    torch.testing.assert_close(ours.cpu(), theirs)
