"""A bracket read from files: the frames as one stack, their exposures, and which pixels do not count.

The frames keep the layout of the files, interleaved RGB, one after the other; the stack [1, P, 3, H, W] is a view.
"""

import itertools
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hdrops import _exposures
from hdrops._align import apply_shifts, find_shifts
from hdrops.io import InputError, Pixels, need, read_exif, read_image, sniff

T = TypeVar("T")
Progress = Callable[[Iterable[T], str], Iterable[T]]

# Pixels this near to one of the mask colour do not count either: interpolation and JPEG blur its edge.
MASK_REACH = 3

_log = logging.getLogger("hdrops")


@dataclass
class Bracket:
    """Frames of one scene.

    Attributes:
        paths: the files.
        frames: [P, H, W, 3], uint8, uint16 or float32 in [0, 1].
        exposures: P seconds, positive.
        excluded: bool [P, H, W], True where a frame's pixel does not count; None if all do.
        linear: the codes are proportional to light (camera raw and float files).
    """

    paths: list[Path]
    frames: Pixels
    exposures: list[float]
    excluded: NDArray[np.bool_] | None
    linear: bool

    @property
    def stack(self) -> Tensor:
        """[1, P, 3, H, W], a view of ``frames``."""
        return torch.from_numpy(self.frames).permute(0, 3, 1, 2).unsqueeze(0)

    @property
    def log_exposures(self) -> Tensor:
        """[1, P] natural logarithms of seconds, float64."""
        return torch.tensor([self.exposures], dtype=torch.float64).log()

    @property
    def mask(self) -> Tensor | None:
        """bool [1, P, 1, H, W], True where excluded."""
        return None if self.excluded is None else torch.from_numpy(self.excluded)[None, :, None]


def read_bracket(
    images: Sequence[str | os.PathLike[str]],
    *,
    times: Sequence[float] | None = None,
    list_file: str | os.PathLike[str] | None = None,
    list_column: str | None = None,
    allow_equal: bool = False,
    mask_color: tuple[int, int, int] | None = None,
    align_frames: bool = False,
    progress: Progress[int] = lambda items, _: items,
) -> Bracket:
    """Reads photographs and finds out their exposures: ``times``, or a list file, or EXIF.

    Args:
        images: files; may be empty with a list file that names them.
        times: seconds, one for each image.
        list_file: see :mod:`hdrops._exposures`.
        list_column: what the list's number means, if its header does not say.
        allow_equal: accept frames of equal exposure.
        mask_color: RGB codes; pixels of this colour, and those around them, do not count in that frame.
        align_frames: shift the frames onto each other and crop them to what all show.
        progress: wraps the iteration over frames; gets a word on what is done.

    Raises:
        InputError: whatever is wrong, in one line that names the file.
    """
    paths = [Path(image) for image in images]
    listed = None
    if list_file is not None:
        listed = _exposures.read_list(list_file, list_column)
        if not paths and not listed.names:
            raise InputError(f"{list_file}: holds numbers without file names; give the images too")
        paths = paths or [listed.path.parent / name for name in listed.names]
        listed = listed.pick(paths)
    _check_files(paths)
    exposures: list[float] | None
    if times is not None:
        exposures = list(times)
    elif listed is None:
        exposures = _exposures.exif_exposures(paths)
    else:
        exposures = listed.exposures(listed.meaning) if listed.meaning else None
    if exposures is not None:
        _exposures.check_exposures(paths, exposures, allow_equal=allow_equal)
    frames = _read_frames(paths, progress)
    brightness = [float(frame[::4, ::4].mean()) for frame in frames]
    if exposures is None:
        assert listed is not None
        exposures = listed.exposures(_meaning_by_brightness(listed, brightness))
        _exposures.check_exposures(paths, exposures, allow_equal=allow_equal)
    elif _exposures.brighter_is_longer(exposures, brightness) < 0:
        _log.warning("the brighter images have the shorter exposures; are the times in the order of the images?")
    excluded = _excluded(paths, frames, mask_color)
    if align_frames:
        shifts = find_shifts(frames, exposures, lambda pairs: progress(pairs, "aligning"))
        for path, (x, y) in zip(paths, shifts, strict=True):
            _log.info("%s: shifted by %+d, %+d", path, x, y)
        frames = apply_shifts(frames, shifts)
        excluded = None if excluded is None else apply_shifts(excluded, shifts)
    linear = frames.dtype == np.float32 or sniff(paths[0]) == "raw"
    return Bracket(paths, frames, exposures, excluded, linear)


