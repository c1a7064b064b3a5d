"""The training step: schedules, averages, what a CUDA graph needs of it, and that graphs change
nothing.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpvae import full_gaussian, savae, step, vlae
from gpvae.checkpoint import State
from gpvae.ensemble import batchable, train_seeds
from gpvae.seed_step import SeedStep, Stacked
from gpvae.step import (
    EAGER_STEPS,
    Captured,
    Step,
    compiles,
    learning_rate,
    swapped,
    weighted_sum,
)
from gpvae.training import MODELS, build_model, train

BATCHED = [name for name in sorted(MODELS) if name not in ("rme", "savae", "vlae")]
SHAPE = (1, 4, 4)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def adam(parameters, rate=1e-3):
    return torch.optim.Adam(parameters, lr=rate, fused=True)


def make_step(config, average=True):
    """A step of a fresh model, with averages on request."""
    model = build_model(config, SHAPE).train()
    averages = [p.detach().clone() for p in model.parameters()] if average else []
    generator = torch.Generator().manual_seed(0)
    return Step(model, adam(model.parameters()), config, 17, 100, generator, averages)


def make_seed_step(config, seeds=(0, 1)):
    """The step of one fresh model for each seed."""
    stacked = Stacked([build_model(config.override(seed=s), SHAPE).train() for s in seeds])
    parameters = list(stacked.parameters.values())
    averages = [p.detach().clone() for p in parameters]
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    return SeedStep(stacked, adam(parameters), config, 17, 100, generators, averages)


def pixels(*lead):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 17, (*lead, *SHAPE), generator=generator, dtype=torch.uint8)


@pytest.fixture
def scheduled(tiny_config):
    """Everything that a schedule can do."""
    return tiny_config.override(
        **{
            "model.flow.hidden": 6,
            "model.flow.context": 4,
            "training.schedule": "cosine",
            "training.kl_warmup": 4,
            "training.average": 0.9,
        }
    )


def test_learning_rates():
    constant = [learning_rate(e, 10, "constant", 0.5) for e in (0, 5, 9)]
    assert constant == [0.5, 0.5, 0.5]
    cosine = [learning_rate(e, 4, "cosine", 1.0) for e in range(4)]
    assert cosine == pytest.approx([1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2])


@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_optimiser_gets_the_rate_and_the_kl_its_weight(scheduled, as_tensor):
    taken = make_step(scheduled)
    (group,) = taken.optimizer.param_groups
    if as_tensor:  # as for capture, where it must stay in place
        group["lr"] = place = torch.tensor(group["lr"])
    weights = []
    for epoch in range(6):
        taken.start_epoch(epoch, 6, new_phase=epoch == 0)
        expected = learning_rate(epoch, 6, "cosine", scheduled.training.learning_rate)
        assert float(group["lr"]) == pytest.approx(expected)
        weights.append(float(taken.kl_weight))
    assert weights == [0.25, 0.5, 0.75, 1, 1, 1]
    assert not as_tensor or group["lr"] is place


def test_without_warmup_the_weight_of_the_kl_is_one(tiny_config):
    taken = make_step(tiny_config)
    taken.start_epoch(0, 6, new_phase=True)
    assert float(taken.kl_weight) == 1


def test_the_kl_alone_is_weighted():
    terms = {name: torch.tensor(value) for name, value in zip("abc", (1.0, 2.0, 4.0), strict=True)}
    terms["kl"] = terms.pop("b")
    assert float(weighted_sum(terms, torch.tensor(0.25))) == 5.5
    assert float(weighted_sum(terms, None)) == 7


def test_gradient_is_that_of_the_weighted_loss(scheduled):
    taken = make_step(scheduled.override(**{"training.clip_norm": 1e9}))
    taken.start_epoch(0, 6, new_phase=True)
    model = copy.deepcopy(taken.model)
    taken.eager(pixels(5))
    terms = model.loss_terms(pixels(5) / 16, 100, torch.Generator().manual_seed(0))
    (terms["reconstruction"] + 0.25 * terms["kl"] + terms["weight_kl"]).backward()
    for ours, theirs in zip(taken.parameters, model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_averages_start_anew_with_a_phase(scheduled):
    """RME goes on from other weights there, of which the old averages know nothing."""
    taken = make_step(scheduled)
    with torch.no_grad():
        for p in taken.parameters:
            p.add_(1)
    taken.start_epoch(2, 6, new_phase=False)
    pairs = list(zip(taken.averages, taken.parameters, strict=True))
    assert not any(torch.equal(average, p) for average, p in pairs)
    taken.start_epoch(3, 6, new_phase=True)
    assert all(torch.equal(average, p) for average, p in pairs)


def test_moving_average_is_its_recursion(scheduled):
    taken = make_step(scheduled)
    taken.start_epoch(0, 6, new_phase=True)
    expected = [p.detach().clone() for p in taken.parameters]
    for average, p in zip(taken.averages, taken.parameters, strict=True):
        assert torch.equal(average, p)
    for _ in range(5):
        taken(pixels(5))
        pairs = zip(expected, taken.parameters, strict=True)
        expected = [0.9 * a + 0.1 * p.detach() for a, p in pairs]
    for average, value, p in zip(taken.averages, expected, taken.parameters, strict=True):
        torch.testing.assert_close(average, value)
        assert not torch.equal(average, p)
        assert not average.requires_grad  # or every step would add to one endless graph


def test_swapped_restores_even_after_an_error():
    parameter, value = torch.nn.Parameter(torch.ones(2)), torch.full((2,), 3.0)
    with pytest.raises(KeyError), swapped([parameter], [value]):
        assert torch.equal(parameter, value)
        raise KeyError
    assert torch.equal(parameter, torch.ones(2))
    with swapped([parameter], []):
        assert torch.equal(parameter, torch.ones(2))


@pytest.mark.parametrize("encoder", ["vae", "gpvae"])
def test_resumed_run_with_schedules_ends_with_the_same_bits(
    scheduled, blobs, tmp_path, monkeypatch, encoder
):
    config = scheduled.override(**{"model.encoder": encoder, "training.kl_warmup": 3})
    whole = train(config, blobs, tmp_path / "whole")
    original = State.save

    def save_then_die(self, folder, config):
        original(self, folder, config)
        if self.epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(State, "save", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        train(config, blobs, tmp_path / "cut")
    monkeypatch.undo()
    resumed = train(config, blobs, tmp_path / "cut")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name])
    assert [r["valid_elbo"] for r in whole.history] == [r["valid_elbo"] for r in resumed.history]


class Replayed:
    """A graph without a GPU."""

    def __init__(self, function, place, result):
        self.function, self.place, self.result = function, place, result

    def replay(self):
        self.result.copy_(self.function(self.place))


def test_capture_comes_after_the_eager_steps_of_a_shape_and_results_are_copies(monkeypatch):
    eager, captured = [], []

    def aside(self, argument):
        eager.append(tuple(argument.shape))
        return self.function(argument)

    def capture(self, argument):
        captured.append(tuple(argument.shape))
        place, result = argument.clone(), torch.empty_like(argument)
        return Replayed(self.function, place, result), place, result

    monkeypatch.setattr(Captured, "_aside", aside)
    monkeypatch.setattr(Captured, "_capture", capture)
    double = Captured(lambda x: 2 * x, torch.Generator(), torch.Generator())
    results = [double(torch.full((2,), float(i))) for i in range(EAGER_STEPS + 2)]
    assert eager == [(2,)] * EAGER_STEPS and captured == [(2,)]
    assert [float(r[0]) for r in results] == [2.0 * i for i in range(EAGER_STEPS + 2)]
    double(torch.ones(3))
    assert eager[-1] == (3,) and captured == [(2,)]
    assert float(double(torch.ones(2))[0]) == 2 and captured == [(2,)]
    assert len(double.generators) == 2


aten = torch.ops.aten
LOOKS = {aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.nonzero, aten.equal}
LOOKS |= {aten.masked_select, aten.lift_fresh}  # the latter is torch.tensor(number)
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class Waiting(AssertionError):
    """Something for which the host would wait, or that a CUDA graph cannot hold."""


class NoWaiting(TorchDispatchMode):
    """Refuses to look at numbers, shapes that depend on numbers, and copies between devices."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [v for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
        masks = [v for v in tensors[1:] if v.dtype in (torch.bool, torch.uint8)]
        packet = function.overloadpacket
        if packet in LOOKS or (packet in INDEXING and masks):
            raise Waiting(str(function))
        result = function(*args, **(kwargs or {}))
        made = [v for v in tree_leaves(result) if isinstance(v, torch.Tensor)]
        # Forward mode compares layouts on the meta device, which holds no numbers, by `aten.to`.
        if packet is not aten.to and len({v.device for v in tensors + made}) > 1:
            raise Waiting(f"{function} between devices")
        return result


