"""The benchmark's arithmetic and its rows; no clock is tested."""

from __future__ import annotations

import importlib.util
import json
import math
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import gpvae
from gpvae import cli, jsonl, paths
from gpvae.bench import choices, floor, memory, models, peers, report
from gpvae.bench.command import SECTIONS
from gpvae.bench.measure import Bench, compare, facts, missing, row, training_step
from gpvae.config import METHODS
from gpvae.results import code_hash

KEYS = set(row("section", "case"))


@pytest.fixture
def bench():
    return Bench(torch.device("cpu"), repeats=2, quick=True)


def layers(bench):
    config, pixels = bench.config().model, math.prod(bench.shape)
    return [*floor.encoder_layers(config, pixels), *floor.decoder_layers(config, pixels)]


def measured(rows):
    """Rows by case, after checks that hold for all of them."""
    rows = list(rows)
    for each in rows:
        assert each.keys() == KEYS and json.dumps(each)
        assert each["ms"] or each["value"] is not None or "not measured (" in each["note"]
        for name in ("ms", "ratio"):
            if each[name] is not None:
                assert 0 < each[f"{name}_min"] <= each[name] <= each[f"{name}_max"]
        assert each["relative_to"] == "" or each["ratio"] is not None
    return {each["case"]: each for each in rows}


def test_flops_of_a_step_are_those_that_torch_counts(bench):
    step = training_step(bench, bench.config())
    pixels = bench.images(16).pixels
    with FlopCounterMode(display=False) as counter:
        step(pixels)
    assert floor.flops(floor.step_products(layers(bench), 16)) == counter.get_total_flops()


def test_flops_and_bytes_of_the_networks_of_the_literature():
    bench = Bench(torch.device("cpu"))
    weights = 2 * (784 * 500 + 500 * 500) + 3 * 500 * 50
    products = floor.step_products(layers(bench), 128)
    assert floor.flops(products) == 2 * 128 * (3 * weights - 784 * 500)
    model = gpvae.build_model(bench.config(), bench.shape)
    parameters = sum(p.numel() for p in model.parameters())
    units = 128 * (4 * 500 + 3 * 50 + 784 - 50)
    assert floor.step_bytes(layers(bench), 128) == 32 * parameters + 20 * units + 128 * 784


def test_ratios_are_those_of_the_same_turn(bench, monkeypatch):
    seconds = {"a": [1.0, 10.0, 10.0], "b": [2.0, 30.0, 20.0]}
    monkeypatch.setattr("gpvae.bench.measure.alternate", lambda cases, *_, **__: seconds)
    monkeypatch.setattr("gpvae.bench.measure.duration", lambda case: 1.0)
    _, b = compare(
        bench, "s", {"a": print, "b": print}, "a", each={"a": 1, "b": 2}, notes={"b": "n"}
    )
    assert (b["ratio_min"], b["ratio"], b["ratio_max"]) == (1.0, 1.0, 1.5)
    assert (b["ms_min"], b["ms"], b["ms_max"]) == (1000, 10_000, 15_000)
    assert (b["turns"], b["relative_to"], b["note"]) == (3, "a", "n")


def test_a_slow_case_is_compared_apart_in_few_turns(bench, monkeypatch):
    calls = []
    monkeypatch.setattr("gpvae.bench.measure.duration", lambda case: 20.0 if case is slow else 1e-3)

    def slow():
        calls.append("slow")

    cases = {"base": lambda: calls.append("base"), "slow": slow}
    found = compare(bench, "s", cases, "base")
    assert calls == ["base"] * 3 + ["base", "slow"]
    assert [each["turns"] for each in found] == [2, 1]


def test_floor(bench):
    found = measured(floor.floor(bench))
    step = found["training step, vae"]
    assert step["relative_to"] == "floor of the step" and step["ratio"] > 0
    products = found["matrix products of a step"]
    assert products["value"] == floor.flops(floor.step_products(layers(bench), 16)) / 1e9
    assert found["product 16x64x16"]["unit"] == "GFLOP/s"


def test_training_and_inference_have_every_encoder(bench):
    names = [bench.config(encoder).model.method for encoder in METHODS]
    training = list(models.training(bench))
    assert list(measured(training)) == names
    assert all(each["relative_to"] == "vae" for each in training)
    inference = list(models.inference(bench))
    assert list(measured(inference)) == [
        f"{n}, batch {b}" for b in (1, 20) for n in [*names, "savae8", "vlae1"]
    ]
    figure = report.figure([*training, *inference])
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[:5] == ["VAE", "GPVAE", "SVI", "SA-VAE 4", "SA-VAE 8"]
    marks = {(text.get_text(), text.xy[1]) for text in figure.axes[0].texts}
    assert marks == {("not measured", labels.index(name)) for name in ("SA-VAE 8", "VLAE 1")}
    vae = [row for row in inference if row["case"].startswith("vae,")]
    figure = report.figure([training[0], *vae], {"vae", "iaf4"}, "abacus")  # IAF on another device
    assert [(text.get_text(), text.xy[1]) for text in figure.axes[1].texts] == [("not measured", 1)]


def test_the_compiled_variant_calls_what_was_compiled(bench, monkeypatch):
    calls = []

    def compiled(function):
        return lambda *arguments: calls.append(1) or function(*arguments)

    monkeypatch.setattr(torch, "compile", compiled)
    choices.compiled(bench)()
    assert len(calls) == bench.steps


