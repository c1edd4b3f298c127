"""The least squares on given samples: exactness against the dense system, gradients, robustness."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hdrops.camera import solve_debevec, solve_robertson


def _dense(codes: Tensor, log_times: Tensor, smoothness: float, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's rows written out and solved by SVD: (g [L], ln E [S]) for codes [S, P], fractional or not."""
    samples, frames = codes.shape
    levels = weight.numel()
    rows, right = [], []
    for i in range(samples):
        for j in range(frames):
            lower = min(int(codes[i, j]), levels - 2)
            share = float(codes[i, j]) - lower
            w = weight[lower] * (1 - share) + weight[lower + 1] * share
            row = torch.zeros(levels + samples, dtype=torch.float64)
            row[lower], row[lower + 1], row[levels + i] = w * (1 - share), w * share, -w
            rows.append(row)
            right.append(w * log_times[j])
    for z in range(1, levels - 1):
        row = torch.zeros(levels + samples, dtype=torch.float64)
        row[z - 1], row[z], row[z + 1] = (smoothness * weight[z] * k for k in (1, -2, 1))
        rows.append(row)
        right.append(torch.tensor(0.0, dtype=torch.float64))
    anchor = torch.zeros(levels + samples, dtype=torch.float64)
    anchor[levels // 2] = 1
    matrix = torch.stack([*rows, anchor])
    values = torch.stack([*right, torch.tensor(0.0, dtype=torch.float64)])
    solution = torch.linalg.lstsq(matrix, values[:, None], driver="gelsd").solution[:, 0]
    return solution[:levels], solution[levels:]


def _tent(levels: int) -> Tensor:
    code = torch.arange(levels, dtype=torch.float64)
    return torch.minimum(code, levels - 1 - code)


@pytest.fixture(params=["few", "many"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Solves any samples, up to the number of codes, the way of few samples; or all the way of many."""
    monkeypatch.setattr("hdrops.camera.debevec._FEW_SAMPLES", 256 if request.param == "few" else 0)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-6), (torch.float32, 1e-3)])
@pytest.mark.parametrize("weight", ["stored", "debevec"])
def test_equals_the_gold_solution(data: Path, dtype: torch.dtype, bound: float, weight: str) -> None:
    gold = np.load(data / "ref" / "memorial_gsolve_gold.npz")
    codes = torch.from_numpy(gold["Z"])
    log_times = torch.from_numpy(gold["log_t"]).to(dtype)
    chosen = torch.from_numpy(gold["w"]) if weight == "stored" else weight
    curve, radiance = solve_debevec(codes, log_times, smoothness=float(gold["lam"]), weight=chosen)
    assert curve.dtype == radiance.dtype == dtype
    expected = torch.from_numpy(gold["g" if weight == "stored" else "g_paper"])
    occurs = torch.stack(
        [torch.bincount(channel.flatten().long(), minlength=256) > 0 for channel in codes.unbind(-1)], -1
    )
    assert (curve - expected).abs()[occurs].max() < bound
    assert curve.isfinite().all()
    if weight == "stored":
        assert (radiance - torch.from_numpy(gold["lE"])).abs().max() < bound


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("fractional", [False, True])
def test_equals_the_dense_system(fractional: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.rand(30, 4, generator=generator, dtype=torch.float64) * 31
    codes = codes if fractional else codes.round()
    log_times = torch.tensor([0.3, -1.0, 0.9, 2.0], dtype=torch.float64)
    weight = _tent(32) + 0.5
    expected = _dense(codes, log_times, 3.0, weight)
    given = codes if fractional else codes.long()
    actual = solve_debevec(given, log_times, smoothness=3.0, weight=weight, levels=32)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


def test_named_weights_scale_freely() -> None:
    codes = torch.randint(0, 256, (50, 3), generator=torch.Generator().manual_seed(0))
    log_times = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    first = solve_debevec(codes, log_times, smoothness=10.0, weight="debevec")[0]
    for other in ("hat", 7 * _tent(256)):
        torch.testing.assert_close(solve_debevec(codes, log_times, smoothness=10.0, weight=other)[0], first)


def test_leading_axes_broadcast() -> None:
    codes = torch.randint(0, 16, (2, 40, 4, 3), generator=torch.Generator().manual_seed(0))
    log_times = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    curve, radiance = solve_debevec(codes, log_times, smoothness=2.0, levels=16)
    assert curve.shape == (2, 16, 3) and radiance.shape == (2, 40, 3)
    for n in range(2):
        for c in range(3):
            one = solve_debevec(codes[n, ..., c], log_times[n], smoothness=2.0, levels=16)
            torch.testing.assert_close((curve[n, :, c], radiance[n, :, c]), one)


def test_chunks_of_samples_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(0, 16, (41, 4, 2), generator=torch.Generator().manual_seed(0))
    log_times = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    whole = solve_debevec(codes, log_times, smoothness=2.0, levels=16)
    monkeypatch.setattr("hdrops.camera.observations._PRODUCTS_PER_CHUNK", 56)
    torch.testing.assert_close(solve_debevec(codes, log_times, smoothness=2.0, levels=16), whole)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("masked", [False, True])
def test_gradients(masked: bool) -> None:
    """Numerical derivatives of both results by codes and exposures; one masked sample is seen in no frame."""
    generator = torch.Generator().manual_seed(0)
    codes = (torch.rand(2, 7, 3, 2, generator=generator, dtype=torch.float64) * 7).requires_grad_()
    log_times = torch.randn(2, 3, generator=generator, dtype=torch.float64).requires_grad_()
    mask = None
    if masked:
        mask = torch.rand(2, 7, 3, 2, generator=generator) < 0.1
        mask[0, 0] = True

    def solve(codes: Tensor, log_times: Tensor) -> tuple[Tensor, Tensor]:
        return solve_debevec(codes, log_times, smoothness=0.7, levels=8, mask=mask)

    assert torch.autograd.gradcheck(solve, (codes, log_times))
    assert torch.autograd.gradcheck(lambda codes: solve(codes, log_times.detach()), (codes,))
    assert torch.autograd.gradcheck(lambda times: solve(codes.detach().long(), times), (log_times,))
    weight = _tent(8) + 1
    assert torch.autograd.gradcheck(
        lambda c, t: solve_debevec(c, t, smoothness=0.7, levels=8, weight=weight), (codes, log_times)
    )


@pytest.mark.asan
@pytest.mark.parametrize("smoothness", [1.0, 1000.0])
@pytest.mark.parametrize("samples", [5, 70, 192])
def test_few_and_many_samples_agree(monkeypatch: pytest.MonkeyPatch, samples: int, smoothness: float) -> None:
    generator = torch.Generator().manual_seed(0)
    log_times = torch.tensor([0.0, 0.7, 1.4, 2.1, 2.8], dtype=torch.float64)
    radiance = torch.rand(samples, 1, 3, generator=generator, dtype=torch.float64) ** 3
    codes = ((radiance * log_times.exp()[:, None]).clamp(0, 1) ** (1 / 2.2) * 255).round().long()
    codes[0], mask = 255, torch.rand(codes.shape, generator=generator) < 0.1
    few = solve_debevec(codes, log_times, smoothness=smoothness, mask=mask)
    monkeypatch.setattr("hdrops.camera.debevec._FEW_SAMPLES", 0)
    many = solve_debevec(codes, log_times, smoothness=smoothness, mask=mask)
    torch.testing.assert_close(few, many, rtol=0, atol=1e-7)


@pytest.mark.usefixtures("way")
def test_a_singular_system_is_an_error() -> None:
    """Weight 0 at the codes 8 to 23 leaves nothing that holds the curve there."""
    weight = torch.ones(32)
    weight[8:24] = 0
    codes = torch.tensor([[1, 3, 5], [2, 4, 6], [25, 27, 30]])
    with pytest.raises(ValueError, match="1 of 1 systems are singular to rounding"):
        solve_debevec(codes, torch.tensor([0.0, 1.0, 2.0]), smoothness=1.0, weight=weight, levels=32)


@pytest.mark.parametrize("fractional", [False, True])
def test_the_kernel_of_few_samples(fractional: bool) -> None:
    """Registration; the same bits for any number of threads; codes outside of the curve are refused."""
    generator = torch.Generator().manual_seed(0)
    lower = torch.randint(0, 255, (64, 150, 4), generator=generator)
    fraction = torch.rand(lower.shape, generator=generator, dtype=torch.float64) if fractional else None
    square = torch.rand(lower.shape, generator=generator, dtype=torch.float64)
    right = torch.randn(64, 256, generator=generator, dtype=torch.float64)
    right -= right.mean(-1, keepdim=True)
    kernel = torch.ops.hdrops._solve_few_samples.default
    arguments = (lower, fraction, square, torch.ones(256, dtype=torch.float64), right)
    torch.library.opcheck(kernel, arguments)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = kernel(*arguments)
        torch.set_num_threads(3)
        three = kernel(*arguments)
    finally:
        torch.set_num_threads(threads)
    assert one[1].all() and torch.equal(one[0], three[0])
    for wrong in (-1, 255 if fractional else 256):
        lower[3, 5, 1] = wrong
        with pytest.raises(Exception, match=f"codes must lie in 0.*got {wrong}"):
            kernel(*arguments)


def test_second_order_is_refused() -> None:
    codes = torch.rand(7, 3, dtype=torch.float64) * 7
    log_times = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    curve, _ = solve_debevec(codes, log_times, smoothness=0.7, levels=8)
    (first,) = torch.autograd.grad(curve.square().sum(), log_times, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.filterwarnings("ignore:solve_robertson:RuntimeWarning")
@pytest.mark.parametrize("solve", [solve_debevec, solve_robertson])
def test_sample_without_weight_has_a_finite_radiance(solve) -> None:
    codes = torch.tensor([[255, 255, 255], [0, 0, 0], [10, 60, 120], [40, 90, 200], [3, 130, 220]])
    log_times = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    curve, radiance = solve(codes, log_times, smoothness=1.0)
    assert curve.isfinite().all() and radiance.isfinite().all()
    torch.testing.assert_close(radiance[0], curve[255])


@pytest.mark.parametrize("solve", [solve_debevec, solve_robertson])
@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"codes": torch.zeros(3, dtype=torch.long)}, ValueError, r"codes must be \[samples, frames\]"),
        ({"codes": torch.zeros(5, 3, dtype=torch.bool)}, TypeError, "integers or real"),
        ({"codes": torch.full((5, 3), 256)}, ValueError, r"0\.\.levels-1 = 0\.\.255, got 256\.\.256"),
        ({"codes": torch.full((5, 3), torch.nan)}, ValueError, "codes must be finite"),
        ({"log_exposures": torch.zeros(4)}, ValueError, "must end in the 3 frames"),
        ({"log_exposures": torch.arange(3)}, TypeError, "floating point"),
        ({"weight": "triangle"}, ValueError, "weight must be one of .* got 'triangle'"),
        ({"weight": torch.ones(7)}, ValueError, r"weight must be \[levels\] = \[256\], got shape \[7\]"),
        ({"weight": -torch.ones(256)}, ValueError, "not negative"),
        ({"levels": 3}, ValueError, "levels must be at least 4"),
        ({"smoothness": -1.0}, ValueError, "smoothness must be positive"),
        ({"mask": torch.zeros(5, 3)}, TypeError, "mask must be bool"),
        ({}, ValueError, "nothing fixes the slope"),
    ],
)
def test_errors_say_what_is_wrong(solve, arguments: dict, kind: type[Exception], message: str) -> None:
    given = {
        "codes": torch.zeros(5, 3, dtype=torch.long),
        "log_exposures": torch.tensor([0.0, 1.0, 2.0]),
        "smoothness": 1.0,
        **arguments,
    }
    with pytest.raises(kind, match=message):
        solve(**given)


def test_the_first_call_imports_nothing_large():
    code = (
        "import sys, torch; from hdrops.camera import estimate_crf; before = set(sys.modules);"
        "estimate_crf(torch.arange(64).byte().view(1, 1, 1, 8, 8) * torch.tensor([1, 2]).byte().view(1, 2, 1, 1, 1),"
        "torch.tensor([0.0, 0.7])); print('sympy' in set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout.strip() == "False", done.stderr
