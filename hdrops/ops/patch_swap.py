"""``patch_swap`` (OP-4): the public function and how its operators are registered with PyTorch.

The CPU kernels are in csrc/patch_match/, beside those of ``patch_match``, whose indices they follow. Those for a GPU
are in hdrops/triton/patch_swap.py, behind operators of their own.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hdrops import _backends, triton
from hdrops.ops import _common
from hdrops.ops.patch_match import check_index, check_patch_size
from hdrops.reference import patch_match as reference

SCALES = (1, 2, 4)
BORDERS = ("exclude", "zero")
_CAN_RUN = {
    "cpu": _backends.can_run_cpu,
    "triton": _backends.can_run_triton,
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
        backend: "cpu", "triton", "reference", or None for the best that runs on the source's device.

    The dtype is float64, float32, bfloat16 or float16; sums are float64 for float64 and float32 for the others. Under
    autocast the source takes the ambient dtype.

    Returns:
        [N, C, s*Hq, s*Wq] in the source's dtype and memory format.

    The gradient flows to ``source``; it is bitwise equal for any number of threads on the CPU, and in every run on a
    GPU. Second derivatives, forward-mode AD and ``torch.func.grad`` raise; ``backend="reference"`` has them.

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
    _common.check_dimensions(op, "source", source, "N, C, scale*Hk, scale*Wk")
    _check_call(source.shape, index, patch_size, scale, border)
    _common.check_devices(op, "source", source, index=index)
    ambient = _common.autocast_dtype(source)
    if ambient is not None:
        (source,) = _follow_autocast(ambient, source)
    _check_dtype("source", source)

    chosen = _backends.choose(op, source, backend, _CAN_RUN)
    if chosen == "reference":
        with contextlib.nullcontext() if ambient is None else torch.autocast(source.device.type, enabled=False):
            return reference.patch_swap(source, index, patch_size=patch_size, scale=scale, border=border)
    _common.refuse_functional_transforms(op, source)
    kernels = torch.ops.hdrops._patch_swap_triton if chosen == "triton" else torch.ops.hdrops.patch_swap
    output: Tensor = kernels.default(source, index, patch_size, scale, border)
    return output


def _check_call(shape: Sequence[int], index: Tensor, patch_size: int, scale: int, border: str) -> None:
    """Raises unless a source of that shape can be swapped so."""
    op = "patch_swap"
    check_patch_size(op, patch_size)
    if not _common.is_integer(scale) or scale not in SCALES:
        raise ValueError(f"{op}: scale must be one of 1, 2, 4, got {scale!r}")
    if border not in BORDERS:
        raise ValueError(f"{op}: border must be one of {', '.join(BORDERS)}, got {border!r}")
    check_index(op, "index", index, shape[0])
    if shape[1] < 1 or shape[2] < 1 or shape[3] < 1:
        raise ValueError(f"{op}: source must have at least one channel, row and column, got shape {list(shape)}")
    if shape[2] % scale != 0 or shape[3] % scale != 0:
        raise ValueError(
            f"{op}: source's height and width must be multiples of scale = {scale}, got shape {list(shape)}"
        )


def _check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _common.FLOATING_DTYPES:
        raise TypeError(f"patch_swap: {name} must be float64, float32, bfloat16 or float16, got {tensor.dtype}")


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


def _triton_forward(source: Tensor, index: Tensor, *options: Any) -> Tensor:
    """The kernel of ``_patch_swap_triton``: the checks that the compiled one makes, then hdrops.triton's."""
    from hdrops.triton import patch_swap as kernels

    _common.check_dimensions("patch_swap", "source", source, "N, C, scale*Hk, scale*Wk")
    _check_call(source.shape, index, *options)
    _common.check_devices("patch_swap", "source", source, index=index)
    _check_dtype("source", source)
    return kernels.forward(source, index, *options)


def _triton_backward(
    grad_output: Tensor, index: Tensor, size: Sequence[int], patch_size: int, scale: int, border: str, *others: Any
) -> Tensor:
    """The kernel of ``_patch_swap_triton_backward``."""
    from hdrops.triton import patch_swap as kernels

    op = "patch_swap"
    _common.check_dimensions(op, "grad_output", grad_output, "N, C, scale*Hq, scale*Wq")
    if len(size) != 2:
        raise ValueError(f"{op}: size must have 2 entries, got {len(size)}")
    n, channels = grad_output.shape[:2]
    _check_call((n, channels, *size), index, patch_size, scale, border)
    _common.check_devices(op, "grad_output", grad_output, index=index)
    _check_dtype("grad_output", grad_output)
    shape = (n, channels, scale * index.shape[1], scale * index.shape[2])
    if grad_output.shape != shape:
        raise ValueError(f"{op}: grad_output must have shape {list(shape)}, got {_common.shape_of(grad_output)}")
    return kernels.backward(grad_output, index, size, patch_size, scale, border, *others)


def _backward_by(op: Callable[..., Any]) -> Callable[..., Any]:
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        gradient = op(
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

    return backward


def _vmap_of(op: Callable[..., Any]) -> Callable[..., Any]:
    """The batch becomes part of N."""

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        source, index, *options = arguments
        size = info.batch_size
        folded = _common.fold_batch(source, in_dims[0], size), _common.fold_batch(index, in_dims[1], size)
        (output,) = _common.unfold_batch([op(*folded, *options)], source, in_dims[0], size)
        return output, 0

    return rule


def _register(name: str, backward_name: str) -> None:
    """Registers all but the kernels of an operator and of its backward operator."""
    op, backward_op = (getattr(torch.ops.hdrops, n).default for n in (name, backward_name))
    torch.library.register_fake(f"hdrops::{name}", _fake)
    torch.library.register_fake(f"hdrops::{backward_name}", _fake_backward)
    torch.library.register_autograd(f"hdrops::{name}", _backward_by(backward_op), setup_context=_setup_context)
    torch.library.register_autograd(f"hdrops::{backward_name}", _backends.refuse_double_backward("patch_swap"))
    _common.register_autocast(name, _follow_autocast)
    torch.library.register_vmap(f"hdrops::{name}", _vmap_of(op))
    torch.library.register_vmap(f"hdrops::{backward_name}", _common.vmap_by_loop(backward_op))


triton.define_twin("_patch_swap_triton", "patch_swap", _triton_forward)
triton.define_twin("_patch_swap_triton_backward", "_patch_swap_backward", _triton_backward)
_register("patch_swap", "_patch_swap_backward")
_register("_patch_swap_triton", "_patch_swap_triton_backward")
