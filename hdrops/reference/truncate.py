"""The truncation process (OP-14) in plain PyTorch: a self-guided filter splits an image into base and detail."""

import torch
from torch import Tensor
from torch.nn import functional as F

SMALLEST_BASE = 1e-15


def _box_mean(image: Tensor, radius: int) -> Tensor:
    padded = F.pad(image, (radius, radius, radius, radius), mode="reflect")
    return F.avg_pool2d(padded, 2 * radius + 1, stride=1)


def truncate(input: Tensor, *, radius: int = 2, eps: float = 0.01) -> Tensor:
    """:func:`hdrops.truncate`, differentiable any number of times."""
    image = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
    mean = _box_mean(image, radius)
    variance = _box_mean(image * image, radius) - mean * mean
    slope = variance / (variance + eps)
    base = _box_mean(slope, radius) * image + _box_mean(mean - slope * mean, radius)
    detail = image / (base + SMALLEST_BASE)
    return (base.clamp(0, 1) * detail).to(input.dtype)
