"""Global context in Triton: how its kernels (``global_context_kernels``) are launched.

The functions are the kernels of ``hdrops::_context_pool_triton``, ``hdrops::_global_context_triton`` and their backward
operators. :class:`Plan` describes the launches, which ``ahead_of_time`` compiles without making them.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hdrops.ops import _common
from hdrops.triton import global_context_kernels as kernels
from hdrops.triton.configs import Config
from hdrops.triton.launch import Launch

_TILE = 4096  # elements of float32: 16 registers a thread of 8 warps, and as many for the sums
_WARPS = 8
_PROGRAMS = 528  # of a pass over pixels: four for each multiprocessor of the largest GPUs
_MOST_SPLITS = 512


def pool(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The operator ``hdrops::_context_pool_triton``; its arguments have been checked."""
    plan = Plan(input, 0)
    context = input.new_empty(input.shape[:2])
    state = plan.new_state()
    with torch.cuda.device_of(input):
        partials = plan.new_partials(input.shape[1] + 2)
        plan.pool(weight, partials).run()
        plan.bottleneck(partials, bias, state, context, [None] * 6).run()
    return context, state


def pool_backward(
    grad_context: Tensor, input: Tensor, weight: Tensor, state: Tensor, output_mask: Sequence[bool]
) -> tuple[Tensor, ...]:
    """The operator ``hdrops::_context_pool_triton_backward``; its arguments have been checked."""
    with torch.cuda.device_of(input):
        plan = Plan(input, 0)
        return plan.run_gradient(None, weight, state, grad_context.to(plan.real).contiguous(), output_mask)


