"""``hdrops merge``: a bracket of photographs to an HDR image, a preview and, if wanted, a drawing of what was found.

Radiance is in units of "middle code in one second": 1 where an exposure of one second would give the middle code of the
response curve (with a linear response: where it would just clip). Times scaled by k scale it by 1/k.
"""

import argparse
import dataclasses
import logging
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hdrops import merge_exposures
from hdrops._bracket import Bracket
from hdrops._crf_command import (
    PLOT_SUFFIXES,
    RESPONSE_SUFFIXES,
    inputs,
    largest_code,
    load,
    progress,
    read,
    recover,
    save,
)
from hdrops._plot import Map, plot_response, replacement_map
from hdrops._tonemap_command import shrink, to_display
from hdrops.camera import Deghosted, deghost
from hdrops.camera.calibration import METHODS
from hdrops.io import PICTURE_SUFFIXES, RADIANCE_SUFFIXES, InputError, Outputs, Pixels, write_image

# Pixels merged at a time: bounds the memory beside input and output, and is plenty for all threads.
_TILE = 1 << 18
# With --deghost the response is recovered once more without what moved, from about so many pixels of each frame, unless
# all but this share of one moved.
_RECOVERY_PIXELS = 1 << 18
_LEAST_STILL = 0.1

_log = logging.getLogger("hdrops")


def run(args: argparse.Namespace) -> None:
    """Does what ``hdrops merge`` was asked to."""
    start = time.perf_counter()
    if args.reference is not None and not args.deghost:
        raise InputError(f"--reference {args.reference}: is for --deghost")
    device = device_of(args.device)
    sources = inputs(args)
    method, stored = _response_source(args)
    if stored is not None:
        sources.append(Path(args.response))
    targets: dict[str, tuple[str, tuple[str, ...]]] = {"image": (args.output, RADIANCE_SUFFIXES)}
    if args.preview:
        targets["preview"] = (args.preview, PICTURE_SUFFIXES)
    elif not args.no_preview:
        targets["preview"] = (preview_beside(args.output), PICTURE_SUFFIXES)
    if args.plot:
        targets["plot"] = (args.plot, PLOT_SUFFIXES)
    if args.save_response:
        targets["response"] = (args.save_response, RESPONSE_SUFFIXES)
    with Outputs(sources) as outputs:
        temporary = {kind: outputs.add(path, suffixes) for kind, (path, suffixes) in targets.items()}
        bracket = read(args)
        if args.reference is not None and not 1 <= args.reference <= len(bracket.paths):
            raise InputError(f"--reference {args.reference}: must be the number of a frame, 1..{len(bracket.paths)}")
        method = method or ("linear" if bracket.linear else "debevec")
        curve = stored if method == "file" else None if method == "linear" else recover(bracket, method, args)
        maps: list[Map] = []
        still, report = bracket.mask, None
        if args.deghost:
            if method in METHODS:
                curve = _recover_from_still(bracket, curve, method, args)
            ghosts = _deghost(bracket, curve, args, inplace=True)
            still, report = ghosts.weight, _replaced(bracket, ghosts)
            maps = _maps(bracket, ghosts) if "plot" in temporary else []
            del ghosts
        if "response" in temporary:
            if curve is None:
                raise InputError(f"{args.save_response}: no response to save; it is linear")
            save(temporary["response"], curve)
        if "plot" in temporary:
            shown = torch.linspace(0, 2, 256).expand(1, 1, -1) if curve is None else curve
            plot_response(temporary["plot"], shown, f"{method} response", maps)
        frames, span = len(bracket.paths), math.log2(max(bracket.exposures) / min(bracket.exposures))
        radiance = merge(bracket, curve, weight=_weight(args, bracket), mask=still, device=device)
        del bracket, still
        write_image(temporary["image"], radiance)
        if "preview" in temporary:
            write_image(temporary["preview"], to_display(shrink(radiance), args.tonemap))
    written = ", ".join(f"{path} ({size_in_words(path)})" for path, _ in targets.values())
    seconds = time.perf_counter() - start
    if report is not None:
        print(report)
    print(
        f"{radiance.shape[1]} x {radiance.shape[0]}, {frames} frames over {span:.1f} EV, {method} response, "
        f"dynamic range {dynamic_range(radiance):.1f} stops (p0.1 to p99.9); wrote {written} in {seconds:.1f} s"
    )


