"""Corresponding pixels of a bracket, drawn for response recovery: reproducible, spread over the image, masks kept.

The image, read row by row, is cut into as many equal runs as there are samples, and one pixel is drawn in each run: the
samples cover the picture evenly, none is drawn twice, and nothing but the drawn pixels is ever read.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Every stack, whatever its depth, is calibrated on this many codes; deeper values lie between two of them.
LEVELS = 256


class Samples(NamedTuple):
    """Drawn pixels: codes [N, S, P, C] in code units 0..255, and bool [N, S, P, C], True where excluded (or None)."""

    codes: Tensor
    excluded: Tensor | None


def check_stack(name: str, stack: Tensor, log_exposures: Tensor, mask: Tensor | None) -> None:
    """Raises ValueError or TypeError unless the three describe a bracket."""
    if stack.dim() != 5:
        raise ValueError(f"{name}: stack must be [N, P, C, H, W], got shape {list(stack.shape)}")
    if stack.dtype not in (torch.uint8, torch.uint16) and not stack.is_floating_point():
        raise TypeError(f"{name}: stack must be uint8, uint16 or floating point in [0, 1], got {stack.dtype}")
    batch, frames, _, height, width = stack.shape
    if frames < 2:
        raise ValueError(f"{name}: a bracket needs at least 2 frames, got {frames} (stack shape {list(stack.shape)})")
    if height * width == 0:
        raise ValueError(f"{name}: the frames are empty (stack shape {list(stack.shape)})")
    if not log_exposures.is_floating_point():
        raise TypeError(f"{name}: log_exposures must be floating point, got {log_exposures.dtype}")
    if log_exposures.shape not in ((frames,), (1, frames), (batch, frames)):
        raise ValueError(
            f"{name}: log_exposures must be [P] or [N|1, P] with N = {batch}, P = {frames}, "
            f"got shape {list(log_exposures.shape)}"
        )
    brackets = log_exposures.detach().reshape(-1, frames).tolist()
    if not all(math.isfinite(value) for bracket in brackets for value in bracket):
        raise ValueError(f"{name}: log_exposures must be finite, got {log_exposures.tolist()}")
    if any(min(bracket) == max(bracket) for bracket in brackets):
        raise ValueError(f"{name}: all {frames} exposures are equal; a response needs at least two different ones")
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"{name}: mask must be bool (True excludes a pixel), got {mask.dtype}")
        if mask.shape not in ((batch, frames, 1, height, width), (1, frames, 1, height, width)):
            raise ValueError(
                f"{name}: mask must be [N|1, P, 1, H, W] = [{batch}|1, {frames}, 1, {height}, {width}], "
                f"got shape {list(mask.shape)}"
            )


def _draw(pixels: int, samples: int, seed: int) -> Tensor:
    """Indices int64 [min(samples, pixels)] in rising order, one in each of equal runs of 0..pixels-1."""
    if samples >= pixels:
        return torch.arange(pixels)
    edges = (torch.arange(samples + 1, dtype=torch.float64) * (pixels / samples)).ceil().long()
    jitter = torch.rand(samples, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return edges[:-1] + (jitter * edges.diff()).long()


def _pick(images: Tensor, pixels: Tensor) -> Tensor:
    """Pixels of [..., H, W] images at linear indices: [..., S]."""
    flat = images.flatten(-2)
    if flat.dtype == torch.uint16:
        return flat[..., pixels]
    return flat.index_select(-1, pixels)


def sample_stack(stack: Tensor, samples: int, mask: Tensor | None = None, seed: int = 0) -> Samples:
    """Draws pixels that correspond between the frames of a stack.

    Args:
        stack: [N, P, C, H, W], uint8, uint16 or floating point in [0, 1].
        samples: how many pixels per image; all pixels where there are fewer.
        mask: bool [N|1, P, 1, H, W], True where a frame's pixel is invalid.
        seed: of the draw; the same positions on every device.

    Returns:
        The samples in code units 0..255: uint8 as they are, deeper values as real numbers between two codes. NaN
        values are excluded.
    """
    if samples < 2:
        raise ValueError(f"sample_stack: samples must be at least 2, got {samples}")
    pixels = _draw(stack.shape[-2] * stack.shape[-1], samples, seed).to(stack.device)
    values = _pick(stack, pixels).permute(0, 3, 1, 2)
    excluded = None if mask is None else _pick(mask, pixels).permute(0, 3, 1, 2).expand(values.shape)
    if values.dtype == torch.uint8:
        return Samples(values, excluded)
    scale = (LEVELS - 1) / 65535 if values.dtype == torch.uint16 else LEVELS - 1
    codes = values.double() * scale
    unreadable = codes.isnan()
    if bool(unreadable.any()):
        codes = torch.where(unreadable, 0, codes)
        excluded = unreadable if excluded is None else excluded | unreadable
    return Samples(codes, excluded)
