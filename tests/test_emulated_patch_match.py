"""The CUDA kernels of patch matching on the host emulator.

They stand in for the CPU kernels of ``torch.ops.hdrops`` while this module runs, so that the tests of the CPU kernels
are theirs: the same cases, the same float64 reference, the same tolerances. What only they can get wrong comes after:
the order of threads, tiles that several blocks share, sums in any order.
"""

from types import ModuleType

import pytest
import torch
from torch import Tensor

import hdrops
import test_patch_match as cases
from hdrops.ops import _common
from hdrops.reference import patch_match as reference
from hdrops.testing import assert_close

pytestmark = pytest.mark.asan


features, integers, gradients = cases.features, cases.integers, cases.gradients

HALVES = [torch.bfloat16, torch.float16]
NAMES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


class Emulated:
    """The operators on the emulator: what the bindings do (csrc/patch_match/bindings.h), for CPU tensors."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def _features(self, query: Tensor, key: Tensor, patch_size: int, normalize: str) -> tuple[list[Tensor], list]:
        """Query and key, dense, and the arguments that describe them."""
        dense = [tensor.contiguous(memory_format=_common.memory_format(tensor)) for tensor in (query, key)]
        channels_last = [not tensor.is_contiguous() for tensor in dense]
        normalized = [normalize in (which, "both") for which in ("query", "key")]
        sizes = [*query.shape, *key.shape[2:]]
        pointers = [tensor.data_ptr() for tensor in dense]
        return dense, [NAMES[query.dtype], sizes, *pointers, channels_last, normalized, patch_size]

    def patch_match(self, query, key, radius, centers, patch_size, normalize):
        _dense, described = self._features(query, key, patch_size, normalize)
        shape = (query.shape[0], *query.shape[2:])
        index, score = torch.empty(shape, dtype=torch.int64), torch.empty(shape, dtype=query.dtype)
        places = None if centers is None else centers.contiguous()
        if index.numel() > 0:
            pointer = 0 if places is None else places.data_ptr()
            self.module.patch_match(*described, list(radius), pointer, index.data_ptr(), score.data_ptr())
        return score, index

    def _patch_match_backward(self, grad_score, query, key, index, patch_size, normalize, output_mask, deterministic):
        dense, described = self._features(query, key, patch_size, normalize)
        grads = [torch.empty_like(t) if use else t.new_empty(0) for t, use in zip(dense, output_mask, strict=True)]
        grad_score, index = grad_score.contiguous(), index.contiguous()
        if index.numel() > 0:
            pointers = [t.data_ptr() if use else 0 for t, use in zip(grads, output_mask, strict=True)]
            self.module.patch_match_backward(
                *described, grad_score.data_ptr(), index.data_ptr(), *pointers, deterministic
            )
        return tuple(grads)


@pytest.fixture(scope="module", autouse=True)
def emulated_operators(emulated_module: ModuleType):
    """The emulator in the place of the CPU kernels."""
    emulated = Emulated(emulated_module)
    with torch.library._scoped_library("hdrops", "IMPL") as library:
        for name in ("patch_match", "_patch_match_backward"):
            library.impl(name, getattr(emulated, name), "CPU", allow_override=True)
        yield


@pytest.fixture(autouse=True)
def device(emulated: ModuleType, threads):
    """Sets the number of multiprocessors for a test; one leaves a tile to one block."""
    threads(1)
    emulated.set_device(compute_capability=90, multiprocessors=1)
    yield lambda multiprocessors: emulated.set_device(90, multiprocessors)
    emulated.set_device()


# The cases of the CPU kernels


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "shape", "radius"),
    [
        ("plain", (2, 5, 12, 13), 2),
        ("one_pixel", (1, 3, 1, 1), 3),
        ("one_row", (1, 4, 1, 40), (0, 5)),
        ("one_column", (2, 4, 40, 1), (5, 0)),
        ("anisotropic", (1, 6, 20, 31), (1, 6)),
        ("no_radius", (1, 4, 9, 10), 0),
        ("many_channels", (1, 61, 9, 11), 2),
        ("window_larger_than_the_key", (1, 3, 11, 9), 30),
        ("several_passes", (1, 2, 17, 33), (9, 9)),
    ],
)
def test_equals_reference(name: str, shape: tuple[int, ...], radius, dtype: torch.dtype) -> None:
    cases.assert_matches(features(*shape, dtype=dtype), features(*shape, dtype=dtype, seed=1), radius)


@pytest.mark.parametrize("normalize", cases.NORMALIZATIONS)
@pytest.mark.parametrize("patch", [1, 3, 5, 7])
def test_patches_and_normalizations(patch: int, normalize: str) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        query, key = features(1, 4, 21, 34, dtype=dtype), features(1, 4, 21, 34, dtype=dtype, seed=1)
        cases.assert_matches(query, key, (3, 2), patch=patch, normalize=normalize)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("radius", [0, 1, (3, 4)], ids=str)
@pytest.mark.parametrize("key_size", [(12, 15), (7, 30)], ids=str)
def test_given_centers(key_size: tuple[int, int], radius, dtype: torch.dtype) -> None:
    query, key = features(2, 5, 12, 15, dtype=dtype), features(2, 5, *key_size, dtype=dtype, seed=1)
    cases.assert_matches(query, key, radius, cases.some_centers("random", 2, (12, 15), key_size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_own_positions_as_centers_change_nothing(dtype: torch.dtype) -> None:
    query, key = features(1, 6, 30, 20, dtype=dtype), features(1, 6, 30, 20, dtype=dtype, seed=1)
    without, given = (
        hdrops.patch_match(query, key, radius=2, centers=centers)
        for centers in (None, cases.own_positions(30, 20)[None])
    )
    assert torch.equal(without.index, given.index) and torch.equal(without.score, given.score)


@pytest.mark.parametrize("with_centers", [False, True])
def test_zero_features_choose_the_first_of_the_window(with_centers: bool) -> None:
    cases.test_zero_features_choose_the_first_of_the_window("cpu", with_centers)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("with_centers", [False, True])
@pytest.mark.parametrize("place", [(4, 9), (0, 0), (8, 19)], ids=str)
def test_nan_counts_as_minus_infinity(place, with_centers: bool, value: float) -> None:
    for where in ("query", "key", "both"):
        cases.test_nan_counts_as_minus_infinity(place, with_centers, value, where)


@pytest.mark.parametrize("centers", [False, True])
def test_any_memory_layout(centers: bool) -> None:
    query, key = features(2, 8, 6, 11, dtype=torch.float32), features(2, 8, 6, 11, dtype=torch.float32, seed=1)
    places = integers(0, 66, 2, 6, 11) if centers else None
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for channels in (8, 7):
            tensors = [tensor[:, :channels].to(dtype) for tensor in (query, key)]
            wanted = hdrops.patch_match(*tensors, radius=2, centers=places)
            for last in ((True, True), (True, False), (False, True)):
                formats = [torch.channels_last if is_last else torch.contiguous_format for is_last in last]
                laid_out = [t.contiguous(memory_format=form) for t, form in zip(tensors, formats, strict=True)]
                got = hdrops.patch_match(*laid_out, radius=2, centers=places)
                assert torch.equal(got.index, wanted.index) and torch.equal(got.score, wanted.score)


test_equal_scores_choose_the_smallest_index = cases.test_equal_scores_choose_the_smallest_index
test_nothing_but_nan = cases.test_nothing_but_nan
test_an_empty_batch = cases.test_an_empty_batch
test_a_norm_held_at_its_smallest_has_no_gradient = cases.test_a_norm_held_at_its_smallest_has_no_gradient
test_a_nan_stays_out_of_gradients_it_has_no_part_in = cases.test_a_nan_stays_out_of_gradients_it_has_no_part_in
test_many_sites_with_one_match = cases.test_many_sites_with_one_match


@pytest.fixture(params=[False, True], ids=["any order", "deterministic"])
def deterministic(request):
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("normalize", cases.NORMALIZATIONS)
@pytest.mark.parametrize("patch", [1, 3, 5, 7])
def test_gradients_equal_the_reference(patch: int, normalize: str, deterministic: bool) -> None:
    for dtype in cases.DTYPES if patch == 3 else (torch.float64, torch.float32):
        cases.test_gradients_equal_the_reference(dtype, patch, normalize)


@pytest.mark.parametrize("wanted", ["query", "key"])
def test_only_the_gradient_that_is_asked_for(wanted: str) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        cases.test_only_the_gradient_that_is_asked_for(wanted)
    finally:
        torch.use_deterministic_algorithms(False)


def test_gradcheck(deterministic: bool) -> None:
    cases.test_gradcheck(channels_last=deterministic, normalize="both")


# What only kernels of a GPU can get wrong


def test_the_emulated_kernels_run(emulated: ModuleType, monkeypatch) -> None:
    """The tests of this module would pass on the CPU kernels too."""
    called = []
    for name in ("patch_match", "patch_match_backward"):
        original = getattr(emulated, name)
        monkeypatch.setattr(emulated, name, lambda *given, kernel=original: called.append(1) or kernel(*given))
    leaf = features(1, 2, 3, 4).requires_grad_()
    hdrops.patch_match(leaf, leaf, radius=1).score.sum().backward()
    assert len(called) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("patch", [3, 7])
def test_blocks_that_share_a_tile_choose_the_same(patch: int, dtype: torch.dtype, device) -> None:
    query, key = features(2, 5, 20, 33, dtype=dtype), features(2, 5, 20, 33, dtype=dtype, seed=1)
    key[:, :, :9] = key[:, :, 9:10]  # ties between the parts
    results = []
    for multiprocessors in (1, 2, 16):
        device(multiprocessors)
        results.append(hdrops.patch_match(query, key, radius=(12, 10), patch_size=patch))
    for result in results[1:]:
        assert torch.equal(result.index, results[0].index) and torch.equal(result.score, results[0].score)
    cases.assert_matches(query, key, (12, 10), patch=patch)


# Given centres: tiles whose windows lie at one displacement share products


def halves_move_apart(n: int, size: tuple[int, int], key_size: tuple[int, int]) -> Tensor:
    """Centres of two displacements: tiles of either, tiles of both, and sites whose centre the key's border holds."""
    y, x = torch.arange(size[0])[:, None], torch.arange(size[1])
    left = x < size[1] // 2
    moved_y = (y + torch.where(left, -2, 1)).clamp(0, key_size[0] - 1)
    moved_x = (x + torch.where(left, 5, -3)).clamp(0, key_size[1] - 1)
    return (moved_y * key_size[1] + moved_x).expand(n, -1, -1)


