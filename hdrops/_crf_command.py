"""``hdrops crf``: the camera's response curve from a bracket; and what ``hdrops merge`` shares with it."""

import argparse
import logging
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from hdrops import _exposures
from hdrops._bracket import Bracket, read_bracket
from hdrops._plot import plot_response
from hdrops.camera import estimate_crf, load_response, save_response
from hdrops.io import InputError, Outputs

T = TypeVar("T")

RESPONSE_SUFFIXES = (".npz", ".m", ".npy")
PLOT_SUFFIXES = (".png", ".pdf", ".svg")

_log = logging.getLogger("hdrops")


def progress(items: Iterable[T], what: str) -> Iterable[T]:
    """A progress bar on a terminal; nothing elsewhere or without tqdm."""
    if not sys.stderr.isatty():
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    bar: Iterable[T] = tqdm(items, desc=what, leave=False, file=sys.stderr)
    return bar


def add_frame_options(parser: argparse.ArgumentParser) -> None:
    """The images and what says how they were exposed."""
    parser.add_argument(
        "images", nargs="*", metavar="IMG", help="the frames, in any order; with --list they may be left out"
    )
    source = parser.add_argument_group("exposures (default: EXIF)").add_mutually_exclusive_group()
    source.add_argument("--times", metavar="T,T,...", help="exposure times in seconds, one for each image: 1/30,1/8,2")
    source.add_argument("--ev", metavar="EV,EV,...", help="relative exposures in stops, EV 0 counted as 1 s: -2,0,2")
    source.add_argument("--list", metavar="FILE", help="list of image names and exposures")
    parser.add_argument(
        "--list-column",
        choices=_exposures.MEANINGS,
        help="what the list's number is: seconds, their inverse or stops (default: by its header or layout)",
    )
    parser.add_argument("--align", action="store_true", help="shift the frames of a hand-held bracket onto each other")


def add_bracket_options(parser: argparse.ArgumentParser) -> None:
    """The same, and what says which of their pixels count."""
    add_frame_options(parser)
    parser.add_argument("--allow-equal", action="store_true", help="accept several frames of one exposure")
    parser.add_argument(
        "--mask-color", metavar="R,G,B", type=_color, help="pixels of this colour are no data in that frame: 0,0,255"
    )
    parser.add_argument(
        "--saturation", metavar="CODE", type=int, help="code at which the camera clips, if not the largest"
    )


def add_recovery_options(parser: argparse.ArgumentParser) -> None:
    """How a response curve is recovered."""
    parser.add_argument("--samples", type=int, default=16000, help="pixels the curve is recovered from (default 16000)")
    parser.add_argument("--smoothness", type=float, help="of the curve (default: 20 sqrt(samples / 150))")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of samples (default 0)")
    parser.add_argument("--plot", metavar="FILE", help=f"draw the response curves ({', '.join(PLOT_SUFFIXES)})")


def read(args: argparse.Namespace) -> Bracket:
    """The bracket that the options of :func:`add_bracket_options` describe."""
    times = None
    if args.times is not None:
        times = _exposures.parse_times(args.times)
    elif args.ev is not None:
        times = _exposures.parse_evs(args.ev)
    bracket: Bracket = read_bracket(
        args.images,
        times=times,
        list_file=args.list,
        list_column=args.list_column,
        allow_equal=args.allow_equal,
        mask_color=args.mask_color,
        align_frames=args.align,
        progress=progress,
    )
    if args.saturation is not None:
        largest = largest_code(bracket)
        if largest == 1:
            raise InputError(
                f"--saturation {args.saturation}: is for integer images, {bracket.paths[0]} is a float image"
            )
        if not 0 < args.saturation <= largest:
            raise InputError(f"--saturation {args.saturation}: must lie in 1..{largest} for {bracket.paths[0]}")
    for path, exposure in zip(bracket.paths, bracket.exposures, strict=True):
        _log.info("%s: %s", path, _exposures.in_words(exposure))
    return bracket


def inputs(args: argparse.Namespace) -> list[Path]:
    """The files the options name for reading, those named by a list file included."""
    named = [Path(image) for image in args.images]
    if args.list is not None:
        named.append(Path(args.list))
        if not args.images:
            named += [Path(args.list).parent / name for name in _exposures.read_list(args.list, args.list_column).names]
    return named


def largest_code(bracket: Bracket) -> int:
    """The code of a clipped pixel: 1 for float frames."""
    return 1 if bracket.frames.dtype == np.float32 else int(np.iinfo(bracket.frames.dtype).max)


def recover(bracket: Bracket, method: str, args: argparse.Namespace) -> Tensor:
    """The inverse response [1, 3, 256] of the camera that took the bracket."""
    mask = bracket.mask
    if args.saturation is not None:
        clipped = torch.from_numpy((bracket.frames >= args.saturation).any(-1))[None, :, None]
        mask = clipped if mask is None else mask | clipped
    named = f"{bracket.paths[0]} ... {bracket.paths[-1]}"
    try:
        curve = estimate_crf(
            bracket.stack,
            bracket.log_exposures,
            method=method,
            samples=args.samples,
            smoothness=args.smoothness,
            mask=mask,
            seed=args.seed,
        )
    except ValueError as error:
        raise InputError(f"{named}: no response recovered: {error}") from error
    if not bool((curve[..., 224] > curve[..., 32]).all()):
        raise InputError(
            f"{named}: no response recovered: the exposures contradict the images, or they show too little"
        )
    return curve


def load(path: str) -> Tensor:
    """A stored inverse response [1, C, L]."""
    try:
        curve = load_response(path)
    except (OSError, ValueError) as error:
        raise InputError(str(error).removeprefix("load_response: ")) from error
    curve = curve.reshape(1, -1, curve.shape[-1]) if curve.dim() < 3 else curve
    if curve.shape[0] != 1 or curve.shape[1] not in (1, 3):
        raise InputError(
            f"{path}: holds curves of shape {list(curve.shape)}; 1 or 3 channels of one camera were expected"
        )
    return curve


def save(path: Path, curve: Tensor) -> None:
    """Stores an inverse response."""
    try:
        save_response(path, curve)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error


def run(args: argparse.Namespace) -> None:
    """Recovers, stores and draws the curve."""
    with Outputs(inputs(args)) as outputs:
        target = outputs.add(args.output, RESPONSE_SUFFIXES)
        drawing = outputs.add(args.plot, PLOT_SUFFIXES) if args.plot else None
        bracket = read(args)
        curve = recover(bracket, args.method, args)
        save(target, curve)
        if drawing is not None:
            plot_response(drawing, curve, f"{args.method} response of {len(bracket.paths)} frames")
    stops = torch.log2(curve[0, :, -16] / curve[0, :, 16]).mean()
    print(
        f"{args.output}: {args.method} response of {len(bracket.paths)} frames, {stops:.1f} stops from code 16 to 240"
    )


def _color(text: str) -> tuple[int, int, int]:
    if not re.fullmatch(r"\d{1,5},\d{1,5},\d{1,5}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form R,G,B")
    red, green, blue = map(int, text.split(","))
    return red, green, blue
