"""Global context (OP-2) in plain PyTorch: softmax attention pooling, a bottleneck, and fusion with the pixels."""

import torch
from torch import Tensor
from torch.nn import functional as F


def context_pool(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`hdrops.context_pool`, differentiable any number of times."""
    return _pool(_precise(input), _precise(weight), None if bias is None else _precise(bias)).to(input.dtype)


def global_context(
    input: Tensor,
    key_weight: Tensor,
    key_bias: Tensor | None,
    squeeze_weight: Tensor,
    squeeze_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    excite_weight: Tensor,
    excite_bias: Tensor,
    *,
    fusion: str = "add",
    eps: float = 1e-5,
) -> Tensor:
    """:func:`hdrops.global_context`, differentiable any number of times."""
    image = _precise(input)
    context = _pool(image, _precise(key_weight), None if key_bias is None else _precise(key_bias))
    hidden = F.linear(context, _precise(squeeze_weight), _precise(squeeze_bias))
    hidden = F.layer_norm(hidden, hidden.shape[1:], _precise(norm_weight), _precise(norm_bias), eps).relu()
    change = F.linear(hidden, _precise(excite_weight), _precise(excite_bias))[:, :, None, None]
    return (image + change if fusion == "add" else image * change.sigmoid()).to(input.dtype)


def _precise(tensor: Tensor) -> Tensor:
    """16-bit formats are computed in float32."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _pool(image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    pixels = image.flatten(2)
    logits = weight @ pixels if bias is None else weight @ pixels + bias
    return (pixels @ logits.softmax(1)[:, :, None])[:, :, 0]
