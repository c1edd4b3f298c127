"""Export to ONNX: deform_conv2d becomes the standard node DeformConv, which ONNX has since opset 19.

Operators without an ONNX form say so when a model with them is exported.
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
        torch.ops.hdrops.deform_conv2d.default: _deform_conv2d,
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
