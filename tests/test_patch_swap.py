"""patch_swap computes what OP-4 says: written out, against the float64 reference, identity swaps, TTSR's transfer."""

import doctest
import itertools

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

import hdrops
from hdrops.reference import patch_match as reference
from hdrops.testing import assert_close

pytestmark = [pytest.mark.device, pytest.mark.usefixtures("one_thread")]

DEVICE = torch.get_default_device().type
BACKENDS = ["triton" if DEVICE == "cuda" else DEVICE, "reference"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def features(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(DEVICE, dtype)


def matches(high: int, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, high, shape, generator=generator, device="cpu").to(DEVICE)


def identity(n: int, height: int, width: int) -> Tensor:
    return torch.arange(height * width).reshape(1, height, width).expand(n, -1, -1)


def gradient(function, source: Tensor, index: Tensor, grad_output: Tensor, **options) -> Tensor:
    source = source.detach().requires_grad_()
    return torch.autograd.grad(function(source, index, **options), source, grad_output)[0]


def assert_equals_reference(source: Tensor, index: Tensor, **options) -> None:
    output = hdrops.patch_swap(source, index, **options)
    wanted = reference.patch_swap(source.double(), index, **options)
    assert output.dtype == source.dtype
    assert_close(output, wanted, terms=options.get("patch_size", 3) ** 2, name="output")
    grad_output = features(*output.shape, dtype=source.dtype, seed=7)
    got = gradient(hdrops.patch_swap, source, index, grad_output, **options)
    wanted = gradient(reference.patch_swap, source.double(), index, grad_output.double(), **options)
    scale = float(wanted.abs().max()) if wanted.numel() else None
    assert_close(got, wanted, terms=options.get("patch_size", 3) ** 2, scale=scale, name="gradient")


@pytest.mark.parametrize("border", ["exclude", "zero"])
@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("patch", [1, 3, 5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_swap_written_out(patch: int, scale: int, border: str, backend: str) -> None:
    source, index = features(1, 2, scale * 4, scale * 5), matches(20, 1, 6, 3)
    reach = patch // 2
    total, count = torch.zeros(1, 2, scale * 6, scale * 3).double(), torch.zeros(6, 3)
    for y, x in itertools.product(range(6), range(3)):
        for dy, dx in itertools.product(range(-reach, reach + 1), repeat=2):
            match_y, match_x = divmod(int(index[0, y, x]), 5)
            to_y, to_x, from_y, from_x = y + dy, x + dx, match_y + dy, match_x + dx
            if 0 <= to_y < 6 and 0 <= to_x < 3 and 0 <= from_y < 4 and 0 <= from_x < 5:
                count[to_y, to_x] += 1
                for row, column in itertools.product(range(scale), repeat=2):
                    pixel = source[0, :, scale * from_y + row, scale * from_x + column]
                    total[0, :, scale * to_y + row, scale * to_x + column] += pixel
    divisor = count.repeat_interleave(scale, 0).repeat_interleave(scale, 1) if border == "exclude" else patch**2
    got = hdrops.patch_swap(source, index, patch_size=patch, scale=scale, border=border, backend=backend)
    assert_close(got, total / divisor, terms=patch**2)


@pytest.mark.asan
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("border", ["exclude", "zero"])
@pytest.mark.parametrize("scale", [1, 2, 4])
@pytest.mark.parametrize("patch", [1, 3, 5, 7])
def test_equals_reference(patch: int, scale: int, border: str, dtype: torch.dtype) -> None:
    source, index = features(2, 11, scale * 9, scale * 10, dtype=dtype), matches(90, 2, 13, 75)
    assert_equals_reference(source, index, patch_size=patch, scale=scale, border=border)


SIZES = {
    # name: batch, channels, key's grid, query's grid
    "one_site": (1, 3, (1, 1), (1, 1)),
    "one_match_for_all": (1, 4, (1, 1), (12, 80)),
    "one_row": (2, 5, (1, 70), (1, 66)),
    "one_column": (2, 5, (70, 1), (66, 1)),
    "many_channels": (1, 300, (6, 7), (7, 6)),
    "one_channel": (3, 1, (20, 30), (25, 20)),
    "whole_vectors": (1, 64, (20, 20), (20, 20)),
    "no_query": (1, 3, (4, 5), (0, 6)),
    "empty_batch": (0, 3, (4, 5), (5, 6)),
}


@pytest.mark.asan
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str, dtype: torch.dtype) -> None:
    n, channels, key, query = SIZES[name]
    assert_equals_reference(features(n, channels, *key, dtype=dtype), matches(key[0] * key[1], n, *query))


@st.composite
def swaps(draw) -> dict:
    n, channels, scale = draw(st.integers(0, 2)), draw(st.integers(1, 40)), draw(st.sampled_from([1, 2, 4]))
    key, query = (draw(st.tuples(st.integers(1, 20), st.integers(1, 40))) for _ in range(2))
    dtype, seed = draw(st.sampled_from([torch.float64, torch.float32])), draw(st.integers(0, 1000))
    source = features(n, channels, scale * key[0], scale * key[1], dtype=dtype, seed=seed)
    if draw(st.booleans()):
        source = source.contiguous(memory_format=torch.channels_last)
    return {
        "source": source,
        "index": matches(key[0] * key[1], n, *query, seed=seed),
        "patch_size": draw(st.sampled_from([1, 3, 5, 7])),
        "scale": scale,
        "border": draw(st.sampled_from(["exclude", "zero"])),
    }


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(swap=swaps())
def test_random_swaps_equal_the_reference(swap: dict) -> None:
    assert_equals_reference(**swap)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1, 2, 4])
@pytest.mark.parametrize("patch", [1, 3, 5, 7])
def test_an_identity_swap_changes_nothing_borders_included(patch: int, scale: int, dtype: torch.dtype) -> None:
    # Values of few digits: the sums of equal terms are exact, and so is their mean where the count is a power of two.
    source = (features(1, 5, scale * 8, scale * 9) * 8).round().to(dtype)
    output = hdrops.patch_swap(source, identity(1, 8, 9), patch_size=patch, scale=scale)
    assert_close(output, source.double())
    grad = gradient(
        hdrops.patch_swap, source, identity(1, 8, 9), torch.ones_like(source), patch_size=patch, scale=scale
    )
    assert_close(grad, torch.ones_like(grad).double())


def test_the_zero_border_darkens_an_identity_swap() -> None:
    output = hdrops.patch_swap(torch.ones(1, 1, 5, 6), identity(1, 5, 6), border="zero")
    wanted = torch.ones(5, 6)
    wanted[[0, -1]] *= 2 / 3
    wanted[:, [0, -1]] *= 2 / 3
    torch.testing.assert_close(output[0, 0], wanted)


def ttsr(query: Tensor, key: Tensor, values: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """TTSR's search and hard attention as a plain composition: the correlation of all patches, gather, fold."""
    height, width = query.shape[2:]
    ours, theirs = (F.normalize(F.unfold(t, 3, padding=1), dim=1) for t in (query, key))
    score, index = (theirs.transpose(1, 2) @ ours).max(1)
    transferred = []
    for value in values:
        s = value.shape[2] // key.shape[2]
        patches = F.unfold(value, 3 * s, padding=s, stride=s)
        chosen = patches.gather(2, index.unsqueeze(1).expand(-1, patches.shape[1], -1))
        transferred.append(F.fold(chosen, (s * height, s * width), 3 * s, padding=s, stride=s) / 9)
    return index.reshape(-1, height, width), score.reshape(-1, height, width), transferred


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_ttsr_search_and_transfer(dtype: torch.dtype) -> None:
    query, key = features(2, 6, 10, 12, dtype=dtype), features(2, 6, 10, 12, dtype=dtype, seed=1)
    values = [features(2, 8 // s, 10 * s, 12 * s, dtype=dtype, seed=s) for s in (1, 2, 4)]
    index, score, transferred = ttsr(query, key, values)
    match = hdrops.patch_match(query, key, radius=12, normalize="both")
    assert torch.equal(match.index, index)
    assert_close(match.score, score.double(), terms=54)
    for value, wanted in zip(values, transferred, strict=True):
        scale = value.shape[2] // 10
        got = hdrops.patch_swap(value, match.index, scale=scale, border="zero")
        assert_close(got, wanted.double(), terms=9)
        # The gradient too, of each value's fold.
        leaf, grad_output = value.clone().requires_grad_(), features(*got.shape, dtype=dtype, seed=9)
        (plain,) = torch.autograd.grad(ttsr(query, key, [leaf])[2], leaf, grad_output)
        ours = gradient(hdrops.patch_swap, value, match.index, grad_output, scale=scale, border="zero")
        assert_close(ours, plain.double(), terms=9, scale=float(plain.abs().max()))


@pytest.mark.parametrize("border", ["exclude", "zero"])
@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str, scale: int, border: str) -> None:
    source, index = features(1, 2, scale * 3, scale * 4).requires_grad_(), matches(12, 1, 4, 3)

    def function(source: Tensor) -> Tensor:
        return hdrops.patch_swap(source, index, scale=scale, border=border, backend=backend)

    assert torch.autograd.gradcheck(function, source)


@pytest.mark.asan
@pytest.mark.parametrize("scale", [1, 2])
def test_any_memory_layout(scale: int) -> None:
    index = matches(20 * 12, 2, 15, 30)
    for dtype in (torch.float32, torch.bfloat16):
        source = features(2, 12, scale * 20, scale * 12, dtype=dtype)
        wanted = hdrops.patch_swap(source, index, scale=scale)
        grad_output = features(*wanted.shape, dtype=dtype, seed=3)
        wanted_gradient = gradient(hdrops.patch_swap, source, index, grad_output, scale=scale)
        for view in (
            source.contiguous(memory_format=torch.channels_last),
            source.mT.contiguous().mT,
            F.pad(source, (1, 2, 3, 1))[:, :, 3:-1, 1:-2],
            source.repeat_interleave(2, 1)[:, ::2],
        ):
            got = hdrops.patch_swap(view, index.mT.contiguous().mT, scale=scale)
            assert torch.equal(got, wanted)
            last = view.is_contiguous(memory_format=torch.channels_last)
            assert got.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
            for grad in (grad_output, grad_output.contiguous(memory_format=torch.channels_last)):
                assert torch.equal(gradient(hdrops.patch_swap, view, index, grad, scale=scale), wanted_gradient)


def test_an_expanded_gradient() -> None:
    source, index = features(1, 3, 6, 7), matches(42, 1, 5, 6)
    expanded = torch.ones(()).double().expand(1, 3, 5, 6)
    got = gradient(hdrops.patch_swap, source, index, expanded)
    assert torch.equal(got, gradient(hdrops.patch_swap, source, index, expanded.contiguous()))


@pytest.mark.asan
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_outside_the_key_are_clamped(backend: str) -> None:
    source, index = features(1, 3, 6, 7), matches(42, 1, 5, 6)
    index[0, 0, 0], index[0, 4, 5] = -3, 10**12
    got = hdrops.patch_swap(source, index, backend=backend)
    assert torch.equal(got, hdrops.patch_swap(source, index.clamp(0, 41), backend=backend))
    grad_output = torch.ones(1, 3, 5, 6).double()
    wanted = gradient(hdrops.patch_swap, source, index.clamp(0, 41), grad_output)
    assert torch.equal(gradient(hdrops.patch_swap, source, index, grad_output), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_reaches_the_patches_that_hold_it_and_no_others(backend: str) -> None:
    source = torch.zeros(1, 2, 9, 9)
    source[0, 1, 4, 4] = float("nan")
    output = hdrops.patch_swap(source, identity(1, 9, 9), backend=backend)
    assert torch.equal(output.isnan(), source.isnan())
    index = torch.zeros(1, 9, 9, dtype=torch.int64)
    assert not hdrops.patch_swap(source, index, backend=backend).isnan().any()


@pytest.mark.cpu
@pytest.mark.asan
@pytest.mark.parametrize("scale", [1, 4])
def test_bitwise_equal_for_any_thread_count(scale: int, threads) -> None:
    source, index = features(2, 24, scale * 40, scale * 40, dtype=torch.float32), matches(1600, 2, 50, 60)
    grad_output = features(2, 24, scale * 50, scale * 60, dtype=torch.float32, seed=1)
    results = []
    for count in (1, 2, 3):
        threads(count)
        output = hdrops.patch_swap(source, index, scale=scale)
        results.append((output, gradient(hdrops.patch_swap, source, index, grad_output, scale=scale)))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_fresh_memory_is_written_everywhere() -> None:
    torch.use_deterministic_algorithms(True)  # fills it with NaN
    try:
        source, index = features(1, 3, 30, 31), torch.zeros(1, 20, 70, dtype=torch.int64)
        assert hdrops.patch_swap(source, index).isfinite().all()
        assert gradient(hdrops.patch_swap, source, index, torch.ones(1, 3, 20, 70).double()).isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


VALID = {"source": torch.zeros(2, 3, 8, 12), "index": torch.zeros(2, 5, 6, dtype=torch.int64)}
ERRORS = [
    ({"source": 1.0}, TypeError, r"patch_swap: source must be a tensor, got float"),
    ({"source": torch.zeros(3, 8, 12)}, ValueError, r"source must have 4 dimensions .* got 3 \(source shape"),
    ({"source": torch.zeros(2, 3, 0, 12)}, ValueError, r"at least one channel, row and column, got shape"),
    ({"source": torch.zeros(2, 3, 8, 12).long()}, TypeError, r"source must be float64, .* or float16, got torch.int64"),
    ({"index": torch.zeros(2, 5, 6)}, TypeError, r"index must be int64, got torch.float32"),
    ({"index": torch.zeros(3, 5, 6).long()}, ValueError, r"index must have the batch 2, got 3 \(index shape"),
    ({"index": torch.zeros(5, 6).long()}, ValueError, r"index must have 3 dimensions \[N, Hq, Wq\], got 2"),
    ({"index": torch.zeros(2, 5, 6, device="meta").long()}, ValueError, r"must be on source's device \w+.*, got meta"),
    ({"patch_size": 2}, ValueError, r"patch_swap: patch_size must be one of 1, 3, 5, 7, got 2"),
    ({"scale": 3}, ValueError, r"scale must be one of 1, 2, 4, got 3"),
    ({"scale": 2.0}, ValueError, r"patch_swap: scale must be one of 1, 2, 4, got 2.0"),
    ({"source": torch.zeros(2, 3, 8, 11), "scale": 2}, ValueError, r"multiples of scale = 2, got shape"),
    ({"border": "wrap"}, ValueError, r"border must be one of exclude, zero, got 'wrap'"),
    ({"backend": "cuda"}, NotImplementedError, r"patch_swap: has no cuda backend; it has cpu, triton, reference"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=lambda value: str(value)[:40])
def test_error_messages(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        hdrops.patch_swap(**{**VALID, **change})


def check_direct_calls(op, backward) -> None:
    """The operators of torch.ops.hdrops, without Python's checks."""
    source, index = torch.zeros(1, 3, 8, 12), torch.zeros(1, 5, 6).long()
    for arguments in (
        (source[0], index, 3, 1, "exclude"),
        (source, index[0], 3, 1, "exclude"),
        (source, index.int(), 3, 1, "exclude"),
        (source, index, 4, 1, "exclude"),
        (source, index, 3, 3, "exclude"),
        (source, index, 3, 1, "wrap"),
        (source[:, :, :7], index, 3, 2, "zero"),
    ):
        with pytest.raises((ValueError, TypeError), match="patch_swap: "):
            op(*arguments)
    for size in ([0, 12], [8, 12, 1], [7, 12]):
        with pytest.raises(ValueError, match="patch_swap: "):
            backward(torch.zeros(1, 3, 10, 12), index, size, 3, 2, "zero", False, False)
    with pytest.raises(ValueError, match="patch_swap: grad_output must have shape"):
        backward(source, index, [8, 12], 3, 2, "zero", False, False)


@pytest.mark.cpu
@pytest.mark.asan
def test_direct_calls_of_the_operator_are_safe() -> None:
    check_direct_calls(torch.ops.hdrops.patch_swap.default, torch.ops.hdrops._patch_swap_backward.default)


@pytest.mark.cpu
def test_the_example_runs_as_documented() -> None:
    examples = doctest.DocTestFinder().find(hdrops.patch_swap, "patch_swap", globs={})
    results = [doctest.DocTestRunner().run(example) for example in examples]
    assert sum(result.attempted for result in results) > 0
    assert sum(result.failed for result in results) == 0
