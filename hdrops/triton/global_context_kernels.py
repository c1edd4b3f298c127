"""The Triton kernels of global context.

Passes over pixels, and between them kernels of one program an image, which add the passes' sums in an order that the
shapes fix:

* ``pool_kernel``: an online softmax over a share of an image's pixels, the split.
* ``bottleneck_kernel``: adds the splits to the context, and runs the bottleneck where there is one.
* ``fuse_kernel``: adds or multiplies the change.
* ``total_kernel``: sums of the output's gradient over a split, or of it times the pixels.
* ``bottleneck_backward_kernel``: adds those, and goes back through the bottleneck to the context's gradient.
* ``gradient_kernel``: the pixels' gradient, and a split's sum for the key's.

A program of a pass holds a tile of all channels by BLOCK_P pixels and walks through its split; sums over pixels are
kept for each element of the tile, those of the softmax relative to the largest logit of each column, and reduced at the
end. Everything is computed in REAL: float32, or float64 for float64 data. An image's pixels are numbered row by row, in
both layouts; pointers advance by 64-bit products.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Image(NamedTuple):
    """Sizes and steps in elements of images [N, C, pixels], and how their pixels are split among programs."""

    channels: int
    pixels: int
    step_n: int
    step_c: int
    step_p: int
    splits: int
    tiles: int  # of a split


@triton.jit
def _least(REAL: tl.constexpr):
    """The least finite number: below any logit, and its difference from another is no NaN."""
    return -1.7976931348623157e308 if tl.float64 == REAL else -3.4028234663852886e38


@triton.jit
def _tile(tile, image, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Offsets from an image's first element of one tile, which of its elements exist, and which columns."""
    channel = tl.arange(0, BLOCK_C)
    pixel = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    column = pixel < image.pixels
    at = channel.to(tl.int64)[:, None] * image.step_c + pixel.to(tl.int64)[None, :] * image.step_p
    return at, (channel < image.channels)[:, None] & column[None, :], column


@triton.jit
def _vector(pointer, image, BLOCK_C: tl.constexpr, REAL: tl.constexpr):
    """[C] values, zero beyond."""
    channel = tl.arange(0, BLOCK_C)
    return tl.load(pointer + channel, mask=channel < image.channels, other=0.0).to(REAL)


@triton.jit
def pool_kernel(input, key, partials, image, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, REAL: tl.constexpr):
    """partials[n, split] = (sums of exp(logit - largest) x [C], largest, sum of exp(logit - largest))."""
    program = tl.program_id(0)
    n = program // image.splits
    first = program % image.splits * image.tiles
    base = input + tl.cast(n, tl.int64) * image.step_n
    factors = _vector(key, image, BLOCK_C, REAL)
    largest = tl.full((BLOCK_P,), _least(REAL), REAL)
    total = tl.zeros((BLOCK_P,), REAL)
    sums = tl.zeros((BLOCK_C, BLOCK_P), REAL)
    for step in range(image.tiles):
        at, exists, column = _tile(first + step, image, BLOCK_C, BLOCK_P)
        x = tl.load(base + at, mask=exists, other=0.0).to(REAL)
        logits = tl.sum(x * factors[:, None], 0)
        above = tl.where(column, tl.maximum(largest, logits), largest)
        weights = tl.where(column, tl.exp(logits - above), 0.0)
        kept = tl.exp(largest - above)
        total = total * kept + weights
        sums = sums * kept[None, :] + x * weights[None, :]
        largest = above
    most = tl.max(largest, 0)
    kept = tl.exp(largest - most)
    row = partials + tl.cast(program, tl.int64) * (image.channels + 2)
    channel = tl.arange(0, BLOCK_C)
    tl.store(row + channel, tl.sum(sums * kept[None, :], 1), mask=channel < image.channels)
    tl.store(row + image.channels, most)
    tl.store(row + image.channels + 1, tl.sum(total * kept, 0))


