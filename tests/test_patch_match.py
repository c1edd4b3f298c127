"""patch_match computes what OP-3 and OP-5 say: against a search written out, the float64 reference, planted shifts."""

import doctest
import itertools
import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

import hdrops
from hdrops.reference import patch_match as reference
from hdrops.testing import TOLERANCES, assert_close

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NORMALIZATIONS = ["key", "query", "both", "none"]


def features(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def integers(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def own_positions(height: int, width: int, key_width: int | None = None) -> Tensor:
    return torch.arange(height)[:, None] * (key_width or width) + torch.arange(width)


def written_out(
    query: Tensor, key: Tensor, radius: tuple[int, int], centers: Tensor | None, patch: int, normalize: str
) -> tuple[Tensor, Tensor]:
    """OP-3 in loops: index and score."""
    n, _, height, width = query.shape
    key_height, key_width = key.shape[2:]
    reach = patch // 2
    padded_query, padded_key = F.pad(query, (reach,) * 4), F.pad(key, (reach,) * 4)
    index = torch.zeros(n, height, width, dtype=torch.int64)
    score = torch.zeros(n, height, width, dtype=query.dtype)
    for image, y, x in itertools.product(range(n), range(height), range(width)):
        center = y * key_width + x if centers is None else int(centers[image, y, x])
        center_y, center_x = divmod(min(max(center, 0), key_height * key_width - 1), key_width)
        ours = padded_query[image, :, y : y + patch, x : x + patch]
        best = None
        for key_y in range(max(center_y - radius[0], 0), min(center_y + radius[0], key_height - 1) + 1):
            for key_x in range(max(center_x - radius[1], 0), min(center_x + radius[1], key_width - 1) + 1):
                theirs = padded_key[image, :, key_y : key_y + patch, key_x : key_x + patch]
                value = (ours * theirs).sum()
                if normalize in ("key", "both"):
                    value = value / theirs.norm().clamp_min(1e-5)
                if normalize in ("query", "both"):
                    value = value / ours.norm().clamp_min(1e-5)
                if best is None or value > best[0]:
                    best = value, key_y * key_width + key_x
        assert best is not None
        score[image, y, x], index[image, y, x] = best
    return index, score


def score_at(query: Tensor, key: Tensor, index: Tensor, patch: int, normalize: str) -> Tensor:
    """The float64 score of given matches: a window of one site around them."""
    exact = query.double(), key.double()
    return reference.patch_match(*exact, radius=0, centers=index, patch_size=patch, normalize=normalize).score


def assert_matches(
    query: Tensor,
    key: Tensor,
    radius: int | tuple[int, int],
    centers: Tensor | None = None,
    patch: int = 3,
    normalize: str = "key",
) -> None:
    """Two tiers: the score is that of the chosen match, and no candidate of the float64 search is better."""
    options = {"patch_size": patch, "normalize": normalize}
    got = hdrops.patch_match(query, key, radius=radius, centers=centers, **options)
    wanted = reference.patch_match(query.double(), key.double(), radius=radius, centers=centers, **options)
    assert got.index.dtype == torch.int64 and got.score.dtype == query.dtype
    assert got.index.shape == got.score.shape == wanted.index.shape
    if got.index.numel() == 0:
        return
    terms = query.shape[1] * patch**2
    chosen = score_at(query, key, got.index, patch, normalize)
    assert_close(got.score, chosen, terms=terms, name="score")
    assert_close(got.score, wanted.score, terms=terms, name="best score")
    # Where the float64 scores of both choices are apart by more than sums in the kernel's precision, the choice is one.
    accumulation = TOLERANCES[torch.float64 if query.dtype == torch.float64 else torch.float32].accumulation
    margin = 4 * accumulation * terms**0.5 * float(wanted.score.square().mean().sqrt())
    assert bool(((got.index == wanted.index) | (wanted.score - chosen <= margin)).all())


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("patch", [1, 3, 5, 7])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_search_written_out(patch: int, normalize: str, backend: str) -> None:
    query, own, other = features(2, 3, 6, 7), features(2, 3, 6, 7, seed=1), features(2, 3, 8, 5, seed=2)
    for key, centers in ((own, None), (other, integers(-9, 50, 2, 6, 7))):
        index, score = written_out(query, key, (1, 2), centers, patch, normalize)
        got = hdrops.patch_match(
            query, key, radius=(1, 2), centers=centers, patch_size=patch, normalize=normalize, backend=backend
        )
        assert torch.equal(got.index, index)
        assert_close(got.score, score, terms=3 * patch**2)


SIZES = {
    # name: batch, channels, height, width, radius
    "plain": (2, 5, 12, 13, 2),
    "one_pixel": (1, 3, 1, 1, 3),
    "one_row": (1, 4, 1, 40, (0, 5)),
    "one_column": (2, 4, 40, 1, (5, 0)),
    "anisotropic": (1, 6, 20, 31, (1, 6)),
    "no_radius": (1, 4, 9, 10, 0),
    "several_tiles": (1, 7, 101, 150, (2, 3)),
    "many_channels": (1, 200, 9, 11, 2),
    "window_larger_than_the_key": (1, 3, 11, 9, 30),
    "window_in_chunks": (1, 2, 25, 150, (10, 70)),
    "one_channel": (2, 1, 17, 33, 2),
}


@pytest.mark.asan
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in SIZES if name != "window_in_chunks"])
def test_equals_reference(name: str, dtype: torch.dtype) -> None:
    *shape, radius = SIZES[name]
    assert_matches(features(*shape, dtype=dtype), features(*shape, dtype=dtype, seed=1), radius)


