"""crf_lookup, tent_histogram, value_histogram and quantize_ste against their definitions and at the awkward places."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hdrops
from hdrops.reference import crf as reference
from hdrops.testing import assert_close

pytestmark = pytest.mark.device
DEVICE = torch.get_default_device().type

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CURVES = {"shared": None, "per image": (2, 1), "per channel": (1, 3), "per image and channel": (2, 3)}
LAYOUTS = ["contiguous", "channels_last", "sliced", "transposed", "expanded"]
INF, NAN = float("inf"), float("nan")


def pixels(*shape, levels, dtype=torch.float64, mode="linear"):
    """Random values whose distance from the next jump of the gradient is at least a tenth of a level."""
    level = torch.randint(levels - 1, shape) + 0.1 + 0.8 * torch.rand(shape, dtype=torch.float64)
    if mode == "nearest":
        level = (level + 0.5) % (levels - 1)
    return (level / (levels - 1)).to(dtype)


def curve_of(kind, levels, dtype=torch.float64):
    curves = CURVES[kind]
    shape = (levels,) if curves is None else (*curves, levels)
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def lay_out(tensor, layout):
    """The same values in another memory layout."""
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 3), NAN).to(tensor.dtype)
        wide[..., 3::2] = tensor
        return wide[..., 3::2]
    if layout == "transposed":
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "expanded":
        return tensor[:1].expand_as(tensor)
    return tensor.contiguous()


def gradients(function, grad_output, *inputs):
    inputs = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in inputs]
    output = function(*inputs)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    return output, torch.autograd.grad(output, wanted, grad_output.to(output.dtype))


# crf_lookup


@pytest.mark.asan
@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize("kind", CURVES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_lookup_equals_reference(mode, kind, dtype, layout):
    levels = 17
    input = lay_out(pixels(2, 3, 13, 11, levels=levels, dtype=dtype, mode=mode), layout)
    curve = curve_of(kind, levels, torch.float64 if dtype == torch.float64 else torch.float32)
    grad = torch.randn(input.shape, dtype=torch.float64).to(dtype)

    output, (grad_input, grad_curve) = gradients(lambda x, c: hdrops.crf_lookup(x, c, mode=mode), grad, input, curve)
    expected, (want_input, want_curve) = gradients(
        lambda x, c: reference.crf_lookup(x, c, mode=mode), grad.double(), input.double(), curve.double()
    )
    assert output.dtype == dtype and grad_input.dtype == dtype and grad_curve.dtype == curve.dtype
    if layout == "channels_last":
        assert output.is_contiguous(memory_format=torch.channels_last)
    assert_close(output, expected, name="output")
    assert_close(grad_input, want_input, name="grad_input")
    assert_close(grad_curve, want_curve, terms=input.numel() // levels, scale=1.0, name="grad_curve")


@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize(("kind", "layout"), [("shared", "contiguous"), ("per channel", "channels_last")])
def test_many_parts_and_fine_curves(mode, kind, layout):
    """Parts that end inside rows and rows that end inside vectors; positions of ten bits."""
    levels = 1024
    input = lay_out(pixels(2, 3, 211, 321, levels=levels, dtype=torch.float32, mode=mode), layout)
    curve, grad = curve_of(kind, levels, torch.float32), torch.randn(input.shape)
    output, (grad_input, grad_curve) = gradients(lambda x, c: hdrops.crf_lookup(x, c, mode=mode), grad, input, curve)
    expected, (want_input, want_curve) = gradients(
        lambda x, c: reference.crf_lookup(x, c, mode=mode), grad.double(), input.double(), curve.double()
    )
    assert_close(output, expected)
    assert_close(grad_input, want_input)
    assert_close(grad_curve, want_curve, terms=input.numel() // levels, scale=1.0)


@pytest.mark.cpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_outputs_stored_past_the_caches(layout):
    """More than 16 MiB of pixels, at addresses that are no multiple of a vector."""
    tile = pixels(1, 3, 1201, 93, levels=64, dtype=torch.float32)
    curve, weights = curve_of("per channel", 64, torch.float32), torch.randn(tile.shape)
    input, grad = (lay_out(tensor.repeat(1, 1, 1, 13), layout) for tensor in (tile, weights))
    output, (grad_input,) = gradients(lambda x: hdrops.crf_lookup(x, curve), grad, input)
    expected, (want,) = gradients(lambda x: reference.crf_lookup(x, curve.double()), weights.double(), tile.double())
    for k in range(13):
        assert_close(output[..., 93 * k : 93 * (k + 1)], expected)
        assert_close(grad_input[..., 93 * k : 93 * (k + 1)], want)


@pytest.mark.parametrize("kind", CURVES)
@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_lookup_gradcheck(kind, mode):
    """Each input alone, in slow mode. The nearest pixel gradient is no derivative and is tested by its definition."""
    input, curve = pixels(2, 3, 2, 2, levels=5), curve_of(kind, 5)

    def of_input(x):
        return hdrops.crf_lookup(x, curve, mode=mode)

    def of_curve(c):
        return hdrops.crf_lookup(input, c, mode=mode)

    if mode == "linear":
        assert torch.autograd.gradcheck(of_input, input.clone().requires_grad_())
    assert torch.autograd.gradcheck(of_curve, curve.clone().requires_grad_())


@pytest.mark.parametrize("scale", [None, 1.0, 3.5])
def test_nearest_gradient_is_the_finite_difference(scale):
    curve = torch.randn(256)
    level = torch.arange(256)
    input = (level / 255).requires_grad_()
    output = hdrops.crf_lookup(input, curve, mode="nearest", gradient_scale=scale)
    torch.testing.assert_close(output, curve, rtol=0, atol=0)
    (slope,) = torch.autograd.grad(output.sum(), input)
    difference = torch.cat([curve[:1], curve.diff()])
    assert_close(slope, difference.double() * (255.0 if scale is None else scale))


def test_nearest_rounds_ties_to_even():
    curve = torch.arange(5.0)
    input = torch.tensor([0.125, 0.375, 0.625, 0.875])
    assert hdrops.crf_lookup(input, curve, mode="nearest").tolist() == [0.0, 2.0, 2.0, 4.0]


@pytest.mark.asan
@pytest.mark.parametrize("backend", [DEVICE, "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_knots_and_ends(backend, dtype):
    """At a knot the right segment's slope; at 1 the last value exactly, slope 0; outside the ends, slope 0."""
    curve = torch.tensor([0.1, 1.0, -3.0, 5.0, 0.7])
    input = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0, -0.0, -1e-3, 1.5, -1e30, -INF, INF], dtype=dtype)
    if dtype == torch.float64:
        curve = curve.double()
    output, (slope, grad_curve) = gradients(
        lambda x, c: hdrops.crf_lookup(x, c, backend=backend), torch.ones(11), input, curve
    )
    index = torch.tensor([0, 1, 2, 3, 4, 0, 0, 4, 0, 0, 4])
    assert torch.equal(output, curve.to(dtype)[index] if dtype == torch.float64 else curve[index].to(dtype))
    delta = torch.cat([curve.diff(), torch.zeros(1)])
    expected = torch.where(torch.arange(11) < 6, 4 * delta[index], 0)
    assert_close(slope, expected.double())
    assert_close(grad_curve, torch.bincount(index).double())


