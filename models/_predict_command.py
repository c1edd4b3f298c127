"""``hdrops predict``: an HDR image from photographs by one of the systems.

The frames become codes in [0, 1]; of raw and float images, which are linear, the 2.2th root is taken, because the
systems expect what cameras write. Weights come from a file of ``torch.save(model.state_dict())``; without one the
system runs untrained, which shows that it runs and nothing else, and a warning says so.
"""

import argparse
import ast
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hdrops import _crf_command, models
from hdrops._bracket import check_float
from hdrops._merge_command import device_of, dynamic_range, preview_beside, size_in_words
from hdrops._tonemap_command import OPERATORS, shrink, to_display
from hdrops.io import PICTURE_SUFFIXES, RADIANCE_SUFFIXES, InputError, Outputs, Pixels, read_image, sniff, write_image
from hdrops.models._weights import load_state, read_state

_GAMMA = 2.2

_log = logging.getLogger("hdrops")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``hdrops predict``."""
    _crf_command.add_frame_options(parser)
    parser.add_argument("--model", required=True, choices=models.names(), help="which system")
    parser.add_argument("--weights", metavar="FILE", help="its trained state dict (default: untrained, with a warning)")
    parser.add_argument(
        "--config",
        metavar="NAME=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="options of the system: variant=hss scales=2",
    )
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="HDR image: .exr, .hdr, .tif, .tiff")
    parser.add_argument("--device", default="cpu", help="where to compute: cpu (default), cuda, ...")
    parser.add_argument("--preview", metavar="FILE", help="tone-mapped picture (default: OUTPUT_preview.png)")
    parser.add_argument("--no-preview", action="store_true", help="write no preview")
    parser.add_argument("--tonemap", choices=tuple(OPERATORS), default="reinhard", help="of the preview")
    # The system itself refuses equal exposures.
    parser.set_defaults(mask_color=None, saturation=None, allow_equal=True)


def run(args: argparse.Namespace) -> None:
    """Does what ``hdrops predict`` was asked to."""
    start = time.perf_counter()
    device = device_of(args.device)
    sources = _crf_command.inputs(args)
    if args.weights is not None:
        sources.append(Path(args.weights))
    targets: dict[str, tuple[str, tuple[str, ...]]] = {"image": (args.output, RADIANCE_SUFFIXES)}
    if not args.no_preview:
        targets["preview"] = (args.preview or preview_beside(args.output), PICTURE_SUFFIXES)
    with Outputs(sources) as outputs:
        temporary = {kind: outputs.add(path, suffixes) for kind, (path, suffixes) in targets.items()}
        images, exposures = _frames(args, models.system(args.model).frames)
        model = _model(args).to(device).eval()
        with torch.inference_mode():
            radiance = _predict(model, images.to(device), exposures)
        write_image(temporary["image"], radiance)
        if "preview" in temporary:
            write_image(temporary["preview"], to_display(shrink(radiance), args.tonemap))
    written = ", ".join(f"{path} ({size_in_words(path)})" for path, _ in targets.values())
    print(
        f"{radiance.shape[1]} x {radiance.shape[0]}, {args.model} from {model.frames} "
        f"{'frame' if model.frames == 1 else 'frames'}, dynamic range {dynamic_range(radiance):.1f} stops "
        f"(p0.1 to p99.9); wrote {written} in {time.perf_counter() - start:.1f} s"
    )


def load_weights(model: torch.nn.Module, path: str) -> None:
    """Loads a state dict, also one that stands under "model" in a file with more.

    Raises:
        InputError: the file cannot be read, or holds no state dict of this model.
    """
    try:
        load_state("--weights", model, read_state("--weights", path), path)
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from error


def _config(words: Sequence[str]) -> dict[str, object]:
    """The options of ``--config``: Python's literals, and words for what is none."""
    config: dict[str, object] = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not sign or not name:
            raise InputError(f"--config {word}: is not of the form NAME=VALUE")
        if name in config:
            raise InputError(f"--config {word}: {name} is given twice")
        try:
            config[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # all that it raises
            config[name] = value
    return config


def _model(args: argparse.Namespace) -> models.System:
    config = _config(args.config)
    torch.manual_seed(0)  # an untrained system is the same in every run
    try:
        model = models.create(args.model, **config)
    except (ValueError, TypeError, OSError) as error:
        raise InputError(f"--config: {error}") from error
    if args.weights is None:
        _log.warning("%s is untrained: the image shows that it runs, not what it can do; give --weights", args.model)
    else:
        load_weights(model, args.weights)
    return model


def _frames(args: argparse.Namespace, frames: int) -> tuple[Tensor, Tensor | None]:
    """Codes [1, frames, 3, H, W] in [0, 1] and the logarithms of the exposures, None for a system of one frame."""
    if frames > 1:
        if args.images:  # before any is read; a list may name them instead
            _check_count(args, len(args.images), frames)
        bracket = _crf_command.read(args)
        _check_count(args, len(bracket.paths), frames)
        return _codes(bracket.frames, bracket.linear).movedim(-1, 1)[None], bracket.log_exposures[0]
    for option in ("times", "ev", "list", "list_column", "align"):
        if getattr(args, option):
            raise InputError(f"--{option.replace('_', '-')}: is for brackets; --model {args.model} takes one image")
    _check_count(args, len(args.images), frames)
    pixels = read_image(args.images[0])
    if pixels.dtype == np.float32:
        check_float(Path(args.images[0]), pixels)
    linear = pixels.dtype == np.float32 or sniff(args.images[0]) == "raw"
    return _codes(np.ascontiguousarray(pixels), linear).movedim(-1, 0)[None, None], None


def _check_count(args: argparse.Namespace, found: int, frames: int) -> None:
    if found != frames:
        takes = "one image" if frames == 1 else f"{frames} frames"
        raise InputError(f"--model {args.model}: takes {takes}, got {found}")


def _codes(pixels: Pixels, linear: bool) -> Tensor:
    largest = 1 if pixels.dtype == np.float32 else int(np.iinfo(pixels.dtype).max)
    codes = torch.from_numpy(pixels.astype(np.float32)).div_(largest)
    return codes.pow_(1 / _GAMMA) if linear else codes


def _predict(model: models.System, images: Tensor, exposures: Tensor | None) -> Pixels:
    """Radiance float32 [H, W, 3]; not finite or below zero is an error of the weights, which the message says."""
    try:
        radiance = model.predict(images, exposures)[0].permute(1, 2, 0).float().cpu().contiguous()
    except ValueError as error:
        raise InputError(str(error)) from error
    except RuntimeError as error:
        # Of a GPU its own kind, of the CPU none but by its words.
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            size = f"{images.shape[-1]} x {images.shape[-2]}"
            raise InputError(f"{model.name}: {images.device} has too little memory for images of {size}") from error
        raise
    if not bool(radiance.isfinite().all()):
        raise InputError(f"{model.name}: gave values that are not finite; its weights may be damaged")
    return radiance.clamp_min_(0).numpy()
