"""SA-VAE: identities, exact double backward, direction of the steps, independence of images."""

from __future__ import annotations

import math
from functools import partial

import pytest
import small_models
import torch
from small_models import assert_gradients, loss

import gpvae
from gpvae.config import ModelConfig, SAVAEConfig
from gpvae.errors import ConfigError, TrainingError
from gpvae.evaluate import log_likelihood
from gpvae.noise import ImageNoise
from gpvae.posteriors import DiagonalGaussian
from gpvae.savae import SAVAE, clipped, refine
from gpvae.svi import measured
from gpvae.training import build_model, train

SHAPE = (1, 2, 3)
images = partial(small_models.images, shape=SHAPE)


def make(kind=SAVAE, output="gaussian", **options):
    """A small smooth float64 model whose inner steps are not small."""
    options = {"steps": 3, "learning_rate": 0.05, "clip": 0.0} | options
    config = ModelConfig(
        latent_dim=2,
        hidden=(5,),
        activation="tanh",
        output=output,
        savae=SAVAEConfig(**options),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(SHAPE, config).double()
    with torch.no_grad():
        for parameter in model.generative.decoder.parameters():
            parameter.mul_(2)
    return model


# Identities


def test_no_steps_are_the_vae_to_the_last_bit():
    model, vae, x = make(steps=0), make(gpvae.VAE), images()
    vae.load_state_dict(model.state_dict())
    assert torch.equal(model(x).mean, vae(x).mean)
    assert torch.equal(model(x).std, vae(x).std)
    assert torch.equal(loss(model, x), loss(vae, x))


def test_noise_of_the_images_leaves_them_their_posterior():
    """As at evaluation, where the inner noise is fixed; whole and in parts."""
    model, x = make(), images()
    with torch.no_grad():
        parts = [model.bound_terms(each, 2, ImageNoise(each, 3)) for each in (x[:1], x[1:])]
        whole = model.bound_terms(x, 2, ImageNoise(x, 3))
    for i, term in enumerate(whole):
        torch.testing.assert_close(term, torch.cat([part[i] for part in parts], -1))


def test_bounds_are_not_measured_with_the_draws_that_were_ascended():
    """They would be too high; the streams of evaluations are those of small seeds."""
    model, x = make(steps=4).eval(), images()
    ascended = model.encoder._noise(x, 2).flatten(0, 1)
    for seed in range(-10, 100):
        assert not torch.equal(ImageNoise(x, seed).normal(ascended.shape, x), ascended)


def test_a_zero_step_is_the_vae_to_machine_precision():
    model, x = make(learning_rate=1e-300), images()
    q, expected = model(x), make(gpvae.VAE)(x)
    torch.testing.assert_close(q.mean, expected.mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(q.std, expected.std, rtol=1e-14, atol=0)


def test_parameters_are_those_of_the_vae():
    names = [sorted(m.state_dict()) for m in (make(), make(gpvae.VAE))]
    assert names[0] == names[1]


def test_one_step_is_the_formula():
    """lambda_1 = lambda_0 + rate * d ELBO / d lambda, the gradient written out by hand."""
    model, x = make(steps=1, samples=2), images()
    base = make(gpvae.VAE)(x)
    mean, log_std = base.mean.detach().requires_grad_(), base.std.log().detach().requires_grad_()
    noise = model.encoder._noise(x, 2)[0]
    z = mean + log_std.exp() * noise
    raw = model.generative.decode(z)
    sigma = model.generative.output.log_std.exp()
    fit = torch.distributions.Normal(raw, sigma).log_prob(x.flatten(1)).sum(-1).mean(0)
    kl = 0.5 * (mean**2 + (2 * log_std).exp() - 1 - 2 * log_std).sum(-1)
    by_mean, by_log_std = torch.autograd.grad((fit - kl).sum(), (mean, log_std))
    q = model(x)
    torch.testing.assert_close(q.mean, mean + 0.05 * by_mean)
    torch.testing.assert_close(q.std.log(), log_std + 0.05 * by_log_std)


def test_momentum():
    """With the same gradient twice, momentum mu moves the second step by (1 + mu) as much."""
    x = images(1)
    first, second = (
        make(steps=s, momentum=0.5, learning_rate=1e-7)(x).mean - make(gpvae.VAE)(x).mean
        for s in (1, 2)
    )
    noise_free = make(steps=2, momentum=0.0, learning_rate=1e-7)(x).mean - make(gpvae.VAE)(x).mean
    torch.testing.assert_close(second, noise_free + 0.5 * first, rtol=1e-4, atol=0)


# Gradients


@pytest.mark.parametrize("output", ["gaussian", "bernoulli"])
@pytest.mark.parametrize("clip", [0.0, 0.7])
def test_gradient_is_that_of_the_whole_unrolled_objective(output, clip):
    model, x = make(output=output, clip=clip), images()
    if clip:  # which is active
        q = make(output=output, steps=1, clip=0.0, learning_rate=1.0)(x)
        assert ((q.mean - make(gpvae.VAE, output)(x).mean).norm(dim=-1) > clip).any()
    loss(model, x).backward()
    assert_gradients(model, x)


def test_detach_keeps_the_value_and_changes_the_gradient():
    x, grads = images(), []
    for detach in (False, True):
        model = make(detach=detach)
        value = loss(model, x)
        value.backward()
        grads.append((value.item(), model.encoder.mean_head.weight.grad))
    assert grads[0][0] == grads[1][0]
    assert not torch.allclose(grads[0][1], grads[1][1], rtol=1e-2)


@pytest.mark.parametrize("detach", [False, True])
def test_every_parameter_receives_a_gradient(detach):
    model = make(detach=detach)
    loss(model, images()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_clipping_has_a_finite_gradient_at_zero():
    g = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    clipped(g, 1.0).sum().backward()
    assert torch.equal(g.grad, torch.ones(2, 3).double())


# Direction


@pytest.mark.parametrize("output", ["gaussian", "bernoulli"])
def test_steps_raise_the_bound_of_every_image(output):
    x, bounds = images(20), []
    for steps in (0, 1, 2, 4, 8):
        model = make(output=output, steps=steps, learning_rate=0.01, samples=50)
        with torch.no_grad():
            bounds.append(measured(model.generative, x, model(x), 5000, seed=9).value)
    rises = torch.stack(bounds).diff(dim=0)
    assert (rises > 0).all()
    assert (rises.sum(0) > 0.005).all()


# Independence of images


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_an_image_does_not_depend_on_its_batch(clip):
    model, x = make(clip=clip), images(12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        q = model(x)
        for index in (order, slice(4, 5), slice(3, 9)):
            other = model(x[index])
            torch.testing.assert_close(other.mean, q.mean[index], rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(other.std, q.std[index], rtol=1e-12, atol=1e-14)


def test_clip_bounds_the_move_of_each_image_alone():
    model, free, vae = make(steps=1, clip=0.3), make(steps=1), make(gpvae.VAE)
    x = images(10)
    x[0] *= 100  # a huge gradient, which must not shrink the steps of others
    moves = [(m(x).mean - vae(x).mean).norm(dim=-1) / 0.05 for m in (model, free)]
    assert moves[0].max() <= 0.3 + 1e-9
    small = moves[1] < 0.3
    torch.testing.assert_close(moves[0][small], moves[1][small])
    torch.testing.assert_close(moves[0][~small], torch.full_like(moves[0][~small], 0.3))
    moves = [(m(x).std.log() - vae(x).std.log()).norm(dim=-1) / 0.05 for m in (model, free)]
    assert moves[0].max() <= 0.3 + 1e-9 < moves[1].max()  # mean and deviation are clipped apart


def test_two_steps_are_the_formula_with_noise_of_their_own():
    """v <- momentum v + gradient, then mean and log std move by the step size times v."""
    model, x = make(), images(3)
    options = SAVAEConfig(steps=2, learning_rate=0.1, momentum=0.7, clip=0.0)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 4, 3, 2, generator=generator, dtype=torch.float64)
    start = DiagonalGaussian(torch.full((3, 2), 0.3).double(), torch.full((3, 2), 0.5).double())
    found, failed = refine(model.generative, x, start, noise, options)
    state = [start.mean, start.std.log()]
    velocity = [torch.zeros(3, 2).double()] * 2
    for e in noise:
        mean, log_std = (each.clone().requires_grad_() for each in state)
        log_lik = model.generative.log_likelihood(x, mean + log_std.exp() * e).mean(0)
        kl = 0.5 * (mean**2 + (2 * log_std).exp() - 2 * log_std - 1).sum(-1)
        ascent = torch.autograd.grad((log_lik - kl).sum(), (mean, log_std))
        velocity = [0.7 * v + g for v, g in zip(velocity, ascent, strict=True)]
        state = [s + 0.1 * v for s, v in zip(state, velocity, strict=True)]
    torch.testing.assert_close(found.mean.detach(), state[0])
    torch.testing.assert_close(found.std.detach(), state[1].exp())
    assert (failed == -1).all()


def test_noise_is_fixed_at_evaluation_and_fresh_in_training():
    model, x = make(), images()
    assert torch.equal(model(x).mean, model(x).mean)
    generator = torch.Generator().manual_seed(0)
    first, second = (model.bound_terms(x, 1, generator)[1] for _ in range(2))
    assert not torch.equal(first, second)
    again = model.bound_terms(x, 1, torch.Generator().manual_seed(0))[1]
    assert torch.equal(again, first)
    assert torch.equal(model(x).mean, make()(x).mean)  # training left no trace


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_without_gradients_gives_the_same_posterior(context):
    model, x = make(), images()
    expected = model(x)
    with context():
        q = model(x)
    assert not q.mean.requires_grad
    torch.testing.assert_close(q.mean, expected.mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(q.std, expected.std, rtol=1e-14, atol=0)


# Divergence


def test_divergence_in_training_is_named():
    model = make(learning_rate=1e8)
    with pytest.raises(TrainingError, match=r"SA-VAE's inner loop.*learning_rate \(now 1e\+08\)"):
        loss(model, images())


def test_divergence_at_evaluation_falls_back_to_the_encoder_and_is_counted():
    model, x = make(), images()
    with torch.no_grad():
        expected, start = model(x), make(gpvae.VAE)(x)
    broken = SAVAEConfig(steps=3, learning_rate=1e8, clip=0.0)
    model.encoder.options = broken
    with torch.no_grad():
        q = model(x)
    assert model.encoder.fallbacks == len(x)
    assert torch.equal(q.mean, start.mean)
    assert torch.equal(q.std, start.std)
    assert not torch.equal(expected.mean, start.mean)


def test_one_diverging_image_leaves_the_others_alone():
    model, x = make(steps=2), images(4)
    x[1] *= 1e300  # finite features, but a gradient beyond the largest number
    with torch.no_grad():
        model.encoder.trunk.layers[1].weight.zero_()
        q, others = model(x), model(x[[0, 2, 3]])
    assert model.encoder.fallbacks == 1
    assert torch.isfinite(q.mean).all()
    torch.testing.assert_close(q.mean[[0, 2, 3]], others.mean)


def test_an_encoder_that_is_not_finite_is_told_from_diverging_steps():
    model = make()
    with torch.no_grad():
        model.encoder.mean_head.bias[0] = math.nan
    with pytest.raises(TrainingError, match="encoder's own output is not finite for 6 of 6"):
        loss(model, images())


@pytest.mark.parametrize(
    "options",
    [
        {"steps": -1},
        {"steps": 10**6},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"momentum": 1.0},
        {"clip": -1.0},
        {"samples": 0},
    ],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ConfigError, match=f"model.savae.{next(iter(options))}"):
        SAVAEConfig(**options)


# As a model


def test_importance_weighting_meets_the_known_log_p(linear_gaussian):
    known = linear_gaussian(SAVAE, orthogonal=False, std=1.5, **{"model.savae.steps": 8})
    estimate = log_likelihood(known.model, known.x, 20_000)
    z = (estimate.value - known.log_prob(known.x)) / estimate.stderr
    assert estimate.stderr.max() < 0.1
    assert z.abs().max() < 4.5, z


def test_training_resumes_onto_the_same_bits(tiny_config, blobs, tmp_path):
    config = tiny_config.override(**{"model.encoder": "savae", "training.epochs": 4})
    whole = train(config, blobs)

    class Killed(Exception):
        pass

    model = build_model(config, blobs.shape)
    calls = 0
    original = model.loss_terms

    def loss_terms(*args):
        nonlocal calls
        calls += 1
        if calls > 7:
            raise Killed
        return original(*args)

    model.loss_terms = loss_terms
    with pytest.raises(Killed):
        train(config, blobs, tmp_path, model)
    resumed = train(config, blobs, tmp_path)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
