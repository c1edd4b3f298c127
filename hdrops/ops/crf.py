"""``crf_lookup``, ``tent_histogram``, ``value_histogram`` and ``quantize_ste``: OP-6, OP-8, OP-11, OP-12 and OP-13.

A call travels: checks here -> backend -> ``torch.ops.hdrops.<name>`` -> vmap and autograd as registered below -> the
kernel of csrc/crf/. Autocast leaves all four alone: their arithmetic is float32 for 16-bit pixels anyway, and a
response curve must keep its precision.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hdrops import _backends
from hdrops.ops import _common
from hdrops.reference import crf as reference

_CAN_RUN = {
    "cpu": _backends.can_run_cpu,
    "cuda": _backends.can_run_cuda,
    "reference": _backends.can_run_reference,
}
_MODES = ("linear", "nearest")
_MAX_LEVELS = 2**20
_MAX_BINS = 2**16


def crf_lookup(
    input: Tensor,
    curve: Tensor,
    *,
    mode: str = "linear",
    gradient_scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Applies a sampled camera response curve to every pixel.

    A curve ``c`` has L values at :math:`0, 1/(L-1), ..., 1`. With :math:`p = clamp(x, 0, 1) (L - 1)`:

    * ``mode="linear"``: :math:`i = \lfloor p \rfloor`, :math:`y = c_i + (p - i)(c_{i+1} - c_i)`;
    * ``mode="nearest"``: :math:`y = c_q`, q = p rounded, ties to even.

    Args:
        input: [N, C, ...] pixels in [0, 1], float32, float64, bfloat16 or float16; or codes, uint8 or uint16. Any
            shape where one curve serves all. Values outside [0, 1] count as the nearer end.
        curve: [L], or [N or 1, C or 1, L] for curves per image or per channel; 2 <= L <= 2**20. float32, float64, or
            the input's dtype. For codes: any floating dtype; with L = 256 (uint8) or 65536 (uint16) the code indexes
            the curve exactly, with another L it stands for the pixel code/255 or code/65535.
        mode: "linear" or "nearest".
        gradient_scale: slope of "nearest" per finite difference of the curve; None is L - 1, the unit of x. 1 is what
            Kim et al. print (the slope per code).
        backend: "cpu", "cuda", "reference", or None for the best that runs on the input's device.

    Returns:
        The input's shape and memory format (channels_last stays so); its dtype, or the curve's for codes.

    Gradients flow to floating input and to curve, each computed only if asked for:

    * input, linear: :math:`(L-1)(c_{i+1} - c_i)`, at a knot the right segment's, 0 at x = 1; nearest:
      ``gradient_scale`` times :math:`c_q - c_{q-1}`, or :math:`c_0` where q = 0. 0 outside [0, 1].
    * curve: the weights of its entries in y, summed over the pixels in float64.

    A NaN pixel gives NaN, a zero gradient, and nothing to the curve's gradient; infinite pixels count as the ends.
    Positions are float32 (float64 for float64 input). All is bitwise equal for any number of CPU threads, and from call
    to call on a GPU.
    Second derivatives, forward-mode AD and ``torch.func.grad`` raise; ``backend="reference"`` has them.

    Raises:
        ValueError: a wrong shape, value or device.
        TypeError: a wrong dtype or kind of argument.
        NotImplementedError: a backend that cannot run the call, or a derivative that the kernels do not have.

    Example:
        >>> import torch, hdrops
        >>> gamma = torch.linspace(0, 1, 1024) ** 2.2
        >>> image = torch.rand(1, 3, 4, 5)
        >>> torch.allclose(hdrops.crf_lookup(image, gamma), image ** 2.2, atol=1e-4)
        True
        >>> codes = torch.tensor([[0, 255]], dtype=torch.uint8)
        >>> hdrops.crf_lookup(codes, torch.linspace(0, 2, 256))
        tensor([[0., 2.]])

    References:
        Linear: the response layers of SingleHDR (Liu et al., CVPR 2020). Nearest: Kim et al., End-to-End Differentiable
        Learning to HDR Image Synthesis for Multi-exposure Images, AAAI 2021, equation 3.
    """
    op = "crf_lookup"
    _check_lookup(input, curve, mode, gradient_scale)
    if _backends.choose(op, input, backend, _CAN_RUN) == "reference":
        return reference.crf_lookup(input, curve, mode=mode, gradient_scale=gradient_scale)
    _common.refuse_functional_transforms(op, input, curve)
    curves = curve.reshape(1, 1, -1) if curve.dim() == 1 else curve
    lookup = torch.ops.hdrops.crf_lookup.default
    output: Tensor
    if input.dtype in reference.CODES:
        output = lookup(input, _spread_over_codes(curves, reference.CODES[input.dtype], mode), mode, gradient_scale)
    else:
        positions = torch.float64 if input.dtype == torch.float64 else torch.float32
        output = lookup(input, curves.to(positions), mode, gradient_scale)
    return output


