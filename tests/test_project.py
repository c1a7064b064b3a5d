"""The project as a whole: versions, dependencies of an import, README and layout."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib import import_module

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import gpvae
from gpvae import jsonl, paths
from gpvae.analysis import search_table
from gpvae.config import METHODS
from gpvae.tables import LABELS

ROOT = paths.CHECKOUT
README = (ROOT / "README.md").read_text("utf-8")
TEXTS = {ROOT: README, ROOT / "figures": (ROOT / "figures" / "README.md").read_text("utf-8")}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def pins():
    """Package -> exact version in environment.yml."""
    text = (ROOT / "environment.yml").read_text("utf-8")
    return dict(re.findall(r"^ +- ([\w-]+)==([\w.]+)$", text, re.M))


def ranges():
    """Package -> allowed versions in pyproject.toml."""
    optional = [r for group in PYPROJECT["optional-dependencies"].values() for r in group]
    found = [Requirement(text) for text in PYPROJECT["dependencies"] + optional]
    return {r.name: r.specifier for r in found}


def test_environment_pins_every_dependency_within_its_range():
    assert pins().keys() == ranges().keys()
    for name, version in pins().items():
        assert version in ranges()[name], name


def test_every_range_is_capped():
    for name, specifier in ranges().items():
        assert any(s.operator in ("<", "==") for s in specifier), name


def test_python_version_agrees():
    text = (ROOT / "environment.yml").read_text("utf-8")
    version = re.search(r"- python=([\d.]+)", text)[1]
    assert version in SpecifierSet(PYPROJECT["requires-python"])


@pytest.mark.parametrize(
    "command",
    [
        "pip install -e . && gpvae reproduce",
        'pip install -e ".[test]" && pytest',
        "conda env create -f environment.yml",
    ],
)
def test_readme_shows_the_commands(command):
    assert re.search(rf"^{re.escape(command)}", README, re.M)


def headings(text):
    """The anchors of a text's headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in found}


@pytest.mark.parametrize("folder", TEXTS, ids=lambda folder: folder.name)
def test_readme_links_exist(folder):
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", TEXTS[folder]):
        if target.startswith("http"):
            continue
        assert (folder / target).exists(), target
        if anchor:
            text = (folder / target).read_text("utf-8") if target else TEXTS[folder]
            assert anchor in headings(text), anchor


def test_readme_examples_run_and_names_exist(project_root):
    """The second one is in `test_plugins`."""
    model, _, tables = re.findall(r"```python\n(.*?)```", README, re.S)
    scope: dict[str, object] = {}
    exec(tables, scope)
    assert scope["difference"].n == 2 and len(scope["table"]) == 4
    scope = {}
    exec(model.replace('"training.epochs": 100', '"training.epochs": 2'), scope)
    assert scope["posterior"].scores()["relative_f_var"].shape == (len(scope["x"]),)
    for name in re.findall(r"`gpvae\.([\w.]+?)(?:\(|`)", README):
        target: object = gpvae
        for part in name.split("."):
            if not hasattr(target, part):
                import_module(f"{target.__name__}.{part}")
            target = getattr(target, part)


@pytest.mark.parametrize(("folder", "least"), [*zip(TEXTS, (8, 80), strict=True)])
def test_every_interval_stands_in_a_table_that_its_part_links(folder, least):
    """Parts end at headings; a number with its sign has to be a whole cell or word of a table."""
    count = 0
    for part in re.split(r"^#+ ", TEXTS[folder], flags=re.M):
        links = re.findall(r"\]\(((?:figures/)?\w[^)]+)\.(?:md|png)\)", part)
        part = " ".join(part.split())
        paths_ = [folder / f"{link}.md" for link in links]
        tables = "\n".join(path.read_text("utf-8") for path in paths_ if path.exists())
        for text in re.findall(r"[+−-]?\d+(?:\.\d+)? \[[^\]a-z(]+\]", part):
            assert re.search(rf"(?<![\w.+-]){re.escape(text)}", tables), (part[:40], text)
            count += 1
    assert count >= least