def test_a_recursive_mixture_is_measured_with_all_its_components(bench):
    step = training_step(bench, bench.config("rme"))
    assert step.model.encoder.active == bench.config().model.mixture.components
    assert not step.model.fitting


def test_capture_seeds_and_likelihood(bench):
    capture = measured(models.capture(bench))
    assert capture["gpvae captured"]["note"] == "not measured (needs a GPU)"
    assert capture["gpvae eager"]["value"] > capture["vae eager"]["value"] > 100
    assert measured(models.seeds(bench))["vae, 2 seeds at once"]["relative_to"] == "vae, one seed"
    found = measured(floor.likelihood(bench))
    assert found["gpvae, bernoulli"]["relative_to"] == "decoder's matrix products"
    assert "extrapolated" in found["gpvae, bernoulli"]["unit"]


def test_precision_and_variants(bench):
    found = measured(choices.precision(bench))
    assert found["vae, tf32"]["note"] == "not measured (needs a GPU)"
    effect = found["gpvae, bfloat16 - float32, log p(x)"]
    assert math.isfinite(effect["value"]) and "2 seeds" in effect["note"]
    found = measured(choices.variants(bench))
    assert {choices.NAIVE, choices.DEFAULT, "default, bfloat16"} <= found.keys()
    assert found["default, torch.compile"]["note"] == "not measured (asked for by --compile)"


def test_without_pythae_nothing_is_measured(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "pythae", None)
    (only,) = peers.pythae(bench)
    assert "not measured (pythae" in only["note"]


@pytest.mark.skipif(importlib.util.find_spec("pythae") is None, reason="pythae is not installed")
def test_pythae_computes_the_same_loss(bench):
    losses = [each["value"] for each in peers.pythae(bench)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_memory_of_a_fresh_process(bench):
    assert memory.in_process(bench, "vae", 50) > 0
    rows = [memory.peak("vae, training", 3 * 2**20, "allocated")]
    assert measured(rows)["vae, training"]["value"] == 3


def test_missing_rows_say_why(bench):
    assert measured([missing("capture", "vae", "no GPU")])["vae"]["note"] == "not measured (no GPU)"
    assert "no GPU" in report.format_row(missing("capture", "vae", "no GPU"))


def run(*arguments):
    return cli.main(["bench", "--device", "cpu", *arguments])


def test_command_prints(project_root, capsys, monkeypatch):
    monkeypatch.setattr("gpvae.bench.models.METHODS", ("vae", "gpvae"))
    assert run("--quick", "--repeats", "1", "--only", "training", "inference") == 0
    out = capsys.readouterr().out
    assert "numbers mean nothing" in out and "gpvae" in out
    assert not paths.figures("bench").exists()


def test_rows_table_and_figure_are_saved(project_root, bench, monkeypatch):
    monkeypatch.setattr("gpvae.bench.models.METHODS", ("vae", "gpvae"))
    rows = [*models.training(bench), *models.inference(bench)]
    folder = report.save(rows, facts(bench))
    assert {p.name for p in folder.iterdir()} == {
        "rows.jsonl", "speed.csv", "speed.md", "speed_cpu.pdf", "speed_cpu.png",
    }  # fmt: skip
    rows = jsonl.read(folder / "rows.jsonl")
    assert all(each.keys() == KEYS | {"facts"} for each in rows)
    assert rows[0]["facts"]["versions"]["torch"] == torch.__version__
    assert rows[0]["facts"]["code_hash"] == code_hash()
    assert len((folder / "speed.md").read_text().splitlines()) == len(rows) + 2


def test_a_section_that_fails_keeps_the_earlier_ones(project_root, monkeypatch):
    def fails(bench):
        yield row("memory", "half a section", value=1.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(memory, "memory", fails)
    monkeypatch.setattr(floor, "floor", lambda bench: [row("floor", "x", value=2.0)])
    assert run("--only", "floor", "memory", "--save") == 130
    rows = jsonl.read(paths.figures("bench") / "rows.jsonl")
    assert [each["case"] for each in rows] == ["x"]


def test_saving_keeps_what_was_not_measured_now(project_root, bench):
    old, here = facts(bench) | {"device": "some GPU"}, facts(bench)
    report.save([row("memory", "x", value=1.0), row("floor", "y", value=1.0)], old)
    report.save([row("memory", "x", value=2.0), row("floor", "y", value=2.0)], here)
    report.save([row("memory", "x", value=3.0)], here)
    rows = jsonl.read(paths.figures("bench") / "rows.jsonl")
    found = [(r["facts"]["device"], r["case"], r["value"]) for r in rows]
    assert sorted(found) == [
        ("cpu", "x", 3.0),
        ("cpu", "y", 2.0),
        ("some GPU", "x", 1.0),
        ("some GPU", "y", 1.0),
    ]
    assert not list(paths.figures("bench").glob("*.png"))  # nothing to draw


@pytest.mark.parametrize(
    "arguments",
    [
        ["--only", "speed"],
        ["--repeats", "0"],
        ["--threads", "x"],
        ["--device", "tpu"],
        ["--quick", "--save"],  # its numbers are no evidence
    ],
)
def test_misuse(arguments, capsys):
    try:
        code = cli.main(["bench", *arguments])
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    assert "error: " in capsys.readouterr().err


def test_sections_exist():
    for name, module in SECTIONS.items():
        assert callable(getattr(importlib.import_module(module), name))


def test_numbers_keep_three_digits():
    given = (12345.6, 12.34, 1.234, 0.01234, 0)
    assert [report.number(v) for v in given] == ["12,346", "12.3", "1.23", "0.0123", "0"]