def quantize_ste(input: Tensor, *, levels: int = 256, gradient: str = "inside", backend: str | None = None) -> Tensor:
    r"""Rounds to ``levels`` equally spaced values of [0, 1], with a straight-through gradient.

    .. math::
        y = \lfloor clamp(x, 0, 1) (levels - 1) + 1/2 \rfloor / (levels - 1)

    Args:
        input: any shape; float32, float64, bfloat16 or float16.
        levels: number of values, 2 to 65536; 256 makes the values of 8-bit images.
        gradient: where dy/dx is 1: "inside" [0, 1], ends included, or "everywhere". Elsewhere, and at a NaN or
            infinite pixel, it is 0.
        backend: "cpu", "cuda", "reference", or None for the best that runs on the input's device.

    Returns:
        The input's shape, dtype and memory format. NaN stays NaN.

    Second derivatives, forward-mode AD and ``torch.func.grad`` raise; ``backend="reference"`` has them.

    Raises:
        ValueError: ``levels`` or ``gradient`` out of range.
        TypeError: a wrong dtype or kind of argument.
        NotImplementedError: a backend that cannot run the call, or a derivative that the kernel does not have.

    Example:
        >>> import torch, hdrops
        >>> hdrops.quantize_ste(torch.tensor([0.1, 0.4, 2.0]), levels=5)
        tensor([0.0000, 0.5000, 1.0000])

    References:
        Bengio et al., Estimating or Propagating Gradients Through Stochastic Neurons, 2013.
    """
    op = "quantize_ste"
    _check_float(op, input)
    _check_integer(op, "levels", levels, 2, _MAX_BINS)
    if gradient not in ("inside", "everywhere"):
        raise ValueError(f"{op}: gradient must be 'inside' or 'everywhere', got {gradient!r}")
    if _backends.choose(op, input, backend, _CAN_RUN) == "reference":
        return reference.quantize_ste(input, levels=levels, gradient=gradient)
    _common.refuse_functional_transforms(op, input)
    output: Tensor = torch.ops.hdrops.quantize_ste.default(input, levels, gradient == "everywhere")
    return output


def tent_histogram(input: Tensor, *, bins: Sequence[int] = (4, 8, 16), backend: str | None = None) -> Tensor:
    r"""Soft histogram features: for each pixel, how near it lies to each of a set of levels.

    For every m of ``bins`` and i = 0 ... m a map :math:`relu(1 - |m x - i|)` of each channel.

    Args:
        input: [N, C, H, W], values about [0, 1]; float32, float64, bfloat16 or float16.
        bins: numbers of intervals between the levels, each 1 to 65536.
        backend: "cpu", "cuda", "reference", or None for the best that runs on the input's device.

    Returns:
        [N, C * sum(m + 1 for m in bins), H, W], bin-major: all channels of the first level, then of the second.
        The input's dtype and memory format. NaN pixels give NaN maps.

    The gradient is :math:`-m\,sign(m x - i)` on a tent's flanks, 0 at its peak, outside it and at a NaN pixel. Second
    derivatives, forward-mode AD and ``torch.func.grad`` raise; ``backend="reference"`` has them.

    Raises:
        ValueError: a wrong shape or bin count.
        TypeError: a wrong dtype or kind of argument.
        NotImplementedError: a backend that cannot run the call, or a derivative that the kernel does not have.

    Example:
        >>> import torch, hdrops
        >>> hdrops.tent_histogram(torch.full((1, 1, 1, 1), 0.375), bins=(2,)).flatten()
        tensor([0.2500, 0.7500, 0.0000])

    References:
        The soft histogram layer of SingleHDR's response network (Liu et al., CVPR 2020).
    """
    op = "tent_histogram"
    _check_float(op, input)
    _common.check_dimensions(op, "input", input, "N, C, H, W")
    if not isinstance(bins, (tuple, list)) or len(bins) == 0:
        raise TypeError(f"{op}: bins must be a tuple or list of at least one integer, got {bins!r}")
    for bin in bins:
        _check_integer(op, "bins", bin, 1, _MAX_BINS)
    if _backends.choose(op, input, backend, _CAN_RUN) == "reference":
        return reference.tent_histogram(input, bins=bins)
    _common.refuse_functional_transforms(op, input)
    output: Tensor = torch.ops.hdrops.tent_histogram.default(input, list(bins))
    return output


