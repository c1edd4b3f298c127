"""The benchmark cases on a GPU: the shapes of the CPU cases and those too large for a CPU, in every precision.

A case's contenders do the same work on the same data. `partners` names which of our contenders a peer is held against:
dense convolution runs channels last, torchvision only knows NCHW. bfloat16 is held against torchvision in TF32, the
fastest it has, for it has no bfloat16.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

import hdrops
from benches.bench_crf import bracket, gather_lerp, with_gradients, without_gradients
from benches.bench_deform_conv2d import SHAPES as CPU_SHAPES
from benches.bench_deform_conv2d import backward_of, channels_last, dense, forward_of, make
from benches.bench_patch_match import features, nearby, shift_multiply_box, unfold_gather_fold
from benches.registry import Contenders, optional
from hdrops.reference.deform_conv2d import deform_conv2d as plain_deform_conv2d

# As the CPU's: name: batch, channels (in and out), height, width, offset groups.
SHAPES = {
    **CPU_SHAPES,
    "S7 1x32 1080x1920 dg1": (1, 32, 1080, 1920, 1),
    "S8 1x64 1080x1920 dg8": (1, 64, 1080, 1920, 8),
    "S9 16x64 256x256 dg1": (16, 64, 256, 256, 1),
    "D1 16x32 256x256 dg1": (16, 32, 256, 256, 1),
    "D2 1x32 1008x1504 dg1": (1, 32, 1008, 1504, 1),
    "D3 8x32 384x384 dg1": (8, 32, 384, 384, 1),
}
# precision -> dtype of the data, whether TF32 may be used, the ceiling it is held against
PRECISIONS = {
    "fp32": (torch.float32, False, "fp32"),
    "tf32": (torch.float32, True, "tf32"),
    "bf16": (torch.bfloat16, False, "bf16"),
    "fp16": (torch.float16, False, "bf16"),
}
# design's goals, as peer time / hdrops time
FORWARD_GOALS = {"tf32": {"torchvision": 3.0}, "bf16": {"torchvision tf32": 5.0, "dense conv2d": 1 / 2.5}}
BACKWARD_GOALS = {"tf32": {"torchvision": 4.0}, "bf16": {"torchvision tf32": 6.0}}


@dataclass(frozen=True)
class GpuCase:
    """One benchmark on a GPU, as registry.Case; `rate` names the ceiling of arithmetic, or is "" for memory."""

    name: str
    build: Callable[[], Contenders]
    goals: dict[str, float] = field(default_factory=dict)
    flops: float = 0.0
    bytes: float = 0.0
    rate: str = ""
    partners: dict[str, str] = field(default_factory=dict)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Sets torch's switches for TF32 in matrix products and convolutions."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def in_precision(allow_tf32: bool, function: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with tf32(allow_tf32):
            return function()

    return run


def on_gpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cuda() for name, tensor in tensors.items()}


def deform_contenders(key: str, precision: str, backward: bool) -> Contenders:
    dtype, allow_tf32, _ = PRECISIONS[precision]
    t = on_gpu(make(SHAPES[key], dtype))
    wrap = backward_of if backward else forward_of
    found: Contenders = {
        "hdrops": wrap(hdrops.deform_conv2d, t),
        "hdrops channels_last": wrap(hdrops.deform_conv2d, channels_last(t)),
        "dense conv2d": dense(channels_last(t), backward),
    }

    def by_triton(*arguments: Tensor, **options: object) -> Tensor:
        return hdrops.deform_conv2d(*arguments, backend="triton", **options)

    found["hdrops triton channels_last"] = wrap(by_triton, channels_last(t))
    found = {name: in_precision(allow_tf32, function) for name, function in found.items()}
    vision = optional("torchvision.ops")
    if vision is not None:
        if precision in ("fp32", "tf32"):
            found["torchvision"] = in_precision(allow_tf32, wrap(vision.deform_conv2d, t))
        if precision == "fp16":  # offsets and mask must be fp16 there
            found["torchvision"] = wrap(vision.deform_conv2d, {name: x.half() for name, x in t.items()})
        if precision == "bf16":
            full = {name: x.float() for name, x in t.items()}
            found["torchvision tf32"] = in_precision(True, wrap(vision.deform_conv2d, full))
    if key.startswith("S2") and precision in ("tf32", "bf16"):
        compiled = torch.compile(plain_deform_conv2d, fullgraph=True)
        found["torch.compile of the reference"] = in_precision(allow_tf32, wrap(compiled, t))
    return found


def deform_case(key: str, precision: str, backward: bool) -> GpuCase:
    n, c, h, w, groups = SHAPES[key]
    dtype, _, ceiling = PRECISIONS[precision]
    times = 3 if backward else 1
    gemm = 2.0 * 9 * c * c * n * h * w
    traffic = n * h * w * (2.0 * c * dtype.itemsize + 27 * groups * 4)
    goals = BACKWARD_GOALS if backward else FORWARD_GOALS
    return GpuCase(
        name=f"deform_conv2d {'forward+backward' if backward else 'forward'} {precision} {key}",
        build=lambda: deform_contenders(key, precision, backward),
        goals=goals.get(precision, {}) if key[:2] in ("S2", "S9") else {},
        flops=gemm * times,
        bytes=traffic * times,
        rate=ceiling,
        partners={"dense conv2d": "hdrops channels_last"},
    )


def lookup(shape: tuple[int, ...], levels: int, dtype: torch.dtype, backward: str) -> Contenders:
    """`backward` is "", "pixels" (the curve is a constant) or "both"."""
    curve = (torch.linspace(0, 1, levels) ** 2.2).cuda()
    if dtype == torch.uint8:
        x = torch.randint(0, 256, shape, dtype=dtype, device="cuda")
        return {
            "hdrops": without_gradients(hdrops.crf_lookup, x, curve),
            "gather": without_gradients(lambda codes, c: c[codes.int()], x, curve),
        }
    x = torch.rand(shape, device="cuda").to(dtype)
    if backward == "both":
        return {
            name: with_gradients(f, x, curve)
            for name, f in (("hdrops", hdrops.crf_lookup), ("gather-lerp", gather_lerp))
        }
    wrap = with_gradients if backward else without_gradients
    return {
        "hdrops": wrap(lambda pixels: hdrops.crf_lookup(pixels, curve), x),
        "gather-lerp": wrap(lambda pixels: gather_lerp(pixels, curve), x),
    }


def lookup_case(
    name: str, shape: tuple[int, ...], levels: int, dtype: torch.dtype, backward: str, passes: float
) -> GpuCase:
    """`passes`: bytes moved at least, in units of the image's."""
    pixels = 1
    for size in shape:
        pixels *= size
    kind = {"": "forward", "pixels": "forward+backward pixels", "both": "forward+backward pixels and curve"}[backward]
    return GpuCase(
        name=f"crf_lookup {kind} {str(dtype).removeprefix('torch.')} {name} {levels}",
        build=lambda: lookup(shape, levels, dtype, backward),
        goals={"gather-lerp": 15.0} if backward == "both" else {},
        bytes=passes * pixels * dtype.itemsize,
    )


