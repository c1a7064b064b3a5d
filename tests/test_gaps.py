"""Gap decomposition and selective refinement against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from small_models import images, make

import gpvae
from gpvae.ais import annealed_log_likelihood
from gpvae.errors import ConfigError, DataError
from gpvae.evaluate import log_likelihood
from gpvae.gaps import Pooled, decompose, difference
from gpvae.posteriors import DiagonalGaussian
from gpvae.refine import Study, selective_refinement, study, trajectory
from gpvae.search import BestSoFar, SearchOptions, gaussian_elbo
from gpvae.svi import SVI, certify, gaussians, measured, optimise_posterior
from gpvae.vlae import VLAE


def closed_form_gaps(known):
    """Approximation and amortization gap of each image, for a Gaussian exact posterior."""
    mean, covariance = known.posterior(known.x)
    precision = torch.linalg.inv(covariance)
    approximation = 0.5 * (precision.diagonal().log().sum() + covariance.logdet())
    with torch.no_grad():
        q = known.model(known.x)
    moved = ((q.mean - mean) @ precision * (q.mean - mean)).sum(-1)
    spread = (q.std**2 * precision.diagonal()).sum(-1) - 2 - (q.std**2).log().sum(-1)
    inference = 0.5 * (moved + spread - precision.logdet())
    return approximation.expand_as(inference), inference - approximation


def correlate(known):
    """Mix the latents, so that the exact posterior is far from diagonal."""
    known.matrix = known.matrix @ torch.tensor([[1.0, 0.9], [0.0, 0.4]]).double()
    known.model.generative.decoder.matrix.copy_(known.matrix)
    return known


# Gaps


@pytest.mark.parametrize("orthogonal", [True, False])
def test_gaps_are_the_known_ones(linear_gaussian, orthogonal):
    known = linear_gaussian(gpvae.VAE, orthogonal=orthogonal, std=1.0)
    known = known if orthogonal else correlate(known)
    gaps = decompose(known.model, known.x, samples=4000, elbo_samples=4000)
    approximation, amortization = closed_form_gaps(known)
    assert abs(approximation[0]) < 1e-12 if orthogonal else approximation[0] > 0.2
    for found, expected, bias in (
        (gaps.approximation, approximation, 0.01),  # the search stops short of the optimum
        (gaps.amortization, amortization, 0.01),
        (gaps.inference, approximation + amortization, 0),
    ):
        assert found.stderr.max() < 0.3
        assert ((found.value - expected).abs() < 4.5 * found.stderr + bias).all()


def test_every_estimate_of_log_p_is_right(linear_gaussian):
    known = linear_gaussian(gpvae.VAE, orthogonal=False, std=1.5)
    with torch.no_grad():  # wider than the posterior, so that the weights have a finite variance
        known.model.encoder.log_std_head.bias.fill_(0.7)
    gaps = decompose(known.model, known.x, samples=4000)
    for estimate in (gaps.own, gaps.neutral, gaps.log_px):
        z = (estimate.value - known.log_prob(known.x)) / estimate.stderr
        assert z.abs().max() < 4.5
        assert estimate.stderr.max() < 0.15
        assert estimate.samples == 4000


def test_inference_gap_is_the_sum_of_the_two_others():
    gaps = decompose(make(), images(6), samples=50)
    total = gaps.approximation.value + gaps.amortization.value
    torch.testing.assert_close(gaps.inference.value, total)
    assert set(gaps.summary()) >= {"elbo", "own", "neutral", "log_px", "amortization"}
    mean, stderr = gaps.summary()["amortization"]
    assert mean == pytest.approx(gaps.amortization.value.mean().item())
    assert stderr == pytest.approx(gaps.amortization.value.std().item() / math.sqrt(6))


def test_svi_has_no_amortization_gap_and_vlae_can_have_a_negative_one(linear_gaussian):
    known = linear_gaussian(SVI, orthogonal=False)
    known.model.eval()
    gap = decompose(known.model, known.x, samples=20, elbo_samples=2000).amortization
    assert (gap.value.abs() < 4.5 * gap.stderr + 0.02).all()
    options = {"model.vlae.steps": 1, "model.vlae.rate": 1.0}
    known = correlate(linear_gaussian(VLAE, orthogonal=False, **options))
    gaps = decompose(known.model, known.x, samples=20, elbo_samples=2000)
    assert gaps.amortization.mean < -0.05
    assert abs(gaps.inference.mean) < 4.5 * gaps.inference.stderr.mean() / math.sqrt(20)


def test_the_two_bounds_of_a_gap_have_noise_of_their_own(linear_gaussian):
    """SVI's gap is zero, so that what is left is the noise that its standard error states."""
    known = linear_gaussian(SVI, orthogonal=False)
    known.model.eval()
    for seed in (0, 3):
        gaps = decompose(known.model, known.x, samples=2, elbo_samples=500, seed=seed)
        z = gaps.amortization.value / gaps.amortization.stderr
        assert 0.3 < z.square().mean() < 3