def test_a_window_in_chunks() -> None:
    *shape, radius = SIZES["window_in_chunks"]
    assert_matches(features(*shape, dtype=torch.float32), features(*shape, dtype=torch.float32, seed=1), radius)


@pytest.mark.asan
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("patch", [1, 3, 5, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_patches_and_normalizations(dtype: torch.dtype, patch: int, normalize: str) -> None:
    query, key = features(1, 4, 50, 19, dtype=dtype), features(1, 4, 50, 19, dtype=dtype, seed=1)
    assert_matches(query, key, (3, 2), patch=patch, normalize=normalize)


def some_centers(kind: str, n: int, size: tuple[int, int], key_size: tuple[int, int]) -> Tensor:
    (height, width), (key_height, key_width) = size, key_size
    y, x = torch.arange(height)[:, None], torch.arange(width)
    if kind == "random":
        return integers(-20, key_height * key_width + 20, n, height, width)
    if kind == "own":
        return (y.clamp(max=key_height - 1) * key_width + x.clamp(max=key_width - 1)).expand(n, -1, -1)
    if kind == "pairs":  # as from a coarser level: blocks of 2 x 2 share a displacement
        coarse = integers(0, key_height * key_width, n, (height + 1) // 2, (width + 1) // 2)
        fine = coarse.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, :height, :width]
        return fine + (y % 2) * key_width + x % 2
    # Blocks of 16 x 16 share a displacement of up to 5 pixels.
    shift = integers(-5, 6, 2, n, -(-height // 16), -(-width // 16)).repeat_interleave(16, 2).repeat_interleave(16, 3)
    shifted_y = (y + shift[0, :, :height, :width]).clamp(0, key_height - 1)
    return shifted_y * key_width + (x + shift[1, :, :height, :width]).clamp(0, key_width - 1)


@pytest.mark.asan
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["random", "own", "pairs", "blocks"])
@pytest.mark.parametrize("key_size", [(40, 45), (23, 70)], ids=str)
def test_given_centers(kind: str, key_size: tuple[int, int], dtype: torch.dtype) -> None:
    query, key = features(1, 5, 40, 45, dtype=dtype), features(1, 5, *key_size, dtype=dtype, seed=1)
    assert_matches(query, key, (1, 2), some_centers(kind, 1, (40, 45), key_size))


def test_own_positions_as_centers_change_nothing() -> None:
    query, key = features(2, 6, 70, 50, dtype=torch.float32), features(2, 6, 70, 50, dtype=torch.float32, seed=1)
    centers = own_positions(70, 50).expand(2, -1, -1)
    without, given = (hdrops.patch_match(query, key, radius=2, centers=c) for c in (None, centers))
    assert torch.equal(without.index, given.index) and torch.equal(without.score, given.score)


@st.composite
def searches(draw) -> dict:
    n, channels, patch = draw(st.integers(0, 2)), draw(st.integers(1, 20)), draw(st.sampled_from([1, 3, 5, 7]))
    size = draw(st.tuples(st.integers(1, 60), st.integers(1, 40)))
    kind = draw(st.sampled_from([None, "random", "own", "pairs", "blocks"]))
    key_size = size if kind is None else draw(st.tuples(st.integers(1, 30), st.integers(1, 50)))
    dtype, seed = draw(st.sampled_from([torch.float64, torch.float32])), draw(st.integers(0, 1000))
    layouts = draw(st.tuples(st.booleans(), st.booleans()))
    tensors = [features(n, channels, *size, dtype=dtype, seed=seed)]
    tensors.append(features(n, channels, *key_size, dtype=dtype, seed=seed + 1))
    return {
        "query": tensors[0].contiguous(memory_format=torch.channels_last) if layouts[0] else tensors[0],
        "key": tensors[1].contiguous(memory_format=torch.channels_last) if layouts[1] else tensors[1],
        "radius": draw(st.tuples(st.integers(0, 4), st.integers(0, 5))),
        "centers": None if kind is None else some_centers(kind, n, size, key_size),
        "patch": patch,
        "normalize": draw(st.sampled_from(NORMALIZATIONS)),
    }


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(search=searches())
def test_random_searches_equal_the_reference(search: dict) -> None:
    assert_matches(**search)


def textured(channels: int, height: int, width: int, seed: int = 0) -> Tensor:
    return features(1, channels, height, width, dtype=torch.float32, seed=seed)


@pytest.mark.parametrize("shift", [(0, 0), (3, -2), (-5, 5)], ids=str)
@pytest.mark.parametrize("normalize", ["key", "both"])
def test_finds_a_planted_shift(shift: tuple[int, int], normalize: str) -> None:
    key = textured(8, 40, 50)
    query = key.roll((-shift[0], -shift[1]), (2, 3))
    index = hdrops.patch_match(query, key, radius=5, normalize=normalize).index
    wanted = own_positions(40, 50) + shift[0] * 50 + shift[1]
    # The patches of these sites lie whole on both grids.
    inner = (slice(None), slice(6, -6), slice(6, -6))
    assert torch.equal(index[inner], wanted[None][inner])


@pytest.mark.parametrize("size", [(96, 128), (101, 131)], ids=str)
def test_the_pyramid_finds_planted_shifts_at_all_levels(size: tuple[int, int]) -> None:
    """Halves of an image move apart; three levels of its features, textured at every scale, recover both motions."""
    height, width = size[0] // 4 * 4, size[1] // 4 * 4
    coarse, middle, fine = (textured(6, height // s, width // s, seed=s) for s in (4, 2, 1))
    coarse = coarse * 4
    middle = middle * 2 + F.interpolate(coarse, scale_factor=2)
    levels = [coarse, middle, fine + F.interpolate(middle, scale_factor=2)]
    queries = []
    for level, key in zip((2, 1, 0), levels, strict=True):
        dy, dx = 12 >> level, 8 >> level
        half = key.shape[2] // 2
        queries.append(
            torch.cat([key.roll((-dy, dx), (2, 3))[:, :, :half], key.roll((dy, -dx), (2, 3))[:, :, half:]], 2)
        )
    # Rows and columns beyond the multiple of four are cut off at the coarser levels only.
    extra = (0, size[1] - width, 0, size[0] - height)
    queries[-1], keys = F.pad(queries[-1], extra, "replicate"), [*levels[:-1], F.pad(levels[-1], extra, "replicate")]
    matches = hdrops.patch_match_pyramid(queries, keys, radii=[4, 2, 2], normalize="both")
    assert len(matches) == 3
    for level, match, key in zip((2, 1, 0), matches, keys, strict=True):
        dy, dx = 12 >> level, 8 >> level
        rows, half = match.index.shape[1], (height >> level) // 2
        sign = torch.where(torch.arange(rows) < half, 1, -1)[:, None]
        wanted = own_positions(rows, match.index.shape[2], key.shape[3]) + sign * (dy * key.shape[3] - dx)
        # Without the sites whose patch or whose ancestors' patches meet the seam, or the border that rolled in.
        far = 16 + 4 * 3
        y, x = torch.arange(rows) << level, torch.arange(match.index.shape[2]) << level
        seam = height // 2
        inside_y = (y >= far) & (y < height - far) & ((y < seam - far // 2) | (y >= seam + far // 2))
        inside = inside_y[:, None] & ((x >= far) & (x < width - far))
        assert int(inside.sum()) > 20
        assert float((match.index[0] == wanted)[inside].double().mean()) > 0.95, f"level {level}"


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_pyramid_is_op_5(backend: str) -> None:
    """Centres written out, with odd sizes, of which a coarser level has half rounded down."""
    queries = [features(1, 3, 5, 6), features(1, 4, 11, 12)]
    keys = [features(1, 3, 5, 6, seed=1), features(1, 4, 11, 13, seed=2)]
    first, second = hdrops.patch_match_pyramid(queries, keys, radii=[2, (1, 2)], patch_size=1, backend=backend)
    centers = torch.zeros(1, 11, 12, dtype=torch.int64)
    for y, x in itertools.product(range(11), range(12)):
        parent_y, parent_x = min(y // 2, 4), min(x // 2, 5)
        match_y, match_x = divmod(int(first.index[0, parent_y, parent_x]), 6)
        center_y, center_x = 2 * match_y + y - 2 * parent_y, 2 * match_x + x - 2 * parent_x
        centers[0, y, x] = min(center_y, 10) * 13 + min(center_x, 12)
    wanted = hdrops.patch_match(queries[1], keys[1], radius=(1, 2), centers=centers, patch_size=1, backend=backend)
    assert torch.equal(second.index, wanted.index) and torch.equal(second.score, wanted.score)


def first_of_window(height: int, width: int, radius: int) -> Tensor:
    y, x = (torch.arange(height) - radius).clamp_min(0), (torch.arange(width) - radius).clamp_min(0)
    return (y[:, None] * width + x).unsqueeze(0)


@pytest.mark.asan
@pytest.mark.parametrize("with_centers", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_zero_features_choose_the_first_of_the_window(backend: str, with_centers: bool) -> None:
    zeros = torch.zeros(1, 3, 9, 20)
    # Centres that differ from the own positions at one corner only take the other path there.
    centers = own_positions(9, 20)[None].clone() if with_centers else None
    if centers is not None:
        centers[0, 8, 19] -= 1
    for normalize in NORMALIZATIONS:
        got = hdrops.patch_match(zeros, zeros, radius=2, centers=centers, normalize=normalize, backend=backend)
        wanted = first_of_window(9, 20, 2)
        if with_centers:
            wanted[0, 8, 19] -= 1
        assert torch.equal(got.index, wanted)
        assert torch.equal(got.score, torch.zeros(1, 9, 20))


@pytest.mark.parametrize("with_centers", [False, True])
def test_equal_scores_choose_the_smallest_index(with_centers: bool) -> None:
    """Features of ones: without normalisation every patch that lies whole on the key scores the same, exactly."""
    ones = torch.ones(1, 4, 12, 30)
    centers = integers(0, 360, 1, 12, 30) if with_centers else None
    got = hdrops.patch_match(ones, ones, radius=3, centers=centers, normalize="none")
    wanted = reference.patch_match(ones, ones, radius=3, centers=centers, normalize="none")
    assert torch.equal(got.index, wanted.index) and torch.equal(got.score, wanted.score)
    if not with_centers:
        y, x = (torch.arange(12) - 3).clamp_min(1), (torch.arange(30) - 3).clamp_min(1)
        assert torch.equal(got.index[0, 1:-1, 1:-1], (y[:, None] * 30 + x)[1:-1, 1:-1])


def test_ties_between_chunks_of_a_window() -> None:
    """A window that is searched in parts still gives the smallest index."""
    ones = torch.ones(1, 1, 75, 150)
    got = hdrops.patch_match(ones, ones, radius=(40, 70), patch_size=1, normalize="none")
    y, x = (torch.arange(75) - 40).clamp_min(0), (torch.arange(150) - 70).clamp_min(0)
    assert torch.equal(got.index[0], y[:, None] * 150 + x)


@pytest.mark.asan
@pytest.mark.parametrize("where", ["query", "key", "both"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("with_centers", [False, True])
@pytest.mark.parametrize("place", [(4, 9), (0, 0), (8, 19)], ids=str)
def test_nan_counts_as_minus_infinity(place, with_centers: bool, value: float, where: str) -> None:
    query, key = features(1, 3, 9, 20, dtype=torch.float32), features(1, 3, 9, 20, dtype=torch.float32, seed=1)
    centers = integers(0, 180, 1, 9, 20) if with_centers else None
    if where != "key":
        query[0, 1, place[0], place[1]] = value
    if where != "query":
        key[0, 2, place[0], place[1]] = value
    for normalize in NORMALIZATIONS:
        got = hdrops.patch_match(query, key, radius=2, centers=centers, normalize=normalize)
        wanted = reference.patch_match(query, key, radius=2, centers=centers, normalize=normalize)
        assert torch.equal(got.index, wanted.index)
        torch.testing.assert_close(got.score, wanted.score, rtol=1e-5, atol=1e-5)


def test_nothing_but_nan() -> None:
    nan = torch.full((1, 3, 9, 20), float("nan"))
    for normalize in NORMALIZATIONS:
        leaf = nan.clone().requires_grad_()
        got = hdrops.patch_match(leaf, nan, radius=2, normalize=normalize)
        assert torch.equal(got.index, first_of_window(9, 20, 2))
        assert bool((got.score == -torch.inf).all())
        got.score.sum().backward()
        assert torch.equal(leaf.grad, torch.zeros_like(nan))


@pytest.mark.asan
@pytest.mark.parametrize("centers", [False, True])
def test_any_memory_layout(centers: bool) -> None:
    query, key = features(2, 12, 20, 30, dtype=torch.float32), features(2, 12, 20, 30, dtype=torch.float32, seed=1)
    places = integers(0, 600, 2, 20, 30) if centers else None
    for dtype in (torch.float32, torch.bfloat16):
        wanted = hdrops.patch_match(query.to(dtype), key.to(dtype), radius=2, centers=places)
        views = {
            "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
            "transposed": lambda t: t.mT.contiguous().mT,
            "offset": lambda t: F.pad(t, (1, 2, 3, 1))[:, :, 3:-1, 1:-2],
            "every_other": lambda t: t.repeat_interleave(2, 1)[:, ::2],
        }
        for first, second in itertools.product(views.values(), repeat=2):
            given = None if places is None else places.mT.contiguous().mT
            got = hdrops.patch_match(first(query.to(dtype)), second(key.to(dtype)), radius=2, centers=given)
            assert torch.equal(got.index, wanted.index)
            assert_close(got.score, wanted.score.double(), terms=108)
    expanded = query[:1].expand(3, -1, -1, -1)
    got = hdrops.patch_match(expanded, expanded, radius=1)
    assert torch.equal(got.index[2], got.index[0])


def test_an_empty_batch() -> None:
    empty = torch.zeros(0, 3, 8, 9, requires_grad=True)
    for centers in (None, torch.zeros(0, 8, 9, dtype=torch.int64)):
        got = hdrops.patch_match(empty, empty, radius=2, centers=centers)
        assert got.index.shape == got.score.shape == (0, 8, 9)
        (gradient,) = torch.autograd.grad(got.score.sum(), empty)
        assert gradient.shape == empty.shape


def gradients(function, query: Tensor, key: Tensor, grad_score: Tensor, **options) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key)]
    return list(torch.autograd.grad(function(*leaves, **options).score, leaves, grad_score))


@pytest.mark.asan
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("patch", [1, 3, 5, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_equal_the_reference(dtype: torch.dtype, patch: int, normalize: str) -> None:
    query, key = features(2, 5, 12, 21, dtype=dtype), features(2, 5, 9, 70, dtype=dtype, seed=1)
    centers, grad_score = integers(0, 630, 2, 12, 21), features(2, 12, 21, dtype=dtype, seed=2)
    options = {"patch_size": patch, "normalize": normalize}
    index = hdrops.patch_match(query, key, radius=1, centers=centers, **options).index
    got = gradients(hdrops.patch_match, query, key, grad_score, radius=1, centers=centers, **options)
    exact = [tensor.double() for tensor in (query, key, grad_score)]
    wanted = gradients(reference.patch_match, *exact, radius=0, centers=index, **options)
    for name, actual, expected in zip(("query", "key"), got, wanted, strict=True):
        # An element is a sum over sites of products of sums over patches.
        assert_close(actual, expected, terms=5 * patch**4, scale=float(expected.abs().max()), name=name)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradcheck(channels_last: bool, normalize: str) -> None:
    # A planted match wins by far: no small step changes the choice.
    key = features(1, 2, 4, 5)
    query = key.roll(1, 3) + 0.1 * features(1, 2, 4, 5, seed=1)
    options = {"radius": 0, "centers": (own_positions(4, 5) - 1)[None], "normalize": normalize}
    if channels_last:
        query, key = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (query, key))
    leaves = query.requires_grad_(), key.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: hdrops.patch_match(q, k, **options).score, leaves)
    assert torch.autograd.gradcheck(lambda q, k: hdrops.patch_match(q, k, **options, backend="reference").score, leaves)


def test_a_norm_held_at_its_smallest_has_no_gradient() -> None:
    query, key = features(1, 3, 6, 7) * 1e-7, features(1, 3, 6, 7, seed=1) * 1e-7
    grad_score = features(1, 6, 7, seed=2)
    for normalize in NORMALIZATIONS:
        options = {"radius": 0, "normalize": normalize}
        got = gradients(hdrops.patch_match, query, key, grad_score, **options)
        wanted = gradients(reference.patch_match, query, key, grad_score, **options)
        for actual, expected in zip(got, wanted, strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("wanted", ["query", "key"])
def test_only_the_gradient_that_is_asked_for(wanted: str) -> None:
    tensors = {"query": features(1, 3, 8, 9), "key": features(1, 3, 8, 9, seed=1)}
    everything = dict(
        zip(
            tensors,
            gradients(hdrops.patch_match, *tensors.values(), torch.ones(1, 8, 9).double(), radius=1),
            strict=True,
        )
    )
    tensors[wanted].requires_grad_()
    hdrops.patch_match(**tensors, radius=1).score.sum().backward()
    assert torch.equal(tensors[wanted].grad, everything[wanted])


def test_the_index_is_not_differentiable_and_an_unused_score_needs_nothing() -> None:
    query = features(1, 3, 8, 9).requires_grad_()
    match = hdrops.patch_match(query, query.detach(), radius=1)
    assert not match.index.requires_grad and match.score.requires_grad


@pytest.mark.asan
def test_a_nan_stays_out_of_gradients_it_has_no_part_in() -> None:
    query, key = features(1, 3, 20, 20), features(1, 3, 20, 20, seed=1)
    query[0, 0, 5, 5] = float("nan")
    got = gradients(hdrops.patch_match, query, key, torch.ones(1, 20, 20).double(), radius=2)
    assert all(tensor.isfinite().all() for tensor in got)


@pytest.mark.asan
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [None, "random", "blocks"])
def test_bitwise_equal_for_any_thread_count(kind: str | None, dtype: torch.dtype, threads) -> None:
    query, key = features(2, 24, 70, 90, dtype=dtype), features(2, 24, 70, 90, dtype=dtype, seed=1)
    centers = None if kind is None else some_centers(kind, 2, (70, 90), (70, 90))
    grad_score = features(2, 70, 90, dtype=dtype, seed=2)
    results = []
    for count in (1, 2, 3):
        threads(count)
        match = hdrops.patch_match(query, key, radius=2, centers=centers)
        results.append(
            [
                *match,
                *gradients(hdrops.patch_match, query, key, grad_score, radius=2, centers=centers, normalize="both"),
            ]
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.asan
def test_many_sites_with_one_match() -> None:
    """All of the query matches one patch of the key: its gradient is a sum over all sites."""
    query, key = features(1, 3, 30, 31), features(1, 3, 5, 6, seed=1)
    centers = torch.full((1, 30, 31), 14)
    got = gradients(hdrops.patch_match, query, key, torch.ones(1, 30, 31).double(), radius=0, centers=centers)
    wanted = gradients(reference.patch_match, query, key, torch.ones(1, 30, 31).double(), radius=0, centers=centers)
    for actual, expected in zip(got, wanted, strict=True):
        assert_close(actual, expected, terms=930 * 9)


def test_fresh_memory_is_written_everywhere() -> None:
    torch.use_deterministic_algorithms(True)  # fills it with NaN
    try:
        query, key = features(2, 3, 70, 31, dtype=torch.float32), features(2, 3, 70, 31, dtype=torch.float32, seed=1)
        match = hdrops.patch_match(query, key, radius=2)
        assert match.score.isfinite().all() and int(match.index.min()) >= 0 and int(match.index.max()) < 70 * 31
        assert all(
            g.isfinite().all() for g in gradients(hdrops.patch_match, query, key, torch.ones(2, 70, 31), radius=1)
        )
    finally:
        torch.use_deterministic_algorithms(False)


SIMD_SCRIPT = """
import sys, torch, hdrops
query, key, centers, wanted = torch.load(sys.argv[1])
for given, (index, score, *gradients) in zip((None, centers), wanted):
    leaves = query.clone().requires_grad_(), key.clone().requires_grad_()
    match = hdrops.patch_match(*leaves, radius=3, centers=given)
    assert torch.equal(match.index, index)
    torch.testing.assert_close(match.score, score, rtol=1e-5, atol=1e-5)
    for got, expected in zip(torch.autograd.grad(match.score.sum(), leaves), gradients):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
print(hdrops._load.simd_level())
"""


@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_lower_instruction_sets_agree(level: str, tmp_path) -> None:
    levels = hdrops._load.SIMD_LEVELS
    if levels.index(level) >= levels.index(hdrops._load.simd_level()):
        pytest.skip(f"{level} is not below {hdrops._load.simd_level()}, which the other tests run on")
    query, key = features(1, 9, 50, 37, dtype=torch.float32), features(1, 9, 50, 37, dtype=torch.float32, seed=1)
    centers, wanted = integers(0, 50 * 37, 1, 50, 37), []
    for given in (None, centers):
        match = reference.patch_match(query.double(), key.double(), radius=3, centers=given)
        exact = gradients(
            reference.patch_match,
            query.double(),
            key.double(),
            torch.ones(1, 50, 37).double(),
            radius=0,
            centers=match.index,
        )
        wanted.append([match.index, match.score.float(), *(g.float() for g in exact)])
    torch.save((query, key, centers, wanted), tmp_path / "cases.pt")
    environment = {**os.environ, "HDROPS_SIMD": level, "PYTHONPATH": str(Path(hdrops.__file__).parents[1])}
    command = [sys.executable, "-c", SIMD_SCRIPT, str(tmp_path / "cases.pt")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == level


VALID = {"query": torch.zeros(2, 3, 8, 9), "key": torch.zeros(2, 3, 8, 9), "radius": 1}
ERRORS = [
    ({"query": [1.0]}, TypeError, r"patch_match: query must be a tensor, got list"),
    ({"key": torch.zeros(3, 8, 9)}, ValueError, r"key must have 4 dimensions \[N, C, Hk, Wk\], got 3 \(key shape"),
    ({"key": torch.zeros(1, 3, 8, 9)}, ValueError, r"key must have the query's batch 2, got 1 \(query shape"),
    ({"key": torch.zeros(2, 4, 8, 9)}, ValueError, r"key must have the query's channels 3, got 4 \(query shape"),
    ({"query": torch.zeros(2, 3, 0, 9)}, ValueError, r"at least one channel, row and column, got shape \[2, 3, 0, 9\]"),
    ({"key": torch.zeros(2, 3, 8, 10)}, ValueError, r"without centers .* grids of equal size, got query shape"),
    ({"key": torch.zeros(2, 3, 8, 9).double()}, TypeError, r"key must have .* dtype torch.float32, got torch.float64"),
    ({"query": torch.zeros(2, 3, 8, 9).int()}, TypeError, r"query must be float64, .* or float16, got torch.int32"),
    ({"key": torch.zeros(2, 3, 8, 9, device="meta")}, ValueError, r"key must be on query's device cpu, got meta"),
    ({"radius": -1}, ValueError, r"radius must be an integer or a pair of integers >= 0, got -1"),
    ({"radius": 1.5}, TypeError, r"radius must be an integer or a pair of integers >= 0, got 1.5"),
    ({"radius": (1, 2, 3)}, ValueError, r"radius must be an integer or a pair of integers >= 0, got \(1, 2, 3\)"),
    ({"patch_size": 4}, ValueError, r"patch_size must be one of 1, 3, 5, 7, got 4"),
    ({"patch_size": 3.0}, ValueError, r"patch_match: patch_size must be one of 1, 3, 5, 7, got 3.0"),
    ({"normalize": "cosine"}, ValueError, r"normalize must be one of key, query, both, none, got 'cosine'"),
    ({"centers": torch.zeros(2, 8, 9)}, TypeError, r"centers must be int64, got torch.float32"),
    ({"centers": torch.zeros(2, 8, 8).long()}, ValueError, r"centers must have .* size 8 x 9, got 8 x 8"),
    ({"centers": torch.zeros(1, 8, 9).long()}, ValueError, r"centers must have the batch 2, got 1 \(centers shape"),
    ({"centers": torch.zeros(8, 9).long()}, ValueError, r"centers must have 3 dimensions \[N, Hq, Wq\], got 2"),
    ({"backend": "gpu"}, ValueError, r"backend must be one of .*, got 'gpu'"),
    ({"backend": "triton"}, NotImplementedError, r"patch_match: has no triton backend; it has cpu"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=lambda value: str(value)[:40])
def test_error_messages(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        hdrops.patch_match(**{**VALID, **change})


def test_numpys_integers_are_integers() -> None:
    image = features(1, 3, 8, 9)
    wanted = hdrops.patch_match(image, image, radius=(1, 2), patch_size=5)
    got = hdrops.patch_match(image, image, radius=(np.int64(1), np.int32(2)), patch_size=np.int64(5))
    assert torch.equal(got.index, wanted.index) and torch.equal(got.score, wanted.score)


def test_errors_of_the_pyramid() -> None:
    image, finer = torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 16, 16)
    with pytest.raises(
        ValueError, match=r"patch_match_pyramid: queries, keys and radii must have one entry .* 2, 2 and 1"
    ):
        hdrops.patch_match_pyramid([image] * 2, [image] * 2, radii=[1])
    with pytest.raises(ValueError, match=r"at least one level, got 0, 0 and 0"):
        hdrops.patch_match_pyramid([], [], radii=[])
    with pytest.raises(ValueError, match=r"patch_match_pyramid: keys\[1\] must have 4 dimensions"):
        hdrops.patch_match_pyramid([image, finer], [image, finer[0]], radii=[1, 1])
    # The order of the levels, and what they share.
    with pytest.raises(ValueError, match=r"levels run coarse to fine; queries\[1\] must .* 2\*16 - 1 = 31, got 8"):
        hdrops.patch_match_pyramid([finer, image], [finer, image], radii=[1, 1])
    with pytest.raises(ValueError, match=r"coarse to fine; keys\[1\] must have at least the width .* = 15, got 14"):
        hdrops.patch_match_pyramid([image, finer], [image, finer[..., :14]], radii=[1, 1])
    with pytest.raises(ValueError, match=r"patch_match_pyramid: queries\[1\] must have queries\[0\]'s batch 1, got 2"):
        hdrops.patch_match_pyramid([image, finer.repeat(2, 1, 1, 1)], [image, finer], radii=[1, 1])
    with pytest.raises(ValueError, match=r"queries\[1\] must be on queries\[0\]'s device cpu, got meta"):
        hdrops.patch_match_pyramid([image, finer.to("meta")], [image, finer], radii=[1, 1])
    with pytest.raises(TypeError, match=r"patch_match_pyramid: keys must be a sequence .* got generator"):
        hdrops.patch_match_pyramid([image], (key for key in [image]), radii=[1])


@pytest.mark.asan
def test_direct_calls_of_the_operator_are_safe() -> None:
    """torch.ops.hdrops without Python's checks."""
    image, op = torch.zeros(1, 3, 8, 9), torch.ops.hdrops.patch_match.default
    backward = torch.ops.hdrops._patch_match_backward.default
    index = torch.zeros(1, 8, 9, dtype=torch.int64)
    for arguments in (
        (image, image, [-1, 0], None, 3, "key"),
        (image, image, [1, 1], None, 4, "key"),
        (image, image, [1, 1], None, 3, "cosine"),
        (image, image[:, :, :7], [1, 1], None, 3, "key"),
        (image, image[:, :2], [1, 1], None, 3, "key"),
        (image, image.double(), [1, 1], None, 3, "key"),
        (image, image, [1, 1], index[:, 1:], 3, "key"),
        (image, image, [1, 1], index.int(), 3, "key"),
    ):
        with pytest.raises(ValueError, match="patch_match: "):
            op(*arguments)
    with pytest.raises(ValueError, match="patch_match: index must have shape"):
        backward(torch.zeros(1, 8, 9), image, image, index[:, 1:], 3, "key", [True, True], False)
    # Matches outside the key count as its nearest pixel.
    for place in (-5, 10**12):
        got = backward(torch.ones(1, 8, 9), image + 1, image + 2, index + place, 3, "key", [True, True], False)
        clamped = (index + place).clamp(0, 71)
        wanted = backward(torch.ones(1, 8, 9), image + 1, image + 2, clamped, 3, "key", [True, True], False)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_examples_run_as_documented() -> None:
    for function in (hdrops.patch_match, hdrops.patch_match_pyramid):
        examples = doctest.DocTestFinder().find(function, function.__name__, globs={})
        results = [doctest.DocTestRunner().run(example) for example in examples]
        assert sum(result.attempted for result in results) > 0
        assert sum(result.failed for result in results) == 0
