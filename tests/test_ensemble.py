"""Seeds trained together: each member is the run that is trained alone, in every respect."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import make_dataset

import gpvae
from gpvae import ensemble, special
from gpvae.checkpoint import load_checkpoint
from gpvae.config import ModelConfig
from gpvae.ensemble import Ensemble, batchable, seed_groups, train_seeds
from gpvae.errors import CheckpointError, ConfigError, DataError, TrainingError
from gpvae.seed_step import SeedStep, Stacked, clip
from gpvae.step import Step
from gpvae.training import MODELS, build_model, train

SEEDS = (0, 1, 5)
SHAPE = (1, 4, 4)
CASES = {
    "vae": {},
    "svi": {"model.encoder": "svi"},
    "gpvae": {"model.encoder": "gpvae"},
    "gpvae-low-rank": {"model.encoder": "gpvae", "model.gp.covariance": "low-rank"},
    "gpvae-full": {"model.encoder": "gpvae", "model.gp.covariance": "full"},
    "iaf": {"model.encoder": "iaf", "model.flow.hidden": 6, "model.flow.context": 4},
    "hf": {"model.encoder": "hf"},
    "me": {"model.encoder": "me"},
}
MORE = {
    "conv": {"model.network": "conv", "model.channels": (3, 4)},
    "importance": {"model.importance_samples": 3},
    "marginal": {"model.encoder": "gpvae", "model.gp.bound": "marginal", "model.gp.residual": True},
    "dequantised": {"model.dequantise": True, "model.levels": 17},
    "logistic": {"model.output": "logistic", "model.levels": 17},
    "pixels": {"model.output": "pixel-gaussian"},
}
EVERY = {
    **{
        f"{name}-{output}": {**options, "model.output": output}
        for name, options in CASES.items()
        for output in ("bernoulli", "gaussian")
    },
    **MORE,
}
every = pytest.mark.parametrize("options", EVERY.values(), ids=EVERY.keys())


def weights(model):
    return torch.cat([p.flatten() for p in model.state_dict().values()])


def seeds(config, chosen=SEEDS):
    return [config.override(seed=seed) for seed in chosen]


def deviation(got, wanted):
    """Largest difference in units of the largest number."""
    return float((got - wanted).abs().max() / wanted.abs().max())


def without_times(history):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


def assert_same_runs(got, wanted, tolerance):
    """The results of two ways to train the same runs, up to rounding."""
    for ours, theirs in zip(got, wanted, strict=True):
        assert deviation(weights(ours.model), weights(theirs.model)) < tolerance
        assert ours.best_epoch == theirs.best_epoch and not ours.model.training
        assert len(ours.history) == len(theirs.history)
        for a, b in zip(without_times(ours.history), without_times(theirs.history), strict=True):
            assert a == pytest.approx(b, rel=tolerance, abs=tolerance) and list(a) == list(b)


@pytest.fixture
def scheduled(tiny_config):
    """Everything that a schedule can do, and steps that are clipped."""
    return tiny_config.override(
        **{
            "training.schedule": "cosine",
            "training.kl_warmup": 3,
            "training.average": 0.9,
            "training.learning_rate": 2e-3,
            "training.clip_norm": 5.0,
        }
    )


@every
def test_each_member_is_the_lone_run(scheduled, blobs, options):
    """In float32, where products that are summed in another order differ in the last bits."""
    configs = seeds(scheduled.override(**options))
    assert_same_runs(train_seeds(configs, blobs), [train(c, blobs) for c in configs], 1e-5)


@pytest.mark.parametrize("encoder", ["vae", "gpvae"])
def test_each_member_is_the_lone_run_with_default_training(tiny_config, blobs, encoder):
    configs = seeds(tiny_config.override(**{"model.encoder": encoder}))
    assert_same_runs(train_seeds(configs, blobs), [train(c, blobs) for c in configs], 1e-5)


def test_images_that_stay_on_disk(scheduled, blobs):
    configs = seeds(scheduled)
    streamed = train_seeds(configs, make_dataset(stream_above=0))
    assert_same_runs(streamed, train_seeds(configs, blobs), 1e-12)


def lone_steps(config, batches):
    """Weights, averages and losses of a model in float64 after steps on these batches."""
    model = build_model(config, SHAPE).double().train()
    averages = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)
    generator = torch.Generator().manual_seed(config.seed)
    step = Step(model, optimizer, config, 17, 50, generator, averages)
    step.start_epoch(1, 6, new_phase=True)
    losses = [step(x) for x in batches]
    return [*(p.detach() for p in model.parameters()), *averages, torch.stack(losses)]


def member_steps(configs, batches):
    """The same for all members at once, each with its own batches."""
    stacked = Stacked([build_model(c, SHAPE).double().train() for c in configs])
    parameters = list(stacked.parameters.values())
    averages = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.Adam(parameters, lr=1e-2, fused=True)
    generators = [torch.Generator().manual_seed(c.seed) for c in configs]
    step = SeedStep(stacked, optimizer, configs[0], 17, 50, generators, averages)
    step.start_epoch(1, 6, new_phase=True)
    losses = [step(torch.stack(each)) for each in zip(*batches, strict=True)]
    whole = [*(p.detach() for p in parameters), *averages, torch.stack(losses, 1)]
    return [[value[k] for value in whole] for k in range(len(configs))]


@every
def test_steps_in_float64_agree_to_machine_precision(scheduled, options):
    special._TABLES.clear()  # they are made anew, and must be of use outside of vmap afterwards
    configs = seeds(scheduled.override(**options))
    generator = torch.Generator().manual_seed(3)
    batches = [
        [torch.rand(b, *SHAPE, generator=generator, dtype=torch.float64) for b in (7, 7, 4) * 4]
        for _ in configs
    ]
    for config, own, member in zip(configs, batches, member_steps(configs, batches), strict=True):
        for ours, theirs in zip(member, lone_steps(config, own), strict=True):
            assert deviation(ours, theirs) < 1e-12 if theirs.any() else not ours.any()


def test_bfloat16_agrees_as_far_as_it_can(scheduled, blobs):
    configs = seeds(scheduled.override(**{"model.precision": "bfloat16"}))
    assert_same_runs(train_seeds(configs, blobs), [train(c, blobs) for c in configs], 0.02)


@pytest.mark.parametrize("largest", [1e-3, 1.0, 1e3])
def test_gradients_are_clipped_member_by_member(largest):
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (5,), ()]
    gradients = [torch.randn(2, *shape, generator=generator) for shape in shapes]
    gradients = [g * torch.tensor([1.0, 50.0]).view(2, *[1] * (g.ndim - 1)) for g in gradients]
    ours = clip(gradients, largest)
    for k in range(2):
        parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g[k].clone()
        torch.nn.utils.clip_grad_norm_(parameters, largest)
        for p, g in zip(parameters, ours, strict=True):
            torch.testing.assert_close(g[k], p.grad)


def test_clipped_gradients_lie_in_memory_like_parameters():
    """Fused Adam on the CPU takes others in a wrong order, silently."""
    transposed = torch.arange(12.0).view(2, 3, 2).mT
    (clipped,) = clip([transposed], 1e9)
    assert clipped.is_contiguous() and torch.equal(clipped, transposed)


@pytest.fixture
def impatient(tiny_config):
    """Members that end at epochs of their own, some between two validations."""
    return tiny_config.override(
        **{
            "training.epochs": 40,
            "training.patience": 5,
            "training.evaluate_every": 2,
            "training.learning_rate": 0.05,
        }
    )


def test_members_end_at_epochs_of_their_own(impatient, blobs):
    configs = seeds(impatient)
    together, alone = train_seeds(configs, blobs), [train(c, blobs) for c in configs]
    assert len({len(r.history) for r in alone}) == len(SEEDS)
    assert_same_runs(together, alone, 1e-4)


class Cut(Exception):
    pass


def cut_at(monkeypatch, epoch):
    original = Ensemble.save

    def save_then_die(self, folder):
        original(self, folder)
        if self.epoch == epoch:
            raise Cut

    monkeypatch.setattr(Ensemble, "save", save_then_die)


@pytest.mark.parametrize("case", ["short", "early", "late"])
def test_resumed_runs_end_with_the_same_bits(
    scheduled, impatient, blobs, tmp_path, monkeypatch, case
):
    config = scheduled.override(**{"model.encoder": "gpvae"}) if case == "short" else impatient
    configs = seeds(config)
    whole = train_seeds(configs, blobs, tmp_path / "whole")
    ends = sorted(int(r.history[-1]["epoch"]) for r in whole)
    epoch = {"short": 2, "early": 4, "late": ends[0] + 2}[case]  # late: one has ended by then
    cut_at(monkeypatch, epoch)
    with pytest.raises(Cut):
        train_seeds(configs, blobs, tmp_path / "cut")
    monkeypatch.undo()
    ended = load_checkpoint(tmp_path / "cut/ensemble.pt", keys=())["ended"]
    assert any(ended) == (case == "late") and not all(ended)
    for a, b in zip(whole, train_seeds(configs, blobs, tmp_path / "cut"), strict=True):
        assert torch.equal(weights(a.model), weights(b.model))
        assert without_times(a.history) == without_times(b.history)
    files = [load_checkpoint(tmp_path / part / "ensemble.pt", keys=()) for part in ("whole", "cut")]
    for a, b in zip(*(file["ended"] for file in files), strict=True):
        assert torch.equal(a["generator"], b["generator"]) and a["epoch"] == b["epoch"]
        assert all(torch.equal(v, b["model"][name]) for name, v in a["model"].items())


def test_runs_that_have_ended_are_not_trained_again(scheduled, blobs, tmp_path, monkeypatch):
    first = train_seeds(seeds(scheduled), blobs, tmp_path)
    monkeypatch.setattr(gpvae.VAE, "loss_terms", None)  # would fail if called
    for a, b in zip(first, train_seeds(seeds(scheduled), blobs, tmp_path), strict=True):
        assert torch.equal(weights(a.model), weights(b.model)) and a.history == b.history


@pytest.mark.parametrize("options", [{}, {"model.encoder": "me", "training.average": 0.0}])
def test_ordinary_checkpoints_are_those_of_lone_runs(
    scheduled, blobs, tmp_path, monkeypatch, options
):
    configs = seeds(scheduled.override(**options))
    folders = [tmp_path / str(c.seed) for c in configs]
    together = train_seeds(configs, blobs, tmp_path, folders)
    for config, folder in zip(configs, folders, strict=True):
        train(config, blobs, folder / "alone")
        ours, theirs = (load_checkpoint(f / "checkpoint.pt") for f in (folder, folder / "alone"))
        assert ours.keys() == theirs.keys() and ours["config"] == theirs["config"]
        assert torch.equal(ours["generator"], theirs["generator"])  # all draws were the same
        assert ours["epoch"] == theirs["epoch"] and ours["best_epoch"] == theirs["best_epoch"]
        for key in ("model", "best_weights", "averages", "optimizer"):
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(gpvae.VAE, "loss_terms", None)
    for config, folder, result in zip(configs, folders, together, strict=True):
        again = train(config, blobs, folder)
        assert torch.equal(weights(again.model), weights(result.model))
        assert again.history == result.history


def test_a_checkpoint_of_another_run_is_not_overwritten(scheduled, blobs, tmp_path):
    folders = [tmp_path / str(seed) for seed in SEEDS]
    train(scheduled.override(seed=9), blobs, folders[1])
    with pytest.raises(CheckpointError, match="seed: 9 -> 1"):
        train_seeds(seeds(scheduled), blobs, tmp_path, folders)


def test_other_runs_are_refused(scheduled, blobs, tmp_path):
    with pytest.raises(ConfigError, match=r"model.latent_dim: 2 -> 3; training.epochs: 6 -> 7"):
        train_seeds(
            [scheduled, scheduled.override(**{"model.latent_dim": 3, "training.epochs": 7})], blobs
        )
    train_seeds(seeds(scheduled), blobs, tmp_path)
    with pytest.raises(CheckpointError, match=r"the seeds \[0, 1, 5\], not \[0, 1\]"):
        train_seeds(seeds(scheduled, (0, 1)), blobs, tmp_path)
    with pytest.raises(CheckpointError, match=r"training.epochs: 6 -> 9"):
        train_seeds(seeds(scheduled.override(**{"training.epochs": 9})), blobs, tmp_path)
    file = tmp_path / "ensemble.pt"
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(CheckpointError, match="damaged"):
        train_seeds(seeds(scheduled), blobs, tmp_path)


@pytest.mark.parametrize("encoder", ["savae", "vlae", "rme"])
def test_what_cannot_be_batched_is_trained_one_by_one(scheduled, blobs, tmp_path, encoder):
    configs = seeds(scheduled.override(**{"model.encoder": encoder}), (0, 1))
    lines, folders = [], [tmp_path / str(c.seed) for c in configs]
    results = train_seeds(configs, blobs, tmp_path, folders, lines.append)
    assert batchable(configs[0]) in lines[0] and "one after another" in lines[0]
    for config, folder, result in zip(configs, folders, results, strict=True):
        assert torch.equal(weights(result.model), weights(train(config, blobs, folder).model))


def test_every_encoder_is_batchable_or_says_why_not():
    runs = {name: gpvae.RunConfig(model=ModelConfig(encoder=name)) for name in MODELS}
    reasons = {name for name, run in runs.items() if batchable(run)}
    assert reasons == {"rme", "savae", "vlae"}


def test_one_run_or_none(scheduled, blobs):
    (result,) = train_seeds([scheduled], blobs)
    assert torch.equal(weights(result.model), weights(train(scheduled, blobs).model))
    assert train_seeds([], blobs) == []


def test_groups_of_seeds(scheduled):
    gp, rme = (scheduled.override(**{"model.encoder": name}) for name in ("gpvae", "rme"))
    a, b = seeds(scheduled, (0, 1)), seeds(gp, (3, 2))
    mixed = [a[0], *seeds(rme), b[0], a[1], scheduled.override(**{"model.latent_dim": 4}), b[1]]
    assert seed_groups([*mixed, a[0]]) == [a, b]


def poison(value, parameters):
    with torch.no_grad():
        for p in parameters:
            p.fill_(value)


def test_a_loss_that_is_not_finite_is_named(scheduled, blobs, tmp_path, monkeypatch):
    original = Ensemble.validate

    def validate(self, *args):
        original(self, *args)
        if self.epoch == 3:
            poison(math.nan, [p[1] for p in self.parameters])

    monkeypatch.setattr(Ensemble, "validate", validate)
    configs = seeds(scheduled)
    with pytest.raises(TrainingError) as caught:
        train_seeds(configs, blobs, tmp_path)
    text = str(caught.value)
    assert configs[1].name in text and configs[1].hash() in text and "-s1 " in text
    assert "'reconstruction'" in text and "epoch 4, step 1 of 3" in text
    assert load_checkpoint(tmp_path / "ensemble.pt", configs[0], ensemble.KEYS)["epoch"] == 3


def test_a_member_without_a_finite_validation_bound_is_named(scheduled, blobs, monkeypatch):
    bounds = itertools.cycle([1.0, math.nan, 2.0])
    monkeypatch.setattr(ensemble, "validation_bound", lambda *args: next(bounds))
    configs = seeds(scheduled)
    with pytest.raises(TrainingError, match=rf"{configs[1].name} .*none of \d validation bounds"):
        train_seeds(configs, blobs)


def test_members_that_have_ended_disturb_no_one(impatient, blobs, monkeypatch):
    configs = seeds(impatient)
    expected = train_seeds(configs, blobs)
    original = Ensemble.end

    def end(self):
        new = original(self)
        poison(math.nan, [p[k] for p in self.parameters for k in new])
        return new

    monkeypatch.setattr(Ensemble, "end", end)
    for a, b in zip(expected, train_seeds(configs, blobs), strict=True):
        assert torch.equal(weights(a.model), weights(b.model))


def test_progress_is_logged(scheduled, blobs, monkeypatch):
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(ensemble.time, "monotonic", lambda: float(next(clock)))
    lines = []
    results = train_seeds(seeds(scheduled), blobs, log=lines.append)
    assert lines[0].startswith("epoch 1/6: best validation ELBO")
    assert f"{results[2].best_valid_elbo:.2f} nats" in lines[-1]


def test_checkpoints_of_other_images_are_refused(scheduled, blobs, tmp_path, monkeypatch):
    configs = seeds(scheduled)
    folders = [str(tmp_path / str(c.seed)) for c in configs]
    train_seeds(configs, blobs, str(tmp_path), folders)
    others = gpvae.from_images(16 - blobs.train.pixels.numpy(), levels=17)
    for own in (None, folders):
        with pytest.raises(CheckpointError, match="other images"):
            train_seeds(configs, others, tmp_path, own)


def test_an_array_is_no_data_set(scheduled, blobs):
    with pytest.raises(DataError, match=r"are a ndarray.*gpvae.from_images"):
        train_seeds(seeds(scheduled), blobs.train.pixels.numpy())
