"""Deformable convolution (OP-1) in plain PyTorch: four gathers per sample, then one product with the weights.

The sample of channel c at tap k and output site p is ``mask * B(input_c; y, x)``, with B the bilinear sample of the
image surrounded by zeros and (y, x) the tap's place on the regular grid plus its offset. ``floor`` has no gradient, so
the cell is that of the floor and the derivative at an integer coordinate is the right-hand one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hdrops.ops import _common


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """Deformable convolution; see :func:`hdrops.deform_conv2d` for the arguments.

    Computes in float64 for float64 input and in float32 for every other dtype, and rounds the result once. Holds
    kernel_h * kernel_w copies of the input's sites, several times over.
    """
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    n, channels = input.shape[:2]
    out_channels, group_channels, kernel_h, kernel_w = weight.shape
    out_h, out_w = offset.shape[2:]
    taps = kernel_h * kernel_w
    groups = channels // group_channels
    offset_groups = offset.shape[1] // (2 * taps)

    shift = offset.to(dtype).reshape(n, offset_groups, taps, 2, out_h, out_w)
    grid_y, grid_x = _grid(weight, (out_h, out_w), stride, padding, dilation, dtype)
    image = input.to(dtype).reshape(n, offset_groups, channels // offset_groups, *input.shape[2:])
    columns = _sample(image, shift[:, :, :, 0] + grid_y, shift[:, :, :, 1] + grid_x)
    if mask is not None:
        columns = columns * mask.to(dtype).reshape(n, offset_groups, 1, taps, out_h, out_w)

    columns = columns.reshape(n, groups, group_channels * taps, out_h * out_w)
    kernel = weight.to(dtype).reshape(groups, out_channels // groups, group_channels * taps)
    output = torch.matmul(kernel, columns).reshape(n, out_channels, out_h, out_w)
    if bias is not None:
        output = output + bias.to(dtype).reshape(-1, 1, 1)
    return output.to(input.dtype, memory_format=_common.memory_format(input))


def _grid(
    weight: Tensor,
    size: tuple[int, int],
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Where every tap reads without an offset: rows [taps, out_h, 1] and columns [taps, 1, out_w]."""
    stride, padding, dilation = _common.pair(stride), _common.pair(padding), _common.pair(dilation)
    kernel = weight.shape[2:]

    def places(axis: int) -> Tensor:
        site = torch.arange(size[axis], device=weight.device, dtype=dtype) * stride[axis] - padding[axis]
        tap = torch.arange(kernel[axis], device=weight.device, dtype=dtype) * dilation[axis]
        return tap[:, None] + site

    rows = places(0)[:, None].expand(-1, kernel[1], -1)
    columns = places(1)[None].expand(kernel[0], -1, -1)
    return rows.reshape(-1, size[0], 1), columns.reshape(-1, 1, size[1])


def _sample(image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Bilinear samples [N, G, C/G, K, out_h, out_w] of image [N, G, C/G, H, W] at y and x [N, G, K, out_h, out_w]."""
    n, offset_groups, channels, height, width = image.shape
    # False for NaN; coordinates that sample nothing move to 0, where they cost no gradient and index nothing outside.
    inside = (y > -1) & (y < height) & (x > -1) & (x < width)
    y, x = torch.where(inside, y, 0.0), torch.where(inside, x, 0.0)
    top, left = y.floor(), x.floor()
    fraction_y, fraction_x = y - top, x - left
    flat = image.reshape(n, offset_groups, channels, height * width)
    sampled = (n, offset_groups, channels, *y.shape[2:])
    sites = (n, offset_groups, 1, y.shape[2:].numel())
    sample = torch.zeros((), dtype=image.dtype, device=image.device)
    for row, weight_y in ((top.long(), 1 - fraction_y), (top.long() + 1, fraction_y)):
        for column, weight_x in ((left.long(), 1 - fraction_x), (left.long() + 1, fraction_x)):
            there = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            index = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).reshape(sites)
            corner = flat.gather(3, index.expand(-1, -1, channels, -1)).reshape(sampled)
            sample = sample + torch.where(there.unsqueeze(2), corner, 0.0) * (weight_y * weight_x).unsqueeze(2)
    return sample
