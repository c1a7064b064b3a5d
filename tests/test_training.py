"""The loop: determinism, resuming, selection, and what it does when something goes wrong."""

from __future__ import annotations

import math
import os
import pickle
from dataclasses import replace

import pytest
import torch

import gpvae
from gpvae import training
from gpvae.checkpoint import State, load_checkpoint, save_checkpoint
from gpvae.data import Images
from gpvae.errors import CheckpointError, ConfigError, DataError, StorageError, TrainingError
from gpvae.training import load_model, train

ENCODERS = sorted(training.MODELS)


def weights(trained):
    return torch.cat([p.flatten() for p in trained.model.state_dict().values()])


def without_times(history):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


@pytest.mark.parametrize("encoder", ["vae", "gpvae"])
@pytest.mark.parametrize("output", ["gaussian", "bernoulli"])
def test_same_seed_same_numbers(tiny_config, blobs, encoder, output):
    config = tiny_config.override(**{"model.encoder": encoder, "model.output": output})
    torch.manual_seed(1)
    first = train(config, blobs)
    torch.manual_seed(2)  # the global generator must not matter
    second = train(config, blobs)
    assert torch.equal(weights(first), weights(second))
    assert without_times(first.history) == without_times(second.history)
    other = train(config.override(seed=1), blobs)
    assert not torch.equal(weights(first), weights(other))


class Killed(Exception):
    pass


@pytest.mark.parametrize("encoder", ["vae", "gpvae"])
@pytest.mark.parametrize("epoch", [1, 3, 5])
def test_resumed_run_ends_with_the_same_bits(
    tiny_config, blobs, tmp_path, monkeypatch, encoder, epoch
):
    config = tiny_config.override(**{"model.encoder": encoder, "model.output": "bernoulli"})
    whole = train(config, blobs, tmp_path / "whole")
    original = State.save

    def save_then_die(self, folder, config):
        original(self, folder, config)
        if self.epoch == epoch:
            raise Killed

    monkeypatch.setattr(State, "save", save_then_die)
    with pytest.raises(Killed):
        train(config, blobs, tmp_path / "cut")
    monkeypatch.undo()
    resumed = train(config, blobs, tmp_path / "cut")
    assert torch.equal(weights(whole), weights(resumed))
    assert without_times(whole.history) == without_times(resumed.history)


def test_finished_run_is_not_trained_again(tiny_config, blobs, tmp_path, monkeypatch):
    first = train(tiny_config, blobs, tmp_path)
    monkeypatch.setattr(gpvae.VAE, "loss_terms", None)  # would fail if called
    again = train(tiny_config, blobs, tmp_path)
    assert torch.equal(weights(first), weights(again))


def test_a_run_whose_patience_ended_between_two_bounds_is_not_trained_again(
    tiny_config, blobs, tmp_path, monkeypatch
):
    changes = {"epochs": 400, "evaluate_every": 2, "patience": 5, "learning_rate": 0.05}
    config = tiny_config.override({f"training.{key}": value for key, value in changes.items()})
    first = train(config, blobs, tmp_path)
    last = load_checkpoint(tmp_path / "checkpoint.pt")["epoch"]
    assert last % 2 and last == first.best_epoch + 5 < 400
    monkeypatch.setattr(gpvae.VAE, "loss_terms", None)  # would fail if called
    again = train(config, blobs, tmp_path)
    assert torch.equal(weights(first), weights(again))
    assert first.history == again.history


def test_training_raises_the_bound_and_keeps_the_best(blobs, tiny_config):
    config = tiny_config.override(**{"training.epochs": 60, "training.learning_rate": 5e-3})
    result = train(config, blobs)
    bounds = [row["valid_elbo"] for row in result.history]
    assert bounds[-1] > bounds[0] + 1
    assert result.best_valid_elbo == max(bounds)
    assert result.best_epoch == result.history[bounds.index(max(bounds))]["epoch"]
    x = training.evaluation_images(blobs, "valid", config)
    again = gpvae.elbo(result.model, x, config.training.valid_samples, seed=training.VALID_SEED)
    assert again.mean == result.best_valid_elbo


def test_patience_stops_early(blobs, tiny_config):
    config = tiny_config.override(
        **{"training.epochs": 500, "training.patience": 5, "training.learning_rate": 0.05}
    )
    result = train(config, blobs)
    assert result.history[-1]["epoch"] < 500
    assert result.history[-1]["epoch"] - result.best_epoch >= 5


