"""Layers that two systems use."""

import torch
from torch import Tensor, nn


class OutputConv2d(nn.Conv2d):
    """A network's last convolution, in its weights' own precision also under autocast.

    An HDR image in bfloat16 would have 8 significant bits, one in float16 11: less than the photographs it is made of.
    """

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.to(self.weight.dtype))
