"""Rows: stored whole, reused while they fit, recomputed with a reason when they do not."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import gpvae
from gpvae import events, experiment, jobs, jsonl, paths, results
from gpvae.data import digest
from gpvae.errors import ConfigError, DataError, TrainingError
from gpvae.experiment import run, run_all
from gpvae.gaps import decompose
from gpvae.refine import study
from gpvae.results import Results
from gpvae.search import SearchOptions
from gpvae.stored import find_rows


def test_row_holds_everything_that_made_it(project_root, config, lines):
    row = run(config, "t", log=lines.append)
    assert row["config"] == config.to_dict()
    assert row["config_hash"] == config.hash()
    assert row["data_hash"] == experiment.load_data(config).hash
    assert row["code_hash"] == results.code_hash()
    assert row["code_digest"] == results.code_digest()
    assert row["seed"] == config.seed and row["device"]
    assert {"torch", "numpy", "gpvae", "python"} <= set(row["versions"])
    assert row["log_likelihood"]["samples"] == 10 and row["log_likelihood"]["n"] == 12
    arrays = Results("t").arrays(row)
    assert arrays["log_likelihood"].shape == (12,)
    assert arrays["log_likelihood"].mean() == pytest.approx(row["log_likelihood"]["mean"])
    assert len(arrays["valid_index"]) == row["split"]["valid"] == 20
    assert digest(arrays["valid_index"]) == row["split"]["valid_indices"]
    spread = arrays["log_likelihood"].std(ddof=1) / 12**0.5
    assert row["log_likelihood"]["stderr"] == pytest.approx(spread, rel=1e-5)
    assert json.loads(Results("t").path.read_text()) == row


def test_other_evaluations_take_the_trained_model(project_root, config, monkeypatch):
    first = run(config, "t")
    monkeypatch.setattr(type(gpvae.build_model(config, (1, 8, 8))), "loss_terms", None)
    again = run(config.override(**{"evaluation.samples": 20}), "t")  # would fail if it trained
    assert again["log_likelihood"]["samples"] == 20 and again["key"] != first["key"]
    assert again["history"] == first["history"] and again["elbo"] == first["elbo"]
    valid = run(config.override(**{"evaluation.part": "valid"}), "t")
    assert valid["history"] == first["history"] and valid["elbo"] != first["elbo"]


def test_equal_run_is_reused_and_stale_ones_say_why(project_root, config, lines, monkeypatch):
    first = run(config, "t", log=lines.append)
    assert run(config, "t", log=lines.append) == first
    assert lines == []
    changed = config.override(**{"model.gp.features": 9})
    second = run(changed, "t", log=lines.append)
    assert second["config_hash"] != first["config_hash"]
    assert "computed again (model.gp.features: 5 -> 9)" in lines[-1]
    assert Results("t").rows() == [second]  # the same name: the newest counts

    monkeypatch.setattr(results, "code_hash", lambda: "other")
    monkeypatch.setattr(experiment, "code_hash", lambda: "other")
    run(changed, "t", log=lines.append)
    assert f"code: {second['code_hash']} -> other" in lines[-1]
    statuses = [e.status for e in events.read("t")[0]]
    assert statuses == ["made", "reused", "recomputed", "recomputed"]


def test_changed_data_is_named(config):
    row = {"config": config.to_dict(), "data_hash": "a", "code_hash": results.code_hash()}
    assert results.stale_reason(row, config, "a") == ""
    assert results.stale_reason(row, config, "b") == "data: a -> b"


def test_missing_arrays_and_wish_for_fresh_results(project_root, config, lines):
    row = run(config, "t", log=lines.append)
    Results("t").arrays_path(row).unlink()
    again = run(config, "t", log=lines.append)
    assert "arrays are missing" in lines[-1]
    run(config, "t", fresh_since=again["finished"], log=lines.append)
    assert len(lines) == 1
    forced = run(config, "t", fresh_since=again["finished"] + 1e-3, log=lines.append)
    assert "(asked for)" in lines[-1]
    same = {k: v for k, v in forced.items() if k not in ("finished", "seconds")}
    assert same == {k: v for k, v in again.items() if k not in ("finished", "seconds")}


def test_runs_that_names_do_not_tell_apart_take_turns(project_root, config):
    """A, B and A again: the second A is there already."""
    other = config.override(**{"training.learning_rate": 1e-4})
    assert other.name == config.name
    first, second = run(config, "t"), run(other, "t")
    assert run(config, "t") == first and Results("t").rows() == [first]
    assert run(other, "t") == second and Results("t").rows() == [second]
    statuses = [e.status for e in events.read("t")[0]]
    assert statuses == ["made", "recomputed", "reused", "reused"]


@pytest.mark.parametrize("interrupted", [True, False])
@pytest.mark.parametrize("encoder", ["vae", "svi"])
def test_a_forced_run_trains_anew(project_root, config, encoder, interrupted):
    """Also one that ended before its row was written, and SVI, whose weights are the VAE's."""
    config = config.override(**{"model.encoder": encoder})
    row = run(config, "t")
    if interrupted:
        Results("t").path.unlink()
    (file,) = (paths.results("t") / "runs").glob("*/checkpoint.pt")
    trained, now = file.stat().st_mtime, time.time()
    again = run(config, "t", fresh_since=now)
    assert again["elbo"] == row["elbo"] and file.stat().st_mtime > now > trained
    trained = file.stat().st_mtime
    if not interrupted:  # what this call itself has trained is kept
        Results("t").path.unlink()
        run(config, "t", fresh_since=now)
        assert file.stat().st_mtime == trained


