"""The Triton kernels of patch swap, all of them gathers: no atomics, and every sum in an order that repeats.

Forward, ``swap_kernel``: a program owns a tile of the output and adds what the matches of the sites around each pixel
place on it. Backward there are three, on the list of the query's sites sorted by their match:

* ``share_kernel``: 1 / count of every site of the query, what its gradient is divided by.
* ``run_kernel``: sums of ``RUN`` successive sites of the list, where all of them have the same match.
* ``gradient_kernel``: a program owns a tile of the source's gradient. The sites that match one row of the patch around
  a pixel lie side by side in the list; the program walks through them, and takes a run in one step: else a match that
  many sites share would keep one program busy for long.

A tile is BLOCK_C channels by BLOCK_P pixels. A site is SCALE x SCALE pixels. Pixels and sites are numbered row by row,
in both layouts, by PLACE: int32, or int64 where there are too many; pointers advance by 64-bit products. Everything is
summed in REAL: float32, or float64 for float64 data.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Grids(NamedTuple):
    """Channels, and heights and widths in sites."""

    channels: int
    key_height: int
    key_width: int
    query_height: int
    query_width: int


class Steps(NamedTuple):
    """From one image, channel or pixel to the next, in elements."""

    image: int
    channel: int
    pixel: int


class Pixel(NamedTuple):
    """Pixels of a tile: which exist, their sites, and their places among the pixels of a site."""

    exists: tl.tensor
    y: tl.tensor
    x: tl.tensor
    line: tl.tensor
    column: tl.tensor


@triton.jit
def _pixels(tile, height, width, BLOCK_P: tl.constexpr, SCALE: tl.constexpr, PLACE: tl.constexpr):
    """The pixels of a tile of an image of height x width sites."""
    number = tl.cast(tile, PLACE) * BLOCK_P + tl.arange(0, BLOCK_P)
    row, across = number // (SCALE * width), number % (SCALE * width)
    return Pixel(row < SCALE * height, row // SCALE, across // SCALE, row % SCALE, across % SCALE)


@triton.jit
def _tile(
    height, width, channels, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, SCALE: tl.constexpr, PLACE: tl.constexpr
):
    """The image, channels and pixels of a program that owns a tile of images of height x width sites."""
    program = tl.program_id(0)
    tiles = tl.cdiv(tl.cast(height, PLACE) * width * (SCALE * SCALE), BLOCK_P)
    blocks = tl.cdiv(channels, BLOCK_C)
    channel = (program // tiles % blocks).to(tl.int32) * BLOCK_C + tl.arange(0, BLOCK_C)
    pixel = _pixels(program % tiles, height, width, BLOCK_P, SCALE, PLACE)
    return tl.cast(program // tiles // blocks, tl.int64), channel, pixel


@triton.jit
def _within(y, x, height, width):
    return (y >= 0) & (y < height) & (x >= 0) & (x < width)


@triton.jit
def _placed(index, y, x, dy, dx, exists, grids, PLACE: tl.constexpr):
    """Row and column of the key's site that tap (dy, dx) of a patch places on sites (y, x), and where there is one.

    ``index``: an image's matches.
    """
    known = exists & _within(y - dy, x - dx, grids.query_height, grids.query_width)
    match = tl.load(index + ((y - dy) * grids.query_width + x - dx), mask=known, other=0)
    match = tl.minimum(tl.maximum(match, 0), tl.cast(grids.key_height, PLACE) * grids.key_width - 1).to(PLACE)
    match_y = match // grids.key_width
    match_x = match - match_y * grids.key_width + dx
    match_y += dy
    return match_y, match_x, known & _within(match_y, match_x, grids.key_height, grids.key_width)


@triton.jit
def _at(y, x, pixel, width, channel, step, SCALE: tl.constexpr):
    """Offsets [channels, pixels] from an image's first element, of each pixel's fellow in site (y, x) of a grid.

    From rows and columns where the pixels are successive, too: a compiler that saw it would give four to a thread, in
    NCHW, and a warp would read matches side by side by single pixels of each four.
    """
    number = (SCALE * y + pixel.line).to(tl.int64) * (SCALE * width) + (SCALE * x + pixel.column)
    return channel.to(tl.int64)[:, None] * step.channel + number[None, :] * step.pixel


@triton.jit
def _load(image, y, x, pixel, inside, width, channel, channels, step, SCALE: tl.constexpr, REAL: tl.constexpr):
    """[channels, pixels]: for each pixel its fellow in site (y, x) of a grid, zero where not inside."""
    mask = (channel < channels)[:, None] & inside[None, :]
    return tl.load(image + _at(y, x, pixel, width, channel, step, SCALE), mask=mask, other=0.0).to(REAL)


@triton.jit
def _store(image, total, pixel, width, channel, channels, step, SCALE: tl.constexpr):
    mask = (channel < channels)[:, None] & pixel.exists[None, :]
    at = _at(pixel.y, pixel.x, pixel, width, channel, step, SCALE)
    tl.store(image + at, total.to(image.dtype.element_ty), mask=mask)


@triton.jit
def swap_kernel(
    source,
    index,
    output,
    grids,
    source_step,
    output_step,
    PATCH: tl.constexpr,
    SCALE: tl.constexpr,
    EXCLUDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    REAL: tl.constexpr,
    PLACE: tl.constexpr,
):
    """output[p] = sum over taps d of source[index[p - d] + d], divided by their number or by PATCH^2."""
    REACH: tl.constexpr = PATCH // 2
    image, channel, pixel = _tile(grids.query_height, grids.query_width, grids.channels, BLOCK_C, BLOCK_P, SCALE, PLACE)
    index += image * grids.query_height * grids.query_width
    source += image * source_step.image
    total = tl.zeros((BLOCK_C, BLOCK_P), REAL)
    count = tl.zeros((BLOCK_P,), tl.int32)
    for dy in range(-REACH, REACH + 1):
        for dx in range(-REACH, REACH + 1):
            y, x, inside = _placed(index, pixel.y, pixel.x, dy, dx, pixel.exists, grids, PLACE)
            total += _load(
                source, y, x, pixel, inside, grids.key_width, channel, grids.channels, source_step, SCALE, REAL
            )
            count += inside.to(tl.int32)
    if EXCLUDE:
        total *= (1.0 / tl.maximum(count, 1).to(REAL))[None, :]
    else:
        total *= tl.full((), 1.0, REAL) / (PATCH * PATCH)
    output += image * output_step.image
    _store(output, total, pixel, grids.query_width, channel, grids.channels, output_step, SCALE)


@triton.jit
def share_kernel(
    index,
    share,
    grids,
    PATCH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    REAL: tl.constexpr,
    PLACE: tl.constexpr,
):
    """share[p] = 1 / the number of taps that place something on site p."""
    REACH: tl.constexpr = PATCH // 2
    tiles = tl.cdiv(tl.cast(grids.query_height, PLACE) * grids.query_width, BLOCK_P)
    pixel = _pixels(tl.program_id(0) % tiles, grids.query_height, grids.query_width, BLOCK_P, 1, PLACE)
    before = tl.cast(tl.program_id(0) // tiles, tl.int64) * grids.query_height * grids.query_width
    count = tl.zeros((BLOCK_P,), tl.int32)
    for dy in range(-REACH, REACH + 1):
        for dx in range(-REACH, REACH + 1):
            _, _, inside = _placed(index + before, pixel.y, pixel.x, dy, dx, pixel.exists, grids, PLACE)
            count += inside.to(tl.int32)
    at = before + (pixel.y * grids.query_width + pixel.x)
    tl.store(share + at, 1.0 / tl.maximum(count, 1).to(REAL), mask=pixel.exists)


@triton.jit
def _add_owed(
    total,
    grad_output,
    share,
    site,
    dy,
    dx,
    pixel,
    walking,
    grids,
    channel,
    step,
    SCALE: tl.constexpr,
    REAL: tl.constexpr,
):
    """``total`` and what sites of an image, by number, owe to tap (dy, dx) of their match.

    That is their share of the gradient of what the tap was placed on. ``grad_output`` and ``share``: an image's;
    without shares all are 1.
    """
    y = site // grids.query_width
    x = site - y * grids.query_width + dx
    y += dy
    inside = walking & _within(y, x, grids.query_height, grids.query_width)
    gradient = _load(grad_output, y, x, pixel, inside, grids.query_width, channel, grids.channels, step, SCALE, REAL)
    if share is None:
        total += gradient
    else:
        factor = tl.load(share + (y * grids.query_width + x), mask=inside, other=0.0)
        # Not left to the compiler, which may round a product in one layout and not in another.
        total = tl.fma(gradient, tl.broadcast_to(factor[None, :], gradient.shape), total)
    return total


@triton.jit
def run_kernel(
    grad_output,
    keys,
    sites,
    share,
    runs,
    grids,
    grad_step,
    PATCH: tl.constexpr,
    SCALE: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    REAL: tl.constexpr,
    PLACE: tl.constexpr,
):
    """runs[run, tap, line, column, c] = what a run's sites owe to a tap; not written where their matches differ."""
    REACH: tl.constexpr = PATCH // 2
    blocks = tl.cdiv(grids.channels, BLOCK_C)
    run = tl.cast(tl.program_id(0) // blocks, tl.int64)
    channel = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    if tl.load(keys + run * RUN) == tl.load(keys + run * RUN + RUN - 1):
        place = tl.arange(0, BLOCK_P)
        every = place >= 0
        query_size = tl.cast(grids.query_height, tl.int64) * grids.query_width
        n = tl.load(sites + run * RUN) // query_size
        grad_output += n * grad_step.image
        if share is not None:
            share += n * query_size
        for part in range(PATCH * PATCH * SCALE * SCALE):
            tap, line, column = part // (SCALE * SCALE), part // SCALE % SCALE, part % SCALE
            pixel = Pixel(every, place, place, tl.zeros_like(place) + line, tl.zeros_like(place) + column)
            total = tl.zeros((BLOCK_C, BLOCK_P), REAL)
            for start in range(0, RUN, BLOCK_P):
                site = (tl.load(sites + run * RUN + start + place) - n * query_size).to(PLACE)
                total = _add_owed(
                    total,
                    grad_output,
                    share,
                    site,
                    tap // PATCH - REACH,
                    tap % PATCH - REACH,
                    pixel,
                    every,
                    grids,
                    channel,
                    grad_step,
                    SCALE,
                    REAL,
                )
            target = runs + (run * (PATCH * PATCH * SCALE * SCALE) + part) * grids.channels
            tl.store(target + channel, tl.sum(total, 1), mask=channel < grids.channels)


@triton.jit
def gradient_kernel(
    grad_output,
    keys,  # [N * query's sites], ascending: match of each site, the keys of an image numbered after those before it
    sites,  # the sites in that order, numbered over all images
    first,  # [N * key's sites + 1]: where each match begins in the list
    share,  # [N, Hq, Wq]; None where everything is divided by PATCH^2
    runs,  # None where the list is shorter than a run
    grad_source,
    grids,
    grad_step,
    source_step,
    PATCH: tl.constexpr,
    SCALE: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    REAL: tl.constexpr,
    PLACE: tl.constexpr,
):
    """grad_source[m] = sum over taps d, and the sites k that match m - d, of share[k + d] * grad_output[k + d]."""
    REACH: tl.constexpr = PATCH // 2
    image, channel, pixel = _tile(grids.key_height, grids.key_width, grids.channels, BLOCK_C, BLOCK_P, SCALE, PLACE)
    grad_output += image * grad_step.image
    first_key = (image * grids.key_height * grids.key_width).to(PLACE)
    first_site = image * grids.query_height * grids.query_width
    if share is not None:
        share += first_site
    total = tl.zeros((BLOCK_C, BLOCK_P), REAL)
    for dy in range(-REACH, REACH + 1):
        y = pixel.y - dy
        exists = pixel.exists & (y >= 0) & (y < grids.key_height)
        row = first_key + y * grids.key_width
        left = tl.maximum(pixel.x - REACH, 0)
        right = tl.minimum(pixel.x + REACH, grids.key_width - 1)
        at = tl.load(first + row + left, mask=exists, other=0)
        end = tl.load(first + row + right + 1, mask=exists, other=0)
        most = tl.max(end - at, 0)
        if runs is not None:
            while most >= RUN:
                key = tl.load(keys + at, mask=at < end, other=0)
                whole = (at % RUN == 0) & (end - at >= RUN)
                whole &= tl.load(keys + at + RUN - 1, mask=whole, other=-1) == key
                dx = pixel.x - (key - row)
                site = (tl.load(sites + at, mask=at < end, other=0) - first_site).to(PLACE)
                total = _add_owed(
                    total,
                    grad_output,
                    share,
                    site,
                    dy,
                    dx,
                    pixel,
                    (at < end) & (whole == 0),
                    grids,
                    channel,
                    grad_step,
                    SCALE,
                    REAL,
                )
                part = ((dy + REACH) * PATCH + dx + REACH) * (SCALE * SCALE) + pixel.line * SCALE + pixel.column
                part += (at // RUN).to(tl.int64) * (PATCH * PATCH * SCALE * SCALE)
                total += tl.load(
                    runs + channel[:, None] + (part * grids.channels)[None, :],
                    mask=(channel < grids.channels)[:, None] & whole[None, :],
                    other=0.0,
                )
                at = tl.where(whole, at + RUN, tl.minimum(at + 1, end))
                most = tl.max(end - at, 0)
        for step in range(most):
            walking = at + step < end
            key = tl.load(keys + at + step, mask=walking, other=0)
            site = (tl.load(sites + at + step, mask=walking, other=0) - first_site).to(PLACE)
            dx = pixel.x - (key - row)
            total = _add_owed(
                total, grad_output, share, site, dy, dx, pixel, walking, grids, channel, grad_step, SCALE, REAL
            )
    if share is None:
        total *= tl.full((), 1.0, REAL) / (PATCH * PATCH)
    grad_source += image * source_step.image
    _store(grad_source, total, pixel, grids.key_width, channel, grids.channels, source_step, SCALE)
