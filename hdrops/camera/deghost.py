"""Ghost-free brackets: what moved between the frames of a bracket is found, and replaced or left out.

One frame is the reference: moving things stay where it shows them. The other frames follow by distance in exposure.
Each is compared with what is known so far (``disagreement.py``): the reference's readings where it is well exposed, and
where it is clipped or black those of the frames already done. Where a frame contradicts it, the frame's own content is
sought nearby by patch matching (``transfer.py``): the moving thing where that frame saw it, or, where the reference is
clipped and so says little, what fits the surroundings. What is found is put in if it agrees with the reference; else
the frame does not count there.

Everything but the moving of pixels is done at a resolution of at most about a million pixels.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hdrops.camera.disagreement import (
    CERTAIN,
    LEAST_DEEP_READING,
    LEAST_READING,
    MOST_READING,
    Bounds,
    black_exposure,
    bounds_at,
    box,
    excess,
    find_motion,
    measure_tolerance,
    widen,
)
from hdrops.camera.transfer import fill_smoothly, match, swap_pixels
from hdrops.ops import _common
from hdrops.ops.crf import crf_lookup
from hdrops.ops.patch_swap import SCALES, patch_swap

KEPT, MOVED, FILLED, EXCLUDED = range(4)

_LARGEST_CODE = {torch.uint8: 255, torch.uint16: 65535}

# Sites of the grid on which motion is found; the scales patch_swap has set the least number a large image can have.
_SITES = 1 << 20
# Pixels of each frame from which the black level is found.
_SAMPLES = 1 << 15
# A well exposed pixel, when the reference is chosen: the exposure it stands for, as a share of the largest.
_WELL_EXPOSED = (0.01, 0.9)
# Frames within this share of the best exposed one are as good; the middle one of them is taken.
_AS_GOOD = 0.1
# A channel that got less than this share of the brightest one's exposure tells nothing.
_LEAST_CHANNEL = 0.07
# Content found agrees where its gaps are within so many tolerances (where the reference is clipped,
# anything better than certain motion beats its flat white), in most of the 5 x 5 pixels around.
_AGREED = 2.0
_AGREED_SHARE = 0.6
# Pixels of motion are widened by this: its edge is blurred. Content and weight change over twice the next.
_MARGIN = 3
_FEATHER = 2


class Deghosted(NamedTuple):
    """The result of :func:`deghost`.

    Attributes:
        stack: the frames, moving content replaced.
        weight: float32 [N, P, 1, H, W] in [0, 1], the ``mask`` for :func:`hdrops.merge_exposures`: 0 where a frame does
            not count.
        label: uint8 [N, P, H, W]: 0 kept, 1 replaced by the same content found elsewhere in the frame, 2 filled where
            the reference is clipped or black, 3 excluded.
        reference: the index of each bracket's reference frame.
    """

    stack: Tensor
    weight: Tensor
    label: Tensor
    reference: tuple[int, ...]


def deghost(
    stack: Tensor,
    log_exposures: Tensor,
    curve: Tensor | None = None,
    *,
    reference: int | None = None,
    mask: Tensor | None = None,
    saturation: float = 1.0,
    inplace: bool = False,
) -> Deghosted:
    """Removes what would become ghosts when a bracket with moving things is merged.

    Args:
        stack: registered frames [N, P, C, H, W], P >= 1, in any order: uint8, uint16, or floating point in [0, 1].
        log_exposures: [P] or [N|1, P], natural logarithm of seconds.
        curve: inverse response, [L] or [N|1, C|1, L], as for :func:`hdrops.merge_exposures`; None: linear.
        reference: index of the frame that says where moving things are; None: the one with most well-exposed pixels;
            of those within a tenth of the image of it, the one in the middle by exposure.
        mask: bool [N|1, P, 1, H, W], True where a frame's pixel is no data. It stays excluded, and is never a source.
        saturation: the reading at which the camera clips, as a share of the largest.
        inplace: True changes ``stack`` itself and saves a copy.

    Returns:
        ``Deghosted(stack, weight, label, reference)``. The reference is unchanged, with weight 1 wherever it is not
        masked. The order of the frames does not matter, but among frames of equal exposure, where the first given
        comes first.

    There are no gradients: the result is detached.

    Raises:
        ValueError: a wrong shape or value.
        TypeError: a wrong dtype.

    Example:
        >>> import torch, hdrops
        >>> times = torch.tensor([0.25, 1.0, 4.0])
        >>> scene = 0.02 + 0.2 * torch.rand(1, 1, 1, 6, 8)
        >>> scene = scene.repeat_interleave(8, -1).repeat_interleave(8, -2).expand(1, 3, 3, 48, 64).clone()
        >>> scene[:, 2, :, 10:30, 10:26] = 0.01  # a thing that only the longest exposure saw there
        >>> frames = (scene * times.view(1, 3, 1, 1, 1)).clamp(0, 1)
        >>> result = hdrops.camera.deghost(frames, times.log(), reference=1)
        >>> radiance = hdrops.merge_exposures(result.stack, times.log()[None], mask=result.weight)
        >>> result.label[0, 2, 20, 18].item() > 0, bool(result.label[0, :2].any())
        (True, False)

    Source: patch-based deghosting against one reference is due to Sen et al., "Robust Patch-Based HDR Reconstruction of
    Dynamic Scenes", 2012, and Hu et al., "HDR Deghosting: How to Deal with Saturation?", 2013; here the matching is
    that of :func:`hdrops.patch_match_pyramid`, and the test for motion that of ``hdrops/camera/disagreement.py``.
    """
    _check(stack, log_exposures, curve, reference, mask, saturation)
    if inplace and any(size > 1 and step == 0 for size, step in zip(stack.shape, stack.stride(), strict=True)):
        raise ValueError(
            "deghost: inplace needs a stack whose pixels have memory of their own, got shape "
            f"{list(stack.shape)} with strides {list(stack.stride())}; clone it"
        )
    stack = stack.detach() if inplace else stack.detach().clone()
    # Codes and log radiance need float32.
    with _common.without_autocast(stack):
        return _deghost(stack, log_exposures.detach(), curve, reference, mask, saturation)


def _deghost(
    stack: Tensor,
    log_exposures: Tensor,
    curve: Tensor | None,
    reference: int | None,
    mask: Tensor | None,
    saturation: float,
) -> Deghosted:
    """:func:`deghost` in place, of checked arguments."""
    brackets, frames, channels, height, width = stack.shape
    log_times = log_exposures.double().cpu().reshape(-1, frames).expand(brackets, frames).tolist()
    response = torch.tensor([0.0, 1.0], device=stack.device) if curve is None else curve.detach()
    response = response.float()
    response = response.reshape(1, 1, -1) if response.dim() == 1 else response
    response = response.expand(brackets, channels, -1).clamp_min(1e-7)
    weight = torch.ones(brackets, frames, 1, height, width, dtype=torch.float32, device=stack.device)
    label = torch.zeros(brackets, frames, height, width, dtype=torch.uint8, device=stack.device)
    chosen = []
    for n in range(brackets):
        masked = None if mask is None else mask[n % mask.shape[0]]
        work = _Bracket(stack[n], log_times[n], response[n], masked, saturation, weight[n, :, 0], label[n])
        chosen.append(work.choose_reference() if reference is None else reference)
        work.remove_ghosts(chosen[-1])
    if mask is not None:
        weight.masked_fill_(mask, 0.0)
    return Deghosted(stack, weight, label, tuple(chosen))


class _Unfilled(NamedTuple):
    """Where a frame is excluded and nothing that was found fits, though the reference is clipped or black there."""

    frame: int
    excluded: Tensor  # all of the frame's, bool [h, w]
    hole: Tensor  # bool [h, w]
    smooth: Tensor  # log exposure that the surroundings suggest, [C, h, w]


class _Bracket:
    """One bracket at work: frames [P, C, H, W], weight and label [P, H, W] are changed in place."""

    def __init__(
        self,
        frames: Tensor,
        log_times: list[float],
        response: Tensor,
        masked: Tensor | None,
        saturation: float,
        weight: Tensor,
        label: Tensor,
    ) -> None:
        self.frames, self.log_times, self.response, self.masked = frames, log_times, response, masked
        self.weight, self.label = weight, label
        self.unfilled: list[_Unfilled] = []
        self.scale = next((s for s in SCALES if frames.shape[-2] * frames.shape[-1] <= _SITES * s * s), max(SCALES))
        # Log exposures [C, 1, 1] at which frames are clipped and black.
        ends = torch.tensor([LEAST_READING.get(frames.dtype, LEAST_DEEP_READING), MOST_READING]).float() * saturation
        ends = self._log_exposure(ends.to(frames.device).expand(len(response), 1, 2))
        self.clipped = ends[:, :, 1:]
        self.black = self._black(ends[:, :, :1])

    def _black(self, least: Tensor) -> Tensor:
        """From samples on a regular grid."""
        height, width = self.frames.shape[-2:]
        step = max(1, math.isqrt(height * width // _SAMPLES))
        exposures = torch.stack([self._log_exposure(_readings(frame[:, ::step, ::step])) for frame in self.frames])
        if self.masked is not None:
            exposures = exposures.masked_fill(self.masked[:, :, ::step, ::step], torch.nan)
        black = black_exposure(exposures.flatten(2), self.log_times, least.flatten(), self.clipped.flatten())
        return black[:, None, None]

    def choose_reference(self) -> int:
        """The frame with most well-exposed pixels; of about equal ones the middle by exposure."""
        low, high = (self.clipped + math.log(share / MOST_READING) for share in _WELL_EXPOSED)
        order = sorted(self.log_times)
        scores = []
        for frame in range(len(self.frames)):
            value = self._log_exposure(_readings(self.frames[frame][:, ::4, ::4]))
            well = ((value >= low) & (value <= high)).all(0)
            if self.masked is not None:
                well &= ~self.masked[frame, 0, ::4, ::4]
            scores.append(float(well.double().mean()))

        def off_middle(frame: int) -> tuple[float, float]:
            return abs(order.index(self.log_times[frame]) - (len(order) - 1) / 2), self.log_times[frame]

        return min((frame for frame, score in enumerate(scores) if score >= max(scores) - _AS_GOOD), key=off_middle)

    def remove_ghosts(self, reference: int) -> None:
        """Frame by frame, the nearest in exposure first."""
        known = self._bounds(reference)
        middle = self.log_times[reference]
        others = [frame for frame in range(len(self.frames)) if frame != reference]
        for frame in sorted(others, key=lambda frame: (abs(self.log_times[frame] - middle), self.log_times[frame])):
            known = self._settle(frame, known)
        unknown = ~known.exact.all(0)
        for place in self.unfilled:
            self._paint(place, place.hole & unknown)
            unknown &= ~place.hole

    def _settle(self, frame: int, known: Bounds) -> Bounds:
        """Replaces or excludes what contradicts in one frame; returns what is known with it."""
        bounds = self._bounds(frame)
        offset, spread = measure_tolerance(bounds, known)
        bounds = bounds.shifted(-offset)
        moving = widen(find_motion(excess(bounds, known, spread)), _MARGIN)
        if not bool(moving.any()):
            return known.narrowed(bounds, torch.ones_like(known.exact))
        least, most = (limit - self.log_times[frame] - offset for limit in (self.black, self.clipped))
        hole = moving & ~known.exact
        wanted = torch.where(known.exact, known.value, bounds.value)
        wanted = fill_smoothly(wanted, hole).clamp(known.low, known.high).clamp(least, most)
        index = match(wanted, bounds.value)
        found = patch_swap(bounds.value[None], index)[0]
        if bool(hole.any()):
            # Once more, with real content in the holes for the patches to meet.
            wanted = torch.where(hole, found.clamp(known.low, known.high), wanted).clamp(least, most)
            index = match(wanted, bounds.value)
            found = patch_swap(bounds.value[None], index)[0]
        content = bounds_at(found, least, most)
        beyond = excess(content, known, spread)
        agrees = beyond < torch.where(hole.any(0), CERTAIN, _AGREED)
        if self.masked is not None:
            unusable = self._masked_sites(frame).float()[None, None]
            agrees &= patch_swap(unusable, index)[0, 0] == 0
        replaced = moving & (box(agrees.float()[None], 2)[0] >= _AGREED_SHARE) & agrees
        excluded = moving & ~replaced
        self._write(frame, index, replaced, excluded, hole.any(0))
        unfilled = excluded & hole.any(0)
        # From what else the reference could not show: its rim is no measure of what lies beyond its white.
        source = ~(moving | known.exact)
        if self.masked is not None:
            source &= ~self._masked_sites(frame)
        without = ~source.flatten(1).any(1)[:, None, None]  # channels with nowhere to take light from
        if bool(unfilled.any()) and not bool((unfilled & hole & without).any()):
            smooth = fill_smoothly(bounds.value, ~source).clamp(known.low, known.high).clamp(least, most)
            self.unfilled.append(_Unfilled(frame, excluded, unfilled, smooth + self.log_times[frame] + offset))
        merged = Bounds(*(torch.where(replaced, new, old) for new, old in zip(content, bounds, strict=True)))
        return known.narrowed(merged, (~excluded).expand_as(known.exact))

    def _write(self, frame: int, index: Tensor, replaced: Tensor, excluded: Tensor, hole: Tensor) -> None:
        swap_pixels(self.frames[frame], index, feather(replaced), self.scale)
        label = torch.where(excluded, EXCLUDED, torch.where(replaced, torch.where(hole, FILLED, MOVED), KEPT)).byte()
        self.label[frame] = self._fine(label)
        self._exclude(frame, excluded)

    def _exclude(self, frame: int, excluded: Tensor) -> None:
        if bool(excluded.any()):
            self.weight[frame] = self._finely(1 - feather(excluded)[None])[0]
        else:
            self.weight[frame] = 1

    def _paint(self, place: _Unfilled, where: Tensor) -> None:
        """Puts the smooth content there instead of leaving the frame out."""
        if not bool(where.any()):
            return
        frame, share = self.frames[place.frame], self._finely(feather(where)[None])[0]
        rows, columns = share.amax(1).nonzero(), share.amax(0).nonzero()
        part = (slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1))
        here = (slice(None), *part)
        painted = torch.lerp(_readings(frame[here]), self._finely(self._reading(place.smooth))[here], share[part])
        if not frame.is_floating_point():
            painted = (painted * _LARGEST_CODE[frame.dtype]).round()
        frame[here] = painted.to(frame.dtype)
        self.label[place.frame][self._fine(where)] = FILLED
        self._exclude(place.frame, place.excluded & ~where)

    def _bounds(self, frame: int) -> Bounds:
        """What one frame tells of log radiance, at the sites."""
        mean, least, most = (self._log_exposure(readings) for readings in _pooled(self.frames[frame], self.scale))
        value = mean.clamp(self.black, self.clipped) - self.log_times[frame]
        low = torch.where(least <= self.black, -torch.inf, value)
        high = torch.where(most >= self.clipped, torch.inf, value)
        # A camera's colour processing, and JPEG, set the channels that are much darker than the pixel's brightest.
        exposure = value.exp()
        unreadable = mean.isnan() | (exposure < _LEAST_CHANNEL * exposure.amax(0))
        if self.masked is not None:
            unreadable = unreadable | self._masked_sites(frame)
        low, high = low.masked_fill(unreadable, -torch.inf), high.masked_fill(unreadable, torch.inf)
        return Bounds(value.nan_to_num(nan=-self.log_times[frame]), low, high)

    def _log_exposure(self, reading: Tensor) -> Tensor:
        """Of readings [C, H, W]."""
        return crf_lookup(reading[None].to(self.response.device), self.response[None])[0].log()

    def _reading(self, log_exposure: Tensor) -> Tensor:
        """The inverse of :meth:`_log_exposure`, [C, H, W]."""
        exposure = log_exposure.exp().to(self.response.device).flatten(1)
        curve = self.response.cummax(1).values
        upper = torch.searchsorted(curve, exposure.contiguous()).clamp(1, curve.shape[1] - 1)
        below, above = curve.gather(1, upper - 1), curve.gather(1, upper)
        part = ((exposure - below) / (above - below).clamp_min(1e-12)).clamp(0, 1)
        reading = (upper - 1 + part) / (curve.shape[1] - 1)
        return reading.reshape(log_exposure.shape).to(log_exposure)

    def _fine(self, sites: Tensor) -> Tensor:
        """[h, w] of the sites as [H, W] of the pixels, as they are."""
        height, width = self.frames.shape[-2:]
        return sites.repeat_interleave(self.scale, 0).repeat_interleave(self.scale, 1)[:height, :width]

    def _finely(self, sites: Tensor) -> Tensor:
        """[C, h, w] of the sites as [C, H, W] of the pixels, interpolated."""
        height, width = self.frames.shape[-2:]
        return F.interpolate(sites[None], scale_factor=self.scale, mode="bilinear")[0, :, :height, :width]

    def _masked_sites(self, frame: int) -> Tensor:
        """bool [h, w]: sites with a pixel that is no data."""
        assert self.masked is not None
        masked = self.masked[frame].float()[None]
        return F.max_pool2d(masked, self.scale, ceil_mode=True)[0, 0] > 0


def feather(where: Tensor) -> Tensor:
    """[H, W] from a mask: 1 in it, falling to 0 within ``2 * _FEATHER`` pixels around it."""
    return box(widen(where, _FEATHER).float()[None], _FEATHER)[0].masked_fill(where, 1.0)


def _readings(frame: Tensor) -> Tensor:
    """Codes as float32 shares of the largest code."""
    if frame.is_floating_point():
        return frame.float().clamp(0, 1)
    return frame.float() / _LARGEST_CODE[frame.dtype]


def _pooled(frame: Tensor, scale: int, strip: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, least and greatest reading over squares of ``scale`` pixels, [C, h, w]; a strip of rows at a time."""
    if scale == 1:
        readings = _readings(frame)
        return readings, readings, readings
    parts: list[tuple[Tensor, ...]] = []
    for top in range(0, frame.shape[1], strip * scale):
        readings = _readings(frame[:, top : top + strip * scale])
        pad = (0, -readings.shape[2] % scale, 0, -readings.shape[1] % scale)
        readings = F.pad(readings[None], pad, mode="replicate")
        parts.append(
            (
                F.avg_pool2d(readings, scale)[0],
                -F.max_pool2d(-readings, scale)[0],
                F.max_pool2d(readings, scale)[0],
            )
        )
    mean, least, most = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    return mean, least, most