@pytest.mark.parametrize("name", ["cpu/mnist", "rivals"])
def test_settings_are_what_the_committed_search_chose(name):
    plan, encoders = gpvae.get_profile(name), {label: key for key, label in LABELS.items()}
    rows = jsonl.read(ROOT / "figures" / name / "rows.jsonl")
    lines = search_table(plan, rows, ()).to_dict("records")
    assert len(lines) == len(METHODS[1:]) * len({line["output"] for line in lines})
    for line in lines:
        settings = plan.settings.get((encoders[line["method"]], line["output"]), {})
        expected = ", ".join(f"{key.split('.', 1)[1]} = {v}" for key, v in settings.items())
        assert line["chosen"] == (expected or "as it was"), line


def test_readme_names_every_command_that_exists():
    for name in re.findall(r"`gpvae (\w+)", README):
        done = subprocess.run(
            [sys.executable, "-m", "gpvae", name, "--help"], capture_output=True, text=True
        )
        assert done.returncode == 0, name


def test_import_and_training_need_neither_jupyter_nor_papermill_nor_plots():
    code = """
import sys
for name in ("papermill", "nbformat", "nbclient", "IPython", "ipykernel", "jupyter_client",
             "jupyterlab", "matplotlib", "seaborn"):
    sys.modules[name] = None
import gpvae
config = gpvae.get_profile("smoke").base.override(**{"training.epochs": 1})
data = gpvae.load_dataset("digits", train_size=64)
print(gpvae.train(config, data).best_valid_elbo)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0


def test_help_does_not_import_torch():
    code = (
        "import sys; from gpvae.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_resolve():
    for name in gpvae.__all__:
        getattr(gpvae, name)
    with pytest.raises(AttributeError, match="gpvea"):
        _ = gpvae.gpvea


def test_train_command_prints_and_stores(project_root):
    command = [sys.executable, "-m", "gpvae", "train", "--profile", "smoke", "--encoder", "gpvae"]
    command += ["--set", "training.epochs=2", "evaluation.gaps=false"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    row = json.loads((project_root / "results/single/rows.jsonl").read_text())
    assert row["config"]["model"]["encoder"] == "gpvae"
    assert f"own proposal: {row['log_likelihood']['mean']:.2f}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--encoder", "gpvea"], "Did you mean 'gpvae'"),
        (["--encoder", "gpvae", "--set", "model.encoder=vae"], "as 'gpvae' and as 'vae'"),
        (["--set", "self=1"], "unknown configuration key"),
        (["--dataset", "digit"], "Did you mean 'digits'"),
        (["--set", "model.latent=3"], "Did you mean 'model.latent_dim'"),
        (["--set", "training.epochs=many"], "expected int"),
        (["--profile", "smok"], "Did you mean 'smoke'"),
    ],
)
def test_misuse_of_train_is_one_line_and_exit_code_2(project_root, arguments, message):
    done = subprocess.run(
        [sys.executable, "-m", "gpvae", "train", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("gpvae: error: ") and message in done.stderr
    assert "Traceback" not in done.stderr


def test_modules_and_names_are_found_and_listed():
    assert gpvae.ais.__name__ == "gpvae.ais" and {"ais", "train", "VAE"} <= set(dir(gpvae))
    with pytest.raises(AttributeError, match="Did you mean 'log_likelihood'"):
        _ = gpvae.log_liklihood
    assert not hasattr(gpvae, "nothing")


@pytest.mark.parametrize("rows", sorted((ROOT / "figures").glob("**/rows.jsonl")), ids=str)
def test_committed_arrays_are_those_of_the_committed_rows(rows):
    """Every row has its own, and none is left of rows that were made again."""
    names = {f"{row['name']}-{row['key']}.npz" for row in jsonl.read(rows) if "name" in row}
    folder = rows.parent / "arrays"
    assert {path.name for path in folder.glob("*")} == names
