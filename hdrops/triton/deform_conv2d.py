"""``deform_conv2d`` in Triton: how its kernels (``deform_conv2d_kernels``) are launched.

``forward`` and ``backward`` are the kernels of the operators ``hdrops::_deform_conv2d_triton`` and
``hdrops::_deform_conv2d_triton_backward``. :class:`Call` brings a call's tensors into the layouts that the kernels read
and plans their launches, which ``ahead_of_time`` compiles without making them.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hdrops.ops import _common
from hdrops.triton import configs
from hdrops.triton import deform_conv2d_kernels as kernels
from hdrops.triton.launch import Launch, device_class


def forward(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    allow_tf32: bool = False,
) -> Tensor:
    """The operator ``hdrops::_deform_conv2d_triton``; its arguments have been checked."""
    out_h, out_w = offset.shape[2:]
    shape = input.shape[0], weight.shape[0], out_h, out_w
    output = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=_common.memory_format(input))
    call = Call(input, offset, weight, mask, stride, padding, dilation, allow_tf32)
    with torch.cuda.device_of(input):
        call.plan_forward(bias, output).run()
    return output


def backward(
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
    allow_tf32: bool = False,
) -> tuple[Tensor, ...]:
    """The operator ``hdrops::_deform_conv2d_triton_backward``; its arguments have been checked."""
    grad_output = grad_output.contiguous(memory_format=_common.memory_format(input))
    call = Call(input, offset, weight, mask, stride, padding, dilation, allow_tf32)
    wanted_input, wanted_offset, wanted_weight, wanted_bias, wanted_mask = output_mask
    grad_offset = _fresh(offset) if wanted_offset else None
    grad_mask = _fresh(mask) if wanted_mask and mask is not None else None
    grad_input = grad_weight = grad_bias = None
    with torch.cuda.device_of(input):
        sums = InputSums(call, grad_output, deterministic) if wanted_input else None
        if wanted_input or grad_offset is not None or grad_mask is not None:
            call.plan_backward_data(grad_output, sums, grad_offset, grad_mask).run()
        if sums is not None:
            grad_input = sums.result(input)
        if wanted_weight:
            grad_weight = _weight_gradient(call, grad_output)
        if wanted_bias:
            grad_bias = grad_output.sum((0, 2, 3), dtype=call.real).to(weight.dtype)
    return (
        input.new_empty(0) if grad_input is None else grad_input,
        offset.new_empty(0) if grad_offset is None else grad_offset,
        weight.new_empty(0) if grad_weight is None else grad_weight,
        weight.new_empty(0) if grad_bias is None else grad_bias,
        input.new_empty(0) if grad_mask is None else grad_mask,
    )


def _fresh(tensor: Tensor) -> Tensor:
    """Memory of a tensor's shape, contiguous."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _weight_gradient(call: "Call", grad_output: Tensor) -> Tensor:
    """The partial sums of the splits, and their sum in fixed order."""
    launch = call.plan_backward_weight(grad_output)
    launch.run()
    taps_first = launch.arguments["partial"].sum(0)
    gradient = _fresh(call.weight)
    gradient.copy_(taps_first.permute(2, 1, 0).reshape(gradient.shape))
    return gradient


# From how many channels on an NCHW input is first brought into channels_last. Below, a channel's pixels are read as
# they lie; above, a thread should find its neighbours in the next channels, not in pixels that the offsets scatter.
_CHANNELS_LAST_FROM = 16
# Programs of the weight gradient's kernel: some for each multiprocessor of any GPU, and the same on every GPU.
_WEIGHT_PROGRAMS = 1024


