"""The ``hdrops`` command: arguments, messages and exit codes. What a command does is in ``_<command>_command.py``.

Exit code 0: done; 2: something given cannot be used, told in one line on stderr; 130: interrupted; 143: terminated. An
error of hdrops itself shows its traceback, exit code 1.
"""

import argparse
import io
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType

import torch

import hdrops
from hdrops import _bench_command, _config, _crf_command, _merge_command, _tonemap_command
from hdrops._bench_command import positive
from hdrops.camera.calibration import METHODS
from hdrops.io import InputError


def build_parser(
    more: "Callable[[argparse._SubParsersAction[argparse.ArgumentParser]], None] | None" = None,
) -> argparse.ArgumentParser:
    """The parser of all commands; ``more`` adds those of other packages."""
    parser = argparse.ArgumentParser(
        prog="hdrops", description="HDR images from brackets of photographs.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"hdrops {hdrops.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_commands(commands)
    if more is not None:
        more(commands)
    return parser


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds merge, crf, tonemap, info and bench."""
    merge = add_command(commands, "merge", _merge_command.run, "merge a bracket of photographs into an HDR image")
    _crf_command.add_bracket_options(merge)
    merge.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="HDR image to write: .exr, .hdr, .tif, .tiff"
    )
    merge.add_argument(
        "--response",
        metavar="|".join((*METHODS, "linear", "FILE")),
        help="the camera's response: recovered from the bracket, linear, or read from a file (.npz, .m, .npy); "
        "default: debevec, linear for raw and float images",
    )
    merge.add_argument("--save-response", metavar="FILE", help="store the response for later: .npz, .m, .npy")
    _crf_command.add_recovery_options(merge)
    merge.add_argument(
        "--weight", choices=("hat", "debevec", "uniform"), default="hat", help="trust in a code (default hat)"
    )
    merge.add_argument(
        "--deghost", action="store_true", help="replace or leave out what moved between the frames; --plot shows what"
    )
    merge.add_argument(
        "--reference",
        metavar="N",
        type=int,
        help="the frame, from 1, that says where moving things are (default: the best exposed one)",
    )
    merge.add_argument("--device", default="cpu", help="where to merge: cpu (default), cuda, ...")
    merge.add_argument("--preview", metavar="FILE", help="tone-mapped picture (default: OUTPUT_preview.png)")
    merge.add_argument("--no-preview", action="store_true", help="write no preview")
    merge.add_argument(
        "--tonemap",
        choices=tuple(_tonemap_command.OPERATORS),
        default="reinhard",
        help="of the preview (default reinhard)",
    )

    crf = add_command(commands, "crf", _crf_command.run, "recover a camera's response curve from a bracket")
    _crf_command.add_bracket_options(crf)
    crf.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="response to write: .npz, .m (pfstools), .npy (OpenCV)"
    )
    crf.add_argument("--method", choices=METHODS, default="debevec", help="default debevec")
    _crf_command.add_recovery_options(crf)

    tonemap = add_command(
        commands, "tonemap", _tonemap_command.run, "make an HDR image a picture for an ordinary display"
    )
    tonemap.add_argument("image", metavar="HDR", help="HDR image: .exr, .hdr or float .tif")
    tonemap.add_argument("-o", "--output", required=True, metavar="FILE", help="picture to write: .png, .jpg")
    tonemap.add_argument(
        "--tonemap", choices=tuple(_tonemap_command.OPERATORS), default="reinhard", help="default reinhard"
    )

    add_command(
        commands, "info", lambda _: _config.show_config(), "what hdrops runs on, and why CUDA is or is not there"
    )

    bench = add_command(commands, "bench", _bench_command.run, "time each operator against plain PyTorch")
    _bench_command.add_options(bench)


def main(argv: Sequence[str] | None = None, build: Callable[[], argparse.ArgumentParser] = build_parser) -> int:
    """Runs the command line ``argv``; returns the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    args = build().parse_args(_keep_negative(sys.argv[1:] if argv is None else argv))
    name = f"hdrops {args.command}"
    logging.basicConfig(format=f"{name}: %(levelname)s: %(message)s", stream=sys.stderr, force=True)
    logging.addLevelName(logging.WARNING, "warning")
    logging.addLevelName(logging.INFO, "info")
    logging.getLogger("hdrops").setLevel(logging.INFO if args.verbose else logging.WARNING)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        args.run(args)
    except InputError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted, nothing written", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


def add_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Callable[[argparse.Namespace], None],
    purpose: str,
) -> argparse.ArgumentParser:
    """Adds a command with what all have; returns its parser."""
    parser = commands.add_parser(
        name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.", allow_abbrev=False
    )
    parser.set_defaults(run=run, command=name)
    parser.add_argument("--threads", type=positive, help="threads of the kernels (default: all cores)")
    parser.add_argument("-v", "--verbose", action="store_true", help="say more")
    return parser


def _keep_negative(argv: Sequence[str]) -> list[str]:
    """Binds the value to ``--ev``: argparse takes the -2 of ``--ev -2,0,2`` for an option."""
    bound: list[str] = []
    for word in argv:
        if bound and bound[-1] in ("--ev", "--times"):
            bound[-1] += f"={word}"
        else:
            bound.append(word)
    return bound


def _terminate(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