def value_histogram(input: Tensor, *, bins: int = 256, backend: str | None = None) -> Tensor:
    r"""Histogram of each channel whose bins count values instead of pixels, so that it has a gradient.

    With :math:`v = clamp((x + 1)(bins - 1)/2, 0, bins - 1)`, bin l holds
    :math:`\frac{1}{bins - 1} \sum_{\lfloor v \rfloor = l} v / max(l, 1)`.

    Args:
        input: [N, C, H, W], values in [-1, 1]; float32, float64, bfloat16 or float16.
        bins: 2 to 65536.
        backend: "cpu", "cuda", "reference", or None for the best that runs on the input's device.

    Returns:
        [N, C, bins] in the input's dtype; the sums are float64. Bitwise equal for any number of CPU threads, and from
        call to call on a GPU.

    The gradient of bin :math:`\lfloor v \rfloor` is :math:`1 / (2\,max(l, 1))` inside [-1, 1], ends included, and 0
    outside. A NaN pixel counts nowhere and has no gradient. Second derivatives, forward-mode AD and
    ``torch.func.grad`` raise; ``backend="reference"`` has them.

    Raises:
        ValueError: a wrong shape or number of bins.
        TypeError: a wrong dtype or kind of argument.
        NotImplementedError: a backend that cannot run the call, or a derivative that the kernel does not have.

    Example:
        >>> import torch, hdrops
        >>> hdrops.value_histogram(torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 1, 1, 3), bins=5)
        tensor([[[0.0000, 0.0000, 0.2500, 0.0000, 0.2500]]])

    References:
        The histogram loss of Kim et al., AAAI 2021.
    """
    op = "value_histogram"
    _check_float(op, input)
    _common.check_dimensions(op, "input", input, "N, C, H, W")
    _check_integer(op, "bins", bins, 2, _MAX_BINS)
    if _backends.choose(op, input, backend, _CAN_RUN) == "reference":
        return reference.value_histogram(input, bins=bins)
    _common.refuse_functional_transforms(op, input)
    output: Tensor = torch.ops.hdrops.value_histogram.default(input, bins)
    return output


def _spread_over_codes(curves: Tensor, codes: int, mode: str) -> Tensor:
    """Curves [N|1, C|1, L] as tables with one entry for each code; a differentiable lookup where L is another."""
    if curves.shape[2] == codes:
        return curves
    ramp = torch.arange(codes, device=curves.device, dtype=torch.float64) / (codes - 1)
    ramp = ramp.expand(*curves.shape[:2], codes)
    table: Tensor = torch.ops.hdrops.crf_lookup.default(ramp, curves.double(), mode, None)
    return table.to(curves.dtype)


def _check_float(op: str, input: Tensor) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"{op}: input must be a tensor, got {type(input).__name__}")
    if input.dtype not in _common.FLOATING_DTYPES:
        raise TypeError(f"{op}: input must be float32, float64, bfloat16 or float16, got {input.dtype}")


