"""``hdrops tonemap``: an HDR image to a picture for an ordinary display; and the preview of ``hdrops merge``."""

import argparse
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hdrops.camera import drago, luminance, mu_law, reinhard, srgb_encode
from hdrops.io import PICTURE_SUFFIXES, InputError, Outputs, Pixels, read_image, write_image

PREVIEW_SIDE = 2048

_log = logging.getLogger("hdrops")


def _mu(radiance: Tensor) -> Tensor:
    """The mu-law of the papers, over the image's 99.9th percentile of luminance; a display value as it is."""
    light = luminance(radiance).flatten()
    peak = light[:: max(1, light.numel() >> 20)].quantile(0.999).clamp_min(1e-12)
    return mu_law((radiance / peak).clamp(0, 1))


# Radiance [1, 3, H, W], finite, to display values in [0, 1].
OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "reinhard": lambda radiance: srgb_encode(reinhard(radiance)),
    "drago": lambda radiance: srgb_encode(drago(radiance)),
    "mu": _mu,
}


def to_display(radiance: Pixels, operator: str) -> NDArray[np.uint8]:
    """8-bit sRGB [H, W, 3] of radiance [H, W, 3]; NaN is shown black, infinity as the brightest finite value."""
    finite = np.isfinite(radiance)
    if not finite.all():
        brightest = float(radiance[finite].max(initial=0.0))
        radiance = np.nan_to_num(radiance, nan=0.0, posinf=brightest, neginf=0.0)
    shown = OPERATORS[operator](torch.from_numpy(radiance.clip(0)).permute(2, 0, 1).unsqueeze(0))
    codes = (shown[0].permute(1, 2, 0) * 255 + 0.5).clamp(0, 255).byte()
    return np.asarray(codes.contiguous().numpy())


def shrink(radiance: Pixels, side: int = PREVIEW_SIDE) -> Pixels:
    """The image averaged over squares of whole pixels until neither side exceeds ``side``."""
    factor = -(-max(radiance.shape[:2]) // side)
    if factor == 1:
        return radiance
    height, width = radiance.shape[0] // factor, radiance.shape[1] // factor
    cut = radiance[: height * factor, : width * factor]
    total: Pixels = np.zeros((height, width, 3), np.float32)
    for row in range(factor):
        for column in range(factor):
            total += cut[row::factor, column::factor]
    total /= factor * factor
    return total


def run(args: argparse.Namespace) -> None:
    """Reads, maps and writes one image."""
    source = Path(args.image)
    with Outputs([source]) as outputs:
        target = outputs.add(args.output, PICTURE_SUFFIXES)
        radiance = read_image(source)
        if radiance.dtype != np.float32:
            raise InputError(f"{source}: has {radiance.dtype} pixels; tone mapping takes float images (EXR, HDR, TIFF)")
        bad = int((~np.isfinite(radiance)).sum())
        if bad:
            _log.warning("%s: %d values are NaN or infinite", source, bad)
        write_image(target, to_display(np.ascontiguousarray(radiance), args.tonemap))
    print(f"{args.output}: {radiance.shape[1]} x {radiance.shape[0]}, {args.tonemap}")
