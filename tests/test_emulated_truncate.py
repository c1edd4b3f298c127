"""The CUDA kernels of truncate on the host emulator.

They stand in for the CPU kernels of ``torch.ops.hdrops`` while this module runs, so that the tests of the CPU kernels
are theirs: the same cases, the same float64 reference, the same tolerances. What only they can get wrong comes after:
tiles and what hangs over them, groups of channels, boxes too large for a tile, devices with little shared memory,
float32 sums, the order of threads.
"""

import pytest
import torch
from torch import Tensor

import hdrops
import test_truncate as cases
from hdrops.reference.truncate import truncate as reference
from hdrops.testing import assert_close, relative_error

pytestmark = pytest.mark.asan
NAMES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


image, gradient, DTYPES = cases.image, cases.gradient, cases.DTYPES


class Emulated:
    """The operators of csrc/schema.cpp, by name, as csrc/crf/truncate_bindings.h has them; for CPU tensors."""

    def __init__(self, module):
        self.module, self.workspace, self.calls = module, 0, 0

    def _run(self, input: Tensor, grad_output: Tensor | None, radius: int, eps: float) -> Tensor:
        channels_last = not input.is_contiguous() and input.is_contiguous(memory_format=torch.channels_last)
        form = torch.channels_last if channels_last else torch.contiguous_format
        pixels = input.contiguous(memory_format=form)
        grad = None if grad_output is None else grad_output.contiguous(memory_format=form)
        output = torch.empty_like(pixels, memory_format=form)
        self.calls += 1
        if output.numel() > 0:
            n, c, height, width = input.shape
            self.workspace = self.module.truncate(
                NAMES[input.dtype],
                [n if channels_last else n * c, height, width, c if channels_last else 1],
                radius,
                eps,
                pixels.data_ptr(),
                0 if grad is None else grad.data_ptr(),
                output.data_ptr(),
            )
        return output

    def truncate(self, input, radius, eps):
        return self._run(input, None, radius, eps)

    def _truncate_backward(self, grad_output, input, radius, eps):
        return self._run(input, grad_output, radius, eps)


@pytest.fixture(scope="module", autouse=True)
def emulated_operators(emulated_module):
    """The emulated kernels, in the place of the CPU's."""
    operators = Emulated(emulated_module)
    with torch.library._scoped_library("hdrops", "IMPL") as library:
        for name in ("truncate", "_truncate_backward"):
            library.impl(name, getattr(operators, name), "CPU", allow_override=True)
        yield operators


@pytest.fixture(autouse=True)
def defaults(emulated):
    """The emulator's device and order of threads as they are by default."""


def compare(pixels: Tensor, radius: int = 2, eps: float = 0.01, scale: float | None = None) -> None:
    """Output and gradient beside the reference's."""
    options = {"radius": radius, "eps": eps}
    grad = torch.randn(pixels.shape, dtype=torch.float64).to(pixels.dtype)
    assert_close(hdrops.truncate(pixels, **options), reference(pixels.double(), **options), terms=25, scale=scale)
    got = gradient(hdrops.truncate, pixels, grad, **options)
    want = gradient(reference, pixels.double(), grad.double(), **options)
    assert got.is_contiguous() == pixels.is_contiguous()
    assert_close(got, want, terms=(2 * radius + 1) ** 4, name="gradient")


def test_the_emulated_kernels_run(emulated_operators):
    """The tests of this module would pass on the CPU kernels too."""
    before = emulated_operators.calls
    gradient(hdrops.truncate, image(1, 1, 5, 5), torch.ones(1, 1, 5, 5))
    assert emulated_operators.calls == before + 2


# The cases of the CPU kernels

