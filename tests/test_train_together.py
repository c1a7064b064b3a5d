"""Seeds of a profile trained together before their rows are made, as on a GPU."""

from __future__ import annotations

import pytest
import torch

import gpvae
from gpvae import experiment, paths
from gpvae.errors import TrainingError
from gpvae.experiment import load_data, run_folder, train_together, trained

ON_GPU = experiment._on_gpu


@pytest.fixture
def configs(tiny_config, project_root, monkeypatch):
    """Two seeds of the VAE and of SVI, which is trained as the VAE; the CPU in a GPU's place."""
    monkeypatch.setattr(experiment, "_on_gpu", lambda config: True)
    base = tiny_config.override(
        **{"data.train_size": 40, "data.valid_size": 20, "training.epochs": 2}
    )
    encoders = ("vae", "svi")
    return [base.override(**{"model.encoder": e, "seed": s}) for e in encoders for s in (0, 1)]


def files(configs):
    folders = (run_folder(c, "p", load_data(c)) for c in configs)
    return [(folder / "checkpoint.pt").exists() for folder in folders]


def left():
    folder = paths.results("p") / "ensembles"
    return list(folder.iterdir()) if folder.exists() else []


def test_runs_find_their_trained_models(configs, monkeypatch):
    lines = []
    train_together(configs, "p", log=lines.append)
    assert lines == [f"{configs[0].name}: trained together with 1 other seeds"]
    assert files(configs) == [True] * 4 and not left()
    monkeypatch.setattr(gpvae.VAE, "loss_terms", None)  # would fail if called
    results = [trained(config, "p") for config in configs]
    for a, b in zip(results[:2], results[2:], strict=True):
        states = (r.model.state_dict().values() for r in (a, b))
        assert all(torch.equal(p, q) for p, q in zip(*states, strict=True))
    train_together(configs, "p")  # nothing is left to do


def test_what_is_forced_is_trained_together_again(configs):
    def times():
        folders = [run_folder(c, "p", load_data(c)) for c in configs[:2]]
        return [(folder / "checkpoint.pt").stat().st_mtime for folder in folders]

    train_together(configs, "p")
    before = times()
    train_together(configs, "p", fresh_since=min(before))  # not older
    assert times() == before
    lines = []
    train_together(configs, "p", fresh_since=max(before) + 1e-3, log=lines.append)
    assert len(lines) == 1 and min(times()) > max(before)


def test_what_has_begun_or_is_alone_is_left_alone(configs):
    trained(configs[0], "p")
    alone = configs[0].override(**{"model.latent_dim": 3})
    train_together([*configs[:2], alone], "p")
    assert files([*configs[:2], alone]) == [True, False, False]


def test_nothing_happens_on_the_cpu(configs, monkeypatch):
    monkeypatch.setattr(experiment, "_on_gpu", ON_GPU)
    train_together(configs, "p")
    assert files(configs) == [False] * 4


def test_a_group_that_fails_is_left_to_single_runs(configs, monkeypatch):
    def fail(*args, **kwargs):
        raise TrainingError("too little memory")

    monkeypatch.setattr(experiment, "train_seeds", fail)
    lines = []
    train_together(configs, "p", log=lines.append)
    assert "too little memory" in lines[-1] and files(configs) == [False] * 4 and not left()


def test_a_group_that_was_cut_goes_on(configs, monkeypatch):
    class Cut(Exception):
        pass

    def write_one_then_die(path, content, original=gpvae.ensemble.save_checkpoint):
        original(path, content)
        if path.name == "checkpoint.pt":
            raise Cut

    monkeypatch.setattr(gpvae.ensemble, "save_checkpoint", write_one_then_die)
    with pytest.raises(Cut):
        train_together(configs, "p")
    assert files(configs[:2]) == [True, False] and len(left()) == 1
    monkeypatch.setattr(gpvae.ensemble, "save_checkpoint", write_one_then_die.__defaults__[0])
    monkeypatch.setattr(gpvae.VAE, "loss_terms", None)
    train_together(configs, "p")
    assert files(configs[:2]) == [True, True] and not left()