def merging(frames: int, dtype: torch.dtype) -> Contenders:
    stack, times = bracket(frames, 1080, 1920)
    stack = stack.contiguous().cuda()
    stack = stack if dtype == torch.uint8 else (stack.float() / 255).to(dtype)
    log_times, curve = times.log().float()[None].cuda(), (torch.linspace(0, 1, 256) ** 2.2 + 1e-4).cuda()

    def merge(backend: str | None) -> Callable[[], object]:
        return without_gradients(lambda: hdrops.merge_exposures(stack, log_times, curve, backend=backend))

    return {"hdrops": merge(None), "reference": merge("reference")}


def histograms(name: str, backward: bool) -> Contenders:
    x = torch.rand(8, 3, 256, 256, device="cuda")
    wrap = with_gradients if backward else without_gradients
    function = getattr(hdrops, name)
    return {
        "hdrops": wrap(lambda t: function(t), x),
        "reference": wrap(lambda t: function(t, backend="reference"), x),
    }


def swapping(size: tuple[int, int], scale: int, dtype: torch.dtype, backward: bool) -> Contenders:
    """Patch swap of 64 channels, with matches of a window."""
    index = nearby(*size).cuda()
    source = torch.randn(1, 64, scale * size[0], scale * size[1], device="cuda").to(dtype)
    wrap = with_gradients if backward else without_gradients

    def swap(tensor: Tensor) -> Tensor:
        return hdrops.patch_swap(tensor, index, scale=scale)

    return {
        "hdrops": wrap(swap, source),
        "hdrops channels_last": wrap(swap, source.contiguous(memory_format=torch.channels_last)),
        "unfold-gather-fold": wrap(lambda tensor: unfold_gather_fold(tensor, index, scale), source),
    }


