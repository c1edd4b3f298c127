"""truncate against its float64 reference, OP-14 written out, and the registrations."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hdrops
from hdrops.reference.truncate import truncate as reference
from hdrops.testing import assert_close

pytestmark = pytest.mark.device
DEVICE = torch.get_default_device().type

OP = torch.ops.hdrops.truncate.default
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def image(*shape: int, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    """Radiance around 1, some of it above, so that the base is clipped in places."""
    pixels = (torch.randn(shape, dtype=torch.float64) * 0.7).exp().to(dtype)
    return pixels.contiguous(memory_format=torch.channels_last) if channels_last else pixels


def gradient(function, input: Tensor, output_gradient: Tensor, **options: object) -> Tensor:
    input = input.detach().requires_grad_()
    (result,) = torch.autograd.grad(function(input, **options), input, output_gradient)
    return result


def test_the_process_written_out():
    """One pixel of OP-14, box by box."""
    pixels = image(1, 1, 9, 9, dtype=torch.float64)

    def box(at: Tensor, y: int, x: int) -> Tensor:
        def mirrored(k: int) -> int:
            return 8 - abs(8 - abs(k))

        return sum(at[mirrored(y + j), mirrored(x + i)] for j in range(-2, 3) for i in range(-2, 3)) / 25

    plane = pixels[0, 0]
    mean = torch.stack([torch.stack([box(plane, y, x) for x in range(9)]) for y in range(9)])
    square = torch.stack([torch.stack([box(plane**2, y, x) for x in range(9)]) for y in range(9)])
    slope = (square - mean**2) / (square - mean**2 + 0.01)
    shift = mean - slope * mean
    for y, x in ((0, 0), (8, 3), (4, 4), (1, 7)):
        base = box(slope, y, x) * plane[y, x] + box(shift, y, x)
        wanted = base.clamp(0, 1) * plane[y, x] / (base + 1e-15)
        for backend in (DEVICE, "reference"):
            torch.testing.assert_close(hdrops.truncate(pixels, backend=backend)[0, 0, y, x], wanted)


@pytest.mark.asan
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    n=st.integers(0, 2),
    channels=st.integers(1, 4),
    height=st.integers(6, 90),
    width=st.integers(6, 40),
    radius=st.integers(1, 5),
    eps=st.sampled_from([0.01, 1e-3, 1.0]),
    dtype=st.sampled_from(DTYPES),
    channels_last=st.booleans(),
)
def test_random_geometry(n, channels, height, width, radius, eps, dtype, channels_last):
    pixels = image(n, channels, height, width, dtype=dtype, channels_last=channels_last)
    output_gradient = torch.randn(n, channels, height, width).to(dtype)
    options = {"radius": radius, "eps": eps}
    output = hdrops.truncate(pixels, **options)
    assert output.shape == pixels.shape and output.dtype == dtype
    if n > 0:
        assert output.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert_close(output, reference(pixels.double(), **options), terms=25)
    got = gradient(hdrops.truncate, pixels, output_gradient, **options)
    want = gradient(reference, pixels.double(), output_gradient.double(), **options)
    assert_close(got, want, terms=(2 * radius + 1) ** 4, name="gradient")


@pytest.mark.asan
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("radius", [1, 2, 4])
def test_the_smallest_images(radius, channels_last):
    """Where the borders of both sides overlap."""
    for height, width in ((radius + 1, radius + 1), (radius + 1, 3 * radius + 5), (3 * radius, radius + 2)):
        pixels = image(2, 3, height, width, dtype=torch.float64, channels_last=channels_last)
        assert_close(hdrops.truncate(pixels, radius=radius), reference(pixels, radius=radius), terms=25)
        output_gradient = torch.randn_like(pixels)
        got = gradient(hdrops.truncate, pixels, output_gradient, radius=radius)
        want = gradient(reference, pixels, output_gradient, radius=radius)
        assert_close(got, want, terms=(2 * radius + 1) ** 4)


def test_dark_pixels_beside_very_bright_ones():
    """Neither running sums nor float32 variances would survive this."""
    pixels = image(1, 1, 40, 60) * 1e-3
    pixels[:, :, 10:30, 20:40] += 2.0**14
    assert_close(hdrops.truncate(pixels), reference(pixels.double()), scale=1e-3)


@pytest.mark.asan
def test_strided_images():
    pixels = image(2, 6, 20, 30)
    for view in (pixels[:, ::2], pixels[..., 3:17, 5:29], pixels.transpose(2, 3), pixels[:1].expand(3, -1, -1, -1)):
        assert torch.equal(hdrops.truncate(view), hdrops.truncate(view.contiguous()))


@pytest.mark.asan
def test_nan_spreads_over_its_boxes_only():
    pixels = image(1, 1, 20, 20)
    pixels[0, 0, 10, 10] = torch.nan
    for backend in (DEVICE, "reference"):
        wrong = hdrops.truncate(pixels, backend=backend).isnan()
        assert wrong[0, 0, 6:15, 6:15].all() and int(wrong.sum()) == 81


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradcheck(channels_last):
    pixels = image(1, 2, 6, 7, dtype=torch.float64, channels_last=channels_last).requires_grad_()
    torch.autograd.gradcheck(hdrops.truncate, pixels)
    torch.autograd.gradcheck(lambda t: hdrops.truncate(t, radius=1, eps=0.1), pixels)


def test_a_clipped_base_passes_no_gradient_of_its_own():
    """A flat bright image is its own base, clipped to 1: the result is H / base, and H / mean(H) has no slope."""
    pixels = torch.full((1, 1, 24, 24), 3.0, dtype=torch.float64)
    output = hdrops.truncate(pixels)
    torch.testing.assert_close(output, torch.ones_like(output))
    result = gradient(hdrops.truncate, pixels, torch.ones_like(pixels))[..., 6:-6, 6:-6]
    torch.testing.assert_close(result, torch.zeros_like(result), atol=1e-12, rtol=0)


@pytest.mark.cpu
@pytest.mark.parametrize("channels_last", [False, True])
def test_any_number_of_threads_gives_the_same_bits(channels_last, threads):
    pixels, output_gradient = image(2, 3, 300, 70, channels_last=channels_last), torch.randn(2, 3, 300, 70)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append((hdrops.truncate(pixels), gradient(hdrops.truncate, pixels, output_gradient)))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_double_backward_and_forward_ad():
    pixels = image(1, 1, 5, 5, dtype=torch.float64).requires_grad_()
    (first,) = torch.autograd.grad(hdrops.truncate(pixels).sum(), pixels, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"truncate: second derivatives.*backend='reference'"):
        first.sum().backward()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(pixels.detach(), torch.ones_like(pixels))
        with pytest.raises(NotImplementedError, match=r"truncate: forward-mode.*backend='reference'"):
            hdrops.truncate(dual)
    small = image(1, 1, 3, 3, dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(lambda t: hdrops.truncate(t, backend="reference"), small, check_forward_ad=True)
    torch.autograd.gradgradcheck(lambda t: hdrops.truncate(t, backend="reference"), small)


@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(channels_last):
    pixels = image(2, 3, 6, 7, channels_last=channels_last)
    torch.library.opcheck(OP, (pixels.requires_grad_(), 2, 0.01))
    backward = torch.ops.hdrops._truncate_backward.default
    arguments = (torch.rand(2, 3, 6, 7), pixels.detach(), 2, 0.01)
    torch.library.opcheck(backward, arguments, test_utils=("test_schema", "test_faketensor"))


def test_compile_without_recompiling_for_sizes():
    torch._dynamo.reset()
    compiled = torch.compile(hdrops.truncate, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for height in (6, 9, 12):
            pixels = image(2, 3, height, 7).requires_grad_()
            output, eager = compiled(pixels), hdrops.truncate(pixels)
            assert torch.equal(output, eager)
            got, want = (torch.autograd.grad(r.sum(), pixels)[0] for r in (output, eager))
            assert torch.equal(got, want)


def test_export():
    class Truncate(torch.nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            return hdrops.truncate(pixels)

    pixels = image(1, 3, 8, 9)
    assert torch.equal(torch.export.export(Truncate(), (pixels,)).module()(pixels), hdrops.truncate(pixels))


@pytest.mark.parametrize("dim", [0, 2])
def test_vmap_equals_a_loop(dim):
    batch = torch.stack([image(2, 3, 8, 9) for _ in range(4)])
    mapped = torch.vmap(hdrops.truncate, dim)(batch.movedim(0, dim))
    assert torch.equal(mapped, torch.stack([hdrops.truncate(one) for one in batch]))


def test_autocast_keeps_float32():
    pixels = image(1, 3, 8, 9, dtype=torch.bfloat16)
    for backend in (DEVICE, "reference"):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            output = hdrops.truncate(pixels, backend=backend)
        assert torch.equal(output, hdrops.truncate(pixels.float(), backend=backend))


def test_fresh_memory_is_written_everywhere():
    torch.use_deterministic_algorithms(True)  # fills it with NaN
    try:
        pixels = image(2, 3, 70, 31)
        assert hdrops.truncate(pixels).isfinite().all()
        assert gradient(hdrops.truncate, pixels, torch.ones_like(pixels)).isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


SIMD_SCRIPT = """
import sys, torch, hdrops
pixels, output, gradient = torch.load(sys.argv[1])
pixels.requires_grad_()
torch.testing.assert_close(hdrops.truncate(pixels), output, rtol=1e-6, atol=1e-6)
(got,) = torch.autograd.grad(hdrops.truncate(pixels).sum(), pixels)
torch.testing.assert_close(got, gradient, rtol=1e-5, atol=1e-5)
print(hdrops._load.simd_level())
"""


@pytest.mark.cpu
@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_lower_instruction_sets_agree(level, tmp_path):
    levels = hdrops._load.SIMD_LEVELS
    if levels.index(level) >= levels.index(hdrops._load.simd_level()):
        pytest.skip(f"{level} is not below {hdrops._load.simd_level()}, which the other tests run on")
    pixels = image(1, 3, 40, 37)
    exact = pixels.double()
    cases = (pixels, reference(exact).float(), gradient(reference, exact, torch.ones_like(exact)).float())
    torch.save(cases, tmp_path / "cases.pt")
    environment = {**os.environ, "HDROPS_SIMD": level, "PYTHONPATH": str(Path(hdrops.__file__).parents[1])}
    command = [sys.executable, "-c", SIMD_SCRIPT, str(tmp_path / "cases.pt")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == level


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.rand(3, 8, 8)}, ValueError, r"truncate: input must be \[N, C, H, W\], got shape \[3, 8, 8\]"),
        ({"input": torch.zeros(1, 3, 8, 8).int()}, TypeError, "truncate: input must be float32, .*int32"),
        ({"input": [0.5]}, TypeError, "truncate: input must be a tensor, got list"),
        ({"radius": 1.5}, TypeError, "truncate: radius must be an integer, got 1.5"),
        ({"eps": "small"}, TypeError, "truncate: eps must be a number, got 'small'"),
        ({"radius": 0}, ValueError, "truncate: radius must be at least 1, got 0"),
        ({"radius": 8}, ValueError, r"truncate: height and width must be above radius = 8, got shape \[1, 3, 8, 9\]"),
        ({"eps": 0.0}, ValueError, "truncate: eps must be above 0, got 0.0"),
        ({"eps": float("nan")}, ValueError, "truncate: eps must be above 0, got nan"),
        ({"backend": "triton"}, NotImplementedError, "truncate: has no triton backend"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        hdrops.truncate(**{"input": torch.rand(1, 3, 8, 9), **change})
