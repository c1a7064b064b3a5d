"""Configurations: round trips, hashes, refusals."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import FrozenInstanceError, replace

import pytest

import gpvae
from gpvae.config import METHODS, RunConfig, differences, from_dict
from gpvae.errors import ConfigError
from gpvae.presets import PRESETS
from gpvae.profiles import PROFILES
from gpvae.variations import VALIDATION


def leaves(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def changed(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 2
    if isinstance(value, float):
        return value / 2 or 0.25
    if isinstance(value, list):
        return [*value, 7]
    return {
        "gaussian": "bernoulli",
        "relu": "tanh",
        "diagonal": "full",
        "all": "weights",
        "mlp": "conv",
        "float32": "bfloat16",
        "constant": "cosine",
        "test": "valid",
        "expected": "marginal",
        None: 17,
    }.get(value, f"{value}x")


def test_round_trip_through_json():
    config = RunConfig().override(**{"model.hidden": (3, 4), "data.train_size": 10, "seed": 2})
    again = from_dict(RunConfig, json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.hash() == config.hash()


@pytest.mark.parametrize("key", [key for key, _ in leaves(RunConfig().to_dict())])
def test_every_field_changes_the_hash_and_is_named_in_the_difference(key):
    base = RunConfig()
    new = changed(dict(leaves(base.to_dict()))[key])
    other = base.override(**{key: new})
    assert other.hash() != base.hash()
    (line,) = differences(base.to_dict(), other.to_dict())
    assert line.startswith(f"{key}: ")


def test_configurations_are_frozen():
    with pytest.raises(FrozenInstanceError):
        RunConfig().seed = 3


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("model.gp.feature", "model.gp.features"),
        ("model.latent", "model.latent_dim"),
        ("training.lr", "training"),
        ("sed", "seed"),
        ("model.gp", "model.gp."),
        ("model.gp.features.x", "model.gp.features"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest(key, hint):
    with pytest.raises(ConfigError, match=hint) as caught:
        RunConfig().override(**{key: 1})
    assert f"unknown configuration key '{key}'" in str(caught.value)


def test_unknown_key_in_a_stored_configuration():
    tree = RunConfig().to_dict()
    tree["model"]["gp"]["amplitud"] = 2.0
    with pytest.raises(ConfigError, match=r"Did you mean 'model\.gp\.amplitude'"):
        from_dict(RunConfig, tree)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.latent_dim", "20", "expected int"),
        ("model.latent_dim", True, "expected int"),
        ("training.learning_rate", None, "expected float"),
        ("data.train_size", 0.5, "expected int or None"),
        ("model.latent_dim", 0, "positive"),
        ("training.batch_size", -3, "positive"),
        ("model.hidden", (10, 0), r"model.hidden\[1\]"),
        ("model.hidden", ("a",), r"model.hidden\[0\] is 'a' \(str\); expected int"),
        ("model.channels", (8, 20.5), r"model.channels\[1\] is 20.5 \(float\); expected int"),
        ("data.test_size", -5, "data.test_size is -5; expected a positive number"),
        ("training.learning_rate", float("inf"), "positive number"),
        ("model.gp.temperature", -1.0, "0 or more"),
        ("model.output", "gausian", "Did you mean 'gaussian'"),
        ("model.gp.covariance", "lowrank", "Did you mean 'low-rank'"),
        ("model.activation", "rellu", "Did you mean 'relu'"),
        ("model.network", "mpl", "Did you mean 'mlp'"),
        ("model.precision", "bfloat", "Did you mean 'bfloat16'"),
        ("training.schedule", "cos", "unknown schedule 'cos'"),
        ("evaluation.part", "tset", "Did you mean 'test'"),
        ("model.gp.bound", "margin", "unknown bound 'margin'"),
        ("seed", -1, "seed is -1; expected a number from 0"),
        ("data.seed", 2**64, "data.seed is 18446744073709551616; expected a number from 0"),
        ("training.average", 1.0, r"training\.average is 1\.0; expected 0 <= it < 1"),
        ("training.kl_warmup", -1, "kl_warmup is -1; expected 0 epochs or more"),
    ],
)
def test_impossible_values_are_refused(key, value, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig().override(**{key: value})


def test_options_that_do_not_go_together_are_refused():
    with pytest.raises(ConfigError, match=r"'conv', but model\.channels is empty"):
        RunConfig().override(**{"model.network": "conv", "model.channels": ()})
    with pytest.raises(ConfigError, match="goes with a gaussian output, not with bernoulli"):
        RunConfig().override(**{"model.dequantise": True, "model.output": "bernoulli"})


def test_runs_of_one_name_that_differ_are_refused():
    """Widths are not in a run's name, so they cannot share a profile."""
    widths = tuple({"model.encoder": "vae", "model.hidden": (width,)} for width in (5, 7))
    profile = gpvae.Profile("t", RunConfig(), seeds=(0,), variations={"width": widths})
    with pytest.raises(ConfigError, match=r"d10-nall-vae-s0 and differ: model\.hidden.*5"):
        profile.jobs()
    gaps = ({"model.encoder": "vae", "evaluation.gaps": False},)
    profile = gpvae.Profile("t", RunConfig(), seeds=(0,), variations={"gaps": gaps})
    assert len(profile.jobs()) == 4 and all(job.evaluation.gaps for job in profile.jobs())