@pytest.mark.asan
@pytest.mark.parametrize("backend", [DEVICE, "reference"])
@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 37])
def test_nan_stays_nan_and_takes_no_part(backend, mode, dtype, count):
    curve = torch.rand(9, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    input = torch.full((count,), NAN, dtype=dtype)
    output, (grad_input, grad_curve) = gradients(
        lambda x, c: hdrops.crf_lookup(x, c, mode=mode, backend=backend), torch.ones(count), input, curve
    )
    assert output.isnan().all()
    assert torch.equal(grad_input, torch.zeros_like(input)) and torch.equal(grad_curve, torch.zeros_like(curve))


@pytest.mark.asan
@pytest.mark.parametrize("codes", [torch.uint8, torch.uint16])
@pytest.mark.parametrize("kind", CURVES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_index_the_curve_exactly(codes, kind, layout, dtype):
    levels = reference.CODES[codes]
    input = torch.randint(levels, (2, 3, 19, 7))
    input[0, 0, 0, :2] = torch.tensor([0, levels - 1])
    curve = curve_of(kind, levels, dtype)
    grad = torch.randn(input.shape, dtype=torch.float64).to(dtype)
    typed = input.to(codes) if layout != "sliced" else torch.stack([input, input], -1).to(codes)[..., 1]
    if layout == "channels_last":
        typed = typed.contiguous(memory_format=torch.channels_last)
    output, (grad_curve,) = gradients(hdrops.crf_lookup, grad, typed, curve)
    whole = curve.reshape(1, 1, -1) if curve.dim() == 1 else curve
    expected = whole.expand(2, 3, -1).gather(2, input.flatten(2)).reshape(input.shape)
    assert torch.equal(output, expected) and output.dtype == dtype
    _, (want,) = gradients(reference.crf_lookup, grad.double(), typed, curve.double())
    assert_close(grad_curve, want, terms=4, scale=1.0)


@pytest.mark.asan
@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize("codes", [torch.uint8, torch.uint16])
def test_codes_beside_a_curve_of_other_length(codes, mode):
    """A code stands for the pixel code/max."""
    most = reference.CODES[codes] - 1
    input = torch.randint(most + 1, (2, 3, 8, 9))
    curve = curve_of("per channel", 23, torch.float32)
    grad = torch.randn(input.shape)
    output, (grad_curve,) = gradients(lambda x, c: hdrops.crf_lookup(x, c, mode=mode), grad, input.to(codes), curve)
    expected, (_, want) = gradients(
        lambda x, c: reference.crf_lookup(x, c, mode=mode), grad.double(), input.double() / most, curve.double()
    )
    assert_close(output, expected)
    assert_close(grad_curve, want, terms=20, scale=1.0)


@pytest.mark.asan
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (0,)])
@pytest.mark.parametrize("codes", [False, True])
def test_empty_images(shape, codes):
    input = torch.zeros(shape, dtype=torch.uint8 if codes else torch.float32)
    curve = torch.rand(256, requires_grad=True)
    output = hdrops.crf_lookup(input, curve)
    output.sum().backward()
    assert output.shape == shape and torch.equal(curve.grad, torch.zeros(256))


