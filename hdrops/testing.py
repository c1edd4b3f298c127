"""Comparison with the float64 reference: one tolerance table for every test, benchmark check and user.

A kernel in dtype d is compared with the float64 reference evaluated on inputs rounded to d. The error allowed is

    rounding(d) * |expected|  +  accumulation(d) * sqrt(terms) * scale

where ``terms`` is the number of products summed for one element and ``scale`` the size of a typical sum's terms (by
default the root mean square of the expected values). Float16 and bfloat16 kernels accumulate in float32, so their
second coefficient is float32's and the first is half a unit in the last place of the format, with a margin.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """Relative error of the stored result, and of one accumulation step."""

    rounding: float
    accumulation: float


TOLERANCES = {
    torch.float64: Tolerance(rounding=4e-15, accumulation=4e-15),
    torch.float32: Tolerance(rounding=2e-6, accumulation=1e-6),
    torch.bfloat16: Tolerance(rounding=2**-8 * 1.01, accumulation=1e-6),
    torch.float16: Tolerance(rounding=2**-11 * 1.01, accumulation=1e-6),
}


def assert_close(
    actual: Tensor, expected: Tensor, *, terms: int = 1, scale: float | None = None, name: str = "result"
) -> None:
    """Asserts that ``actual`` equals the float64 ``expected`` within the table; NaN must meet NaN.

    Args:
        actual: what the kernel gave, in any floating dtype of the table.
        expected: the reference's result in float64, same shape.
        terms: number of products summed for one element.
        scale: magnitude of the sums' terms; None takes the root mean square of the finite expected values.
        name: what is compared, for the message.

    Raises:
        AssertionError: names the worst element, its error and the bound.
    """
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if actual.numel() == 0:
        return
    tolerance = TOLERANCES[actual.dtype]
    got, want = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert torch.equal(got.isnan(), want.isnan()), (
        f"{name}: NaN in {int((got.isnan() ^ want.isnan()).sum())} wrong places"
    )
    finite = want.isfinite()
    assert torch.equal(got[~finite & ~want.isnan()], want[~finite & ~want.isnan()]), f"{name}: infinities differ"
    if scale is None:
        scale = float(want[finite].square().mean().sqrt()) if finite.any() else 0.0
    bound = tolerance.rounding * want.abs() + tolerance.accumulation * terms**0.5 * scale
    excess = torch.where(finite, (got - want).abs() - bound, torch.full_like(want, -torch.inf))
    worst = int(excess.argmax())
    assert excess.flatten()[worst] <= 0, (
        f"{name} ({actual.dtype}): {int((excess > 0).sum())} of {want.numel()} elements off; "
        f"worst at flat index {worst}: got {got.flatten()[worst]:.9g}, expected {want.flatten()[worst]:.9g}, "
        f"error {(got - want).abs().flatten()[worst]:.3g}, allowed {bound.flatten()[worst]:.3g}"
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Error of ``actual`` as one vector: the L2 norm of the difference over the L2 norm of ``expected``."""
    difference = torch.linalg.vector_norm(actual.detach().double() - expected.detach().double())
    return float(difference / torch.linalg.vector_norm(expected.detach().double()).clamp_min(1e-300))