@pytest.mark.parametrize(
    "wait",
    [
        float,
        bool,
        torch.nonzero,
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: torch.equal(x, x),
        lambda x: x.to("meta"),
        lambda x: x + torch.tensor(1.0),
    ],
)
def test_what_makes_the_host_wait_is_noticed(wait):
    with pytest.raises(Waiting), NoWaiting():
        wait(torch.ones(1))


def in_every_phase(config):
    """Steps of the model in each of its phases, set up as they are when capture comes."""
    taken = make_step(config)
    for epoch in taken.model.phase_starts(6):
        taken.model.start_epoch(epoch, 6, copy.deepcopy(taken.model.state_dict()))
        taken.start_epoch(epoch, 6, new_phase=True)
        taken.eager(pixels(5))
        yield taken


@pytest.mark.parametrize("output", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("encoder", sorted(MODELS))
def test_no_step_waits(scheduled, monkeypatch, encoder, output):
    for module in (savae, vlae, full_gaussian):
        monkeypatch.setattr(module, "capturing", lambda: True)
    config = scheduled.override(**{"model.encoder": encoder, "model.output": output})
    for taken in in_every_phase(config):
        with NoWaiting():
            losses = taken.eager(pixels(5))
        assert torch.isfinite(losses).all() and len(losses) == len(taken.names)


@pytest.mark.parametrize("covariance", ["diagonal", "low-rank", "full"])
@pytest.mark.parametrize("bound", ["expected", "marginal"])
def test_no_step_of_gpvae_waits(scheduled, covariance, bound):
    options = {"model.gp.covariance": covariance, "model.gp.bound": bound}
    config = scheduled.override(**{"model.encoder": "gpvae", "model.gp.residual": True, **options})
    for taken in (make_step(config), make_seed_step(config)):
        given = pixels(5) if isinstance(taken, Step) else pixels(2, 5)
        taken.eager(given)
        with NoWaiting():
            taken.eager(given)


@pytest.mark.parametrize("encoder", ["savae", "vlae"])
def test_steps_that_do_wait_are_noticed(scheduled, encoder):
    taken = make_step(scheduled.override(**{"model.encoder": encoder}))
    with pytest.raises(Waiting), NoWaiting():
        taken.eager(pixels(5))


@pytest.mark.parametrize("output", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("encoder", BATCHED)
def test_no_step_of_several_seeds_waits(scheduled, encoder, output):
    config = scheduled.override(**{"model.encoder": encoder, "model.output": output})
    assert not batchable(config)
    taken = make_seed_step(config)
    taken.eager(pixels(2, 5))
    with NoWaiting():
        losses = taken.eager(pixels(2, 5))
    assert torch.isfinite(losses).all() and losses.shape == (2, len(taken.names))


def trajectory(history):
    keys = [k for k in history[0] if k != "seconds"]
    return torch.tensor([[row[k] for k in keys] for row in history], dtype=torch.float64)


def on_gpu(config, encoder, capture):
    options = {"model.encoder": encoder, "training.capture": capture, "training.device": "cuda"}
    return config.override(**options, **{"training.epochs": 20})


@needs_gpu
@pytest.mark.parametrize("encoder", sorted(MODELS))
def test_captured_and_eager_runs_agree(scheduled, blobs, encoder):
    eager, captured = (train(on_gpu(scheduled, encoder, c), blobs) for c in (False, True))
    torch.testing.assert_close(
        trajectory(eager.history), trajectory(captured.history), rtol=1e-4, atol=1e-4
    )


@needs_gpu
@pytest.mark.parametrize("encoder", BATCHED)
def test_captured_and_eager_runs_of_several_seeds_agree(scheduled, blobs, encoder):
    eager, captured = (
        train_seeds([on_gpu(scheduled, encoder, c).override(seed=s) for s in (0, 1, 2)], blobs)
        for c in (False, True)
    )
    for a, b in zip(eager, captured, strict=True):
        torch.testing.assert_close(
            trajectory(a.history), trajectory(b.history), rtol=1e-4, atol=1e-4
        )


@needs_gpu
@pytest.mark.parametrize("encoder", ["vae", "gpvae", "iaf", "hf", "me"])
def test_compiled_and_eager_runs_agree(scheduled, blobs, encoder):
    plain = on_gpu(scheduled, encoder, True)
    compiled = train(plain.override(**{"training.compile": True}), blobs)
    eager = train(plain.override(**{"training.capture": False}), blobs)
    torch.testing.assert_close(
        trajectory(eager.history), trajectory(compiled.history), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("encoder", ["vae", "savae"])
def test_only_captured_steps_of_encoders_that_can_be_are_compiled(scheduled, monkeypatch, encoder):
    config = scheduled.override(**{"model.encoder": encoder, "training.compile": True})
    model = build_model(config, SHAPE)
    assert not compiles(config, model)  # on the CPU
    monkeypatch.setattr(step, "captures", lambda *_: True)
    assert compiles(config, model) == (encoder == "vae")


@needs_gpu
def test_graphs_are_really_replayed(scheduled, blobs, monkeypatch):
    count, original = [], step.Captured._capture
    monkeypatch.setattr(
        step.Captured, "_capture", lambda self, x: count.append(1) or original(self, x)
    )
    train(on_gpu(scheduled, "vae", True), blobs)
    assert len(count) == 2  # whole batches and the last one
