"""The Triton kernels of patch swap, interpreted on CPU tensors, against the float64 reference.

Not in bfloat16: the interpreter cuts off where it should round. Every tap and every step along a list takes it long, so
these cases are few and small; tests/test_patch_swap.py, which runs on a GPU too, has all combinations.
"""

import pytest
import torch
from torch import Tensor

import hdrops
import test_patch_swap as cpu_tests
from hdrops.triton import patch_swap as launches

pytestmark = pytest.mark.usefixtures("one_thread")
features, gradient, matches = cpu_tests.features, cpu_tests.gradient, cpu_tests.matches
FORWARD = torch.ops.hdrops._patch_swap_triton.default
BACKWARD = torch.ops.hdrops._patch_swap_triton_backward.default
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.fixture(autouse=True)
def on_triton(monkeypatch) -> None:
    """The comparisons call the public function; it has one backend here."""
    monkeypatch.setattr(hdrops._backends, "_REQUESTED", "triton")


def swap_of(layout: str = "contiguous", dtype: torch.dtype = torch.float32, scale: int = 1) -> tuple[Tensor, Tensor]:
    source = features(1, 5, scale * 4, scale * 6, dtype=dtype).contiguous(memory_format=LAYOUTS[layout])
    return source, matches(24, 1, 5, 4)


def both_ways(source: Tensor, index: Tensor, **options) -> tuple[Tensor, Tensor]:
    output = hdrops.patch_swap(source, index, **options)
    grad_output = features(*output.shape, dtype=source.dtype, seed=3)
    return output, gradient(hdrops.patch_swap, source, index, grad_output, **options)


@pytest.mark.parametrize(
    ("patch", "scale", "border", "layout"),
    [
        (1, 2, "zero", "contiguous"),
        (3, 1, "exclude", "contiguous"),
        (3, 1, "zero", "channels_last"),
        (3, 2, "exclude", "channels_last"),
        (3, 4, "zero", "contiguous"),
        (5, 1, "exclude", "channels_last"),
        (5, 4, "exclude", "contiguous"),
        (7, 1, "exclude", "contiguous"),
    ],
)
def test_equals_reference(patch: int, scale: int, border: str, layout: str) -> None:
    cpu_tests.assert_equals_reference(*swap_of(layout, scale=scale), patch_size=patch, scale=scale, border=border)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_equals_reference_in_other_dtypes(dtype: torch.dtype, layout: str) -> None:
    cpu_tests.assert_equals_reference(*swap_of(layout, dtype, 2), scale=2)


@pytest.mark.parametrize("name", ["one_site", "one_column", "many_channels", "no_query", "empty_batch"])
def test_sizes(name: str) -> None:
    cpu_tests.test_sizes(name, torch.float32)


def test_swaps_written_out() -> None:
    for border in ("exclude", "zero"):
        cpu_tests.test_the_swap_written_out(3, 2, border, "triton")
    cpu_tests.test_the_zero_border_darkens_an_identity_swap()
    cpu_tests.test_an_identity_swap_changes_nothing_borders_included(5, 2, torch.float64)


def shared_matches(name: str) -> Tensor:
    """Matches of 6 x 5 sites, of one image or two, in a key of 4 x 5."""
    index = matches(20, 2 if name == "the last" else 1, 6, 5)
    if name == "all":  # to the first, whose list begins with a run
        index[:] = 0
    elif name == "the last":  # of the first image: a run would go on in the second's list
        index[0] = 19
    elif name == "most":  # of a place in the middle, from the middle of a run on
        index[:, 1:5] = 7
    elif name == "two":
        index[:, :3], index[:, 3:] = 8, 9
    return index


@pytest.fixture
def short_runs(monkeypatch) -> None:
    monkeypatch.setattr(launches, "_RUN", 8)


@pytest.mark.parametrize(
    ("name", "border", "layout", "scale"),
    [
        ("all", "exclude", "contiguous", 1),
        ("all", "zero", "channels_last", 2),
        ("the last", "exclude", "channels_last", 1),
        ("most", "exclude", "contiguous", 1),
        ("two", "zero", "contiguous", 1),
    ],
)
def test_matches_that_many_sites_share(name: str, border: str, layout: str, scale: int, short_runs: None) -> None:
    index = shared_matches(name)
    source = features(len(index), 3, scale * 4, scale * 5, dtype=torch.float32)
    source = source.contiguous(memory_format=LAYOUTS[layout])
    cpu_tests.assert_equals_reference(source, index, scale=scale, border=border)


