"""Where two frames of a bracket contradict each other: the test behind :func:`hdrops.camera.deghost`.

A reading tells radiance between two bounds: both are its value where it is well exposed, the upper one is infinite
where it is clipped, the lower one minus infinity where it is black. Two frames contradict each other where their bounds
do not meet, and the gap between them, in natural logarithms of radiance, says by how much.

How large a gap is ordinary the frames say themselves: noise, quantisation, JPEG and an imperfect response spread the
gaps of still pixels, and still pixels are the majority. So the median and the median absolute deviation of the gaps,
as functions of radiance, are the offset to subtract and the tolerance. Beside edges, where a fraction of a pixel
matters, the tolerance grows by a share of the edge's height.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hdrops.ops.crf import crf_lookup

# Readings outside these shares of the largest code are black or clipped. An 8-bit camera is coarse in the dark.
LEAST_READING = {torch.uint8: 0.02}
LEAST_DEEP_READING = 0.004
MOST_READING = 0.94

# Dark readings count as black below the exposure from which on frames agree: within these limits of median and spread,
# in natural logarithms, about exposures that a longer frame got with at least the third, as a share of the largest. No
# more than the fourth is ever black.
_TRUSTED_OFFSET = 0.2
_TRUSTED_SPREAD = 0.6
_TRUSTED_EXPOSURE = 0.004
_MOST_BLACK = 0.02
_STEP = 0.15

# Tolerances, in natural logarithms: a gap of still pixels is at least 4 % and taken as at most 20 %. Exposures are
# trusted within 50 %; beside that an offset of more than 20 % at some radiance is motion and no error of the response.
_LEAST_TOLERANCE = 0.04
_MOST_TOLERANCE = 0.2
_MOST_OFFSET = 0.2
_MOST_EXPOSURE_ERROR = 0.5
_EDGE_SHARE = 0.1
# Within two pixels of a clipped or black one: the ends of a response are its least certain parts, and light spills.
_LIMIT_TOLERANCE = 0.1
# Gaps in tolerances: motion starts where they exceed the first and spreads as far as they exceed the second.
CERTAIN = 5.0
_POSSIBLE = 2.5
# Of the 5 x 5 pixels around a start as many must contradict, or it is a speck of noise.
_SUPPORT = 0.6

_BINS = 24
_LEAST_IN_BIN = 64
_SAMPLES = 1 << 15


class Bounds(NamedTuple):
    """What a frame tells of log radiance: its value [C, H, W], held at the ends of its range, and the two bounds."""

    value: Tensor
    low: Tensor
    high: Tensor

    @property
    def exact(self) -> Tensor:
        """bool [C, H, W]: both bounds are the value."""
        return (self.low == self.value) & (self.high == self.value)

    def shifted(self, offset: Tensor) -> "Bounds":
        """All three raised by ``offset``."""
        return Bounds(self.value + offset, self.low + offset, self.high + offset)

    def narrowed(self, other: "Bounds", where: Tensor) -> "Bounds":
        """Where this is not exact and ``where`` holds, what both tell; where they contradict, ``other``."""
        open = where & ~self.exact
        low, high = torch.maximum(self.low, other.low), torch.minimum(self.high, other.high)
        low, high = torch.where(low > high, other.low, low), torch.where(low > high, other.high, high)
        return Bounds(
            torch.where(open, other.value.clamp(low, high), self.value),
            torch.where(open, low, self.low),
            torch.where(open, high, self.high),
        )


def bounds_at(value: Tensor, least: Tensor, most: Tensor) -> Bounds:
    """Bounds of values [C, H, W] that are black at ``least`` and clipped at ``most``, each [C, 1, 1] or [C, H, W]."""
    value = value.clamp(least, most)
    low = torch.where(value <= least, -torch.inf, value)
    high = torch.where(value >= most, torch.inf, value)
    return Bounds(value, low, high)


def gap(a: Bounds, b: Bounds) -> Tensor:
    """How far ``a`` lies above ``b`` (positive) or below it (negative): [C, H, W], 0 where the bounds meet."""
    return (a.low - b.high).clamp_min(0) - (b.low - a.high).clamp_min(0)


def box(image: Tensor, radius: int) -> Tensor:
    """Mean over a square around each pixel, of what lies inside the image."""
    size = 2 * radius + 1
    across = F.avg_pool2d(image[None], (1, size), 1, (0, radius), count_include_pad=False)
    averaged: Tensor = F.avg_pool2d(across, (size, 1), 1, (radius, 0), count_include_pad=False)[0]
    return averaged


def widen(where: Tensor, radius: int) -> Tensor:
    """bool [H, W]: in the square of that radius around a pixel where ``where`` holds."""
    size = 2 * radius + 1
    across = F.max_pool2d(where.float()[None, None], (1, size), 1, (0, radius))
    return F.max_pool2d(across, (size, 1), 1, (radius, 0))[0, 0] > 0


def black_exposure(log_exposure: Tensor, log_times: list[float], least: Tensor, most: Tensor) -> Tensor:
    """The log exposure below which a bracket's frames do not tell radiance: [C].

    Dark codes are where a recovered response is least certain, and where scanners and raw converters put a pedestal.
    The exposure from which on the frames agree with longer ones of the same pixels is found by going down from
    ``_MOST_BLACK`` until they do not.

    Args:
        log_exposure: samples [P, C, S]; NaN does not count.
        log_times: P logarithms of exposure times.
        least: [C], the lowest answer, of frames that agree all the way down; also where there is nothing to compare.
        most: [C], log exposure at which the frames clip.
    """
    channels = log_exposure.shape[1]
    start = torch.maximum(most + math.log(_MOST_BLACK), least)
    seen: list[list[Tensor]] = [[] for _ in range(channels)]
    for short, short_time in enumerate(log_times):
        for long, long_time in enumerate(log_times):
            if not 0.1 < long_time - short_time < 3:
                continue
            difference = (log_exposure[short] - short_time) - (log_exposure[long] - long_time)
            for channel in range(channels):
                end, below = most[channel], start[channel] - log_exposure[short, channel]
                both = log_exposure[long, channel] >= end + math.log(_TRUSTED_EXPOSURE)
                both &= log_exposure[long, channel] < end
                middling = difference[channel][both & (below < 0)]
                if len(middling) < _LEAST_IN_BIN:
                    continue
                dark = both & (below >= 0)
                step = (below[dark] / _STEP).floor()
                seen[channel].append(torch.stack((step, difference[channel][dark] - middling.median())))
    for channel, pairs in enumerate(seen):
        steps = int((start[channel] - least[channel]) / _STEP) + 1
        trusted = _trusted_steps(torch.cat(pairs, 1), steps) if pairs else steps
        start[channel] = torch.maximum(start[channel] - trusted * _STEP, least[channel])
    return start


def _trusted_steps(pairs: Tensor, steps: int) -> int:
    """How many steps down frames agree, from pairs [2, n] of step and difference to a longer frame."""
    pairs = pairs[:, pairs[0] < steps]
    step, difference = pairs[0].long(), pairs[1]
    groups = difference[step.argsort()].split(torch.bincount(step, minlength=steps).tolist())
    for trusted, group in enumerate(groups):
        if len(group) < _LEAST_IN_BIN:
            return trusted
        middle, spread = _spread(group)
        if abs(middle) > _TRUSTED_OFFSET or spread > _TRUSTED_SPREAD:
            return trusted
    return steps


def _spread(values: Tensor) -> tuple[float, float]:
    """Median, and the standard deviation that the median absolute deviation stands for."""
    middle = values.median()
    return float(middle), 1.4826 * float((values - middle).abs().median())


class Tolerance(NamedTuple):
    """Of the gaps between a frame and what is known, [C, H, W]: the offset of the frame, and the ordinary spread."""

    offset: Tensor
    spread: Tensor


def measure_tolerance(frame: Bounds, known: Bounds) -> Tolerance:
    """The tolerance that the still pixels of two frames show."""
    both = frame.exact & known.exact
    share = box(both.float(), 1)
    difference = torch.where(both, frame.value - known.value, 0.0)
    averaged = box(difference, 1) / share.clamp_min(1e-6)
    offsets, spreads = [], []
    for channel in range(len(both)):
        where = both[channel] & (share[channel] > 0.99)
        at, offset, spread = _by_radiance(known.value[channel][where], averaged[channel][where])
        offsets.append(_interpolate(at, offset, known.value[channel]))
        spreads.append(_interpolate(at, spread, known.value[channel]))
    value = known.value
    edge = F.max_pool2d(value[None], 3, 1, 1)[0] + F.max_pool2d(-value[None], 3, 1, 1)[0]
    near_limit = F.max_pool2d((~both).float()[None], 5, 1, 2)[0]
    return Tolerance(torch.stack(offsets), torch.stack(spreads) + _EDGE_SHARE * edge + _LIMIT_TOLERANCE * near_limit)


def _by_radiance(level: Tensor, difference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Radiance, median difference and deviation, over ranges of radiance that hold enough pixels."""
    step = max(1, len(level) // _SAMPLES)
    level, difference = level[::step], difference[::step]
    found: list[tuple[float, float, float]] = []
    if len(level) >= _LEAST_IN_BIN:
        least, most = float(level.min()), float(level.max())
        bins = ((level - least) / max(most - least, 1e-6) * _BINS).long().clamp(max=_BINS - 1)
        order = bins.argsort()
        counts = torch.bincount(bins, minlength=_BINS).tolist()
        for number, group in enumerate(difference[order].split(counts)):
            if len(group) >= _LEAST_IN_BIN:
                found.append((least + (number + 0.5) * (most - least) / _BINS, *_spread(group)))
    if not found:
        found.append((0.0, 0.0, _MOST_TOLERANCE))
    at, offset, spread = torch.tensor(found, dtype=level.dtype, device=level.device).T.contiguous()
    overall = difference.median() if len(difference) else offset.median()
    overall = overall.clamp(-_MOST_EXPOSURE_ERROR, _MOST_EXPOSURE_ERROR)
    offset = overall + (_running_median(offset) - overall).clamp(-_MOST_OFFSET, _MOST_OFFSET)
    return at, offset, _running_median(spread).clamp(_LEAST_TOLERANCE, _MOST_TOLERANCE)


def _running_median(values: Tensor) -> Tensor:
    """Over five neighbours, so that a tone that only moving things have does not set its own tolerance."""
    padded = F.pad(values[None, None], (2, 2), mode="replicate")[0, 0]
    return padded.unfold(0, 5, 1).median(-1).values


def _interpolate(at: Tensor, values: Tensor, where: Tensor) -> Tensor:
    """The polyline through (at, values), ``at`` rising, read at ``where`` [H, W]; constant outside."""
    if len(at) == 1:
        return values.expand_as(where)
    # As a table over its whole range, which the lookup reads fast.
    grid = torch.linspace(0, 1, 4 * _BINS, dtype=at.dtype, device=at.device) * (at[-1] - at[0]) + at[0]
    upper = torch.searchsorted(at, grid).clamp(1, len(at) - 1)
    share = ((grid - at[upper - 1]) / (at[upper] - at[upper - 1])).clamp(0, 1)
    table = values[upper - 1] * (1 - share) + values[upper] * share
    return crf_lookup((where - at[0])[None, None] / (at[-1] - at[0]), table)[0, 0]


def excess(frame: Bounds, known: Bounds, spread: Tensor) -> Tensor:
    """[H, W]: the gap in tolerances, of the worst channel, averaged over 3 x 3 pixels."""
    return (box(gap(frame, known), 1).abs() / spread).amax(0)


def find_motion(excess: Tensor) -> Tensor:
    """bool [H, W]: connected regions that contradict, with a start that does for certain."""
    possible = excess > _POSSIBLE
    supported = box(possible.float()[None], 2)[0] >= _SUPPORT
    moving = (excess > CERTAIN) & supported
    while True:
        wider = widen(moving, 4) & possible
        if bool((wider == moving).all()):
            return moving
        moving = wider