class Call:
    """A call's tensors in the layouts of the kernels, and the launches it takes."""

    def __init__(
        self,
        input: Tensor,
        offset: Tensor,
        weight: Tensor,
        mask: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        allow_tf32: bool,
    ) -> None:
        _, in_channels, height, width = input.shape
        out_channels, group_channels, kernel_h, kernel_w = weight.shape
        out_h, out_w = offset.shape[2:]
        taps = kernel_h * kernel_w
        offset_groups = offset.shape[1] // (2 * taps)
        gathered = torch.channels_last if in_channels >= _CHANNELS_LAST_FROM else _common.memory_format(input)
        self.input = input.contiguous(memory_format=gathered)
        self.offset, self.weight = offset.contiguous(), weight
        self.mask = None if mask is None else mask.contiguous()
        self.geometry = kernels.Geometry(height, width, out_h, out_w, kernel_w, *stride, *padding, *dilation)
        groups = in_channels // group_channels
        self.channels = kernels.Channels(
            taps, groups, group_channels, out_channels // groups, offset_groups, in_channels // offset_groups
        )
        self.run = math.gcd(group_channels, self.channels.offset_channels)
        self.real = torch.float64 if input.dtype == torch.float64 else torch.float32
        self.arithmetic = {torch.float64: "double", torch.float32: "tf32" if allow_tf32 else "float"}.get(
            input.dtype, "half"
        )

    def plan_forward(self, bias: Tensor | None, output: Tensor, device: str | None = None) -> Launch:
        """The launch that fills ``output``."""
        config, tiles, constants = self._tiles("forward", device)
        out_channels, group_channels = self.weight.shape[:2]
        arguments = {
            "weight": self.weight.reshape(out_channels, group_channels, -1).permute(2, 1, 0).contiguous(),
            "bias": None if bias is None else bias.contiguous(),
            "output": output,
            "output_strides": kernels.Strides(*output.stride()),
        }
        blocks = triton.cdiv(self.channels.group_outputs, config.outputs)
        programs = self.input.shape[0] * tiles * self.channels.groups * blocks
        return Launch(kernels.forward_kernel, programs, {**self._arguments(tiles), **arguments, **constants}, config)

    def plan_backward_data(
        self,
        grad_output: Tensor,
        sums: "InputSums | None",
        grad_offset: Tensor | None,
        grad_mask: Tensor | None,
        device: str | None = None,
    ) -> Launch:
        """The launch for the gradients of input, offset and mask, None for those not wanted."""
        config, tiles, constants = self._tiles("backward_data", device)
        out_channels, group_channels = self.weight.shape[:2]
        arguments: dict[str, object] = {
            "weight": self.weight.reshape(out_channels, group_channels, -1).permute(2, 0, 1).contiguous(),
            "grad_input": None if sums is None else sums.values,
            "scale": None if sums is None else sums.scale,
            "grad_offset": grad_offset,
            "grad_mask": grad_mask,
            "grad_output": grad_output,
            "grad_output_strides": kernels.Strides(*grad_output.stride()),
        }
        programs = self.input.shape[0] * tiles * self.channels.offset_groups * self.channels.taps
        arguments = {**self._arguments(tiles), **arguments, **constants}
        return Launch(kernels.backward_data_kernel, programs, arguments, config)

    def plan_backward_weight(self, grad_output: Tensor, device: str | None = None) -> Launch:
        """The launch for the weight gradient's partial sums."""
        config, tiles, constants = self._tiles("backward_weight", device)
        channels, total = self.channels, self.input.shape[0] * tiles
        blocks = triton.cdiv(self.run, config.channels) * triton.cdiv(channels.group_outputs, config.outputs)
        owners = channels.taps * channels.groups * (channels.group_channels // self.run) * blocks
        tiles_per_split = triton.cdiv(max(total, 1), min(max(total, 1), triton.cdiv(_WEIGHT_PROGRAMS, owners)))
        splits = triton.cdiv(total, tiles_per_split)
        shape = splits, channels.taps, channels.group_channels, self.weight.shape[0]
        arguments = {
            "partial": torch.empty(shape, dtype=self.real, device=self.input.device),
            "grad_output": grad_output,
            "grad_output_strides": kernels.Strides(*grad_output.stride()),
            "total_tiles": total,
            "tiles_per_split": tiles_per_split,
        }
        arguments = {**self._arguments(tiles), **arguments, **constants}
        return Launch(kernels.backward_weight_kernel, splits * owners, arguments, config)

    def _tiles(self, kernel: str, device: str | None) -> tuple[configs.Config, int, dict[str, object]]:
        """A kernel's configuration, the tiles of an image, and the kernel's compile-time arguments."""
        config = configs.choose(
            kernel,
            device or device_class(self.input.device),
            self.arithmetic,
            self.run,
            self.channels.group_outputs,
        )
        out_h, out_w = self.geometry.out_height, self.geometry.out_width
        tile_h, tile_w = configs.tile_shape(config.pixels, out_h, out_w)
        constants = {
            "RUN": self.run,
            "TILE_H": tile_h,
            "TILE_W": tile_w,
            "BLOCK_C": config.channels,
            "BLOCK_O": config.outputs,
            "REAL": tl.float64 if self.real == torch.float64 else tl.float32,
            "PRECISION": "tf32" if self.arithmetic == "tf32" else "ieee",
        }
        return config, triton.cdiv(out_h, tile_h) * triton.cdiv(out_w, tile_w), constants

    def _arguments(self, tiles: int) -> dict[str, object]:
        """What every kernel is told."""
        return {
            "input": self.input,
            "offset": self.offset,
            "mask": self.mask,
            "geometry": self.geometry,
            "channels": self.channels,
            "input_strides": kernels.Strides(*self.input.stride()),
            "pixel_tiles": tiles,
        }


class InputSums:
    """The input gradient's sums, to which programs add in any order.

    In floating point the order shows in the last bits. ``deterministic`` sums are int64 numbers of a unit so large that
    they cannot overflow: no contribution exceeds ``bound``, and each tap of each site adds to a pixel at most once.
    """

    def __init__(self, call: Call, grad_output: Tensor, deterministic: bool) -> None:
        if deterministic and call.real == torch.float64:
            raise NotImplementedError(
                "deform_conv2d: the triton backend has no deterministic input gradient in float64; "
                "backend='reference' has"
            )
        dtype = torch.int64 if deterministic else call.real
        self.values = torch.empty_strided(
            call.input.shape, call.input.stride(), dtype=dtype, device=call.input.device
        ).zero_()
        self.scale: Tensor | None = None
        if deterministic and self.values.numel() > 0:
            sums = call.weight.double().reshape(call.channels.groups, call.channels.group_outputs, -1).abs().sum(1)
            self.bound = grad_output.abs().amax().double() * sums.amax()
            if call.mask is not None:
                self.bound = self.bound * call.mask.abs().amax().double()
            most = call.channels.taps * call.geometry.out_height * call.geometry.out_width
            exponent = (61 - math.ceil(math.log2(most)) - self.bound.log2().ceil()).clamp(-126, 126)
            self.scale = exponent.exp2().to(call.real)

    def result(self, input: Tensor) -> Tensor:
        """The gradient in the input's type and layout."""
        values = self.values
        if self.scale is not None:
            values = torch.where(self.bound.isfinite(), values.double() / self.scale.double(), torch.nan)
        gradient = torch.empty(
            input.shape, dtype=input.dtype, device=input.device, memory_format=_common.memory_format(input)
        )
        return gradient.copy_(values)
