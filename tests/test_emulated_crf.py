"""The CUDA kernels of the response-curve family on the host emulator.

They stand in for the CPU kernels of ``torch.ops.hdrops`` while this module runs, so that the tests of the CPU kernels
are theirs: the same cases, the same float64 reference, the same tolerances. What only they can get wrong comes after:
addresses that are no multiple of a vector, tables and bins that exceed shared memory, the order of threads.
"""

import pytest
import torch
from torch import Tensor

import hdrops
import merge_exposures_cases as brackets
import test_crf as crf
import test_merge_exposures as merging
import test_merge_exposures_gradients as merging_gradients
from hdrops.reference import crf as reference
from hdrops.testing import assert_close

gradients, lay_out, pixels, curve_of = crf.gradients, crf.lay_out, crf.pixels, crf.curve_of

# The operators on the emulator: what the bindings do (csrc/crf/bindings.h, merge_bindings.h), for CPU tensors.

NAMES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.uint8: "uint8",
    torch.uint16: "uint16",
}


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def geometry(image: Tensor) -> tuple[int, int, int, int]:
    """n, c, p and whether the channels are interleaved."""
    n, c = (image.shape[0], image.shape[1]) if image.dim() >= 2 else (1, 1)
    p = image.numel() // max(n * c, 1)
    return n, c, p, int(not image.is_contiguous())


