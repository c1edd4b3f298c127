"""Layers that two systems use."""

import contextlib

import torch
from torch import Tensor, nn


class OutputConv2d(nn.Conv2d):
    """A network's last convolution, in its weights' own precision also under autocast.

    An HDR image in bfloat16 would have 8 significant bits, one in float16 11: less than the photographs it is made of.
    """

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        autocasts = torch.amp.is_autocast_available(device)
        with torch.autocast(device, enabled=False) if autocasts else contextlib.nullcontext():
            return super().forward(input.to(self.weight.dtype))
