"""hdrops: the operators of HDR imaging for PyTorch, with hand-written kernels forward and backward."""

import hdrops._load  # noqa: F401  (loads the compiled operators; everything below needs them)
from hdrops import nn, reference
from hdrops.ops.deform_conv2d import deform_conv2d
from hdrops.ops.merge_exposures import merge_exposures
from hdrops.ops.truncate import truncate

__all__ = ["deform_conv2d", "merge_exposures", "nn", "reference", "truncate"]

__version__ = "0.1.0"