def test_an_empty_batch_of_curves():
    assert hdrops.crf_lookup(torch.zeros(0, 3, 2, 2), torch.zeros(0, 1, 8)).shape == (0, 3, 2, 2)


def test_any_shape_with_one_curve():
    curve = torch.rand(31)
    for shape in [(), (7,), (2, 5), (2, 3, 4, 5, 6)]:
        input = torch.rand(shape)
        assert_close(hdrops.crf_lookup(input, curve), reference.crf_lookup(input.double(), curve.double()))


def test_volumes_keep_channels_last_3d():
    input = torch.rand(2, 3, 4, 5, 6).contiguous(memory_format=torch.channels_last_3d)
    curve = torch.rand(1, 3, 33)
    output = hdrops.crf_lookup(input, curve)
    assert output.is_contiguous(memory_format=torch.channels_last_3d)
    assert_close(output, reference.crf_lookup(input.double(), curve.double()))


def test_constant_image_keeps_the_curve_gradient_exact():
    """A saturated sky under a mean loss: one number added six million times."""
    input = torch.full((1, 3, 1080, 1920), 0.3)
    curve = torch.rand(1024, requires_grad=True)
    (0.1 * hdrops.crf_lookup(input, curve)).sum().backward()
    g = torch.tensor(0.1).double() * input.numel()
    f = input[0, 0, 0, 0].double() * 1023
    expected = torch.zeros(1024, dtype=torch.float64)
    expected[int(f)], expected[int(f) + 1] = g * (1 - f % 1), g * (f % 1)
    assert_close(curve.grad, expected, scale=0.0)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_only_the_gradients_asked_for(wanted):
    input, curve = torch.rand(1, 1, 4, 5), torch.rand(1, 1, 8)
    gradients = torch.ops.hdrops._crf_lookup_backward.default(
        torch.ones_like(input), input, curve, "linear", None, list(wanted)
    )
    assert [gradient.numel() > 0 for gradient in gradients] == list(wanted)


