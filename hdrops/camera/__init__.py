"""Cameras: response curves and their recovery from a bracket, and tone mapping."""

from hdrops.camera.calibration import estimate_crf
from hdrops.camera.curves import invert_curve, monotone_from_middle, monotone_repair, resample_curve
from hdrops.camera.debevec import solve_debevec
from hdrops.camera.deghost import Deghosted, deghost
from hdrops.camera.emor import EMoR
from hdrops.camera.response_files import load_response, save_response
from hdrops.camera.robertson import solve_robertson
from hdrops.camera.sampling import sample_stack
from hdrops.camera.tonemap import drago, expose, luminance, mu_law, mu_law_inverse, reinhard, srgb_decode, srgb_encode

__all__ = [
    "Deghosted",
    "EMoR",
    "deghost",
    "drago",
    "estimate_crf",
    "expose",
    "invert_curve",
    "load_response",
    "luminance",
    "monotone_from_middle",
    "monotone_repair",
    "mu_law",
    "mu_law_inverse",
    "reinhard",
    "resample_curve",
    "sample_stack",
    "save_response",
    "solve_debevec",
    "solve_robertson",
    "srgb_decode",
    "srgb_encode",
]
