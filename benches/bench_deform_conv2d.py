"""deform_conv2d (OP-1) against torchvision, ONNX Runtime and, as the floor, a dense convolution of the same shape."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import hdrops
from benches.registry import Case, Contenders, optional

# name: batch, channels (in and out), height, width, offset groups; 3x3 kernels, as in anchors' tables
SHAPES = {
    "S1 1x32 256x256 dg1": (1, 32, 256, 256, 1),
    "S2 1x64 256x256 dg1": (1, 64, 256, 256, 1),
    "S3 1x64 256x256 dg8": (1, 64, 256, 256, 8),
    "S4 4x64 128x128 dg1": (4, 64, 128, 128, 1),
    "S5 16x32 64x64 dg1": (16, 32, 64, 64, 1),
    "S6 1x64 540x960 dg8": (1, 64, 540, 960, 8),
}


def make(shape: tuple[int, int, int, int, int], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Inputs with offsets of a few pixels, as a trained network has; channels last where it matters."""
    n, c, h, w, groups = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    return {
        "input": normal(n, c, h, w).to(dtype),
        "offset": normal(n, 18 * groups, h, w) * 2,
        "weight": (normal(c, c, 3, 3) / (9 * c) ** 0.5).to(dtype),
        "bias": normal(c).to(dtype),
        "mask": torch.rand(n, 9 * groups, h, w, generator=generator),
    }


def forward_of(function: Callable[..., Tensor], t: dict[str, Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return function(t["input"], t["offset"], t["weight"], t["bias"], padding=1, mask=t["mask"])

    return run


def backward_of(function: Callable[..., Tensor], t: dict[str, Tensor]) -> Callable[[], object]:
    """Forward and all five gradients."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in t.items()}
    # 3x3 with padding 1 keeps the size, and as many channels go out as come in.
    grad = torch.randn_like(t["input"])

    def run() -> object:
        out = function(
            leaves["input"], leaves["offset"], leaves["weight"], leaves["bias"], padding=1, mask=leaves["mask"]
        )
        return torch.autograd.grad(out, list(leaves.values()), grad)

    return run


def dense(t: dict[str, Tensor], backward: bool) -> Callable[[], object]:
    x, weight, bias = (t[name].detach().clone() for name in ("input", "weight", "bias"))
    if not backward:
        return lambda: F.conv2d(x, weight, bias, padding=1)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    grad = torch.randn_like(x)
    return lambda: torch.autograd.grad(F.conv2d(*leaves, padding=1), leaves, grad)


def onnxruntime_session(t: dict[str, Tensor]) -> Callable[[], object] | None:
    """DeformConv-19 in ONNX Runtime on the same tensors, with torch's number of threads."""
    onnx, runtime = optional("onnx"), optional("onnxruntime")
    if onnx is None or runtime is None:
        return None
    groups = t["mask"].shape[1] // 9
    names = {"X": "input", "W": "weight", "offset": "offset", "B": "bias", "mask": "mask"}
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    node = helper.make_node(
        "DeformConv", list(names), ["Y"], pads=[1, 1, 1, 1], offset_group=groups, kernel_shape=[3, 3]
    )
    inputs = [helper.make_tensor_value_info(k, kind, list(t[v].shape)) for k, v in names.items()]
    graph = helper.make_graph([node], "deform", inputs, [helper.make_tensor_value_info("Y", kind, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {k: t[v].numpy() for k, v in names.items()}
    return lambda: session.run(None, feeds)


def channels_last(t: dict[str, Tensor]) -> dict[str, Tensor]:
    last = {"input", "weight"}
    return {k: v.contiguous(memory_format=torch.channels_last) if k in last else v for k, v in t.items()}


def contenders(shape: tuple[int, int, int, int, int], backward: bool, dtype: torch.dtype = torch.float32) -> Contenders:
    t = make(shape, dtype)
    wrap = backward_of if backward else forward_of
    found: Contenders = {"hdrops": wrap(hdrops.deform_conv2d, t)}
    found["hdrops channels_last"] = wrap(hdrops.deform_conv2d, channels_last(t))
    found["dense conv2d"] = dense(channels_last(t), backward)
    if dtype == torch.float32:
        ops = optional("torchvision.ops")
        if ops is not None:
            found["torchvision"] = wrap(ops.deform_conv2d, t)
        session = None if backward else onnxruntime_session(t)
        if session is not None:
            found["onnxruntime"] = session
    return found


def case(
    key: str,
    backward: bool,
    goals: dict[str, float],
    dtype: torch.dtype = torch.float32,
    threads: tuple[int, ...] = (1,),
) -> Case:
    n, c, h, w, groups = shape = SHAPES[key]
    gemm = 2.0 * 9 * c * c * n * h * w
    size = torch.finfo(dtype).bits // 8
    traffic = n * h * w * (2 * c * size + 27 * groups * 4)
    kind = str(dtype).removeprefix("torch.")
    return Case(
        name=f"deform_conv2d {'forward+backward' if backward else 'forward'} {kind} {key}",
        build=lambda: contenders(shape, backward, dtype),
        goals=goals,
        flops=gemm * (3 if backward else 1),
        bytes=traffic * (3 if backward else 1),
        threads=threads,
        partners={"dense conv2d": "hdrops channels_last"},
    )


CASES = [
    case("S2 1x64 256x256 dg1", False, {"torchvision": 15, "onnxruntime": 3, "dense conv2d": 1 / 1.7}, threads=(1, 2)),
    case("S2 1x64 256x256 dg1", True, {"torchvision": 30, "dense conv2d": 1 / 1.6}, threads=(1, 2)),
    case("S3 1x64 256x256 dg8", False, {"torchvision": 8, "onnxruntime": 2.5}, threads=(1, 2)),
    case("S3 1x64 256x256 dg8", True, {}),
    case("S1 1x32 256x256 dg1", False, {}),
    case("S4 4x64 128x128 dg1", False, {}),
    case("S4 4x64 128x128 dg1", True, {}),
    case("S5 16x32 64x64 dg1", False, {}),
    case("S6 1x64 540x960 dg8", False, {}),
    case("S2 1x64 256x256 dg1", False, {}, torch.bfloat16),
]
