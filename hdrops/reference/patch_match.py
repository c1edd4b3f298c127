"""Patch matching (OP-3), its coarse-to-fine propagation (OP-5) and patch swap (OP-4) in plain PyTorch.

Matching walks over the displacements of the window and holds one map of scores at a time. Where the centres are every
site's own position the displacement is the same everywhere, and the score of patches is a box sum of pixel products;
otherwise each tap of the key's patch is gathered. The search has no gradient; the score of the match it finds is then
computed once more, and that has one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hdrops.ops import _common

SMALLEST_NORM = 1e-5


class PatchMatch(NamedTuple):
    """What :func:`hdrops.patch_match` finds: for every site of the query its match in the key, and how good it is."""

    index: Tensor  # type: ignore[assignment]  # instead of the method of tuples
    score: Tensor


def patch_match(
    query: Tensor,
    key: Tensor,
    *,
    radius: int | Sequence[int],
    centers: Tensor | None = None,
    patch_size: int = 3,
    normalize: str = "key",
) -> PatchMatch:
    """Best match of every patch of ``query`` within a window of ``key``; see :func:`hdrops.patch_match`.

    Computes in float64 for float64 input and in float32 for every other dtype, and rounds the score once.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    wide_query, wide_key = query.to(dtype), key.to(dtype)
    with torch.no_grad():
        if centers is None:
            index = _search_own_position(wide_query, wide_key, _common.pair(radius), patch_size, normalize)
        else:
            index = _search_around(wide_query, wide_key, centers, _common.pair(radius), patch_size, normalize)
    score = _score(wide_query, wide_key, index, patch_size, normalize)
    return PatchMatch(index, score.to(query.dtype))


def patch_match_pyramid(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    *,
    radii: Sequence[int | Sequence[int]],
    patch_size: int = 3,
    normalize: str = "key",
) -> list[PatchMatch]:
    """Matches from coarse to fine; see :func:`hdrops.patch_match_pyramid`."""
    matches: list[PatchMatch] = []
    for level, (query, key) in enumerate(zip(queries, keys, strict=True)):
        centers = finer_centers(matches[-1].index, keys[level - 1], query, key) if matches else None
        matches.append(
            patch_match(query, key, radius=radii[level], centers=centers, patch_size=patch_size, normalize=normalize)
        )
    return matches


