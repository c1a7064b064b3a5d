"""Ranks over data sets, costs and fronts from numbers whose answer is known."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from rows import fake_row, store_rows

import gpvae
from gpvae import comparison
from gpvae.errors import DataError
from gpvae.results import Results
from gpvae.stats import Interval
from gpvae.tables import save_rows


def block(**values):
    return values


def test_ranks_and_critical_difference_of_a_worked_example():
    """Five methods, ten blocks: Nemenyi's q is 2.728 (Demsar, 2006, table 5)."""
    methods = ("vae", "gpvae", "iaf", "hf", "me")
    same = dict(zip(methods, (1.0, 2.0, 3.0, 4.0, 5.0), strict=True))
    found = comparison.ranking({f"b{i}": same for i in range(10)})
    assert found.ranks == {"vae": 1, "gpvae": 2, "iaf": 3, "hf": 4, "me": 5}
    assert found.difference == pytest.approx(2.728 * np.sqrt(5 * 6 / (6 * 10)), abs=2e-3)
    assert len(found.blocks) == 10 and found.p < 1e-4 and found.differs
    # 2 or more apart; neighbours are 1 apart
    far = {"vae": ["iaf", "hf", "me"], "gpvae": ["hf", "me"], "iaf": ["me"]}
    assert found.apart() == [(a, b) for a, others in far.items() for b in others]
    alike = comparison.Ranking(found.ranks, found.difference, 0.05, found.blocks)
    assert not alike.differs and alike.apart() == []


def test_friedman_by_permutation_counts_the_orders_that_agree_as_much():
    """Three methods, three blocks that agree: of 6 ^ 3 orders of the blocks 6 do; with 2 blocks
    that agree and one reversed, every order but those that agree more is as far or further.
    """
    order, back = block(vae=1.0, gpvae=2.0, iaf=3.0), block(vae=3.0, gpvae=2.0, iaf=1.0)
    found = comparison.ranking({"a": order, "b": order, "c": order})
    assert found.p == pytest.approx(6 / 6**3, abs=0.004) and found.differs
    sums = [
        np.var(np.add(np.add((1, 2, 3), p), q))
        for p in permutations((1, 2, 3))
        for q in permutations((1, 2, 3))
    ]
    expected = np.mean(np.array(sums) >= np.var([5, 6, 7]) - 1e-12)
    found = comparison.ranking({"a": order, "b": order, "c": back})
    assert found.p == pytest.approx(expected, abs=0.015)


def test_only_methods_of_every_block_are_ranked():
    blocks = {
        "a": block(vae=4.0, gpvae=3.0, iaf=2.0, hf=1.0),
        "b": block(vae=3.0, gpvae=1.0, iaf=2.0),
    }
    found = comparison.ranking(blocks)
    assert found.ranks == {"gpvae": 1.5, "iaf": 1.5, "vae": 3.0} and not found.differs
    assert found.blocks["a"] == {"iaf": 1, "gpvae": 2, "vae": 3}  # without hf, which b lacks
    assert comparison.ranking({"a": blocks["a"]}) is None
    assert comparison.ranking({}) is None
    assert comparison.ranking({"a": block(vae=1.0), "b": block(vae=1.0)}) is None


def test_front_keeps_what_nothing_beats_in_both():
    def at(cost, gain):
        return cost, Interval(gain, gain, gain, 3)

    points = {"svi": at(100, 2.0), "vae": at(1, 0.0), "iaf": at(3, -1.0), "me": at(2, 1.0)}
    assert comparison.front(points) == ["vae", "me", "svi"]
    assert comparison.front({"vae": at(1, 0.0), "me": at(1, 0.5)}) == ["me"]
    assert comparison.front({}) == []


def bench_row(case, ratio, device="gpu", threads=1, code="new"):
    facts = {"device": device, "cpu": "abacus", "threads": threads, "code_hash": code}
    return {"section": "inference", "case": case, "ratio": ratio, "facts": facts}


def test_costs_are_those_of_one_image_on_one_device_with_its_threads():
    rows = [
        bench_row("vae, batch 1", 1.0, "cpu"),
        bench_row("iaf4, batch 1", 3.0, "cpu"),
        bench_row("iaf4, batch 1", 5.0, "cpu", threads=2),
        bench_row("iaf4, batch 1000", 9.0, "cpu"),
        bench_row("iaf4, batch 1", 7.0),
        bench_row("svi, batch 1", None, "cpu"),
        bench_row("vae, batch 1", 1.0) | {"section": "training"},
    ]
    one, two, gpu = comparison.devices(rows)
    assert (one, two, gpu) == ("abacus, 1 thread", "abacus, 2 threads", "gpu")
    assert comparison.costs(rows, one) == {"vae": 1.0, "iaf4": 3.0}
    assert comparison.costs(rows, two) == {"iaf4": 5.0}
    assert comparison.costs(rows, gpu) == {"iaf4": 7.0}