def test_two_processes_give_the_rows_of_one(project_root, config):
    configs = [config.override(seed=seed) for seed in range(3)]
    serial = run_all(configs, "serial", workers=1, log=lambda line: None)
    parallel = run_all(configs, "parallel", workers=2, log=lambda line: None)
    for a, b in zip(serial, parallel, strict=True):
        assert a["log_likelihood"] == b["log_likelihood"]
    assert [r["seed"] for r in parallel] == [0, 1, 2]
    assert len({r["log_likelihood"]["mean"] for r in parallel}) == 3


def test_failing_run_does_not_stop_the_others(project_root, config):
    bad = config.override(**{"training.learning_rate": 1e30, "training.epochs": 5}, seed=7)
    with pytest.raises(TrainingError, match=r"1 of 2 runs failed.*\n.*-s7"):
        run_all([bad, config], "t", workers=1, log=lambda line: None)
    assert [row["seed"] for row in Results("t").rows()] == [0]
    failed = [e for e in events.read("t")[0] if e.status == "failed"]
    assert len(failed) == 1 and "training.learning_rate" in failed[0].reason


def test_line_cut_by_a_crash_is_passed_over_and_closed(tmp_path):
    path = tmp_path / "rows.jsonl"
    jsonl.append(path, {"a": 1})
    with open(path, "a") as file:
        file.write('{"a": 2, "b')
    assert jsonl.read(path) == [{"a": 1}]
    jsonl.append(path, {"a": 3})
    assert jsonl.read(path) == [{"a": 1}, {"a": 3}]


def test_lines_of_several_processes_do_not_mix(tmp_path):
    path = tmp_path / "rows.jsonl"
    code = (
        "import sys; from pathlib import Path; from gpvae import jsonl\n"
        "for i in range(100):\n"
        "    jsonl.append(Path(sys.argv[1]), {'p': sys.argv[2], 'i': i, 'x': 'y' * 3000})"
    )
    children = [subprocess.Popen([sys.executable, "-c", code, path, name]) for name in "ab"]
    assert [child.wait() for child in children] == [0, 0]
    rows = jsonl.read(path)
    for name in "ab":
        assert [row["i"] for row in rows if row["p"] == name] == list(range(100))


def test_unreadable_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xff\xfe\n5\n[1]\n{"a": 1}\n')  # damaged lines take no others along
    assert jsonl.read(path) == [{"a": 1}]
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match=r"cannot read .*move it away"):
        jsonl.read(path)


def test_a_file_that_cannot_be_finished_leaves_the_old_one_and_nothing_else(tmp_path):
    path = tmp_path / "rows.jsonl"
    jsonl.save(path, [{"a": 1}])
    with pytest.raises(TypeError):
        jsonl.save(path, [{"a": object()}])
    assert jsonl.read(path) == [{"a": 1}] and list(tmp_path.iterdir()) == [path]


def test_arrays_that_were_cut_short_are_damaged_and_made_again(project_root, config, lines):
    row = run(config, "t", log=lines.append)
    store = Results("t")
    path = store.arrays_path(row)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert not store.has_arrays(row)
    with pytest.raises(DataError, match=rf"{row['name']} cannot be read .*do the run again"):
        store.arrays(row)
    again = run(config, "t", log=lines.append)
    assert "computed again (its per-image arrays are missing or damaged)" in lines[-1]
    assert store.arrays(again)["elbo"].shape == (12,)


