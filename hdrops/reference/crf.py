"""Response-curve lookup, histogram features and quantisation in plain PyTorch (OP-6, OP-8, OP-11, OP-12, OP-13).

Coordinates are computed in float32, in float64 for float64 input, like in the kernels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

CODES = {torch.uint8: 256, torch.uint16: 65536}
"""Integer pixel types, and the number of their codes."""


def _coordinates(input: Tensor) -> Tensor:
    return input if input.dtype == torch.float64 else input.float()


def _take(curve: Tensor, index: Tensor) -> Tensor:
    """curve [N|1, C|1, L] at index [N, C, ...], or at an index of any shape if there is one curve."""
    if curve.shape[0] == 1 and curve.shape[1] == 1:
        return curve.reshape(-1)[index]
    n, c = index.shape[:2]
    flat = index.reshape(n, c, -1)
    return curve.expand(n, c, -1).gather(2, flat).reshape(index.shape)


def crf_lookup(input: Tensor, curve: Tensor, *, mode: str = "linear", gradient_scale: float | None = None) -> Tensor:
    """See :func:`hdrops.crf_lookup`."""
    curve = curve.reshape(1, 1, -1) if curve.dim() == 1 else curve
    last = curve.shape[-1] - 1
    if input.dtype in CODES:
        codes = CODES[input.dtype]
        if curve.shape[-1] != codes:
            ramp = torch.arange(codes, device=curve.device, dtype=torch.float64) / (codes - 1)
            ramp = ramp.expand(*curve.shape[:2], codes)
            curve = crf_lookup(ramp, curve, mode=mode).to(curve.dtype)
        return _take(curve, input.long())
    x = _coordinates(input)
    curve = curve.to(x.dtype)
    unknown = x.isnan()
    clamped = torch.where(unknown, 0, x).clamp(0, 1)
    position = clamped.detach() * last
    if mode == "linear":
        index = position.floor().long()
        fraction = clamped * last - index
        value = _take(curve, index)
        output = value + fraction * (_take(curve, (index + 1).clamp(max=last)) - value)
    else:
        index = position.round().long()
        value = _take(curve, index)
        below = torch.where(index > 0, _take(curve, (index - 1).clamp(min=0)), 0)
        slope = (value - below) * (last if gradient_scale is None else gradient_scale)
        output = value + slope * (clamped - clamped.detach())
    return torch.where(unknown, torch.nan, output).to(input.dtype)


def quantize_ste(input: Tensor, *, levels: int = 256, gradient: str = "inside") -> Tensor:
    """See :func:`hdrops.quantize_ste`."""
    x = _coordinates(input)
    quantized = (x.detach().clamp(0, 1) * (levels - 1) + 0.5).floor() / (levels - 1)
    passed = x.clamp(0, 1) if gradient == "inside" else torch.where(x.isfinite(), x, 0)
    return (quantized + (passed - passed.detach())).to(input.dtype)


def tent_histogram(input: Tensor, *, bins: Sequence[int] = (4, 8, 16)) -> Tensor:
    """See :func:`hdrops.tent_histogram`."""
    x = _coordinates(input)
    maps = [(1 - (scale * x - centre).abs()).relu() for scale in bins for centre in range(scale + 1)]
    return torch.cat(maps, dim=1).to(input.dtype)


def value_histogram(input: Tensor, *, bins: int = 256) -> Tensor:
    """See :func:`hdrops.value_histogram`."""
    x = _coordinates(input)
    value = ((x.clamp(-1, 1) + 1) * ((bins - 1) / 2)).flatten(2)
    value = torch.where(value.isnan(), 0, value)
    index = value.detach().long()
    sums = value.new_zeros(*input.shape[:2], bins).scatter_add(2, index, value)
    levels = torch.arange(bins, device=x.device, dtype=x.dtype).clamp(min=1)
    return (sums / (levels * (bins - 1))).to(input.dtype)