def forward(
    input: Tensor,
    key_weight: Tensor,
    key_bias: Tensor | None,
    squeeze_weight: Tensor,
    squeeze_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    excite_weight: Tensor,
    excite_bias: Tensor,
    fusion: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The operator ``hdrops::_global_context_triton``; its arguments have been checked."""
    plan = Plan(input, squeeze_weight.shape[0], fusion == "mul")
    output = torch.empty_like(plan.input)
    state = plan.new_state()
    parameters = [squeeze_weight, squeeze_bias, norm_weight, norm_bias, excite_weight, excite_bias]
    with torch.cuda.device_of(input):
        partials = plan.new_partials(input.shape[1] + 2)
        plan.pool(key_weight, partials).run()
        plan.bottleneck(partials, key_bias, state, None, [p.contiguous() for p in parameters], eps).run()
        plan.fuse(state, output).run()
    return output, state


def backward(
    grad_output: Tensor,
    input: Tensor,
    key_weight: Tensor,
    squeeze_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    excite_weight: Tensor,
    state: Tensor,
    fusion: str,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The operator ``hdrops::_global_context_triton_backward``; its arguments have been checked."""
    channels, hidden = input.shape[1], squeeze_weight.shape[0]
    plan = Plan(input, hidden, fusion == "mul")
    grad_output = grad_output.contiguous(memory_format=_common.memory_format(input))
    with torch.cuda.device_of(input):
        partials = plan.new_partials(channels)
        plan.total(grad_output, partials).run()
        grad_change, grad_context = plan.new_rows(channels), plan.new_rows(channels)
        grad_affine, grad_squeezed, activations = (plan.new_rows(hidden) for _ in range(3))
        rows = [grad_change, grad_affine, grad_squeezed, activations, grad_context]
        parameters = [p.contiguous() for p in (squeeze_weight, norm_weight, norm_bias, excite_weight)]
        plan.bottleneck_backward(partials, state, parameters, rows).run()
        grad_input, grad_key = plan.run_gradient(grad_output, key_weight, state, grad_context, output_mask[:2])
        context, normalised = state[:, :channels], state[:, channels + 3 : channels + 3 + hidden]
        found = [
            (grad_squeezed[:, :, None] * context[:, None, :]).sum(0) if output_mask[2] else None,
            grad_squeezed.sum(0) if output_mask[3] else None,
            (grad_affine * normalised).sum(0) if output_mask[4] else None,
            grad_affine.sum(0) if output_mask[5] else None,
            (grad_change[:, :, None] * activations[:, None, :]).sum(0) if output_mask[6] else None,
            grad_change.sum(0) if output_mask[7] else None,
        ]
    return grad_input, grad_key, *(input.new_empty(0) if g is None else g.to(input.dtype) for g in found)


class Plan:
    """The launches of a call on ``input``, read in its own layout."""

    def __init__(self, input: Tensor, hidden: int, multiply: bool = False) -> None:
        self.input = input.contiguous(memory_format=_common.memory_format(input))
        self.multiply = multiply
        self.hidden = hidden
        self.real = torch.float64 if input.dtype == torch.float64 else torch.float32
        n, channels, height, width = input.shape
        block_c = triton.next_power_of_2(channels)
        most = _TILE // 2 if self.real == torch.float64 else _TILE
        block_p = min(max(8, most // block_c), 256, max(8, triton.next_power_of_2(height * width)))
        self.config = Config(pixels=block_p, channels=block_c, outputs=16, warps=_WARPS, stages=1)
        tiles = triton.cdiv(height * width, block_p)
        splits = min(tiles, _MOST_SPLITS, max(1, triton.cdiv(_PROGRAMS, max(n, 1))))
        tiles_per_split = triton.cdiv(tiles, splits)
        self.splits = triton.cdiv(tiles, tiles_per_split)
        step_c, step_p = (1, channels) if _common.memory_format(input) == torch.channels_last else (height * width, 1)
        size = channels * height * width
        self.image = kernels.Image(channels, height * width, size, step_c, step_p, self.splits, tiles_per_split)
        self.state_size = 2 * channels + hidden + 3 if hidden else channels + 2
        self._tile = {"BLOCK_C": block_c, "BLOCK_P": block_p, "REAL": self._real}
        self._fusion = {
            "change_at": channels + 3 + hidden,
            "state_size": self.state_size,
            "MULTIPLY": multiply,
        }

    @property
    def _real(self) -> tl.dtype:
        return tl.float64 if self.real == torch.float64 else tl.float32

    def new_state(self) -> Tensor:
        """What the forward pass leaves for the backward."""
        return self.new_rows(self.state_size)

    def new_rows(self, size: int) -> Tensor:
        """A row of that size for each image."""
        return torch.empty((self.input.shape[0], size), dtype=self.real, device=self.input.device)

    def new_partials(self, size: int) -> Tensor:
        """A row of that size for each split of each image."""
        return torch.empty((self.input.shape[0], self.splits, size), dtype=self.real, device=self.input.device)

    def pool(self, key: Tensor, partials: Tensor) -> Launch:
        arguments: dict[str, object] = {
            "input": self.input,
            "key": key.contiguous(),
            "partials": partials,
            "image": self.image,
        }
        return self._pass(kernels.pool_kernel, arguments)

    def bottleneck(
        self,
        partials: Tensor,
        key_bias: Tensor | None,
        state: Tensor,
        context: Tensor | None,
        parameters: Sequence[Tensor | None],
        eps: float = 0.0,
    ) -> Launch:
        """``parameters``: weight and bias of squeeze, norm and excite, or None for each."""
        names = ("squeeze_weight", "squeeze_bias", "norm_weight", "norm_bias", "excite_weight", "excite_bias")
        arguments: dict[str, object] = {
            "partials": partials,
            "key_bias": key_bias,
            "state": state,
            "context": context,
            **dict(zip(names, parameters, strict=True)),
            "EPS": eps,
        }
        return self._image_by_image(kernels.bottleneck_kernel, arguments)

    def fuse(self, state: Tensor, output: Tensor) -> Launch:
        arguments: dict[str, object] = {
            "input": self.input,
            "state": state,
            "output": output,
            "image": self.image,
            **self._fusion,
        }
        programs = self.input.shape[0] * triton.cdiv(self.image.pixels, self.config.pixels)
        return Launch(kernels.fuse_kernel, programs, {**arguments, **self._tile}, self.config)

    def total(self, grad_output: Tensor, partials: Tensor) -> Launch:
        pixels = self.input if self.multiply else None
        arguments: dict[str, object] = {
            "grad_output": grad_output,
            "input": pixels,
            "partials": partials,
            "image": self.image,
        }
        return self._pass(kernels.total_kernel, arguments)

    def bottleneck_backward(
        self, partials: Tensor, state: Tensor, parameters: Sequence[Tensor], rows: Sequence[Tensor]
    ) -> Launch:
        """``parameters``: squeeze and norm weight, norm bias, excite weight; ``rows``: the kernel's results."""
        names = ("squeeze_weight", "norm_weight", "norm_bias", "excite_weight")
        results = ("grad_change", "grad_affine", "grad_squeezed", "activations", "grad_context")
        arguments: dict[str, object] = {
            "partials": partials,
            "state": state.contiguous(),
            **dict(zip(names, parameters, strict=True)),
            **dict(zip(results, rows, strict=True)),
        }
        return self._image_by_image(kernels.bottleneck_backward_kernel, arguments)

    def gradient(
        self,
        grad_output: Tensor | None,
        key: Tensor,
        state: Tensor,
        grad_context: Tensor,
        grad_input: Tensor | None,
        key_partials: Tensor | None,
    ) -> Launch:
        arguments: dict[str, object] = {
            "grad_output": grad_output,
            "input": self.input,
            "key": key.contiguous(),
            "state": state.contiguous(),
            "grad_context": grad_context,
            "grad_input": grad_input,
            "key_partials": key_partials,
            "image": self.image,
            **self._fusion,
        }
        return self._pass(kernels.gradient_kernel, arguments)

    def run_gradient(
        self,
        grad_output: Tensor | None,
        key: Tensor,
        state: Tensor,
        grad_context: Tensor,
        wanted: Sequence[bool],
    ) -> tuple[Tensor, Tensor]:
        """The gradients of input and key weight, empty where they are not wanted."""
        grad_input = torch.empty_like(self.input) if wanted[0] else None
        key_partials = self.new_partials(self.image.channels) if wanted[1] else None
        if wanted[0] or wanted[1]:
            self.gradient(grad_output, key, state, grad_context, grad_input, key_partials).run()
        empty = self.input.new_empty(0)
        grad_key = empty if key_partials is None else key_partials.sum((0, 1)).to(key.dtype)
        return empty if grad_input is None else grad_input, grad_key

    def _pass(self, kernel: triton.JITFunction, arguments: dict[str, object]) -> Launch:
        """A kernel of one program for each split."""
        return Launch(kernel, self.input.shape[0] * self.splits, {**arguments, **self._tile}, self.config)

    def _image_by_image(self, kernel: triton.JITFunction, arguments: dict[str, object]) -> Launch:
        block_h = max(1, triton.next_power_of_2(self.hidden))
        block_s = triton.next_power_of_2(self.splits)
        chunk = min(self.config.channels, max(1, _TILE // 2 // max(block_h, block_s)))
        constants = {
            "image": self.image,
            "hidden": self.hidden,
            "state_size": self.state_size,
            "MULTIPLY": self.multiply,
            "BLOCK_S": block_s,
            "BLOCK_H": block_h,
            "CHUNK": chunk,
            "REAL": self._real,
        }
        return Launch(kernel, self.input.shape[0], {**arguments, **constants}, self.config)
