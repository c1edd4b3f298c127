"""truncate: the truncation process C(H) of DuHDR (OP-14)."""

import torch
from torch import Tensor

from hdrops import _backends
from hdrops.reference import truncate as _reference

_BACKENDS: dict[str, _backends.CanRun] = {"reference": _backends.can_run_reference}
_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def truncate(input: Tensor, *, radius: int = 2, eps: float = 0.01, backend: str | None = None) -> Tensor:
    """Limits an image's base layer to [0, 1] and keeps its detail.

    A self-guided filter with box means B over (2 radius + 1)^2 pixels, reflected at the border, per channel::

        m = B(H)    v = B(H^2) - m^2    a = v / (v + eps)
        base = B(a) H + B(m - a m)
        C(H) = clip(base, 0, 1) * H / (base + 1e-15)

    Args:
        input: image [N, C, H, W], float32, float64, bfloat16 or float16, H and W above ``radius``.
        radius: of the box, at least 1.
        eps: regularisation, in squared units of ``input``, above 0.
        backend: ``"cpu"``, ``"reference"`` or None for the best that can run.

    Returns:
        [N, C, H, W] in the input's dtype and memory layout (contiguous or channels last); not bounded by 1 where detail
        exceeds it. A NaN spreads over the two boxes it lies in.

    The gradient to ``input`` is exact, zero through the clipped base, and the same for any number of threads.
    Under autocast half precision is computed in float32.

    Raises:
        ValueError: shape, ``radius`` or ``eps`` out of the ranges above.
        TypeError: a dtype that is not listed.
        NotImplementedError: the backend cannot run the call; second derivatives or forward-mode AD outside of
            ``backend="reference"``.

    Example:
        >>> import torch, hdrops
        >>> hdrops.truncate(torch.full((1, 1, 8, 8), 4.0))[0, 0, 0, 0].item()
        1.0

    Source: the truncation loss of DuHDR, whose filter is He et al., "Guided Image Filtering", 2010.
    """
    _check(input, radius, eps)
    _backends.choose("truncate", input, backend, _BACKENDS)
    return _reference.truncate(input, radius=radius, eps=eps)


def _check(input: Tensor, radius: int, eps: float) -> None:
    if input.dtype not in _FLOATING:
        raise TypeError(f"truncate: input must be float32, float64, bfloat16 or float16, got {input.dtype}")
    if input.dim() != 4:
        raise ValueError(f"truncate: input must be [N, C, H, W], got shape {list(input.shape)}")
    if radius < 1:
        raise ValueError(f"truncate: radius must be at least 1, got {radius}")
    if not eps > 0:
        raise ValueError(f"truncate: eps must be above 0, got {eps}")
    if min(input.shape[2:]) <= radius:
        raise ValueError(
            f"truncate: height and width must be above radius = {radius}, got shape {list(input.shape)}"
        )
