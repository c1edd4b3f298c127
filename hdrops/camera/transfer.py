"""Content of one frame at the places where another shows it, found by patch matching: what
:func:`hdrops.camera.deghost` puts where a frame contradicts its reference.

Both frames come as log radiance, so exposure is gone already. What is matched are features of it: detail over its local
contrast, its gradients, colour ratios and, weaker, radiance itself. The detail is divided by the contrast around it
plus a floor, so that dim texture counts like bright texture and noise does not become texture.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from hdrops.camera.disagreement import box
from hdrops.ops.patch_match import patch_match_pyramid
from hdrops.ops.patch_swap import patch_swap

# Detail is what differs from the mean over this radius; contrast below the floor (natural logarithms) is noise.
_NEIGHBOURHOOD = 4
_CONTRAST_FLOOR = 0.1
_COLOUR_SHARE = 1.0
_LEVEL_SHARE = 0.5

# The pyramid ends at the last level whose shorter side is at least this; there matches are searched this far.
_LEAST_SIDE = 24
_LEVELS = 5
_REACH = 8
_REFINEMENT = 2
_PATCH = 5


def features(log_radiance: Tensor) -> Tensor:
    """Luminance-normalised features [1, 4 + C, H, W] of log radiance [C, H, W], channels last in memory."""
    light = log_radiance.mean(0, keepdim=True)
    mean = box(light, _NEIGHBOURHOOD)
    contrast = (box(light * light, _NEIGHBOURHOOD) - mean * mean).clamp_min(0).sqrt()
    detail = (light - mean) / (contrast + _CONTRAST_FLOOR)
    padded = F.pad(detail[None], (1, 1, 1, 1), mode="replicate")[0]
    across = (padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]) / 2
    down = (padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]) / 2
    colour = _COLOUR_SHARE * (log_radiance - light)
    level = _LEVEL_SHARE * (light - light.mean())
    # A constant beside the rest makes the cosine of two patches tell their size apart, not their direction alone.
    parts = (detail, across, down, colour, level, torch.ones_like(light))
    return torch.cat(parts).unsqueeze(0).contiguous(memory_format=torch.channels_last)


def match(wanted: Tensor, source: Tensor) -> Tensor:
    """Where ``source`` shows what ``wanted`` shows, both log radiance [C, H, W]: index [1, H, W], coarse to fine."""
    pyramids = [[wanted], [source]]
    while len(pyramids[0]) < _LEVELS and min(pyramids[0][-1].shape[1:]) >= 2 * _LEAST_SIDE:
        for pyramid in pyramids:
            pyramid.append(F.avg_pool2d(pyramid[-1], 2))
    queries, keys = ([features(level) for level in reversed(pyramid)] for pyramid in pyramids)
    radii = [_REACH] + [_REFINEMENT] * (len(queries) - 1)
    return patch_match_pyramid(queries, keys, radii=radii, patch_size=_PATCH, normalize="both")[-1].index


def fill_smoothly(image: Tensor, hole: Tensor) -> Tensor:
    """[C, H, W] with the pixels of ``hole``, a mask of that shape, taken from its rim, smoothly (pull and push).

    Means of what is known, at half the resolution and so on, give what is unknown; at the end the mean of a channel.
    """
    known = (~hole).to(image.dtype)
    if not bool(hole.any()):
        return image
    if min(image.shape[1:]) < 2:
        count = known.sum((1, 2), keepdim=True).clamp_min(1)
        return torch.where(hole, (image * known).sum((1, 2), keepdim=True) / count, image)
    pad = (0, image.shape[2] % 2, 0, image.shape[1] % 2)
    weighted = F.avg_pool2d(F.pad((image * known)[None], pad), 2)[0]
    share = F.avg_pool2d(F.pad(known[None], pad), 2)[0]
    coarse = fill_smoothly(weighted / share.clamp_min(1e-6), share == 0)
    size = (2 * coarse.shape[1], 2 * coarse.shape[2])
    smooth = F.interpolate(coarse[None], size=size, mode="bilinear", align_corners=False)[0]
    return torch.where(hole, smooth[:, : image.shape[1], : image.shape[2]], image)


def swap_pixels(frame: Tensor, index: Tensor, share: Tensor, scale: int, tile: int = 64) -> None:
    """Blends the matched pixels into ``frame`` [C, H, W], in place, where ``share`` is positive.

    Args:
        frame: codes; uint8 and uint16 are rounded.
        index: [1, h, w] matches at 1/scale of the resolution, rounded up.
        share: [h, w] of the matched content in the result, likewise.
        scale: 1, 2 or 4.
        tile: side of the squares, in sites, that are done at a time: those without a share cost nothing.
    """
    height, width = share.shape
    original: list[tuple[slice, slice, Tensor]] = []
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            here = slice(top, min(top + tile, height)), slice(left, min(left + tile, width))
            if bool((share[here] > 0).any()):
                original.append((*_pixels(here, frame, scale), _blended_tile(frame, index, share, scale, here)))
    for rows, columns, pixels in original:
        frame[:, rows, columns] = pixels


def _pixels(here: tuple[slice, slice], frame: Tensor, scale: int) -> tuple[slice, slice]:
    rows, columns = here
    return (
        slice(rows.start * scale, min(rows.stop * scale, frame.shape[1])),
        slice(columns.start * scale, min(columns.stop * scale, frame.shape[2])),
    )


def _blended_tile(frame: Tensor, index: Tensor, share: Tensor, scale: int, here: tuple[slice, slice]) -> Tensor:
    """The pixels of one tile: those of the patches matched there and just around, blended with the frame's own."""
    (height, width), (rows, columns) = share.shape, here
    wide = (
        slice(max(0, rows.start - 2), min(height, rows.stop + 2)),
        slice(max(0, columns.start - 2), min(width, columns.stop + 2)),
    )
    matched = index[:, wide[0], wide[1]]
    y, x = matched // width, matched % width
    top, bottom = max(0, int(y.min()) - 1), min(height, int(y.max()) + 2)
    left, right = max(0, int(x.min()) - 1), min(width, int(x.max()) + 2)
    take_rows = torch.arange(top * scale, bottom * scale, device=frame.device).clamp(max=frame.shape[1] - 1)
    take_columns = torch.arange(left * scale, right * scale, device=frame.device).clamp(max=frame.shape[2] - 1)
    source = frame[:, take_rows[:, None], take_columns].float()[None]
    moved = patch_swap(source, (y - top) * (right - left) + (x - left), scale=scale)[0]
    target = _pixels(here, frame, scale)
    across, down = (rows.start - wide[0].start) * scale, (columns.start - wide[1].start) * scale
    own = frame[:, target[0], target[1]]
    moved = moved[:, across : across + own.shape[1], down : down + own.shape[2]]
    around = F.interpolate(share[wide][None, None], scale_factor=scale, mode="bilinear")[0, 0]
    alpha = around[across : across + own.shape[1], down : down + own.shape[2]]
    blended = own.float() * (1 - alpha) + moved * alpha
    return (blended if frame.is_floating_point() else blended.round()).to(frame.dtype)
