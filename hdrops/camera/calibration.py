"""Response recovery from a bracket of photographs, in one call."""

from torch import Tensor

from hdrops.camera.curves import monotone_from_middle
from hdrops.camera.debevec import solve_debevec
from hdrops.camera.robertson import solve_robertson
from hdrops.camera.sampling import LEVELS, check_stack, sample_stack

METHODS = {"debevec": solve_debevec, "robertson": solve_robertson}


def estimate_crf(
    stack: Tensor,
    log_exposures: Tensor,
    *,
    method: str = "debevec",
    samples: int = 16000,
    smoothness: float | None = None,
    mask: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """Recovers the inverse response of a camera from a registered bracket.

    Args:
        stack: [N, P, C, H, W], P >= 2 frames: uint8, uint16, or floating point in [0, 1]. Values deeper than 8 bits are
            not rounded: they are read between the two neighbouring of 256 codes.
        log_exposures: [P] or [N|1, P], natural logarithm of seconds, frames in any order.
        method: "debevec" (:func:`solve_debevec`) or "robertson" (:func:`solve_robertson`).
        samples: pixels drawn per image; all where there are fewer.
        smoothness: of the curve, see :func:`solve_debevec`. None: 20 * sqrt(samples drawn / 150). A fixed one gets
            worse with more samples, since data rows grow in number and smoothness rows do not.
        mask: bool [N|1, P, 1, H, W], True where that frame's pixel is invalid; the pixel's other frames are still used.
        seed: of the draw of samples.

    Returns:
        [N, C, 256], relative exposure per code, 1 at code 128, positive, finite and non-decreasing; dtype of
        ``log_exposures``. :func:`hdrops.merge_exposures` takes it for the same stack. Saturated and black codes have
        weight zero; codes without data follow from smoothness. Where noise makes the solution fall, it is held
        (:func:`hdrops.camera.monotone_from_middle`).

    Gradients:
        "debevec": to floating-point stacks and to ``log_exposures``.

    Raises:
        ValueError: shapes, equal or non-finite exposures, an unknown method, or a bracket that shows no pixel well
            exposed in two frames. TypeError: dtypes.

    Example:
        >>> import torch
        >>> from hdrops.camera import estimate_crf
        >>> times = torch.tensor([0.25, 1.0, 4.0])
        >>> scene = torch.rand(1, 1, 1, 64, 64) ** 3
        >>> stack = (255 * (scene * times.view(1, 3, 1, 1, 1)).clamp(0, 1) ** (1 / 2.2)).round().byte()
        >>> curve = estimate_crf(stack, times.log())
        >>> list(curve.shape), round(float(curve[0, 0, 200]), 1), round((200 / 128) ** 2.2, 1)
        ([1, 1, 256], 2.7, 2.7)
    """
    check_stack("estimate_crf", stack, log_exposures, mask)
    if method not in METHODS:
        raise ValueError(f"estimate_crf: method must be one of {tuple(METHODS)}, got {method!r}")
    batch, frames, channels = stack.shape[:3]
    if batch * channels == 0:
        return log_exposures.new_zeros(batch, channels, LEVELS)
    codes, excluded = sample_stack(stack, samples, mask, seed)
    if smoothness is None:
        smoothness = 20 * (codes.shape[-2] / 150) ** 0.5
    log_times = log_exposures.to(stack.device).expand(batch, frames)
    # By exposure, so that the order of the frames changes not even the rounding of a sum.
    order = log_times.detach().argsort(stable=True, dim=-1)
    log_times = log_times.gather(-1, order).unsqueeze(1)
    order = order.view(batch, 1, 1, frames).expand(codes.shape)
    codes = codes.gather(-1, order)
    excluded = None if excluded is None else excluded.gather(-1, order)
    log_response, _ = METHODS[method](codes, log_times, smoothness=smoothness, mask=excluded)
    return monotone_from_middle(log_response).exp()