@pytest.mark.cpu
@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("kind", CURVES)
def test_bitwise_equal_for_any_thread_count(threads, codes, kind):
    levels = 256
    input = torch.rand(2, 3, 301, 407)
    typed = (input * 255).to(torch.uint8) if codes else input
    curve, grad = curve_of(kind, levels, torch.float32), torch.randn(input.shape)

    def run(count):
        threads(count)
        output, grads = gradients(hdrops.crf_lookup, grad, typed, curve)
        return output, *grads, hdrops.value_histogram(2 * input - 1)

    first = run(1)
    for count in (2, 3, 7):
        assert all(torch.equal(a, b) for a, b in zip(first, run(count), strict=True))


def test_every_output_element_is_written():
    """Deterministic mode fills fresh memory with NaN."""
    input, curve = torch.rand(2, 3, 33, 35), torch.rand(2, 3, 64)
    torch.use_deterministic_algorithms(True)
    try:
        grad = torch.ones_like(input)
        results = [*gradients(hdrops.crf_lookup, grad, input, curve)[1], hdrops.crf_lookup(input, curve)]
        results += [hdrops.tent_histogram(input), hdrops.value_histogram(input), hdrops.quantize_ste(input)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(result.isfinite().all() for result in results)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=5),
    levels=st.integers(2, 70),
    per_image=st.booleans(),
    per_channel=st.booleans(),
    mode=st.sampled_from(["linear", "nearest"]),
    seed=st.integers(0, 2**31),
)
def test_random_geometry_equals_reference(shape, levels, per_image, per_channel, mode, seed):
    torch.manual_seed(seed)
    input = pixels(*shape, levels=levels, mode=mode)
    curve = torch.randn(shape[0] if per_image else 1, shape[1] if per_channel else 1, levels, dtype=torch.float64)
    grad = torch.randn(input.shape, dtype=torch.float64)
    output, got = gradients(lambda x, c: hdrops.crf_lookup(x, c, mode=mode), grad, input, curve)
    expected, want = gradients(lambda x, c: reference.crf_lookup(x, c, mode=mode), grad, input, curve)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.cpu
def test_a_response_curve_of_a_camera_inverts(data):
    """A published response and its inverse undo each other."""
    rows = (data / "crf" / "emor.txt").read_text().split("f0 =")[1].split()[:1024]
    response = torch.tensor([float(value) for value in rows])
    inverse = torch.searchsorted(response, torch.linspace(0, 1, 4096)).clamp(max=1023).float() / 1023
    irradiance = torch.rand(1, 3, 64, 64)
    back = hdrops.crf_lookup(hdrops.crf_lookup(irradiance, response), inverse)
    assert float((back - irradiance).abs().max()) < 5e-3


# tent_histogram


@pytest.mark.asan
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tents_equal_reference(dtype, layout):
    input = lay_out(pixels(2, 3, 13, 11, levels=17, dtype=dtype) * 1.5 - 0.25, layout)
    grad = torch.randn(2, 93, 13, 11, dtype=torch.float64).to(dtype)
    output, (grad_input,) = gradients(hdrops.tent_histogram, grad, input)
    expected, (want,) = gradients(reference.tent_histogram, grad.double(), input.double())
    assert output.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")
    assert_close(output, expected, scale=1.0)
    assert_close(grad_input, want, terms=6, scale=16.0)


def test_tents_gradcheck_and_order():
    input = pixels(2, 2, 3, 2, levels=9).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: hdrops.tent_histogram(x, bins=(2, 5)), input)
    output = hdrops.tent_histogram(input, bins=(2, 5)).reshape(2, 9, 2, 3, 2)
    levels = [0, 0.5, 1, 0, 0.2, 0.4, 0.6, 0.8, 1]
    for k, (level, scale) in enumerate(zip(levels, [2] * 3 + [5] * 6, strict=True)):
        torch.testing.assert_close(output[:, k], (1 - scale * (input - level).abs()).relu())