def _check_files(paths: Sequence[Path]) -> None:
    """At least two different image files, none twice."""
    if not paths:
        raise InputError("no images given")
    for path in paths:
        sniff(path)
    for a, b in itertools.combinations(paths, 2):
        if a.resolve() == b.resolve():
            raise InputError(f"{b}: is given twice")
    if len(paths) < 2:
        raise InputError(f"{paths[0]}: is the only frame; a bracket has at least two")
    turns = {read_exif(path).orientation for path in paths}
    if len(turns) > 1:
        _log.warning("the EXIF orientation differs between the frames; each is turned by its own")


def _read_frames(paths: Sequence[Path], progress: Progress[int]) -> Pixels:
    """[P, H, W, 3], allocated once; refuses frames that differ in size or depth and values that are no light."""
    frames: Pixels | None = None
    for index in progress(range(len(paths)), "reading"):
        path, pixels = paths[index], read_image(paths[index])
        if pixels.dtype == np.float32:
            check_float(path, pixels)
        if frames is None:
            frames = np.empty((len(paths), *pixels.shape), pixels.dtype)
        if pixels.shape != frames.shape[1:]:
            raise InputError(
                f"{path}: is {pixels.shape[1]} x {pixels.shape[0]} pixels, {paths[0]} is "
                f"{frames.shape[2]} x {frames.shape[1]}; the frames of a bracket have one size"
            )
        if pixels.dtype != frames.dtype:
            raise InputError(
                f"{path}: has {pixels.dtype} pixels, {paths[0]} has {frames.dtype}; "
                "the frames of a bracket have one depth"
            )
        frames[index] = pixels
    assert frames is not None
    return frames


def check_float(path: Path, pixels: Pixels) -> None:
    """Raises unless a float frame holds readings in [0, 1], 1 the clipped sensor."""
    bad = int((~np.isfinite(pixels)).sum())
    if bad:
        raise InputError(f"{path}: has {bad} values that are NaN or infinite")
    low, high = float(pixels.min()), float(pixels.max())
    if low < 0 or high > 1:
        raise InputError(
            f"{path}: has values from {low:.4g} to {high:.4g}; float frames must be in [0, 1], 1 being a clipped pixel"
        )


def _meaning_by_brightness(listed: _exposures.ExposureList, brightness: Sequence[float]) -> str:
    """Whether a list's unnamed number is a time or its inverse: the longer exposed images are the brighter ones."""
    sign = _exposures.brighter_is_longer(listed.values, brightness)
    if sign == 0:
        raise InputError(f"{listed.path}: does not say whether it lists times or their inverse; give --list-column")
    meaning = "exposure" if sign > 0 else "inverse"
    what = "the exposure time" if sign > 0 else "the inverse of the exposure time (as in OpenCV's list.txt)"
    _log.warning(
        "%s: its number is taken as %s, by the brightness of the images; --list-column says it", listed.path, what
    )
    return meaning


def _excluded(
    paths: Sequence[Path], frames: Pixels, mask_color: tuple[int, int, int] | None
) -> NDArray[np.bool_] | None:
    """Pixels of the mask colour and those around them: bool [P, H, W], or None where there are none."""
    if mask_color is None:
        return None
    if frames.dtype == np.float32 or max(mask_color) > np.iinfo(frames.dtype).max:
        raise InputError(
            f"--mask-color {','.join(map(str, mask_color))}: no code of {paths[0]}, which is {frames.dtype}"
        )
    cv2 = need("cv2", "--mask-color")
    size = 2 * MASK_REACH + 1
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))
    excluded = np.empty(frames.shape[:3], dtype=bool)
    for frame, mask in zip(frames, excluded, strict=True):
        masked = (frame == np.asarray(mask_color, frame.dtype)).all(-1)
        mask[:] = cv2.dilate(masked.view(np.uint8), kernel).view(bool)
    return excluded if excluded.any() else None
