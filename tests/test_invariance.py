"""Every number of an image is its own: alone, in any batch, at any place in it."""

from __future__ import annotations

import pytest
import torch
from small_models import images, make

import gpvae
from gpvae import memory, training
from gpvae.errors import OutOfMemory, TrainingError
from gpvae.gaps import decompose
from gpvae.memory import Memory
from gpvae.noise import ImageNoise, Recorder, Replay
from gpvae.refine import study
from gpvae.search import SearchOptions

ORDER = torch.tensor([4, 0, 3, 5, 1, 2])
QUICK = SearchOptions(max_steps=20)


def numbers(model, x):
    """Estimates of every kind for each image, by name."""
    gaps = decompose(model, x, samples=12, elbo_samples=6, options=QUICK)
    found = {
        "elbo": gpvae.elbo(model, x, 7).value,
        "own": gpvae.log_likelihood(model, x, 55).value,
        "gaussian": gpvae.log_likelihood(model, x, 5, proposal="gaussian").stderr,
        "log_px": gaps.log_px.value,
        "amortization": gaps.amortization.value,
        "approximation": gaps.approximation.stderr,
    }
    scores = model(x).scores() or {"size": x.flatten(1).sum(1)}
    bounds = study(model, x, scores, steps=3, options=QUICK, elbo_samples=6).bounds
    return found | {f"refined {r}": b for r, b in enumerate(bounds)}


@pytest.mark.parametrize("encoder", sorted(training.MODELS))
@pytest.mark.parametrize("output", ["bernoulli", "gaussian"])
def test_batch_size_and_order_do_not_matter(encoder, output):
    model = make(training.MODELS[encoder], encoder=encoder, output=output)
    x = images(6)
    together = numbers(model, x)
    shuffled = numbers(model, x[ORDER])
    alone = [numbers(model, x[i : i + 1]) for i in (0, 4)]
    for name, value in together.items():
        assert torch.isfinite(value).all(), name
        torch.testing.assert_close(shuffled[name], value[ORDER], rtol=1e-7, atol=1e-7, msg=name)
        for i, single in zip((0, 4), alone, strict=True):
            torch.testing.assert_close(single[name], value[i : i + 1], rtol=1e-7, atol=1e-7)


def test_draws_go_on_where_they_stopped():
    """Samples in chunks are the samples in one piece, whatever the kinds of draws between."""
    x = images(5)
    whole = ImageNoise(x, 3).normal((6, 5, 2), x)
    source = ImageNoise(x, 3)
    parts = torch.cat([source.normal((k, 5, 2), x) for k in (1, 3, 2)])
    assert torch.equal(parts, whole)
    assert len(whole.unique()) == whole.numel()
    other = source.normal((6, 5, 2), x)
    assert not torch.isin(other, whole).any()


def test_uniform_noise_is_uniform_and_inside():
    x = images(50, shape=(1, 6, 6))
    u = ImageNoise(x, 1).uniform((2000, 50), x)
    assert u.min() > 0 and u.max() < 1
    deciles = torch.histc(u, 10, 0, 1) / u.numel()
    assert (deciles - 0.1).abs().max() < 0.004


def test_replay_repeats_a_recorded_step():
    model, x = make(gpvae.GPVAE, encoder="gpvae"), images(4)
    recorder = Recorder(torch.Generator().manual_seed(5))
    first = model.loss_terms(x, 10, recorder)
    generator = torch.Generator().manual_seed(5)
    assert recorder.asked == [("normal", (3, 1, 4, 3))]
    draws = [torch.randn(shape, generator=generator, dtype=x.dtype) for _, shape in recorder.asked]
    again = model.loss_terms(x, 10, Replay(draws))
    assert all(torch.equal(first[name], again[name]) for name in first)
    with pytest.raises(ValueError, match="cannot replay"):
        Replay(draws).normal((2, 4, 3), x)


class Scarce:
    """An allocator with room for so many rows."""

    def __init__(self, room, error):
        self.room, self.error, self.sizes = room, error, []

    def __call__(self, chunk):
        count = len(range(1000)[chunk])
        self.sizes.append(count)
        if count > self.room:
            raise self.error
        return torch.arange(1000)[chunk]


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
]


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu"])
def test_a_chunk_without_memory_is_halved_and_nothing_is_lost(error):
    work = Scarce(6, error)
    budget = Memory(200, torch.device("cpu"))
    with pytest.warns(UserWarning, match="out of memory with 20 rows at once; going on with 10"):
        parts = budget.chunks(work, 1000, 10)
    assert torch.equal(torch.cat(parts), torch.arange(1000))
    assert work.sizes[:3] == [20, 10, 5] and set(work.sizes[2:]) == {5}
    assert budget.rows(10) == 5  # later work starts as small


def test_no_room_for_a_single_row_says_so():
    with pytest.warns(UserWarning), pytest.raises(OutOfMemory, match="single row of about 10"):
        Memory(40, torch.device("cpu")).chunks(Scarce(0, ERRORS[0]), 1000, 10)
    failing = Scarce(0, RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        Memory(40, torch.device("cpu")).chunks(failing, 1000, 10)
    assert len(failing.sizes) == 1


def test_estimates_survive_a_scarce_device(monkeypatch):
    model, x = make(gpvae.GPVAE, encoder="gpvae"), images(6)
    free = gpvae.log_likelihood(model, x, 60)
    decode = type(model.generative).decode

    def scarce(self, z):
        if z[..., 0].numel() > 9:
            raise ERRORS[0]
        return decode(self, z)

    monkeypatch.setattr(type(model.generative), "decode", scarce)
    with pytest.warns(UserWarning, match="out of memory"):
        tight = gpvae.log_likelihood(model, x, 60)
    torch.testing.assert_close(tight.value, free.value, rtol=1e-12, atol=1e-12)


def test_a_training_step_without_memory_says_what_to_do(blobs, tiny_config, monkeypatch):
    def scarce(*_):
        raise ERRORS[1]

    monkeypatch.setattr(gpvae.VAE, "loss_terms", scarce)
    with pytest.raises(TrainingError, match=r"batch_size = 16 does not fit.*smaller batch"):
        gpvae.train(tiny_config, blobs)


def test_the_budget_follows_what_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    assert Memory(None, torch.device("cuda")).bytes == 1000 * memory.GPU_SHARE
    assert Memory(None, torch.device("cpu")).bytes == memory.CPU_BYTES
    assert Memory(70, torch.device("cuda")).bytes == 70