def _check(
    stack: Tensor,
    log_exposures: Tensor,
    curve: Tensor | None,
    reference: int | None,
    mask: Tensor | None,
    saturation: float,
) -> None:
    for name, tensor in (("stack", stack), ("log_exposures", log_exposures), ("curve", curve), ("mask", mask)):
        if not isinstance(tensor, Tensor) and (tensor is not None or name in ("stack", "log_exposures")):
            raise TypeError(f"deghost: {name} must be a tensor, got {type(tensor).__name__}")
    if stack.dim() != 5:
        raise ValueError(f"deghost: stack must be [N, P, C, H, W], got shape {list(stack.shape)}")
    if stack.dtype not in (torch.uint8, torch.uint16) and not stack.is_floating_point():
        raise TypeError(f"deghost: stack must be uint8, uint16 or floating point in [0, 1], got {stack.dtype}")
    brackets, frames, channels, height, width = stack.shape
    if frames * channels * height * width == 0:
        raise ValueError(f"deghost: the frames are empty (stack shape {list(stack.shape)})")
    if not log_exposures.is_floating_point():
        raise TypeError(f"deghost: log_exposures must be floating point, got {log_exposures.dtype}")
    if log_exposures.shape not in ((frames,), (1, frames), (brackets, frames)):
        raise ValueError(
            f"deghost: log_exposures must be [P] or [N|1, P] with N = {brackets}, P = {frames}, "
            f"got shape {list(log_exposures.shape)}"
        )
    if not bool(log_exposures.isfinite().all()):
        raise ValueError(f"deghost: log_exposures must be finite, got {log_exposures.tolist()}")
    if curve is not None:
        if not curve.is_floating_point():
            raise TypeError(f"deghost: curve must be floating point, got {curve.dtype}")
        fits = curve.dim() == 1 or (
            curve.dim() == 3 and curve.shape[0] in (1, brackets) and curve.shape[1] in (1, channels)
        )
        if not fits or curve.shape[-1] < 2:
            raise ValueError(
                f"deghost: curve must be [L] or [N|1, C|1, L] with N = {brackets}, C = {channels}, L >= 2, "
                f"got shape {list(curve.shape)}"
            )
        if not bool(curve.isfinite().all()):
            raise ValueError("deghost: curve must be finite, got NaN or infinity")
    if reference is not None and (isinstance(reference, bool) or not isinstance(reference, int)):
        raise TypeError(f"deghost: reference must be an integer or None, got {reference!r}")
    if reference is not None and not 0 <= reference < frames:
        raise ValueError(f"deghost: reference must lie in 0..{frames - 1}, got {reference}")
    if not isinstance(saturation, (int, float)):
        raise TypeError(f"deghost: saturation must be a number, got {saturation!r}")
    if not 0 < saturation <= 1:
        raise ValueError(f"deghost: saturation must lie in (0, 1], got {saturation}")
    _common.check_devices("deghost", "stack", stack, mask=mask)
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"deghost: mask must be bool (True excludes a pixel), got {mask.dtype}")
        if mask.shape not in ((brackets, frames, 1, height, width), (1, frames, 1, height, width)):
            raise ValueError(
                f"deghost: mask must be [N|1, P, 1, H, W] = [{brackets}|1, {frames}, 1, {height}, {width}], "
                f"got shape {list(mask.shape)}"
            )
