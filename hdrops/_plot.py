"""The drawing of a response curve."""

from pathlib import Path

import numpy as np
from torch import Tensor

from hdrops.io import need

_CHANNELS = (("red", "#c0392b"), ("green", "#27864a"), ("blue", "#2864b4"))


def plot_response(path: Path, curve: Tensor, title: str) -> None:
    """Draws an inverse response [1, C, L]: code against the exposure that gives it, in stops."""
    need("matplotlib", "--plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
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
    figure.savefig(path, dpi=150)
