"""hdrops: the operators of HDR imaging for PyTorch, with hand-written kernels forward and backward."""

import hdrops._load  # noqa: F401  (loads the compiled operators; everything below needs them)
from hdrops import camera, nn, onnx, reference
from hdrops._config import show_config
from hdrops.ops.crf import crf_lookup, quantize_ste, tent_histogram, value_histogram
from hdrops.ops.deform_conv2d import deform_conv2d
from hdrops.ops.global_context import context_pool, global_context
from hdrops.ops.merge_exposures import merge_exposures
from hdrops.ops.patch_match import PatchMatch, patch_match, patch_match_pyramid
from hdrops.ops.patch_swap import patch_swap
from hdrops.ops.truncate import truncate

__all__ = [
    "PatchMatch",
    "camera",
    "context_pool",
    "crf_lookup",
    "deform_conv2d",
    "global_context",
    "merge_exposures",
    "nn",
    "onnx",
    "patch_match",
    "patch_match_pyramid",
    "patch_swap",
    "quantize_ste",
    "reference",
    "show_config",
    "tent_histogram",
    "truncate",
    "value_histogram",
]

__version__ = "0.1.0"
