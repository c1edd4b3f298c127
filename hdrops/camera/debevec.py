"""The least squares of Debevec and Malik (SIGGRAPH 1997): a response curve from corresponding pixels of a bracket.

For one channel, sample i seen in frame j at code z_ij, the unknowns are g(z) = ln of the exposure that gives code z,
and ln E_i, the radiance of sample i. They minimise

      sum_ij w(z_ij)^2 (g(z_ij) - ln E_i - ln t_j)^2
    + smoothness^2 sum_z w(z)^2 (g(z-1) - 2 g(z) + g(z+1))^2      with g(middle) = 0.

Given g, each ln E_i is a weighted mean, so the thousands of ln E_i are folded out (Schur complement) and one positive
definite system in the ``levels`` values of g remains:

    (T - sum_i m_i m_i^T / d_i) g = r,      m_i = sum_j w_ij^2 phi_ij,   d_i = sum_j w_ij^2.

phi_ij is the row that reads g at z_ij: one entry for an integer code, two neighbouring ones for a fractional code. T,
the code counts plus the smoothness rows, has bandwidth two. All sums are float64. Which way is cheaper depends on the
number of samples:

* Many: the [levels, levels] matrix and its Cholesky factor. Only the non-zero products of m_i m_i^T are formed, so no
  matrix of samples ever stands in memory, and the cost is linear in the samples.
* Few, on the CPU: the codes are eliminated by the two bands of T, and a system in the samples remains
  (csrc/crf/debevec_kernels_cpu.h).

Gradients come from implicit differentiation: with F(g, lnE; theta) = 0 the stationarity condition, dL/dtheta is
-(adjoint . dF/dtheta), where the adjoint solves the same system with the incoming gradient on the right-hand side. The
Cholesky factor of many samples is kept for it; few samples are solved anew.
"""

from typing import Any

import torch
from torch import Tensor

from hdrops.camera.observations import (
    Layout,
    Observations,
    check_samples,
    scatter,
    scatter_products,
    weight_table,
)

# Up to here, and to the number of codes, samples are few: then the kernel beats the [levels, levels] matrix.
_FEW_SAMPLES = 192


class _Rows(Observations):
    """The rows of the least squares.

    Attributes:
        square: float64 [B, S, P], squared weight of the row.
        blind: bool [B, S], True for a sample without any weight.
        total: float64 [B, S], d_i: the sum of ``square`` over the frames; 1 for a blind sample.
    """

    def __init__(self, codes: Tensor, table: Tensor, mask: Tensor | None) -> None:
        super().__init__(codes, table, mask)
        self.square = self.weight.square()
        total = self.square.sum(-1)
        self.blind = total == 0
        self.total = total.masked_fill(self.blind, 1)

    def mean(self, values: Tensor) -> Tensor:
        """Weighted mean of [B, S, P] values over the frames; plain mean for a sample without any weight."""
        weighted = (self.square * values).sum(-1) / self.total
        return torch.where(self.blind, values.mean(-1), weighted)


def _strength(table: Tensor, smoothness: float) -> Tensor:
    """smoothness^2 w(z)^2, float64 [L]: the weight of the squared second difference at each inner code."""
    return (smoothness * table).square()


def add_smoothness(matrix: Tensor, table: Tensor, smoothness: float) -> None:
    """Adds smoothness^2 sum_z w(z)^2 d_z d_z^T, d_z the second difference at the inner code z, to [B, L, L]."""
    strength = _strength(table, smoothness)[1:-1]
    stencil = (1.0, -2.0, 1.0)
    inner = strength.numel()
    for row, left in enumerate(stencil):
        for column, right in enumerate(stencil):
            first = min(row, column)
            matrix.diagonal(column - row, -2, -1)[:, first : first + inner].add_(strength, alpha=left * right)


def _add_code_counts(matrix: Tensor, rows: _Rows) -> None:
    """Adds sum_ij w_ij^2 phi_ij phi_ij^T to [B, L, L]: diagonal for integer codes, tridiagonal otherwise."""
    levels = matrix.shape[-1]
    diagonal = matrix.diagonal(0, -2, -1)
    if rows.fraction is None:
        diagonal += scatter(rows.lower, rows.square, levels)
        return
    upper, lower = rows.fraction, 1 - rows.fraction
    diagonal += scatter(rows.lower, rows.square * lower * lower, levels)
    diagonal += scatter(rows.lower + 1, rows.square * upper * upper, levels)
    beside = scatter(rows.lower, rows.square * lower * upper, levels)[:, :-1]
    matrix.diagonal(1, -2, -1).add_(beside)
    matrix.diagonal(-1, -2, -1).add_(beside)


