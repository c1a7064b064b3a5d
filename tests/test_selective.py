"""Selective refinement of images whose gains are known."""

from __future__ import annotations

import numpy as np
import pytest
from rows import fake_row, store_rows

from gpvae.difficulty import SCORE
from gpvae.selective import Refinement, budget_table, refinement_table


def refined(seed, score, count=4):
    """A row of GPVAE whose image i gains i / 10 in the first step and as much in the second."""
    steps = np.array([0.0, 1.0, 2.0])
    bounds = np.array([-1.0] * count) + steps[:, None] * np.arange(count) / 10
    arrays = {"refine_steps": steps, "refine_bounds": bounds, "refine_ranking": bounds}
    row = fake_row("gpvae", seed, np.zeros(count))
    store = store_rows("t", [row], **arrays, **{SCORE: np.asarray(score, float)})
    return store, row


def test_a_score_that_knows_the_gain_is_the_oracle_and_its_reverse_loses(project_root):
    store, good = refined(0, [0, 1, 2, 3])
    _, bad = refined(1, [3, 2, 1, 0])
    best, worst = Refinement(store, [good]), Refinement(store, [bad])
    assert best.choices == {"1 step": 1, "2 steps": 2}
    for each in best.choices.values():
        assert best.areas(SCORE, each) == best.areas("oracle", each)
        assert best.difference(SCORE, "random", each).value > 0
        assert worst.difference(SCORE, "random", each).value < 0
        assert best.areas("none", each) == [0.0]
    # Half of the budget of one step: the two images that gain most, of a total of 0.6 / 4.
    assert best.gains(SCORE, 1, 0.5) == pytest.approx([0.5 / 4])
    assert best.gains("random", 1, 0.5) == pytest.approx([0.3 / 4])
    # Each step gains as much as the one before: two steps for the best image, or one for two.
    steps, gain = best.best_use(SCORE, 0.5)
    assert (steps, gain.value) == (2, pytest.approx(0.6 / 4))
    assert best.best_use("uniform", 0.5) is None
    assert best.best_use("uniform", 2.0)[0] == 2 and best.best_use(SCORE, 2.0)[0] == 2
    table = budget_table({"gaussian": best}, (0.5, 1.0))
    assert list(table["steps per image"]) == ["0.5"] * 3 + ["1"] * 4
    assert list(table.policy[:3]) == ["Var f / E h²", "random", "−ELBO"]  # whose bounds are equal
    assert best.best(1) == [SCORE]
    assert worst.best(1) == ["uniform", "random"]  # the same where everybody gets one step


def test_refinement_is_averaged_over_seeds_and_tabulated(project_root):
    store, good = refined(0, [0, 1, 2, 3])
    _, bad = refined(1, [3, 2, 1, 0])
    both = Refinement(store, [good, bad])
    cost, bound = both.curve(SCORE, 1)
    np.testing.assert_allclose(cost, np.linspace(0, 1, 5))
    np.testing.assert_allclose(bound, both.curve("random", 1)[1])  # the two scores cancel
    table = refinement_table({"gaussian": both})
    assert list(table.columns[:3]) == ["output", "a selected image gets", "policy"]
    assert len(table) == 2 * 8
    difference = table[table.policy == "Var f / E h² − (−ELBO)"].iloc[:, -1]
    assert all(text.startswith(("+", "-")) for text in difference)


def test_a_model_without_a_recorded_study_has_no_refinement(project_root):
    row = fake_row("vae", 0, [1.0])
    refinement = Refinement(store_rows("t", [row]), [row])
    assert refinement.studies == [] and refinement.choices == {}
    for table in (refinement_table, budget_table):
        (line,) = table({"gaussian": refinement}).to_dict("records")
        assert line.pop("output") == "gaussian" and set(line.values()) == {"missing"}
    store, good = refined(0, [0, 1, 2, 3])
    both = {"gaussian": refinement, "bernoulli": Refinement(store, [good])}
    for table in (refinement_table, budget_table):
        assert list(table(both).columns) == list(table({"bernoulli": both["bernoulli"]}).columns)
