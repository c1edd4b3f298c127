"""How well ghosts go: `hdrops merge --deghost` beside the plain merge and OpenCV's AlignMTB + MergeDebevec.

    python -m benches.deghost                              # invented scenes, whose truth is known: a table
    python -m benches.deghost --pictures docs/images       # and pictures of the first: before, after, what was replaced
    python -m benches.deghost A.JPG B.JPG C.JPG -o x.png   # photographs, times from EXIF: the three merges side by side

Every contender recovers the response from the frames it merges. PSNR-mu (mu = 5000) is taken over the truth's maximum;
each result is scaled by the median of its ratio to the truth where nothing moves, channel by channel. "no motion" is the
plain merge of the same scene standing still: what noise, clipping and the recovered response leave.
"""

import argparse
import math
from pathlib import Path

import cv2
import numpy as np
import torch

import hdrops
from hdrops import _exposures, _moving_scene
from hdrops._moving_scene import TIMES
from hdrops._plot import replacement_map
from hdrops._tonemap_command import shrink, to_display
from hdrops.camera import deghost, estimate_crf
from hdrops.io import Pixels, read_image, write_image

SEEDS = (0, 1, 2, 3)


def plain(frames: Pixels, times: list[float]) -> Pixels:
    """The merge of `hdrops merge`, [H, W, 3]."""
    stack, log_times, curve = prepared(frames, times)
    return interleaved(hdrops.merge_exposures(stack, log_times, curve))


def without_ghosts(frames: Pixels, times: list[float]) -> tuple[Pixels, Pixels]:
    """That of `hdrops merge --deghost`; and its map of what was replaced, one frame's below the other's."""
    stack, log_times, curve = prepared(frames, times)
    found = deghost(stack, log_times, curve)
    (reference,) = found.reference
    labels = [found.label[0, frame].numpy() for frame in np.argsort(times) if frame != reference]
    maps = np.concatenate([replacement_map(frames[reference], label) for label in labels])
    return interleaved(hdrops.merge_exposures(found.stack, log_times, curve, mask=found.weight)), maps


def opencv(frames: Pixels, times: list[float]) -> Pixels:
    """AlignMTB, CalibrateDebevec with 300 samples, MergeDebevec."""
    images = [np.ascontiguousarray(frame[..., ::-1]) for frame in frames]
    cv2.createAlignMTB().process(images, images)
    seconds = np.array(times, np.float32)
    curve = cv2.createCalibrateDebevec(samples=300).process(images, seconds)
    return np.ascontiguousarray(cv2.createMergeDebevec().process(images, seconds, curve)[..., ::-1])


def prepared(frames: Pixels, times: list[float]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    stack = torch.from_numpy(frames).permute(0, 3, 1, 2)[None]
    log_times = torch.tensor([times]).log()
    return stack, log_times, estimate_crf(stack, log_times)


def interleaved(radiance: torch.Tensor) -> Pixels:
    return radiance[0].permute(1, 2, 0).contiguous().numpy()


def psnr_mu(radiance: Pixels, truth: Pixels, still: np.ndarray, where: np.ndarray) -> float:
    scale = np.median((radiance / truth)[still], 0)
    peak = truth.max()
    compressed = [np.log1p(5000 * (image / peak).clip(0, 1)) / np.log(5001) for image in (radiance / scale, truth)]
    return -10 * math.log10(float(np.square(compressed[0] - compressed[1])[where].mean()))


def measure(seeds: tuple[int, ...]) -> None:
    names = ("plain merge", "OpenCV MTB + Debevec", "--deghost", "no motion")
    print("| scene | moving |", " | ".join(f"{name}: moving / all" for name in names), "|")
    print("|---|---|", "---|" * len(names), sep="")
    rows = []
    for seed in seeds:
        scene = _moving_scene.moving_scene(seed)
        truth, everywhere = scene.radiance[1], np.ones_like(scene.moving)
        frames, times = _moving_scene.photograph(scene.radiance, seed=seed), list(TIMES)
        standing = _moving_scene.photograph(np.repeat(scene.radiance[1:2], len(times), 0), seed=seed)
        results = (
            plain(frames, times),
            opencv(frames, times),
            without_ghosts(frames, times)[0],
            plain(standing, times),
        )
        row = [
            psnr_mu(result, truth, ~scene.moving, where) for result in results for where in (scene.moving, everywhere)
        ]
        rows.append(row)
        print_row(str(seed), f"{scene.moving.mean():.0%}", row)
    print_row("mean", "", list(np.mean(rows, 0)))


def print_row(name: str, moving: str, row: list[float]) -> None:
    pairs = " | ".join(f"{row[k]:.1f} / {row[k + 1]:.1f}" for k in range(0, len(row), 2))
    print(f"| {name} | {moving} | {pairs} |", flush=True)


def picture(radiance: Pixels) -> Pixels:
    return to_display(np.ascontiguousarray(shrink(radiance)), "reinhard")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="*", help="photographs with EXIF times")
    parser.add_argument("-o", "--output", default="deghost.png", help="their picture: plain, OpenCV, --deghost")
    parser.add_argument(
        "--pictures", type=Path, help="folder for deghost_before, _after and _map.jpg of the first scene"
    )
    args = parser.parse_args()
    if args.images:
        frames = np.stack([read_image(path) for path in args.images])
        times = _exposures.exif_exposures([Path(path) for path in args.images])
        results = (plain(frames, times), opencv(frames, times), without_ghosts(frames, times)[0])
        write_image(Path(args.output), np.hstack([picture(result) for result in results]))
        return
    if args.pictures:
        args.pictures.mkdir(parents=True, exist_ok=True)
        frames = _moving_scene.photograph(_moving_scene.moving_scene(SEEDS[0]).radiance, seed=SEEDS[0])
        after, maps = without_ghosts(frames, list(TIMES))
        shown = {"before": picture(plain(frames, list(TIMES))), "after": picture(after), "map": maps}
        for name, image in shown.items():
            write_image(args.pictures / f"deghost_{name}.jpg", image)
    measure(SEEDS)


if __name__ == "__main__":
    main()