def patch_swap(
    source: Tensor, index: Tensor, *, patch_size: int = 3, scale: int = 1, border: str = "exclude"
) -> Tensor:
    """Each site's matched patch, overlaps averaged; see :func:`hdrops.patch_swap`.

    Computes in float64 for float64 input and in float32 for every other dtype, and rounds the result once.
    """
    dtype = torch.float64 if source.dtype == torch.float64 else torch.float32
    n, height, width = index.shape
    channels, key_size = source.shape[1], (source.shape[2] // scale, source.shape[3] // scale)
    # A site of the match's grid holds the scale x scale pixels that move together. (torch's pixel_unshuffle loses the
    # channels of an empty batch.)
    blocks = source.to(dtype).reshape(n, channels, key_size[0], scale, key_size[1], scale)
    sites = blocks.permute(0, 1, 3, 5, 2, 4).reshape(n, channels * scale**2, *key_size)
    index = index.clamp(0, key_size[0] * key_size[1] - 1)
    total = sites.new_zeros(n, sites.shape[1], height, width)
    count = sites.new_zeros(n, 1, height, width)
    for dy, dx in _taps(patch_size):
        # Site p takes tap d of the patch of site p - d.
        placed = _shift(index + 1, -dy, -dx) - 1
        matched_y, matched_x = _coordinates(placed.clamp_min(0), key_size[1])
        value, inside = _gather(sites, matched_y + dy, matched_x + dx)
        inside = inside & (placed >= 0).unsqueeze(1)
        total = total + torch.where(inside, value, 0.0)
        count = count + inside
    divisor = count if border == "exclude" else float(patch_size**2)
    means = (total / divisor).reshape(n, channels, scale, scale, height, width).permute(0, 1, 4, 2, 5, 3)
    output = means.reshape(n, channels, scale * height, scale * width)
    return output.to(source.dtype, memory_format=_common.memory_format(source))


def finer_centers(index: Tensor, coarse_key: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Centres [N, Hq, Wq] for a level of twice the resolution, from the matches of the coarser one (OP-5).

    A site's parent is at half its coordinates (the last one where a row or column more was cut off); the site keeps its
    place relative to the parent, and a centre beyond the key moves to its border.
    """
    height, width = query.shape[2:]
    row = torch.arange(height, device=index.device)
    column = torch.arange(width, device=index.device)
    parent_row, parent_column = (row // 2).clamp(max=index.shape[1] - 1), (column // 2).clamp(max=index.shape[2] - 1)
    parent = index[:, parent_row][:, :, parent_column]
    match_y, match_x = _coordinates(parent, coarse_key.shape[3])
    y = (2 * match_y + (row - 2 * parent_row)[:, None]).clamp(0, key.shape[2] - 1)
    x = (2 * match_x + (column - 2 * parent_column)).clamp(0, key.shape[3] - 1)
    return y * key.shape[3] + x


def _taps(patch_size: int) -> list[tuple[int, int]]:
    """Places of a patch relative to its centre, row by row."""
    reach = patch_size // 2
    return [(dy, dx) for dy in range(-reach, reach + 1) for dx in range(-reach, reach + 1)]


def _coordinates(index: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Row and column of a linear index."""
    y = torch.div(index, width, rounding_mode="floor")
    return y, index - y * width


def _shift(tensor: Tensor, dy: int, dx: int) -> Tensor:
    """tensor[..., y + dy, x + dx], zero outside."""
    height, width = tensor.shape[-2:]
    top, left = min(max(dy, 0), height), min(max(dx, 0), width)
    bottom, right = max(min(height + dy, height), 0), max(min(width + dx, width), 0)
    if bottom <= top or right <= left:
        return torch.zeros_like(tensor)
    return F.pad(tensor[..., top:bottom, left:right], (left - dx, width - right + dx, top - dy, height - bottom + dy))


def _gather(image: Tensor, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels [N, C, ...] of image [N, C, H, W] at y and x [N, ...], and where these are inside [N, 1, ...]."""
    n, channels, height, width = image.shape
    inside = ((y >= 0) & (y < height) & (x >= 0) & (x < width)).unsqueeze(1)
    place = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
    flat = place.reshape(n, 1, place[:1].numel()).expand(-1, channels, -1)
    return image.reshape(n, channels, height * width).gather(2, flat).reshape(n, channels, *y.shape[1:]), inside


def _box_sum(image: Tensor, patch_size: int) -> Tensor:
    """Sums of [N, H, W] over patches, zero outside."""
    return F.avg_pool2d(image.unsqueeze(1), patch_size, 1, patch_size // 2, divisor_override=1).squeeze(1)


def _inverse_norm(features: Tensor, patch_size: int) -> Tensor:
    """1 / max(norm of the patch, SMALLEST_NORM), [N, H, W]; its derivative is finite at a patch of zeros."""
    energy = _box_sum(features.square().sum(1), patch_size)
    return energy.clamp_min(SMALLEST_NORM**2).rsqrt()


def _keep_better(best: tuple[Tensor, Tensor], score: Tensor, index: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Best score and index so far, with those of one displacement; displacements come in the order of the indices."""
    best_score, best_index = best
    # The first index of a window stands even where no score beats minus infinity; a NaN never beats anything.
    better = allowed & ((score > best_score) | (best_index < 0))
    score = torch.where(score.isnan(), -torch.inf, score)
    return torch.where(better, score, best_score), torch.where(better, index, best_index)


def _search_own_position(
    query: Tensor, key: Tensor, radius: tuple[int, int], patch_size: int, normalize: str
) -> Tensor:
    n, _, height, width = query.shape
    scale = _inverse_norm(key, patch_size) if normalize in ("key", "both") else torch.ones_like(key[:, 0])
    place = torch.arange(height * width, device=query.device).reshape(1, height, width).expand(n, -1, -1)
    inside = torch.ones_like(place, dtype=torch.bool)
    best = torch.full_like(scale, -torch.inf), torch.full_like(place, -1)
    for dy in range(-min(radius[0], height - 1), min(radius[0], height - 1) + 1):
        for dx in range(-min(radius[1], width - 1), min(radius[1], width - 1) + 1):
            products = (query * _shift(key, dy, dx)).sum(1)
            # A pixel beyond the key contributes nothing, not even a NaN of the query.
            products = torch.where(_shift(inside, dy, dx), products, 0.0)
            score = _box_sum(products, patch_size) * _shift(scale, dy, dx)
            best = _keep_better(best, score, place + dy * width + dx, _shift(inside, dy, dx))
    return best[1]


def _search_around(
    query: Tensor, key: Tensor, centers: Tensor, radius: tuple[int, int], patch_size: int, normalize: str
) -> Tensor:
    height, width = key.shape[2:]
    scale = _inverse_norm(key, patch_size) if normalize in ("key", "both") else torch.ones_like(key[:, 0])
    center_y, center_x = _coordinates(centers.clamp(0, height * width - 1), width)
    best = torch.full_like(query[:, 0], -torch.inf), torch.full_like(centers, -1)
    for dy in range(-min(radius[0], height - 1), min(radius[0], height - 1) + 1):
        for dx in range(-min(radius[1], width - 1), min(radius[1], width - 1) + 1):
            y, x = center_y + dy, center_x + dx
            inverse, inside = _gather(scale.unsqueeze(1), y, x)
            score = _patch_product(query, key, y, x, patch_size) * inverse.squeeze(1)
            best = _keep_better(best, score, y * width + x, inside.squeeze(1))
    return best[1]


def _patch_product(query: Tensor, key: Tensor, y: Tensor, x: Tensor, patch_size: int) -> Tensor:
    """Inner products [N, Hq, Wq] of the query's patches with those of the key around y and x."""
    on_query = torch.ones_like(y, dtype=torch.bool)
    total = torch.zeros_like(query[:, 0])
    for dy, dx in _taps(patch_size):
        pixel, inside = _gather(key, y + dy, x + dx)
        both = inside.squeeze(1) & _shift(on_query, dy, dx)
        total = total + torch.where(both, (_shift(query, dy, dx) * pixel).sum(1), 0.0)
    return total


def _score(query: Tensor, key: Tensor, index: Tensor, patch_size: int, normalize: str) -> Tensor:
    """The score of given matches, differentiable."""
    y, x = _coordinates(index, key.shape[3])
    score = _patch_product(query, key, y, x, patch_size)
    if normalize in ("key", "both"):
        score = score * _gather(_inverse_norm(key, patch_size).unsqueeze(1), y, x)[0].squeeze(1)
    if normalize in ("query", "both"):
        score = score * _inverse_norm(query, patch_size)
    return torch.where(score.isnan(), -torch.inf, score)
