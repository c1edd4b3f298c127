"""The Triton kernels of ``deform_conv2d``: portable twins of csrc/deform_conv2d/'s CUDA kernels.

Three kernels, each a matrix product whose one factor is gathered or whose result is scattered, so that no column
matrix is ever in memory:

* ``forward_kernel``: samples [pixels, channels] times weights [channels, outputs], summed over taps.
* ``backward_data_kernel``: output gradients [pixels, outputs] times weights [outputs, channels] is the gradient of the
  samples, from which those of offset, mask and input follow.
* ``backward_weight_kernel``: samples, transposed, times output gradients, summed over pixels.

A program owns a rectangle of output pixels of one image. ``_cell`` computes once for each pixel and tap, whatever the
number of channels, which cell of the image the tap reads and how its corners weigh. Channels are cut into *runs*, the
longest pieces that share one weight group and one offset group, and runs into blocks of the kernel's width; what a
block has too many, at the end of a run as among the outputs, is masked. Everything but ``tl.dot`` computes in REAL:
float32, or float64 for float64 data. ``tl.dot`` takes its factors in the data's type, to which the samples are rounded,
and sums in REAL. Pointers advance by 64-bit products. Sizes come in tuples, which Triton passes as single arguments.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Geometry(NamedTuple):
    """Sizes of the images, and the steps between samples."""

    height: int
    width: int
    out_height: int
    out_width: int
    kernel_w: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dilation_h: int
    dilation_w: int


class Channels(NamedTuple):
    """What a layer's channels are cut into, and its taps."""

    taps: int
    groups: int
    group_channels: int  # input channels of a weight group
    group_outputs: int  # output channels of a weight group
    offset_groups: int
    offset_channels: int  # input channels of an offset group


class Strides(NamedTuple):
    """Steps in elements through an [N, C, H, W] tensor."""

    n: int
    c: int
    y: int
    x: int


class Cell(NamedTuple):
    """Where one tap reads for each pixel of a tile; vectors over the pixels."""

    inside: tl.tensor  # whether the tap samples anything
    corner: tl.tensor  # the top left corner's distance from the image's first element
    y: tl.tensor  # the place within the cell, in [0, 1)
    x: tl.tensor
    top: tl.tensor  # whether that row or column of the cell is in the image
    bottom: tl.tensor
    left: tl.tensor
    right: tl.tensor
    modulation: tl.tensor  # the mask's value


