"""global_context (OP-2) against the composition of torch operators that mmcv's ContextBlock is."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import hdrops
from benches.registry import Case, Contenders

# name: batch, channels, height, width, as in anchors' tables; the bottleneck has half the channels
SHAPES = {
    "G1 1x64 540x960": (1, 64, 540, 960),
    "G2 4x64 256x256": (4, 64, 256, 256),
    "G3 1x64 1080x1920": (1, 64, 1080, 1920),
    "G4 16x256 56x56": (16, 256, 56, 56),
}


def make(shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """Arguments of ``hdrops.global_context``, with logits of moderate size."""
    n, c, h, w = shape
    generator = torch.Generator().manual_seed(0)
    hidden = c // 2

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    weights = [normal(c) / c**0.5, normal(1), normal(hidden, c) / c**0.5, normal(hidden), normal(hidden)]
    return [normal(n, c, h, w), *weights, normal(hidden), normal(c, hidden) / hidden**0.5, normal(c)]


def composition(
    input: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    squeeze_weight: Tensor,
    squeeze_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    excite_weight: Tensor,
    excite_bias: Tensor,
    fusion: str = "add",
) -> Tensor:
    """mmcv's block, operator by operator."""
    n, c, h, w = input.shape
    logits = F.conv2d(input, key_weight.view(1, c, 1, 1), key_bias).view(n, 1, h * w)
    attention = logits.softmax(2).unsqueeze(-1)
    context = torch.matmul(input.view(n, c, h * w).unsqueeze(1), attention).view(n, c, 1, 1)
    hidden = F.conv2d(context, squeeze_weight[:, :, None, None], squeeze_bias)
    hidden = F.layer_norm(hidden, hidden.shape[1:], norm_weight[:, None, None], norm_bias[:, None, None]).relu()
    change = F.conv2d(hidden, excite_weight[:, :, None, None], excite_bias)
    return input + change if fusion == "add" else input * change.sigmoid()


def forward_of(function: Callable[..., Tensor], tensors: list[Tensor], fusion: str) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return function(*tensors, fusion=fusion)

    return run


def backward_of(function: Callable[..., Tensor], tensors: list[Tensor], fusion: str) -> Callable[[], object]:
    """Forward and all nine gradients."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    grad = torch.randn_like(tensors[0])
    return lambda: torch.autograd.grad(function(*leaves, fusion=fusion), leaves, grad)


def contenders(shape: tuple[int, int, int, int], backward: bool, dtype: torch.dtype, fusion: str) -> Contenders:
    tensors = make(shape, dtype)
    last = [tensors[0].contiguous(memory_format=torch.channels_last), *tensors[1:]]
    wrap = backward_of if backward else forward_of
    return {
        "hdrops": wrap(hdrops.global_context, tensors, fusion),
        "hdrops channels_last": wrap(hdrops.global_context, last, fusion),
        "torch composition": wrap(composition, tensors, fusion),
    }


def case(
    key: str,
    backward: bool,
    goal: float | None = None,
    dtype: torch.dtype = torch.float32,
    fusion: str = "add",
    threads: tuple[int, ...] = (1,),
) -> Case:
    n, c, h, w = shape = SHAPES[key]
    # Forward: read for pooling, read and write for fusion. Backward: grad_output for the bottleneck (and the input
    # where it is multiplied), then both again and the gradient.
    passes = 3 + ((4 if fusion == "add" else 5) if backward else 0)
    kind = str(dtype).removeprefix("torch.")
    return Case(
        name=f"global_context {fusion} {'forward+backward' if backward else 'forward'} {kind} {key}",
        build=lambda: contenders(shape, backward, dtype, fusion),
        goals={} if goal is None else {"torch composition": goal},
        bytes=passes * n * c * h * w * torch.finfo(dtype).bits // 8,
        threads=threads,
    )


CASES = [
    case("G1 1x64 540x960", False, 4, threads=(1, 2)),
    case("G1 1x64 540x960", True, 6, threads=(1, 2)),
    case("G1 1x64 540x960", False, 4, fusion="mul"),
    case("G1 1x64 540x960", True, 6, fusion="mul"),
    case("G1 1x64 540x960", False, dtype=torch.bfloat16),
    case("G2 4x64 256x256", False, 4),
    case("G2 4x64 256x256", True),
    case("G3 1x64 1080x1920", False),
    case("G4 16x256 56x56", False),
]