@pytest.mark.parametrize("backend", [DEVICE, "reference"])
def test_tents_at_peaks_and_odd_values(backend):
    input = torch.tensor([0.0, 0.25, 0.5, 1.0, -INF, INF, NAN, 1e30, -0.25]).reshape(1, 1, 1, 9).requires_grad_()
    output = hdrops.tent_histogram(input, bins=(4,), backend=backend)
    columns = output.detach()[0, :, 0].T
    assert columns[0].tolist() == [1, 0, 0, 0, 0] and columns[1].tolist() == [0, 1, 0, 0, 0]
    assert columns[3].tolist() == [0, 0, 0, 0, 1] and columns[6].isnan().all()
    assert not columns[[4, 5, 7, 8]].any()
    weights = torch.rand(1, 5, 1, 9)
    (slope,) = torch.autograd.grad(output, input, weights)
    assert torch.equal(slope.nan_to_num(0), torch.zeros(1, 1, 1, 9))


# value_histogram


@pytest.mark.asan
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_value_histogram_equals_reference(dtype, layout):
    bins = 17
    input = lay_out(2 * pixels(2, 3, 13, 11, levels=bins, dtype=dtype) - 1, layout)
    grad = torch.randn(2, 3, bins, dtype=torch.float64).to(dtype)
    output, (grad_input,) = gradients(lambda x: hdrops.value_histogram(x, bins=bins), grad, input)
    expected, (want,) = gradients(lambda x: reference.value_histogram(x, bins=bins), grad.double(), input.double())
    assert_close(output, expected, terms=20)
    assert_close(grad_input, want)


def test_value_histogram_gradcheck_and_limits():
    input = (2 * pixels(2, 2, 3, 3, levels=6) - 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: hdrops.value_histogram(x, bins=6), input)
    odd = torch.tensor([-1.0, 1.0, -2.0, 2.0, NAN, -INF, INF]).reshape(1, 1, 1, 7)
    for backend in (DEVICE, "reference"):
        output, (slope,) = gradients(
            lambda x, backend=backend: hdrops.value_histogram(x, bins=5, backend=backend), torch.ones(1, 1, 5), odd
        )
        torch.testing.assert_close(output.flatten(), torch.tensor([0, 0, 0, 0, 3 / 4]))
        torch.testing.assert_close(slope.flatten(), torch.tensor([0.5, 0.125, 0, 0, 0, 0, 0]))


def test_value_histogram_of_a_large_constant_image_is_exact():
    input = torch.full((1, 1, 1500, 2000), 0.1)
    value = (torch.tensor(0.1).double() + 1) * 127.5
    expected = torch.zeros(256, dtype=torch.float64)
    expected[140] = 3e6 * value / 140 / 255
    assert_close(hdrops.value_histogram(input).flatten(), expected, scale=0.0)


# quantize_ste


@pytest.mark.asan
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gradient", ["inside", "everywhere"])
def test_quantize_equals_reference(dtype, layout, gradient):
    input = lay_out(pixels(2, 3, 13, 11, levels=16, dtype=dtype, mode="nearest") * 1.75 - 0.375, layout)
    grad = torch.randn(input.shape, dtype=torch.float64).to(dtype)
    output, (grad_input,) = gradients(lambda x: hdrops.quantize_ste(x, levels=5, gradient=gradient), grad, input)
    expected, (want,) = gradients(
        lambda x: reference.quantize_ste(x, levels=5, gradient=gradient), grad.double(), input.double()
    )
    assert_close(output, expected)
    assert_close(grad_input, want)


