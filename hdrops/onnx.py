"""Export to ONNX: deform_conv2d becomes the standard node DeformConv, which ONNX has since opset 19, and the global
context operators a few standard nodes. Operators without an ONNX form say so when a model with them is exported.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

MINIMUM_OPSET = 19


def translation_table(opset_version: int = MINIMUM_OPSET) -> dict[Callable[..., Any], Callable[..., Any]]:
    """For ``torch.onnx.export(..., dynamo=True, custom_translation_table=...)``: each operator's ONNX form.

    Needs the package onnxscript. The numbers of channels of input, weight and offset must be static.

    Args:
        opset_version: what the same call of ``torch.onnx.export`` gets. Below 19 the exporter would write an invalid
            model without a word.

    Raises:
        ValueError: ``opset_version`` has no DeformConv.
    """
    if opset_version < MINIMUM_OPSET:
        raise ValueError(
            f"hdrops.onnx: opset_version must be >= {MINIMUM_OPSET}, the first with DeformConv, got {opset_version}"
        )
    return {
        torch.ops.hdrops.context_pool.default: _context_pool,
        torch.ops.hdrops.deform_conv2d.default: _deform_conv2d,
        torch.ops.hdrops.global_context.default: _global_context,
        torch.ops.hdrops.patch_match.default: _refuse("patch_match"),
        torch.ops.hdrops.patch_swap.default: _refuse("patch_swap"),
    }


def export(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    path: str | Path | None = None,
    *,
    opset_version: int = MINIMUM_OPSET,
    custom_translation_table: Mapping[Callable[..., Any], Any] | None = None,
    **options: Any,
) -> Any:
    """``torch.onnx.export(model, args, path, dynamo=True, ...)`` with the translations of hdrops added.

    Returns:
        torch's ONNXProgram.

    Raises:
        ValueError: ``opset_version`` has no DeformConv.
    """
    table = {**translation_table(opset_version), **(custom_translation_table or {})}
    return torch.onnx.export(
        model, args, path, dynamo=True, opset_version=opset_version, custom_translation_table=table, **options
    )


def _deform_conv2d(
    input: Any,
    offset: Any,
    weight: Any,
    bias: Any,
    mask: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    allow_tf32: bool = False,
) -> Any:
    """DeformConv has the operator's border rule and its order of offset channels."""
    from onnxscript import opset19

    kernel_h, kernel_w = weight.shape[2], weight.shape[3]
    return opset19.DeformConv(
        input,
        weight,
        offset,
        bias,
        mask,
        dilations=list(dilation),
        group=input.shape[1] // weight.shape[1],
        kernel_shape=[kernel_h, kernel_w],
        offset_group=offset.shape[1] // (2 * kernel_h * kernel_w),
        pads=[*padding, *padding],
        strides=list(stride),
    )


def _refuse(op: str) -> Callable[..., Any]:
    """The translation of an operator that no composition of ONNX nodes replaces in reasonable memory."""

    def translate(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"hdrops.onnx: {op} cannot be exported: ONNX has no form of it")

    return translate


def _context(input: Any, weight: Any, bias: Any) -> Any:
    """Softmax pooling [N, C] of [N, C, H, W] in standard nodes."""
    from onnxscript import opset19 as op

    pixels = op.Reshape(input, op.Constant(value_ints=[0, 0, -1]))
    logits = op.MatMul(op.Unsqueeze(weight, op.Constant(value_ints=[0])), pixels)
    if bias is not None:
        logits = op.Add(logits, bias)
    weights = op.Transpose(op.Softmax(logits, axis=-1), perm=[0, 2, 1])
    return op.Reshape(op.MatMul(pixels, weights), op.Constant(value_ints=[0, -1]))


def _context_pool(input: Any, weight: Any, bias: Any) -> tuple[Any, Any]:
    """The second result, for the backward pass, is not used in an exported graph."""
    from onnxscript import opset19 as op

    context = _context(input, weight, bias)
    return context, op.Identity(context)


def _global_context(
    input: Any,
    key_weight: Any,
    key_bias: Any,
    squeeze_weight: Any,
    squeeze_bias: Any,
    norm_weight: Any,
    norm_bias: Any,
    excite_weight: Any,
    excite_bias: Any,
    fusion: str,
    eps: float,
) -> tuple[Any, Any]:
    """The second result, for the backward pass, is not used in an exported graph."""
    from onnxscript import opset19 as op

    context = _context(input, key_weight, key_bias)
    hidden = op.Gemm(context, squeeze_weight, squeeze_bias, transB=1)
    normalised, _, _ = op.LayerNormalization(hidden, norm_weight, norm_bias, axis=-1, epsilon=eps)
    change = op.Gemm(op.Relu(normalised), excite_weight, excite_bias, transB=1)
    change = op.Unsqueeze(change, op.Constant(value_ints=[2, 3]))
    return (op.Add(input, change) if fusion == "add" else op.Mul(input, op.Sigmoid(change))), op.Identity(context)
