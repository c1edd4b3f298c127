"""merge_exposures against its float64 reference, gold data, OpenCV's stored results, and the rules of a bracket."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hdrops
from hdrops.reference.merge_exposures import merge_exposures as reference
from hdrops.testing import TOLERANCES, assert_close

pytestmark = pytest.mark.device
DEVICE = torch.get_default_device().type

OP = torch.ops.hdrops.merge_exposures.default
LEVELS = {torch.uint8: 256, torch.uint16: 65536}
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DTYPES = [*FLOATS, *LEVELS]


def bracket(dtype, n=2, frames=4, channels=3, height=9, width=13, interleaved=False) -> Tensor:
    """A random stack [N, P, C, H, W], in part clipped in every frame, in either layout."""
    stack = torch.rand(n, frames, channels, height, width, dtype=torch.float64)
    stack[:, :, :, 0, :3] = 0
    stack[:, :, :, 0, 3:6] = 1
    if dtype in LEVELS:
        stack = (stack * (LEVELS[dtype] - 1)).round().to(torch.int32)
    stack = stack.to(dtype)
    return stack.movedim(2, -1).contiguous().movedim(-1, 2) if interleaved else stack


def log_times(frames: int, n: int = 1) -> Tensor:
    """Exposures about 1.5 EV apart, in no order."""
    steps = torch.arange(frames, dtype=torch.float64) + 0.4 * torch.rand(n, frames, dtype=torch.float64)
    return (steps * 1.1 - 2)[:, torch.randperm(frames)]


def response(levels: int, n: int = 1, channels: int = 1) -> Tensor:
    """Increasing inverse responses, all positive."""
    return (torch.rand(n, channels, levels, dtype=torch.float64) + 0.1).cumsum(-1) / levels


def double(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or not tensor.is_floating_point() else tensor.double()


def expected(stack: Tensor, times: Tensor, curve: Tensor | None = None, **options: object) -> Tensor:
    """The reference in float64 on the readings as they are stored."""
    if stack.dtype in LEVELS and curve is None:
        curve = torch.linspace(0, 1, LEVELS[stack.dtype], dtype=torch.float64)
    return reference(double(stack), times.double(), double(curve), **options)


def assert_radiance(actual: Tensor, wanted: Tensor) -> None:
    """An absolute error of ln E is a relative one of E: its terms, up to 8 in size, each round once."""
    tolerance = TOLERANCES[actual.dtype]
    subnormal = 0.0
    if actual.dtype == torch.float16:  # saturates at its ends, and has few bits near the lower one
        wanted, subnormal = wanted.clamp(2.0**-24, 65504), 2.0**-25
    error = (actual.double() - wanted).abs()
    bound = (tolerance.rounding + 8 * tolerance.accumulation) * wanted + subnormal
    assert torch.equal(actual.isnan(), wanted.isnan())
    assert not (error > bound).any(), f"error up to {(error / bound).nan_to_num().max():.3g} of what is allowed"


# Values


@pytest.mark.asan
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", [None, 17, 256])
def test_every_dtype_and_layout_equals_the_reference(dtype, interleaved, levels):
    stack, times = bracket(dtype, interleaved=interleaved), log_times(4, 2).float()
    curve = None if levels is None else response(levels, 2, 3).float()
    radiance = hdrops.merge_exposures(stack, times, curve)
    assert radiance.dtype == (torch.float32 if dtype in LEVELS else dtype)
    assert radiance.is_contiguous(memory_format=torch.channels_last if interleaved else torch.contiguous_format)
    assert_radiance(radiance, expected(stack, times, curve))


@pytest.mark.parametrize("dtype", LEVELS)
def test_a_table_with_an_entry_for_each_code_is_read_exactly(dtype):
    codes = torch.arange(LEVELS[dtype], dtype=torch.int32).to(dtype).view(1, 1, 1, 1, -1)
    curve = torch.rand(LEVELS[dtype]) + 0.01
    radiance = hdrops.merge_exposures(codes, torch.zeros(1, 1), curve, weight="uniform")
    assert_radiance(radiance.flatten(), curve.double())


@pytest.mark.parametrize("levels", [256, 1000, 5000])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_long_tables_of_any_shape_are_interpolated_to_the_last_bit(dtype, levels):
    # Entries that have nothing to do with their neighbours show every error of the place between two of them.
    stack, times = bracket(dtype, height=40, width=50), log_times(4).float()
    weight, curve = torch.rand(levels), torch.rand(levels) + 0.01
    assert_radiance(hdrops.merge_exposures(stack, times, weight=weight), expected(stack, times, weight=weight.double()))
    assert_radiance(
        hdrops.merge_exposures(stack, times, curve, weight="uniform"),
        expected(stack, times, curve, weight="uniform"),
    )


@pytest.mark.parametrize("dtype", LEVELS)
def test_a_float64_curve_gives_float64_radiance(dtype):
    stack, times, curve = bracket(dtype), log_times(4), response(LEVELS[dtype], 1, 3)
    radiance = hdrops.merge_exposures(stack, times, curve)
    assert radiance.dtype == torch.float64
    assert_radiance(radiance, expected(stack, times, curve))


@pytest.mark.asan
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("fallback", [True, False])
@pytest.mark.parametrize("ties", [True, False])
def test_masks(dtype, interleaved, kind, fallback, ties):
    stack, curve = bracket(dtype, interleaved=interleaved), response(256, 1, 3).float()
    times = torch.tensor([[0.0, 1, 0, 0]]) if ties else log_times(4).float()
    mask = torch.rand(1, 4, 1, 9, 13) * (torch.rand(1, 4, 1, 9, 13) > 0.5)
    mask[:, :, :, 5] = 0
    mask = mask == 0 if kind == "bool" else mask
    radiance = hdrops.merge_exposures(stack, times, curve, mask=mask, fallback=fallback)
    assert_radiance(radiance, expected(stack, times, curve, mask=mask, fallback=fallback))
    unmasked = hdrops.merge_exposures(stack, times, curve, fallback=fallback)
    assert_radiance(radiance[:, :, 5], unmasked[:, :, 5].double())


@pytest.mark.asan
@pytest.mark.parametrize("weight", ["hat", "debevec", "uniform", 1, 2, 3, 4, 256, 1000])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_weights(weight, dtype):
    stack, times, curve = bracket(dtype), log_times(4).float(), response(256).float()
    weight = torch.hann_window(weight) + 0.05 if isinstance(weight, int) else weight
    radiance = hdrops.merge_exposures(stack, times, curve, weight=weight)
    assert_radiance(
        radiance, expected(stack, times, curve, weight=double(weight) if torch.is_tensor(weight) else weight)
    )


def test_the_formula_written_out():
    stack, times = torch.tensor([0.2, 0.5, 0.9]).view(1, 3, 1, 1, 1), torch.tensor([[0.5, 1.0, 2.0]])
    weights = torch.tensor([0.4, 1.0, 0.2])
    estimates = (torch.tensor([0.2, 0.5, 0.9]) / times[0]).log()
    wanted = ((weights * estimates).sum() / weights.sum()).exp()
    for backend in (DEVICE, "reference"):
        radiance = hdrops.merge_exposures(stack, times.log(), backend=backend)
        torch.testing.assert_close(radiance.flatten()[0], wanted, rtol=1e-5, atol=0)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    n=st.integers(0, 3),
    frames=st.integers(1, 6),
    channels=st.integers(1, 5),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    interleaved=st.booleans(),
    levels=st.sampled_from([None, 1, 2, 3, 64]),
    per_image=st.booleans(),
    per_channel=st.booleans(),
    ties=st.booleans(),
)
def test_random_geometry(n, frames, channels, height, width, dtype, interleaved, levels, per_image, per_channel, ties):
    stack = bracket(dtype, n, frames, channels, height, width, interleaved)
    times = log_times(frames, n if per_image else 1).float()
    times = (times / 2).round() if ties else times
    curve = None
    if levels is not None:
        curve = response(levels, n if per_image else 1, channels if per_channel else 1).float()
    radiance = hdrops.merge_exposures(stack, times, curve)
    assert radiance.shape == (n, channels, height, width)
    assert_radiance(radiance, expected(stack, times, curve))


def test_many_channels_and_long_streams():
    stack = bracket(torch.uint8, 1, 2, 700, 3, 17, interleaved=True)
    curve, times = response(256, 1, 700).float(), log_times(2).float()
    assert_radiance(hdrops.merge_exposures(stack, times, curve), expected(stack, times, curve))
    stack = bracket(torch.float32, 1, 2, 1, 211, 311)
    assert_radiance(hdrops.merge_exposures(stack, times), expected(stack, times))


@pytest.mark.asan
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_strided_stacks(dtype):
    stack, times = bracket(dtype, 2, 6, 3, 12, 14), log_times(3).float()
    views = {
        "some frames": stack[:, ::2],
        "crop": stack[:, :3, :, 2:9, 3:11],
        "transposed": stack[:, :3].transpose(3, 4),
        "one image for all": stack[:1, :3].expand(4, -1, -1, -1, -1),
        "interleaved, some frames": stack.movedim(2, -1).contiguous().movedim(-1, 2)[:, 1::2],
    }
    for name, view in views.items():
        radiance = hdrops.merge_exposures(view, times)
        assert torch.equal(radiance, hdrops.merge_exposures(view.contiguous(), times)), name


# Gold data and OpenCV


def room(data: Path) -> Tensor:
    cv2 = pytest.importorskip("cv2")
    names = sorted((data / "stack_room").glob("*.jpg"))
    frames = np.stack([cv2.imread(str(name))[..., ::-1] for name in names])
    return torch.from_numpy(frames).permute(0, 3, 1, 2)[None]


def memorial(data: Path) -> Tensor:
    cv2 = pytest.importorskip("cv2")
    names = sorted((data / "memorial").glob("*.png"))
    frames = np.stack([cv2.imread(str(name))[..., ::-1] for name in names])
    return torch.from_numpy(frames).permute(0, 3, 1, 2)[None]


@pytest.mark.cpu
@pytest.mark.parametrize("backend", [DEVICE, "reference"])
def test_gold_log_radiance_of_room(data, backend):
    stack, gold = room(data), np.load(data / "ref" / "room_merge_gold.npz")
    times, curve = (
        torch.from_numpy(gold["times"]).log()[None].float(),
        torch.from_numpy(gold["g"]).exp().T[None].float(),
    )
    weight, step = torch.from_numpy(gold["w"]).float(), int(gold["stride"])
    per_channel = hdrops.merge_exposures(stack, times, curve, weight=weight, backend=backend)
    channel_mean = weight[stack.long()].mean(2, keepdim=True)
    mean = hdrops.merge_exposures(stack, times, curve, weight="uniform", mask=channel_mean, backend=backend)
    for radiance, name in ((per_channel, "lnE_per_channel"), (mean, "lnE_mean_weight")):
        got = radiance[0, :, ::step, ::step].permute(1, 2, 0).double().log()
        assert (got - torch.from_numpy(gold[name])).abs().max() < 1e-5, name


@pytest.mark.cpu
@pytest.mark.parametrize("bracket_name", ["room", "memorial"])
@pytest.mark.parametrize("version", ["o4", "o5"])
def test_opencv_radiance_with_its_response_and_channel_mean_weights(data, bracket_name, version):
    stack = room(data) if bracket_name == "room" else memorial(data)
    stored = np.load(data / "ref" / f"{bracket_name}_opencv.npz")
    times, step = torch.from_numpy(stored["times"]), int(stored["stride"])
    curve = torch.from_numpy(stored[f"{version}_crf_debevec_s300"]).T[None]
    if bracket_name == "memorial":  # its files run from the longest exposure to the shortest
        times = times.sort(descending=True).values
    codes = torch.arange(256.0)
    weight = torch.where(codes < 128, codes + 1, 256 - codes) if version == "o4" else torch.minimum(codes, 255 - codes)
    channel_mean = weight[stack.long()].mean(2, keepdim=True)
    radiance = hdrops.merge_exposures(stack, times.log()[None], curve, weight="uniform", mask=channel_mean)
    got = radiance[0, :, ::step, ::step].permute(1, 2, 0).double()
    wanted = torch.from_numpy(stored[f"{version}_merge_debevec_s300"]).double()
    assert ((got - wanted) / wanted).abs().max() < 1e-4


# The rules of a bracket


@pytest.mark.asan
@pytest.mark.parametrize("backend", [DEVICE, "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_clipped_in_every_frame(dtype, backend):
    white = torch.full((1, 3, 3, 2, 2), 1.0 if dtype not in LEVELS else LEVELS[dtype] - 1).to(dtype)
    times = torch.tensor([[4.0, 0.25, 1.0]])
    bright = hdrops.merge_exposures(white, times.log(), backend=backend)
    torch.testing.assert_close(bright.float(), torch.full_like(bright.float(), 4.0), rtol=1e-6, atol=0)
    dark = hdrops.merge_exposures(torch.zeros_like(white), times.log(), backend=backend)
    wanted = torch.full_like(dark.float(), 1e-7 / 4).to(dark.dtype).float()
    least = 2.0**-24 if dtype == torch.float16 else 0.0
    torch.testing.assert_close(dark.float(), wanted.clamp(min=least), rtol=1e-5, atol=0)
    assert (dark > 0).all()


@pytest.mark.parametrize("backend", [DEVICE, "reference"])
@pytest.mark.parametrize(
    ("codes", "masked", "frame"),
    [
        ([0, 255, 255], [], 0),  # the middle frame is bright: the shortest
        ([0, 0, 255], [], 2),
        ([0, 255], [], 1),  # of two, the shorter one decides: dark, so the longest
        ([255, 255, 0], [0], 1),  # without frame 0 the middle one is frame 1
        ([255, 0, 0], [0, 2], 1),
        ([0, 255, 255, 255], [], 0),
    ],
)
def test_fallback_takes_one_frame_by_exposure(codes, masked, frame, backend):
    curve = torch.rand(256) + 0.1
    times = torch.linspace(-2, 2, len(codes))
    stack = torch.tensor(codes, dtype=torch.uint8).view(1, -1, 1, 1, 1)
    mask = torch.zeros(1, len(codes), 1, 1, 1, dtype=torch.bool)
    mask[:, masked] = True
    shuffled = torch.randperm(len(codes))
    radiance = hdrops.merge_exposures(
        stack[:, shuffled], times[None, shuffled], curve, mask=mask[:, shuffled], backend=backend
    )
    wanted = curve[codes[frame]] / times[frame].exp()
    torch.testing.assert_close(radiance.flatten()[0], wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_shuffled_frames_give_the_same_bits(dtype, ties, masked, interleaved):
    stack = bracket(dtype, 2, 6, interleaved=interleaved)
    times = torch.tensor([[0.5, -1.0, 0.5, 0.5, 2.0, 2.0]]) if ties else log_times(6, 2).float()
    mask = torch.rand(2, 6, 1, 9, 13) if masked else None
    if stack.is_floating_point():
        stack[:, 1, :, 3] = torch.nan
        stack[:, 3, :, 3:5] = torch.nan
    weight = torch.rand(64)
    first = hdrops.merge_exposures(stack, times, None, mask=mask, weight=weight)
    for _ in range(4):
        order = torch.randperm(6)
        other = None if mask is None else mask[:, order]
        again = hdrops.merge_exposures(stack[:, order], times[:, order], None, mask=other, weight=weight)
        assert torch.equal(again, first)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_longer_times_mean_less_radiance(dtype):
    stack, times = bracket(dtype), log_times(4).float()
    once, scaled = hdrops.merge_exposures(stack, times), hdrops.merge_exposures(stack, times + np.log(8))
    torch.testing.assert_close(scaled * 8, once, rtol=1e-5, atol=0)


@pytest.mark.asan
@pytest.mark.parametrize("backend", [DEVICE, "reference"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_counts_as_masked(dtype, backend):
    stack, times = bracket(dtype, 1, 3), log_times(3).to(torch.float64 if dtype == torch.float64 else torch.float32)
    stack[:, 1, :, :5] = torch.nan
    stack[:, :, 1, 4] = torch.nan
    mask = torch.zeros(1, 3, 1, 9, 13, dtype=torch.bool)
    mask[:, 1, :, :5] = True
    radiance = hdrops.merge_exposures(stack, times, backend=backend)
    assert radiance[:, 1, 4].isnan().all() and int(radiance.isnan().sum()) == 13
    clean = hdrops.merge_exposures(stack.nan_to_num(0.5), times, mask=mask, backend=backend)
    at = ~radiance.isnan()
    assert torch.equal(radiance[at], clean[at])


@pytest.mark.asan
def test_readings_outside_are_clamped():
    stack = torch.tensor([-torch.inf, -1.0, 0.0, 0.5, 1.0, 7.0, torch.inf]).view(1, 1, 1, 1, -1)
    curve = torch.tensor([0.1, 0.3, 1.0])
    radiance = hdrops.merge_exposures(stack, torch.zeros(1, 1), curve)
    torch.testing.assert_close(radiance.flatten(), torch.tensor([0.1, 0.1, 0.1, 0.3, 1.0, 1.0, 1.0]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", [DEVICE, "reference"])
def test_radiance_is_positive_and_finite_at_extreme_times(dtype, backend):
    stack = bracket(dtype, 1, 3)
    for shift in (-80.0, 80.0):
        radiance = hdrops.merge_exposures(stack, torch.tensor([[-1.0, 0, 1]]) + shift, backend=backend)
        assert radiance.isfinite().all() and (radiance > 0).all()


def test_one_frame_gives_its_own_estimate():
    stack, curve = bracket(torch.uint8, 1, 1), torch.rand(256) + 0.1
    radiance = hdrops.merge_exposures(stack, torch.tensor([[1.5]]), curve)
    torch.testing.assert_close(radiance, curve[stack[:, 0].long()] / np.exp(1.5), rtol=1e-5, atol=0)


def test_entries_that_are_not_positive_count_as_the_smallest_response():
    curve = torch.rand(256) + 0.1
    curve[::3] = -curve[::3]
    curve[1] = torch.nan
    repaired = torch.where(curve > 0, curve, 1e-7)
    for dtype in (torch.uint8, torch.float32):
        stack, times = bracket(dtype), log_times(4).float()
        assert torch.equal(hdrops.merge_exposures(stack, times, curve), hdrops.merge_exposures(stack, times, repaired))


@pytest.mark.asan
def test_empty_batch():
    for backend in (DEVICE, "reference"):
        times = torch.zeros(1, 3, requires_grad=True)
        radiance = hdrops.merge_exposures(torch.rand(0, 3, 3, 4, 5), times, backend=backend)
        assert radiance.shape == (0, 3, 4, 5)
        radiance.sum().backward()
        assert torch.equal(times.grad, torch.zeros(1, 3))


# Gradients


def gradients(function, stack, times, curve, output_gradient, **options):
    inputs = [t.detach().clone(memory_format=torch.preserve_format) for t in (stack, times, curve) if t is not None]
    for tensor in inputs:
        tensor.requires_grad_(tensor.is_floating_point())
    output = function(*inputs, **options)
    return torch.autograd.grad(output, [t for t in inputs if t.requires_grad], output_gradient.to(output.dtype))


@pytest.mark.asan
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("levels", [None, 17, 256])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_equal_the_reference(dtype, interleaved, levels, masked):
    """With the weights constant in both, hat included; clipped pixels go through the fallback."""
    stack, times = bracket(dtype, 2, 5, interleaved=interleaved), log_times(5, 2).float()
    curve = None if levels is None else response(levels, 2, 3).float()
    options = {"mask": torch.rand(2, 5, 1, 9, 13) * (torch.rand(2, 5, 1, 9, 13) > 0.4)} if masked else {}
    output_gradient = torch.randn(2, 3, 9, 13).to(dtype if dtype in FLOATS else torch.float32)
    got = gradients(hdrops.merge_exposures, stack, times, curve, output_gradient, **options)
    if dtype in LEVELS and curve is None:
        curve = torch.linspace(0, 1, LEVELS[dtype], dtype=torch.float64)
    want = gradients(reference, double(stack), times.double(), double(curve), output_gradient.double(), **options)
    terms = 400 if levels is None else 400 + levels**2 // 16  # a place among L levels is rounded to L units
    names = (["stack"] if dtype in FLOATS else []) + ["log_exposures"] + ([] if levels is None else ["curve"])
    for name, one, other in zip(names, got, want, strict=False):
        scale = None if name == "stack" else float(want[-1 if name == "curve" else len(names) - 2].abs().max())
        assert_close(one, other, terms=terms, scale=scale, name=name)


def test_gradient_of_a_shared_curve_and_shared_times():
    for dtype in (torch.uint8, torch.uint16, torch.float32):
        for interleaved in (False, True):
            stack, times, curve = bracket(dtype, 3, interleaved=interleaved), log_times(4).float(), response(33).float()
            output_gradient = torch.randn(3, 3, 9, 13)
            got = gradients(hdrops.merge_exposures, stack, times, curve, output_gradient)
            want = gradients(reference, double(stack), times.double(), curve.double(), output_gradient.double())
            for one, other in zip(got, want, strict=True):
                assert_close(one, other, terms=400, scale=float(other.abs().max()))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradcheck(interleaved, which):
    """With uniform weights the gradient is the derivative of the whole formula; so it is where the fallback decides."""
    stack = torch.rand(2, 3, 2, 2, 3, dtype=torch.float64) * 0.8 + 0.1
    stack = (stack * 12).floor() / 12 + 0.04  # away from the curve's knots
    stack = stack.movedim(2, -1).contiguous().movedim(-1, 2) if interleaved else stack
    inputs = [stack, log_times(3, 2), response(13, 1, 2)]
    inputs[which].requires_grad_()
    torch.autograd.gradcheck(lambda *t: hdrops.merge_exposures(*t, weight="uniform"), inputs)
    mask = torch.zeros(1, 3, 1, 2, 3, dtype=torch.float64)
    mask[:, 1:] = 1e-6
    torch.autograd.gradcheck(lambda *t: hdrops.merge_exposures(*t, weight="uniform", mask=mask), inputs)


def test_weights_are_constants():
    stack = torch.full((1, 2, 1, 1, 1), 0.3, dtype=torch.float64)
    stack[:, 1] = 0.6
    stack.requires_grad_()
    times = torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    radiance = hdrops.merge_exposures(stack, times)
    (gradient,) = torch.autograd.grad(radiance.sum(), stack)
    weights = torch.tensor([0.6, 0.8], dtype=torch.float64)
    wanted = radiance.sum().detach() * weights / (weights.sum() + 1e-9) / stack.detach().flatten()
    torch.testing.assert_close(gradient.flatten(), wanted)


def test_only_asked_gradients_are_computed():
    stack, times, curve = bracket(torch.float32), log_times(4).float(), response(9).float().view(1, 1, 9)
    arguments = (torch.ones(2, 3, 9, 13), stack, times, curve, torch.ones(1), None, True)
    every = torch.ops.hdrops._merge_exposures_backward.default(*arguments, [True, True, True])
    for k in range(3):
        some = torch.ops.hdrops._merge_exposures_backward.default(*arguments, [j == k for j in range(3)])
        for j in range(3):
            assert torch.equal(some[j], every[j]) if j == k else some[j].numel() == 0


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
@pytest.mark.parametrize("interleaved", [False, True])
def test_any_number_of_threads_gives_the_same_bits(dtype, interleaved, threads):
    stack, times, curve = (
        bracket(dtype, 1, 3, 3, 260, 301, interleaved),
        log_times(3).float(),
        response(64, 1, 3).float(),
    )
    output_gradient = torch.randn(1, 3, 260, 301)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(
            [
                hdrops.merge_exposures(stack, times, curve),
                *gradients(hdrops.merge_exposures, stack, times, curve, output_gradient),
            ]
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_double_backward_and_forward_ad():
    stack, times = bracket(torch.float64, 1, 2, 1, 2, 3) * 0.9 + 0.03, log_times(2)
    stack.requires_grad_()
    (first,) = torch.autograd.grad(hdrops.merge_exposures(stack, times).sum(), stack, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"merge_exposures: second derivatives.*backend='reference'"):
        first.sum().backward()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(stack.detach(), torch.ones_like(stack))
        with pytest.raises(NotImplementedError, match=r"merge_exposures: forward-mode.*backend='reference'"):
            hdrops.merge_exposures(dual, times)

    def merged(stack: Tensor, times: Tensor) -> Tensor:
        return hdrops.merge_exposures(stack, times, weight="uniform", backend="reference")

    stack = (torch.rand(1, 2, 1, 2, 2, dtype=torch.float64) * 0.8 + 0.1).requires_grad_()
    times = log_times(2).requires_grad_()
    torch.autograd.gradcheck(merged, (stack, times), check_forward_ad=True)
    torch.autograd.gradgradcheck(merged, (stack, times))


# Registration


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_opcheck(dtype, interleaved):
    stack = bracket(dtype, 2, 3, 3, 4, 5, interleaved)
    times, curve, weight = log_times(3).float(), response(16, 2, 3).float(), torch.tensor([0.0, 1.0, 0.0])
    for tensor in (stack, times, curve):
        tensor.requires_grad_(tensor.is_floating_point())
    mask = torch.rand(1, 3, 1, 4, 5)
    torch.library.opcheck(OP, (stack, times, curve, weight, mask, True))
    torch.library.opcheck(OP, (stack, times, None, weight, mask < 0.3, False))
    backward = torch.ops.hdrops._merge_exposures_backward.default
    output_gradient = torch.rand(2, 3, 4, 5).to(dtype if dtype in FLOATS else torch.float32)
    arguments = tuple(t.detach() for t in (output_gradient, stack, times, curve, weight, mask))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(backward, (*arguments, True, [True, True, True]), test_utils=tests)


@pytest.mark.parametrize("interleaved", [False, True])
def test_compile_without_recompiling_for_sizes(interleaved):
    torch._dynamo.reset()
    compiled = torch.compile(hdrops.merge_exposures, fullgraph=True, dynamic=True, backend="aot_eager")
    times, curve = log_times(3).float().requires_grad_(), response(256, 1, 3).float().requires_grad_()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for height in (6, 9, 12):
            stack = bracket(torch.uint8, 2, 3, 3, height, 7, interleaved)
            radiance, eager = compiled(stack, times, curve), hdrops.merge_exposures(stack, times, curve)
            assert torch.equal(radiance, eager) and radiance.stride() == eager.stride()
            got, want = (torch.autograd.grad(r.sum(), (times, curve)) for r in (radiance, eager))
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_export():
    class Merge(torch.nn.Module):
        def forward(self, stack: Tensor, times: Tensor) -> Tensor:
            return hdrops.merge_exposures(stack, times)

    stack, times = bracket(torch.uint8), log_times(4).float()
    program = torch.export.export(Merge(), (stack, times))
    assert torch.equal(program.module()(stack, times), hdrops.merge_exposures(stack, times))


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (1, 0, None), (None, 0, 1)])
def test_vmap_equals_a_loop(in_dims):
    def batched(tensor: Tensor, dim: int | None) -> Tensor:
        return tensor[0] if dim is None else tensor.movedim(0, dim)

    inputs = [
        torch.stack([bracket(torch.float32, 2, 3) for _ in range(4)]),
        torch.stack([log_times(3).float() for _ in range(4)]),
        torch.stack([response(16, 1, 3).float() for _ in range(4)]),
    ]
    mapped = torch.vmap(hdrops.merge_exposures, in_dims)(*(batched(t, d) for t, d in zip(inputs, in_dims, strict=True)))
    for k in range(4):
        one = hdrops.merge_exposures(*(t[0 if d is None else k] for t, d in zip(inputs, in_dims, strict=True)))
        assert torch.equal(mapped[k], one)


def test_autocast_merges_half_precision_in_float32():
    stack, times = bracket(torch.bfloat16), log_times(4).float()
    for backend in (DEVICE, "reference"):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            radiance = hdrops.merge_exposures(stack, times, backend=backend)
        assert torch.equal(radiance, hdrops.merge_exposures(stack.float(), times, backend=backend))


def test_fresh_memory_is_written_everywhere():
    torch.use_deterministic_algorithms(True)  # fills it with NaN
    try:
        for interleaved in (False, True):
            stack, times, curve = (
                bracket(torch.float32, interleaved=interleaved),
                log_times(4).float(),
                response(8).float(),
            )
            got = gradients(hdrops.merge_exposures, stack, times, curve, torch.ones(2, 3, 9, 13))
            assert all(gradient.isfinite().all() for gradient in got)
    finally:
        torch.use_deterministic_algorithms(False)


SIMD_SCRIPT = """
import sys, torch, hdrops
saved = torch.load(sys.argv[1])
for case in saved:
    stack, times, curve = case["inputs"]
    stack.requires_grad_(stack.is_floating_point()), curve.requires_grad_()
    radiance = hdrops.merge_exposures(stack, times, curve)
    gradient = torch.autograd.grad(radiance.sum(), curve)[0]
    torch.testing.assert_close(radiance, case["radiance"], rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, case["gradient"], rtol=1e-4, atol=1e-4)