def test_an_estimate_that_is_no_number_fails_the_run_and_is_made_again(
    project_root, config, monkeypatch
):
    original = experiment.evaluate

    def broken(model, x, config):
        estimates, arrays = original(model, x, config)
        nan = estimates["elbo"].value * float("nan")
        return estimates | {"elbo": gpvae.Estimate(nan, nan, 10)}, arrays

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "evaluate", broken)
        with pytest.raises(TrainingError, match=r"not a finite number: elbo\. .*learning_rate"):
            run(config, "t")
    row = run(config, "t", log=lambda line: None)
    assert np.isfinite(row["elbo"]["mean"]) and Results("t").rows() == [row]


def test_a_row_with_another_newest_of_its_name_is_done_all_the_same(project_root, config):
    other = config.override(**{"training.learning_rate": 1e-4})
    first, _ = run(config, "t"), run(other, "t")
    data = experiment.load_data(config)
    assert experiment.status_of(Results("t"), config, data, 0.0) == ("reused", "")
    assert jobs.survey({"t": [config]})[0].state == "done"
    assert run(config, "t") == first


def test_runs_that_names_do_not_tell_apart_are_not_taken_for_each_other(project_root, config):
    other = config.override(**{"training.learning_rate": 1e-4})
    with pytest.raises(ConfigError, match=r"differ: training\.learning_rate: .* -> 0\.0001"):
        run_all([config, other], "t", workers=1)
    with pytest.raises(ConfigError, match="Rows are told apart by name"):
        find_rows([config, other], "t")


def test_code_hash_ignores_comments_and_docstrings_only(tmp_path, monkeypatch):
    uncached = results.code_digest.__wrapped__

    def hashed(source):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / "dataset.py").write_text("")
        (tmp_path / "m.py").write_text(source)
        monkeypatch.setattr(results, "__file__", str(tmp_path / "results.py"))
        monkeypatch.setattr(results, "code_digest", uncached)
        return results.code_hash.__wrapped__()

    base = hashed('def f(x):\n    """One."""\n    return x + 1\n')
    assert hashed('# why\ndef f(x):\n    """Two."""\n\n    return x + 1\n') == base
    assert hashed('def f(x):\n    """One."""\n    return x + 2\n') != base
    for other in ("def f(x, y=None):\n    return x + 1\n", "def f(x):\n    return +x\n"):
        assert hashed(other) != base
    changed = hashed("x = 1")
    (tmp_path / "plots.py").write_text("y = 2")
    assert hashed("x = 1") == changed


def test_code_hash_does_not_see_fields_that_other_versions_of_python_lack():
    (function,) = ast.parse("def f(x):\n    return x").body
    before = results._plain(function)
    function._fields = (*function._fields, "made_up")
    function.made_up = []
    assert results._plain(function) == before
    function.made_up = [ast.Pass()]
    assert results._plain(function) != before


def test_gaps_and_scores_of_a_run(project_root, config):
    """The optimised Gaussian beats the encoder's on every image, up to noise."""
    config = config.override(
        **{"evaluation.gaps": True, "model.encoder": "gpvae", "evaluation.elbo_samples": 200}
    )
    row = run(config, "t", log=lambda line: None)
    arrays = Results("t").arrays(row)
    gap = arrays["elbo_optimised"] - arrays["elbo"]
    noise = np.hypot(arrays["elbo_stderr"], arrays["elbo_optimised_stderr"])
    assert (gap > -4 * noise).all()
    assert gap.mean() > 0
    assert {"relative_f_var", "f_var", "h_var", "q_var", "converged"} <= set(arrays)
    assert (arrays["relative_f_var"] > 0).all()


def test_outliers_that_cannot_be_had_are_named_before_training(project_root, config, monkeypatch):
    monkeypatch.setattr(gpvae.VAE, "loss_terms", None)  # would fail if it trained
    options = {"evaluation.outliers": "digits", "data.name": str(project_root / "own.npy")}
    pixels = np.arange(1600).astype(np.uint8)
    np.save(project_root / "own.npy", pixels.reshape(100, 1, 4, 4))
    with pytest.raises(DataError, match=r"digits has images of shape \(1, 8, 8\)"):
        run(config.override(**options), "p")


@pytest.mark.parametrize("gaps", [True, False])
def test_the_seed_of_the_evaluation_reaches_every_estimate(project_root, config, gaps):
    config = config.override(**{"evaluation.gaps": gaps, "model.encoder": "gpvae"})
    a, b = (run(config.override(**{"evaluation.seed": s}), f"p/{s}") for s in (1, 2))
    estimates = [key for key, value in a.items() if isinstance(value, dict) and "mean" in value]
    assert len(estimates) == (5 if gaps else 2)
    for key in estimates:
        assert a[key]["mean"] != b[key]["mean"], key
    if gaps:
        refined = Results("p/1").arrays(a), Results("p/2").arrays(b)
        for key in ("refine_bounds", "refine_ranking"):  # the start, where only the noise differs
            assert (refined[0][key][0] != refined[1][key][0]).all(), key