@pytest.mark.parametrize("seed", [0, 2])
def test_each_estimate_has_noise_of_its_own_and_the_proposal_of_its_name(seed):
    model, x = make(), images(4)
    gaps = decompose(model, x, samples=10, elbo_samples=10, seed=seed)
    with torch.no_grad():
        q = model(x)
    best = gaps.optimised.posterior
    neutral = DiagonalGaussian(best.mean, 1.2 * best.std)
    proposals = {"own": q, "neutral": neutral, "log_px": Pooled(q, neutral)}
    for i, (name, proposal) in enumerate(proposals.items(), 1):
        expected = log_likelihood(model, x, 10, proposal=proposal, seed=3 * seed + i)
        torch.testing.assert_close(getattr(gaps, name).value, expected.value, msg=name)
    expected = gpvae.elbo(model, x, 10, seed=3 * seed)
    torch.testing.assert_close(gaps.elbo.value, expected.value)
    expected = measured(model.generative, x, best, 10, seed=3 * seed + 4)
    torch.testing.assert_close(gaps.elbo_optimised.value, expected.value)


def test_errors_of_a_difference_add_as_those_of_independent_estimates():
    a, b = (
        gpvae.Estimate(torch.tensor([v]), torch.tensor([e]), s)
        for v, e, s in ((5.0, 3.0, 9), (1.0, 4.0, 7))
    )
    found = difference(a, b)
    assert (found.value.item(), found.stderr.item(), found.samples) == (4.0, 5.0, 7)


def test_a_result_of_an_earlier_search_is_used():
    model, x = make(), images(4)
    found = certify(model, x).best
    assert decompose(model, x, samples=10, optimised=found).elbo_optimised is found.elbo


@pytest.mark.parametrize("samples", [0, 1, 7, -2])
def test_samples_that_cannot_be_halved_are_refused(samples):
    with pytest.raises(ConfigError, match=f"samples={samples}; expected an even number"):
        decompose(make(), images(2), samples=samples)
    q = DiagonalGaussian(torch.zeros(2, 3), torch.ones(2, 3))
    with pytest.raises(ConfigError, match="cannot be halved"):
        Pooled(q, q).rsample((3,))


def test_pooled_proposal_is_as_good_as_the_better_one(linear_gaussian):
    known = linear_gaussian(gpvae.VAE, orthogonal=False)
    mean, covariance = known.posterior(known.x)
    std = covariance.diagonal().sqrt().expand_as(mean)
    good, useless = DiagonalGaussian(mean, 1.3 * std), DiagonalGaussian(mean + 9, 0.1 * std)
    error = {}
    for name, q in (("good", good), ("pooled", Pooled(useless, good))):
        estimate = log_likelihood(known.model, known.x, 4000, proposal=q)
        error[name] = (estimate.value - known.log_prob(known.x)).square().mean().sqrt()
        assert error[name] < 1.5 * estimate.stderr.mean()
    assert error["pooled"] < 2.5 * error["good"]  # sqrt 2 is expected


def test_pooled_density_and_moments():
    a = DiagonalGaussian(torch.zeros(2, 1).double(), torch.ones(2, 1).double())
    b = DiagonalGaussian(torch.full((2, 1), 3.0).double(), torch.full((2, 1), 0.5).double())
    q = Pooled(a, b)
    grid = torch.linspace(-9, 9, 20_001, dtype=torch.float64)[:, None, None].expand(-1, 2, 1)
    p = q.log_prob(grid).exp()
    step = 18 / 20_000
    torch.testing.assert_close(p.sum(0) * step, torch.ones(2).double())
    mean = (p[..., None] * grid).sum(0) * step
    torch.testing.assert_close(q.mean, mean)
    torch.testing.assert_close(q.std**2, (p[..., None] * (grid - mean) ** 2).sum(0) * step)
    assert q[1:].mean.shape == (1, 1)


