"""Alignment of hand-held brackets: whole-pixel shifts by threshold bitmaps (Ward, "Fast, Robust Image Registration for
Compositing High Dynamic Range Photographs from Handheld Exposures", 2003).

Two frames cut at the same percentile of their codes show the same bitmap, whatever their exposure. Ward cuts at the
median; here the percentile is the one at which both frames are best exposed, since in a wide bracket the median of the
short frames is black. Pixels near the threshold do not count. The shift that makes the bitmaps differ least is found
from coarse to fine, downhill. Each frame is compared with its neighbour in exposure, and the shifts add up from
the middle exposure outwards; rotation is not corrected.

What not all frames show after the shifts is cropped.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from hdrops.io import InputError, Pixels, need

T = TypeVar("T", bound=np.generic)
Shift = tuple[int, int]
# Above the threshold or not, and whether that is certain.
Bitmap = tuple[NDArray[np.bool_], NDArray[np.bool_]]

# Shifts of up to about 2^6 pixels are found.
_LEVELS = 6
# Codes this near to the threshold do not count.
_MARGIN = 4
# A threshold nearer than this to black or white cuts noise.
_ROOM = 24

_log = logging.getLogger("hdrops")


def find_shifts(
    frames: Pixels, exposures: Sequence[float], progress: Callable[[Iterable[int]], Iterable[int]] = iter
) -> list[Shift]:
    """The shift (x, y) in pixels that brings each frame onto the middle exposure.

    Args:
        frames: [P, H, W, 3], uint8, uint16 or float32 in [0, 1].
        exposures: P seconds.
        progress: wraps the iteration over the pairs of neighbours.
    """
    order = sorted(range(len(frames)), key=lambda frame: exposures[frame])
    middle = len(order) // 2
    shifts = [(0, 0)] * len(frames)
    pairs = [(order[k - 1], order[k]) for k in range(middle + 1, len(order))]
    pairs += [(order[k + 1], order[k]) for k in range(middle - 1, -1, -1)]
    for pair in progress(range(len(pairs))):
        reference, moving = pairs[pair]
        found = shift_between(_grey(frames[reference]), _grey(frames[moving]))
        if found is None:
            _log.warning("frames %d and %d have too little in common to be aligned", reference + 1, moving + 1)
            found = (0, 0)
        shifts[moving] = (shifts[reference][0] + found[0], shifts[reference][1] + found[1])
    return shifts


def apply_shifts(images: NDArray[T], shifts: Sequence[Shift]) -> NDArray[T]:
    """Shifts images [P, H, W, ...] and crops them to what all show. The result takes the memory of ``images``."""
    right, left = max(x for x, _ in shifts), min(x for x, _ in shifts)
    down, up = max(y for _, y in shifts), min(y for _, y in shifts)
    height, width = images.shape[1] - (down - up), images.shape[2] - (right - left)
    if min(height, width) <= 0:
        raise InputError(f"--align: the frames share no area (shifts {', '.join(map(str, shifts))})")
    packed = images.reshape(-1)[: len(images) * height * width * images[0, 0, 0].size]
    packed = packed.reshape(len(images), height, width, *images.shape[3:])
    for target, source, (x, y) in zip(packed, images, shifts, strict=True):
        # A target ends before its source does, so only frames already moved are overwritten.
        target[:] = source[down - y : down - y + height, right - x : right - x + width].copy()
    return packed


def shift_between(reference: NDArray[np.uint8], moving: NDArray[np.uint8]) -> Shift | None:
    """The shift (x, y) that brings ``moving`` onto ``reference``; None where no threshold cuts both frames."""
    cut = _common_percentile(reference, moving)
    if cut is None:
        return None
    cv2 = need("cv2", "--align")
    pyramids = [[reference], [moving]]
    while len(pyramids[0]) < _LEVELS and min(pyramids[0][-1].shape) >= 32:
        for pyramid in pyramids:
            height, width = pyramid[-1].shape
            pyramid.append(cv2.resize(pyramid[-1], (width // 2, height // 2), interpolation=cv2.INTER_AREA))
    x = y = 0
    for level in range(len(pyramids[0]) - 1, -1, -1):
        bitmaps = _bitmap(pyramids[0][level], cut), _bitmap(pyramids[1][level], cut)
        x, y = _descend(bitmaps, 2 * x, 2 * y)
    return (x, y) if _disagreement(*bitmaps, x, y) < _disagreement(*bitmaps, 0, 0) else (0, 0)


def _descend(bitmaps: tuple[Bitmap, Bitmap], x: int, y: int) -> Shift:
    """The shift near (x, y) at which the bitmaps differ less than at all eight around it."""
    known: dict[Shift, float] = {}

    def cost(shift: Shift) -> tuple[float, int]:
        if shift not in known:
            known[shift] = _disagreement(*bitmaps, *shift)
        return known[shift], abs(shift[0]) + abs(shift[1])

    best = (x, y)
    while True:
        x, y = best
        best = min(((x + dx, y + dy) for dy in (-1, 0, 1) for dx in (-1, 0, 1)), key=cost)
        if best == (x, y):
            return best


def _grey(frame: Pixels) -> NDArray[np.uint8]:
    """8-bit grey of a frame; a float frame by its square root, that its shadows are not all code 0."""
    cv2 = need("cv2", "--align")
    if frame.dtype == np.uint16:
        frame = (frame >> 8).astype(np.uint8)
    elif frame.dtype == np.float32:
        frame = (np.sqrt(frame.clip(0, 1)) * 255).astype(np.uint8)
    return np.asarray(cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY))


def _common_percentile(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float | None:
    """The percentile whose codes lie farthest from black and white in both frames; the median among equals."""
    percentiles = np.linspace(5, 95, 19)
    codes = np.stack([np.percentile(frame, percentiles) for frame in (a, b)])
    room = np.minimum(codes, 255 - codes).min(0)
    best = max(range(len(percentiles)), key=lambda k: (room[k], -abs(percentiles[k] - 50)))
    return float(percentiles[best]) if room[best] >= _ROOM else None


def _bitmap(frame: NDArray[np.uint8], percentile: float) -> Bitmap:
    threshold = float(np.percentile(frame, percentile))
    return frame > threshold, (frame < threshold - _MARGIN) | (frame > threshold + _MARGIN)


def _disagreement(reference: Bitmap, moving: Bitmap, x: int, y: int) -> float:
    """Share of the certain pixels that differ where the frames overlap, ``moving`` shifted by (x, y); 1 if nowhere."""
    height, width = reference[0].shape
    if abs(x) >= width or abs(y) >= height:
        return 1.0
    here = np.s_[max(0, y) : height + min(0, y), max(0, x) : width + min(0, x)]
    there = np.s_[max(0, -y) : height + min(0, -y), max(0, -x) : width + min(0, -x)]
    certain = reference[1][here] & moving[1][there]
    differ = (reference[0][here] ^ moving[0][there]) & certain
    return int(differ.sum()) / int(certain.sum()) if certain.any() else 1.0
