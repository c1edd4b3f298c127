"""``patch_swap`` (OP-4): the public function and how its operators are registered with PyTorch.

The kernels are in csrc/patch_match/, beside those of ``patch_match``, whose indices they follow.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hdrops import _backends
from hdrops.ops import _common
from hdrops.ops.patch_match import check_index, check_patch_size
from hdrops.reference import patch_match as reference

SCALES = (1, 2, 4)
BORDERS = ("exclude", "zero")
_CAN_RUN = {
    "cpu": _backends.can_run_cpu,
    "reference": _backends.can_run_reference,
}


def patch_swap(
    source: Tensor,
    index: Tensor,
    *,
    patch_size: int = 3,
    scale: int = 1,
    border: str = "exclude",
    backend: str | None = None,
) -> Tensor:
    r"""Lays out the matched patches of ``source`` over the query's grid and averages where they overlap.

    With d the places of a patch around its centre and j(k) = index(k):

    .. math::
        output[p] = \frac{1}{count(p)} \sum_d source[j(p - d) + d]

    over the d for which p - d lies in the query's grid and j(p - d) + d in the key's.

    With ``scale`` s > 1 every site stands for s x s pixels of a source s times as fine as the key, and patches of
    s*patch_size pixels move: features of several resolutions follow one match, as in TTSR.

    Args:
        source: float [N, C, s*Hk, s*Wk]; N may be 0. Its memory format (NCHW or channels_last) is the output's.
        index: int64 [N, Hq, Wq], linear indices y*Wk + x into the key's grid, clamped to it.
        patch_size: 1, 3, 5 or 7, in sites.
        scale: s, one of 1, 2, 4.
        border: "exclude" divides by the number of patches that truly overlap (count); "zero" by patch_size^2, as if
            the source were surrounded by zeros, which darkens the border (TTSR).
        backend: "cpu", "reference", or None for the best that runs on the source's device.

    The dtype is float64, float32, bfloat16 or float16; sums are float64 for float64 and float32 for the others. Under
    autocast the source takes the ambient dtype.

    Returns:
        [N, C, s*Hq, s*Wq] in the source's dtype and memory format.

    The gradient flows to ``source``; on the CPU it is bitwise equal for any number of threads. Second derivatives,
    forward-mode AD and ``torch.func.grad`` raise; ``backend="reference"`` has them.

    Raises:
        ValueError: a wrong shape, value or device.
        TypeError: a wrong dtype or kind of argument.
        NotImplementedError: a backend that cannot run the call, or a derivative that the kernels do not have.

    Example:
        >>> import torch, hdrops
        >>> source = torch.rand(1, 3, 8, 8)
        >>> index = torch.arange(64).reshape(1, 8, 8)
        >>> torch.allclose(hdrops.patch_swap(source, index), source)
        True

    References:
        Yang et al., Learning Texture Transformer Network for Image Super-Resolution (TTSR), CVPR 2020, hard attention;
        OP-4 is the swapping of APNT-Fusion (Chen et al., 2021).
    """
    op = "patch_swap"
    check_patch_size(op, patch_size)
    if scale not in SCALES:
        raise ValueError(f"{op}: scale must be one of 1, 2, 4, got {scale!r}")
    if border not in BORDERS:
        raise ValueError(f"{op}: border must be one of {', '.join(BORDERS)}, got {border!r}")
    _common.check_dimensions(op, "source", source, "N, C, scale*Hk, scale*Wk")
    check_index(op, "index", index, source.shape[0])
    if source.shape[1] < 1 or source.shape[2] < 1 or source.shape[3] < 1:
        raise ValueError(
            f"{op}: source must have at least one channel, row and column, got shape {_common.shape_of(source)}"
        )
    if source.shape[2] % scale != 0 or source.shape[3] % scale != 0:
        raise ValueError(
            f"{op}: source's height and width must be multiples of scale = {scale}, got shape "
            f"{_common.shape_of(source)}"
        )
    _common.check_devices(op, "source", source, index=index)
    ambient = _common.autocast_dtype(source)
    if ambient is not None:
        (source,) = _follow_autocast(ambient, source)
    if source.dtype not in _common.FLOATING_DTYPES:
        raise TypeError(f"{op}: source must be float64, float32, bfloat16 or float16, got {source.dtype}")

    if _backends.choose(op, source, backend, _CAN_RUN) == "reference":
        with contextlib.nullcontext() if ambient is None else torch.autocast(source.device.type, enabled=False):
            return reference.patch_swap(source, index, patch_size=patch_size, scale=scale, border=border)
    _common.refuse_functional_transforms(op, source)
    output: Tensor = torch.ops.hdrops.patch_swap.default(source, index, patch_size, scale, border)
    return output


def _follow_autocast(ambient: torch.dtype, source: Tensor, *others: Any) -> tuple[Any, ...]:
    return _common.cast(source, ambient), *others


def _empty(like: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=format)


def _is_channels_last(source: Tensor) -> bool:
    return _common.memory_format(source) == torch.channels_last


def _fake(source: Tensor, index: Tensor, patch_size: int, scale: int, border: str) -> Tensor:
    shape = (source.shape[0], source.shape[1], scale * index.shape[1], scale * index.shape[2])
    return _empty(source, shape, _is_channels_last(source))


def _fake_backward(
    grad_output: Tensor,
    index: Tensor,
    size: Sequence[int],
    patch_size: int,
    scale: int,
    border: str,
    channels_last: bool,
    deterministic: bool,
) -> Tensor:
    shape = (grad_output.shape[0], grad_output.shape[1], size[0], size[1])
    return _empty(grad_output, shape, channels_last)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    source, index, ctx.patch_size, ctx.scale, ctx.border = inputs
    # The source itself is not kept: its gradient depends on the index alone.
    ctx.size, ctx.channels_last = (source.shape[2], source.shape[3]), _is_channels_last(source)
    ctx.save_for_backward(index)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    (index,) = ctx.saved_tensors
    gradient = torch.ops.hdrops._patch_swap_backward.default(
        grad_output,
        index,
        ctx.size,
        ctx.patch_size,
        ctx.scale,
        ctx.border,
        ctx.channels_last,
        torch.are_deterministic_algorithms_enabled(),
    )
    return gradient, None, None, None, None


def _vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    """The batch becomes part of N."""
    source, index, *options = arguments

    def fold(tensor: Tensor, dim: int | None) -> Tensor:
        batched = tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        return batched.flatten(0, 1)

    output = torch.ops.hdrops.patch_swap.default(fold(source, in_dims[0]), fold(index, in_dims[1]), *options)
    return output.unflatten(0, (info.batch_size, output.shape[0] // info.batch_size)), 0


torch.library.register_fake("hdrops::patch_swap", _fake)
torch.library.register_fake("hdrops::_patch_swap_backward", _fake_backward)
torch.library.register_autograd("hdrops::patch_swap", _backward, setup_context=_setup_context)
_common.refuse_double_backward("_patch_swap_backward")
_common.register_autocast("patch_swap", _follow_autocast)
torch.library.register_vmap("hdrops::patch_swap", _vmap)
torch.library.register_vmap(
    "hdrops::_patch_swap_backward", _common.vmap_by_loop(torch.ops.hdrops._patch_swap_backward.default)
)