# Selective refinement


def test_curves_of_a_known_study():
    """Four images that gain 0, 1, 2 and 5 nats in two steps, half of it in the first."""
    gain = torch.tensor([0.0, 1.0, 2.0, 5.0]).double()
    bounds = torch.stack([0 * gain, 0.5 * gain, gain]) - 10
    found = Study(torch.tensor([0.0, 1.0, 2.0]).double(), bounds, bounds, {"wrong": -gain})
    expected = {
        "none": ([0, 1, 2], [0, 0, 0]),
        "uniform": ([0, 1, 2], [0, 1, 2]),
        "random": ([0, 0.5, 1, 1.5, 2], [0, 0.5, 1, 1.5, 2]),
        "oracle": ([0, 0.5, 1, 1.5, 2], [0, 1.25, 1.75, 2, 2]),
        "wrong": ([0, 0.5, 1, 1.5, 2], [0, 0, 0.25, 0.75, 2]),
    }
    for policy, (cost, value) in expected.items():
        curve = found.curve(policy)
        assert curve.cost.tolist() == cost, policy
        torch.testing.assert_close(curve.bound + 10, torch.tensor(value).double())
    one = found.curve("oracle", each=1)
    assert one.cost.tolist() == [0, 0.25, 0.5, 0.75, 1]
    torch.testing.assert_close(one.bound + 10, torch.tensor([0, 0.625, 0.875, 1, 1]).double())
    assert found.curve("uniform", each=1).cost.tolist() == [0, 1]
    assert found.curve("none").area() == 0
    assert found.curve("oracle").area() == pytest.approx((1.25 + 1.75 + 2 + 1) / 4)
    assert found.curve("-ELBO").bound[-1] == pytest.approx(-8)
    with pytest.raises(ConfigError, match=r"unknown policy 'orcale'\. Did you mean 'oracle'"):
        found.curve("orcale")


def test_standard_error_of_a_curve_is_that_of_the_mean_gain():
    gain = torch.rand(50, generator=torch.Generator().manual_seed(0)).double()
    bounds = torch.stack([torch.zeros(50).double(), gain])
    found = Study(torch.tensor([0.0, 1.0]).double(), bounds, bounds, {})
    for policy in ("uniform", "random", "oracle"):
        expected = gain.std() / math.sqrt(50)
        torch.testing.assert_close(found.curve(policy).stderr[-1], expected)
        assert found.curve(policy).stderr[0] == 0


def test_study_orders_the_policies():
    model, x = make(), images(40)
    found = study(model, x, {"constant": torch.zeros(40)}, steps=6, elbo_samples=2000)
    assert found.policies == ["none", "uniform", "random", "constant", "-ELBO", "oracle"]
    assert found.steps.tolist() == list(range(7))
    area = {policy: found.curve(policy).area() for policy in found.policies}
    assert area["oracle"] > area["random"] > area["none"] == 0
    assert area["oracle"] >= area["-ELBO"] - 0.02
    ends = [found.curve(p).bound[-1] for p in ("uniform", "random", "-ELBO", "oracle")]
    torch.testing.assert_close(torch.stack(ends), ends[0].expand(4))
    assert not torch.equal(found.bounds[0], found.ranking_bounds[0])  # independent noise
    with torch.no_grad():
        start = measured(model.generative, x, gaussians(model, x), 2000, seed=1)
    torch.testing.assert_close(found.bounds[0], start.value)
    spent, _ = selective_refinement(model, x, torch.zeros(40), budget=999, steps=6)
    with torch.no_grad():  # what the policies are said to gain is what is delivered
        end = measured(model.generative, x, spent, 2000, seed=1)
    torch.testing.assert_close(found.bounds[-1], end.value)


def test_records_are_as_far_apart_as_asked_for_and_end_with_the_last_step():
    model, x = make(), images(4)
    found = study(model, x, {}, steps=5, every=2, elbo_samples=4)
    assert found.steps.tolist() == [0, 2, 4, 5] and len(found.bounds) == 4