def _check_integer(op: str, name: str, value: int, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an integer in [{least}, {most}], got {value!r}")
    if not least <= value <= most:
        raise ValueError(f"{op}: {name} must be an integer in [{least}, {most}], got {value}")


def _check_lookup(input: Tensor, curve: Tensor, mode: str, gradient_scale: float | None) -> None:
    op, shape_of = "crf_lookup", _common.shape_of
    for name, tensor in (("input", input), ("curve", curve)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if input.dtype not in _common.FLOATING_DTYPES and input.dtype not in reference.CODES:
        raise TypeError(f"{op}: input must be float32, float64, bfloat16, float16, uint8 or uint16, got {input.dtype}")
    allowed = {torch.float32, torch.float64, input.dtype}
    if curve.dtype not in (_common.FLOATING_DTYPES if input.dtype in reference.CODES else allowed):
        raise TypeError(f"{op}: curve must be float32, float64 or the input's dtype {input.dtype}, got {curve.dtype}")
    if curve.dim() not in (1, 3):
        raise ValueError(f"{op}: curve must be [L] or [N or 1, C or 1, L], got shape {shape_of(curve)}")
    if not 2 <= curve.shape[-1] <= _MAX_LEVELS:
        raise ValueError(
            f"{op}: curve must have 2 to {_MAX_LEVELS} levels, got {curve.shape[-1]} (curve shape {shape_of(curve)})"
        )
    if curve.dim() == 3 and (curve.shape[0] != 1 or curve.shape[1] != 1):
        if input.dim() < 2:
            raise ValueError(
                f"{op}: input must be [N, C, ...] beside curves per image or channel, got shape {shape_of(input)} "
                f"(curve shape {shape_of(curve)})"
            )
        for axis, name in enumerate(("N", "C")):
            if curve.shape[axis] != 1 and curve.shape[axis] != input.shape[axis]:
                raise ValueError(
                    f"{op}: curve must have 1 or {name} = {input.shape[axis]} curves in dimension {axis}, got "
                    f"{curve.shape[axis]} (curve shape {shape_of(curve)}, input shape {shape_of(input)})"
                )
    if mode not in _MODES:
        raise ValueError(f"{op}: mode must be 'linear' or 'nearest', got {mode!r}")
    if gradient_scale is not None and mode == "linear":
        raise ValueError(f"{op}: gradient_scale belongs to mode 'nearest', got {gradient_scale!r} with 'linear'")
    if gradient_scale is not None and not (isinstance(gradient_scale, (int, float)) and math.isfinite(gradient_scale)):
        raise ValueError(f"{op}: gradient_scale must be a finite number or None, got {gradient_scale!r}")
    _common.check_devices(op, "input", input, curve=curve)


def _memory_format(tensor: Tensor) -> torch.memory_format:
    """The layout the kernels run in: channels last where the tensor is that and nothing else, else planar."""
    if not tensor.is_contiguous():
        if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if tensor.dim() == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format


def _empty_like(input: Tensor, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(
        input.shape if shape is None else shape,
        dtype=dtype or input.dtype,
        device=input.device,
        memory_format=_memory_format(input),
    )


# crf_lookup


def _fake_lookup(input: Tensor, curve: Tensor, mode: str, gradient_scale: float | None) -> Tensor:
    return _empty_like(input, dtype=curve.dtype if input.dtype in reference.CODES else input.dtype)


def _fake_lookup_backward(
    grad_output: Tensor,
    input: Tensor,
    curve: Tensor,
    mode: str,
    gradient_scale: float | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    of_input = output_mask[0] and input.dtype not in reference.CODES
    return (
        _empty_like(input) if of_input else grad_output.new_empty(0),
        torch.empty(curve.shape if output_mask[1] else (0,), dtype=curve.dtype, device=curve.device),
    )


def _save_lookup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, curve, ctx.mode, ctx.gradient_scale = inputs
    ctx.save_for_backward(input, curve)


def _lookup_backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    output_mask = [bool(wanted) for wanted in ctx.needs_input_grad[:2]]
    gradients = torch.ops.hdrops._crf_lookup_backward.default(
        grad_output, *ctx.saved_tensors, ctx.mode, ctx.gradient_scale, output_mask
    )
    return *_common.none_if_unwanted(gradients, output_mask), None, None


def _vmap_lookup(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    """A batch of images with one curve is one image; with several curves its members are folded into N."""
    input, curve, mode, gradient_scale = arguments
    op = torch.ops.hdrops.crf_lookup.default
    if in_dims[1] is None and curve.shape[0] == 1 and curve.shape[1] == 1:
        return op(input, curve, mode, gradient_scale), in_dims[0]
    if input.dim() - (in_dims[0] is not None) < 2:
        return _common.vmap_by_loop(op)(info, in_dims, *arguments)

    def fold(tensor: Tensor, dim: int | None, n: int) -> Tensor:
        batched = tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        return batched.expand(-1, n, *batched.shape[2:]).flatten(0, 1)

    n = input.shape[0] if in_dims[0] is None else input.movedim(in_dims[0], 0).shape[1]
    output = op(fold(input, in_dims[0], n), fold(curve, in_dims[1], n), mode, gradient_scale)
    return output.unflatten(0, (info.batch_size, n)), 0


# tent_histogram, value_histogram, quantize_ste: one input, then plain arguments


def _fake_tents(input: Tensor, bins: Sequence[int]) -> Tensor:
    n, c, h, w = input.shape
    return _empty_like(input, shape=(n, c * sum(m + 1 for m in bins), h, w))


def _fake_value_histogram(input: Tensor, bins: int) -> Tensor:
    return input.new_empty(input.shape[0], input.shape[1], bins)


def _fake_quantize(input: Tensor, levels: int, gradient_outside: bool) -> Tensor:
    return _empty_like(input)


def _fake_pixel_gradient(grad_output: Tensor, input: Tensor, *arguments: Any) -> Tensor:
    return _empty_like(input)


def _save_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, *ctx.arguments = inputs
    ctx.save_for_backward(input)


def _pixel_backward(name: str, kept: slice, ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    """The gradient of an operator of one tensor; the backward operator takes the ``kept`` ones of its arguments."""
    op = getattr(torch.ops.hdrops, f"_{name}_backward").default
    return op(grad_output, *ctx.saved_tensors, *ctx.arguments[kept]), *[None] * len(ctx.arguments)


def _vmap_folded(op: Any, info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    """Members of the batch are further images."""
    input = arguments[0].movedim(in_dims[0], 0)
    return op(input.flatten(0, 1), *arguments[1:]).unflatten(0, input.shape[:2]), 0


def _vmap_elementwise(op: Any, info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    return op(*arguments), in_dims[0]


def _register() -> None:
    library = torch.library
    library.register_fake("hdrops::crf_lookup", _fake_lookup)
    library.register_fake("hdrops::_crf_lookup_backward", _fake_lookup_backward)
    library.register_autograd("hdrops::crf_lookup", _lookup_backward, setup_context=_save_lookup)
    library.register_vmap("hdrops::crf_lookup", _vmap_lookup)
    one_input: dict[str, tuple[Callable[..., Any], slice, Callable[..., Any]]] = {
        "tent_histogram": (_fake_tents, slice(None), _vmap_folded),
        "value_histogram": (_fake_value_histogram, slice(None), _vmap_folded),
        "quantize_ste": (_fake_quantize, slice(1, None), _vmap_elementwise),
    }
    for name, (fake, kept, vmap) in one_input.items():
        library.register_fake(f"hdrops::{name}", fake)
        library.register_fake(f"hdrops::_{name}_backward", _fake_pixel_gradient)
        library.register_autograd(
            f"hdrops::{name}", functools.partial(_pixel_backward, name, kept), setup_context=_save_input
        )
        library.register_vmap(f"hdrops::{name}", functools.partial(vmap, getattr(torch.ops.hdrops, name).default))
    for name in ("crf_lookup", *one_input):
        backward = getattr(torch.ops.hdrops, f"_{name}_backward").default
        _common.refuse_double_backward(f"_{name}_backward")
        library.register_vmap(f"hdrops::_{name}_backward", _common.vmap_by_loop(backward))


_register()
