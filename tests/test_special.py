"""Dawson's integral and E log h^2 against mpmath, SciPy, their limits and PyTorch's transforms."""

from __future__ import annotations

import mpmath as mp
import numpy as np
import pytest
import scipy.special
import torch

from gpvae import special
from gpvae.special import dawsn, dawsn_prime, expected_log_square

F32, F64 = torch.float32, torch.float64
TOLERANCE = {F64: 1e-12, F32: 1e-5}
DTYPES = pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])

# D' changes sign at 0.92414; so close to it no fixed number of digits bounds its relative error.
CROSSING = (0.87, 0.98)


# Reference values -------------------------------------------------------------------------------


def reference_dawson(x: mp.mpf) -> tuple[mp.mpf, mp.mpf]:
    """D and D' by the error function; the digits cover the cancellation in 1 - 2 x D."""
    d = mp.sqrt(mp.pi) / 2 * mp.exp(-x * x) * mp.erfi(x)
    return d, 1 - 2 * x * d


def reference_asymptotic(mean: mp.mpf, std: mp.mpf) -> mp.mpf:
    """E log h^2 by its series in v = (std / mean)^2, cut at its smallest term.

    Independent of the code, which has no such series: the terms are the normal moments of
    log (1 + std e / mean)^2, E e^2k = (2k-1)!!. The error is of the size of the last term, below
    exp(-200) / v for v < 1 / 400, and `test_references_agree` compares it with the other form.
    """
    v, term, total, k = (std / mean) ** 2, mp.mpf(1), mp.mpf(0), 1
    while (2 * k - 1) * v < 1 and term > mp.mpf(10) ** -65:
        term *= (2 * k - 1) * v
        total += term / k
        k += 1
    return 2 * mp.log(abs(mean)) - total


def reference_hypergeometric(mean: mp.mpf, std: mp.mpf) -> mp.mpf:
    """E log h^2 by 4 int_0^r D = 2 r^2 2F2(1, 1; 3/2, 2; -r^2), summed term by term by mpmath."""
    square = (mean / std) ** 2 / 2
    series = 2 * square * mp.hyp2f2(1, 1, mp.mpf(3) / 2, 2, -square)
    return 2 * mp.log(std) - mp.euler - mp.log(2) + series


def reference(mean: float, std: float) -> tuple[mp.mpf, mp.mpf, mp.mpf]:
    """E log h^2 and its derivatives by mean and std; the inputs are exact binary fractions."""
    with mp.workdps(80):
        mean, std = mp.mpf(mean), mp.mpf(std)
        far = (mean / std) ** 2 > 400
        value = (reference_asymptotic if far else reference_hypergeometric)(mean, std)
        d, d_prime = reference_dawson(mean / (mp.sqrt(2) * std))
        return value, 2 * mp.sqrt(2) / std * d, 2 / std * d_prime


def points() -> tuple[np.ndarray, np.ndarray]:
    """(mean, std), exact in float32: the whole domain, both sides of each cell, and scatter."""
    rng = np.random.default_rng(0)
    mean, std = np.meshgrid(np.r_[0, np.logspace(-12, 4, 33)], np.logspace(-8, 4, 25))
    u = np.arange(1, special._CELLS) / special._CELLS
    edge = np.sqrt(u / (1 - u)).astype(np.float32)  # |mean| / std where the table changes cell
    edge = np.r_[np.nextafter(edge, np.float32(0)), np.nextafter(edge, np.float32(1e9))]
    scale = 2.0 ** rng.integers(-26, 9, edge.size)  # a power of two keeps the ratio exact
    scatter = 10 ** rng.uniform(-8, 4, 1000)
    ratio = 10 ** rng.uniform(-3, 3, 1000)
    mean = np.r_[mean.ravel(), edge * scale, np.minimum(scatter * ratio, 1e4)]
    std = np.r_[std.ravel(), scale, scatter]
    mean = mean * rng.choice([-1, 1], mean.size)
    return mean.astype(np.float32).astype(float), std.astype(np.float32).astype(float)


@pytest.fixture(scope="module")
def grid():
    mean, std = points()
    return mean, std, [reference(m, s) for m, s in zip(mean.tolist(), std.tolist(), strict=True)]


def assert_close(got: torch.Tensor, expected: list, scale: np.ndarray, tolerance, where) -> None:
    """|got - expected| <= tolerance * max(scale, |expected|) at every point; name the worst."""
    assert torch.isfinite(got).all(), f"not finite at {where(int((~torch.isfinite(got)).argmax()))}"
    error = np.array(
        [
            float(abs(mp.mpf(g) - e) / max(mp.mpf(s), abs(e)))
            for g, e, s in zip(got.tolist(), expected, scale.tolist(), strict=True)
        ]
    )
    worst = int(error.argmax())
    assert error[worst] <= tolerance, (
        f"error {error[worst]:.2e} at {where(worst)}: got {got[worst].item()!r}, "
        f"expected {mp.nstr(expected[worst], 17)}"
    )