def merge(
    bracket: Bracket, curve: Tensor | None, *, weight: str | Tensor, mask: Tensor | None, device: torch.device
) -> Pixels:
    """Radiance float32 [H, W, 3], merged a strip of rows at a time.

    Args:
        bracket: the frames.
        curve: inverse response [1, C, L]; None for a linear one.
        weight: see :func:`hdrops.merge_exposures`.
        mask: likewise, for the whole stack.
        device: where the strips are merged.
    """
    stack = bracket.stack
    height, width = stack.shape[-2:]
    log_exposures = bracket.log_exposures.float().to(device)
    curve = None if curve is None else curve.float().to(device)
    weight = weight if isinstance(weight, str) else weight.to(device)
    radiance = torch.empty(height, width, 3)
    rows = max(1, _TILE // width)
    for top in progress(range(0, height, rows), "merging"):
        strip = np.s_[..., top : top + rows, :]
        excluded = None if mask is None else mask[strip].to(device)
        merged = merge_exposures(stack[strip].to(device), log_exposures, curve, weight=weight, mask=excluded)
        if not bool(merged.isfinite().all()):
            raise RuntimeError("merge_exposures gave values that are not finite")
        radiance[top : top + rows] = merged[0].permute(1, 2, 0)
    return radiance.numpy()


def dynamic_range(radiance: Pixels) -> float:
    """Stops between the 0.1th and the 99.9th percentile of luminance."""
    step = max(1, math.isqrt(radiance.shape[0] * radiance.shape[1] >> 20))
    light = radiance[::step, ::step] @ np.array([0.2126, 0.7152, 0.0722], np.float32)
    low, high = np.percentile(light, (0.1, 99.9))
    return float(np.log2(high / low))


def _deghost(bracket: Bracket, curve: Tensor | None, args: argparse.Namespace, *, inplace: bool) -> Deghosted:
    """See :func:`hdrops.camera.deghost`."""
    return deghost(
        bracket.stack,
        bracket.log_exposures,
        curve,
        reference=None if args.reference is None else args.reference - 1,
        mask=bracket.mask,
        saturation=1.0 if args.saturation is None else args.saturation / largest_code(bracket),
        inplace=inplace,
    )


def _recover_from_still(bracket: Bracket, curve: Tensor | None, method: str, args: argparse.Namespace) -> Tensor | None:
    """The response from what does not move: pixels that show different things in each frame mislead its recovery."""
    step = math.isqrt((bracket.frames[0, ..., 0].size - 1) // _RECOVERY_PIXELS) + 1
    frames = np.ascontiguousarray(bracket.frames[:, ::step, ::step])
    excluded = None if bracket.excluded is None else np.ascontiguousarray(bracket.excluded[:, ::step, ::step])
    few = dataclasses.replace(bracket, frames=frames, excluded=excluded)
    moved = (_deghost(few, curve, args, inplace=False).label[0] != 0).numpy()
    if not moved.any():
        return curve
    if moved.mean((1, 2)).max() > 1 - _LEAST_STILL:
        _log.warning("nearly all of a frame seems to have moved: the response is recovered from moving things too")
        return curve
    return recover(dataclasses.replace(few, excluded=moved if excluded is None else excluded | moved), method, args)


def _shares(ghosts: Deghosted, frame: int) -> str:
    label = ghosts.label[0, frame]
    excluded = float((label == 3).float().mean())
    replaced = float((label > 0).float().mean()) - excluded
    return f"{100 * replaced:.1f} % replaced, {100 * excluded:.1f} % excluded"


def _replaced(bracket: Bracket, ghosts: Deghosted) -> str:
    """The line that says what --deghost did."""
    (reference,) = ghosts.reference
    others = [frame for frame in range(len(bracket.paths)) if frame != reference]
    told = "; ".join(f"{bracket.paths[frame].name} {_shares(ghosts, frame)}" for frame in others)
    return f"deghosted to {bracket.paths[reference].name}: {told}"


def _maps(bracket: Bracket, ghosts: Deghosted) -> list[Map]:
    """One for each frame but the reference, from the shortest to the longest."""
    (reference,) = ghosts.reference
    others = [frame for frame in range(len(bracket.paths)) if frame != reference]
    return [
        Map(
            f"{bracket.paths[frame].name} against {bracket.paths[reference].name}\n{_shares(ghosts, frame)}",
            replacement_map(bracket.frames[reference], ghosts.label[0, frame].numpy()),
        )
        for frame in sorted(others, key=lambda frame: bracket.exposures[frame])
    ]


def _response_source(args: argparse.Namespace) -> tuple[str | None, Tensor | None]:
    """Which response: a method's name, "linear", "file" with the stored curve, or None: by the kind of the images."""
    if args.response is None or args.response == "linear" or args.response in METHODS:
        return args.response, None
    if Path(args.response).suffix not in RESPONSE_SUFFIXES:
        known = ", ".join((*METHODS, "linear"))
        raise InputError(f"--response {args.response}: is neither {known} nor a file ({', '.join(RESPONSE_SUFFIXES)})")
    return "file", load(args.response)


def _weight(args: argparse.Namespace, bracket: Bracket) -> str | Tensor:
    """The named weight; with --saturation its table, squeezed to end at that code."""
    if args.saturation is None:
        return str(args.weight)
    code = torch.arange(largest_code(bracket) + 1) / args.saturation
    inside = (code < 1).float()
    return inside if args.weight == "uniform" else 2 * torch.minimum(code, 1 - code).clamp_min(0)


def device_of(name: str) -> torch.device:
    """The device that ``--device`` names, which must be there."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type == "meta":
        raise InputError("--device meta: holds no pixels")
    return device


def preview_beside(output: str) -> str:
    """The name of the preview where none is given."""
    return f"{os.path.splitext(output)[0]}_preview.png"


def size_in_words(path: str) -> str:
    """The size of a file, as told to people."""
    size = os.path.getsize(path)
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