@triton.jit
def _tile(tile, geometry, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Rows and columns of a tile's pixels, and which of them exist."""
    tiles_across = tl.cdiv(geometry.out_width, TILE_W)
    pixel = tl.arange(0, TILE_H * TILE_W)
    row = tile // tiles_across * TILE_H + pixel // TILE_W
    column = tile % tiles_across * TILE_W + pixel % TILE_W
    return row, column, (row < geometry.out_height) & (column < geometry.out_width)


@triton.jit
def _site(n, offset_group, tap, row, column, geometry, channels):
    """Index of (pixel, tap) in a mask [N, offset_groups, taps, out_h, out_w], and the size of a plane of it."""
    plane = tl.cast(geometry.out_height, tl.int64) * geometry.out_width
    index = (tl.cast(n, tl.int64) * channels.offset_groups + offset_group) * channels.taps + tap
    return index * plane, row.to(tl.int64) * geometry.out_width + column, plane


@triton.jit
def _cell(offset, mask, n, offset_group, tap, row, column, exists, geometry, channels, strides, REAL: tl.constexpr):
    """The cell that ``tap`` reads for each pixel. NaN, infinite and outside coordinates sample nothing."""
    first, pixel, plane = _site(n, offset_group, tap, row, column, geometry, channels)
    offset_y = tl.load(offset + 2 * first + pixel, mask=exists, other=0.0).to(REAL)
    offset_x = tl.load(offset + 2 * first + plane + pixel, mask=exists, other=0.0).to(REAL)
    tap_y = tl.cast(tap // geometry.kernel_w, tl.int64) * geometry.dilation_h - geometry.pad_h
    tap_x = tl.cast(tap % geometry.kernel_w, tl.int64) * geometry.dilation_w - geometry.pad_w
    y = (row.to(tl.int64) * geometry.stride_h + tap_y).to(REAL) + offset_y
    x = (column.to(tl.int64) * geometry.stride_w + tap_x).to(REAL) + offset_x

    inside = exists & (y > -1) & (y < geometry.height) & (x > -1) & (x < geometry.width)
    y, x = tl.where(inside, y, 0.0), tl.where(inside, x, 0.0)
    low_y, low_x = tl.floor(y), tl.floor(x)
    above, before = low_y.to(tl.int32), low_x.to(tl.int32)
    if mask is not None:
        modulation = tl.load(mask + first + pixel, mask=exists, other=0.0).to(REAL)
    else:
        modulation = tl.full(y.shape, 1.0, REAL)
    return Cell(
        inside=inside,
        corner=above.to(tl.int64) * strides.y + before.to(tl.int64) * strides.x,
        y=y - low_y,
        x=x - low_x,
        top=inside & (above >= 0),
        bottom=inside & (above + 1 < geometry.height),
        left=before >= 0,
        right=before + 1 < geometry.width,
        modulation=modulation,
    )


@triton.jit
def _corner_weights(cell):
    """What each corner contributes to the sample, the mask included."""
    top, bottom = (1 - cell.y) * cell.modulation, cell.y * cell.modulation
    return top * (1 - cell.x), top * cell.x, bottom * (1 - cell.x), bottom * cell.x


@triton.jit
def _corner_pointers(image, cell, channel, strides):
    """Pointers [pixels, channels] to the four corners; those outside the image must not be followed."""
    top_left = image + cell.corner[:, None] + (channel.to(tl.int64) * strides.c)[None, :]
    bottom_left = top_left + strides.y
    return top_left, top_left + strides.x, bottom_left, bottom_left + strides.x


@triton.jit
def _corner_masks(cell, channel_exists):
    """Which of those pointers may be followed."""
    channel_exists = channel_exists[None, :]
    return (
        (cell.top & cell.left)[:, None] & channel_exists,
        (cell.top & cell.right)[:, None] & channel_exists,
        (cell.bottom & cell.left)[:, None] & channel_exists,
        (cell.bottom & cell.right)[:, None] & channel_exists,
    )


@triton.jit
def _corners(image, cell, channel, channel_exists, strides, REAL: tl.constexpr):
    """The image at the four corners, zero outside: top left, top right, bottom left, bottom right."""
    p00, p01, p10, p11 = _corner_pointers(image, cell, channel, strides)
    m00, m01, m10, m11 = _corner_masks(cell, channel_exists)
    return (
        tl.load(p00, mask=m00, other=0.0).to(REAL),
        tl.load(p01, mask=m01, other=0.0).to(REAL),
        tl.load(p10, mask=m10, other=0.0).to(REAL),
        tl.load(p11, mask=m11, other=0.0).to(REAL),
    )


@triton.jit
def _samples(image, cell, channel, channel_exists, strides, REAL: tl.constexpr):
    """Masked bilinear samples [pixels, channels], in the image's type."""
    x00, x01, x10, x11 = _corners(image, cell, channel, channel_exists, strides, REAL)
    w00, w01, w10, w11 = _corner_weights(cell)
    sample = x00 * w00[:, None] + x01 * w01[:, None] + x10 * w10[:, None] + x11 * w11[:, None]
    return sample.to(image.dtype.element_ty)


@triton.jit
def _pixel_pointers(image, n, row, column, strides):
    """Pointers to the pixels' first channel."""
    image += tl.cast(n, tl.int64) * strides.n
    return image + row.to(tl.int64) * strides.y + column.to(tl.int64) * strides.x


@triton.jit(do_not_specialize=["pixel_tiles"])
def forward_kernel(
    input,
    offset,
    mask,
    weight,  # [taps, group_channels, out_channels]
    bias,
    output,
    geometry,
    channels,
    input_strides,
    output_strides,
    pixel_tiles,
    RUN: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    REAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program owns a tile of pixels times BLOCK_O outputs of one weight group; blocks of outputs run side by side."""
    output_blocks = tl.cdiv(channels.group_outputs, BLOCK_O)
    program = tl.program_id(0)
    output_block = program % output_blocks
    group = program // output_blocks % channels.groups
    tile = program // (output_blocks * channels.groups)
    n = tile // pixel_tiles
    row, column, exists = _tile(tile % pixel_tiles, geometry, TILE_H, TILE_W)
    image = input + tl.cast(n, tl.int64) * input_strides.n

    lane = tl.arange(0, BLOCK_C)
    group_output = output_block * BLOCK_O + tl.arange(0, BLOCK_O)
    output_exists = group_output < channels.group_outputs
    out_channel = group * channels.group_outputs + group_output
    out_channels = channels.groups * channels.group_outputs

    sums = tl.zeros((TILE_H * TILE_W, BLOCK_O), REAL)
    for step in range(channels.group_channels // RUN * channels.taps):
        tap = step % channels.taps
        run = step // channels.taps * RUN
        channel = group * channels.group_channels + run
        offset_group = channel // channels.offset_channels
        cell = _cell(offset, mask, n, offset_group, tap, row, column, exists, geometry, channels, input_strides, REAL)
        for block in range(0, RUN, BLOCK_C):
            channel_exists = block + lane < RUN
            samples = _samples(image, cell, channel + block + lane, channel_exists, input_strides, REAL)
            weight_row = tl.cast(tap, tl.int64) * channels.group_channels + run + block + lane
            weights = tl.load(
                weight + weight_row[:, None] * out_channels + out_channel[None, :],
                mask=channel_exists[:, None] & output_exists[None, :],
                other=0.0,
            )
            sums = tl.dot(samples, weights, sums, input_precision=PRECISION, out_dtype=REAL)

    if bias is not None:
        sums += tl.load(bias + out_channel, mask=output_exists, other=0.0).to(REAL)[None, :]
    pixels = _pixel_pointers(output, n, row, column, output_strides)
    tl.store(
        pixels[:, None] + (out_channel.to(tl.int64) * output_strides.c)[None, :],
        sums.to(output.dtype.element_ty),
        mask=exists[:, None] & output_exists[None, :],
    )


@triton.jit
def _scatter(image, value, mask, scale, FIXED_POINT: tl.constexpr):
    """Adds to the input's gradient; in fixed point the order of the additions does not matter."""
    if FIXED_POINT:
        tl.atomic_add(image, (value * scale).to(tl.int64), mask=mask, sem="relaxed")
    else:
        tl.atomic_add(image, value, mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=["pixel_tiles"])
def backward_data_kernel(
    grad_output,
    input,
    offset,
    mask,
    weight,  # [taps, out_channels, group_channels]
    grad_input,  # zeros in the input's layout, of type REAL or, in fixed point, int64; None where not wanted
    grad_offset,
    grad_mask,
    scale,  # one element, what fixed point multiplies by; None for floating-point sums
    geometry,
    channels,
    grad_output_strides,
    input_strides,
    pixel_tiles,
    RUN: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    REAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program owns a tap of an offset group for a tile of pixels, and so those elements of grad_offset and grad_mask.

    It runs through the offset group's channels block by block: the samples' gradient by ``tl.dot`` over the outputs,
    the four corners again, the samples and their slopes summed over channels, and four atomic additions to grad_input.
    """
    program = tl.program_id(0)
    tap = program % channels.taps
    offset_group = program // channels.taps % channels.offset_groups
    tile = program // (channels.taps * channels.offset_groups)
    n = tile // pixel_tiles
    row, column, exists = _tile(tile % pixel_tiles, geometry, TILE_H, TILE_W)
    image = input + tl.cast(n, tl.int64) * input_strides.n
    grad_pixels = _pixel_pointers(grad_output, n, row, column, grad_output_strides)
    cell = _cell(offset, mask, n, offset_group, tap, row, column, exists, geometry, channels, input_strides, REAL)
    if grad_input is not None:
        grad_image = grad_input + tl.cast(n, tl.int64) * input_strides.n
        w00, w01, w10, w11 = _corner_weights(cell)
        unit = 1.0
        if scale is not None:
            unit = tl.load(scale)

    lane, output_lane = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_O)
    out_channels = channels.groups * channels.group_outputs
    # Sums over channels of the samples' gradient times the sample without its mask, and times its slopes.
    sum_sample = tl.zeros((TILE_H * TILE_W,), REAL)
    sum_y = tl.zeros((TILE_H * TILE_W,), REAL)
    sum_x = tl.zeros((TILE_H * TILE_W,), REAL)
    y, x = cell.y[:, None], cell.x[:, None]
    for run in range(channels.offset_channels // RUN):
        run_channel = offset_group * channels.offset_channels + run * RUN
        group = run_channel // channels.group_channels
        for block in range(0, RUN, BLOCK_C):
            channel_exists = block + lane < RUN
            channel = run_channel + block + lane
            group_channel = channel - group * channels.group_channels
            slope = tl.zeros((TILE_H * TILE_W, BLOCK_C), REAL)
            for first_output in range(0, channels.group_outputs, BLOCK_O):
                group_output = first_output + output_lane
                output_exists = group_output < channels.group_outputs
                out_channel = (group * channels.group_outputs + group_output).to(tl.int64)
                gradients = tl.load(
                    grad_pixels[:, None] + (out_channel * grad_output_strides.c)[None, :],
                    mask=exists[:, None] & output_exists[None, :],
                    other=0.0,
                )
                weight_row = tl.cast(tap, tl.int64) * out_channels + out_channel
                weights = tl.load(
                    weight + weight_row[:, None] * channels.group_channels + group_channel[None, :],
                    mask=output_exists[:, None] & channel_exists[None, :],
                    other=0.0,
                )
                slope = tl.dot(gradients, weights, slope, input_precision=PRECISION, out_dtype=REAL)
            if grad_offset is not None or grad_mask is not None:
                x00, x01, x10, x11 = _corners(image, cell, channel, channel_exists, input_strides, REAL)
                sum_y += tl.sum(slope * ((1 - x) * (x10 - x00) + x * (x11 - x01)), 1)
                sum_x += tl.sum(slope * ((1 - y) * (x01 - x00) + y * (x11 - x10)), 1)
                sample = (1 - y) * ((1 - x) * x00 + x * x01) + y * ((1 - x) * x10 + x * x11)
                sum_sample += tl.sum(slope * sample, 1)
            if grad_input is not None:
                p00, p01, p10, p11 = _corner_pointers(grad_image, cell, channel, input_strides)
                m00, m01, m10, m11 = _corner_masks(cell, channel_exists)
                _scatter(p00, slope * w00[:, None], m00, unit, scale is not None)
                _scatter(p01, slope * w01[:, None], m01, unit, scale is not None)
                _scatter(p10, slope * w10[:, None], m10, unit, scale is not None)
                _scatter(p11, slope * w11[:, None], m11, unit, scale is not None)

    first, pixel, plane = _site(n, offset_group, tap, row, column, geometry, channels)
    if grad_offset is not None:
        along_y = tl.where(cell.inside, cell.modulation * sum_y, 0.0)
        along_x = tl.where(cell.inside, cell.modulation * sum_x, 0.0)
        tl.store(grad_offset + 2 * first + pixel, along_y.to(grad_offset.dtype.element_ty), mask=exists)
        tl.store(grad_offset + 2 * first + plane + pixel, along_x.to(grad_offset.dtype.element_ty), mask=exists)
    if grad_mask is not None:
        along_mask = tl.where(cell.inside, sum_sample, 0.0)
        tl.store(grad_mask + first + pixel, along_mask.to(grad_mask.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["pixel_tiles", "total_tiles", "tiles_per_split"])
def backward_weight_kernel(
    grad_output,
    input,
    offset,
    mask,
    partial,  # [splits, taps, group_channels, out_channels]
    geometry,
    channels,
    grad_output_strides,
    input_strides,
    pixel_tiles,
    total_tiles,
    tiles_per_split,
    RUN: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    REAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program owns one tap, BLOCK_C channels of a run and BLOCK_O outputs, and sums over ``tiles_per_split`` tiles.

    The splits' partial sums are added outside, in fixed order.
    """
    output_blocks = tl.cdiv(channels.group_outputs, BLOCK_O)
    blocks = tl.cdiv(RUN, BLOCK_C)
    runs = channels.group_channels // RUN
    program = tl.program_id(0)
    output_block = program % output_blocks
    program = program // output_blocks
    block = program % blocks * BLOCK_C
    program = program // blocks
    run = program % runs * RUN
    program = program // runs
    group = program % channels.groups
    program = program // channels.groups
    tap = program % channels.taps
    split = program // channels.taps

    lane = tl.arange(0, BLOCK_C)
    channel_exists = block + lane < RUN
    group_channel = run + block + lane
    channel = group * channels.group_channels + group_channel
    offset_group = (group * channels.group_channels + run) // channels.offset_channels
    group_output = output_block * BLOCK_O + tl.arange(0, BLOCK_O)
    output_exists = group_output < channels.group_outputs
    out_channel = (group * channels.group_outputs + group_output).to(tl.int64)

    sums = tl.zeros((BLOCK_C, BLOCK_O), REAL)
    first_tile = split * tiles_per_split
    for tile in range(first_tile, tl.minimum(first_tile + tiles_per_split, total_tiles)):
        n = tile // pixel_tiles
        row, column, exists = _tile(tile % pixel_tiles, geometry, TILE_H, TILE_W)
        cell = _cell(offset, mask, n, offset_group, tap, row, column, exists, geometry, channels, input_strides, REAL)
        image = input + tl.cast(n, tl.int64) * input_strides.n
        samples = _samples(image, cell, channel, channel_exists, input_strides, REAL)
        grad_pixels = _pixel_pointers(grad_output, n, row, column, grad_output_strides)
        gradients = tl.load(
            grad_pixels[:, None] + (out_channel * grad_output_strides.c)[None, :],
            mask=exists[:, None] & output_exists[None, :],
            other=0.0,
        )
        sums = tl.dot(tl.trans(samples), gradients, sums, input_precision=PRECISION, out_dtype=REAL)

    partial_row = (tl.cast(split, tl.int64) * channels.taps + tap) * channels.group_channels + group_channel
    out_channels = channels.groups * channels.group_outputs
    tl.store(
        partial + partial_row[:, None] * out_channels + out_channel[None, :],
        sums,
        mask=channel_exists[:, None] & output_exists[None, :],
    )