def crossing(r: np.ndarray) -> np.ndarray:
    return (np.abs(r) > CROSSING[0]) & (np.abs(r) < CROSSING[1])


def leaf(values, dtype=F64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, requires_grad=True)


def value_and_grads(mean: torch.Tensor, std: torch.Tensor) -> tuple[torch.Tensor, ...]:
    value = expected_log_square(mean, std)
    return value.detach(), *torch.autograd.grad(value.sum(), (mean, std))


# Accuracy ---------------------------------------------------------------------------------------


def test_references_agree():
    with mp.workdps(80):
        for ratio in (20, 25, 30):
            mean, std = mp.mpf(ratio) / 1000, mp.mpf(1) / 1000
            gap = abs(reference_asymptotic(mean, std) - reference_hypergeometric(mean, std))
            assert gap < mp.mpf(10) ** -60, f"{mp.nstr(gap)} at |mean| / std = {ratio}"


@DTYPES
def test_value_and_derivatives_over_the_domain(grid, dtype):
    mean, std, expected = grid
    value, by_mean, by_std = value_and_grads(leaf(mean, dtype), leaf(std, dtype))
    ones = np.ones_like(std)
    # In the narrow band where the derivative by std changes sign its error is relative to 1 / std.
    by_std_scale = np.where(crossing(mean / std / 2**0.5), np.maximum(1, 0.1 / std), 1)
    for i, (name, got, scale) in enumerate(
        [("value", value, ones), ("d/dmean", by_mean, ones), ("d/dstd", by_std, by_std_scale)]
    ):
        assert_close(
            got,
            [e[i] for e in expected],
            scale,
            TOLERANCE[dtype],
            lambda j, name=name: f"{name}, mean={mean[j]!r}, std={std[j]!r}",
        )


@DTYPES
def test_dawsn_and_dawsn_prime_against_mpmath(dtype):
    x = np.r_[0, np.logspace(-12, 12, 400), np.linspace(0.9, 0.95, 100)]
    x = np.r_[x, -x].astype(np.float32).astype(float)
    with mp.workdps(80):
        expected = [reference_dawson(mp.mpf(v)) for v in x.tolist()]
    inputs = torch.tensor(x, dtype=dtype)
    tiny = np.full_like(x, np.finfo(np.float32).tiny)  # relative to the reference, zero aside
    prime_scale = np.where(crossing(x), 0.1, tiny)
    for i, (function, scale) in enumerate([(dawsn, tiny), (dawsn_prime, prime_scale)]):
        assert_close(
            function(inputs),
            [e[i] for e in expected],
            scale,
            TOLERANCE[dtype],
            lambda j, name=function.__name__: f"{name}({x[j]!r})",
        )


@DTYPES
def test_dawsn_against_scipy_on_a_dense_grid(dtype):
    x = torch.linspace(-30, 30, 100_000, dtype=dtype)
    expected = scipy.special.dawsn(x.double().numpy())
    error = np.abs(dawsn(x).double().numpy() / expected - 1)
    worst = int(error.argmax())
    assert error[worst] <= TOLERANCE[dtype], f"error {error[worst]:.2e} at x={x[worst].item()!r}"


def test_dawsn_at_the_ends_of_float32():
    """The scale is a hypot, whose squares neither overflow nor vanish."""
    got = dawsn(torch.tensor([-1e-30, 1e-30, -1e30, 1e30]))
    torch.testing.assert_close(got, torch.tensor([-1e-30, 1e-30, -5e-31, 5e-31]), rtol=1e-6, atol=0)


def test_hessian_matches_the_closed_form():
    std = torch.logspace(-3, 3, 13, dtype=F64)
    mean = torch.full_like(std, 1.3)
    r = (mean / std / 2**0.5).numpy()
    d = scipy.special.dawsn(r)
    d1 = 1 - 2 * r * d
    d2 = -2 * d - 2 * r * d1
    mixed = -2 * 2**0.5 * (d + r * d1)
    expected = np.stack([2 * d1, mixed, mixed, -2 * (d1 + r * d2)], -1).reshape(-1, 2, 2)

    def scalar(pair):
        return expected_log_square(pair[0], pair[1])

    pairs = torch.stack([mean, std], -1)
    for transform in (
        torch.func.hessian(scalar),
        torch.func.jacrev(torch.func.jacrev(scalar)),
        torch.func.jacrev(torch.func.jacfwd(scalar)),
    ):
        got = torch.func.vmap(transform)(pairs).numpy() * std.numpy()[:, None, None] ** 2
        gap = np.abs(got - expected).max((1, 2))
        # SciPy has no D': the closed form itself loses r^2 roundings.
        ratio = gap / (1e-14 * np.maximum(r, 10) ** 2)
        assert ratio.max() < 1, f"gap {gap[ratio.argmax()]:.2e} at std={std[ratio.argmax()]:.2e}"


