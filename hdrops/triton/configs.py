"""Launch configurations of the Triton kernels: chosen by table, never by trial runs.

Trial runs (``triton.autotune``) would cost a user's first call seconds, differ from run to run, and work neither in a
CUDA graph nor in the interpreter. ``tests/test_triton_ahead_of_time.py`` holds each entry to its devices' shared memory
and registers.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Config:
    """Sizes of a program's tile, all powers of two of at least 16 (``tl.dot`` takes no less), and how it is compiled.

    Attributes:
        pixels: output pixels.
        channels: input channels at a time.
        outputs: output channels; in the backward kernel of the data at a time.
        warps: warps of 32 threads.
        stages: depth of the software pipeline of loads; 1 for none.
    """

    pixels: int
    channels: int
    outputs: int
    warps: int
    stages: int


# By kernel and arithmetic: 16-bit factors, float32 by TF32 or in full, float64. All take less than 64 KB of shared
# memory, which every device has, and spill no register. Small tiles of pixels suit the data's gradient, which holds
# four corners, a gradient and eight pointers for each of its elements.
_ANY = {
    ("forward", "half"): Config(64, 64, 64, 4, 2),
    ("forward", "tf32"): Config(64, 16, 64, 4, 2),
    ("forward", "float"): Config(32, 32, 64, 4, 2),
    ("forward", "double"): Config(32, 16, 32, 8, 1),
    ("backward_data", "half"): Config(32, 16, 32, 4, 1),
    ("backward_data", "tf32"): Config(32, 32, 32, 4, 2),
    ("backward_data", "float"): Config(32, 16, 32, 4, 1),
    ("backward_data", "double"): Config(32, 16, 16, 8, 1),
    ("backward_weight", "half"): Config(64, 64, 64, 4, 2),
    ("backward_weight", "tf32"): Config(32, 64, 64, 4, 2),
    ("backward_weight", "float"): Config(32, 64, 64, 4, 2),
    ("backward_weight", "double"): Config(16, 32, 32, 4, 1),
}
# Layers of more outputs than _MANY_OUTPUTS: the samples of a tile serve twice as many outputs, where shared memory and
# the matrix units allow it.
_MANY_OUTPUTS = 64
_MANY = {
    ("forward", "half"): Config(64, 64, 128, 8, 2),
}
# The interpreter's time goes by programs and steps, not by elements.
_INTERPRETER = Config(256, 64, 64, 4, 1)


def choose(kernel: str, device_class: str, arithmetic: str, channels: int, outputs: int) -> Config:
    """The configuration for a launch.

    Args:
        kernel: "forward", "backward_data" or "backward_weight".
        device_class: of ``hdrops.triton.launch.device_class``.
        arithmetic: "half", "tf32", "float" or "double".
        channels: channels that share one weight group and one offset group.
        outputs: output channels of a weight group.
    """
    key = kernel, arithmetic
    config = _ANY[key]
    if outputs > _MANY_OUTPUTS and device_class in ("sm_80", "sm_90", "sm_100"):
        config = _MANY.get(key, config)
    if device_class == "interpreter":
        config = _INTERPRETER
    return replace(config, channels=_block(channels, config.channels), outputs=_block(outputs, config.outputs))


def _block(size: int, most: int) -> int:
    """The smallest block that holds ``size``, or ``most``."""
    return min(most, max(16, 1 << (size - 1).bit_length()))


def tile_shape(pixels: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of a tile of that many pixels on an image: at most 16 columns, less where the image is smaller.

    A tile that is not flat reads fewer distinct pixels of the input, and its taps read the same ones.
    """
    columns = min(16, pixels, 1 << (width - 1).bit_length())
    rows = min(pixels // columns, 1 << (height - 1).bit_length())
    return rows, pixels // rows
