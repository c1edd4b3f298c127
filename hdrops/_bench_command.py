"""``hdrops bench``: every operator against the same mathematics in plain PyTorch, on this machine.

The two take turns, so that a machine that slows down slows both; each time is the best of the rounds.
"""

import argparse
import re
import time
from collections.abc import Callable

import torch

from hdrops._load import simd_level
from hdrops._operator_cases import Case, cases


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=positive, default=5, help="turns of each (default 5)")
    parser.add_argument("--size", type=_size, default=(540, 960), metavar="HxW", help="of a frame (default 540x960)")


def positive(text: str) -> int:
    """A positive whole number from the command line."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)[xX](\d+)", text)
    # A quarter of a side, the size of the features, must hold a 3 x 3 kernel.
    if found is None or min(map(int, found.groups())) < 12:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form HxW, both at least 12")
    return int(found[1]), int(found[2])


def run(args: argparse.Namespace) -> None:
    """Prints the table."""
    height, width = args.size
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {simd_level()}; best of {args.rounds}, ms")
    print(f"{'':16} {'forward':>29} {'forward + backward':>29}")
    print(f"{'operator':16} {'hdrops':>9} {'PyTorch':>9} {'ratio':>9} {'hdrops':>9} {'PyTorch':>9} {'ratio':>9}  input")
    for case in cases(height, width):
        cells = []
        for step in (_forward, _forward_backward):
            ours, plain = _best(step, case, args.rounds)
            cells.append(f"{ours * 1e3:9.1f} {plain * 1e3:9.1f} {plain / ours:8.1f}x")
        print(f"{case.operator:16} {' '.join(cells)}  {case.size}", flush=True)


def _forward(case: Case, backend: str | None) -> None:
    with torch.no_grad():
        case.call(backend)


def _forward_backward(case: Case, backend: str | None) -> None:
    case.backward(case.call(backend))


def _best(step: Callable[[Case, str | None], None], case: Case, rounds: int) -> tuple[float, float]:
    """Seconds of the operator and of the reference, taking turns after one call each to warm up."""
    best: dict[str | None, float] = {None: float("inf"), "reference": float("inf")}
    for turn in range(rounds + 1):
        for backend in best:
            start = time.perf_counter()
            step(case, backend)
            if turn > 0:
                best[backend] = min(best[backend], time.perf_counter() - start)
    return best[None], best["reference"]