def test_runs_are_taken_in_one_step(short_runs: None, monkeypatch) -> None:
    """Sums that are twice as large show what was taken from them: a walk over all sites would be right too."""
    source, index = features(1, 3, 1, 1), torch.zeros(1, 3, 7, dtype=torch.int64)
    run_sums = launches.Plan.run_sums

    def doubled(plan, matches, share, runs):
        launch = run_sums(plan, matches, share, runs)
        launch.run()
        runs.mul_(2)
        return launches.Launch(launch.kernel, 0, launch.arguments, launch.config)

    monkeypatch.setattr(launches.Plan, "run_sums", doubled)
    grad_output = features(1, 3, 3, 7)
    got = gradient(hdrops.patch_swap, source, index, grad_output)
    # 21 sites: two runs, and five sites that the program walks over.
    owed = grad_output.flatten(2)
    torch.testing.assert_close(got.flatten(2), owed.sum(2, keepdim=True) + owed[..., :16].sum(2, keepdim=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_small_tiles_change_no_bit(layout: str, short_runs: None, monkeypatch) -> None:
    """A GPU's tiles are smaller than the interpreter's; the order of a sum is each pixel's own."""
    source, index = features(1, 20, 3, 11, dtype=torch.float32), matches(33, 1, 3, 11)
    index[:, 1] = 16
    wanted = both_ways(source, index, patch_size=1)
    monkeypatch.setattr(launches, "_INTERPRETED_TILE", 512)
    got = both_ways(source.contiguous(memory_format=LAYOUTS[layout]), index, patch_size=1)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_wide_numbers(short_runs: None, monkeypatch) -> None:
    """What more than 2^31 pixels take."""
    monkeypatch.setattr(launches, "_LAST_PLACE", 0)
    cpu_tests.assert_equals_reference(features(1, 3, 4, 5), shared_matches("most"))


def test_any_layout() -> None:
    source, index = swap_of()
    wanted = both_ways(source, index)
    for view in (
        source.mT.contiguous().mT.contiguous(memory_format=torch.channels_last),
        source.repeat_interleave(2, 1)[:, ::2],
    ):
        got = both_ways(view, index.mT.contiguous().mT)
        last = view.is_contiguous(memory_format=torch.channels_last)
        for a, b in zip(got, wanted, strict=True):
            assert torch.equal(a, b)
            assert a.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    expanded = torch.ones(()).expand(1, 5, 5, 4)
    got = gradient(hdrops.patch_swap, source, index, expanded)
    assert torch.equal(got, gradient(hdrops.patch_swap, source, index, expanded.contiguous()))


def test_odd_matches_and_values() -> None:
    cpu_tests.test_matches_outside_the_key_are_clamped("triton")
    cpu_tests.test_a_nan_reaches_the_patches_that_hold_it_and_no_others("triton")


def test_a_nan_of_the_gradient_reaches_what_was_placed_there(short_runs: None) -> None:
    source, index = features(1, 2, 6, 7), matches(42, 1, 5, 6)
    index[:, 1:4] = 10
    grad_output = torch.ones(1, 2, 5, 6, dtype=torch.float64)
    grad_output[0, 0, 3, 4] = torch.nan
    got = gradient(hdrops.patch_swap, source, index, grad_output)
    wanted = gradient(hdrops.reference.patch_match.patch_swap, source, index, grad_output)
    assert 0 < wanted.isnan().sum() < 20
    assert torch.equal(got.isnan(), wanted.isnan())


def test_fresh_memory_is_written_everywhere(short_runs: None) -> None:
    torch.use_deterministic_algorithms(True)  # fills it with NaN
    try:
        source, index = features(1, 3, 4, 5), shared_matches("most")
        assert all(tensor.isfinite().all() for tensor in both_ways(source, index))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("border", ["exclude", "zero"])
def test_gradcheck(border: str) -> None:
    source, index = features(1, 1, 4, 6).requires_grad_(), matches(6, 1, 3, 2)
    function = lambda source: hdrops.patch_swap(source, index, scale=2, border=border)  # noqa: E731
    assert torch.autograd.gradcheck(function, source, fast_mode=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: str) -> None:
    source, index = features(1, 2, 6, 4, dtype=torch.float32), matches(6, 1, 2, 1)
    source = source.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    torch.library.opcheck(FORWARD, (source, index, 1, 2, "exclude"))
    torch.library.opcheck(
        BACKWARD,
        (torch.randn(1, 2, 4, 2), index, [6, 4], 1, 2, "zero", layout == "channels_last", False),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_autocast_follows_the_ambient_dtype() -> None:
    source, index = swap_of()
    with torch.autocast("cpu", dtype=torch.float16):
        output = hdrops.patch_swap(source.requires_grad_(), index)
    assert output.dtype == torch.float16
    assert torch.equal(output, hdrops.patch_swap(source.half(), index))
    output.float().sum().backward()
    assert source.grad.dtype == torch.float32


def test_vmap_equals_a_loop() -> None:
    members = [(features(1, 3, 4, 5, seed=seed), matches(20, 1, 3, 6, seed=seed)) for seed in range(2)]
    got = torch.vmap(hdrops.patch_swap)(*(torch.stack(tensors) for tensors in zip(*members, strict=True)))
    assert torch.equal(got, torch.stack([hdrops.patch_swap(*member) for member in members]))


def test_derivatives_that_are_refused() -> None:
    source, index = swap_of()
    (first,) = torch.autograd.grad(
        hdrops.patch_swap(source.requires_grad_(), index).square().sum(), source, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="patch_swap: second derivatives"):
        first.sum().backward()
    with pytest.raises(NotImplementedError, match=r"patch_swap: torch\.func\.grad, vjp and jacrev are not built"):
        torch.func.grad(lambda tensor: hdrops.patch_swap(tensor, index).sum())(source.detach())


def test_direct_calls_are_checked() -> None:
    cpu_tests.check_direct_calls(FORWARD, BACKWARD)


def test_is_not_the_reference_or_the_cpu_kernel() -> None:
    names = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    source, index = swap_of()
    output = hdrops.patch_swap(source.requires_grad_(), index)
    with Watch():
        hdrops.patch_swap(source, index)
        output.sum().backward()
    assert {name for name in names if "hdrops" in name} == {
        "hdrops._patch_swap_triton.default",
        "hdrops._patch_swap_triton_backward.default",
    }