def test_unknown_profile():
    with pytest.raises(ConfigError, match="Did you mean 'digits'"):
        gpvae.get_profile("digit")


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_profile_grids(profile):
    runs = profile.runs()
    assert len(runs) == len(profile.outputs) * len(profile.encoders) * len(profile.seeds)
    assert len({run.name for run in runs}) == len(runs)
    pairs = {}
    for run in replace(profile, settings={}).runs():  # methods differ in the encoder only
        tree = run.to_dict()
        tree["model"].pop("encoder")
        pairs.setdefault(json.dumps(tree, sort_keys=True), set()).add(run.model.encoder)
    assert all(found == set(profile.encoders) for found in pairs.values())
    sizes = {run.data.train_size for run in profile.runs("gaussian", profile.train_sizes)}
    assert len(sizes) == len(profile.train_sizes)


@pytest.mark.parametrize("name", ["rivals", "cpu"])
def test_settings_are_candidates_and_every_method_had_as_many(name):
    profile = PROFILES[name]
    searched, counts = {}, Counter()
    for changes in profile.variations["tuning-each"]:
        place = changes["model.encoder"], changes["model.output"]
        counts[place] += 1
        searched.setdefault(place, []).append(profile.base.override(**changes))
    assert set(counts.values()) == {8}
    assert {encoder for encoder, _ in counts} == set(METHODS) - {"svi"}
    for place, settings in profile.settings.items():
        first = searched[place][0]
        common = {"training.epochs": first.training.epochs, "seed": first.seed, **VALIDATION}
        names = {"model.encoder": place[0], "model.output": place[1]}
        assert profile.base.override(**names, **{**common, **settings}) in searched[place]


def test_impossible_evaluations_are_refused_before_anything_is_trained():
    with pytest.raises(ConfigError, match=r"evaluation\.samples is 501.*even"):
        RunConfig().override(**{"evaluation.samples": 501})
    with pytest.raises(ConfigError, match=r"evaluation\.seed is 0"):
        RunConfig().override(**{"evaluation.seed": 0})
    RunConfig().override(**{"evaluation.samples": 501, "evaluation.gaps": False})


def test_svi_of_a_variation_is_that_of_the_table():
    plan = PROFILES["rivals"]
    table = [run for run in plan.runs("gaussian") if run.model.encoder == "svi"]
    assert plan.setting("x", {"model.encoder": "svi"}) == table


def test_settings_hold_for_their_encoder_and_output():
    base = PROFILES["smoke"]
    slow = {"training.learning_rate": 1e-5}
    profile = replace(
        base,
        encoders=("vae", "svi", "gpvae"),
        settings={("vae", "gaussian"): slow},
        variations={"x": ({"model.encoder": "vae"},), "tuning": ({"model.encoder": "vae"},)},
    )
    changed = {
        (run.model.encoder, run.model.output)
        for run in profile.runs()
        if run.training.learning_rate == 1e-5
    }
    assert changed == {("vae", "gaussian"), ("svi", "gaussian")}
    assert all(run.training.learning_rate == 1e-5 for run in profile.variation("x"))
    assert all(run.training.learning_rate != 1e-5 for run in profile.variation("tuning"))


