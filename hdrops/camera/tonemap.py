"""Tone mapping: radiance to what a display can show, and the mu-law of HDR training losses.

The mappers take linear radiance [..., 3, H, W] and give linear display light in [0, 1], same shape; encode it with
:func:`srgb_encode` to make a picture. They compress luminance (Rec. 709) and scale the three channels alike, which
keeps the hues. Statistics (log average, percentiles) are per image, over its finite pixels only; NaN shows as black and
infinity as white. The percentiles are read from at most about a million pixels on a regular grid.
"""

import math

import torch
from torch import Tensor

_PERCENTILE_PIXELS = 1 << 20
# Luminance below this fraction of the mean of the image counts as black in logarithms.
_BLACK = 1e-6


def mu_law(radiance: Tensor, mu: float = 5000.0) -> Tensor:
    """log(1 + mu x) / log(1 + mu), elementwise: [0, 1] onto [0, 1]; negative values are taken as odd: -mu_law(-x)."""
    return radiance.sign() * torch.log1p(mu * radiance.abs()) / math.log1p(mu)


def mu_law_inverse(compressed: Tensor, mu: float = 5000.0) -> Tensor:
    """The x with ``mu_law(x, mu) == compressed``."""
    return compressed.sign() * torch.expm1(compressed.abs() * math.log1p(mu)) / mu


def srgb_encode(linear: Tensor) -> Tensor:
    """Linear light to sRGB code values (IEC 61966-2-1), both in [0, 1]; the input is clamped."""
    linear = linear.nan_to_num(nan=0.0).clamp(0, 1)
    # The power has an infinite slope at 0: it is evaluated only where it is used.
    power = 1.055 * linear.clamp_min(0.0031308).pow(1 / 2.4) - 0.055
    return torch.where(linear <= 0.0031308, 12.92 * linear, power)


def srgb_decode(encoded: Tensor) -> Tensor:
    """Inverse of :func:`srgb_encode`."""
    encoded = encoded.nan_to_num(nan=0.0).clamp(0, 1)
    power = ((encoded.clamp_min(0.04045) + 0.055) / 1.055).pow(2.4)
    return torch.where(encoded <= 0.04045, encoded / 12.92, power)


def luminance(rgb: Tensor) -> Tensor:
    """Rec. 709 luminance of linear RGB [..., 3, H, W]: [..., 1, H, W]."""
    if rgb.dim() < 3 or rgb.shape[-3] != 3:
        raise ValueError(f"luminance: the image must be [..., 3, H, W], got shape {list(rgb.shape)}")
    red, green, blue = rgb.split(1, dim=-3)
    light: Tensor = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return light