def test_monte_carlo_mean():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(500_000, generator=generator, dtype=F64)
    for mean, std in [(0.0, 2.0), (0.7, 0.5), (-3.0, 1.0)]:
        sample = (mean + std * noise).square().log()
        expected = expected_log_square(torch.tensor(mean), torch.tensor(std)).item()
        gap = (sample.mean() - expected).abs() / (sample.std() / len(sample) ** 0.5)
        assert gap < 4, f"{gap:.1f} standard errors at mean={mean}, std={std}"


# Limits, symmetry, shapes, refusals -------------------------------------------------------------


@DTYPES
def test_zero_std_is_the_logarithm(dtype):
    mean = leaf([-1e4, -1.0, 1e-8, 0.3, 2.0, 1e4], dtype)
    value, by_mean, by_std = value_and_grads(mean, torch.zeros_like(mean, requires_grad=True))
    rtol = TOLERANCE[dtype]
    expected = mean.detach().square().log()
    torch.testing.assert_close(value, expected, rtol=rtol, atol=rtol)
    torch.testing.assert_close(by_mean, 2 / mean.detach(), rtol=rtol, atol=0)
    assert (by_std == 0).all(), by_std


@DTYPES
def test_zero_mean_is_the_log_chi_square(dtype):
    std = leaf([1e-8, 1e-3, 1.0, 1e4], dtype)
    value, by_mean, by_std = value_and_grads(torch.zeros_like(std, requires_grad=True), std)
    rtol = TOLERANCE[dtype]
    expected = 2 * std.detach().log() - np.euler_gamma - np.log(2)
    torch.testing.assert_close(value, expected, rtol=rtol, atol=rtol)
    torch.testing.assert_close(by_std, 2 / std.detach(), rtol=rtol, atol=0)
    assert (by_mean == 0).all(), by_mean


@DTYPES
def test_symmetry_is_exact(dtype):
    x = torch.logspace(-6, 6, 301, dtype=dtype)
    std = torch.ones_like(x)
    assert torch.equal(dawsn(-x), -dawsn(x))
    assert torch.equal(dawsn_prime(-x), dawsn_prime(x))
    assert torch.equal(expected_log_square(-x, std), expected_log_square(x, std))


def test_broadcasting_and_strides():
    mean, std = leaf([[0.1, -2.0, 30.0]] * 2), leaf([[0.5], [2.0]])
    value, by_mean, by_std = value_and_grads(mean, std)
    loop = torch.stack(
        [torch.stack([expected_log_square(m, std[i, 0]) for m in mean[i]]) for i in range(2)]
    )
    assert torch.equal(value, loop)
    full = leaf(std.detach().expand(2, 3).tolist())
    _, full_by_mean, full_by_std = value_and_grads(mean, full)
    assert by_std.shape == std.shape
    torch.testing.assert_close(by_mean, full_by_mean)
    torch.testing.assert_close(by_std, full_by_std.sum(1, keepdim=True))
    assert torch.equal(expected_log_square(mean.T, full.T), value.T)
    assert expected_log_square(mean[:0], full[:0]).shape == (0, 3)
    assert dawsn(torch.empty(0)).shape == (0,)


@DTYPES
def test_nan_stays_nan_and_stays_put(dtype):
    nan = float("nan")
    mean, std = leaf([1.0, nan, 1.0, nan, 2.0], dtype), leaf([1.0, 1.0, nan, nan, 0.0], dtype)
    expected = torch.tensor([False, True, True, True, False])
    for result in value_and_grads(mean, std):
        assert torch.equal(result.isnan(), expected), result
    assert dawsn(mean).isnan().tolist() == [False, True, False, True, False]
    assert dawsn_prime(mean).isnan().tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("given", [torch.tensor([1]), torch.ones(2, dtype=torch.float16), 1.0])