@triton.jit
def bottleneck_kernel(
    partials,
    key_bias,  # None, or one element: what is not finite makes the context NaN
    state,
    context,  # [N, C] in the data's type; None with a bottleneck
    squeeze_weight,  # None without a bottleneck; so are the other five
    squeeze_bias,
    norm_weight,
    norm_bias,
    excite_weight,
    excite_bias,
    image,
    hidden,
    state_size,
    EPS: tl.constexpr,  # an argument would come as float32
    MULTIPLY: tl.constexpr,
    BLOCK_S: tl.constexpr,  # all splits
    BLOCK_H: tl.constexpr,  # all of the hidden units
    CHUNK: tl.constexpr,  # channels at a time
    REAL: tl.constexpr,
):
    """A program owns an image: its splits' sums become its row of ``state``, as csrc/global_context/params.h has it."""
    n = tl.program_id(0)
    size = image.channels + 2
    split = tl.arange(0, BLOCK_S)
    lane = tl.arange(0, CHUNK)
    image_partials = partials + tl.cast(n, tl.int64) * image.splits * size
    row = state + tl.cast(n, tl.int64) * state_size
    least = tl.load(image_partials + split * size + image.channels, mask=split < image.splits, other=_least(REAL))
    sums = tl.load(image_partials + split * size + image.channels + 1, mask=split < image.splits, other=0.0)
    largest = tl.max(least, 0)
    kept = tl.exp(least - largest)
    total = tl.sum(tl.where(split < image.splits, kept * sums, 0.0), 0)
    if key_bias is not None:
        bias = tl.load(key_bias).to(REAL)
        total += bias - bias
    tl.store(row + image.channels, largest)
    tl.store(row + image.channels + 1, total)

    unit = tl.arange(0, BLOCK_H)
    z = tl.zeros((BLOCK_H,), REAL)
    for start in range(0, image.channels, CHUNK):
        channel = start + lane
        exists = channel < image.channels
        part = tl.load(
            image_partials + split[:, None] * size + channel[None, :],
            mask=(split < image.splits)[:, None] & exists[None, :],
            other=0.0,
        )
        pooled = tl.sum(tl.where((split < image.splits)[:, None], part * kept[:, None], 0.0), 0) / total
        tl.store(row + channel, pooled, mask=exists)
        if context is not None:
            out = context + tl.cast(n, tl.int64) * image.channels + channel
            tl.store(out, pooled.to(context.dtype.element_ty), mask=exists)
        if squeeze_weight is not None:
            weights = tl.load(
                squeeze_weight + unit[:, None] * image.channels + channel[None, :],
                mask=(unit < hidden)[:, None] & exists[None, :],
                other=0.0,
            ).to(REAL)
            z += tl.sum(tl.where(exists[None, :], weights * pooled[None, :], 0.0), 1)

    if squeeze_weight is not None:
        present = unit < hidden
        z += tl.load(squeeze_bias + unit, mask=present, other=0.0).to(REAL)
        z = tl.where(present, z, 0.0)
        centred = tl.where(present, z - tl.sum(z, 0) / hidden, 0.0)
        inverse_std = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / hidden + EPS)
        normalised = centred * inverse_std
        tl.store(row + image.channels + 2, inverse_std)
        tl.store(row + image.channels + 3 + unit, normalised, mask=present)
        activation = _activation(normalised, norm_weight, norm_bias, unit, present, REAL)
        for start in range(0, image.channels, CHUNK):
            channel = start + lane
            exists = channel < image.channels
            weights = tl.load(
                excite_weight + channel[:, None] * hidden + unit[None, :],
                mask=exists[:, None] & present[None, :],
                other=0.0,
            ).to(REAL)
            change = tl.sum(tl.where(present[None, :], weights * activation[None, :], 0.0), 1)
            change += tl.load(excite_bias + channel, mask=exists, other=0.0).to(REAL)
            if MULTIPLY:
                change = 1.0 / (1.0 + tl.exp(-change))
            tl.store(row + image.channels + 3 + hidden + channel, change, mask=exists)


