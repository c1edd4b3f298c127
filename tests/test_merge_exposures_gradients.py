"""The gradients of merge_exposures: against its float64 reference, by differences, and what is refused."""

import pytest
import torch
from torch import Tensor

import hdrops
from hdrops.testing import assert_close
from merge_exposures_cases import DTYPES, FLOATS, LEVELS, bracket, double, gradients, log_times, reference, response

pytestmark = pytest.mark.device


@pytest.mark.asan
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("levels", [None, 17, 256])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_equal_the_reference(dtype, interleaved, levels, masked):
    """With the weights constant in both, hat included; clipped pixels go through the fallback."""
    stack, times = bracket(dtype, 2, 5, interleaved=interleaved), log_times(5, 2).float()
    curve = None if levels is None else response(levels, 2, 3).float()
    options = {"mask": torch.rand(2, 5, 1, 9, 13) * (torch.rand(2, 5, 1, 9, 13) > 0.4)} if masked else {}
    output_gradient = torch.randn(2, 3, 9, 13).to(dtype if dtype in FLOATS else torch.float32)
    got = gradients(hdrops.merge_exposures, stack, times, curve, output_gradient, **options)
    if dtype in LEVELS and curve is None:
        curve = torch.linspace(0, 1, LEVELS[dtype], dtype=torch.float64)
    want = gradients(reference, double(stack), times.double(), double(curve), output_gradient.double(), **options)
    terms = 400 if levels is None else 400 + levels**2 // 16  # a place among L levels is rounded to L units
    names = (["stack"] if dtype in FLOATS else []) + ["log_exposures"] + ([] if levels is None else ["curve"])
    for name, one, other in zip(names, got, want, strict=False):
        scale = None if name == "stack" else float(want[-1 if name == "curve" else len(names) - 2].abs().max())
        assert_close(one, other, terms=terms, scale=scale, name=name)


def test_gradient_of_a_shared_curve_and_shared_times():
    for dtype in (torch.uint8, torch.uint16, torch.float32):
        for interleaved in (False, True):
            stack, times, curve = bracket(dtype, 3, interleaved=interleaved), log_times(4).float(), response(33).float()
            output_gradient = torch.randn(3, 3, 9, 13)
            got = gradients(hdrops.merge_exposures, stack, times, curve, output_gradient)
            want = gradients(reference, double(stack), times.double(), curve.double(), output_gradient.double())
            for one, other in zip(got, want, strict=True):
                assert_close(one, other, terms=400, scale=float(other.abs().max()))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradcheck(interleaved, which):
    """With uniform weights the gradient is the derivative of the whole formula; so it is where the fallback decides."""
    stack = torch.rand(2, 3, 2, 2, 3, dtype=torch.float64) * 0.8 + 0.1
    stack = (stack * 12).floor() / 12 + 0.04  # away from the curve's knots
    stack = stack.movedim(2, -1).contiguous().movedim(-1, 2) if interleaved else stack
    inputs = [stack, log_times(3, 2), response(13, 1, 2)]
    inputs[which].requires_grad_()
    torch.autograd.gradcheck(lambda *t: hdrops.merge_exposures(*t, weight="uniform"), inputs)
    mask = torch.zeros(1, 3, 1, 2, 3, dtype=torch.float64)
    mask[:, 1:] = 1e-6
    torch.autograd.gradcheck(lambda *t: hdrops.merge_exposures(*t, weight="uniform", mask=mask), inputs)


def test_weights_are_constants():
    stack = torch.full((1, 2, 1, 1, 1), 0.3, dtype=torch.float64)
    stack[:, 1] = 0.6
    stack.requires_grad_()
    times = torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    radiance = hdrops.merge_exposures(stack, times)
    (gradient,) = torch.autograd.grad(radiance.sum(), stack)
    weights = torch.tensor([0.6, 0.8], dtype=torch.float64)
    wanted = radiance.sum().detach() * weights / (weights.sum() + 1e-9) / stack.detach().flatten()
    torch.testing.assert_close(gradient.flatten(), wanted)


def test_only_asked_gradients_are_computed():
    stack, times, curve = bracket(torch.float32), log_times(4).float(), response(9).float().view(1, 1, 9)
    arguments = (torch.ones(2, 3, 9, 13), stack, times, curve, torch.ones(1), None, True)
    every = torch.ops.hdrops._merge_exposures_backward.default(*arguments, [True, True, True])
    for k in range(3):
        some = torch.ops.hdrops._merge_exposures_backward.default(*arguments, [j == k for j in range(3)])
        for j in range(3):
            assert torch.equal(some[j], every[j]) if j == k else some[j].numel() == 0


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
@pytest.mark.parametrize("interleaved", [False, True])
def test_any_number_of_threads_gives_the_same_bits(dtype, interleaved, threads):
    stack, times, curve = (
        bracket(dtype, 1, 3, 3, 260, 301, interleaved),
        log_times(3).float(),
        response(64, 1, 3).float(),
    )
    output_gradient = torch.randn(1, 3, 260, 301)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(
            [
                hdrops.merge_exposures(stack, times, curve),
                *gradients(hdrops.merge_exposures, stack, times, curve, output_gradient),
            ]
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_double_backward_and_forward_ad():
    stack, times = bracket(torch.float64, 1, 2, 1, 2, 3) * 0.9 + 0.03, log_times(2)
    stack.requires_grad_()
    (first,) = torch.autograd.grad(hdrops.merge_exposures(stack, times).sum(), stack, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"merge_exposures: second derivatives.*backend='reference'"):
        first.sum().backward()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(stack.detach(), torch.ones_like(stack))
        with pytest.raises(NotImplementedError, match=r"merge_exposures: forward-mode.*backend='reference'"):
            hdrops.merge_exposures(dual, times)

    def merged(stack: Tensor, times: Tensor) -> Tensor:
        return hdrops.merge_exposures(stack, times, weight="uniform", backend="reference")

    stack = (torch.rand(1, 2, 1, 2, 2, dtype=torch.float64) * 0.8 + 0.1).requires_grad_()
    times = log_times(2).requires_grad_()
    torch.autograd.gradcheck(merged, (stack, times), check_forward_ad=True)
    torch.autograd.gradgradcheck(merged, (stack, times))


def test_fresh_memory_is_written_everywhere():
    torch.use_deterministic_algorithms(True)  # fills it with NaN
    try:
        for interleaved in (False, True):
            stack, times, curve = (
                bracket(torch.float32, interleaved=interleaved),
                log_times(4).float(),
                response(8).float(),
            )
            got = gradients(hdrops.merge_exposures, stack, times, curve, torch.ones(2, 3, 9, 13))
            assert all(gradient.isfinite().all() for gradient in got)
    finally:
        torch.use_deterministic_algorithms(False)
