"""Response recovery of Robertson, Borman and Stevenson (ICIP 1999; J. Electronic Imaging 2003), with smoothness.

Two estimates alternate until the response I settles: the radiance of each sample as the weighted least-squares fit to
its frames, and the response of each code as the mean exposure of the observations at that code,

    x_i  = sum_j w(z_ij) t_j I(z_ij) / sum_j w(z_ij) t_j^2,       I(z) = mean over {ij: z_ij = z} of t_j x_i.

Both are linear in I, so a round is one matrix A [levels, levels], summed once over the samples: hundreds of rounds
cost little. An observation between two codes reads I linearly between them and counts for each by its nearness.

The bare iteration is a power iteration whose leading eigenvalues nearly coincide when the exposures are far apart (a
ripple of the exposures' period in ln I fits the data almost as well). Each round therefore ends by fitting ln I at the
informed codes, by their counts, under the smoothness rows of :mod:`hdrops.camera.debevec`. The same step fills the
codes without information: those never seen, and those of weight zero (clipped).
"""

import warnings

import torch
from torch import Tensor

from hdrops.camera.debevec import add_smoothness
from hdrops.camera.observations import Observations, check_samples, flatten_batch, scatter_products, weight_table


def solve_robertson(
    codes: Tensor,
    log_exposures: Tensor,
    *,
    smoothness: float,
    weight: str | Tensor = "gaussian",
    levels: int = 256,
    mask: Tensor | None = None,
    iterations: int = 500,
    tolerance: float = 1e-4,
) -> tuple[Tensor, Tensor]:
    """Response curve and radiances from corresponding samples of a bracket, by alternation.

    Args:
        codes: [..., S, P], as in :func:`hdrops.camera.solve_debevec`.
        log_exposures: [P] or [..., P], natural logarithm of seconds, in any order.
        smoothness: of the curve, with the meaning it has in :func:`hdrops.camera.solve_debevec`.
        weight: by code, as there; "gaussian" is the paper's.
        levels: number of codes L.
        mask: bool, broadcastable to ``codes``; True drops that observation.
        iterations: at most this many rounds; a RuntimeWarning tells when they did not suffice.
        tolerance: stop when a round moves ln I nowhere by more than this, changes weighted by w / max w.

    Returns:
        ``(log_response [..., L], log_radiance [..., S])``, g(L // 2) = 0, finite, in the dtype of ``log_exposures``,
        computed in float64. No gradient.

    Raises:
        ValueError: shapes, code range, or samples that do not determine a curve. TypeError: dtypes.
    """
    check_samples("solve_robertson", codes, log_exposures, smoothness, levels, mask)
    lead, flat_codes, log_times, flat_mask = flatten_batch(codes.detach(), log_exposures.detach(), mask)
    table = weight_table(weight, levels, codes.device)
    seen = Observations(flat_codes, table, flat_mask)
    seen.require_slope("solve_robertson")
    # Radiance is relative: times around 1 keep every sum in range.
    middle_time = log_times.mean(-1, keepdim=True)
    log_times = log_times - middle_time
    curve = _alternate(seen, log_times.exp(), table, flat_mask, smoothness, iterations, tolerance)
    log_radiance = _log_radiance(seen, log_times, curve) - middle_time.squeeze(-1)
    dtype = log_exposures.dtype
    return curve.to(dtype).view(*lead, levels), log_radiance.to(dtype).view(*lead, -1)


def _log_radiance(seen: Observations, log_times: Tensor, curve: Tensor) -> Tensor:
    """ln x_i [B, S]; for a sample without weight the mean over its frames of ln I - ln t."""
    times = log_times.exp()
    weighted = seen.weight * times
    power = (weighted * times).sum(-1)
    blind = power == 0
    radiance = (weighted * seen.read(curve.exp())).sum(-1) / power.masked_fill(blind, 1)
    plain = (seen.read(curve) - log_times).mean(-1)
    return torch.where(blind, plain, radiance.masked_fill(blind, 1).log())


def _round_matrix(seen: Observations, times: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """A [B, L, L], which takes I to the next I, and the number of observations that inform each code, [B, L]."""
    weighted = seen.weight * times
    power = (weighted * times).sum(-1, keepdim=True)
    usable = power > 0 if mask is None else (power > 0) & ~mask
    usable = usable.expand_as(weighted).double()
    counts = seen.spread(usable)
    exposures = seen.shares(usable * times)
    radiances = seen.shares(weighted / power.masked_fill(power == 0, 1))
    matrix = scatter_products(seen.codes_read(), exposures, radiances, seen.levels)
    return matrix / counts.masked_fill(counts == 0, 1).unsqueeze(-1), counts


def _alternate(
    seen: Observations,
    times: Tensor,
    table: Tensor,
    mask: Tensor | None,
    smoothness: float,
    iterations: int,
    tolerance: float,
) -> Tensor:
    """ln I [B, L], 0 at the middle code, after the rounds."""
    matrix, counts = _round_matrix(seen, times, mask)
    strength = counts * table.square()
    data_rows = torch.diag_embed(strength)
    system = data_rows.clone()
    add_smoothness(system, table, smoothness)
    factor, info = torch.linalg.cholesky_ex(system)
    if bool((info != 0).any()):
        raise ValueError(
            f"solve_robertson: {int((info != 0).sum())} of {info.numel()} systems are singular to rounding: too few "
            f"samples, a weight that is 0 at inner codes, or a smoothness ({smoothness}) out of proportion"
        )
    # A straight line to start with, as in the paper, and above 0 so that its logarithm is finite.
    middle = seen.levels // 2
    line = torch.arange(1, seen.levels + 1, dtype=torch.float64, device=table.device) / (middle + 1)
    curve = line.log().expand(strength.shape)
    smoother = torch.cholesky_solve(data_rows, factor)
    importance, informed = table / table.max(), strength > 0
    change = torch.inf
    for _ in range(iterations):
        exposure = torch.bmm(matrix, curve.exp().unsqueeze(-1)).squeeze(-1)
        logarithm = exposure.clamp_min(1e-300).log() * informed
        smooth = torch.bmm(smoother, logarithm.unsqueeze(-1)).squeeze(-1)
        smooth = smooth - smooth[:, middle, None]
        change = float(((smooth - curve).abs() * importance).max())
        curve = smooth
        if change < tolerance:
            return curve
    warnings.warn(
        f"solve_robertson: {iterations} iterations did not settle the curve: it still moves by {change:.2g}",
        RuntimeWarning,
        stacklevel=3,
    )
    return curve
