"""Observations of a bracket as linear readings of a response curve, shared by the solvers of response recovery.

An observation at integer code z reads the curve at z; one at a fractional code reads it between the two neighbouring
codes.
"""

import numpy as np
import torch
from torch import Tensor

# Products of a sample's entries are scattered through temporaries of at most this many numbers.
_PRODUCTS_PER_CHUNK = 1 << 18
WEIGHTS = ("debevec", "hat", "gaussian", "uniform")


def weight_table(weight: str | Tensor, levels: int, device: torch.device) -> Tensor:
    """Weight of each code, float64 [levels].

    "debevec" min(z, max - z); "hat" the same scaled to 1; "gaussian" Robertson's exp(-4 x^2), x = 2 z / max - 1,
    lowered to 0 at the ends; "uniform" 1; or a tensor [levels].
    """
    if isinstance(weight, Tensor):
        if weight.shape != (levels,):
            raise ValueError(f"response recovery: weight must be [levels] = [{levels}], got shape {list(weight.shape)}")
        table = weight.detach().to(device, torch.float64)
        if not bool((table.isfinite() & (table >= 0)).all()):
            raise ValueError("response recovery: weight must be finite and not negative at every code")
        return table
    code = torch.arange(levels, dtype=torch.float64, device=device)
    distance = torch.minimum(code, levels - 1 - code)
    if weight == "debevec":
        return distance
    if weight == "hat":
        return distance * (2 / (levels - 1))
    if weight == "gaussian":
        end = torch.exp(torch.tensor(-4.0, dtype=torch.float64, device=device))
        bell = torch.exp(-4 * (2 * code / (levels - 1) - 1).square())
        return ((bell - end) / (1 - end)).clamp_min(0)
    if weight == "uniform":
        return torch.ones_like(distance)
    raise ValueError(f"response recovery: weight must be one of {WEIGHTS} or a tensor [{levels}], got {weight!r}")


def scatter(index: Tensor, values: Tensor, size: int) -> Tensor:
    """Sums values [B, ...] into [B, size] by their index."""
    out = values.new_zeros(index.shape[0], size)
    return out.scatter_add_(1, index.flatten(1), values.flatten(1))


