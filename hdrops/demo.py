"""``python -m hdrops.demo``: merges a bracket, runs every operator forward and backward, and shows what it made.

The bracket is Debevec's Memorial Church if it is there (the folder ``HDROPS_DATA``, or ``../shared/data`` beside the
checkout), where the result is compared with Debevec's own radiance map; else one made here by :func:`make_bracket`, a
scene of known radiance photographed by a camera of known response, where it is compared with the truth. Everything is
written to ``./demo``.
"""

import os
import sys
import time
from pathlib import Path

import numpy as np

from hdrops import cli
from hdrops._operator_cases import cases
from hdrops.io import InputError, Pixels, read_image, write_image

FOLDER = Path("demo")
TIMES = (1 / 250, 1 / 60, 1 / 15, 1 / 4, 1.0)


def main() -> int:
    """Runs the demo; returns the exit code."""
    FOLDER.mkdir(exist_ok=True)
    church = _memorial_folder()
    if church is not None:
        listed, truth, options = church / "image_list.txt", church / "memorial.hdr", ["--mask-color", "0,0,255"]
    else:
        bracket = FOLDER / "bracket"
        make_bracket(bracket)
        listed, truth, options = bracket / "image_list.txt", bracket / "truth.exr", []
    output = FOLDER / "scene.exr"
    command = ["merge", "--list", str(listed), *options, "-o", str(output)]
    command += ["--plot", str(FOLDER / "response.png"), "--save-response", str(FOLDER / "response.npz")]
    print(f"$ hdrops {' '.join(command)}", flush=True)
    code = cli.main(command)
    if code:
        return code
    print(f"\nagainst {truth}:\n{_compare(read_image(output), read_image(truth))}")
    print("\neach operator, forward and backward:")
    _run_operators()
    print(f"\nlook at {FOLDER / 'scene_preview.png'} and {FOLDER / 'response.png'}")
    return 0


def make_bracket(folder: Path, height: int = 360, width: int = 540, times: tuple[float, ...] = TIMES) -> Pixels:
    """Photographs an invented room with a window, a lamp and shadows.

    Writes ``frame_0.png`` ..., 8 bit, ``image_list.txt`` with their exposure times, and the radiance, ``truth.exr``.

    Args:
        folder: where to; made if need be.
        height: of the frames.
        width: of the frames.
        times: exposure times in seconds.

    Returns:
        The radiance, float32 [H, W, 3].
    """
    folder.mkdir(parents=True, exist_ok=True)
    radiance = _room(height, width)
    lines = ["# Filename exposure 1/shutter_speed"]
    noise = np.random.default_rng(1)
    for index, seconds in enumerate(times):
        exposure = np.minimum(radiance * seconds, 1)
        codes = 255 * response(exposure) + noise.normal(0, 0.4, radiance.shape)
        write_image(folder / f"frame_{index}.png", np.rint(codes.clip(0, 255)).astype(np.uint8))
        lines.append(f"frame_{index}.png {seconds!r} {1 / seconds!r}")
    (folder / "image_list.txt").write_text("\n".join(lines) + "\n")
    write_image(folder / "truth.exr", radiance)
    return radiance


def response(exposure: Pixels) -> Pixels:
    """The invented camera: exposure in [0, 1] to code in [0, 1], a gamma of 2.2 with a soft shoulder."""
    return np.asarray(1.15 * exposure ** (1 / 2.2) / (1 + 0.15 * exposure ** (1 / 2.2)))


def _room(height: int, width: int) -> Pixels:
    """Radiance from 0.004 in the shadows to 200 in the lamp."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width] / np.array([height, width])[:, None, None]
    light = 0.3 + 3 * np.exp(-8 * ((x - 0.25) ** 2 + (y - 0.35) ** 2))
    colour = np.stack([0.55 + 0.2 * np.sin(6 * x + k) + 0.1 * np.cos(9 * y - k) for k in (0.0, 0.6, 1.1)], axis=-1)
    for _ in range(24):  # things on the floor, each of one colour
        top, left = random.uniform(0.55, 0.95), random.uniform(0, 0.95)
        thing = (abs(y - top) < random.uniform(0.02, 0.1)) & (abs(x - left) < random.uniform(0.02, 0.06))
        colour[thing] = random.uniform(0.05, 0.9, 3)
    light = np.where((x > 0.7) & (y > 0.5), light * 0.03, light)  # a shadow
    radiance = colour * light[..., None]
    window = (abs(x - 0.8) < 0.12) & (abs(y - 0.25) < 0.15)
    radiance[window] = (colour * np.array([18.0, 24.0, 34.0]) * (1.2 - y)[..., None])[window]
    lamp = (x - 0.25) ** 2 * (width / height) ** 2 + (y - 0.3) ** 2 < 0.05**2
    radiance[lamp] = (colour * np.array([220.0, 170.0, 110.0]))[lamp]
    texture = np.exp(random.normal(0, 0.06, radiance.shape))
    return np.asarray(radiance * texture, dtype=np.float32)


def _memorial_folder() -> Path | None:
    beside = [folder.parent / "shared" / "data" for folder in (Path(__file__).resolve().parents[1], Path.cwd())]
    candidates = [os.environ.get("HDROPS_DATA"), *beside]
    folders = [Path(path) / "memorial" for path in candidates if path]
    return next((folder for folder in folders if (folder / "memorial.hdr").is_file()), None)


def _compare(radiance: Pixels, truth: Pixels) -> str:
    """Correlation of the log radiances, and the typical difference once each channel's scale is taken out."""
    lines = []
    for channel, name in enumerate(("red", "green", "blue")):
        known = truth[..., channel] > 0
        a, b = np.log2(radiance[..., channel][known]), np.log2(truth[..., channel][known])
        difference = abs(a - b - np.median(a - b))
        half, most = np.percentile(difference, (50, 90))
        lines.append(
            f"  {name:5} correlation of log radiance {np.corrcoef(a, b)[0, 1]:.4f}, "
            f"difference {half:.3f} stops at half, {most:.3f} at 90 % of the pixels"
        )
    return "\n".join(lines)


def _run_operators() -> None:
    for case in cases():
        start = time.perf_counter()
        result = case.call(None)
        middle = time.perf_counter()
        case.backward(result)
        end = time.perf_counter()
        print(
            f"  {case.operator:16} {case.size} -> {list(result.shape)}: "
            f"forward {1e3 * (middle - start):.1f} ms, backward {1e3 * (end - middle):.1f} ms",
            flush=True,
        )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        print(f"hdrops.demo: {error}", file=sys.stderr)
        sys.exit(2)