def test_at_least_five_seeds_where_it_counts():
    assert len(PROFILES["digits"].seeds) >= 5
    assert len(PROFILES["paper"].seeds) >= 10


@pytest.mark.parametrize("name", [f"paper/{preset}" for preset in PRESETS])
def test_full_sets_are_run_by_every_method(name):
    assert {run.model.encoder for run in gpvae.get_profile(name).runs()} == set(METHODS)


def test_presets_cover_the_data_sets_at_both_dimensions():
    from gpvae.data import names

    found = {(c.data.name, c.model.latent_dim) for c in PRESETS.values()}
    sets = set(names()) - {"digits", "omniglot-images"}
    assert found == {(name, dim) for name in sets for dim in (20, 50)}
    profile = gpvae.get_profile("paper/omniglot-d20")
    assert profile.name == "paper/omniglot-d20" and profile.base == PRESETS["omniglot-d20"]
    with pytest.raises(ConfigError, match="Did you mean 'paper/omniglot-d20'"):
        gpvae.get_profile("paper/omniglot-20")


def test_a_profile_is_found_under_one_name_only():
    """`cpu` would be `cpu/mnist` once more, with rows in another folder."""
    with pytest.raises(ConfigError, match="'cpu' is a family; choose one of cpu/mnist, "):
        gpvae.get_profile("cpu")
    with pytest.raises(ConfigError, match="'paper' is a family"):
        gpvae.get_profile("paper")
    for name in ("regimes", "burda"):  # not the configuration of any of their presets
        assert gpvae.get_profile(name).name == name


def test_regimes_with_bernoulli_output_are_the_same_runs_with_another_output():
    plain, other = gpvae.get_profile("regimes"), gpvae.get_profile("regimes/bernoulli")
    assert other.outputs == ("bernoulli",)
    changed = [run.override(**{"model.output": "bernoulli"}) for run in plain.jobs()]
    jobs = other.jobs()
    assert [job for job in changed if job not in jobs] == []
    assert {job.model.output for job in jobs} == {"bernoulli"}
    assert gpvae.get_profile("regimes/small").variations == {}


def test_sizes_of_the_regimes_on_mnist_train_for_about_as_many_steps():
    runs = gpvae.get_profile("regimes/mnist").jobs()
    steps = {
        size: epochs * math.ceil(size / batch)
        for size, epochs, batch in {
            (r.data.train_size, r.training.epochs, r.training.batch_size) for r in runs
        }
    }
    assert steps.keys() == {500, 2000, 10000}
    assert max(steps.values()) < 1.02 * min(steps.values())


@pytest.mark.parametrize(
    "data", ["/home/me/own.npy", "../own.npy", "a/own.npy/", "C:\\me\\own.npy"]
)
def test_a_run_on_a_file_has_a_name_without_folders(data):
    """Its name becomes that of files, which are to lie in the results folder."""
    name = gpvae.RunConfig().override({"data.name": data}).name
    assert name.startswith("own.npy-") and not set(name) & set("/\\")
    other = gpvae.RunConfig().override({"data.name": f"b/{data}"}).name
    assert other != name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "../../evil"}, "is called"),
        ({"name": "/evil"}, "is called"),
        ({"encoders": "vae"}, r"encoders of the profile t is 'vae'; expected a tuple"),
        ({"seeds": 3}, "seeds of the profile t is 3; expected a tuple"),
        ({"settings": {("gpvae", "gausian"): {}}}, "Did you mean 'gaussian'"),
        ({"settings": {("gpvea", "gaussian"): {}}}, "Did you mean 'gpvae'"),
    ],
)
def test_impossible_profiles_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        gpvae.Profile(**{"name": "t", "base": gpvae.RunConfig(), **options})
