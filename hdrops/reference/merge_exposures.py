"""Exposure merging in the log domain (OP-10) and its weight tables (OP-9), in plain PyTorch.

The frames are first put in one order per pixel, by exposure and, where exposures are equal, by reading. Everything that
needs an order (the shortest, middle and longest frame) then refers to it, and no result depends on the list order.
"""

import torch
from torch import Tensor

WEIGHT_TABLES = {"hat": (0.0, 1.0, 0.0), "debevec": (0.0, 1.0, 0.0), "uniform": (1.0,)}
SMALLEST_RESPONSE = 1e-7
NO_WEIGHT = 1e-4
EPSILON = 1e-9
LEVELS = {torch.uint8: 256, torch.uint16: 65536}


def accumulation_dtype(stack: Tensor, curve: Tensor | None) -> torch.dtype:
    """The dtype the merge is computed in: float64 for a float64 stack, or integers with a float64 curve."""
    decisive = curve.dtype if stack.dtype in LEVELS and curve is not None else stack.dtype
    return torch.float64 if decisive == torch.float64 else torch.float32


def radiance_dtype(stack: Tensor, curve: Tensor | None) -> torch.dtype:
    """The dtype of the result: the stack's, and for integers the one the merge is computed in."""
    return accumulation_dtype(stack, curve) if stack.dtype in LEVELS else stack.dtype


