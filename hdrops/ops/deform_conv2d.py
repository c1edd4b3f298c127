"""``deform_conv2d``, OP-1: the public function and how its operators are registered with PyTorch.

A call travels: checks here -> backend -> ``torch.ops.hdrops.deform_conv2d`` -> autocast, vmap and autograd as
registered below -> the kernel of csrc/deform_conv2d/; or, all the same, ``torch.ops.hdrops._deform_conv2d_triton`` ->
the kernel of hdrops/triton/deform_conv2d.py. The backward operators compute only the gradients of their
``output_mask``.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hdrops import _backends, triton
from hdrops.ops import _common
from hdrops.reference import deform_conv2d as reference

_CAN_RUN = {
    "cpu": _backends.can_run_cpu,
    "cuda": _backends.can_run_cuda,
    "triton": _backends.can_run_triton,
    "reference": _backends.can_run_reference,
}


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    r"""Deformable convolution, with a mask in its modulated form (DCNv2); drop-in for torchvision's.

    A convolution whose tap :math:`k = (i, j)` reads at a place of its own for every output site:

    .. math::
        out[o, p] = bias_o + \sum_{c, k} weight[o, c, k] \; mask[k, p] \; B(input_c;\; y_k(p), x_k(p))

    with :math:`y_k(p) = p_y \cdot stride - padding + i \cdot dilation + offset_y[k, p]`, likewise for x, and B the
    bilinear sample of the image surrounded by zeros. A site with :math:`y \le -1`, :math:`y \ge H`, :math:`x \le -1`,
    :math:`x \ge W` or a NaN coordinate contributes zero and has no gradient.

    Args:
        input: float [N, C, H, W]; N may be 0. Its memory format (NCHW or channels_last) is the output's.
        offset: [N, 2*offset_groups*kh*kw, out_h, out_w] in pixels of the input: for each offset group and tap, row by
            row of the kernel, first y, then x. Each group moves C/offset_groups consecutive channels.
        weight: [O, C/groups, kh, kw], the input's dtype.
        bias: [O], the input's dtype, or None.
        stride: one integer, or one each for height and width; >= 1.
        padding: zeros on each side, >= 0.
        dilation: distance between taps, >= 1.
        mask: [N, offset_groups*kh*kw, out_h, out_w] or None for ones; any value, [0, 1] as published.
        backend: "cpu", "cuda", "triton", "reference", or None for the best that runs on the input's device.

    ``groups`` and ``offset_groups`` follow from the shapes. ``out_h`` is ``(H + 2*padding - dilation*(kh-1) - 1) //
    stride + 1``, likewise ``out_w``. The dtype is float64, float32, bfloat16 or float16; offset and mask have the
    input's or, beside a 16-bit input, float32, which offsets of more than a few pixels need. Coordinates and sums are
    float32 for 16-bit and 32-bit data. Under autocast input, weight and bias take the ambient dtype, offset and mask
    keep their precision.

    Returns:
        [N, O, out_h, out_w] in the input's dtype and memory format.

    Gradients flow to input, offset, weight, bias and mask, each computed only if asked for. At an integer coordinate
    the offset's is the right-hand derivative. On the CPU they are bitwise equal for any number of threads. Second
    derivatives, forward-mode AD and ``torch.func.grad`` raise; ``backend="reference"`` has them.

    Raises:
        ValueError: a wrong shape, value or device.
        TypeError: a wrong dtype or kind of argument.
        NotImplementedError: a backend that cannot run the call, or a derivative that the kernels do not have.

    Example:
        >>> import torch, hdrops
        >>> input, weight = torch.rand(1, 4, 8, 9), torch.rand(6, 4, 3, 3)
        >>> offset, mask = torch.zeros(1, 18, 8, 9), torch.ones(1, 9, 8, 9)
        >>> output = hdrops.deform_conv2d(input, offset, weight, padding=1, mask=mask)
        >>> torch.allclose(output, torch.conv2d(input, weight, padding=1), atol=1e-5)
        True

    References:
        Dai et al., Deformable Convolutional Networks, ICCV 2017, equation 2; Zhu et al., Deformable ConvNets v2, CVPR
        2019, equation 1.
    """
    op = "deform_conv2d"
    stride = _common.checked_pair(op, "stride", stride, 1)
    padding = _common.checked_pair(op, "padding", padding, 0)
    dilation = _common.checked_pair(op, "dilation", dilation, 1)
    _check_shapes(input, offset, weight, bias, mask, stride, padding, dilation)
    _common.check_devices(op, "input", input, offset=offset, weight=weight, bias=bias, mask=mask)
    ambient = _common.autocast_dtype(input)
    if ambient is not None:
        input, offset, weight, bias, mask = _follow_autocast(ambient, input, offset, weight, bias, mask)
    _check_dtypes(input, offset, weight, bias, mask)

    chosen = _backends.choose(op, input, backend, _CAN_RUN)
    if chosen == "reference":
        with contextlib.nullcontext() if ambient is None else torch.autocast(input.device.type, enabled=False):
            return reference.deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)
    _common.refuse_functional_transforms(op, input, offset, weight, bias, mask)
    kernels = torch.ops.hdrops._deform_conv2d_triton if chosen == "triton" else torch.ops.hdrops.deform_conv2d
    output: Tensor = kernels.default(input, offset, weight, bias, mask, stride, padding, dilation)
    return output


def output_size(
    input: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """Height and width of the output."""

    def size(axis: int) -> int:
        extent = dilation[axis] * (weight.shape[2 + axis] - 1) + 1
        return (input.shape[2 + axis] + 2 * padding[axis] - extent) // stride[axis] + 1

    return size(0), size(1)


def _check_shapes(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> None:
    op, shape_of = "deform_conv2d", _common.shape_of
    _common.check_dimensions(op, "input", input, "N, C, H, W")
    _common.check_dimensions(op, "offset", offset, "N, 2*offset_groups*kh*kw, out_h, out_w")
    _common.check_dimensions(op, "weight", weight, "O, C/groups, kh, kw")
    n, channels, height, width = input.shape
    out_channels, group_channels, kernel_h, kernel_w = weight.shape
    if channels < 1 or height < 1 or width < 1:
        raise ValueError(f"{op}: input must have at least one channel, row and column, got shape {shape_of(input)}")
    if out_channels < 1 or group_channels < 1 or kernel_h < 1 or kernel_w < 1:
        raise ValueError(f"{op}: weight must have no empty dimension, got shape {shape_of(weight)}")
    if channels % group_channels != 0:
        raise ValueError(
            f"{op}: weight's C/groups = {group_channels} must divide the input's {channels} channels "
            f"(input shape {shape_of(input)}, weight shape {shape_of(weight)})"
        )
    groups = channels // group_channels
    if out_channels % groups != 0:
        raise ValueError(
            f"{op}: weight's {out_channels} output channels must be a multiple of groups = "
            f"{channels}/{group_channels} = {groups} (weight shape {shape_of(weight)})"
        )
    for axis, name in enumerate(("height", "width")):
        extent = dilation[axis] * (weight.shape[2 + axis] - 1) + 1
        padded = input.shape[2 + axis] + 2 * padding[axis]
        if extent > padded:
            raise ValueError(
                f"{op}: the kernel's {name} dilation*(kernel-1)+1 = {extent} must not exceed the padded input's "
                f"{padded} (input shape {shape_of(input)}, weight shape {shape_of(weight)}, padding {padding}, "
                f"dilation {dilation})"
            )

    taps = kernel_h * kernel_w
    size = output_size(input, weight, stride, padding, dilation)
    _check_sites("offset", offset, n, size)
    if offset.shape[1] % (2 * taps) != 0 or offset.shape[1] == 0:
        raise ValueError(
            f"{op}: offset must have 2*offset_groups*kh*kw channels, a multiple of 2*{kernel_h}*{kernel_w} = "
            f"{2 * taps}, got {offset.shape[1]} (offset shape {shape_of(offset)})"
        )
    offset_groups = offset.shape[1] // (2 * taps)
    if channels % offset_groups != 0:
        raise ValueError(
            f"{op}: offset_groups = {offset.shape[1]}/{2 * taps} = {offset_groups} must divide the input's {channels} "
            f"channels (offset shape {shape_of(offset)}, input shape {shape_of(input)})"
        )
    if mask is not None:
        _common.check_dimensions(op, "mask", mask, "N, offset_groups*kh*kw, out_h, out_w")
        _check_sites("mask", mask, n, size)
        if mask.shape[1] != offset_groups * taps:
            raise ValueError(
                f"{op}: mask must have offset_groups*kh*kw = {offset_groups}*{kernel_h}*{kernel_w} = "
                f"{offset_groups * taps} channels, got {mask.shape[1]} (mask shape {shape_of(mask)}, offset shape "
                f"{shape_of(offset)})"
            )
    if bias is not None:
        _common.check_dimensions(op, "bias", bias, "O")
        if bias.shape[0] != out_channels:
            raise ValueError(
                f"{op}: bias must have one value for each of {out_channels} output channels, got {bias.shape[0]} "
                f"(bias shape {shape_of(bias)}, weight shape {shape_of(weight)})"
            )


def _check_sites(name: str, tensor: Tensor, n: int, size: tuple[int, int]) -> None:
    """Raises unless ``tensor`` (offset or mask) has the batch and the sites of the output."""
    if tensor.shape[0] != n:
        raise ValueError(
            f"deform_conv2d: {name} must have the input's batch {n}, got {tensor.shape[0]} "
            f"({name} shape {_common.shape_of(tensor)})"
        )
    if tensor.shape[2] != size[0] or tensor.shape[3] != size[1]:
        raise ValueError(
            f"deform_conv2d: {name} must have the output's size {size[0]} x {size[1]}, got {tensor.shape[2]} x "
            f"{tensor.shape[3]} ({name} shape {_common.shape_of(tensor)})"
        )


def _check_dtypes(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None) -> None:
    if input.dtype not in _common.FLOATING_DTYPES:
        raise TypeError(f"deform_conv2d: input must be float64, float32, bfloat16 or float16, got {input.dtype}")
    half = input.dtype in _common.HALF_DTYPES
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != input.dtype:
            raise TypeError(f"deform_conv2d: {name} must have the input's dtype {input.dtype}, got {tensor.dtype}")
    for name, tensor in (("offset", offset), ("mask", mask)):
        if tensor is not None and tensor.dtype != input.dtype and not (half and tensor.dtype == torch.float32):
            wanted = f"{input.dtype} or torch.float32" if half else f"{input.dtype}"
            raise TypeError(f"deform_conv2d: {name} must have the input's dtype {wanted}, got {tensor.dtype}")


def _follow_autocast(
    ambient: torch.dtype,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    *geometry: Any,
) -> tuple[Any, ...]:
    """The operator's arguments under autocast: data in the ambient dtype, offset and mask never rounded."""

    def keep(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or tensor.dtype == ambient else _common.cast(tensor, torch.float32)

    data = [_common.cast(tensor, ambient) for tensor in (input, weight, bias)]
    return data[0], keep(offset), data[1], data[2], keep(mask), *geometry


def _fake(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    shape = (input.shape[0], weight.shape[0], *output_size(input, weight, stride, padding, dilation))
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=_common.memory_format(input))


def _fake_backward(
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_mask: Sequence[bool],
    deterministic: bool,
) -> tuple[Tensor, ...]:
    def like(tensor: Tensor, wanted: bool, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
        shape = tensor.shape if wanted else (0,)
        memory_format = memory_format if wanted else torch.contiguous_format
        return torch.empty(shape, dtype=tensor.dtype, device=tensor.device, memory_format=memory_format)

    return (
        like(input, output_mask[0], _common.memory_format(input)),
        like(offset, output_mask[1]),
        like(weight, output_mask[2]),
        like(weight.new_empty(weight.shape[0]), output_mask[3]),
        like(input, False) if mask is None or not output_mask[4] else like(mask, True),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, offset, weight, _, mask, *ctx.geometry = inputs
    ctx.save_for_backward(input, offset, weight, mask)


def _triton_forward(
    input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, *others: Any
) -> Tensor:
    """The kernel of ``_deform_conv2d_triton``: the checks that the compiled one makes, then hdrops.triton's."""
    from hdrops.triton import deform_conv2d as kernels

    _check_call(input, offset, weight, bias, mask, *others[:3])
    return kernels.forward(input, offset, weight, bias, mask, *others)


def _triton_backward(
    grad_output: Tensor, input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, *others: Any
) -> tuple[Tensor, ...]:
    """The kernel of ``_deform_conv2d_triton_backward``."""
    from hdrops.triton import deform_conv2d as kernels

    _check_call(input, offset, weight, None, mask, *others[:3])
    shape = (input.shape[0], weight.shape[0], *offset.shape[2:])
    if grad_output.shape != shape or grad_output.dtype != input.dtype or grad_output.device != input.device:
        raise ValueError(
            f"deform_conv2d: grad_output must have shape {list(shape)} and the input's dtype {input.dtype} and device "
            f"{input.device}, got {_common.shape_of(grad_output)}, {grad_output.dtype} and {grad_output.device}"
        )
    return kernels.backward(grad_output, input, offset, weight, mask, *others)


def _check_call(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> None:
    """All checks of a call that came past the public function."""
    op = "deform_conv2d"
    steps = (
        _common.checked_pair(op, "stride", list(stride), 1),
        _common.checked_pair(op, "padding", list(padding), 0),
        _common.checked_pair(op, "dilation", list(dilation), 1),
    )
    _check_shapes(input, offset, weight, bias, mask, *steps)
    _common.check_devices(op, "input", input, offset=offset, weight=weight, bias=bias, mask=mask)
    _check_dtypes(input, offset, weight, bias, mask)


def _register(name: str, backward_name: str) -> None:
    """Registers all but the kernels of an operator with deform_conv2d's schema and of its backward operator."""
    op = getattr(torch.ops.hdrops, name).default
    backward_op = getattr(torch.ops.hdrops, backward_name).default

    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, offset, weight, mask = ctx.saved_tensors
        output_mask = list(ctx.needs_input_grad[:5])
        gradients = backward_op(
            grad_output,
            input,
            offset,
            weight,
            mask,
            *ctx.geometry,
            output_mask,
            torch.are_deterministic_algorithms_enabled(),
        )
        return *_common.none_if_unwanted(gradients, output_mask), None, None, None

    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        """Batches over images are folded into N; batches of weights are run one by one."""
        if in_dims[2] is not None or in_dims[3] is not None:
            return _common.vmap_by_loop(op)(info, in_dims, *arguments)
        input, offset, weight, bias, mask, *geometry = arguments

        def fold(tensor: Tensor | None, dim: int | None) -> Tensor | None:
            if tensor is None:
                return None
            batched = tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            return batched.flatten(0, 1)

        output = op(fold(input, in_dims[0]), fold(offset, in_dims[1]), weight, bias, fold(mask, in_dims[4]), *geometry)
        return output.unflatten(0, (info.batch_size, output.shape[0] // info.batch_size)), 0

    torch.library.register_fake(f"hdrops::{name}", _fake)
    torch.library.register_fake(f"hdrops::{backward_name}", _fake_backward)
    torch.library.register_autograd(f"hdrops::{name}", backward, setup_context=_setup_context)
    torch.library.register_autograd(f"hdrops::{backward_name}", _backends.refuse_double_backward("deform_conv2d"))
    _common.register_autocast(name, _follow_autocast)
    torch.library.register_vmap(f"hdrops::{name}", vmap)
    torch.library.register_vmap(f"hdrops::{backward_name}", _common.vmap_by_loop(backward_op))


triton.define_twin("_deform_conv2d_triton", "deform_conv2d", _triton_forward)
triton.define_twin("_deform_conv2d_triton_backward", "_deform_conv2d_backward", _triton_backward)
_register("deform_conv2d", "_deform_conv2d_backward")
_register("_deform_conv2d_triton", "_deform_conv2d_triton_backward")
