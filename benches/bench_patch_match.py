"""patch_match (OP-3, OP-5) and patch_swap (OP-4) against the best plain PyTorch compositions of the same results."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import hdrops
from benches.registry import Case, Contenders


def shift_multiply_box(query: Tensor, key: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """What a user writes today: for each displacement the products of pixels, their box sums, and a running best."""
    height, width = query.shape[2:]
    energy = F.avg_pool2d(key.square().sum(1, keepdim=True), 3, 1, 1, divisor_override=1)
    scale = F.pad(1 / energy.sqrt().clamp_min(1e-5), (radius,) * 4, value=float("nan"))
    padded = F.pad(key, (radius,) * 4)
    place = torch.arange(height * width, device=query.device).reshape(1, 1, height, width)
    best, index = torch.full_like(query[:, :1], -torch.inf), torch.zeros_like(query[:, :1], dtype=torch.int64)
    for dy in range(2 * radius + 1):
        for dx in range(2 * radius + 1):
            products = (query * padded[:, :, dy : dy + height, dx : dx + width]).sum(1, keepdim=True)
            score = F.avg_pool2d(products, 3, 1, 1, divisor_override=1)
            score = score * scale[:, :, dy : dy + height, dx : dx + width]
            better = score > best
            best = torch.where(better, score, best)
            index = torch.where(better, place + (dy - radius) * width + dx - radius, index)
    return index[:, 0], best[:, 0]


def unfold_gather_fold(source: Tensor, index: Tensor, scale: int = 1) -> Tensor:
    """Patch swap as TTSR writes it, divided by the overlap."""
    size, sites = [scale * length for length in index.shape[1:]], index.flatten(1).unsqueeze(1)

    def swap(tensor: Tensor) -> Tensor:
        patches = F.unfold(tensor, 3 * scale, padding=scale, stride=scale)
        chosen = patches.gather(2, sites.expand(-1, patches.shape[1], -1))
        return F.fold(chosen, size, 3 * scale, padding=scale, stride=scale)

    with torch.no_grad():
        count = swap(torch.ones_like(source[:, :1]))
    return swap(source) / count


def features(channels: int, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, channels, size, size, generator=generator) for _ in range(2))
    return query, key


def matching(channels: int, size: int, radius: int) -> Contenders:
    query, key = features(channels, size)
    plain, ours = shift_multiply_box(query, key, radius), hdrops.patch_match(query, key, radius=radius)
    agreement = float((plain[0] == ours.index).double().mean())
    assert agreement > 0.9999, f"only {agreement} of the matches are the same"
    return {
        "hdrops": lambda: hdrops.patch_match(query, key, radius=radius),
        "hdrops channels_last": channels_last(lambda *both: hdrops.patch_match(*both, radius=radius), query, key),
        "shift-multiply-box": lambda: shift_multiply_box(query, key, radius),
    }


def channels_last(function: Callable[..., object], *tensors: Tensor) -> Callable[[], object]:
    last = [tensor.contiguous(memory_format=torch.channels_last) for tensor in tensors]
    return lambda: function(*last)


def refining(channels: int, size: int, radius: int, block: int) -> Contenders:
    """Around given centres, of which blocks share a displacement, as a pyramid's finer levels have them."""
    query, key = features(channels, size)
    generator = torch.Generator().manual_seed(1)
    shift = torch.randint(-8, 9, (2, size // block, size // block), generator=generator)
    shift = shift.repeat_interleave(block, 1).repeat_interleave(block, 2)
    place = torch.arange(size)
    y, x = (place[:, None] + shift[0]).clamp(0, size - 1), (place + shift[1]).clamp(0, size - 1)
    centers = (y * size + x).unsqueeze(0)
    return {"hdrops": lambda: hdrops.patch_match(query, key, radius=radius, centers=centers)}


def score_gradients(channels: int, size: int, radius: int) -> Contenders:
    query, key = (tensor.requires_grad_() for tensor in features(channels, size))
    grad = torch.randn(1, size, size)

    def run() -> object:
        score = hdrops.patch_match(query, key, radius=radius, normalize="both").score
        return torch.autograd.grad(score, (query, key), grad)

    return {"hdrops": run}


def nearby(height: int, width: int, radius: int = 10) -> Tensor:
    """Matches of a window, [1, height, width]."""
    shift = torch.randint(-radius, radius + 1, (2, height, width), generator=torch.Generator().manual_seed(1))
    y = (torch.arange(height)[:, None] + shift[0]).clamp(0, height - 1)
    x = (torch.arange(width) + shift[1]).clamp(0, width - 1)
    return (y * width + x).unsqueeze(0)


def swapping(channels: int, size: int, local: bool) -> Contenders:
    """Forward and backward, with matches of a window of radius 10, or anywhere."""
    source = features(channels, size)[0]
    anywhere = torch.randint(0, size * size, (1, size, size), generator=torch.Generator().manual_seed(1))
    index = nearby(size, size) if local else anywhere
    torch.testing.assert_close(hdrops.patch_swap(source, index), unfold_gather_fold(source, index))
    grad = torch.randn_like(source)

    def with_gradient(function: Callable[[Tensor, Tensor], Tensor], tensor: Tensor) -> Callable[[], object]:
        leaf = tensor.clone().requires_grad_()
        return lambda: torch.autograd.grad(function(leaf, index), leaf, grad)

    last = source.contiguous(memory_format=torch.channels_last)
    return {
        "hdrops": with_gradient(hdrops.patch_swap, source),
        "hdrops channels_last": with_gradient(hdrops.patch_swap, last),
        "unfold-gather-fold": with_gradient(unfold_gather_fold, source),
    }


def match_case(key: str, channels: int, size: int, radius: int, threads: tuple[int, ...] = (1,)) -> Case:
    return Case(
        name=f"patch_match forward float32 {key} 1x{channels} {size}x{size} r{radius}",
        build=lambda: matching(channels, size, radius),
        goals={"shift-multiply-box": 10},
        flops=2.0 * channels * size * size * (2 * radius + 1) ** 2,
        bytes=2.0 * 4 * channels * size * size + 12.0 * size * size,
        threads=threads,
    )


CASES = [
    match_case("P1", 64, 64, 3),
    match_case("P4", 64, 256, 3, threads=(1, 2)),
    match_case("P5", 64, 256, 10, threads=(1, 2)),
    match_case("P6", 256, 128, 7),
    Case(
        name="patch_match forward float32 1x64 256x256 r2, centres of blocks of 2x2",
        build=lambda: refining(64, 256, 2, 2),
        flops=2.0 * 64 * 256 * 256 * 25 * 9,
    ),
    Case(
        name="patch_match forward float32 1x64 256x256 r2, centres of blocks of 16x16",
        build=lambda: refining(64, 256, 2, 16),
        flops=2.0 * 64 * 256 * 256 * 25,
    ),
    Case(
        name="patch_match forward+backward float32 1x64 256x256 r3",
        build=lambda: score_gradients(64, 256, 3),
        flops=2.0 * 64 * 256 * 256 * (49 + 27),
    ),
    Case(
        name="patch_swap forward+backward float32 1x64 256x256, matches within radius 10",
        build=lambda: swapping(64, 256, True),
        goals={"unfold-gather-fold": 20},
        bytes=4.0 * 4 * 64 * 256 * 256,
        threads=(1, 2),
    ),
    Case(
        name="patch_swap forward+backward float32 1x64 256x256, matches anywhere",
        build=lambda: swapping(64, 256, False),
        bytes=4.0 * 4 * 64 * 256 * 256,
    ),
]
