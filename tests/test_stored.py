"""Rendering from stored evidence: nothing is trained, and nothing stale passes for fresh."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
from rows import fake_row, store_rows

import gpvae
from gpvae import experiment, jsonl, paths, results, stored
from gpvae.events import describe, read
from gpvae.experiment import load_data, run_all
from gpvae.jobs import Failure, committed_failures_path, failures_path
from gpvae.results import Results
from gpvae.stored import history_of, keep_evidence, model_of, rows_of
from gpvae.tables import save_rows


@pytest.fixture
def nothing_trains(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("trained something")

    monkeypatch.setattr(stored, "run_all", refuse)
    monkeypatch.setattr(stored, "trained", refuse)


def test_computes_what_is_missing_unless_told_otherwise(project_root, config, lines):
    (row,) = rows_of([config], "t", workers=1, log=lines.append)
    assert row == Results("t").find(config.name) and len(lines) == 1


def test_keeping_the_evidence_does_not_say_that_it_was_reused(project_root, config, lines):
    plan = gpvae.Profile(
        "t", config, encoders=("vae",), seeds=(config.seed,), outputs=("gaussian",)
    )
    rows_of(plan.runs(), "t", workers=1, log=lines.append)
    assert stored.keep_evidence(plan) == 1
    assert [e.status for e in read("t")[0] if e.kind == "row"] == ["made"]


def test_committed_rows_of_other_runs_stay(project_root):
    """They may be nowhere else: other seeds and a row whose arrays were lost are not dropped."""
    plan = gpvae.Profile("t", gpvae.RunConfig(), encoders=("vae",), outputs=("gaussian",))
    store = store_rows("t", [fake_row("vae", seed, [1.0, 2.0]) for seed in range(5)])
    assert stored.keep_evidence(plan) == 5
    shutil.rmtree(paths.results("t"))
    rows = store.everything()
    store.committed_path(rows[4]).unlink()
    assert stored.keep_evidence(replace(plan, seeds=(0, 1))) == 5
    assert [row["seed"] for row in store.everything()] == [0, 1, 2, 3, 4]
    assert [store.has_arrays(row) for row in rows] == [True] * 4 + [False]


def test_missing_runs_are_named_and_code_that_differs_is_said(project_root, lines, nothing_trains):
    rows = [fake_row("vae", seed, [1.0, 2.0]) for seed in range(2)]
    store_rows("t", rows)
    wanted = gpvae.Profile("t", gpvae.RunConfig(), outputs=("gaussian",)).runs()
    found = rows_of(wanted, "t", stored=True, log=lines.append)
    assert [row["name"] for row in found] == [row["name"] for row in rows]
    missing, code = lines
    assert missing.startswith("8 of 10 runs are missing: digits-gaussian-d10-nall-vae-s2,")
    assert missing.endswith("and 4 more")
    assert code == f"stored rows were made by code c; the present code is {results.code_hash()}"
    happened = [event.status for event in read("t")[0]]
    assert happened == ["reused"] * 2 + ["missing"] * 8
    assert describe(read("t")[0]) == ["rows: 2 reused, 8 missing"]


def test_only_rows_of_exactly_this_configuration_count(project_root, lines, nothing_trains):
    row = fake_row("gpvae", 0, [1.0])
    newer = fake_row("gpvae", 0, [2.0], row={"finished": 2.0, "key": "n"})
    store_rows("t", [newer, row, fake_row("gpvae", 0, [3.0], **{"training.epochs": 7})])
    config = gpvae.RunConfig().override(**{"model.encoder": "gpvae"})
    (found,) = rows_of([config], "t", stored=True, log=lines.append)
    assert found["key"] == "n"  # the newest one
    assert rows_of([config.override(**{"training.epochs": 8})], "t", stored=True, log=list) == []


def test_a_row_from_before_a_key_existed_counts_with_its_default(project_root, lines):
    row = fake_row("vae", 0, [1.0])
    del row["config"]["evaluation"]["part"]
    row["config_hash"] = "of another time"
    store_rows("t", [row])
    (found,) = rows_of([gpvae.RunConfig()], "t", stored=True, log=lines.append)
    assert found["name"] == row["name"]


def test_a_row_without_its_arrays_is_missing(project_root, lines, nothing_trains):
    row = fake_row("vae", 0, [1.0])
    store = store_rows("t", [row])
    store.arrays_path(row).unlink()
    assert rows_of([gpvae.RunConfig()], "t", stored=True, log=lines.append) == []
    assert lines[0].startswith("1 of 1 runs are missing")


def test_committed_evidence_is_found_but_never_taken_for_fresh(project_root, config, lines):
    (row,) = run_all([config], "t", workers=1, log=lines.append)
    arrays = Results("t").arrays(row)
    save_rows([row], "t")
    shutil.rmtree(paths.results("t"))

    (found,) = rows_of([config], "t", stored=True, log=lines.append)
    assert found == row
    kept = Results("t").arrays(found)
    np.testing.assert_array_equal(kept["log_likelihood"], arrays["log_likelihood"])
    assert Results("t").rows() == [] and Results("t").find(config.name) is None
    save_rows([found], "t")  # from the evidence itself: it stays
    assert Results("t").has_arrays(found)

    run_all([config], "t", workers=1, log=lines.append)
    assert Results("t").find(config.name)["finished"] > row["finished"]


def test_models_and_histories_come_from_checkpoints(project_root, config, lines, monkeypatch):
    data, svi = load_data(config), config.override(**{"model.encoder": "svi"})
    row, _ = run_all([config, svi], "t", workers=1, log=lines.append)
    model = experiment.trained(config, "t", data).model
    monkeypatch.setattr(results, "code_hash", lambda: "newer")
    monkeypatch.setattr(stored, "trained", None)
    for run in (config, svi):  # SVI has the VAE's weights
        found = model_of(run, "t", data, stored=True)
        assert type(found) is type(gpvae.build_model(run, data.shape)) and not found.training
        for a, b in zip(found.parameters(), model.parameters(), strict=True):
            assert a.equal(b)
    assert [entry["epoch"] for entry in history_of(row, "t")] == [1, 2]
    old = {k: v for k, v in row.items() if k != "history"}
    assert history_of(old, "t")[0]["valid_elbo"] == row["history"][0]["valid_elbo"]

    shutil.rmtree(paths.results("t") / "runs")
    assert model_of(config, "t", data, stored=True) is None
    assert history_of(old, "t") == []
    assert model_of(config.override(seed=9), "t", data, stored=True) is None


def failure(config, **changes):
    fields = {"name": config.name, "key": "k", "config_hash": config.hash(), "time": 2.0}
    return Failure(**{**fields, "error": "TrainingError", "message": "nan\nmore", **changes})


def test_failures_are_named_and_committed_with_the_rows(project_root, lines, nothing_trains):
    plan = gpvae.Profile("t", gpvae.RunConfig(), ("vae",), (0, 1, 2, 3), ("gaussian",))
    done, failed, other, _ = plan.runs()
    store_rows("t", [fake_row("vae", 0, [1.0])])
    for entry in (
        failure(done),  # has a row
        failure(failed, traceback="a path"),
        failure(other, config_hash="of another configuration"),
    ):
        jsonl.append(failures_path("t"), asdict(entry))
    assert keep_evidence(plan) == 1
    shutil.rmtree(paths.results("t"))
    (kept,) = stored.failures_of(plan.runs(), "t")
    assert kept == failure(failed)
    assert len(rows_of(plan.runs(), "t", stored=True, log=lines.append)) == 1
    assert lines[0] == f"failed: {failed.name}: TrainingError: nan"
    assert lines[1].startswith(f"2 of 4 runs are missing: {other.name}")
    store_rows("t", [fake_row("vae", 1, [1.0])])
    keep_evidence(plan)  # now it has a row, and nothing else failed
    assert not committed_failures_path("t").exists()


def test_a_row_that_is_not_finite_is_a_failed_run(project_root, lines, nothing_trains):
    store_rows("t", [fake_row("vae", 0, [1.0, np.nan]), fake_row("vae", 1, [1.0, 2.0])])
    wanted = gpvae.Profile("t", gpvae.RunConfig(), ("vae",), (0, 1), ("gaussian",)).runs()
    assert [r["seed"] for r in rows_of(wanted, "t", stored=True, log=lines.append)] == [1]
    line = lines[0]
    assert line.startswith(f"failed: {wanted[0].name}: TrainingError: not a finite number: log_")