def test_loss_terms_are_recorded_and_add_up(blobs, tiny_config):
    """One batch holding all images: the recorded terms are those of the loss."""
    config = tiny_config.override(
        **{"training.batch_size": 1000, "training.epochs": 1, "model.encoder": "gpvae"}
    )
    row = train(config, blobs).history[0]
    fresh = gpvae.build_model(config, blobs.shape)
    kl = fresh.encoder.weight_kl().item() / len(blobs.train)
    assert row["weight_kl"] == pytest.approx(kl, rel=1e-5)
    assert set(row) == {"epoch", "valid_elbo", "reconstruction", "kl", "weight_kl", "seconds"}


def test_frozen_decoder_stays(blobs, tiny_config):
    model = gpvae.build_model(tiny_config, blobs.shape)
    model.generative.requires_grad_(False)
    before = {k: v.clone() for k, v in model.generative.state_dict().items()}
    train(tiny_config, blobs, model=model)
    assert all(torch.equal(v, before[k]) for k, v in model.generative.state_dict().items())


def test_non_finite_loss_names_step_term_and_configuration(blobs, tiny_config, tmp_path):
    config = tiny_config.override(**{"training.epochs": 30})
    train(config.override(**{"training.epochs": 2}), blobs, tmp_path / "other")
    model = gpvae.build_model(config, blobs.shape)
    original, calls = model.loss_terms, []

    def explode(x, n, generator=None):
        calls.append(1)
        terms = original(x, n, generator)
        return terms | {"kl": terms["kl"] * (math.nan if len(calls) == 8 else 1)}

    model.loss_terms = explode
    with pytest.raises(TrainingError) as caught:
        train(config, blobs, tmp_path, model=model)
    text = str(caught.value)
    assert "'kl'" in text and "nan" in text and config.hash() in text
    assert "epoch 3, step 2 of 3" in text
    saved = load_checkpoint(tmp_path / "checkpoint.pt", config)
    assert saved["epoch"] == 2
    assert all(torch.isfinite(v).all() for v in saved["model"].values())


@pytest.mark.parametrize("bound", [math.nan, -math.inf])
def test_weights_without_a_finite_validation_bound_are_not_taken(
    tiny_config, blobs, monkeypatch, bound
):
    monkeypatch.setattr(training, "validation_bound", lambda *args: bound)
    with pytest.raises(TrainingError, match="none of 6 validation bounds is a finite number"):
        train(tiny_config, blobs)
    bounds = iter([bound, 1.0, bound, 0.0, bound, bound])  # single ones are passed over
    monkeypatch.setattr(training, "validation_bound", lambda *args: next(bounds))
    assert train(tiny_config, blobs).best_epoch == 2


def test_truncated_checkpoint(blobs, tiny_config, tmp_path):
    train(tiny_config, blobs, tmp_path)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(CheckpointError, match=r"damaged.*Delete it"):
        train(tiny_config, blobs, tmp_path)


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL"],)


@pytest.mark.parametrize("kind", ["pickle", "torch", "text", "list"])
def test_foreign_checkpoint_runs_no_code(tiny_config, tmp_path, monkeypatch, kind):
    monkeypatch.setenv("EVIL", str(tmp_path / "evil"))
    path = tmp_path / "checkpoint.pt"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Evil()))
    elif kind == "torch":
        torch.save({"config": Evil()}, path)
    elif kind == "list":
        torch.save([1, 2], path)
    else:
        path.write_text("<html>not found</html>")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load_checkpoint(path, tiny_config)
    assert not (tmp_path / "evil").exists()


def test_checkpoint_of_another_configuration_names_the_fields(blobs, tiny_config, tmp_path):
    train(tiny_config, blobs, tmp_path)
    changed = tiny_config.override(**{"model.gp.features": 9, "training.epochs": 7})
    with pytest.raises(
        CheckpointError, match=r"model.gp.features: 5 -> 9; training.epochs: 6 -> 7"
    ):
        train(changed, blobs, tmp_path)


