"""What the tests of DuHDR share: the system, and smooth pictures."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hdrops.models.duhdr import DuHDR


def system() -> DuHDR:
    """The default configuration, the same weights each time."""
    torch.manual_seed(1)
    return DuHDR()


def smooth(brightest: float, height: int, width: int, number: int = 1) -> Tensor:
    """Smooth pictures of values up to ``brightest``, the same each time."""
    small = brightest * torch.rand(number, 3, 5, 6, generator=torch.Generator().manual_seed(5))
    return F.interpolate(small, size=(height, width), mode="bilinear", align_corners=True)
