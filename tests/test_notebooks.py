"""The committed notebooks: clean sources, and a whole run of them in smoke mode."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time

import matplotlib.image
import nbformat
import numpy as np
import pytest

from gpvae import paths
from gpvae.notebooks import find_notebooks

NOTEBOOKS = [notebook.path for notebook in find_notebooks(paths.notebooks())]
# The smoke profile has no other numbers of steps and no outliers; an empty folder has no bench rows
# and no committed evidence.
NOT_IN_SMOKE = {
    "04_search",
    "04_search_shared",
    "04_steps",
    "03_outliers",
    "04_cost_front",
    "06_ranks",
    "06_summary",
    "06_against",
    "06_literature",
}
README = (paths.CHECKOUT / "README.md").read_text("utf-8")


def mapped_outputs():
    """Notebook -> names of its figures and tables, from the README's map."""
    found = {}
    for line in README.splitlines():
        if match := re.match(r"\| \[`(\d\d_\w+)`\]", line):
            found[match[1]] = set(re.findall(r"`(\d\d_\w+)`", line)) - {match[1]}
    return found


def test_notebooks_are_found_and_mapped():
    assert len(NOTEBOOKS) >= 4
    assert [path.stem for path in NOTEBOOKS] == list(mapped_outputs())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_source_is_clean(path):
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    assert book.metadata.kernelspec.name == "python3"
    assert "papermill" not in book.metadata
    for cell in book.cells:
        assert "papermill" not in cell.metadata and "execution" not in cell.metadata
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_first_cell_says_what_a_reader_needs(path):
    first = nbformat.read(path, as_version=4).cells[0]
    assert first.cell_type == "markdown"
    for word in ("Question", "Paper section", "Cost", "Inputs", "Outputs"):
        assert word in first.source, word
    named = set(re.findall(r"`(\d\d_\w+)`", first.source))
    assert named == mapped_outputs()[path.stem], "outputs named here and in the README differ"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_parameters_are_plain_literals(path):
    (cell,) = [
        cell
        for cell in nbformat.read(path, as_version=4).cells
        if "parameters" in cell.metadata.get("tags", [])
    ]
    for statement in ast.parse(cell.source).body:
        assert isinstance(statement, ast.Assign)
        ast.literal_eval(statement.value)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_prose_and_code_are_balanced(path):
    cells = nbformat.read(path, as_version=4).cells
    prose = sum(len(c.source) for c in cells if c.cell_type == "markdown")
    code = sum(len(c.source) for c in cells if c.cell_type == "code")
    assert 0.2 < prose / (prose + code) < 0.8


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One run of everything, as a user starts it, from some other folder."""
    folder = tmp_path_factory.mktemp("smoke")
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-m", "gpvae", "reproduce", "--profile", "smoke"],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "GPVAE_ROOT": str(folder)},
        timeout=600,
    )
    print(f"smoke run: {time.monotonic() - started:.0f} s\n{result.stdout}{result.stderr}")
    return folder, result


def test_every_notebook_runs(smoke):
    folder, result = smoke
    assert result.returncode == 0, result.stdout + result.stderr
    for path in NOTEBOOKS:
        assert re.search(rf"{path.stem} .*ok", result.stdout)
        assert (folder / "results/smoke/notebooks" / path.name).exists()
    assert re.search(r"rows: \d+ made", result.stdout)


def test_figures_and_tables_are_those_of_the_readme(smoke):
    made = {path.stem for path in (smoke[0] / "figures/smoke").iterdir()}
    assert made - {"rows", "arrays"} == set().union(*mapped_outputs().values()) - NOT_IN_SMOKE
    rows = [
        json.loads(line) for line in (smoke[0] / "figures/smoke/rows.jsonl").open(encoding="utf-8")
    ]
    assert len({row["name"] for row in rows}) == len(rows) >= 8
    arrays = list((smoke[0] / "figures/smoke/arrays").glob("*.npz"))
    assert len(arrays) == len(rows)
    assert sum(path.stat().st_size for path in arrays) < 1e6


def test_figures_are_not_blank(smoke):
    images = sorted((smoke[0] / "figures/smoke").glob("*.png"))
    assert len(images) >= 10
    for path in images:
        pixels = matplotlib.image.imread(path)[..., :3]
        ink = (pixels < 0.9).any(-1)
        assert 0.005 < ink.mean() < 0.8, path.name
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10, path.name
        assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")


def test_second_run_reuses_rows_and_repeats_figures_bit_for_bit(smoke):
    folder, _ = smoke
    names = ["02_learning_curves", "04_differences"]
    files = [folder / f"figures/smoke/{n}.{kind}" for n in names for kind in ("png", "pdf")]
    before = [path.read_bytes() for path in files]
    result = subprocess.run(
        [sys.executable, "-m", "gpvae", "reproduce", "--profile", "smoke", "--only", "02,04"],
        capture_output=True,
        text=True,
        env={**os.environ, "GPVAE_ROOT": str(folder)},
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"rows: \d+ reused$", result.stdout, re.M)
    assert "recomputed" not in result.stdout
    assert [path.read_bytes() for path in files] == before


def test_everything_is_drawn_from_committed_evidence_alone(smoke, tmp_path):
    """With `stored=True` and no results: the same figures and tables, and nothing is trained."""
    evidence = tmp_path / "figures/smoke"
    evidence.mkdir(parents=True)
    shutil.copy(smoke[0] / "figures/smoke/rows.jsonl", evidence)
    shutil.copytree(smoke[0] / "figures/smoke/arrays", evidence / "arrays")
    command = "reproduce --profile smoke --only 02,03,04 -p stored=True"
    result = subprocess.run(
        [sys.executable, "-m", "gpvae", *command.split()],
        capture_output=True,
        text=True,
        env={**os.environ, "GPVAE_ROOT": str(tmp_path)},
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"rows: \d+ reused$", result.stdout, re.M)
    assert not re.search(r"rows: .*(made|recomputed)", result.stdout)
    assert not (tmp_path / "results/smoke/runs").exists()
    needs_models = {"02_reconstructions", "02_samples"}
    text = (tmp_path / "results/smoke/notebooks/02_training.ipynb").read_text("utf-8")
    assert "skipped, since no trained model is stored" in text
    compared = 0
    for path in (smoke[0] / "figures/smoke").iterdir():
        if re.match("0[234]_", path.name) and path.stem not in needs_models:
            assert (evidence / path.name).read_bytes() == path.read_bytes(), path.name
            compared += 1
    assert compared >= 20