def as_image(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """The tensor in one of the two layouts the kernels know: its own, or that of ``like``."""
    form = hdrops.ops.crf._memory_format(tensor if like is None else like)
    return tensor.contiguous(memory_format=form)


class Emulated:
    """The operators of csrc/schema.cpp, by name."""

    def __init__(self, module):
        self.module = module

    def crf_lookup(self, input, curve, mode, gradient_scale):
        image = as_image(input)
        output = torch.empty_like(image, dtype=curve.dtype if input.dtype in reference.CODES else input.dtype)
        table = curve.to(torch.promote_types(output.dtype, torch.float32)).contiguous()
        if output.numel() > 0:
            self.module.crf_lookup(
                NAMES[input.dtype],
                NAMES[output.dtype],
                [*geometry(image), *curve.shape[:2]],
                curve.shape[2],
                mode == "linear",
                address(table),
                address(image),
                address(output),
            )
        return output

    def _crf_lookup_backward(self, grad_output, input, curve, mode, gradient_scale, output_mask):
        image, grad = as_image(input), as_image(grad_output, like=input)
        table = curve.to(torch.promote_types(grad.dtype, torch.float32)).contiguous()
        of_input = output_mask[0] and input.is_floating_point()
        grad_input = torch.empty_like(image) if of_input else grad.new_empty(0)
        grad_curve = torch.zeros_like(table) if output_mask[1] else table.new_empty(0)
        if input.numel() > 0 and (of_input or output_mask[1]):
            self.module.crf_lookup_backward(
                NAMES[input.dtype],
                NAMES[grad.dtype],
                [*geometry(image), *curve.shape[:2]],
                curve.shape[2],
                mode == "linear",
                curve.shape[2] - 1 if gradient_scale is None else gradient_scale,
                address(table),
                address(image),
                address(grad),
                address(grad_input if of_input else None),
                address(grad_curve if output_mask[1] else None),
            )
        return grad_input, grad_curve.to(curve.dtype)

    def tent_histogram(self, input, bins):
        image = as_image(input)
        output = hdrops.ops.crf._empty_like(
            image, (len(input), sum(b + 1 for b in bins) * input.shape[1], *input.shape[2:])
        )
        if output.numel() > 0:
            self.module.crf_tents(NAMES[input.dtype], geometry(image), bins, address(image), address(output), 0, 0)
        return output

    def _tent_histogram_backward(self, grad_output, input, bins):
        image, grad = as_image(input), as_image(grad_output, like=input)
        grad_input = torch.empty_like(image)
        if input.numel() > 0:
            arguments = address(image), 0, address(grad), address(grad_input)
            self.module.crf_tents(NAMES[input.dtype], geometry(image), bins, *arguments)
        return grad_input

    def value_histogram(self, input, bins):
        image, output = as_image(input), input.new_empty(*input.shape[:2], bins)
        if output.numel() > 0:
            self.module.crf_values(NAMES[input.dtype], geometry(image), bins, address(image), address(output), 0, 0)
        return output

    def _value_histogram_backward(self, grad_output, input, bins):
        image, grad = as_image(input), grad_output.contiguous()
        grad_input = torch.empty_like(image)
        if input.numel() > 0:
            arguments = address(image), 0, address(grad), address(grad_input)
            self.module.crf_values(NAMES[input.dtype], geometry(image), bins, *arguments)
        return grad_input

    def quantize_ste(self, input, levels, gradient_outside):
        image = as_image(input)
        output = torch.empty_like(image)
        if input.numel() > 0:
            self.module.crf_quantize(
                NAMES[input.dtype], image.numel(), levels, gradient_outside, address(image), address(output), 0, 0
            )
        return output

    def _quantize_ste_backward(self, grad_output, input, gradient_outside):
        image, grad = as_image(input), as_image(grad_output, like=input)
        grad_input = torch.empty_like(image)
        if input.numel() > 0:
            arguments = address(image), 0, address(grad), address(grad_input)
            self.module.crf_quantize(NAMES[input.dtype], image.numel(), 0, gradient_outside, *arguments)
        return grad_input

    def _bracket(self, stack, log_exposures, curve, weight, mask, fallback):
        """The module's bracket, the tensors it refers to, and whether the frames are interleaved."""
        n, p, c, h, w = stack.shape
        interleaved = hdrops.reference.merge_exposures.is_interleaved(stack)
        wanted = (1, w * c, c) if interleaved else (h * w, w, 1)
        if any(stack.shape[2 + k] != 1 and stack.stride(2 + k) != wanted[k] for k in range(3)):
            stack = stack.contiguous()
        tensors = [None if t is None else t.contiguous() for t in (log_exposures, curve, weight, mask)]
        bracket = self.module.Bracket()
        bracket.dtype, bracket.wide = NAMES[stack.dtype], log_exposures.dtype == torch.float64
        bracket.sizes, bracket.strides = (n, p, c, h * w), (stack.stride(0), stack.stride(1))
        bracket.interleaved, bracket.fallback = interleaved, fallback
        bracket.stack = address(stack)
        bracket.log_exposures, bracket.curve, bracket.weight, bracket.mask = map(address, tensors)
        curves = (1, 1, 0) if curve is None else curve.shape
        bracket.table_sizes = (log_exposures.shape[0], *curves, weight.shape[0])
        bracket.mask_kind = "none" if mask is None else "bool" if mask.dtype == torch.bool else "real"
        bracket.mask_stride = p * h * w if mask is not None and mask.shape[0] > 1 else 0
        return bracket, (stack, tensors), interleaved

    def merge_exposures(self, stack, log_exposures, curve, weight, mask, fallback):
        bracket, _tensors, interleaved = self._bracket(stack, log_exposures, curve, weight, mask, fallback)
        n, _, c, h, w = stack.shape
        dtype = stack.dtype if stack.is_floating_point() else log_exposures.dtype
        layout = torch.channels_last if interleaved else torch.contiguous_format
        radiance = torch.empty((n, c, h, w), dtype=dtype, memory_format=layout)
        if radiance.numel() > 0:
            self.module.merge_exposures(bracket, address(radiance))
        return radiance

    def _merge_exposures_backward(self, grad_output, stack, log_exposures, curve, weight, mask, fallback, output_mask):
        bracket, _tensors, interleaved = self._bracket(stack, log_exposures, curve, weight, mask, fallback)
        grad = grad_output.contiguous(memory_format=torch.channels_last if interleaved else torch.contiguous_format)
        n, p, c, h, w = stack.shape
        wanted = [output_mask[0] and stack.is_floating_point(), output_mask[1], output_mask[2] and curve is not None]
        dense = stack.new_empty(n, p, h, w, c).movedim(-1, 2) if interleaved else stack.new_empty(n, p, c, h, w)
        outputs = [dense, torch.zeros_like(log_exposures), None if curve is None else torch.zeros_like(curve)]
        outputs = [o if use else grad.new_empty(0) for o, use in zip(outputs, wanted, strict=True)]
        if grad.numel() > 0 and any(wanted):
            used = (o if use else None for o, use in zip(outputs, wanted, strict=True))
            self.module.merge_exposures_backward(bracket, address(grad), *map(address, used))
        return tuple(outputs)


OPERATORS = [name for name in vars(Emulated) if name.startswith(("crf", "_crf", "tent", "_tent", "value", "_value"))]
OPERATORS += ["quantize_ste", "_quantize_ste_backward", "merge_exposures", "_merge_exposures_backward"]


@pytest.fixture(scope="module", autouse=True)
def module(emulated_module):
    """The emulator's module, in the place of the CPU kernels."""
    emulated = Emulated(emulated_module)
    emulated_module.set_device(compute_capability=90, multiprocessors=2)
    with torch.library._scoped_library("hdrops", "IMPL") as library:
        for name in OPERATORS:
            library.impl(name, getattr(emulated, name), "CPU", allow_override=True)
        yield emulated_module


@pytest.fixture
def device(module):
    """Sets the device for a test: (compute capability, multiprocessors)."""
    yield lambda capability, multiprocessors: module.set_device(capability, multiprocessors)
    module.set_device(compute_capability=90, multiprocessors=2)


def test_the_emulated_kernels_run(module, monkeypatch):
    """The tests of this module would pass on the CPU kernels too."""

    def never(*_):
        raise RuntimeError("reached the emulator")

    assert torch.equal(hdrops.quantize_ste(torch.ones(3)), torch.ones(3))
    monkeypatch.setattr(torch.ops.hdrops, "quantize_ste", torch.ops.hdrops.quantize_ste)
    called = []
    original = module.crf_quantize
    monkeypatch.setattr(module, "crf_quantize", lambda *arguments: called.append(1) or original(*arguments))
    hdrops.quantize_ste(torch.ones(3))
    assert called


# The cases of the CPU kernels

test_lookup_equals_reference = crf.test_lookup_equals_reference
test_nearest_gradient_is_the_finite_difference = crf.test_nearest_gradient_is_the_finite_difference
test_nearest_rounds_ties_to_even = crf.test_nearest_rounds_ties_to_even
test_any_shape_with_one_curve = crf.test_any_shape_with_one_curve
test_volumes_keep_channels_last_3d = crf.test_volumes_keep_channels_last_3d
test_only_the_gradients_asked_for = crf.test_only_the_gradients_asked_for
test_empty_images = crf.test_empty_images
test_random_geometry_equals_reference = crf.test_random_geometry_equals_reference
test_tents_equal_reference = crf.test_tents_equal_reference
test_tents_gradcheck_and_order = crf.test_tents_gradcheck_and_order
test_value_histogram_equals_reference = crf.test_value_histogram_equals_reference
test_quantize_equals_reference = crf.test_quantize_equals_reference
test_quantize_keeps_the_values_of_an_8_bit_image = crf.test_quantize_keeps_the_values_of_an_8_bit_image

test_every_dtype_and_layout_equals_the_reference = merging.test_every_dtype_and_layout_equals_the_reference
test_masks = merging.test_masks
test_weights = merging.test_weights
test_long_tables = merging.test_long_tables_of_any_shape_are_interpolated_to_the_last_bit
test_random_brackets = merging.test_random_geometry
test_strided_stacks = merging.test_strided_stacks
test_shuffled_frames_give_the_same_bits = merging.test_shuffled_frames_give_the_same_bits
test_readings_outside_are_clamped = merging.test_readings_outside_are_clamped
test_one_frame_gives_its_own_estimate = merging.test_one_frame_gives_its_own_estimate
test_entries_that_are_not_positive = merging.test_entries_that_are_not_positive_count_as_the_smallest_response
test_merge_gradients_equal_the_reference = merging_gradients.test_gradients_equal_the_reference
test_gradient_of_a_shared_curve_and_shared_times = merging_gradients.test_gradient_of_a_shared_curve_and_shared_times
test_only_asked_merge_gradients_are_computed = merging_gradients.test_only_asked_gradients_are_computed
test_weights_are_constants = merging_gradients.test_weights_are_constants


@pytest.mark.asan
@pytest.mark.parametrize("dtype", crf.DTYPES)
def test_knots_and_ends(dtype):
    crf.test_knots_and_ends("cpu", dtype)


@pytest.mark.asan
@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize("dtype", crf.DTYPES)
def test_nan_stays_nan_and_takes_no_part(mode, dtype):
    crf.test_nan_stays_nan_and_takes_no_part("cpu", mode, dtype, 37)


@pytest.mark.asan
@pytest.mark.parametrize("kind", crf.CURVES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", crf.DTYPES)
def test_codes_of_8_bits(kind, layout, dtype):
    crf.test_codes_index_the_curve_exactly(torch.uint8, kind, layout, dtype)


@pytest.mark.parametrize(("kind", "layout"), [("shared", "contiguous"), ("per channel", "channels_last")])
def test_codes_of_16_bits(kind, layout):
    """Their 65536 bins take a dozen windows of shared memory."""
    crf.test_codes_index_the_curve_exactly(torch.uint16, kind, layout, torch.float32)


def test_codes_beside_a_curve_of_other_length():
    crf.test_codes_beside_a_curve_of_other_length(torch.uint8, "linear")


def test_tents_and_values_at_the_ends():
    crf.test_tents_at_peaks_and_odd_values("cpu")
    crf.test_value_histogram_gradcheck_and_limits()
    crf.test_quantize_at_the_ends("cpu")


@pytest.mark.parametrize("dtype", brackets.DTYPES)
def test_clipped_in_every_frame(dtype):
    merging.test_clipped_in_every_frame(dtype, "cpu")
    merging.test_radiance_is_positive_and_finite_at_extreme_times(dtype, "cpu")


@pytest.mark.parametrize(
    ("codes", "masked", "frame"),
    [([0, 255, 255], [], 0), ([0, 255], [], 1), ([255, 255, 0], [0], 1), ([255, 0, 0], [0, 2], 1)],
)
def test_fallback_takes_one_frame_by_exposure(codes, masked, frame):
    merging.test_fallback_takes_one_frame_by_exposure(codes, masked, frame, "cpu")


@pytest.mark.asan
@pytest.mark.parametrize("dtype", brackets.FLOATS)
def test_nan_counts_as_masked(dtype):
    merging.test_nan_counts_as_masked(dtype, "cpu")


# What only kernels of a GPU can get wrong


def at_offset(tensor: Tensor, offset: int) -> Tensor:
    """The same values in memory that begins ``offset`` elements after an aligned address, and ends with them."""
    room = torch.empty(tensor.numel() + offset, dtype=tensor.dtype)[offset:]
    room.copy_(tensor.flatten())
    return room.view(tensor.shape)


@pytest.mark.asan
@pytest.mark.parametrize("dtype", crf.DTYPES)
@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("count", [1, 31, 33, 1029])
def test_addresses_and_sizes_that_are_no_multiple_of_a_vector(dtype, offset, count):
    input = at_offset(pixels(count, levels=17, dtype=dtype), offset)
    curve = curve_of("shared", 17, torch.float64 if dtype == torch.float64 else torch.float32)
    grad = at_offset(torch.randn(count, dtype=torch.float64).to(dtype), 2 * offset)
    output, (grad_input, grad_curve) = gradients(hdrops.crf_lookup, grad, input, curve)
    expected, (want_input, want_curve) = gradients(reference.crf_lookup, grad.double(), input.double(), curve.double())
    assert_close(output, expected)
    assert_close(grad_input, want_input)
    assert_close(grad_curve, want_curve, terms=1 + count // 17, scale=1.0)
    assert_close(hdrops.quantize_ste(input, levels=5), reference.quantize_ste(input.double(), levels=5))
    codes = at_offset(torch.randint(256, (count,), dtype=torch.uint8), offset)
    table = curve_of("shared", 256, dtype)
    assert torch.equal(hdrops.crf_lookup(codes, table), table[codes.long()])


@pytest.mark.asan
@pytest.mark.parametrize("width", [8, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_planes_of_tents_that_are_no_multiple_of_a_vector(width, dtype):
    input = at_offset(torch.rand(2, 3, 3, width).to(dtype), 1 if width == 8 else 0)
    assert_close(hdrops.tent_histogram(input), reference.tent_histogram(input.double()), scale=1.0)
    many = (1,) * 300  # more sets than one launch takes
    assert_close(
        hdrops.tent_histogram(input, bins=many), reference.tent_histogram(input.double(), bins=many), scale=1.0
    )


@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize(("kind", "layout"), [("shared", "contiguous"), ("per channel", "channels_last")])
def test_many_blocks(mode, kind, layout, device):
    """Parts that end inside rows and vectors, on a device of several multiprocessors."""
    device(90, 5)
    levels = 64
    input = lay_out(pixels(2, 3, 61, 101, levels=levels, dtype=torch.float32, mode=mode), layout)
    curve, grad = curve_of(kind, levels, torch.float32), torch.randn(input.shape)
    output, (grad_input, grad_curve) = gradients(lambda x, c: hdrops.crf_lookup(x, c, mode=mode), grad, input, curve)
    expected, (want_input, want_curve) = gradients(
        lambda x, c: reference.crf_lookup(x, c, mode=mode), grad.double(), input.double(), curve.double()
    )
    assert_close(output, expected)
    assert_close(grad_input, want_input)
    assert_close(grad_curve, want_curve, terms=input.numel() // levels, scale=1.0)
    positions = 2 * input - 1
    assert_close(hdrops.value_histogram(positions), reference.value_histogram(positions.double()), terms=200)


@pytest.mark.parametrize("capability", [75, 80, 86, 90])
@pytest.mark.parametrize("levels", [1000, 14000])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_tables_and_bins_beyond_shared_memory(capability, levels, layout, device):
    device(capability, 1)
    input = lay_out(pixels(1, 3, 7, 19, levels=levels, dtype=torch.float32), layout)
    curve, grad = curve_of("per channel", levels, torch.float32), torch.randn(input.shape)
    output, (grad_input, grad_curve) = gradients(hdrops.crf_lookup, grad, input, curve)
    expected, (want_input, want_curve) = gradients(reference.crf_lookup, grad.double(), input.double(), curve.double())
    assert_close(output, expected, terms=levels**2 // 16)  # a place among L levels is rounded to L units
    assert_close(grad_input, want_input)
    assert_close(grad_curve, want_curve, terms=levels**2 // 16, scale=1.0)
    values = 2 * input - 1
    got, (slopes,) = gradients(lambda x: hdrops.value_histogram(x, bins=levels), torch.ones(1, 3, levels), values)
    want, (want_slopes,) = gradients(
        lambda x: reference.value_histogram(x, bins=levels), torch.ones(1, 3, levels).double(), values.double()
    )
    off = (got - want).abs() > 1e-5 * want.abs() + 1e-9  # a value at a bin's border may fall to either side
    assert float(off.double().mean()) < 0.01
    assert float(((slopes - want_slopes).abs() > 1e-5 * want_slopes).double().mean()) < 0.05


def test_constant_image_keeps_the_sums_exact():
    """One number added many times: the warps' float sums are emptied before they lose it."""
    input = torch.full((1, 1, 160, 256), 0.3)
    curve = torch.rand(16, requires_grad=True)
    (0.1 * hdrops.crf_lookup(input, curve)).sum().backward()
    g, f = torch.tensor(0.1).double() * input.numel(), input[0, 0, 0, 0].double() * 15
    expected = torch.zeros(16, dtype=torch.float64)
    expected[int(f)], expected[int(f) + 1] = g * (1 - f % 1), g * (f % 1)
    assert_close(curve.grad, expected, scale=0.0)


@pytest.mark.asan
@pytest.mark.parametrize("name", ["lookup", "codes", "values", "merge", "merge codes"])
def test_any_order_of_threads_gives_the_same_bits(name, module, device):
    """And so does any address."""
    device(90, 3)
    x, grad = torch.rand(2, 3, 33, 45), torch.randn(2, 3, 33, 45)
    codes, curve = (x * 255).byte(), torch.rand(2, 3, 256)
    stack, times = brackets.bracket(torch.float32 if name == "merge" else torch.uint8, 1, 4), torch.rand(1, 4)
    run = {
        "lookup": lambda: gradients(hdrops.crf_lookup, grad, (x * 8).round() / 8, curve)[1],
        "codes": lambda: gradients(hdrops.crf_lookup, grad, codes // 16, curve)[1],
        "values": lambda: [hdrops.value_histogram((x * 8).round() / 4 - 1)],
        "merge": lambda: brackets.gradients(
            hdrops.merge_exposures, stack, times, curve[:1, :, :17], grad[:1, :, :9, :13]
        ),
        "merge codes": lambda: brackets.gradients(
            hdrops.merge_exposures, stack, times, curve[:1], grad[:1, :, :9, :13]
        ),
    }[name]
    module.set_seed(0)
    first = run()
    for seed in range(1, 5):
        module.set_seed(seed)
        x, codes, grad, stack = (at_offset(tensor, seed) for tensor in (x, codes, grad, stack))
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize("times", [[0.0, torch.inf, 1.0, 2.0], [0.0, torch.nan, 1.0, 2.0]])
def test_exposures_that_are_not_finite_make_their_image_nan(times):
    """The CPU refuses them; a GPU would have to be waited for."""
    exposures = torch.tensor([times, [0.0, 1.0, 2.0, 3.0]])
    for dtype in (torch.uint8, torch.float32):
        radiance = hdrops.merge_exposures(brackets.bracket(dtype), exposures)
        assert radiance[0].isnan().all() and radiance[1].isfinite().all()
        assert (
            hdrops.merge_exposures(brackets.bracket(dtype), exposures[1:], weight=torch.tensor([-1.0, 1])).isnan().all()
        )


def test_many_frames():
    """More than a block keeps sums for in shared memory."""
    stack, times = brackets.bracket(torch.float32, 1, 131, 1, 2, 9), (torch.arange(131.0) / 30).view(1, -1)
    got = brackets.gradients(hdrops.merge_exposures, stack, times, None, torch.ones(1, 1, 2, 9))
    want = brackets.gradients(brackets.reference, stack.double(), times.double(), None, torch.ones(1, 1, 2, 9).double())
    for one, other in zip(got, want, strict=True):
        assert_close(one, other, terms=400, scale=float(other.abs().max()))


@pytest.mark.parametrize("dtype", [torch.uint16, torch.float32])
def test_merging_with_a_curve_beyond_shared_memory(dtype, device):
    device(75, 1)
    levels = 65536 if dtype == torch.uint16 else 3000
    stack, times = brackets.bracket(dtype, 1, 3, 1, 4, 9), brackets.log_times(3).float()
    curve, grad = brackets.response(levels).float(), torch.randn(1, 1, 4, 9)
    brackets.assert_radiance(hdrops.merge_exposures(stack, times, curve), brackets.expected(stack, times, curve))
    got = brackets.gradients(hdrops.merge_exposures, stack, times, curve, grad)
    want = brackets.gradients(brackets.reference, brackets.double(stack), times.double(), curve.double(), grad.double())
    for one, other in zip(got, want, strict=True):
        assert_close(one, other, terms=levels**2 // 16, scale=float(other.abs().max()))
