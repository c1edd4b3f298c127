"""The drawings of ``--plot``: response curves, and where ``--deghost`` replaced what."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hdrops.io import InputError, Pixels, need

# Colours of deghost's labels, and what they mean.
LABELS = (
    (1, (39, 160, 74), "replaced: found elsewhere in the frame"),
    (2, (40, 110, 200), "filled: the reference is clipped or black"),
    (3, (208, 48, 40), "excluded from the merge"),
)
_MAP_SIDE = 1024

_CHANNELS = (("red", "#c0392b"), ("green", "#27864a"), ("blue", "#2864b4"))


class Map(NamedTuple):
    """A picture, uint8 [H, W, 3], and its title."""

    title: str
    picture: NDArray[np.uint8]


def replacement_map(reference: Pixels, label: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The reference frame [H, W, 3], grey and dimmed, under the labels [H, W] of another; made smaller if large.

    A square of pixels shows the greatest label in it, so that nothing small gets lost.
    """
    factor = -(-max(label.shape) // _MAP_SIDE)
    height, width = label.shape[0] // factor * factor, label.shape[1] // factor * factor
    label = label[:height, :width].reshape(height // factor, factor, width // factor, factor).max((1, 3))
    shown = reference[:height:factor, :width:factor].astype(np.float32)
    scale = 1.0 if reference.dtype == np.float32 else float(np.iinfo(reference.dtype).max)
    grey = shown.mean(-1) / scale
    if reference.dtype != np.uint8:  # deep and float frames may be linear: dark as they are
        grey = np.sqrt(grey)
    picture = np.repeat((40 + 130 * grey)[..., None], 3, -1)
    for value, colour, _ in LABELS:
        picture[label == value] = 0.35 * picture[label == value] + 0.65 * np.array(colour)
    return np.asarray(picture.round(), dtype=np.uint8)


def plot_response(path: Path, curve: Tensor, title: str, maps: Sequence[Map] = ()) -> None:
    """Draws an inverse response [1, C, L]: code against the exposure that gives it, in stops; and maps below it.

    Raises:
        InputError: the file cannot be written.
    """
    need("matplotlib", "--plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(maps))
    rows = math.ceil(len(maps) / columns) if maps else 0
    figure = Figure(figsize=(max(7, 5 * columns), 5 + 3.7 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    if not maps:
        _draw_curves(figure.add_subplot(), curve, title)
    else:
        parts: Any = figure.subfigures(2, 1, height_ratios=[5, 3.7 * rows])
        top, below = parts
        _draw_curves(top.add_subplot(), curve, title)
        for number, (name, picture) in enumerate(maps):
            axes = below.add_subplot(rows, columns, number + 1)
            axes.imshow(picture)
            axes.set_title(_drawable(name), fontsize=9, parse_math=False)
            axes.set_axis_off()
        _explain_labels(below)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error


def _drawable(text: str) -> str:
    """Names of files need not be UTF-8, and fonts take nothing else."""
    return text.encode(errors="backslashreplace").decode()


def _explain_labels(figure: Any) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=f"#{bytes(colour).hex()}", label=meaning) for _, colour, meaning in LABELS]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(LABELS), fontsize=8)


def _draw_curves(axes: Any, curve: Tensor, title: str) -> None:
    values = curve[0].double().cpu().numpy()
    codes = np.linspace(0, 255, values.shape[-1])
    for (name, colour), channel in zip(
        _CHANNELS if len(values) == 3 else (("all channels", "black"),), values, strict=True
    ):
        shown = channel > 0
        axes.plot(np.log2(channel[shown]), codes[shown], color=colour, label=name)
    axes.set_xlabel("exposure relative to the middle code (stops)")
    axes.set_ylabel("code, of 255")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