print(hdrops._load.simd_level())
"""


@pytest.mark.cpu
@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_lower_instruction_sets_agree(level, tmp_path):
    levels = hdrops._load.SIMD_LEVELS
    if levels.index(level) >= levels.index(hdrops._load.simd_level()):
        pytest.skip(f"{level} is not below {hdrops._load.simd_level()}, which the other tests run on")
    cases = []
    for dtype in (torch.uint8, torch.uint16, torch.float32):
        inputs = (bracket(dtype), log_times(4).float(), response(19, 1, 3).float())
        radiance = expected(*inputs).float()
        (gradient,) = gradients(reference, *inputs, torch.ones(2, 3, 9, 13))[-1:]
        cases.append({"inputs": inputs, "radiance": radiance, "gradient": gradient})
    torch.save(cases, tmp_path / "cases.pt")
    root = str(Path(hdrops.__file__).parents[1])
    environment = {**os.environ, "HDROPS_SIMD": level, "PYTHONPATH": root}
    command = [sys.executable, "-c", SIMD_SCRIPT, str(tmp_path / "cases.pt")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == level


# The module


def test_module_trains_its_curve_and_saves_it():
    stack, times = bracket(torch.float32, 1, 3), log_times(3).float()
    layer = hdrops.nn.ExposureMerge(response(32, 1, 3).float(), learnable=True)
    target = hdrops.merge_exposures(stack, times, response(32, 1, 3).float()).log()
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        loss = (layer(stack, times).log() - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 100
    other = hdrops.nn.ExposureMerge(torch.zeros(1, 3, 32), learnable=True)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(stack, times), layer(stack, times))


def test_module_passes_its_options_on():
    stack, times, table = bracket(torch.uint8), log_times(4).float(), torch.rand(7)
    mask = torch.rand(1, 4, 1, 9, 13)
    layer = hdrops.nn.ExposureMerge(weight=table, fallback=False)
    assert not list(layer.parameters())
    wanted = hdrops.merge_exposures(stack, times, weight=table, mask=mask, fallback=False)
    assert torch.equal(layer(stack, times, mask), wanted)
    assert "weight=table" in repr(layer)
    with pytest.raises(ValueError, match="ExposureMerge: learnable=True needs a curve"):
        hdrops.nn.ExposureMerge(learnable=True)


# Errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"stack": torch.rand(2, 4, 3, 5)}, ValueError, r"stack must be \[N, P, C, H, W\], got shape \[2, 4, 3, 5\]"),
        ({"stack": torch.zeros(2, 4, 3, 5, 6, dtype=torch.int32)}, TypeError, "stack must be .*int32"),
        ({"stack": torch.rand(2, 0, 3, 5, 6)}, ValueError, "at least one frame"),
        ({"log_exposures": torch.zeros(4)}, ValueError, r"log_exposures must be \[N or 1, P\] = \[2 or 1, 4\], got"),
        ({"log_exposures": torch.zeros(1, 3)}, ValueError, r"log_exposures must be .*got shape \[1, 3\]"),
        ({"log_exposures": torch.zeros(1, 4).long()}, TypeError, "log_exposures must be floating, got torch.int64"),
        ({"log_exposures": torch.tensor([[0, torch.nan, 1, 2]])}, ValueError, "log_exposures must be finite, got nan"),
        ({"log_exposures": torch.tensor([[0, 1, torch.inf, 2]])}, ValueError, "log_exposures must be finite.* frame 2"),
        ({"curve": torch.rand(3, 256)}, ValueError, r"curve must be \[L\] or \[N or 1, C or 1, L\] = \[2 or 1, 3 or 1"),
        ({"curve": torch.rand(1, 2, 256)}, ValueError, r"curve must be .*got shape \[1, 2, 256\]"),
        ({"curve": torch.rand(0)}, ValueError, "curve must have at least one entry"),
        ({"curve": torch.arange(256)}, TypeError, "curve must be floating, got torch.int64"),
        ({"weight": "robertson"}, ValueError, "weight must be one of hat, debevec, uniform or a tensor.*'robertson'"),
        ({"weight": torch.rand(2, 3)}, ValueError, r"weight must be a table \[L\], got shape \[2, 3\]"),
        (
            {"weight": torch.tensor([0.0, -1.0])},
            ValueError,
            "weight must be finite and not negative, got -1 in entry 1",
        ),
        (
            {"mask": torch.ones(2, 4, 3, 5, 6)},
            ValueError,
            r"mask must be \[N or 1, P, 1, H, W\] = \[2 or 1, 4, 1, 5, 6\]",
        ),
        ({"mask": torch.ones(1, 4, 1, 5, 6).int()}, TypeError, "mask must be bool or floating, got torch.int32"),
        ({"stack": [[0.5]]}, TypeError, "merge_exposures: stack must be a tensor, got list"),
        ({"log_exposures": [0.0]}, TypeError, "merge_exposures: log_exposures must be a tensor, got list"),
        ({"curve": [0.0, 1.0]}, TypeError, "merge_exposures: curve must be a tensor or None, got list"),
        ({"mask": [True]}, TypeError, "merge_exposures: mask must be a tensor or None, got list"),
        ({"weight": [1.0]}, ValueError, r"weight must be one of hat, debevec, uniform or a tensor.*got \[1.0\]"),
        ({"fallback": "yes"}, TypeError, "merge_exposures: fallback must be a bool, got 'yes'"),
        ({"backend": "opencl"}, ValueError, "backend must be one of"),
        ({"backend": "cuda"}, NotImplementedError, "backend cuda cannot run this call: the tensors are on cpu"),
        ({"curve": torch.rand(9, device="meta")}, ValueError, "curve must be on the stack's device cpu, got meta"),
    ],
)
def test_errors(change, error, message):
    arguments = {"stack": torch.rand(2, 4, 3, 5, 6), "log_exposures": torch.zeros(1, 4), **change}
    with pytest.raises(error, match=f"merge_exposures: .*{message}" if error is not TypeError else message):
        hdrops.merge_exposures(**arguments)
