"""What only a GPU can show: streams, graphs, memory, determinism, large tensors, and torchvision's kernels beside ours.

Everything here skips without a GPU; `make gpu` runs it, with the rest of the suite on `--device cuda`. The tests marked
`sanitizer` are small and reach every kernel: they run again under compute-sanitizer.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import hdrops
from hdrops import _load
from hdrops.reference import deform_conv2d as reference
from hdrops.testing import DeformConv2dCase, assert_close

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SMALL = {
    "plain": DeformConv2dCase(),
    "groups": DeformConv2dCase(channels=8, out_channels=12, groups=2, offset_groups=4),
    "odd": DeformConv2dCase(channels=5, out_channels=7, kernel=(3, 2), stride=(2, 1), padding=(0, 3), dilation=(1, 2)),
    "tile": DeformConv2dCase(n=2, channels=64, out_channels=64, size=(17, 19), offset_groups=2),
}
CURVE_OPERATORS = [
    "crf_lookup",
    "crf_lookup nearest",
    "crf_lookup codes",
    "merge_exposures",
    "tent_histogram",
    "value_histogram",
    "quantize_ste",
    "truncate",
]

Call = Callable[[], tuple[Tensor, ...]]


def with_gradients(function: Callable[[], Tensor], *leaves: Tensor) -> Call:
    """A call that returns the output and the gradients of its sum."""

    def run() -> tuple[Tensor, ...]:
        output = function()
        return output.detach(), *torch.autograd.grad(output, leaves, torch.ones_like(output))

    return run


def deform_call(case: DeformConv2dCase, dtype: torch.dtype, backend: str | None = None, **layout) -> Call:
    leaves = {name: tensor.cuda() for name, tensor in case.tensors(dtype).items()}
    if layout:
        leaves["input"] = leaves["input"].contiguous(**layout)
    leaves = {name: tensor.requires_grad_() for name, tensor in leaves.items()}
    return with_gradients(lambda: hdrops.deform_conv2d(**leaves, **case.geometry, backend=backend), *leaves.values())


def curve_call(name: str, dtype: torch.dtype = torch.float32) -> Call:
    """An operator of the response-curve family, on tensors of odd sizes."""
    image = (torch.rand(2, 3, 17, 23, device="cuda") * 1.2 - 0.1).to(dtype).requires_grad_()
    if name.startswith("crf_lookup"):
        curve = (torch.linspace(0, 1, 256, device="cuda") ** 2.2).to(dtype).requires_grad_()
        if name.endswith("codes"):
            codes = torch.randint(0, 256, (2, 3, 17, 23), device="cuda", dtype=torch.uint8)
            return with_gradients(lambda: hdrops.crf_lookup(codes, curve), curve)
        mode = "nearest" if name.endswith("nearest") else "linear"
        return with_gradients(lambda: hdrops.crf_lookup(image, curve, mode=mode), image, curve)
    if name == "merge_exposures":
        stack = torch.rand(2, 4, 3, 13, 11, device="cuda").to(dtype).requires_grad_()
        times = torch.tensor([[0.1, 1.0, 0.3, 3.0]], device="cuda").log().requires_grad_()
        response = (torch.linspace(0, 1, 256, device="cuda") ** 2.2 + 1e-4).requires_grad_()
        return with_gradients(lambda: hdrops.merge_exposures(stack, times, response), stack, times, response)
    return with_gradients(lambda: getattr(hdrops, name)(image), image)


def call_of(name: str) -> Call:
    if name == "patch_swap":
        return swap_call(torch.float32, torch.contiguous_format, size=(61, 67))
    if name == "patch_match":
        return match_call(torch.float32, torch.contiguous_format, radius=3)
    return deform_call(SMALL["tile"], torch.float32, "cuda") if name == "deform_conv2d" else curve_call(name)


every_operator = pytest.mark.parametrize("name", ["deform_conv2d", "patch_match", "patch_swap", *CURVE_OPERATORS])


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.sanitizer
@pytest.mark.parametrize("layout", [{}, {"memory_format": torch.channels_last}], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_small_deform_conv2d(name: str, dtype: torch.dtype, layout: dict) -> None:
    assert all(tensor.isfinite().all() for tensor in deform_call(SMALL[name], dtype, "cuda", **layout)())


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_deterministic_deform_conv2d(dtype: torch.dtype, deterministic: None) -> None:
    assert all(tensor.isfinite().all() for tensor in deform_call(SMALL["odd"], dtype, "cuda")())


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", CURVE_OPERATORS)
def test_small_curves(name: str, dtype: torch.dtype) -> None:
    assert all(tensor.isfinite().all() for tensor in curve_call(name, dtype)())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_mode_repeats_every_bit(dtype: torch.dtype, deterministic: None) -> None:
    case = DeformConv2dCase(n=2, channels=32, out_channels=32, size=(61, 67), offset_groups=2, reach=9.0)
    call = deform_call(case, dtype, "cuda")
    first = call()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, call(), strict=True))


@pytest.mark.parametrize("name", CURVE_OPERATORS)
def test_curve_operators_repeat_every_bit(name: str) -> None:
    call = curve_call(name)
    first = call()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, call(), strict=True))


@every_operator
def test_runs_on_the_current_stream(name: str) -> None:
    call = call_of(name)
    expected = call()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        got = call()
        event = stream.record_event()
    assert not event.query(), "the call waited for its stream, or did its work on another one"
    stream.synchronize()
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b.double(), terms=1000)


@every_operator
def test_replays_from_a_cuda_graph(name: str) -> None:
    call = call_of(name)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = [tensor.clone() for tensor in call()]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for tensor in captured:
        tensor.fill_(7)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, expected, strict=True):
        assert_close(a, b.double(), terms=1000)


@every_operator
def test_never_synchronises(name: str) -> None:
    call = call_of(name)
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_operator
def test_memory_does_not_grow(name: str) -> None:
    call = call_of(name)
    call()
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        call()
    assert torch.cuda.memory_allocated() == before


def test_workspace_is_far_below_the_columns() -> None:
    channels, size = 64, 512
    case = DeformConv2dCase(n=1, channels=channels, out_channels=channels, size=(size, size))
    tensors = {name: tensor.cuda() for name, tensor in case.tensors(torch.float32).items()}
    tensors["input"] = tensors["input"].contiguous(memory_format=torch.channels_last)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = hdrops.deform_conv2d(**tensors, **case.geometry)
    workspace = torch.cuda.max_memory_allocated() - before - output.numel() * 4
    assert workspace <= 9 * channels * size * size * 4 // 100


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_every_backend_equals_the_reference(name: str, dtype: torch.dtype, backend: str) -> None:
    case = SMALL[name]
    got = deform_call(case, dtype, backend)()
    exact = {key: tensor.double().requires_grad_() for key, tensor in case.tensors(dtype).items()}
    wanted = with_gradients(lambda: reference.deform_conv2d(**exact, **case.geometry), *exact.values())()
    terms = case.channels * case.out_channels * case.kernel[0] * case.kernel[1] * got[0].shape[-1] * got[0].shape[-2]
    for which, a, b in zip(("output", *exact), got, wanted, strict=True):
        assert_close(a, b, terms=terms, name=which)


def test_tf32_follows_torchs_switch() -> None:
    case = DeformConv2dCase(n=1, channels=64, out_channels=64, size=(33, 31))
    tensors = {name: tensor.cuda() for name, tensor in case.tensors(torch.float32).items()}
    wanted = reference.deform_conv2d(**{name: tensor.double() for name, tensor in tensors.items()}, **case.geometry)
    switch, errors = torch.backends.cuda.matmul, {}
    before = switch.allow_tf32
    try:
        for allowed in (False, True):
            switch.allow_tf32 = allowed
            got = hdrops.deform_conv2d(**tensors, **case.geometry)
            errors[allowed] = float((got - wanted).abs().max() / wanted.abs().max())
    finally:
        switch.allow_tf32 = before
    assert errors[False] < 2e-6
    assert errors[True] < 5e-3
    if torch.cuda.get_device_capability() >= (8, 0):
        assert errors[True] > 10 * errors[False]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_torchvision_agrees(dtype: torch.dtype) -> None:
    ops = pytest.importorskip("torchvision.ops")
    case = DeformConv2dCase(n=2, channels=16, out_channels=24, size=(37, 41), groups=2, offset_groups=4)
    leaves = {name: tensor.cuda().requires_grad_() for name, tensor in case.tensors(dtype).items()}
    results = [
        with_gradients(lambda function=function: function(**leaves, **case.geometry), *leaves.values())()
        for function in (hdrops.deform_conv2d, ops.deform_conv2d)
    ]
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() <= (1e-12 if dtype == torch.float64 else 1e-4) * theirs.abs().max()


def test_more_than_2_to_the_31_elements() -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 40 << 30:
        pytest.skip("needs 40 GB of GPU memory")
    height, width, channels = 8192, 8200, 32
    x = torch.zeros(1, height, width, channels, device="cuda", dtype=torch.bfloat16).movedim(-1, 1)
    assert x.numel() > 2**31
    x[0, :, -1, -1] = 3.0
    weight = torch.ones(1, channels, 1, 1, device="cuda", dtype=torch.bfloat16)
    output = hdrops.deform_conv2d(x, torch.zeros(1, 2, height, width, device="cuda"), weight)
    assert output[0, 0, -1, -1] == 3.0 * channels
    assert output.float().sum() == 3.0 * channels
    looked_up = hdrops.crf_lookup(x / 3, torch.linspace(0, 2, 256, device="cuda"))
    assert looked_up[0, -1, -1, -1] == 2.0
    assert looked_up[0, 0, 0, 0] == 0.0


def test_mixed_devices_are_refused() -> None:
    case = DeformConv2dCase()
    tensors = {name: tensor.cpu() for name, tensor in case.tensors(torch.float32).items()}
    tensors["input"] = tensors["input"].cuda()
    with pytest.raises(ValueError, match="deform_conv2d: offset must be on the input's device"):
        hdrops.deform_conv2d(**tensors, **case.geometry)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_follows_the_ambient_dtype(dtype: torch.dtype) -> None:
    case = DeformConv2dCase()
    tensors = {name: tensor.cuda() for name, tensor in case.tensors(torch.float32).items()}
    with torch.autocast("cuda", dtype=dtype):
        assert hdrops.deform_conv2d(**tensors, **case.geometry).dtype == dtype


def test_reports_that_cuda_runs() -> None:
    assert _load.cuda_status() is None


def swap_call(dtype: torch.dtype, layout: torch.memory_format, size: tuple[int, int] = (45, 31), **options) -> Call:
    """Patch swap, with matches anywhere and one that many sites share, whose runs are added up first."""
    scale = options.get("scale", 1)
    source = torch.randn(2, 5, scale * 11, scale * 13, device="cuda").to(dtype).contiguous(memory_format=layout)
    index = torch.randint(-3, 150, (2, *size), device="cuda")
    index[:, 2 : size[0] // 2] = 70
    leaf = source.requires_grad_()
    return with_gradients(lambda: hdrops.patch_swap(leaf, index, **options), leaf)


SWAP_LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
SWAP_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.mark.sanitizer
@SWAP_LAYOUTS
@SWAP_DTYPES
@pytest.mark.parametrize("border", ["exclude", "zero"])
def test_small_patch_swap(border: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    for patch_size, scale in ((3, 1), (5, 2)):
        call = swap_call(dtype, layout, patch_size=patch_size, scale=scale, border=border)
        assert all(tensor.isfinite().all() for tensor in call())


@SWAP_LAYOUTS
@SWAP_DTYPES
def test_patch_swap_with_shared_matches_equals_the_reference(dtype: torch.dtype, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    got = swap_call(dtype, layout, size=(61, 67))()
    torch.manual_seed(0)
    source = torch.randn(2, 5, 11, 13, device="cuda").to(dtype).double().requires_grad_()
    index = torch.randint(-3, 150, (2, 61, 67), device="cuda")
    index[:, 2:30] = 70
    wanted = with_gradients(lambda: hdrops.patch_swap(source, index, backend="reference"), source)()
    assert_close(got[0], wanted[0], terms=9)
    # A match that 1876 sites share, each of nine taps: the terms of the largest sum.
    assert_close(got[1], wanted[1], terms=9 * 2000, scale=float(wanted[1].abs().max()))


@SWAP_LAYOUTS
@SWAP_DTYPES
def test_patch_swap_repeats_every_bit(dtype: torch.dtype, layout: torch.memory_format) -> None:
    call = swap_call(dtype, layout, size=(201, 203))
    first = call()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, call(), strict=True))


@pytest.mark.sanitizer
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("radius", [2, 3, 11], ids=["usual radius", "other radius", "no tiles"])
def test_small_truncate(radius: int, dtype: torch.dtype, layout: torch.memory_format) -> None:
    image = (torch.randn(2, 5, 19, 35, device="cuda") * 0.7).exp().to(dtype).contiguous(memory_format=layout)
    image.requires_grad_()
    output, gradient = with_gradients(lambda: hdrops.truncate(image, radius=radius), image)()
    exact = image.detach().double().requires_grad_()
    wanted, slope = with_gradients(lambda: hdrops.truncate(exact, radius=radius, backend="reference"), exact)()
    assert_close(output, wanted, terms=25)
    assert_close(gradient, slope, terms=(2 * radius + 1) ** 4, name="gradient")


def test_truncate_of_more_than_2_to_the_31_elements() -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 20 << 30:
        pytest.skip("needs 20 GB of GPU memory")
    x = torch.full((1, 32, 8192, 8200), 0.5, device="cuda", dtype=torch.bfloat16)
    assert x.numel() > 2**31
    x[0, -1, -40:, -40:] = 4.0
    output = hdrops.truncate(x)
    assert (output[0, -1, -30:, -30:] == 1.0).all()
    assert (output[0, -1, :100] == 0.5).all()
    assert (output[0, 0] == 0.5).all()


def test_mixed_devices_are_refused_by_the_response_curves() -> None:
    image, curve, stack = torch.rand(1, 3, 8, 8), torch.rand(256), torch.rand(1, 2, 3, 8, 8)
    with pytest.raises(ValueError, match="crf_lookup: curve must be on input's device cuda:0, got cpu"):
        hdrops.crf_lookup(image.cuda(), curve)
    with pytest.raises(ValueError, match="crf_lookup: curve must be on input's device cpu, got cuda:0"):
        hdrops.crf_lookup(image, curve.cuda())
    with pytest.raises(ValueError, match="log_exposures must be on the stack's device cuda:0, got cpu"):
        hdrops.merge_exposures(stack.cuda(), torch.zeros(1, 2))
    for grad, input in ((image, image.cuda()), (image.cuda(), image)):
        with pytest.raises(ValueError, match="truncate: grad_output must be on input's device"):
            torch.ops.hdrops._truncate_backward(grad, input, 2, 0.01)


@pytest.mark.parametrize("name", ["tent_histogram", "value_histogram", "quantize_ste", "truncate"])
def test_integers_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match=rf"{name}: input must be .*int32"):
        getattr(hdrops, name)(torch.zeros(1, 3, 8, 8, dtype=torch.int32, device="cuda"))


def match_call(
    dtype: torch.dtype, layout: torch.memory_format, size: tuple[int, int] = (21, 35), centers: bool = False, **options
) -> Call:
    """Patch matching of odd sizes: the index, the score and its gradients."""
    query, key = (torch.randn(2, 8, *size, device="cuda").to(dtype) for _ in range(2))
    places = torch.randint(-3, size[0] * size[1] + 3, (2, *size), device="cuda") if centers else None
    leaves = [tensor.contiguous(memory_format=layout).requires_grad_() for tensor in (query, key)]

    def run() -> tuple[Tensor, ...]:
        found = hdrops.patch_match(*leaves, centers=places, **options)
        return found.index, found.score.detach(), *torch.autograd.grad(found.score.sum(), leaves)

    return run


@pytest.mark.sanitizer
@SWAP_LAYOUTS
@SWAP_DTYPES
@pytest.mark.parametrize("centers", [False, True])
def test_small_patch_match(centers: bool, dtype: torch.dtype, layout: torch.memory_format) -> None:
    for patch_size in (1, 3, 5, 7):
        call = match_call(dtype, layout, centers=centers, radius=(2, 9), patch_size=patch_size, normalize="both")
        assert all(tensor.isfinite().all() for tensor in call())


@pytest.mark.sanitizer
@SWAP_DTYPES
def test_small_deterministic_patch_match(dtype: torch.dtype, deterministic: None) -> None:
    assert all(tensor.isfinite().all() for tensor in match_call(dtype, torch.contiguous_format, radius=2)())


@SWAP_LAYOUTS
@SWAP_DTYPES
@pytest.mark.parametrize("centers", [False, True])
def test_patch_match_equals_the_reference(centers: bool, dtype: torch.dtype, layout: torch.memory_format) -> None:
    query, key = (torch.randn(2, 12, 61, 67, device="cuda").to(dtype) for _ in range(2))
    places = torch.randint(0, 61 * 67, (2, 61, 67), device="cuda") if centers else None
    laid_out = [tensor.contiguous(memory_format=layout) for tensor in (query, key)]
    got = hdrops.patch_match(*laid_out, radius=(3, 11), centers=places)
    exact = query.double(), key.double()
    wanted = hdrops.patch_match(*exact, radius=(3, 11), centers=places, backend="reference")
    chosen = hdrops.patch_match(*exact, radius=0, centers=got.index, backend="reference")
    assert_close(got.score, chosen.score, terms=108)
    assert_close(got.score, wanted.score, terms=108)
    # Only where the best two scores are all but equal may the choice be another.
    assert float((got.index != wanted.index).double().mean()) < 1e-3


@SWAP_LAYOUTS
@SWAP_DTYPES
@pytest.mark.parametrize("centers", [False, True])
def test_patch_match_repeats_every_bit_in_deterministic_mode(
    centers: bool, dtype: torch.dtype, layout: torch.memory_format, deterministic: None
) -> None:
    call = match_call(dtype, layout, size=(101, 203), centers=centers, radius=3)
    first = call()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, call(), strict=True))