def test_every_estimate_is_kept_under_its_name(config):
    """The reference of the gaps is by both proposals; what ranks images and what reports their
    gain have noise of their own.
    """
    config = config.override(**{"evaluation.gaps": True, "model.encoder": "gpvae"})
    data, e = experiment.load_data(config), config.evaluation
    model = gpvae.build_model(config, data.shape).eval()
    x = gpvae.training.evaluation_images(data, "test", config)
    estimates, arrays = experiment.evaluate(model, x, config)
    options = SearchOptions(seed=e.seed)
    gaps = decompose(model, x, e.samples, e.elbo_samples, options, seed=e.seed - 1)
    expected = {
        "elbo": gaps.elbo,
        "log_likelihood": gaps.own,
        "elbo_optimised": gaps.elbo_optimised,
        "log_likelihood_neutral": gaps.neutral,
        "log_px": gaps.log_px,
    }
    assert set(estimates) == set(expected)
    for name, estimate in expected.items():
        assert torch.equal(estimates[name].value, estimate.value), name
        np.testing.assert_allclose(arrays[name], estimate.value.numpy(), rtol=1e-6)
        np.testing.assert_allclose(arrays[f"{name}_stderr"], estimate.stderr.numpy(), rtol=1e-6)
    with torch.no_grad():
        q = model(x)
    np.testing.assert_allclose(arrays["q_var"], (q.std**2).mean(-1), rtol=1e-6)
    refined = study(
        model, x, q.scores(), options=SearchOptions(seed=e.seed - 1), elbo_samples=e.elbo_samples
    )
    np.testing.assert_allclose(arrays["refine_bounds"], refined.bounds, rtol=1e-6)
    np.testing.assert_allclose(arrays["refine_ranking"], refined.ranking_bounds, rtol=1e-6)
    assert (arrays["refine_bounds"][0] != arrays["refine_ranking"][0]).all()


def test_outliers_get_the_bound_and_scores_of_other_images(project_root, config):
    options = {"data.valid_size": None, "evaluation.outliers": config.data.name}
    row = run(config.override(**options, **{"model.encoder": "gpvae"}), "p", log=lambda line: None)
    arrays = Results("p").arrays(row)
    own = {name.removeprefix("outlier_"): a for name, a in arrays.items() if "outlier" in name}
    assert {"elbo", "relative_f_var", "expected_gap"} <= set(own)
    for name, values in own.items():  # here they are the test images themselves
        np.testing.assert_allclose(values, arrays[name][: len(values)], rtol=1e-5)


def test_checkpoint_of_a_row_gives_its_numbers_back(project_root, config):
    row = run(config, "t", log=lambda line: None)
    model = experiment.trained(config, "t", log=lambda line: None).model
    x = gpvae.training.evaluation_images(experiment.load_data(config), "test", config)
    with experiment.cpu_threads(1):
        again = gpvae.log_likelihood(model, x, 10, seed=config.evaluation.seed)
    assert again.mean == row["log_likelihood"]["mean"]
    assert torch.get_num_threads() == 1


def test_committed_evidence_is_read_only_where_nothing_is_stored(project_root):
    store, row = Results("t"), {"name": "a", "key": "1"}
    arrays = {
        "elbo": np.array([1 / 3, 2.0]),
        "converged": np.array([True, False]),
        "valid_index": np.arange(3),
    }
    store.append(row, arrays)
    store.keep_arrays([row])
    assert store.arrays(row)["elbo"].dtype == np.float64  # what was computed here comes first
    store.arrays_path(row).unlink()
    kept = store.arrays(row)
    assert kept.keys() == {"elbo", "converged"} and kept["converged"].dtype == bool
    np.testing.assert_array_equal(kept["elbo"], np.float32([1 / 3, 2.0]))
    store.keep_arrays([row])  # nothing here to copy from: the committed file stays
    assert store.has_arrays(row)

    jsonl.append(paths.figures("t") / "rows.jsonl", {"name": "b", "key": "2"})
    assert [r["name"] for r in store.everything()] == ["b", "a"]
    assert [r["name"] for r in store.rows()] == ["a"] and store.find("b") is None
    store.keep_arrays([])
    assert not store.has_arrays(row)


def test_a_version_that_computes_the_same_writes_rows_in_the_older_ones_name(monkeypatch):
    digest = results.code_digest()
    monkeypatch.setattr(results, "CONTINUED", {digest: "older"})
    assert results.code_hash.__wrapped__() == "older"
    monkeypatch.setattr(results, "CONTINUED", {"another": "older"})
    assert results.code_hash.__wrapped__() == digest
