"""Methods and profiles from outside the package: known everywhere, and stale when they change."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

import gpvae
from gpvae import paths, plugins, results
from gpvae.errors import ConfigError
from gpvae.experiment import run
from gpvae.plots import COLOURS, MARKERS
from gpvae.profiles import PROFILES
from gpvae.tables import LABELS
from gpvae.training import MODELS

README = (paths.CHECKOUT / "README.md").read_text("utf-8")
MODULE = re.findall(r"```python\n(.*?)```", README, re.S)[1]


@pytest.fixture
def registry(monkeypatch):
    """What is registered in a test is forgotten after it."""
    for known in (MODELS, LABELS, COLOURS, MARKERS, PROFILES, plugins.METHOD_HASHES):
        for name in ("mine", "ours"):
            monkeypatch.setitem(known, name, None)
            del known[name]


def command(folder, *arguments):
    environment = os.environ | {"GPVAE_ROOT": str(folder), "GPVAE_PLUGINS": "my_methods"}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    words = [sys.executable, "-m", "gpvae", *arguments]
    return subprocess.run(words, env=environment, text=True, capture_output=True, check=False)


def test_the_readmes_method_runs_in_a_sweep_and_is_stale_once_its_source_changes(tmp_path):
    (tmp_path / "my_methods.py").write_text(MODULE)
    sweep = ("sweep", "--profile", "mine", "--outputs", "gaussian")
    assert "6 of 6 jobs are done" in command(tmp_path, *sweep, "--workers", "2").stdout
    assert "6 done, 0 stale" in command(tmp_path, *sweep, "--list").stdout
    (tmp_path / "my_methods.py").write_text(MODULE + "# changed\n")
    told = command(tmp_path, *sweep, "--list").stdout
    assert "4 done, 2 stale" in told and "the source of the method narrow" in told


def test_a_plugin_that_is_not_there_is_named(tmp_path):
    ended = command(tmp_path, "sweep", "--profile", "smoke", "--list")
    assert ended.returncode != 0
    assert "GPVAE_PLUGINS names 'my_methods', which cannot be imported" in ended.stderr
    (tmp_path / "my_methods.py").write_text("1 / 0")
    told = command(tmp_path, "--version").stderr
    assert "'my_methods', which cannot be imported (ZeroDivisionError: division by zero)" in told


def test_a_method_without_a_source_is_refused(registry):
    """A change of it could not be seen."""
    namespace = {"VAE": gpvae.VAE, "__name__": "nowhere"}
    exec("class Mine(VAE): pass", namespace)
    with pytest.raises(ConfigError, match="source of the method's class Mine cannot be read"):
        plugins.register("mine", namespace["Mine"])
    assert "mine" not in plugins.METHOD_HASHES


def test_a_registered_method_has_label_colour_and_a_hash_of_its_own(registry, project_root, config):
    class Mine(gpvae.VAE):
        pass

    plugins.register("mine", Mine, "My VAE", "tab:pink")
    assert (LABELS["mine"], COLOURS["mine"], MARKERS["mine"]) == ("My VAE", "tab:pink", "*")
    plugins.register("mine", Mine)  # again, as a notebook does whose cell is run again
    assert LABELS["mine"] == "mine"
    own = config.override({"model.encoder": "mine"})
    row = run(own, "t", log=lambda line: None)
    assert row["method_hash"] and row["code_hash"] == results.code_hash()
    assert "method_hash" not in run(config, "t", log=lambda line: None)
    key = results.run_key(own, "d")
    plugins.METHOD_HASHES["mine"] = "changed"
    assert results.stale_reason(row, own, row["data_hash"]) == "the source of the method mine"
    assert results.run_key(own, "d") != key  # and another folder for its checkpoint


@pytest.mark.parametrize(("name", "message"), [("vae", "gpvae's own"), ("a b", "letters, digits")])
def test_names_that_cannot_be_registered(registry, name, message):
    with pytest.raises(ConfigError, match=message):
        plugins.register(name, gpvae.VAE)


def test_a_profile_takes_no_name_of_another(registry, config):
    profile = gpvae.Profile("ours", config)
    plugins.register_profile(profile)
    plugins.register_profile(profile)
    assert gpvae.get_profile("ours") == profile
    for name in ("smoke", "ours/two"):
        with pytest.raises(ConfigError, match="cannot be added"):
            plugins.register_profile(gpvae.Profile(name, config))
