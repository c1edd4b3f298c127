"""Response-curve lookup, merging, histograms and truncation against plain PyTorch compositions and OpenCV."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import hdrops
from benches.registry import Case, Contenders, optional

PIXELS_1080P = 1080 * 1920


def gather_lerp(x: Tensor, curve: Tensor) -> Tensor:
    """What a user writes today: two gathers and a linear interpolation."""
    last = curve.numel() - 1
    position = x.clamp(0, 1) * last
    index = position.long().clamp(max=last - 1)
    low, high = curve[index], curve[index + 1]
    return low + (position - index) * (high - low)


def with_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], object]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    grad = torch.randn_like(function(*leaves).detach())
    return lambda: torch.autograd.grad(function(*leaves), leaves, grad)


def without_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], object]:
    def run() -> Tensor:
        with torch.no_grad():
            return function(*inputs)

    return run


def lookup(shape: tuple[int, ...], levels: int, backward: bool) -> Contenders:
    x, curve = torch.rand(shape), torch.linspace(0, 1, levels) ** 2.2
    wrap = with_gradients if backward else without_gradients
    return {"hdrops": wrap(hdrops.crf_lookup, x, curve), "gather-lerp": wrap(gather_lerp, x, curve)}


def lookup_uint8() -> Contenders:
    codes = torch.randint(0, 256, (1, 3, 1080, 1920), dtype=torch.uint8)
    curve = torch.linspace(0, 1, 256) ** 2.2
    found: Contenders = {
        "hdrops": without_gradients(hdrops.crf_lookup, codes, curve),
        "gather": lambda: curve[codes.int()],
    }
    cv2 = optional("cv2")
    if cv2 is not None:
        pixels, table = codes.numpy().reshape(-1, 1920), curve.numpy()
        found["OpenCV LUT"] = lambda: cv2.LUT(pixels, table)
    return found


def bracket(frames: int, height: int, width: int, brightest: float = 8.0) -> tuple[Tensor, Tensor]:
    """A bracket as read from files: uint8, interleaved, [1, P, 3, H, W], and its exposure times in seconds.

    Five frames reach a radiance of 4: with 8, a fifth of the readings clips in every frame.
    """
    radiance = torch.rand(height, width, 3, generator=torch.Generator().manual_seed(0)) ** 3 * brightest
    times = 2.0 ** (torch.arange(frames) - frames // 2).double()
    codes = [((radiance * t).clamp(0, 1) ** (1 / 2.2) * 255).round().byte() for t in times]
    return torch.stack(codes)[None].movedim(-1, 2), times


def merging(frames: int, height: int, width: int, brightest: float = 8.0, channels: int = 1) -> Contenders:
    """One response for all channels, or one for each of three, as calibration gives."""
    stack, times = bracket(frames, height, width, brightest)
    log_times = times.log().float()[None]
    curve = torch.stack([torch.linspace(0, 1, 256) ** (2.2 + 0.1 * c) + 1e-4 for c in range(channels)])[None]
    planar = stack.contiguous()
    found: Contenders = {
        "hdrops": without_gradients(lambda: hdrops.merge_exposures(stack, log_times, curve, weight="debevec")),
        "hdrops planar": without_gradients(lambda: hdrops.merge_exposures(planar, log_times, curve, weight="debevec")),
    }
    cv2 = optional("cv2")
    if cv2 is not None:
        images = [frame.movedim(0, -1).contiguous().numpy() for frame in stack[0]]
        response = curve.expand(1, 3, 256)[0].t().reshape(256, 1, 3).contiguous().numpy()
        seconds = times.float().numpy()
        merger = cv2.createMergeDebevec()
        found["OpenCV MergeDebevec"] = lambda: merger.process(images, seconds, response)
    return found


def plain_truncate(x: Tensor) -> Tensor:
    """OP-14 composed of PyTorch operators."""

    def box(t: Tensor) -> Tensor:
        return F.avg_pool2d(F.pad(t, (2, 2, 2, 2), mode="reflect"), 5, stride=1)

    mean = box(x)
    variance = box(x * x) - mean * mean
    a = variance / (variance + 0.01)
    base = box(a) * x + box(mean - a * mean)
    return base.clamp(0, 1) * (x / (base + 1e-15))


def truncation(backward: bool) -> Contenders:
    x = torch.rand(8, 3, 256, 256) * 3
    wrap = with_gradients if backward else without_gradients
    return {"hdrops": wrap(hdrops.truncate, x), "PyTorch": wrap(plain_truncate, x)}


def plain_tent_histogram(x: Tensor) -> Tensor:
    """OP-11 composed of PyTorch operators."""
    return torch.cat([F.relu(1 - m * (x - i / m).abs()) for m in (4, 8, 16) for i in range(m + 1)], dim=1)


def tent(backward: bool) -> Contenders:
    x = torch.rand(8, 3, 256, 256)
    wrap = with_gradients if backward else without_gradients
    return {"hdrops": wrap(hdrops.tent_histogram, x), "PyTorch": wrap(plain_tent_histogram, x)}


MEGA = 3 * PIXELS_1080P

CASES = [
    Case(
        "crf_lookup forward 3x1080p 1024",
        lambda: lookup((1, 3, 1080, 1920), 1024, False),
        {"gather-lerp": 4},
        bytes=8.0 * MEGA,
        threads=(1, 2),
    ),
    Case(
        "crf_lookup forward+backward 3x1080p 1024",
        lambda: lookup((1, 3, 1080, 1920), 1024, True),
        {"gather-lerp": 4},
        bytes=20.0 * MEGA,
        threads=(1, 2),
    ),
    Case(
        "crf_lookup forward 3x1080p 256",
        lambda: lookup((1, 3, 1080, 1920), 256, False),
        {"gather-lerp": 4},
        bytes=8.0 * MEGA,
    ),
    Case(
        "crf_lookup forward 8x3x1080p 256",
        lambda: lookup((8, 3, 1080, 1920), 256, False),
        {"gather-lerp": 20},
        bytes=64.0 * MEGA,
    ),
    Case(
        "crf_lookup forward uint8 3x1080p 256", lookup_uint8, {"OpenCV LUT": 1 / 1.3}, bytes=5.0 * MEGA, threads=(1, 2)
    ),
    Case(
        "merge_exposures uint8 5x3x1080p",
        lambda: merging(5, 1080, 1920),
        {"OpenCV MergeDebevec": 10},
        bytes=9.0 * MEGA,
        threads=(1, 2),
    ),
    Case(
        "merge_exposures uint8 5x3x1080p, scene within the bracket",
        lambda: merging(5, 1080, 1920, brightest=3.9),
        {"OpenCV MergeDebevec": 10},
        bytes=9.0 * MEGA,
    ),
    Case(
        "merge_exposures uint8 5x3x1080p, a response for each channel",
        lambda: merging(5, 1080, 1920, channels=3),
        {"OpenCV MergeDebevec": 10},
        bytes=9.0 * MEGA,
    ),
    Case("merge_exposures uint8 4x3x6MP", lambda: merging(4, 2000, 3000), {}, bytes=8.0 * 3 * 6e6),
    Case("tent_histogram forward 8x3x256x256", lambda: tent(False), {}, bytes=4.0 * 94 * 8 * 256 * 256 * 3 / 3),
    Case("tent_histogram forward+backward 8x3x256x256", lambda: tent(True), {}),
    Case("truncate forward 8x3x256x256", lambda: truncation(False), {}, bytes=8.0 * 8 * 3 * 256 * 256),
    Case("truncate forward+backward 8x3x256x256", lambda: truncation(True), {}),
]