def _folded_samples(rows: _Rows) -> Tensor:
    """sum_i m_i m_i^T / d_i: [B, L, L]."""
    values = rows.shares(rows.square * rows.total.rsqrt().unsqueeze(-1))
    return scatter_products(rows.codes_read(), values, values, rows.levels)


def _check_solved(solved: Tensor, smoothness: float) -> None:
    if not bool(solved.all()):
        raise ValueError(
            f"solve_debevec: {int((~solved).sum())} of {solved.numel()} systems are singular to rounding: too few "
            f"samples, a weight that is 0 at inner codes, or a smoothness ({smoothness}) out of proportion"
        )


def _factor(rows: _Rows, table: Tensor, smoothness: float) -> Tensor:
    """Cholesky factor [B, L, L] of the folded system, anchored at the middle code.

    The system is unchanged by a constant added to g, so pinning one value costs nothing and any stiffness is exact.
    """
    matrix = _folded_samples(rows).neg_()
    _add_code_counts(matrix, rows)
    add_smoothness(matrix, table, smoothness)
    middle = rows.levels // 2
    matrix[:, middle, middle] += matrix.diagonal(0, -2, -1).mean(-1)
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    _check_solved(info == 0, smoothness)
    return factor


@torch.library.register_fake("hdrops::_solve_few_samples")
def _fake(lower: Tensor, fraction: Tensor | None, square: Tensor, strength: Tensor, right: Tensor) -> Any:
    return torch.empty_like(right), right.new_empty(right.shape[0], dtype=torch.bool)


class _FoldedSystem:
    """The system in the curves g [B, L], for right-hand sides [B, L] that sum to zero over the codes.

    Attributes:
        factor: of many samples, :func:`_factor`; None where few are solved by the kernel.
    """

    def __init__(self, rows: _Rows, table: Tensor, smoothness: float, factor: Tensor | None = None) -> None:
        self.rows, self.table, self.smoothness = rows, table, smoothness
        few = rows.lower.shape[1] <= min(_FEW_SAMPLES, rows.levels) and rows.lower.device.type == "cpu"
        self.factor = _factor(rows, table, smoothness) if factor is None and not few else factor

    def solve(self, right: Tensor) -> Tensor:
        """g, 0 at the middle code up to rounding."""
        if self.factor is not None:
            return torch.cholesky_solve(right.unsqueeze(-1), self.factor).squeeze(-1)
        rows = self.rows
        curve: Tensor
        curve, solved = torch.ops.hdrops._solve_few_samples.default(
            rows.lower, rows.fraction, rows.square, _strength(self.table, self.smoothness), right
        )
        _check_solved(solved, self.smoothness)
        return curve


def _solve(system: _FoldedSystem, row_values: Tensor) -> tuple[Tensor, Tensor]:
    """Minimiser (g [B, L], e [B, S]) of sum w^2 (g(z) - e_i - b)^2 + smoothness, for b [B, S, P]."""
    rows = system.rows
    residual = rows.square * (row_values - rows.mean(row_values).unsqueeze(-1))
    curve = system.solve(rows.spread(residual))
    curve = curve - curve[:, rows.levels // 2, None]
    return curve, rows.mean(rows.read(curve) - row_values)


class _Debevec(torch.autograd.Function):
    """The solve with its implicit gradient to float codes and log exposures."""

    @staticmethod
    def forward(codes, log_exposures, table, mask, smoothness):  # type: ignore[no-untyped-def]
        rows = _Rows(codes, table, mask)
        rows.require_slope("solve_debevec")
        system = _FoldedSystem(rows, table, smoothness)
        curve, radiance = _solve(system, log_exposures.expand(codes.shape))
        return curve, radiance, system.factor

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        codes, log_exposures, table, mask, ctx.smoothness = inputs
        if output[2] is not None:
            ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(codes, log_exposures, table, mask, *output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_curve, grad_radiance, _):  # type: ignore[no-untyped-def]
        codes, log_exposures, table, mask, curve, radiance, factor = ctx.saved_tensors
        wanted = [tensor for tensor, need in zip((codes, log_exposures), ctx.needs_input_grad[:2], strict=True) if need]
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in wanted]
            substitutes = iter(leaves)
            codes, log_exposures = (
                next(substitutes) if need else tensor
                for tensor, need in zip((codes, log_exposures), ctx.needs_input_grad[:2], strict=True)
            )
            rows = _Rows(codes, table, mask)
            log_times = log_exposures.expand(codes.shape)
            system = _FoldedSystem(rows, table, ctx.smoothness, factor)
            adjoint_curve, adjoint_radiance = _adjoint(system, grad_curve, grad_radiance)
            residual = rows.read(curve) - radiance.unsqueeze(-1) - log_times
            sensitivity = rows.read(adjoint_curve) - adjoint_radiance.unsqueeze(-1)
            lagrangian = -(rows.square * residual * sensitivity).sum()
            # A sample without weight has the plain mean for its radiance, outside the least squares.
            lagrangian = lagrangian + (residual.mean(-1) * grad_radiance).masked_fill(~rows.blind, 0).sum()
            gradients = iter(torch.autograd.grad(lagrangian, leaves))
        return *(next(gradients) if need else None for need in ctx.needs_input_grad[:2]), None, None, None


