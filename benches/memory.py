"""Peak memory of one call beyond its inputs, on Linux, each contender in its own process: `python -m benches.memory`.

The rise of the process's resident high-water mark over the call, in MB, beside the size of the call's result: what is
left over is workspace.
"""

import subprocess
import sys
from pathlib import Path

import torch

CASES = {
    "deform_conv2d forward 1x64x540x960 dg1": ("deform", False, ("hdrops", "torchvision")),
    "deform_conv2d forward+backward 1x64x540x960 dg1": ("deform", True, ("hdrops", "torchvision")),
    "merge_exposures uint8 4x3x6MP": ("merge", False, ("hdrops", "OpenCV MergeDebevec")),
}


def reset_high_water() -> None:
    """Lets Linux forget the peak that making the inputs left."""
    Path("/proc/self/clear_refs").write_text("5")


def high_water_mb() -> float:
    told = Path("/proc/self/status").read_text()
    return int(told.split("VmHWM:")[1].split()[0]) / 1024


def measure(kind: str, backward: bool, contender: str) -> None:
    """Runs in the child: prints the rise and the size of the result."""
    from benches import bench_crf, bench_deform_conv2d

    if kind == "deform":
        wanted = bench_deform_conv2d.contenders((1, 64, 540, 960, 1), backward)
    else:
        wanted = bench_crf.merging(4, 2000, 3000)
    function = wanted.get(contender)
    if function is None:
        print("absent")
        return
    reset_high_water()
    before = high_water_mb()
    result = function()
    rise = high_water_mb() - before
    tensors = result if isinstance(result, tuple) else (result,)
    size = sum(getattr(t, "nbytes", 0) for t in tensors) / 2**20
    print(f"{rise:8.0f} MB, of which the result {size:6.0f} MB")


def main() -> None:
    torch.set_num_threads(1)
    for name, (kind, backward, contenders) in CASES.items():
        print(name)
        for contender in contenders:
            command = [sys.executable, "-m", "benches.memory", kind, str(int(backward)), contender]
            told = subprocess.run(command, capture_output=True, text=True)
            print(f"    {contender:22s} {told.stdout.strip() or told.stderr.strip().splitlines()[-1]}")


if __name__ == "__main__":
    if len(sys.argv) == 4:
        torch.set_num_threads(1)
        measure(sys.argv[1], sys.argv[2] == "1", sys.argv[3])
    else:
        main()
