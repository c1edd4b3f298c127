"""What the tests of merge_exposures share: brackets, the reference on them, and comparisons with it."""

import torch
from torch import Tensor

from hdrops.reference.merge_exposures import merge_exposures as reference
from hdrops.testing import TOLERANCES

LEVELS = {torch.uint8: 256, torch.uint16: 65536}
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DTYPES = [*FLOATS, *LEVELS]


def bracket(dtype, n=2, frames=4, channels=3, height=9, width=13, interleaved=False) -> Tensor:
    """A random stack [N, P, C, H, W], in part clipped in every frame, in either layout."""
    stack = torch.rand(n, frames, channels, height, width, dtype=torch.float64)
    stack[:, :, :, 0, :3] = 0
    stack[:, :, :, 0, 3:6] = 1
    if dtype in LEVELS:
        stack = (stack * (LEVELS[dtype] - 1)).round().to(torch.int32)
    stack = stack.to(dtype)
    return stack.movedim(2, -1).contiguous().movedim(-1, 2) if interleaved else stack


def log_times(frames: int, n: int = 1) -> Tensor:
    """Exposures about 1.5 EV apart, in no order."""
    steps = torch.arange(frames, dtype=torch.float64) + 0.4 * torch.rand(n, frames, dtype=torch.float64)
    return (steps * 1.1 - 2)[:, torch.randperm(frames)]


def response(levels: int, n: int = 1, channels: int = 1) -> Tensor:
    """Increasing inverse responses, all positive."""
    return (torch.rand(n, channels, levels, dtype=torch.float64) + 0.1).cumsum(-1) / levels


def double(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or not tensor.is_floating_point() else tensor.double()


def expected(stack: Tensor, times: Tensor, curve: Tensor | None = None, **options: object) -> Tensor:
    """The reference in float64 on the readings as they are stored."""
    if stack.dtype in LEVELS and curve is None:
        curve = torch.linspace(0, 1, LEVELS[stack.dtype], dtype=torch.float64)
    return reference(double(stack), times.double(), double(curve), **options)


def assert_radiance(actual: Tensor, wanted: Tensor) -> None:
    """An absolute error of ln E is a relative one of E: its terms, up to 8 in size, each round once."""
    tolerance = TOLERANCES[actual.dtype]
    subnormal = 0.0
    if actual.dtype == torch.float16:  # saturates at its ends, and has few bits near the lower one
        wanted, subnormal = wanted.clamp(2.0**-24, 65504), 2.0**-25
    error = (actual.double() - wanted).abs()
    bound = (tolerance.rounding + 8 * tolerance.accumulation) * wanted + subnormal
    assert torch.equal(actual.isnan(), wanted.isnan())
    assert not (error > bound).any(), f"error up to {(error / bound).nan_to_num().max():.3g} of what is allowed"


def gradients(function, stack, times, curve, output_gradient, **options):
    """Of those of the stack, the times and the curve that are floating."""
    inputs = [t.detach().clone(memory_format=torch.preserve_format) for t in (stack, times, curve) if t is not None]
    for tensor in inputs:
        tensor.requires_grad_(tensor.is_floating_point())
    output = function(*inputs, **options)
    return torch.autograd.grad(output, [t for t in inputs if t.requires_grad], output_gradient.to(output.dtype))
