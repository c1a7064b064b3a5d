"""Mixture encoders, joint and recursive, against identities, quadrature and known answers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from linear_gaussian import assert_meets_evidence, exact_evidence, images, linear_gaussian
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import gpvae
from gpvae.config import MixtureConfig, ModelConfig, RunConfig
from gpvae.errors import ConfigError
from gpvae.mixtures import (
    GaussianMixture,
    MixtureVAE,
    RecursiveMixtureVAE,
    mixture_bound,
)
from gpvae.posteriors import DiagonalGaussian
from gpvae.training import MODELS, load_model, train
from gpvae.vae import VAE

SHAPE = (1, 4, 4)
MIXTURES = [MixtureVAE, RecursiveMixtureVAE]
SPACING = 0.06


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=gen(seed), dtype=torch.float64)


def pixels(count: int = 5) -> Tensor:
    return torch.rand((count, *SHAPE), generator=gen(1), dtype=torch.float64)


def build(kind: type[VAE], components: int = 3, active: int | None = None, **options) -> VAE:
    mixture = MixtureConfig(components=components, **options)
    config = ModelConfig(latent_dim=3, hidden=(8,), activation="tanh", mixture=mixture)
    torch.manual_seed(0)
    model = kind(SHAPE, config).double()
    if active:
        model.encoder.active = active
    return model


def mixture(batch: int = 4, components: int = 3, latent_dim: int = 2) -> GaussianMixture:
    """Well separated components with unequal weights."""
    shape = (batch, components, latent_dim)
    log_weights = randn(batch, components, seed=7).log_softmax(-1)
    return GaussianMixture(log_weights, 1.5 * randn(*shape), (0.4 * randn(*shape, seed=2)).exp())


def reference(q: GaussianMixture) -> MixtureSameFamily:
    parts = Independent(Normal(q.means, q.stds), 1)
    return MixtureSameFamily(Categorical(logits=q.log_weights), parts)


def plane() -> Tensor:
    """A grid over [-12, 12]^2 as [R, 1, 2]; a sum over it times SPACING^2 is an integral."""
    axis = torch.arange(-12, 12, SPACING, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis)[:, None]


def integral(q: GaussianMixture, f: Tensor, z: Tensor) -> Tensor:
    """E_q f, [B], for f [R, B] on the grid z."""
    return (q.log_prob(z).exp() * f).sum(0) * SPACING**2


def within_error(draws: Tensor, expected: Tensor, bound: float = 4.5) -> None:
    """The mean over the first axis agrees with the expected value within its standard error."""
    stderr = draws.std(0) / math.sqrt(len(draws))
    assert float(((draws.mean(0) - expected).abs() / stderr).max()) < bound


# The mixture


def test_mixture_density_against_torch() -> None:
    q, z = mixture(), 2 * randn(6, 4, 2, seed=3)
    torch.testing.assert_close(q.log_prob(z), reference(q).log_prob(z), rtol=0, atol=1e-12)
    torch.testing.assert_close(q.mean, reference(q).mean)
    torch.testing.assert_close(q.std, reference(q).stddev)


def test_mixture_density_integrates_to_one() -> None:
    z = plane()
    total = integral(mixture(), torch.ones_like(z[..., 0]), z)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)


def test_samples_follow_the_mixture() -> None:
    q = mixture()
    z = q.rsample((200, 100), gen())
    assert z.shape == (200, 100, 4, 2)
    z = z.flatten(0, 1)
    within_error(z, q.mean)
    within_error((z - q.mean) ** 2, q.std**2)
    # The third moment tells the mixture from its Gaussian stand-in.
    exact = (q.log_weights.exp()[..., None] * _third(q.means - q.mean[:, None], q.stds)).sum(-2)
    within_error((z - q.mean) ** 3, exact)
    # Right shares, checked by the responsibilities of far apart components.
    far = GaussianMixture(q.log_weights, 100 * q.means, q.stds)
    nearest = far.component_log_prob(far.rsample((4000,), gen())).argmax(-1)
    shares = torch.stack([(nearest == m).double() for m in range(3)], -1)
    within_error(shares, q.log_weights.exp())


def _third(mean: Tensor, std: Tensor) -> Tensor:
    """E z^3 of N(mean, std^2)."""
    return mean**3 + 3 * mean * std**2


def test_samples_are_reparameterised_within_a_component() -> None:
    q = mixture()
    q.means.requires_grad_()
    q.rsample((50,), gen()).sum().backward()
    assert bool((q.means.grad > 0).all())


def test_stratified_samples_come_from_every_component() -> None:
    q = mixture()
    z = q.stratified((20_000,), gen())
    assert z.shape == (20_000, 3, 4, 2)
    within_error(z, q.means.movedim(1, 0))
    within_error((z - q.means.movedim(1, 0)) ** 2, q.stds.movedim(1, 0) ** 2)


def test_equal_components_are_one_gaussian() -> None:
    one = DiagonalGaussian(randn(4, 2), randn(4, 2, seed=2).exp())
    means, stds = (p[:, None].expand(-1, 3, -1) for p in (one.mean, one.std))
    q = GaussianMixture(mixture().log_weights, means, stds)
    z = randn(5, 4, 2, seed=3)
    torch.testing.assert_close(q.log_prob(z), one.log_prob(z), rtol=0, atol=1e-12)
    torch.testing.assert_close(q.rsample((5,), gen()), one.rsample((5,), gen()))
    model = linear_gaussian(VAE)
    _, kl = mixture_bound(model.generative, images(4), q, 6, gen())
    torch.testing.assert_close(kl, one.kl().expand(6, -1), rtol=0, atol=1e-12)


def test_extreme_weights_stay_finite() -> None:
    logits = torch.tensor([[0.0, -1e4, -200.0]], dtype=torch.float64).requires_grad_()
    means, stds = randn(1, 3, 2), randn(1, 3, 2, seed=2).exp()
    q = GaussianMixture(logits.log_softmax(-1), means, stds)
    generative = linear_gaussian(VAE).generative
    log_lik, kl = mixture_bound(generative, images(1), q, 2, gen())
    (log_lik - kl).sum().backward()
    assert bool(torch.isfinite(logits.grad).all() and torch.isfinite(log_lik - kl).all())


def test_an_image_does_not_depend_on_its_batch() -> None:
    model, x, z = build(MixtureVAE), pixels(6), randn(7, 6, 3)
    whole, order = model(x), torch.tensor([4, 0, 5])
    for part in (model(x[order]), whole[order]):
        for quantity in ("mean", "std", "log_weights", "means", "stds"):
            torch.testing.assert_close(
                getattr(part, quantity), getattr(whole, quantity)[order], rtol=0, atol=1e-13
            )
        torch.testing.assert_close(part.log_prob(z[:, order]), whole.log_prob(z)[:, order])


# The bound


def bound_by_quadrature(model: VAE, x: Tensor, q: GaussianMixture) -> Tensor:
    """ELBO(x) = E_q [log p(x, z) - log q(z)] on a fine grid, [B]."""
    z = plane().expand(-1, len(x), -1)
    return integral(q, model.generative.log_joint(x, z) - q.log_prob(z), z)


def test_stratified_bound_is_unbiased() -> None:
    model, x, q = linear_gaussian(VAE), images(4), mixture()
    with torch.no_grad():
        exact = bound_by_quadrature(model, x, q)
        log_lik, kl = mixture_bound(model.generative, x, q, 20_000, gen())
        z = q.rsample((20_000,), gen())
        naive = model.generative.log_joint(x, z) - q.log_prob(z)
    within_error(log_lik - kl, exact)
    within_error(naive, exact)
    assert bool(((log_lik - kl).std(0) < 0.8 * naive.std(0)).all())
    assert bool((exact < exact_evidence(model, x)).all())


def test_stratified_gradient_is_unbiased_in_weights_means_and_stds() -> None:
    model, x, q = linear_gaussian(VAE), images(1), mixture(batch=1)
    logits, means, log_stds = (
        p.detach().clone().requires_grad_() for p in (q.log_weights, q.means, q.stds.log())
    )
    parameters = [logits, means, log_stds]

    def posterior() -> GaussianMixture:
        return GaussianMixture(logits.log_softmax(-1), means, log_stds.exp())

    exact = torch.autograd.grad(bound_by_quadrature(model, x, posterior()).sum(), parameters)
    draws = []
    for seed in range(300):
        log_lik, kl = mixture_bound(model.generative, x, posterior(), 20, gen(seed))
        gradient = torch.autograd.grad((log_lik - kl).mean(), parameters)
        draws.append(torch.cat([g.flatten() for g in gradient]))
    within_error(torch.stack(draws), torch.cat([g.flatten() for g in exact]))
    assert all(float(g.abs().max()) > 0.05 for g in exact)


@pytest.mark.parametrize("kind", MIXTURES)
def test_one_component_is_the_vae(kind: type[VAE]) -> None:
    vae, ours, x = build(VAE), build(kind, components=1), pixels()
    own, shared = ours.state_dict(), vae.state_dict()
    own.pop("_extra_state", None)  # the recursive mixture's stage
    assert set(own) == set(shared) and all(torch.equal(own[k], shared[k]) for k in own)
    expected = vae.loss_terms(x, 10, gen(4))
    terms = ours.loss_terms(x, 10, gen(4))
    assert all(torch.equal(terms[name], expected[name]) for name in expected)
    assert float(terms.get("divergence", torch.zeros(()))) == 0
    for a, b in zip(ours.bound_terms(x, 3, gen()), vae.bound_terms(x, 3, gen()), strict=True):
        assert torch.equal(a, b)


def test_every_parameter_receives_gradient() -> None:
    model = build(MixtureVAE)
    sum(model.loss_terms(pixels(), 10, gen()).values()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and float(p.grad.abs().max()) > 0, name


@pytest.mark.parametrize("kind", [VAE, MixtureVAE])
def test_importance_weighting_meets_the_known_evidence(kind: type[VAE]) -> None:
    # The plain Gaussian cannot follow the correlated posterior: its weights vary more.
    model = linear_gaussian(kind, sigma=0.8 if kind is MixtureVAE else 1.2)
    assert_meets_evidence(model)


@pytest.mark.parametrize("name", ["me", "rme"])
@pytest.mark.parametrize("count", [0, -2, 101])
def test_impossible_component_counts_are_refused(name: str, count: int) -> None:
    with pytest.raises(ConfigError, match=rf"model\.mixture\.components is {count}"):
        RunConfig().override(**{"model.encoder": name, "model.mixture.components": count})


def test_other_bad_options_are_refused() -> None:
    for key, value in (("divergence_bound", -1.0), ("first_share", 1.5), ("fit_share", math.nan)):
        with pytest.raises(ConfigError, match=f"model.mixture.{key}"):
            MixtureConfig(**{key: value})
    with pytest.raises(ConfigError, match="Did you mean 'weights'"):
        MixtureConfig(refit="weight")


# The recursive mixture


def test_recursive_mixture_costs_what_the_joint_one_costs() -> None:
    joint, recursive = build(MixtureVAE), build(RecursiveMixtureVAE, active=3)
    x = pixels()
    recursive.load_state_dict(joint.state_dict(), strict=False)
    assert torch.equal(joint(x).means, recursive(x).means)
    assert torch.equal(joint(x).log_weights, recursive(x).log_weights)


def test_a_new_component_follows_the_functional_gradient() -> None:
    """Without a bound the criterion is the slope of ELBO((1 - e) Q + e q) at e = 0, up to E_Q."""
    model = linear_gaussian(
        RecursiveMixtureVAE, mixture=MixtureConfig(components=3, divergence_bound=1e6)
    )
    model.encoder.active, model.fitting = 2, True
    x = images(1)
    with torch.no_grad():
        features = model.encoder.trunk(x)
        q, Q = model.encoder.component(features, 2), model.encoder.mixture(features)
        copies = x.expand(100, -1, -1, -1)
        draws = [model.loss_terms(copies, 1, gen(seed)) for seed in range(100)]
        criterion = -torch.stack([sum(terms.values()) for terms in draws])

        def blend(e: float) -> GaussianMixture:
            means, stds = (
                torch.cat([a, b[:, None]], 1) for a, b in ((Q.means, q.mean), (Q.stds, q.std))
            )
            last = torch.full((1, 1), e, dtype=x.dtype).log()
            return GaussianMixture(
                torch.cat([Q.log_weights + math.log1p(-e), last], 1), means, stds
            )

        slope = (
            bound_by_quadrature(model, x, blend(1e-5)) - bound_by_quadrature(model, x, Q)
        ) / 1e-5
        within_error(criterion[:, None], slope + bound_by_quadrature(model, x, Q))


@pytest.mark.parametrize("bound", [0.0, 0.3])
def test_divergence_counts_up_to_its_bound(bound: float) -> None:
    model = build(RecursiveMixtureVAE, active=1, divergence_bound=bound)
    model.fitting = True
    with torch.no_grad():
        model.encoder.heads(1)[0].bias.add_(100)  # far from the first component
    terms = model.loss_terms(pixels(), 10, gen())
    assert terms["divergence"].item() == pytest.approx(-bound, abs=1e-12)
    q = model.encoder.component(model.encoder.trunk(pixels()), 1)
    assert torch.equal(terms["kl"], q.kl().mean())


def test_each_sample_alone_is_held_to_the_bound_of_the_divergence() -> None:
    """E min(log q - log Q, C), not min(E (log q - log Q), C): C is between the samples here."""
    free = build(RecursiveMixtureVAE, active=2, divergence_bound=1e6)
    x = pixels(40)
    with torch.no_grad():
        features = free.encoder.trunk(x)
        q, mixture = free.encoder.component(features, 2), free.encoder.mixture(features)
        z, log_q = q.rsample_with_log_prob((1,), gen(4))
        each = log_q - mixture.log_prob(z)
    bound = float(each.median())
    model = build(RecursiveMixtureVAE, active=2, divergence_bound=bound)
    model.fitting = True
    found = model.loss_terms(x, 10, gen(4))["divergence"]
    torch.testing.assert_close(found, -each.clamp_max(bound).mean())
    assert each.clamp_max(bound).mean() < each.mean().clamp_max(bound) - 0.01


def test_fitting_moves_the_new_component_only() -> None:
    model = build(RecursiveMixtureVAE, active=2)
    model.fitting = True
    sum(model.loss_terms(pixels(), 10, gen()).values()).backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert moved == {n for n, _ in model.named_parameters() if n.startswith("encoder.more_heads.1")}
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("refit", ["all", "weights"])
def test_what_a_refit_moves(refit: str) -> None:
    model = build(RecursiveMixtureVAE, active=3, refit=refit)
    model.stage = 3
    sum(model.loss_terms(pixels(), 10, gen()).values()).backward()
    for name, p in model.named_parameters():
        expected = refit == "all" or name.startswith(("generative", "encoder.weight_head"))
        assert (p.grad is not None) is expected, name
        assert p.grad is None or float(p.grad.abs().max()) > 0
        assert p.requires_grad


def test_phases_cover_the_epochs_in_order() -> None:
    model = build(RecursiveMixtureVAE, first_share=0.5, fit_share=0.4)
    assert model.phase_starts(100) == [0, 50, 60, 75, 85]
    assert model.phase_starts(5) == [0, 1, 2, 3, 4]
    assert build(RecursiveMixtureVAE, components=1).phase_starts(1) == [0]
    extreme = build(RecursiveMixtureVAE, first_share=1.0, fit_share=1.0)
    assert extreme.phase_starts(9) == [0, 5, 6, 7, 8]
    with pytest.raises(ConfigError, match=r"training\.epochs is 4; .* at least 5 epochs"):
        model.phase_starts(4)


def test_a_component_that_did_not_help_is_dropped() -> None:
    model = build(RecursiveMixtureVAE)
    starts = model.phase_starts(10)
    best = {name: value.clone() for name, value in model.state_dict().items()}
    model.start_epoch(starts[1], 10, best)
    assert (model.stage, model.encoder.active, model.fitting) == (2, 1, True)
    features = model.encoder.trunk(pixels())  # the new component starts as a copy
    for m in (1, 2):
        same = torch.equal(model.encoder.component(features, m).mean, model(pixels()).mean)
        assert same is (m == 1)
    weights = model.encoder.weight_head(features)
    assert torch.equal(weights[:, 1], weights[:, 0])
    model.start_epoch(starts[2], 10, best)
    assert (model.stage, model.encoder.active, model.fitting) == (2, 2, False)
    with torch.no_grad():
        model.encoder.heads(1)[0].weight.fill_(9)
    shows = model.start_epoch(starts[3], 10, best)  # the best weights are still stage 1's
    assert shows == {"stage": 3, "components": 1}
    assert not bool((model.encoder.heads(1)[0].weight == 9).any())


def tiny_run() -> tuple[RunConfig, gpvae.data.Dataset]:
    config = RunConfig().override(
        **{
            "data.train_size": 48,
            "model.encoder": "rme",
            "model.hidden": (6,),
            "model.latent_dim": 2,
            "model.mixture.first_share": 0.3,
            "training.epochs": 13,
            "training.batch_size": 16,
            "training.evaluate_every": 2,
            "training.learning_rate": 0.01,
            "training.device": "cpu",
        }
    )
    data = gpvae.load_dataset("digits", train_size=48, valid_size=16, test_size=16)
    return config, data


def test_stages_show_in_the_history_and_the_state() -> None:
    config, data = tiny_run()
    trained = train(config, data)
    starts = trained.model.phase_starts(config.training.epochs)
    assert starts == [0, 4, 5, 8, 10]
    rows = {int(row["epoch"]): row for row in trained.history}
    assert set(starts[1:]) <= set(rows)  # each phase ends with a validation
    assert [rows[e]["stage"] for e in (4, 5, 8, 10, 13)] == [1, 2, 2, 3, 3]
    assert [rows[e]["divergence"] == 0 for e in (4, 5, 8, 10, 13)] == [
        True,
        False,
        True,
        False,
        True,
    ]
    before, after = rows[starts[2]], rows[starts[2] + 1]
    assert (before["components"], after["components"]) == (1, 2)
    best = trained.history[[r["epoch"] for r in trained.history].index(trained.best_epoch)]
    assert trained.model.encoder.active == best["components"]


def test_patience_counts_in_the_last_phase_only() -> None:
    config, data = tiny_run()
    config = config.override(**{"training.patience": 2, "training.learning_rate": 1e-12})
    trained = train(config, data)  # the bound stands still: a plain VAE would stop early
    assert trained.history[-1]["stage"] == 3
    assert trained.history[-1]["epoch"] >= 12  # the last refit starts after 10
    plain = train(config.override(**{"model.encoder": "vae"}), data)
    assert plain.history[-1]["epoch"] == 4


@pytest.mark.parametrize("killed", [3, 4, 5, 7, 8, 9, 12])
def test_a_killed_run_resumes_to_the_same_bits(
    killed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, data = tiny_run()
    whole = train(config, data, tmp_path / "whole")
    start_epoch = RecursiveMixtureVAE.start_epoch

    def dies(model: RecursiveMixtureVAE, epoch: int, *rest: object) -> dict[str, float]:
        if epoch == killed:
            raise KeyboardInterrupt
        return start_epoch(model, epoch, *rest)

    monkeypatch.setattr(RecursiveMixtureVAE, "start_epoch", dies)
    with pytest.raises(KeyboardInterrupt):
        train(config, data, tmp_path / "killed")
    monkeypatch.undo()
    resumed = train(config, data, tmp_path / "killed")
    saved = [
        load_model(tmp_path / name / "checkpoint.pt", data.shape)[0] for name in ("whole", "killed")
    ]
    expected = whole.model.state_dict()
    for model in (resumed.model, *saved):
        state = model.state_dict()
        assert all(torch.equal(state[name], expected[name]) for name in expected)
    for a, b in zip(whole.history, resumed.history, strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}


def test_models_are_listed() -> None:
    assert MODELS["me"] is MixtureVAE and MODELS["rme"] is RecursiveMixtureVAE