@pytest.mark.parametrize("backend", [DEVICE, "reference"])
def test_quantize_at_the_ends(backend):
    input = torch.tensor([0.0, 1.0, -0.1, 1.1, -INF, INF, NAN])
    for gradient, passed in [("inside", [1, 1, 0, 0, 0, 0, 0]), ("everywhere", [1, 1, 1, 1, 0, 0, 0])]:
        output, (slope,) = gradients(
            lambda x, gradient=gradient: hdrops.quantize_ste(x, gradient=gradient, backend=backend),
            torch.ones(7),
            input,
        )
        assert output[:6].tolist() == [0, 1, 0, 1, 0, 1] and output[6].isnan()
        assert slope.tolist() == passed


def test_quantize_keeps_the_values_of_an_8_bit_image():
    values = torch.arange(256) / 255
    assert torch.equal(hdrops.quantize_ste(values), values)


@pytest.mark.parametrize(
    "function", [hdrops.tent_histogram, hdrops.value_histogram, hdrops.quantize_ste], ids=lambda f: f.__name__
)
def test_histograms_of_empty_images(function):
    for shape in [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5)]:
        input = torch.zeros(shape, requires_grad=True)
        output = function(input)
        output.sum().backward()
        assert output.shape == getattr(reference, function.__name__)(input).shape
        assert input.grad.shape == shape and not output.detach().any()


# The module


def test_module_learns_a_response():
    """Gradient descent finds the curve that made the target."""
    target = torch.linspace(0, 1, 17) ** 2.2
    layer = hdrops.nn.CRF(levels=17)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    for _ in range(300):
        x = torch.rand(1, 3, 32, 32)
        optimizer.zero_grad()
        (layer(x) - hdrops.crf_lookup(x, target)).square().mean().backward()
        optimizer.step()
    assert float((layer.curve.detach() - target).abs().max()) < 0.01