def swap_case(size: tuple[int, int], scale: int, dtype: torch.dtype, backward: bool) -> GpuCase:
    sites = float(size[0] * size[1])
    passes = 2 if backward else 1
    return GpuCase(
        name=f"patch_swap {'forward+backward' if backward else 'forward'} {str(dtype).removeprefix('torch.')} "
        f"1x64 {size[0]}x{size[1]} scale {scale}",
        build=lambda: swapping(size, scale, dtype, backward),
        bytes=passes * sites * (2 * 64 * scale**2 * dtype.itemsize + 8),
    )


def matching(channels: int, size: int, radius: int, dtype: torch.dtype) -> Contenders:
    """Patch matching around own positions."""
    query, key = (tensor.cuda().to(dtype) for tensor in features(channels, size))
    last = [tensor.contiguous(memory_format=torch.channels_last) for tensor in (query, key)]
    found: Contenders = {
        "hdrops": lambda: hdrops.patch_match(query, key, radius=radius),
        "hdrops channels_last": lambda: hdrops.patch_match(*last, radius=radius),
        "shift-multiply-box": lambda: shift_multiply_box(query, key, radius),
    }
    if radius <= 3:  # a larger window, unrolled, takes the compiler minutes
        compiled = torch.compile(shift_multiply_box, fullgraph=True)
        found["torch.compile of shift-multiply-box"] = lambda: compiled(query, key, radius)
    return found


def match_case(channels: int, size: int, radius: int, dtype: torch.dtype) -> GpuCase:
    sites = float(size * size)
    return GpuCase(
        name=f"patch_match forward {str(dtype).removeprefix('torch.')} 1x{channels} {size}x{size} radius {radius}",
        build=lambda: matching(channels, size, radius, dtype),
        goals={"shift-multiply-box": 10.0},
        flops=2.0 * sites * channels * (2 * radius + 1) ** 2,
        bytes=sites * (2 * channels * dtype.itemsize + 8 + dtype.itemsize),
        rate="fp32",
    )


MEGA = 3.0 * 1080 * 1920
L1, L4 = (1, 3, 1080, 1920), (8, 3, 1080, 1920)

CASES = [
    *(deform_case(key, precision, False) for key in SHAPES for precision in PRECISIONS),
    *(
        deform_case(key, precision, True)
        for key in ("S2 1x64 256x256 dg1", "S3 1x64 256x256 dg8", "S9 16x64 256x256 dg1", "D1 16x32 256x256 dg1")
        for precision in PRECISIONS
    ),
    *(lookup_case("8x3x1080p", L4, levels, torch.float32, "", 2) for levels in (256, 1024)),
    lookup_case("8x3x1080p", L4, 256, torch.float16, "", 2),
    lookup_case("8x3x1080p", L4, 256, torch.uint8, "", 5),
    *(lookup_case("8x3x1080p", L4, levels, torch.float32, "pixels", 5) for levels in (256, 1024)),
    *(lookup_case("8x3x1080p", L4, levels, torch.float32, "both", 5) for levels in (256, 1024)),
    lookup_case("3x1080p", L1, 1024, torch.float32, "both", 5),
    GpuCase("merge_exposures uint8 5x3x1080p", lambda: merging(5, torch.uint8), bytes=9 * MEGA),
    GpuCase("merge_exposures float32 5x3x1080p", lambda: merging(5, torch.float32), bytes=24 * MEGA),
    GpuCase(
        "tent_histogram forward 8x3x256x256",
        lambda: histograms("tent_histogram", False),
        bytes=4 * 33.0 * 8 * 3 * 65536,
    ),
    GpuCase("tent_histogram forward+backward 8x3x256x256", lambda: histograms("tent_histogram", True)),
    GpuCase("truncate forward 8x3x256x256", lambda: histograms("truncate", False), bytes=8.0 * 8 * 3 * 65536),
    GpuCase("truncate forward+backward 8x3x256x256", lambda: histograms("truncate", True), bytes=20.0 * 8 * 3 * 65536),
    *(
        swap_case(size, scale, dtype, backward)
        for size in ((256, 256), (1000, 1500))
        for scale in (1, 2)
        for dtype in (torch.float32, torch.bfloat16)
        for backward in (False, True)
    ),
    *(
        match_case(channels, size, radius, dtype)
        for channels, size, radius in ((64, 256, 3), (64, 256, 10), (128, 256, 7), (256, 128, 7))
        for dtype in (torch.float32, torch.bfloat16)
    ),
]