def test_other_types_are_refused(given):
    fine = torch.ones(2)
    name = str(given.dtype) if isinstance(given, torch.Tensor) else "float"
    for call in (
        lambda: dawsn(given),
        lambda: dawsn_prime(given),
        lambda: expected_log_square(given, fine),
        lambda: expected_log_square(fine, given),
    ):
        with pytest.raises(TypeError, match=f"must be a float32 or float64 tensor, given {name}"):
            call()


def test_mixed_precision_is_refused():
    with pytest.raises(TypeError, match=r"mean is torch.float32 and std is torch.float64"):
        expected_log_square(torch.ones(2), torch.ones(2, dtype=F64))


# Differentiation and transforms -----------------------------------------------------------------

SAMPLES = [-40.0, -3.0, -0.8, 0.0, 0.1, 0.924, 1.7, 25.0]


@pytest.mark.parametrize("function", [dawsn, dawsn_prime])
def test_dawsn_gradients(function):
    x = leaf(SAMPLES)
    assert torch.autograd.gradcheck(function, (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (x,))


def test_expected_log_square_gradients():
    mean, std = leaf(SAMPLES), leaf([[0.7], [3.0]])
    assert torch.autograd.gradcheck(expected_log_square, (mean, std), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(expected_log_square, (mean, std))
    assert torch.autograd.gradcheck(expected_log_square, (mean.detach(), std))
    assert torch.autograd.gradcheck(expected_log_square, (mean, std.detach()))


def test_vmap_equals_the_loop():
    mean = torch.linspace(-9, 9, 15, dtype=F64).reshape(5, 3)
    std = torch.linspace(0.1, 2, 3, dtype=F64)
    both = torch.func.grad(lambda m, s: expected_log_square(m, s).sum(), argnums=(0, 1))
    got = torch.func.vmap(expected_log_square, in_dims=(0, None))(mean, std)
    assert torch.equal(got, torch.stack([expected_log_square(row, std) for row in mean]))
    by_mean, by_std = torch.func.vmap(both, in_dims=(0, None))(mean, std)
    loop = [both(row, std) for row in mean]
    assert torch.equal(by_mean, torch.stack([pair[0] for pair in loop]))
    assert torch.equal(by_std, torch.stack([pair[1] for pair in loop]))
    assert torch.equal(torch.func.vmap(dawsn)(mean), torch.stack([dawsn(row) for row in mean]))


def test_compiles_whole_and_from_cold(monkeypatch):
    def step(mean, std):
        return expected_log_square(mean, std) + dawsn(mean) * expected_log_square(2 * mean, std)

    mean, std = leaf([-3.0, 0.0, 0.5, 100.0], F32), leaf([0.5], F32)
    expected = step(mean, std)
    expected_grads = torch.autograd.grad(expected.sum(), (mean, std))
    monkeypatch.setattr(special, "_TABLES", {})  # tracing must not enter the NumPy code
    torch._dynamo.reset()
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(mean, std)
    torch.testing.assert_close(got, expected)
    got_grads = torch.autograd.grad(got.sum(), (mean, std))
    torch.testing.assert_close(got_grads, expected_grads)


def test_tables_made_anywhere_serve_everywhere(monkeypatch):
    """The first call may be inside inference mode or a transform; later calls build nothing."""
    monkeypatch.setattr(special, "_TABLES", {})
    mean, std = leaf(SAMPLES), leaf([0.7])
    with torch.inference_mode():
        expected_log_square(mean, std)
    torch.func.vmap(torch.func.grad(lambda m: expected_log_square(m, std[0])))(mean)
    value_and_grads(mean, std)
    monkeypatch.setattr(special, "_coefficients", None)
    assert all(torch.isfinite(result).all() for result in value_and_grads(mean, std))
    table = special._TABLES[mean.device, F64, 0, 1][0]
    assert type(table) is torch.Tensor and not table.is_inference()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@DTYPES
def test_cuda_graph_replays_new_inputs(dtype):
    mean = torch.zeros(64, 20, device="cuda", dtype=dtype, requires_grad=True)
    std = torch.ones(64, 20, device="cuda", dtype=dtype, requires_grad=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            value_and_grads(mean, std), dawsn(mean.detach())
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = (*value_and_grads(mean, std), dawsn(mean.detach()))
    new_mean, new_std = torch.randn(64, 20, dtype=dtype), torch.rand(64, 20, dtype=dtype) + 0.1
    with torch.no_grad():
        mean.copy_(new_mean)
        std.copy_(new_std)
    graph.replay()
    torch.cuda.synchronize()
    host = (new_mean.requires_grad_(), new_std.requires_grad_())
    expected = (*value_and_grads(*host), dawsn(new_mean.detach()))
    for got, want in zip(captured, expected, strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