@pytest.mark.parametrize("patch", [1, 3, 5, 7])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_centers_of_two_displacements(dtype: torch.dtype, patch: int) -> None:
    size, key_size = (33, 68), (29, 75)
    query, key = features(1, 3, *size, dtype=dtype), features(1, 3, *key_size, dtype=dtype, seed=1)
    centers = halves_move_apart(1, size, key_size)
    cases.assert_matches(query, key, (1, 2), centers, patch=patch, normalize="both")
    if dtype == torch.float64:
        options = {"radius": (1, 2), "centers": centers, "patch_size": patch}
        assert torch.equal(*(search.patch_match(query, key, **options).index for search in (hdrops, reference)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tile_of_one_displacement_shares_products(dtype: torch.dtype) -> None:
    """It adds a patch's rows first, on matrix units its columns, and any other tile place by place: the order shows."""
    key = torch.zeros(1, 1, 3, 3, dtype=dtype)
    large, small = 2.0**13, 2.0**-13
    if dtype == torch.float32:
        key[0, 0, 0, 0], key[0, 0, 1, 0], key[0, 0, 1, 1] = small, large, -large
    else:
        key[0, 0, 0, 0], key[0, 0, 0, 1], key[0, 0, 1, 0] = large, small, -large
    centers = cases.own_positions(3, 3)[None].clone()
    for last, wanted in ((8, small), (7, 0.0)):
        centers[0, 2, 2] = last
        got = hdrops.patch_match(torch.ones_like(key), key, radius=0, centers=centers, normalize="none")
        assert got.score[0, 1, 1] == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_blocks_that_share_a_tile_around_centers(dtype: torch.dtype, device) -> None:
    size, key_size = (18, 68), (21, 70)
    query, key = features(2, 3, *size, dtype=dtype), features(2, 3, *key_size, dtype=dtype, seed=1)
    centers = halves_move_apart(2, size, key_size)
    results = []
    for multiprocessors in (1, 16):
        device(multiprocessors)
        results.append(hdrops.patch_match(query, key, radius=(4, 9), centers=centers))
    assert torch.equal(results[1].index, results[0].index) and torch.equal(results[1].score, results[0].score)
    cases.assert_matches(query, key, (4, 9), centers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_a_tile_of_one_displacement(value: float, dtype: torch.dtype) -> None:
    query, key = (features(1, 3, 9, 20, dtype=dtype, seed=seed) for seed in (0, 1))
    key = torch.nn.functional.pad(key, (4, 4, 4, 4))
    query[0, 1, 4, 9] = key[0, 2, 8, 8] = key[0, 0, 4, 4] = value
    centers = (cases.own_positions(9, 20, 28) + 4 * 28 + 4)[None]
    options = {"radius": (2, 3), "centers": centers, "normalize": "none"}
    got = hdrops.patch_match(query, key, **options)
    wanted = reference.patch_match(query.double(), key.double(), **options)
    assert torch.equal(got.index, wanted.index)
    torch.testing.assert_close(got.score.double(), wanted.score, rtol=2**-8, atol=2**-8)


# 16-bit data on matrix units


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("shape", "radius", "patch"),
    [
        ((1, 40, 48, 49), 1, 3),  # tiles that see no border
        ((1, 3, 30, 33), (6, 4), 3),  # passes of unequal height
        ((1, 17, 19, 45), (1, 20), 5),  # wide passes
        ((2, 2, 12, 11), (11, 10), 7),  # windows larger than the key
    ],
    ids=str,
)
def test_searches_on_matrix_units(shape: tuple[int, ...], radius, patch: int, dtype: torch.dtype) -> None:
    query, key = features(*shape, dtype=dtype), features(*shape, dtype=dtype, seed=1)
    cases.assert_matches(query, key, radius, patch=patch, normalize="both")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_matrix_units_search_where_there_are_some(dtype: torch.dtype, emulated: ModuleType) -> None:
    """They add a patch's columns first, the multiply-adds its rows: a sum in which the order shows."""
    key = torch.zeros(1, 1, 3, 3, dtype=dtype)
    key[0, 0, 0, 0], key[0, 0, 0, 1], key[0, 0, 1, 0] = 2.0**13, 2.0**-13, -(2.0**13)
    query = torch.ones_like(key)
    for capability, wanted in ((75, 0.0), (80, 2.0**-13), (120, 2.0**-13)):
        emulated.set_device(compute_capability=capability, multiprocessors=1)
        assert hdrops.patch_match(query, key, radius=0, normalize="none").score[0, 1, 1] == wanted


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [(4, 9), (0, 0), (8, 19)], ids=str)
def test_nan_on_matrix_units(place: tuple[int, int], value: float) -> None:
    for where in ("query", "key", "both"):
        query, key = (features(1, 3, 9, 20, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
        if where != "key":
            query[0, 1, place[0], place[1]] = value
        if where != "query":
            key[0, 2, place[0], place[1]] = value
        for normalize in ("none", "both"):
            got = hdrops.patch_match(query, key, radius=2, normalize=normalize)
            wanted = reference.patch_match(query.double(), key.double(), radius=2, normalize=normalize)
            assert torch.equal(got.index, wanted.index)
            torch.testing.assert_close(got.score.double(), wanted.score, rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize("multiprocessors", [1, 16])
def test_ties_on_matrix_units(multiprocessors: int, device) -> None:
    """Of equal scores the smallest index wins, in one pass, between passes and between blocks."""
    device(multiprocessors)
    options = {"radius": (8, 12), "normalize": "none"}
    for value in (0.0, 1.0, float("nan")):
        same = torch.full((1, 4, 19, 33), value, dtype=torch.float16)
        got, wanted = (search.patch_match(same, same, **options) for search in (hdrops, reference))
        assert torch.equal(got.index, wanted.index) and torch.equal(got.score, wanted.score)


def test_any_address_on_matrix_units() -> None:
    """Maps that begin at an odd address, as a slice of a larger tensor does."""
    query, key = (
        features(1, 8, 7, 9, dtype=torch.float16, seed=seed).contiguous(memory_format=torch.channels_last)
        for seed in (0, 1)
    )
    wanted = hdrops.patch_match(query, key, radius=2)
    memory = torch.zeros(key.numel() + 1, dtype=torch.float16)[1:]
    odd = memory.view(1, 7, 9, 8).permute(0, 3, 1, 2).copy_(key)
    assert odd.data_ptr() % 16 != 0 and odd.is_contiguous(memory_format=torch.channels_last)
    got = hdrops.patch_match(query, odd, radius=2)
    assert torch.equal(got.index, wanted.index) and torch.equal(got.score, wanted.score)


def test_any_order_of_threads_on_matrix_units(emulated: ModuleType, device) -> None:
    query, key = (features(1, 35, 18, 20, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
    device(2)
    results = []
    for seed in range(3):
        emulated.set_seed(seed)
        results.append(hdrops.patch_match(query, key, radius=(2, 5)))
    for result in results[1:]:
        assert torch.equal(result.index, results[0].index) and torch.equal(result.score, results[0].score)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_the_oldest_gpu(dtype: torch.dtype, emulated: ModuleType) -> None:
    emulated.set_device(compute_capability=75, multiprocessors=1)
    cases.assert_matches(features(1, 6, 9, 13, dtype=dtype), features(1, 6, 9, 13, dtype=dtype, seed=1), 2)
    cases.test_gradients_equal_the_reference(dtype, 3, "both")


@pytest.mark.parametrize("with_centers", [False, True])
def test_any_order_of_threads_gives_the_same_bits(with_centers: bool, emulated: ModuleType, device) -> None:
    query, key = features(1, 9, 18, 34, dtype=torch.float32), features(1, 9, 18, 34, dtype=torch.float32, seed=1)
    centers = integers(0, 18 * 34, 1, 18, 34) if with_centers else None
    grad_score = features(1, 18, 34, dtype=torch.float32, seed=2)
    device(2)
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for seed in range(3):
            emulated.set_seed(seed)
            found = hdrops.patch_match(query, key, radius=(2, 9), centers=centers)
            options = {"radius": 0, "centers": found.index}
            grads = gradients(hdrops.patch_match, query, key, grad_score, **options)
            results.append((*found, *grads))
    finally:
        torch.use_deterministic_algorithms(False)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    exact = [tensor.double() for tensor in (query, key, grad_score)]
    wanted = gradients(reference.patch_match, *exact, **options)
    for actual, expected in zip(results[0][2:], wanted, strict=True):
        assert_close(actual, expected, terms=9 * 81, scale=float(expected.abs().max()))


def test_infinite_gradients_reach_the_key_in_both_modes(deterministic: bool) -> None:
    query, key = features(1, 2, 5, 6, dtype=torch.float32), features(1, 2, 5, 6, dtype=torch.float32, seed=1)
    grad_score = torch.zeros(1, 5, 6)
    grad_score[0, 2, 3] = float("inf")
    options = {"radius": 0, "normalize": "none"}
    got = gradients(hdrops.patch_match, query, key, grad_score, **options)
    wanted = torch.zeros_like(key)
    wanted[:, :, 1:4, 2:5] = float("inf") * query[:, :, 1:4, 2:5]
    assert torch.equal(got[1], wanted)
