"""Densities against references and normalisation."""

from __future__ import annotations

import math

import pytest
import torch

import gpvae
from gpvae.config import ModelConfig
from gpvae.errors import DataError
from gpvae.outputs import Bernoulli, DiscretisedLogistic, Gaussian, PixelGaussian, make_output


@pytest.fixture
def raw():
    return torch.randn(4, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def grey():
    return torch.rand(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_bernoulli_against_torch_and_sums_to_one(raw, grey):
    x = (grey > 0.5).double()
    expected = torch.distributions.Bernoulli(logits=raw).log_prob(x).sum(-1)
    torch.testing.assert_close(Bernoulli().log_prob(raw, x), expected)
    all_images = torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * 6)
    total = Bernoulli().log_prob(raw[0, 0], all_images).exp().sum()
    assert total.item() == pytest.approx(1)


def test_gaussians_against_torch(raw, grey):
    one, each = Gaussian().double(), PixelGaussian(6).double()
    with torch.no_grad():
        each.log_std.normal_()
    normal = torch.distributions.Normal
    std = one.log_std.exp()
    torch.testing.assert_close(
        one.log_prob(raw, grey), normal(raw, std).log_prob(grey).sum(-1), rtol=1e-12, atol=0
    )
    expected = normal(raw, each.std()).log_prob(grey).sum(-1)
    torch.testing.assert_close(each.log_prob(raw, grey), expected, rtol=1e-12, atol=0)


def test_pixel_gaussian_stays_above_its_floor():
    output = PixelGaussian(3)
    with torch.no_grad():
        output.log_std.fill_(-50)
    torch.testing.assert_close(output.std(), torch.full((3,), 0.01))


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("scale", [1e-3, 0.05, 2.0])
@pytest.mark.parametrize("mean", [-0.5, 0.0, 0.31, 1.0, 4.0])
def test_logistic_sums_to_one_over_the_levels(levels, scale, mean):
    output = DiscretisedLogistic(levels, scale).double()
    x = torch.linspace(0, 1, levels, dtype=torch.float64)[:, None]
    log_p = output.log_prob(torch.full_like(x, mean), x)
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert torch.isfinite(log_p).all()


def test_logistic_is_the_difference_of_distribution_functions():
    output = DiscretisedLogistic(256, 0.02).double()
    x, mean = torch.tensor([[100 / 255]]).double(), torch.tensor([[0.4]]).double()
    low, high = (((x + d / 510 - mean) / 0.02).sigmoid() for d in (-1, 1))
    expected = (high - low).log().item()
    assert output.log_prob(mean, x).item() == pytest.approx(expected, rel=1e-6)


def test_logistic_has_finite_values_and_gradients_far_out_in_float32():
    output = DiscretisedLogistic(256, 1e-3)
    raw = torch.tensor([[-30.0, 0.0, 30.0]], requires_grad=True)
    value = output.log_prob(raw, torch.tensor([[1.0, 0.5019608, 0.0]]))
    value.sum().backward()
    assert torch.isfinite(value).all() and torch.isfinite(raw.grad).all()


def test_units():
    nats = torch.tensor([-6 * math.log(2) * 3.0])
    assert Gaussian().bits_per_dim(nats, 6).item() == pytest.approx(3)
    uniform = DiscretisedLogistic(2, 1e6)  # one bit for each binary pixel
    log_p = uniform.log_prob(torch.full((1, 5), 0.5), torch.tensor([[0.0, 1, 1, 0, 1]]))
    assert uniform.bits_per_dim(log_p, 5).item() == pytest.approx(1, abs=1e-5)


def test_points_outside_a_discrete_density_are_refused():
    with pytest.raises(DataError, match="0 and 1"):
        Bernoulli().check(torch.tensor([0.5]))
    with pytest.raises(DataError, match=r"model\.levels"):
        DiscretisedLogistic(17).check(torch.tensor([0.5 / 16]))
    for outside in (18 / 16, -1 / 16, 5.0):
        with pytest.raises(DataError, match=rf"none of its levels .* such as {outside:g}"):
            DiscretisedLogistic(17).check(torch.tensor([0.5, outside]))
    DiscretisedLogistic(17).check(torch.arange(17) / 16)


@pytest.mark.parametrize("output", ["bernoulli", "gaussian", "logistic", "pixel-gaussian"])
@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_low_precision_inside_the_networks_leaves_densities_in_float32(output, network):
    shape, config = (1, 9, 6), ModelConfig(output=output, network=network, precision="bfloat16")
    model = gpvae.VAE(shape, config)
    x = (torch.rand(5, *shape) < 0.5).float()
    z = torch.randn(2, 5, config.latent_dim)
    raw = model.generative.decode(z)
    assert raw.dtype == torch.float32
    expected = make_output(shape, config).double().log_prob(raw.double(), x.flatten(1).double())
    got = model.generative.log_likelihood(x, z)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_dequantised_density_bounds_the_discrete_probability():
    """E log p(x + u) + log(1 / levels) <= log P(x), with equality for a flat density."""
    from gpvae.outputs import dequantise

    generator = torch.Generator().manual_seed(0)
    x = torch.full((20_000, 1), 3 / 16)
    spread = dequantise(x, 17, generator)
    assert spread.min() >= 3 / 17 and spread.max() <= 4 / 17
    output = Gaussian(levels=17)
    with torch.no_grad():
        bound = output.log_prob(torch.tensor([[0.1]]), spread).mean() - math.log(17)
    normal = torch.distributions.Normal(0.1, 0.3)
    exact = (normal.cdf(torch.tensor(4 / 17)) - normal.cdf(torch.tensor(3 / 17))).log()
    assert exact - 1e-2 < bound < exact
    assert output.augment(x, generator).unique().numel() > 1000
    assert torch.equal(Gaussian().augment(x, generator), x)


@pytest.mark.parametrize("output", ["bernoulli", "gaussian", "pixel-gaussian"])
def test_the_mean_is_that_of_the_density(output):
    """By summing or integrating x p(x) over one pixel."""
    p = make_output((1, 1, 1), ModelConfig(output=output)).double()
    raw = torch.tensor([[0.7]]).double()
    discrete = output == "bernoulli"
    x = torch.arange(2.0) if discrete else torch.linspace(-4, 5, 9001)
    density = p.log_prob(raw, x.double()[:, None]).exp()
    expected = (density * x).sum() / density.sum()
    torch.testing.assert_close(p.mean(raw)[0, 0], expected)


def test_images_from_the_prior_are_means_of_decoded_standard_normals():
    model = gpvae.VAE((1, 2, 3), ModelConfig(output="bernoulli", latent_dim=4))
    z = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.generative.decode(z).sigmoid().reshape(5, 1, 2, 3)
        torch.testing.assert_close(model.sample(5, torch.Generator().manual_seed(0)), expected)
        torch.testing.assert_close(model.generative.mean_image(z), expected)


def test_bits_per_dimension_of_a_model_are_per_pixel():
    model = gpvae.VAE((1, 2, 3), ModelConfig(latent_dim=4))
    assert model.bits_per_dim(torch.tensor(-6 * math.log(2))).item() == pytest.approx(1)
