"""Cameras: response curves and their recovery from a bracket, and tone mapping."""

from hdrops.camera.calibration import estimate_crf
from hdrops.camera.debevec import solve_debevec
from hdrops.camera.response_files import load_response, save_response
from hdrops.camera.tonemap import drago, expose, luminance, mu_law, mu_law_inverse, reinhard, srgb_decode, srgb_encode

__all__ = [
    "drago",
    "estimate_crf",
    "expose",
    "load_response",
    "luminance",
    "mu_law",
    "mu_law_inverse",
    "reinhard",
    "save_response",
    "solve_debevec",
    "srgb_decode",
    "srgb_encode",
]