def test_versions_of_times_are_those_of_one_device_and_of_inference():
    rows = [
        bench_row("vae, batch 1", 1.0),
        bench_row("vae, batch 1", 1.0, code="old") | {"section": "training"},
        bench_row("vae, batch 1", 1.0, "cpu", code="old"),
    ]
    assert comparison.timed_versions(rows, "gpu") == {"new"}
    assert comparison.timed_versions(rows, "abacus, 1 thread") == {"old"}


def test_bounds_go_with_the_cost_of_their_number_of_steps(project_root):
    rows = {e: [fake_row(e, s, [1.0 + (e == "iaf"), 2.0]) for s in (0, 1)] for e in ("vae", "iaf")}
    store = store_rows("t", [*rows["vae"], *rows["iaf"]])
    steps = gpvae.RunConfig().model.flow.steps
    found = comparison.bounds_and_costs(store, rows, {"vae": 1.0, f"iaf{steps}": 4.0})
    assert found["iaf"][0] == 4.0 and found["iaf"][1].value == pytest.approx(0.5)
    assert "iaf" not in comparison.bounds_and_costs(store, rows, {"vae": 1.0, "iaf99": 4.0})


def rivals(output, missing=()):
    """Rows of every run of the profile `rivals`: the later in the table, the better."""
    runs = gpvae.get_profile("rivals").runs(output)
    order = list(dict.fromkeys(run.model.encoder for run in runs))
    return [
        fake_row(run.model.encoder, run.seed, [order.index(run.model.encoder), 2.0])
        | {"name": run.name, "config": run.to_dict()}
        for run in runs
        if (run.model.encoder, run.seed) not in missing
    ]


def test_outputs_of_a_data_set_are_one_block_and_incomplete_ones_none(project_root):
    profile = gpvae.get_profile("rivals")
    worst_first = list(profile.encoders)
    store_rows("rivals", rivals("gaussian"))
    (block,) = comparison.blocks([profile], "log_likelihood").values()
    assert sorted(block, key=block.get, reverse=True) == worst_first
    assert block["vlae"] == 1 and block["vae"] == len(worst_first)
    store_rows("rivals", rivals("bernoulli", missing={("iaf", 2)}))  # changes nothing
    found = comparison.blocks([profile], "log_likelihood")
    assert found == {"digits (gaussian, D = 10)": block}


@pytest.mark.parametrize(
    ("other", "part"), [("d50", "gaussian, D = 50"), ("long", "gaussian, D = 20, 120 epochs")]
)
def test_dimensions_and_budgets_of_a_data_set_are_one_block(project_root, other, part):
    plans = [gpvae.get_profile(f"cpu/{name}") for name in ("mnist", f"mnist-{other}")]
    for profile, sign in zip(plans, (1, -1), strict=True):
        order = list(profile.encoders)
        rows = [
            fake_row(run.model.encoder, run.seed, [sign * order.index(run.model.encoder), 2.0])
            | {"name": run.name, "config": run.to_dict()}
            for run in profile.runs("gaussian")
        ]
        store_rows(profile.name, rows)
    ((name, block),) = comparison.blocks(plans, "log_likelihood").items()
    assert name == f"MNIST (gaussian, D = 20; {part})"
    middle = (len(block) + 1) / 2  # the order of one profile is that of the other, reversed
    assert block == dict.fromkeys(plans[0].encoders, middle)


def test_blocks_of_several_versions_are_refused(project_root):
    rows = rivals("gaussian")
    rows[0]["code_hash"] = "other"
    store_rows("rivals", rows)
    with pytest.raises(DataError, match="code_hash"):
        comparison.blocks([gpvae.get_profile("rivals")], "log_likelihood")


def test_evidence_is_that_of_the_committed_profiles_with_every_method(project_root):
    assert comparison.evidence_profiles() == []
    for name in ("rivals", "cpu/frey", "digits", "regimes"):
        store_rows(name, [fake_row("vae", 0, [1.0])])
        save_rows(Results(name).rows(), name)
    assert [plan.name for plan in comparison.evidence_profiles()] == ["rivals", "cpu/frey"]