@triton.jit
def _activation(normalised, norm_weight, norm_bias, unit, present, REAL: tl.constexpr):
    """ReLU of the affine map; NaN stays NaN."""
    y = normalised * tl.load(norm_weight + unit, mask=present, other=0.0).to(REAL)
    y += tl.load(norm_bias + unit, mask=present, other=0.0).to(REAL)
    return tl.where(y <= 0, 0.0, y)


@triton.jit
def fuse_kernel(
    input,
    state,
    output,
    image,
    change_at,
    state_size,
    MULTIPLY: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    REAL: tl.constexpr,
):
    """A program owns a tile; the last pixels come first, which the cache still holds of the pooling pass."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    image_tiles = tl.cdiv(image.pixels, BLOCK_P)
    n = program // image_tiles
    at, exists, _ = _tile(program % image_tiles, image, BLOCK_C, BLOCK_P)
    at += tl.cast(n, tl.int64) * image.step_n
    change = _vector(state + tl.cast(n, tl.int64) * state_size + change_at, image, BLOCK_C, REAL)[:, None]
    x = tl.load(input + at, mask=exists, other=0.0).to(REAL)
    fused = x * change if MULTIPLY else x + change
    tl.store(output + at, fused.to(output.dtype.element_ty), mask=exists)


@triton.jit
def total_kernel(
    grad_output,
    input,  # None where the change is added
    partials,
    image,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    REAL: tl.constexpr,
):
    """partials[n, split] = sums of grad_output, or of grad_output times input, [C]."""
    program = tl.program_id(0)
    n = program // image.splits
    first = program % image.splits * image.tiles
    sums = tl.zeros((BLOCK_C, BLOCK_P), REAL)
    for step in range(image.tiles):
        at, exists, _ = _tile(first + step, image, BLOCK_C, BLOCK_P)
        at += tl.cast(n, tl.int64) * image.step_n
        value = tl.load(grad_output + at, mask=exists, other=0.0).to(REAL)
        if input is not None:
            value *= tl.load(input + at, mask=exists, other=0.0).to(REAL)
        sums += value
    channel = tl.arange(0, BLOCK_C)
    row = partials + tl.cast(program, tl.int64) * image.channels
    tl.store(row + channel, tl.sum(sums, 1), mask=channel < image.channels)


@triton.jit
def bottleneck_backward_kernel(
    partials,
    state,
    squeeze_weight,
    norm_weight,
    norm_bias,
    excite_weight,
    grad_change,  # of t, [N, C]
    grad_affine,  # [N, hidden]; so are the next two
    grad_squeezed,
    activations,
    grad_context,  # [N, C]
    image,
    hidden,
    state_size,
    MULTIPLY: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
    CHUNK: tl.constexpr,
    REAL: tl.constexpr,
):
    """A program owns an image, and its row of each result."""
    n = tl.cast(tl.program_id(0), tl.int64)
    split, lane, unit = tl.arange(0, BLOCK_S), tl.arange(0, CHUNK), tl.arange(0, BLOCK_H)
    present = unit < hidden
    row = state + n * state_size
    gradient = tl.zeros((BLOCK_H,), REAL)
    for start in range(0, image.channels, CHUNK):
        channel = start + lane
        exists = channel < image.channels
        part = tl.load(
            partials + (n * image.splits + split[:, None]) * image.channels + channel[None, :],
            mask=(split < image.splits)[:, None] & exists[None, :],
            other=0.0,
        )
        dt = tl.sum(part, 0)
        if MULTIPLY:
            factor = tl.load(row + image.channels + 3 + hidden + channel, mask=exists, other=0.0)
            dt *= factor * (1.0 - factor)
        tl.store(grad_change + n * image.channels + channel, dt, mask=exists)
        weights = tl.load(
            excite_weight + channel[:, None] * hidden + unit[None, :],
            mask=exists[:, None] & present[None, :],
            other=0.0,
        ).to(REAL)
        gradient += tl.sum(weights * dt[:, None], 0)

    normalised = tl.load(row + image.channels + 3 + unit, mask=present, other=0.0)
    activation = _activation(normalised, norm_weight, norm_bias, unit, present, REAL)
    gradient = tl.where((activation == 0) | (unit >= hidden), 0.0, gradient)
    tl.store(activations + n * hidden + unit, activation, mask=present)
    tl.store(grad_affine + n * hidden + unit, gradient, mask=present)
    gradient *= tl.load(norm_weight + unit, mask=present, other=0.0).to(REAL)
    mean, slope = tl.sum(gradient, 0) / hidden, tl.sum(gradient * normalised, 0) / hidden
    gradient = (gradient - mean - normalised * slope) * tl.load(row + image.channels + 2)
    gradient = tl.where(present, gradient, 0.0)
    tl.store(grad_squeezed + n * hidden + unit, gradient, mask=present)
    for start in range(0, image.channels, CHUNK):
        channel = start + lane
        exists = channel < image.channels
        weights = tl.load(
            squeeze_weight + unit[:, None] * image.channels + channel[None, :],
            mask=present[:, None] & exists[None, :],
            other=0.0,
        ).to(REAL)
        tl.store(grad_context + n * image.channels + channel, tl.sum(weights * gradient[:, None], 0), mask=exists)


@triton.jit
def gradient_kernel(
    grad_output,  # None: there is no path past the pooling
    input,
    key,
    state,
    grad_context,
    grad_input,  # None where not wanted; so is the next
    key_partials,  # [N, splits, C]
    image,
    change_at,
    state_size,
    MULTIPLY: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    REAL: tl.constexpr,
):
    """grad_input = grad_output [change] + w G + s key, and key_partials[n, split] = sum of s x, over a split.

    With s = w (<G, x> - <G, context>), the gradient of a pixel's logit, and w its weight in the softmax.
    """
    program = tl.program_id(0)
    n = tl.cast(program // image.splits, tl.int64)
    first = program % image.splits * image.tiles
    row = state + n * state_size
    factors = _vector(key, image, BLOCK_C, REAL)[:, None]
    direction = _vector(grad_context + n * image.channels, image, BLOCK_C, REAL)
    mean = tl.sum(direction * _vector(row, image, BLOCK_C, REAL), 0)
    direction = direction[:, None]
    largest, inverse = tl.load(row + image.channels), 1.0 / tl.load(row + image.channels + 1)
    sums = tl.zeros((BLOCK_C, BLOCK_P), REAL)
    for step in range(image.tiles):
        at, exists, _ = _tile(first + step, image, BLOCK_C, BLOCK_P)
        at += n * image.step_n
        x = tl.load(input + at, mask=exists, other=0.0).to(REAL)
        weights = tl.exp(tl.sum(x * factors, 0) - largest) * inverse
        slopes = weights * (tl.sum(x * direction, 0) - mean)
        if key_partials is not None:
            sums += x * slopes[None, :]
        if grad_input is not None:
            gradient = weights[None, :] * direction + slopes[None, :] * factors
            if grad_output is not None:
                past = tl.load(grad_output + at, mask=exists, other=0.0).to(REAL)
                if MULTIPLY:
                    past *= _vector(row + change_at, image, BLOCK_C, REAL)[:, None]
                gradient += past
            tl.store(grad_input + at, gradient.to(grad_input.dtype.element_ty), mask=exists)
    if key_partials is not None:
        channel = tl.arange(0, BLOCK_C)
        target = key_partials + tl.cast(program, tl.int64) * image.channels
        tl.store(target + channel, tl.sum(sums, 1), mask=channel < image.channels)
