"""The least squares of Debevec and Malik (SIGGRAPH 1997): a response curve from corresponding pixels of a bracket.

For one channel, sample i seen in frame j at code z_ij, the unknowns are g(z) = ln of the exposure that gives code z,
and ln E_i, the radiance of sample i. They minimise

      sum_ij w(z_ij)^2 (g(z_ij) - ln E_i - ln t_j)^2
    + smoothness^2 sum_z w(z)^2 (g(z-1) - 2 g(z) + g(z+1))^2      with g(middle) = 0.

Given g, each ln E_i is a weighted mean, so the thousands of ln E_i are folded out (Schur complement) and one positive
definite system in the ``levels`` values of g remains:

    (T - sum_i m_i m_i^T / d_i) g = r,      m_i = sum_j w_ij^2 phi_ij,   d_i = sum_j w_ij^2.

phi_ij is the row that reads g at z_ij: one entry for an integer code, two neighbouring ones for a fractional code. T,
the code counts plus the smoothness rows, has bandwidth two. Only the non-zero products of m_i m_i^T are formed, so no
matrix of samples ever stands in memory, and the cost is linear in the samples. All sums are float64.

Gradients come from implicit differentiation: with F(g, lnE; theta) = 0 the stationarity condition, dL/dtheta is
-(adjoint . dF/dtheta), where the adjoint solves the same system with the incoming gradient on the right-hand side; the
Cholesky factor of the forward pass is used again.
"""

import torch
from torch import Tensor

WEIGHTS = ("debevec", "hat", "uniform")
# Scatter of sample pairs works through at most this many products at a time (8 bytes each for value and index).
_PAIRS_PER_CHUNK = 1 << 20


def weight_table(weight: str | Tensor, levels: int, device: torch.device) -> Tensor:
    """Weight of each code, float64 [levels]: "debevec" min(z, max - z), "hat" 2 min(z, max - z) / max, "uniform" 1."""
    if isinstance(weight, Tensor):
        if weight.shape != (levels,):
            raise ValueError(f"solve_debevec: weight must have shape [levels] = [{levels}], got {list(weight.shape)}")
        return weight.detach().to(device, torch.float64)
    if weight not in WEIGHTS:
        raise ValueError(f"solve_debevec: weight must be one of {WEIGHTS} or a tensor [{levels}], got {weight!r}")
    code = torch.arange(levels, dtype=torch.float64, device=device)
    distance = torch.minimum(code, levels - 1 - code)
    if weight == "hat":
        return distance * (2 / (levels - 1))
    return distance if weight == "debevec" else torch.ones_like(distance)


class _Rows:
    """The observations as rows of the least squares: where each reads g, how strongly, and its weight.

    Attributes:
        lower: int64 [B, S, P], the code at or below each observation.
        fraction: float64 [B, S, P], its distance to that code; None if all codes are integers.
        weight: float64 [B, S, P], squared weight of the row, 0 where excluded.
        total: float64 [B, S], sum of ``weight`` over the frames.
    """

    def __init__(self, codes: Tensor, table: Tensor, mask: Tensor | None) -> None:
        if codes.is_floating_point():
            position = codes.double().clamp(0, table.numel() - 1)
            self.lower = position.detach().floor().long().clamp_(max=table.numel() - 2)
            self.fraction: Tensor | None = position - self.lower
        else:
            self.lower = codes.long()
            self.fraction = None
        self.weight = self.read(table).square()
        if mask is not None:
            self.weight = self.weight.masked_fill(mask, 0)
        self.total = self.weight.sum(-1)

    def read(self, curve: Tensor) -> Tensor:
        """Curves [L] or [B, L] at every observation: [B, S, P]."""
        if curve.dim() == 1:
            at, above = curve[self.lower], None if self.fraction is None else curve[self.lower + 1]
        else:
            flat = self.lower.flatten(1)
            at = curve.gather(1, flat).view_as(self.lower)
            above = None if self.fraction is None else curve.gather(1, flat + 1).view_as(self.lower)
        return at if self.fraction is None or above is None else torch.lerp(at, above, self.fraction)

    def mean(self, values: Tensor) -> Tensor:
        """Weighted mean of [B, S, P] values over the frames; plain mean for a sample without any weight."""
        blind = self.total == 0
        weighted = (self.weight * values).sum(-1) / self.total.masked_fill(blind, 1)
        return torch.where(blind, values.mean(-1), weighted)

    def entries(self) -> tuple[Tensor, Tensor]:
        """The folded rows m_i: codes int64 [B, S, K] and weights [B, S, K]; K = P, or 2 P for fractional codes."""
        if self.fraction is None:
            return self.lower, self.weight
        upper = self.weight * self.fraction
        return torch.cat((self.lower, self.lower + 1), -1), torch.cat((self.weight - upper, upper), -1)


def _scatter(index: Tensor, values: Tensor, size: int) -> Tensor:
    """Sums [B, ...] values into [B, size] by their index."""
    out = values.new_zeros(index.shape[0], size)
    return out.scatter_add_(1, index.flatten(1), values.flatten(1))