def test_module_states_and_copies():
    curves = torch.rand(3, 256)
    layer = hdrops.nn.CRF(channels=3, curve=curves, learnable=False, mode="nearest")
    assert not list(layer.parameters())
    other = hdrops.nn.CRF(levels=256, channels=3, mode="nearest")
    other.load_state_dict(layer.state_dict())
    codes = torch.randint(256, (2, 3, 4, 5), dtype=torch.uint8)
    want = hdrops.crf_lookup(codes, curves[None])
    for module in (layer, other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(module(codes), want)
    assert "levels=256, channels=3, learnable=False" in repr(layer)
    with pytest.raises(ValueError, match=r"CRF: curve must be \[2, L\], got shape \[3, 256\]"):
        hdrops.nn.CRF(channels=2, curve=curves)


# errors

X, CURVE = torch.zeros(2, 3, 4, 5), torch.zeros(8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: hdrops.crf_lookup(X.long(), CURVE), TypeError, "crf_lookup: input must be float32.*got torch.int64"),
        (lambda: hdrops.crf_lookup(X, CURVE.half()), TypeError, "curve must be float32, float64 or the input's dtype"),
        (lambda: hdrops.crf_lookup(X, [0, 1]), TypeError, "curve must be a tensor, got list"),
        (lambda: hdrops.crf_lookup(X, torch.zeros(3, 8)), ValueError, r"curve must be \[L\] or .* got shape \[3, 8\]"),
        (lambda: hdrops.crf_lookup(X, torch.zeros(1)), ValueError, "2 to 1048576 levels, got 1"),
        (lambda: hdrops.crf_lookup(X, torch.zeros(4, 1, 8)), ValueError, "1 or N = 2 curves in dimension 0, got 4"),
        (lambda: hdrops.crf_lookup(X, torch.zeros(1, 2, 8)), ValueError, "1 or C = 3 curves in dimension 1, got 2"),
        (lambda: hdrops.crf_lookup(X[0, 0, 0], torch.zeros(2, 1, 8)), ValueError, r"input must be \[N, C, ...\]"),
        (lambda: hdrops.crf_lookup(X, CURVE, mode="cubic"), ValueError, "'linear' or 'nearest', got 'cubic'"),
        (lambda: hdrops.crf_lookup(X, CURVE, gradient_scale=1.0), ValueError, "belongs to mode 'nearest'"),
        (
            lambda: hdrops.crf_lookup(X, CURVE, mode="nearest", gradient_scale=NAN),
            ValueError,
            "gradient_scale must be a finite number",
        ),
        (lambda: hdrops.crf_lookup(X, CURVE.to("meta")), ValueError, "curve must be on input's device cpu, got meta"),
        (
            lambda: hdrops.crf_lookup(X, CURVE, backend="cuda"),
            NotImplementedError,
            "crf_lookup: backend cuda cannot run this call: the tensors are on cpu",
        ),
        (lambda: hdrops.quantize_ste(X, levels=1), ValueError, r"levels must be an integer in \[2, 65536\], got 1"),
        (lambda: hdrops.quantize_ste(X, levels=2.0), TypeError, "levels must be an integer"),
        (lambda: hdrops.quantize_ste(X, gradient="none"), ValueError, "'inside' or 'everywhere', got 'none'"),
        (lambda: hdrops.quantize_ste(X.int()), TypeError, "quantize_ste: input must be float32"),
        (lambda: hdrops.tent_histogram(X[0]), ValueError, r"tent_histogram: input must have 4 dimensions"),
        (lambda: hdrops.tent_histogram(X, bins=(4, 0)), ValueError, r"bins must be an integer in \[1, 65536\], got 0"),
        (lambda: hdrops.tent_histogram(X, bins=()), TypeError, "at least one integer"),
        (lambda: hdrops.value_histogram(X, bins=1), ValueError, r"bins must be an integer in \[2, 65536\], got 1"),
        (lambda: hdrops.value_histogram(X[0]), ValueError, "value_histogram: input must have 4 dimensions"),
    ],
)
def test_error_messages(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.asan
def test_the_bindings_guard_memory():
    lookup = torch.ops.hdrops.crf_lookup.default
    with pytest.raises(ValueError, match="a curve for these codes has 256 levels, got 8"):
        lookup(X.byte(), CURVE.reshape(1, 1, 8), "linear", None)
    with pytest.raises(ValueError, match="curve has 3 images, input 2"):
        lookup(X, torch.zeros(3, 1, 8), "linear", None)
    with pytest.raises(ValueError, match="grad_output has a wrong shape"):
        torch.ops.hdrops._tent_histogram_backward.default(X, X, [4])


# instruction sets

LEVEL_SCRIPT = """
import torch, hdrops
torch.manual_seed(0)
x = torch.rand(2, 3, 37, 41)
curve = torch.rand(2, 3, 100)
results = []
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for mode in ("linear", "nearest"):
            input = x.to(dtype).contiguous(memory_format=memory_format).requires_grad_()
            c = curve.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
            y = hdrops.crf_lookup(input, c, mode=mode)
            results += [y, *torch.autograd.grad((y * x).sum(), (input, c))]
        for f in (hdrops.tent_histogram, hdrops.value_histogram, hdrops.quantize_ste):
            y = f(input)
            results += [y, *torch.autograd.grad(y.square().sum(), input)]
codes = (x * 255).byte()
results += [hdrops.crf_lookup(codes, torch.rand(1, 3, 256)), hdrops.crf_lookup(codes, torch.rand(256))]
torch.save([r.detach().double() for r in results], {path!r})
print(hdrops._load.simd_level())
"""


@pytest.mark.cpu
def test_every_instruction_set_agrees(tmp_path):
    """The levels below this machine's best, each in a process of its own, with the best."""
    best = hdrops._load.simd_level()
    if best == "baseline":
        pytest.skip("this machine has one level")
    found = {}
    for level in dict.fromkeys(("baseline", "avx2", best)):
        path = str(tmp_path / level)
        script = LEVEL_SCRIPT.replace("{path!r}", repr(path))
        environment = {**os.environ, "HDROPS_SIMD": level}
        run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert run.stdout.strip() == level
        found[level] = torch.load(path)
    first = found.pop("baseline")
    for other in found.values():
        for a, b in zip(first, other, strict=True):
            off = (a - b).abs() > 1e-4 * (1 + b.abs())
            # 16-bit results may round to the neighbour, and a pixel on a knot may take either side's slope.
            assert float(off.double().mean()) < 0.01
