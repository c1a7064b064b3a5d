"""The toy of notebook 01, whose evidence can be summed up."""

from __future__ import annotations

from itertools import product

import pytest
import torch

import gpvae
from gpvae.toy import exact_log_prob, toy_config, toy_data, with_known_decoder


@pytest.fixture
def model():
    config = toy_config(epochs=1)
    return with_known_decoder(gpvae.build_model(config, (1, 4, 4))).eval()


def test_exact_probabilities_of_all_images_sum_to_one(model):
    """Of eight pixels; the other eight are summed out by a decoder that leaves them even."""
    decoder = model.generative.decoder
    decoder.directions[:, 8:] = 0
    x = torch.zeros(256, 1, 4, 4)
    x.view(256, 16)[:, :8] = torch.tensor(list(product((0.0, 1.0), repeat=8)))
    log_p = torch.cat([exact_log_prob(model, each, size=61) for each in x.split(32)])
    # Each image stands for the 2^8 that differ in the even pixels.
    assert (log_p.exp().sum() * 2**8).item() == pytest.approx(1, abs=1e-3)


def test_exact_probability_meets_the_importance_weighted_one(model):
    x = toy_data().test.unit()[:5]
    exact = exact_log_prob(model, x)
    estimate = gpvae.log_likelihood(model, x, 40_000, proposal=gpvae.svi.prior(x, 2))
    assert estimate.stderr.max() < 0.1
    assert ((estimate.value - exact).abs() < 4.5 * estimate.stderr).all()
