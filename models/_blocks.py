"""Blocks of networks that are not one system's own, and how convolutions start."""

import contextlib

import torch
from torch import Tensor, nn


class ChannelAttention(nn.Module):
    """Scales each channel by a gate in (0, 1) that the means of all channels decide.

    Mean over the pixels, 1x1 convolution to channels / reduction, ReLU, 1x1 convolution back, sigmoid: the squeeze and
    excitation gate (Hu et al., CVPR 2018) as RCAN has it (Zhang et al., ECCV 2018), with biases.

    Shapes:
        [N, channels, H, W] -> the same.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        if channels < 1 or reduction < 1 or channels % reduction != 0:
            raise ValueError(
                f"ChannelAttention: channels must be a multiple of reduction, got {channels} and {reduction}"
            )
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, channels // reduction, 1),
            nn.ReLU(),
            nn.Conv2d(channels // reduction, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = x * self.gate(x)
        return scaled


class ChannelAttentionBlock(nn.Module):
    """RCAN's residual block: x + attention(conv(ReLU(conv(x)))), with 3x3 convolutions.

    Shapes:
        [N, channels, H, W] -> the same.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            ChannelAttention(channels, reduction),
        )

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = x + self.body(x)
        return output


class OutputConv2d(nn.Conv2d):
    """A network's last convolution, in its weights' own precision also under autocast.

    An HDR image in bfloat16 would have 8 significant bits, one in float16 11: less than the photographs it is made of.
    """

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        autocasts = torch.amp.is_autocast_available(device)
        with torch.autocast(device, enabled=False) if autocasts else contextlib.nullcontext():
            return super().forward(input.to(self.weight.dtype))


def start_by_xavier(module: nn.Module) -> None:
    """Starts the convolutions inside ``module`` by Xavier's uniform rule (Glorot and Bengio 2010), biases at zero."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