def scatter_products(index: Tensor, left: Tensor, right: Tensor, size: int) -> Tensor:
    """sum_i left_i right_i^T for sparse vectors: [B, size, size].

    Args:
        index: int64 [B, S, K], where the K entries of vectors i = 1..S stand.
        left, right: [B, S, K], their values.
        size: of the vectors.
    """
    batch, samples, entries = index.shape
    first_of_image = torch.arange(batch, device=index.device).view(batch, 1) * size**2
    matrix = left.new_zeros(batch * size * size)
    chunk = max(1, _PRODUCTS_PER_CHUNK // max(1, batch * entries))
    for start in range(0, samples, chunk):
        # Entries first: the products of one entry with all others are then products of contiguous slices.
        column, a, b = (t[:, start : start + chunk].permute(2, 0, 1).contiguous() for t in (index, left, right))
        row = column * size + first_of_image
        for k in range(entries):
            matrix.scatter_add_(0, (row[k] + column).flatten(), (a[k] * b).flatten())
    return matrix.view(batch, size, size)


class Observations:
    """What S samples show in P frames, for B independent curves.

    Attributes:
        lower: int64 [B, S, P], the code at or below each observation.
        fraction: float64 [B, S, P], the distance to that code; None if all codes are integers.
        weight: float64 [B, S, P], the table's value there; 0 where excluded.
    """

    def __init__(self, codes: Tensor, table: Tensor, mask: Tensor | None) -> None:
        self.levels = table.numel()
        self.fraction: Tensor | None = None
        if codes.is_floating_point():
            position = codes.double().clamp(0, self.levels - 1)
            self.lower = position.detach().floor().long().clamp_(max=self.levels - 2)
            self.fraction = position - self.lower
        else:
            self.lower = codes.long()
        self.weight = self.read(table)
        if mask is not None:
            self.weight = self.weight.masked_fill(mask, 0)

    def read(self, curve: Tensor) -> Tensor:
        """Curves [L] or [B, L] at every observation: [B, S, P]."""
        if curve.dim() == 1:
            at, above = curve[self.lower], None if self.fraction is None else curve[self.lower + 1]
        else:
            flat = self.lower.flatten(1)
            at = curve.gather(1, flat).view_as(self.lower)
            above = None if self.fraction is None else curve.gather(1, flat + 1).view_as(self.lower)
        return at if self.fraction is None or above is None else torch.lerp(at, above, self.fraction)

    def spread(self, values: Tensor) -> Tensor:
        """The transpose of :meth:`read`: values [B, S, P] summed into the codes they read, [B, L]."""
        if self.fraction is None:
            return scatter(self.lower, values, self.levels)
        upper = values * self.fraction
        return scatter(self.lower, values - upper, self.levels) + scatter(self.lower + 1, upper, self.levels)

    def require_slope(self, name: str) -> None:
        """Raises ValueError unless, for every curve, a sample shows different codes with weight in two frames.

        Without one, any slope of the curve fits the data, and smoothness does not choose either.
        """
        position = self.lower if self.fraction is None else self.lower + self.fraction.detach()
        weighted = self.weight > 0
        lowest = torch.where(weighted, position, torch.inf).amin(-1)
        highest = torch.where(weighted, position, -torch.inf).amax(-1)
        lacking = ~(highest > lowest).any(-1)
        if bool(lacking.any()):
            raise ValueError(
                f"{name}: in {int(lacking.sum())} of {lacking.numel()} images times channels no sample is well "
                "exposed, at different codes, in two frames, so nothing fixes the slope of the curve"
            )

    def codes_read(self) -> Tensor:
        """The codes each sample reads: int64 [B, S, K], K = P or, for fractional codes, 2 P."""
        return self.lower if self.fraction is None else torch.cat((self.lower, self.lower + 1), -1)

    def shares(self, values: Tensor) -> Tensor:
        """Values [B, S, P] shared out to :meth:`codes_read`: [B, S, K]."""
        if self.fraction is None:
            return values
        upper = values * self.fraction
        return torch.cat((values - upper, upper), -1)


def check_samples(
    name: str, codes: Tensor, log_exposures: Tensor, smoothness: float, levels: int, mask: Tensor | None
) -> None:
    """Raises ValueError or TypeError unless codes, [S, P] or [..., S, P, C], fit the other arguments."""
    if codes.dim() < 2:
        raise ValueError(
            f"{name}: codes must be [samples, frames] or [..., samples, frames, channels], "
            f"got shape {list(codes.shape)}"
        )
    if codes.is_complex() or codes.dtype == torch.bool:
        raise TypeError(f"{name}: codes must be integers or real, got {codes.dtype}")
    if not log_exposures.is_floating_point():
        raise TypeError(f"{name}: log_exposures must be floating point, got {log_exposures.dtype}")
    if levels < 4:
        raise ValueError(f"{name}: levels must be at least 4, got {levels}")
    if not 0 < smoothness < float("inf"):
        raise ValueError(f"{name}: smoothness must be positive and finite, got {smoothness}")
    frames = codes.shape[1] if codes.dim() == 2 else codes.shape[-2]
    if frames == 0 or log_exposures.dim() < 1 or log_exposures.shape[-1] != frames:
        raise ValueError(
            f"{name}: log_exposures must end in the {frames} frames of codes ([samples, frames] or "
            f"[..., samples, frames, channels], here {list(codes.shape)}), got shape {list(log_exposures.shape)}"
        )
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"{name}: mask must be bool (True excludes), got {mask.dtype}")
    if codes.is_floating_point():
        if not bool(codes.isfinite().all()):
            raise ValueError(f"{name}: codes must be finite; exclude others by mask and set them to any code")
    elif codes.numel() and not (codes.dtype == torch.uint8 and levels >= 256):
        low, high = (int(value) for value in torch.aminmax(codes.to(torch.int64)))
        if low < 0 or high >= levels:
            raise ValueError(f"{name}: codes must lie in 0..levels-1 = 0..{levels - 1}, got {low}..{high}")


class Layout:
    """How the caller's codes [..., S, P, C] or [S, P] stand as independent systems [B, S, P], and results back."""

    def __init__(self, codes: Tensor, log_exposures: Tensor) -> None:
        self.single = codes.dim() == 2
        samples, frames = codes.shape[:2] if self.single else codes.shape[-3:-1]
        channels = 1 if self.single else codes.shape[-1]
        # Not torch.broadcast_shapes, whose first call imports sympy: half a second.
        self.lead = np.broadcast_shapes(codes.shape[:-3], log_exposures.shape[:-1])
        self.shape = (*self.lead, samples, frames, channels)

    def systems(self, tensor: Tensor) -> Tensor:
        """Codes or mask as [B, S, P], in memory as [B, P, S]: sums over the frames then run along the samples."""
        whole = tensor.unsqueeze(-1) if self.single else tensor
        return whole.expand(self.shape).movedim(-1, -3).reshape(-1, *self.shape[-3:-1]).mT.contiguous().mT

    def times(self, log_exposures: Tensor) -> Tensor:
        """log_exposures as [B, 1, P] in float64."""
        *_, frames, channels = self.shape
        whole = log_exposures.double().expand(*self.lead, frames).unsqueeze(-2)
        return whole.expand(*self.lead, channels, frames).reshape(-1, 1, frames)

    def result(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Results [B, M] as [..., M, C], or [M] for codes [S, P]."""
        whole = values.to(dtype).view(*self.lead, self.shape[-1], values.shape[-1])
        return whole.squeeze(-2) if self.single else whole.movedim(-2, -1)