def weight_table(weight: str | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The weight function as a table [L] over [0, 1], interpolated linearly; no gradient reaches it."""
    if isinstance(weight, Tensor):
        return weight.detach().to(dtype)
    # Filled on the device: a copy from the host would wait for the device, and no CUDA graph could hold it.
    table = torch.zeros(len(WEIGHT_TABLES[weight]), dtype=dtype, device=device)
    for i, value in enumerate(WEIGHT_TABLES[weight]):
        if value != 0:
            table[i : i + 1].fill_(value)
    return table


def is_interleaved(stack: Tensor) -> bool:
    """Whether each frame [C, H, W] is stored channels last, as photographs read from files are, and not planar."""

    def stored_as(strides: tuple[int, ...]) -> bool:
        dims = zip(stack.shape[2:], stack.stride()[2:], strides, strict=True)
        return all(size == 1 or stride == wanted for size, stride, wanted in dims)

    _, _, channels, height, width = stack.shape
    return stored_as((1, width * channels, channels)) and not stored_as((height * width, width, 1))


def _interpolate(table: Tensor, position: Tensor) -> Tensor:
    """OP-6: ``table`` [N|1, 1, C|1, L] at the fractional index ``position`` [N, P, C, H, W]; constant outside."""
    length = table.shape[-1]
    lower = position.detach().floor().clamp(0, length - 1).long()
    upper = (lower + 1).clamp(max=length - 1)
    fraction = position - lower.to(position.dtype)
    n, p, c, h, w = position.shape
    table = table.expand(n, p, c, length)

    def at(index: Tensor) -> Tensor:
        return table.gather(-1, index.flatten(-2)).view(n, p, c, h, w)

    return (1 - fraction) * at(lower) + fraction * at(upper)


def _at_reading(table: Tensor, reading: Tensor, codes: Tensor | None) -> Tensor:
    """A table over [0, 1]: its own entry where it has one for each code, else interpolated."""
    if codes is not None and table.shape[-1] == LEVELS[codes.dtype]:
        return _interpolate(table, codes.to(table.dtype))
    return _interpolate(table, reading * (table.shape[-1] - 1))


def _response(curve: Tensor | None, reading: Tensor, codes: Tensor | None) -> Tensor:
    """Relative exposure of each reading, positive."""
    if curve is None:  # linear; constant at and beyond both ends, as a curve is
        inside = torch.where(reading < 1, reading, torch.ones_like(reading))
        return torch.where(inside > 0, inside, torch.full_like(inside, SMALLEST_RESPONSE))
    curve = curve.reshape((1, 1, -1) if curve.dim() == 1 else curve.shape).unsqueeze(1).to(reading.dtype)
    curve = torch.where(curve > 0, curve, torch.full_like(curve, SMALLEST_RESPONSE))
    return _at_reading(curve, reading, codes)


def merge_exposures(
    stack: Tensor,
    log_exposures: Tensor,
    curve: Tensor | None = None,
    *,
    weight: str | Tensor = "hat",
    mask: Tensor | None = None,
    fallback: bool = True,
) -> Tensor:
    """:func:`hdrops.merge_exposures`, differentiable any number of times."""
    dtype = accumulation_dtype(stack, curve)
    codes = stack if stack.dtype in LEVELS else None
    reading = stack.to(dtype) if codes is None else stack.to(dtype) / (LEVELS[stack.dtype] - 1)
    log_time = log_exposures.to(dtype)[:, :, None, None, None].expand_as(reading)

    numbers = ~reading.isnan()
    reading = torch.where(numbers, reading, torch.zeros_like(reading)).clamp(0, 1)
    share = torch.ones_like(reading)
    if mask is not None:
        share = (~mask if mask.dtype == torch.bool else mask.detach()).to(dtype).expand_as(reading)
        share = torch.where(share > 0, share, torch.zeros_like(share))
    valid = numbers & (share > 0)
    excluded = ~valid.any(1, keepdim=True)
    share = torch.where(excluded, torch.ones_like(share), share)
    valid = torch.where(excluded, numbers, valid)

    table = weight_table(weight, stack.device, dtype)
    weights = _at_reading(table[None, None, None], reading.detach(), codes)
    weights = torch.where(valid, share * weights, torch.zeros_like(weights))
    log_radiance = _response(curve, reading, codes).log() - log_time
    total = weights.sum(1)
    merged = (weights * log_radiance).sum(1) / (total + EPSILON)
    if fallback:
        unweighted = _unweighted_estimate(reading, log_radiance, log_time, valid)
        merged = torch.where(total <= NO_WEIGHT, unweighted, merged)
    merged = torch.where(numbers.any(1), merged, torch.full_like(merged, torch.nan))
    return _radiance(merged, radiance_dtype(stack, curve), is_interleaved(stack))


def _unweighted_estimate(reading: Tensor, log_radiance: Tensor, log_time: Tensor, valid: Tensor) -> Tensor:
    """The shortest frame's estimate if the middle frame is bright, else the longest's, among the valid ones."""
    order = reading.detach().argsort(dim=1, stable=True)
    order = order.gather(1, log_time.detach().gather(1, order).argsort(dim=1, stable=True))
    reading, log_radiance, valid = (part.gather(1, order) for part in (reading.detach(), log_radiance, valid))
    rank = valid.long().cumsum(1) - 1
    count = valid.long().sum(1, keepdim=True)
    bright = (valid & (rank == torch.div(count - 1, 2, rounding_mode="floor")) & (reading > 0.5)).any(1, keepdim=True)
    chosen = valid & torch.where(bright, rank == 0, rank == count - 1)
    return torch.where(chosen, log_radiance, torch.zeros_like(log_radiance)).sum(1)


def _radiance(log_radiance: Tensor, dtype: torch.dtype, interleaved: bool) -> Tensor:
    """exp, saturated where ``dtype`` would make it zero or infinite."""
    computed, stored = torch.finfo(log_radiance.dtype), torch.finfo(dtype)
    # exp stays a normal number of the dtype it is computed in; float16 alone is narrower than float32.
    lowest, highest = (-87.0, 88.0) if computed.dtype == "float32" else (-708.0, 709.0)
    radiance = log_radiance.clamp(lowest, highest).exp()
    least = 2.0**-24 if dtype == torch.float16 else stored.tiny
    radiance = radiance.clamp(least, min(stored.max, computed.max)).to(dtype)
    return radiance.contiguous(memory_format=torch.channels_last if interleaved else torch.contiguous_format)
