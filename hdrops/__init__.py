"""hdrops: the operators of HDR imaging for PyTorch, with hand-written kernels forward and backward."""

import hdrops._load  # noqa: F401  (loads the compiled operators; everything below needs them)
from hdrops import nn, onnx, reference
from hdrops.ops.deform_conv2d import deform_conv2d

__all__ = ["deform_conv2d", "nn", "onnx", "reference"]

__version__ = "0.1.0"
