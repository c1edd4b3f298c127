"""truncate: the truncation process C(H) of DuHDR (OP-14)."""

from typing import Any

import torch
from torch import Tensor

from hdrops import _backends
from hdrops.ops import _common
from hdrops.reference import truncate as _reference

_CAN_RUN: dict[str, _backends.CanRun] = {
    "cpu": _backends.can_run_cpu,
    "cuda": _backends.can_run_cuda,
    "reference": _backends.can_run_reference,
}


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
        backend: ``"cpu"``, ``"cuda"``, ``"reference"`` or None for the best that can run.

    Returns:
        [N, C, H, W] in the input's dtype and memory layout (contiguous or channels last); not bounded by 1 where detail
        exceeds it. A NaN spreads over the two boxes it lies in.

    The gradient to ``input`` is exact, zero through the clipped base, and the same for any number of threads and from
    call to call on a GPU. The CPU kernel computes in float64 whatever the dtype, the CUDA kernels in float32 (float64
    for float64) from differences between pixels; under autocast half precision gives a float32 result.

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
    if input.dtype in _common.HALF_DTYPES and _common.autocast_dtype(input) is not None:
        input = input.float()
    if _backends.choose("truncate", input, backend, _CAN_RUN) == "reference":
        return _reference.truncate(input, radius=radius, eps=eps)
    _common.refuse_functional_transforms("truncate", input)
    output: Tensor = torch.ops.hdrops.truncate.default(input, radius, eps)
    return output


def _check(input: Tensor, radius: int, eps: float) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"truncate: input must be a tensor, got {type(input).__name__}")
    if isinstance(radius, bool) or not isinstance(radius, (int, torch.SymInt)):
        raise TypeError(f"truncate: radius must be an integer, got {radius!r}")
    if not isinstance(eps, (int, float, torch.SymFloat)):
        raise TypeError(f"truncate: eps must be a number, got {eps!r}")
    if input.dtype not in _common.FLOATING_DTYPES:
        raise TypeError(f"truncate: input must be float32, float64, bfloat16 or float16, got {input.dtype}")
    if input.dim() != 4:
        raise ValueError(f"truncate: input must be [N, C, H, W], got shape {list(input.shape)}")
    if radius < 1:
        raise ValueError(f"truncate: radius must be at least 1, got {radius}")
    if not eps > 0:
        raise ValueError(f"truncate: eps must be above 0, got {eps}")
    if min(input.shape[2:]) <= radius:
        raise ValueError(f"truncate: height and width must be above radius = {radius}, got shape {list(input.shape)}")


@torch.library.register_fake("hdrops::truncate")
def _fake(input: Tensor, radius: int, eps: float) -> Tensor:
    return torch.empty_like(input, memory_format=_common.memory_format(input))


@torch.library.register_fake("hdrops::_truncate_backward")
def _fake_backward(grad_output: Tensor, input: Tensor, radius: int, eps: float) -> Tensor:
    return torch.empty_like(input, memory_format=_common.memory_format(input))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, ctx.radius, ctx.eps = inputs
    ctx.save_for_backward(input)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    (input,) = ctx.saved_tensors
    return torch.ops.hdrops._truncate_backward.default(grad_output, input, ctx.radius, ctx.eps), None, None


def _vmap(info: Any, in_dims: tuple[int | None, ...], input: Tensor, radius: int, eps: float) -> tuple[Tensor, int]:
    """The mapped dimension becomes part of the batch."""
    assert in_dims[0] is not None
    input = input.movedim(in_dims[0], 0)
    output = torch.ops.hdrops.truncate.default(input.flatten(0, 1), radius, eps)
    return output.unflatten(0, input.shape[:2]), 0


torch.library.register_autograd("hdrops::truncate", _backward, setup_context=_setup_context)
_common.refuse_double_backward("_truncate_backward")
torch.library.register_vmap("hdrops::truncate", _vmap)
torch.library.register_vmap(
    "hdrops::_truncate_backward", _common.vmap_by_loop(torch.ops.hdrops._truncate_backward.default)
)
