"""Peak memory of one call beyond its inputs, on Linux, each contender in its own process: `python -m benches.memory`.

The rise of the process's resident high-water mark over the call, in MB, beside the size of the call's result: what is
left over is workspace. Names on the command line pick cases of the benchmarks by a part of their name.
"""

import argparse
import ctypes
import subprocess
import sys
from pathlib import Path

import torch

from benches.registry import Case, cases

# Cases of the registry by name, one line each in the report.
REPORTED = (
    "deform_conv2d forward float32 S6 1x64 540x960 dg8",
    "deform_conv2d forward+backward float32 S2 1x64 256x256 dg1",
    "patch_match forward float32 P4 1x64 256x256 r3",
    "patch_match forward float32 P5 1x64 256x256 r10",
    "patch_swap forward+backward float32 1x64 256x256, matches within radius 10",
    "global_context add forward float32 G1 1x64 540x960",
    "global_context add forward+backward float32 G1 1x64 540x960",
    "crf_lookup forward+backward 3x1080p 1024",
    "merge_exposures uint8 4x3x6MP",
)


def reset_high_water() -> None:
    """Gives what is free back to Linux, and lets it forget the peak that making the inputs left."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def high_water_mb() -> float:
    told = Path("/proc/self/status").read_text()
    return int(told.split("VmHWM:")[1].split()[0]) / 1024


def measure(case: Case, contender: str) -> str:
    """Runs in the child."""
    function = case.build()[contender]
    reset_high_water()
    before = high_water_mb()
    result = function()
    rise = high_water_mb() - before
    tensors = result if isinstance(result, tuple) else (result,)
    size = sum(getattr(t, "nbytes", 0) for t in tensors) / 2**20
    return f"{rise:8.0f} MB, of which the result {size:6.0f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benches.memory", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="TEXT", help="cases whose name contains it; default: a selection")
    parser.add_argument("--child", nargs=2, metavar=("CASE", "CONTENDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = {case.name: case for case in cases()}
    if options.child:
        print(measure(known[options.child[0]], options.child[1]))
        return
    chosen = [name for name in known if any(text in name for text in options.names)] if options.names else REPORTED
    for name in chosen:
        print(name)
        for contender in known[name].build():
            command = [sys.executable, "-m", "benches.memory", "--child", name, contender]
            told = subprocess.run(command, capture_output=True, text=True)
            print(f"    {contender:22s} {told.stdout.strip() or told.stderr.strip().splitlines()[-1]}", flush=True)


if __name__ == "__main__":
    main()