def test_full_disk_keeps_the_last_checkpoint(blobs, tiny_config, tmp_path, monkeypatch):
    train(tiny_config, blobs, tmp_path)
    path = tmp_path / "checkpoint.pt"
    before = path.read_bytes()

    def full(content, target):
        target.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(StorageError, match="No space left"):
        save_checkpoint(path, {})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_unwritable_folder(tiny_config, blobs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        train(tiny_config, blobs, tmp_path / "file" / "run")


def test_load_model(blobs, tiny_config, tmp_path):
    config = tiny_config.override(**{"model.encoder": "gpvae"})
    result = train(config, blobs, tmp_path)
    model, loaded = load_model(tmp_path / "checkpoint.pt", blobs.shape)
    assert loaded == config
    x = blobs.test.unit()
    assert torch.equal(model(x).mean, result.model(x).mean)
    with pytest.raises(CheckpointError, match="does not fit"):
        load_model(tmp_path / "checkpoint.pt", (1, 5, 5))


def test_unknown_encoder_and_device(blobs, tiny_config):
    with pytest.raises(ConfigError, match="Did you mean 'gpvae'"):
        train(tiny_config.override(**{"model.encoder": "gpvea"}), blobs)
    with pytest.raises(ConfigError, match="unknown device"):
        train(tiny_config.override(**{"training.device": "tpu"}), blobs)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no GPU"):
            train(tiny_config.override(**{"training.device": "cuda"}), blobs)


def test_bernoulli_evaluation_images_are_fixed_and_binary(blobs, tiny_config):
    config = tiny_config.override(**{"model.output": "bernoulli"})
    first = training.evaluation_images(blobs, "test", config)
    assert set(first.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(first, training.evaluation_images(blobs, "test", config))
    assert not torch.equal(
        first, training.evaluation_images(blobs, "test", config.override(**{"data.seed": 1}))
    )
    grey = training.evaluation_images(blobs, "test", tiny_config)
    assert torch.equal(grey, blobs.test.unit())


def test_dequantisation_has_the_grey_levels_of_the_images(blobs, tiny_config):
    config = tiny_config.override(**{"model.dequantise": True})
    with pytest.raises(ConfigError, match=r"these images have 17\. Set model\.levels=17"):
        train(config, blobs)
    x = training.evaluation_images(blobs, "test", config.override(**{"model.levels": 17}))
    assert torch.equal((x * 17).floor(), blobs.test.pixels.float())


def test_a_checkpoint_of_other_images_is_refused(blobs, tiny_config, tmp_path):
    """The configuration says nothing of arrays in memory; the checkpoint does."""
    first = train(tiny_config, blobs, str(tmp_path))
    again = train(tiny_config, blobs, tmp_path)
    assert torch.equal(weights(first), weights(again))
    others = gpvae.from_images(16 - blobs.train.pixels.numpy(), levels=17)
    with pytest.raises(CheckpointError, match=r"other images.*one for each data set"):
        train(tiny_config, others, tmp_path)
    brighter = gpvae.from_images(blobs.train.pixels.numpy(), levels=20)
    darker = gpvae.from_images(blobs.train.pixels.numpy(), levels=40)
    train(tiny_config, brighter, tmp_path / "levels")
    with pytest.raises(CheckpointError, match=r"other images \(levels: 20 -> 40\)"):
        train(tiny_config, darker, tmp_path / "levels")
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    del saved["data_hash"], saved["levels"]  # as older versions wrote it
    save_checkpoint(tmp_path / "checkpoint.pt", saved)
    assert train(tiny_config, others, tmp_path).history == first.history


@pytest.mark.parametrize("name", ["none.pt", ""])
def test_no_checkpoint_is_not_called_damaged(tmp_path, name):
    with pytest.raises(CheckpointError, match=r"(does not exist|is a folder)\. Give the file"):
        load_model(tmp_path / name, (1, 4, 4))


def test_an_array_is_no_data_set(blobs, tiny_config):
    with pytest.raises(DataError, match=r"are a ndarray.*gpvae.from_images"):
        train(tiny_config, blobs.train.pixels.numpy())


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 1, 4, 4).numpy(), "are a ndarray"),
        (torch.zeros(2, 1, 4, 4, device="meta"), "on meta, this model is on cpu"),
    ],
)
def test_images_that_a_model_cannot_take(tiny_config, x, message):
    with pytest.raises(DataError, match=message):
        training.build_model(tiny_config, (1, 4, 4))(x)


def test_a_checkpoint_that_lacks_something_says_what(tiny_config, blobs, tmp_path):
    train(tiny_config.override({"training.epochs": 1}), blobs, tmp_path)
    path = tmp_path / "checkpoint.pt"
    saved = load_checkpoint(path)
    save_checkpoint(path, {k: v for k, v in saved.items() if k not in ("history", "averages")})
    with pytest.raises(CheckpointError, match="lacks averages, history, so that it is of another"):
        load_checkpoint(path)


def test_validation_and_test_images_are_binarised_by_noise_of_their_own(tiny_config, blobs):
    config = tiny_config.override({"model.output": "bernoulli"})
    half = Images(torch.full((50, 1, 4, 4), 1, dtype=torch.uint8), levels=3)  # grey one half
    data = replace(blobs, valid=half, test=half)
    valid, test = (training.evaluation_images(data, part, config) for part in ("valid", "test"))
    assert set(valid.unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(valid, test)
    assert torch.equal(valid, training.evaluation_images(data, "valid", config))
