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
from merge_exposures_cases import (
    DTYPES,
    FLOATS,
    LEVELS,
    assert_radiance,
    bracket,
    double,
    expected,
    gradients,
    log_times,
    reference,
    response,
)

pytestmark = pytest.mark.device
DEVICE = torch.get_default_device().type


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


# Instruction sets


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