def _smoothness_matrix(table: Tensor, smoothness: float) -> Tensor:
    """smoothness^2 sum_z w(z)^2 d_z d_z^T with d_z the second difference at the inner codes: [L, L]."""
    levels = table.numel()
    second = torch.zeros(levels - 2, levels, dtype=torch.float64, device=table.device)
    for offset, value in enumerate((1.0, -2.0, 1.0)):
        second.diagonal(offset).fill_(value)
    rows = second * (smoothness * table[1:-1, None])
    return rows.mT @ rows


def _code_counts(rows: _Rows, levels: int) -> Tensor:
    """sum_ij w_ij^2 phi_ij phi_ij^T: [B, L, L], diagonal for integer codes, tridiagonal otherwise."""
    if rows.fraction is None:
        return torch.diag_embed(_scatter(rows.lower, rows.weight, levels))
    upper, lower = rows.fraction, 1 - rows.fraction
    diagonal = _scatter(rows.lower, rows.weight * lower * lower, levels)
    diagonal += _scatter(rows.lower + 1, rows.weight * upper * upper, levels)
    beside = _scatter(rows.lower, rows.weight * lower * upper, levels)[:, :-1]
    return torch.diag_embed(diagonal) + torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)


def _folded_samples(rows: _Rows, levels: int) -> Tensor:
    """sum_i m_i m_i^T / d_i: [B, L, L], from the products of each sample's entries, each unordered pair once."""
    index, values = rows.entries()
    batch, samples, entries = index.shape
    values = values * rows.total.masked_fill(rows.total == 0, 1).rsqrt().unsqueeze(-1)
    first, second = torch.triu_indices(entries, entries, offset=1, device=index.device)
    matrix = values.new_zeros(batch, levels * levels)
    chunk = max(1, _PAIRS_PER_CHUNK // max(1, batch * first.numel()))
    for start in range(0, samples, chunk):
        z, v = index[:, start : start + chunk], values[:, start : start + chunk]
        pair = (z * levels).index_select(2, first) + z.index_select(2, second)
        product = v.index_select(2, first) * v.index_select(2, second)
        matrix.scatter_add_(1, pair.flatten(1), product.flatten(1))
    half = matrix.view(batch, levels, levels)
    squares: Tensor = torch.diag_embed(_scatter(index, values * values, levels))
    return half + half.mT + squares


def _factor(rows: _Rows, table: Tensor, smoothness: float) -> Tensor:
    """Cholesky factor [B, L, L] of the folded system, anchored at the middle code.

    The system is unchanged by a constant added to g, so pinning one value costs nothing and any stiffness is exact.
    """
    levels = table.numel()
    matrix = _smoothness_matrix(table, smoothness) + _code_counts(rows, levels) - _folded_samples(rows, levels)
    middle = levels // 2
    matrix[:, middle, middle] += matrix.diagonal(dim1=-2, dim2=-1).mean(-1)
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    if bool((info != 0).any()):
        raise ValueError(
            f"solve_debevec: {int((info != 0).sum())} of {info.numel()} systems are singular: no sample is well "
            "exposed, at different codes, in two frames, so nothing fixes the slope of the curve"
        )
    return factor


def _solve(rows: _Rows, factor: Tensor, row_values: Tensor) -> tuple[Tensor, Tensor]:
    """Minimiser (g [B, L], e [B, S]) of sum w^2 (g(z) - e_i - b)^2 + smoothness, for b [B, S, P]."""
    residual = rows.weight * (row_values - rows.mean(row_values).unsqueeze(-1))
    levels = factor.shape[-1]
    if rows.fraction is None:
        right = _scatter(rows.lower, residual, levels)
    else:
        upper = residual * rows.fraction
        right = _scatter(rows.lower, residual - upper, levels) + _scatter(rows.lower + 1, upper, levels)
    curve = torch.cholesky_solve(right.unsqueeze(-1), factor).squeeze(-1)
    curve = curve - curve[:, levels // 2, None]
    return curve, rows.mean(rows.read(curve) - row_values)


class _Debevec(torch.autograd.Function):
    """The solve with its implicit gradient to float codes and log exposures."""

    @staticmethod
    def forward(codes, log_exposures, table, mask, smoothness):  # type: ignore[no-untyped-def]
        rows = _Rows(codes, table, mask)
        factor = _factor(rows, table, smoothness)
        curve, radiance = _solve(rows, factor, log_exposures.expand(codes.shape))
        return curve, radiance, factor

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        codes, log_exposures, table, mask, _ = inputs
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
            adjoint_curve, adjoint_radiance = _adjoint(rows, factor, grad_curve, grad_radiance)
            residual = rows.read(curve) - radiance.unsqueeze(-1) - log_times
            sensitivity = rows.read(adjoint_curve) - adjoint_radiance.unsqueeze(-1)
            blind = rows.total == 0
            lagrangian = -(rows.weight * residual * sensitivity).sum()
            # A sample without weight has the plain mean for its radiance, outside the least squares.
            lagrangian = lagrangian + (residual.mean(-1) * grad_radiance).masked_fill(~blind, 0).sum()
            gradients = iter(torch.autograd.grad(lagrangian, leaves))
        return *(next(gradients) if need else None for need in ctx.needs_input_grad[:2]), None, None, None


@torch.no_grad()
def _adjoint(rows: _Rows, factor: Tensor, grad_curve: Tensor, grad_radiance: Tensor) -> tuple[Tensor, Tensor]:
    """Solves the forward system, unfolded, for the gradient (grad_curve, grad_radiance) on its right-hand side."""
    levels = factor.shape[-1]
    blind = rows.total == 0
    share = grad_radiance.masked_fill(blind, 0) / rows.total.masked_fill(blind, 1)
    right = grad_curve.clone()
    # A blind sample's radiance reads the curve by a plain mean; any other's by the weighted one.
    per_row = rows.weight * share.unsqueeze(-1)
    per_row = per_row + (grad_radiance.masked_fill(~blind, 0) / rows.lower.shape[-1]).unsqueeze(-1)
    if rows.fraction is None:
        right += _scatter(rows.lower, per_row, levels)
    else:
        right += _scatter(rows.lower, per_row * (1 - rows.fraction), levels)
        right += _scatter(rows.lower + 1, per_row * rows.fraction, levels)
    # g and ln E move together by a constant, removed by subtracting g(middle): that subtraction, transposed.
    right[:, levels // 2] -= right.sum(-1)
    curve = torch.cholesky_solve(right.unsqueeze(-1), factor).squeeze(-1)
    radiance = rows.mean(rows.read(curve)).masked_fill(blind, 0) + share
    return curve, radiance


def _check(codes: Tensor, log_exposures: Tensor, smoothness: float, levels: int, mask: Tensor | None) -> None:
    if codes.dim() < 2:
        raise ValueError(f"solve_debevec: codes must be [..., samples, frames], got shape {list(codes.shape)}")
    if codes.is_complex() or codes.dtype == torch.bool:
        raise TypeError(f"solve_debevec: codes must be integers or real, got {codes.dtype}")
    if not log_exposures.is_floating_point():
        raise TypeError(f"solve_debevec: log_exposures must be floating point, got {log_exposures.dtype}")
    if levels < 4:
        raise ValueError(f"solve_debevec: levels must be at least 4, got {levels}")
    if not smoothness > 0:
        raise ValueError(f"solve_debevec: smoothness must be positive, got {smoothness}")
    frames = codes.shape[-1]
    if log_exposures.dim() < 1 or log_exposures.shape[-1] != frames:
        raise ValueError(
            f"solve_debevec: log_exposures must end in the {frames} frames of codes [..., samples, frames] = "
            f"{list(codes.shape)}, got shape {list(log_exposures.shape)}"
        )
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"solve_debevec: mask must be bool (True excludes), got {mask.dtype}")
    if not codes.is_floating_point() and codes.numel():
        low, high = (int(value) for value in torch.aminmax(codes.to(torch.int64)))
        if low < 0 or high >= levels:
            raise ValueError(f"solve_debevec: codes must lie in 0..levels-1 = 0..{levels - 1}, got {low}..{high}")


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
        codes: [..., S, P], S samples in P frames, e.g. [N, C, S, P]; leading axes are independent systems. Integers in
            0..levels-1, or real numbers in code units, read between the two neighbouring codes (values beyond the ends
            count as the ends). OpenCV's order [S, P, C] is ``codes.permute(2, 0, 1)``.
        log_exposures: [P] or [..., P] broadcast over the leading axes; natural logarithm of seconds, in any order.
        smoothness: factor of the second differences, entering the row (so squared in the penalty), as in the paper's
            code and in OpenCV; grow it with sqrt(S), as :func:`hdrops.camera.estimate_crf` does.
        weight: of a row by its code: "debevec" min(z, max - z), "hat" the same scaled to 1, "uniform", or a tensor
            [levels]. Only its shape matters, not its scale.
        levels: number of codes L.
        mask: bool, broadcastable to ``codes``; True drops that observation.

    Returns:
        ``(log_response [..., L], log_radiance [..., S])``: g with g(L // 2) = 0, natural logarithm of relative exposure
        per code; and ln E relative to the same anchor. Both finite; dtype of ``log_exposures``, computed in float64. A
        sample that no frame shows with positive weight gets the plain mean over its frames.

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
    _check(codes, log_exposures, smoothness, levels, mask)
    lead = torch.broadcast_shapes(codes.shape[:-2], log_exposures.shape[:-1])
    samples, frames = codes.shape[-2:]
    batch = 1
    for size in lead:
        batch *= size
    flat_codes = codes.expand(*lead, samples, frames).reshape(batch, samples, frames)
    flat_times = log_exposures.double().expand(*lead, frames).reshape(batch, 1, frames)
    flat_mask = None if mask is None else mask.expand(*lead, samples, frames).reshape(batch, samples, frames)
    table = weight_table(weight, levels, codes.device)
    curve, radiance, _ = _Debevec.apply(flat_codes, flat_times, table, flat_mask, float(smoothness))
    dtype = log_exposures.dtype
    return curve.to(dtype).view(*lead, levels), radiance.to(dtype).view(*lead, samples)