@torch.no_grad()
def _adjoint(system: _FoldedSystem, grad_curve: Tensor, grad_radiance: Tensor) -> tuple[Tensor, Tensor]:
    """Solves the forward system, unfolded, for the gradient (grad_curve, grad_radiance) on its right-hand side."""
    rows = system.rows
    share = grad_radiance.masked_fill(rows.blind, 0) / rows.total
    # A blind sample's radiance reads the curve by a plain mean; any other's by the weighted one.
    per_row = rows.square * share.unsqueeze(-1)
    per_row = per_row + (grad_radiance.masked_fill(~rows.blind, 0) / rows.lower.shape[-1]).unsqueeze(-1)
    right = grad_curve + rows.spread(per_row)
    # g and ln E move together by a constant, removed by subtracting g(middle): that subtraction, transposed.
    right[:, rows.levels // 2] -= right.sum(-1)
    curve = system.solve(right)
    radiance = rows.mean(rows.read(curve)).masked_fill(rows.blind, 0) + share
    return curve, radiance


def solve_debevec(
    codes: Tensor,
    log_exposures: Tensor,
    *,
    smoothness: float,
    weight: str | Tensor = "debevec",
    levels: int = 256,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Response curve and radiances from corresponding samples of a bracket (Debevec and Malik 1997).

    Args:
        codes: [S, P], S samples in P frames, or [..., S, P, C] with C channels, solved each alone, and leading axes for
            batches. Integers in 0..levels-1, or real numbers in code units, read between the two neighbouring codes
            (values beyond the ends count as the ends).
        log_exposures: [P] or [..., P] broadcast over the leading axes; natural logarithm of seconds, in any order.
        smoothness: factor of the second differences, entering the row (so squared in the penalty), as in the paper's
            code and in OpenCV; grow it with sqrt(S), as :func:`hdrops.camera.estimate_crf` does.
        weight: of a row by its code: "debevec" min(z, max - z), "hat" the same scaled to 1, "gaussian" (Robertson's),
            "uniform", or a tensor [levels]. Only its shape matters, not its scale.
        levels: number of codes L.
        mask: bool, broadcastable to ``codes``; True drops that observation.

    Returns:
        ``(log_response [..., L, C], log_radiance [..., S, C])``, without C for codes [S, P]: g with g(L // 2) = 0,
        natural logarithm of relative exposure per code; and ln E relative to the same anchor. Both finite; dtype of
        ``log_exposures``, computed in float64. A sample that no frame shows with positive weight gets the plain mean
        over its frames.

    Gradients:
        To ``log_exposures`` and to real ``codes`` (weights included), by implicit differentiation of the minimum; the
        derivative at an integer code is the one to its right. None to ``weight``, none of second order.

    Raises:
        ValueError: shapes, code range, or samples that do not determine a curve. TypeError: dtypes.

    Example:
        >>> import torch
        >>> from hdrops.camera import solve_debevec
        >>> exposure = torch.rand(400, 1, dtype=torch.float64) * 60 * torch.tensor([1.0, 2.0, 4.0])
        >>> codes = exposure.clamp(max=255).round().long()
        >>> g, radiance = solve_debevec(codes, torch.tensor([1.0, 2.0, 4.0]).log(), smoothness=30.0)
        >>> bool((g[50:200].exp() - torch.arange(50, 200) / 128).abs().max() < 0.02)
        True
    """
    check_samples("solve_debevec", codes, log_exposures, smoothness, levels, mask)
    layout = Layout(codes, log_exposures)
    excluded = None if mask is None else layout.systems(mask)
    table = weight_table(weight, levels, codes.device)
    curve, radiance, _ = _Debevec.apply(
        layout.systems(codes), layout.times(log_exposures), table, excluded, float(smoothness)
    )
    return layout.result(curve, log_exposures.dtype), layout.result(radiance, log_exposures.dtype)