test_the_process_written_out = cases.test_the_process_written_out
test_random_geometry = cases.test_random_geometry
test_the_smallest_images = cases.test_the_smallest_images
test_dark_pixels_beside_very_bright_ones = cases.test_dark_pixels_beside_very_bright_ones
test_strided_images = cases.test_strided_images
test_nan_spreads_over_its_boxes_only = cases.test_nan_spreads_over_its_boxes_only
test_gradcheck = cases.test_gradcheck
test_a_clipped_base_passes_no_gradient_of_its_own = cases.test_a_clipped_base_passes_no_gradient_of_its_own
test_fresh_memory_is_written_everywhere = cases.test_fresh_memory_is_written_everywhere


# What only kernels of a GPU can get wrong


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", [(31, 33), (32, 64), (65, 17)])
def test_tiles_that_end_with_the_image_before_and_after(size, channels_last):
    compare(image(1, 2, *size, dtype=torch.float64, channels_last=channels_last))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [2, 3, 4, 7])
def test_groups_of_channels(channels, dtype):
    compare(image(2, channels, 9, 21, dtype=dtype, channels_last=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("capability", [75, 80, 86, 90, 120])
def test_devices_of_little_shared_memory(capability, dtype, emulated):
    """The emulator refuses a block of more than the device has."""
    emulated.set_device(compute_capability=capability)
    for radius, channels_last in ((2, False), (2, True), (3, False), (4, True)):
        compare(image(1, 3, 11, 13, dtype=dtype, channels_last=channels_last), radius)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("radius", "size"), [(9, (10, 31)), (13, (40, 14)), (20, (21, 21))])
def test_boxes_too_large_for_a_tile(radius, size, dtype, channels_last, emulated_operators):
    compare(image(2, 2, *size, dtype=dtype, channels_last=channels_last), radius)
    assert emulated_operators.workspace > 0


def test_tiles_need_no_workspace(emulated_operators):
    for dtype in DTYPES:
        hdrops.truncate(image(1, 1, 9, 9, dtype=dtype), radius=8)
        assert emulated_operators.workspace == 0
        gradient(hdrops.truncate, image(1, 1, 9, 9, dtype=dtype), torch.ones(1, 1, 9, 9, dtype=dtype), radius=4)
        assert emulated_operators.workspace == 0


@pytest.mark.parametrize("radius", [2, 5])
@pytest.mark.parametrize("brightness", [1.0, 100.0, 1000.0])
def test_smooth_bright_images_in_float32(brightness, radius):
    """Where E[H^2] - E[H]^2 in float32 would be noise of the size of eps, and the gradient through it noise alone."""
    height, width = 24, 27
    ramp = torch.linspace(0, 0.4, width).expand(1, 1, height, width) + torch.rand(1, 1, height, width) / 8
    pixels = ramp + brightness
    grad = torch.randn(1, 1, height, width)
    assert_close(hdrops.truncate(pixels, radius=radius), reference(pixels.double(), radius=radius))
    got = gradient(hdrops.truncate, pixels, grad, radius=radius)
    want = gradient(reference, pixels.double(), grad.double(), radius=radius)
    assert relative_error(got, want) < 5e-7


@pytest.mark.parametrize("eps", [1e-300, 1e-30, 1e6, 1e300])
def test_any_eps_gives_numbers(eps):
    pixels = image(1, 1, 9, 9)
    pixels[..., :5] = 0.25  # of no variance in some boxes
    assert gradient(hdrops.truncate, pixels, torch.ones_like(pixels), eps=eps).isfinite().all()
    assert_close(hdrops.truncate(pixels, eps=eps), reference(pixels.double(), eps=max(eps, 1e-30)), terms=25)


@pytest.mark.parametrize("radius", [1, 2, 6])
def test_any_order_of_threads_gives_the_same_bits(radius, emulated):
    pixels, grad = image(1, 2, 35, 37), torch.randn(1, 2, 35, 37)
    results = []
    for seed in range(3):
        emulated.set_seed(seed)
        results.append((hdrops.truncate(pixels, radius=radius), gradient(hdrops.truncate, pixels, grad, radius=radius)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