def test_no_image_gets_worse_by_the_bound_that_keeps_the_best_state():
    """A rate at which single steps overshoot, so that the last state is not always the best."""
    model, x = make(), images(30)
    options = SearchOptions(samples=16, rate=1.0, forget=1.0)
    path = trajectory(model.generative, x, gaussians(model, x), range(9), options)
    judge = BestSoFar(model.generative, x, path[0], options.seed)
    with torch.no_grad():
        bounds = torch.stack(
            [gaussian_elbo(model.generative, x, q, judge.noise).mean(0) for q in path]
        )
    assert (bounds.diff(dim=0) >= -1e-9).all()
    assert (bounds.diff(dim=0) == 0).any()  # some step was not kept


@pytest.mark.parametrize("each", [0, 3, -3, -4])
def test_a_curve_of_no_recorded_step_is_refused(each):
    bounds = torch.zeros(3, 4)
    found = Study(torch.tensor([0.0, 1.0, 2.0]), bounds, bounds, {})
    with pytest.raises(ConfigError, match=rf"each={each}; .* \[0, 1, 2\], of other than 0"):
        found.curve("random", each)


def test_budget_goes_to_the_hardest_images_only():
    model, x = make(), images(10)
    score = torch.tensor([0.0, 5, 1, 9, 2, 2, 0, 1, 3, 4])
    before = gaussians(model, x)
    q, chosen = selective_refinement(model, x, score, budget=23, steps=5)
    assert chosen.tolist() == [3, 1, 9, 8]  # 23 steps pay for four images
    others = [0, 2, 4, 5, 6, 7]
    assert torch.equal(q.mean[others], before.mean[others])
    assert torch.equal(q.std[others], before.std[others])
    a, b = (measured(model.generative, x, p, 4000, seed=9) for p in (before, q))
    gain = (b.value - a.value)[chosen]
    assert (gain > 0).all()
    alone, _ = selective_refinement(model, x[3:4], score[3:4], budget=5, steps=5)
    torch.testing.assert_close(alone.mean[0], q.mean[3], rtol=1e-9, atol=0)


def test_no_budget_changes_nothing_and_too_much_refines_all():
    model, x = make(), images(4)
    q, chosen = selective_refinement(model, x, torch.zeros(4), budget=3, steps=4)
    assert len(chosen) == 0
    assert torch.equal(q.mean, gaussians(model, x).mean)
    assert len(selective_refinement(model, x, torch.zeros(4), budget=999)[1]) == 4


def test_bad_input():
    model, x = make(), images(4)
    some = torch.tensor([1.0, math.nan, math.inf, 0.0])
    for score, said in (
        (torch.zeros(3), r"expected one number for each of 4 images, \(4,\)"),
        (torch.zeros(4, 1), r"has shape \(4, 1\)"),
        (some, "is NaN or infinite for 2 of 4 images"),
    ):
        with pytest.raises(DataError, match=said):
            selective_refinement(model, x, score, budget=4)
        with pytest.raises(DataError, match="'mine'"):
            study(model, x, {"mine": score})
    with pytest.raises(ConfigError, match="budget=-1"):
        selective_refinement(model, x, torch.zeros(4), budget=-1)
    with pytest.raises(ConfigError, match="every=3"):
        study(model, x, {}, steps=2, every=3)


def test_images_that_the_model_has_no_density_of_are_refused_everywhere():
    model, grey = make(output="bernoulli"), 0.3 + 0 * images(4)
    broken = images(4)
    broken[1, 0, 0, 0] = math.nan
    score = torch.zeros(4)
    for function in (
        lambda x: optimise_posterior(model, x),
        lambda x: certify(model, x),
        lambda x: study(model, x, {"mine": score}),
        lambda x: selective_refinement(model, x, score, budget=4),
        lambda x: decompose(model, x),
        lambda x: annealed_log_likelihood(model, x),
    ):
        for bad, said in (
            (grey, r"pixels other than 0 and 1, which range from 0\.3 to 0\.3"),
            (broken, "1 of 4 images have NaN"),
            (images(4)[:, :, :3], "this model was built for"),
            (images(4)[:0], "no images were given"),
        ):
            with pytest.raises(DataError, match=said):
                function(bad)