def percentile(values: Tensor, fraction: float) -> Tensor:
    """That quantile of each image [..., 1, H, W] over its finite pixels: [..., 1, 1, 1]; 1 where there are none."""
    flat = values.flatten(-3)
    step = max(1, flat.shape[-1] // _PERCENTILE_PIXELS)
    flat = flat[..., ::step]
    finite = flat.isfinite()
    ordered = flat.masked_fill(~finite, torch.inf).sort(dim=-1).values
    count = finite.sum(-1, keepdim=True)
    index = ((count - 1).clamp_min(0) * fraction).round().long()
    found = ordered.gather(-1, index)
    return torch.where(count > 0, found, 1.0)[..., None, None]


def _prepare(name: str, radiance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Radiance without NaN, infinities or negatives; its luminance; its log average over the finite pixels."""
    if not radiance.is_floating_point():
        raise TypeError(f"{name}: radiance must be floating point, got {radiance.dtype}")
    if radiance.dim() < 3 or radiance.shape[-3] != 3:
        raise ValueError(f"{name}: radiance must be [..., 3, H, W], got shape {list(radiance.shape)}")
    raw = luminance(radiance)
    valid = raw.isfinite() & (raw > 0)
    count = valid.sum((-3, -2, -1), keepdim=True)
    held = torch.where(valid, raw, 1.0)
    mean = torch.where(valid, raw / count.clamp_min(1), 0.0).sum((-3, -2, -1), keepdim=True)
    floor = torch.where(count > 0, mean * _BLACK, 1.0)
    logs = torch.where(valid, held.maximum(floor).log(), 0.0).sum((-3, -2, -1), keepdim=True)
    average = torch.where(count > 0, (logs / count.clamp_min(1)).exp(), 1.0)
    brightest = torch.where(valid, raw, 0.0).amax((-3, -2, -1), keepdim=True) if raw.numel() else raw
    light = torch.where(radiance == torch.inf, brightest, radiance.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))
    light = light.clamp_min(0)
    return light, luminance(light), average


def _recolour(light: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Scales the channels by after / before, black where before is 0."""
    ratio = torch.where(before > 0, after / before.masked_fill(before <= 0, 1.0), 0.0)
    return (light * ratio).clamp(0, 1)


def reinhard(radiance: Tensor, *, key: float = 0.18, white: float | None = None) -> Tensor:
    """Global operator of Reinhard et al. (SIGGRAPH 2002): L' = s (1 + s / white^2) / (1 + s), s = key L / log average.

    Args:
        radiance: [..., 3, H, W], linear.
        key: display luminance of the scene's log average, 0.18 a middle grey.
        white: smallest scaled luminance s shown as pure white; None takes the image's 99.9th percentile, at least 1.

    Returns:
        Linear display light in [0, 1], the shape and dtype of ``radiance``; differentiable.

    Example:
        >>> import torch
        >>> from hdrops.camera import reinhard, srgb_encode
        >>> round(float(srgb_encode(reinhard(torch.full((3, 4, 4), 7.0), white=4.0)).mean()), 2)
        0.43
    """
    light, before, average = _prepare("reinhard", radiance)
    scaled = before * (key / average)
    if white is None:
        brightest = percentile(luminance(radiance) * (key / average), 0.999).clamp_min(1.0)
    else:
        brightest = torch.as_tensor(white, dtype=radiance.dtype, device=radiance.device)
    after = scaled * (1 + scaled / brightest.square()) / (1 + scaled)
    return _recolour(light, before, after)


def drago(radiance: Tensor, *, bias: float = 0.85, exposure: float = 1.0) -> Tensor:
    """Adaptive logarithm of Drago et al. (Eurographics 2003); its base runs from 2 in shadows to 10 in highlights.

    Args:
        radiance: [..., 3, H, W], linear.
        bias: of the base's course, 0.7 .. 0.9; larger is darker in the shadows.
        exposure: factor on the scene before mapping.

    Returns:
        Linear display light in [0, 1], the shape and dtype of ``radiance``; differentiable. The 99.9th percentile of
        luminance maps to 1.
    """
    if not 0 < bias < 1:
        raise ValueError(f"drago: bias must lie between 0 and 1, got {bias}")
    light, before, average = _prepare("drago", radiance)
    scaled = before * (exposure / average)
    peak = percentile(luminance(radiance) * (exposure / average), 0.999).clamp_min(1e-4)
    share = (scaled / peak).clamp(0, 1)
    # The power has an infinite slope at 0.
    course = share.clamp_min(1e-12).pow(math.log(bias) / math.log(0.5))
    after = torch.log1p(scaled) / torch.log(2 + 8 * course) / torch.log10(1 + peak)
    return _recolour(light, before, after)


def expose(radiance: Tensor, *, stops: float = 0.0, gamma: float = 1.0) -> Tensor:
    """A photograph's exposure: 18 % of the display for the log average, times 2^stops, then power 1 / gamma; clipped.

    Args:
        radiance: [..., 3, H, W], linear.
        stops: brightening in EV.
        gamma: 1 leaves linear display light for :func:`srgb_encode`; 2.2 encodes for a plain gamma display.

    Returns:
        [0, 1], the shape and dtype of ``radiance``; differentiable.
    """
    if not gamma > 0:
        raise ValueError(f"expose: gamma must be positive, got {gamma}")
    light, _, average = _prepare("expose", radiance)
    shown = (light * (0.18 * 2.0**stops / average)).clamp(0, 1)
    return shown if gamma == 1 else torch.pow(shown.clamp_min(1e-12), 1 / gamma)
