"""Response recovery in one call: known responses, real brackets, dtypes, masks, order, errors."""

import json
import math
import resource
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hdrops import merge_exposures
from hdrops.camera import EMoR, estimate_crf, invert_curve, solve_debevec

ONE_STOP = 2.0 ** torch.arange(-6, 7, dtype=torch.float64)
TWO_STOPS = 4.0 ** torch.arange(-3, 4, dtype=torch.float64)
INNER = slice(16, 240)


def _image(path: Path) -> Tensor:
    """An image file as RGB [3, H, W]."""
    cv2 = pytest.importorskip("cv2")
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert image is not None, path
    return torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1)


def _real_bracket(folder: Path) -> tuple[Tensor, Tensor]:
    rows = [line.split() for line in (folder / "image_list.txt").read_text().splitlines() if not line.startswith("#")]
    stack = torch.stack([_image(folder / row[0]) for row in rows if row])[None]
    return stack, torch.tensor([float(row[1]) for row in rows if row], dtype=torch.float64).log()


def _memorial(data: Path) -> tuple[Tensor, Tensor, Tensor]:
    """The memorial church and the mask of its invalid pixels: pure blue, and what the resampling mixed with it."""
    stack, log_times = _real_bracket(data / "memorial")
    blue = (stack[:, :, 0] == 0) & (stack[:, :, 1] == 0) & (stack[:, :, 2] == 255)
    grown = torch.nn.functional.max_pool2d(blue[0].float(), 7, stride=1, padding=3) > 0
    return stack, log_times, grown[None, :, None]


def _generated_scene() -> Tensor:
    """Radiance [128, 256] over about 14 stops: a random field with detail at every scale."""
    generator = torch.Generator().manual_seed(3)
    log_radiance = torch.zeros(1, 1, 128, 256, dtype=torch.float64)
    for size, strength in ((4, 1.6), (16, 0.8), (64, 0.3)):
        field = torch.randn(1, 1, size, 2 * size, generator=generator, dtype=torch.float64)
        log_radiance += strength * torch.nn.functional.interpolate(field, (128, 256), mode="bicubic")
    return log_radiance[0, 0].exp()


def _generated_responses() -> Tensor:
    """15 responses [15, 1024]: powers of 1/1.6 to 1/2.6, with toes and shoulders."""
    generator = torch.Generator().manual_seed(4)
    exposure = torch.linspace(0, 1, 1024, dtype=torch.float64)
    gammas = torch.linspace(1.6, 2.6, 15, dtype=torch.float64)[:, None]
    bend = 0.12 * (torch.rand(15, 1, generator=generator, dtype=torch.float64) - 0.3)
    curves = exposure ** (1 / gammas) + bend * torch.sin(math.pi * exposure)
    return curves.cummax(-1).values.clamp(0, 1)


def _measured_scene(data: Path) -> Tensor:
    radiance = _image(data / "hdri" / "venice.hdr")[1, ::4, ::4].double()
    return 0.25 * radiance / radiance.median()


def _measured_responses(data: Path) -> Tensor:
    """41 responses drawn with the statistics of the measured ones."""
    statistics = json.loads((data / "crf" / "emor_coeff_stats.json").read_text())
    rng = np.random.default_rng(0)
    drawn = rng.multivariate_normal(statistics["mean"], statistics["cov"], 41)
    model = EMoR.load(data / "crf" / "emor.txt")
    raw = model.mean + torch.from_numpy(drawn.clip(statistics["min"], statistics["max"])) @ model.basis[:5]
    curves = raw.clamp(0, 1).cummax(-1).values
    return (curves - curves[:, :1]) / (curves[:, -1:] - curves[:, :1])


def _photograph(radiance: Tensor, response: Tensor, times: Tensor, levels: int = 255) -> Tensor:
    """Codes [1, P, 1, H, W] (float64, whole numbers) of radiance through a response sampled on [0, 1]."""
    exposure = (radiance * times.view(-1, 1, 1)).clamp(0, 1) * (response.numel() - 1)
    lower = exposure.long().clamp(max=response.numel() - 2)
    brightness = torch.lerp(response[lower], response[lower + 1], exposure - lower)
    return (levels * brightness).round()[None, :, None]


def _errors(radiance: Tensor, responses: Tensor, times: Tensor, estimate: Callable[..., Tensor]) -> Tensor:
    """Root mean square error of ln response over codes 16..239, anchored at code 128, for each response."""
    errors = []
    for response in responses:
        stack = _photograph(radiance, response, times).to(torch.uint8)
        found = estimate(stack, times.log())[0, 0].log()
        truth = invert_curve(response, levels=256).clamp_min(1e-9).log()
        difference = (found - truth + truth[128])[INNER]
        errors.append(difference.square().mean().sqrt())
    return torch.stack(errors)


@pytest.fixture(params=["generated", "measured"])
def known(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    """A scene and known responses."""
    if request.param == "generated":
        return _generated_scene(), _generated_responses()
    folder = request.getfixturevalue("data")
    return _measured_scene(folder), _measured_responses(folder)


def test_known_responses_one_stop_apart(known: tuple[Tensor, Tensor]) -> None:
    errors = _errors(*known, ONE_STOP, estimate_crf)
    assert errors.median() <= 0.004 and errors.quantile(0.9) <= 0.015, errors


def test_known_responses_two_stops_apart(known: tuple[Tensor, Tensor]) -> None:
    errors = _errors(*known, TWO_STOPS, estimate_crf)
    assert errors.median() <= 0.012, errors


def test_smoothness_grows_with_the_samples() -> None:
    """A fixed smoothness is worse at 16,000 samples than the default, which is why the default grows."""
    scene, responses = _generated_scene(), _generated_responses()[::5]
    fixed = _errors(scene, responses, TWO_STOPS, lambda s, t: estimate_crf(s, t, smoothness=20.0))
    grown = _errors(scene, responses, TWO_STOPS, estimate_crf)
    assert grown.median() < fixed.median() / 2


def test_robertson_recovers_known_responses(known: tuple[Tensor, Tensor]) -> None:
    scene, responses = known
    errors = _errors(scene, responses[::3], ONE_STOP, lambda s, t: estimate_crf(s, t, method="robertson", samples=8000))
    assert errors.median() <= 0.01, errors


@pytest.mark.parametrize("name", ["memorial", "stack_room"])
def test_real_brackets_are_stable_finite_and_monotone(data: Path, name: str) -> None:
    if name == "memorial":
        stack, log_times, mask = _memorial(data)
    else:
        (stack, log_times), mask = _real_bracket(data / name), None
    curves = torch.cat([estimate_crf(stack, log_times, mask=mask, seed=seed) for seed in (0, 1)])
    assert curves.shape == (2, 3, 256)
    assert curves.isfinite().all() and (curves > 0).all()
    assert (curves[..., INNER].diff() > 0).all() and (curves.diff() >= 0).all()
    assert (curves[..., 128] == 1).all()
    logs = curves.log()
    assert (logs[0] - logs[1])[:, INNER].abs().max() <= 0.1


def _correlation(a: Tensor, b: Tensor, valid: Tensor) -> list[float]:
    return [float(torch.corrcoef(torch.stack((x[m], y[m])))[0, 1]) for x, y, m in zip(a, b, valid, strict=True)]


def _unclipped(stack: Tensor, mask: Tensor | None) -> Tensor:
    """Pixels [C, H, W] valid in every frame, and not clipped in all of them."""
    valid = ((stack > 0) & (stack < 255)).any(1)[0]
    return valid if mask is None else valid & ~mask.any(1)[0]


@pytest.mark.parametrize(("name", "least"), [("memorial", 0.998), ("room", 0.99)])
def test_merged_radiance_agrees_with_opencv(data: Path, name: str, least: float) -> None:
    if name == "memorial":
        stack, log_times, mask = _memorial(data)
    else:
        (stack, log_times), mask = _real_bracket(data / "stack_room"), None
    curve = estimate_crf(stack, log_times, mask=mask)
    radiance = merge_exposures(stack, log_times[None], curve, mask=mask)[0].double().log()
    stored = np.load(data / "ref" / f"{name}_opencv.npz")
    stride = int(stored["stride"])
    opencv = torch.from_numpy(stored["o5_merge_debevec_s300"]).permute(2, 0, 1).double().log()
    valid = _unclipped(stack, mask)[:, ::stride, ::stride] & opencv.isfinite()
    found = _correlation(radiance[:, ::stride, ::stride], opencv, valid)
    assert min(found) > least, found


def test_merged_radiance_agrees_with_debevecs_own_map(data: Path) -> None:
    stack, log_times, mask = _memorial(data)
    radiance = (
        merge_exposures(stack, log_times[None], estimate_crf(stack, log_times, mask=mask), mask=mask)[0].double().log()
    )
    own = _image(data / "memorial" / "memorial.hdr").double()
    valid = _unclipped(stack, mask) & (own > 0)
    found = _correlation(radiance, own.clamp_min(1e-30).log(), valid)
    assert min(found) > 0.97, found


def test_robertson_on_real_brackets(data: Path) -> None:
    stack, log_times = _real_bracket(data / "stack_room")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        curve = estimate_crf(stack, log_times, method="robertson", samples=4000)
    assert curve.isfinite().all() and (curve > 0).all() and (curve.diff() >= 0).all()
    other = estimate_crf(stack, log_times)
    a, b = (merge_exposures(stack, log_times[None], c)[0].double().log() for c in (curve, other))
    assert min(_correlation(a, b, _unclipped(stack, None))) > 0.99


@pytest.fixture(scope="module")
def small() -> tuple[Tensor, Tensor, Tensor]:
    """Exact brightness codes 0..255 (float64, not rounded) [1, 5, 2, 40, 50], log times, the response's exponent."""
    generator = torch.Generator().manual_seed(0)
    times = torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    radiance = torch.randn(1, 1, 2, 40, 50, generator=generator, dtype=torch.float64).mul(1.2).exp() * 0.2
    codes = 255 * (radiance * times.view(1, 5, 1, 1, 1)).clamp(0, 1) ** (1 / 2.2)
    return codes, times.log(), 2.2 * (torch.arange(256, dtype=torch.float64) / 128).clamp_min(1e-9).log()


def test_deep_stacks_are_not_rounded_to_8_bits(small: tuple[Tensor, Tensor, Tensor]) -> None:
    codes, log_times, truth = small
    stacks = {
        "uint8": codes.round().to(torch.uint8),
        "uint16": (codes * 257).round().to(torch.uint16),
        "float32": (codes / 255).float(),
        "float64": codes / 255,
    }
    error = {}
    for name, stack in stacks.items():
        curve = estimate_crf(stack, log_times, smoothness=5.0)
        assert curve.shape == (1, 2, 256)
        error[name] = float((curve.log() - truth)[..., INNER].square().mean().sqrt())
    assert error["uint8"] < 0.004
    # With little smoothing, what is left at 8 bits is the rounding.
    assert error["uint16"] < error["uint8"] / 4 and error["float32"] < error["uint8"] / 4
    assert abs(error["float64"] - error["float32"]) < 1e-5


def test_whole_codes_give_one_curve_in_every_dtype(small: tuple[Tensor, Tensor, Tensor]) -> None:
    codes, log_times, _ = small
    whole = codes.round()
    exact = estimate_crf(whole.to(torch.uint8), log_times)
    torch.testing.assert_close(estimate_crf((whole * 257).to(torch.uint16), log_times), exact, rtol=1e-9, atol=0)
    torch.testing.assert_close(estimate_crf(whole / 255, log_times), exact, rtol=1e-9, atol=0)


def test_order_of_frames_changes_nothing(small: tuple[Tensor, Tensor, Tensor]) -> None:
    codes, log_times, _ = small
    stack = codes.round().to(torch.uint8)
    order = torch.tensor([3, 0, 4, 2, 1])
    assert torch.equal(estimate_crf(stack[:, order], log_times[order]), estimate_crf(stack, log_times))


def test_time_unit_changes_nothing(small: tuple[Tensor, Tensor, Tensor]) -> None:
    codes, log_times, _ = small
    stack = codes.round().to(torch.uint8)
    torch.testing.assert_close(estimate_crf(stack, log_times + 3), estimate_crf(stack, log_times), rtol=1e-9, atol=0)


def test_masked_pixels_do_not_matter(small: tuple[Tensor, Tensor, Tensor]) -> None:
    codes, log_times, _ = small
    stack = codes.round().to(torch.uint8)
    mask = torch.zeros(1, 5, 1, 40, 50, dtype=torch.bool)
    mask[:, 1, :, :15] = True
    mask[:, 3, :, 10:, :20] = True
    spoilt = torch.where(mask, torch.tensor(77, dtype=torch.uint8), stack)
    clean = estimate_crf(stack, log_times, mask=mask)
    assert torch.equal(estimate_crf(spoilt, log_times, mask=mask), clean)
    assert not torch.allclose(estimate_crf(spoilt, log_times), clean, rtol=1e-2)


def test_nan_pixels_are_dropped(small: tuple[Tensor, Tensor, Tensor]) -> None:
    codes, log_times, _ = small
    stack = codes / 255
    mask = torch.zeros(1, 5, 1, 40, 50, dtype=torch.bool)
    mask[:, 2, :, ::3] = True
    holed = stack.masked_fill(mask, torch.nan)
    assert torch.equal(estimate_crf(holed, log_times), estimate_crf(stack, log_times, mask=mask))


def test_batch_equals_loop(small: tuple[Tensor, Tensor, Tensor]) -> None:
    codes, log_times, _ = small
    stack = torch.cat((codes, codes.flip(-1) * 0.9)).round().to(torch.uint8)
    times = torch.stack((log_times, log_times * 0.9))
    both = estimate_crf(stack, times)
    for k in range(2):
        torch.testing.assert_close(both[k : k + 1], estimate_crf(stack[k : k + 1], times[k]), rtol=1e-9, atol=0)
    assert estimate_crf(stack[:0], log_times).shape == (0, 2, 256)


def test_non_contiguous_stack_and_seed(small: tuple[Tensor, Tensor, Tensor]) -> None:
    codes, log_times, _ = small
    stack = codes.round().to(torch.uint8)
    interleaved = stack.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    assert torch.equal(estimate_crf(interleaved, log_times, samples=500), estimate_crf(stack, log_times, samples=500))
    assert not torch.equal(
        estimate_crf(stack, log_times, samples=500, seed=1), estimate_crf(stack, log_times, samples=500)
    )


def test_codes_never_seen_stay_finite() -> None:
    """A linear 8-bit sensor behind a gamma of 2.24 leaves most dark codes unused, and saturates at 248."""
    times = torch.tensor([0.25, 1.0, 4.0], dtype=torch.float64)
    radiance = torch.rand(1, 1, 1, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) ** 3
    sensor = (255 * radiance * times.view(1, 3, 1, 1, 1)).clamp(0, 239).round() / 255
    stack = (255 * sensor ** (1 / 2.24)).round().to(torch.uint8)
    mask = (stack == stack.max()).any(2, keepdim=True)
    curve = estimate_crf(stack, times.log(), mask=mask)
    assert curve.isfinite().all() and (curve > 0).all()
    truth = 2.24 * (torch.arange(64, 240, dtype=torch.float64) / 128).log()
    assert (curve[0, 0, 64:240].log() - truth).abs().max() < 0.05


def test_gradient_reaches_stack_and_exposures(small: tuple[Tensor, Tensor, Tensor]) -> None:
    codes, log_times, _ = small
    stack = (codes[..., :6, :6] / 255).clone().requires_grad_()
    log_times = log_times.clone().requires_grad_()
    estimate_crf(stack, log_times)[..., 200].sum().backward()
    assert stack.grad is not None and stack.grad.abs().sum() > 0 and stack.grad.isfinite().all()
    # Scaling all times leaves the curve: the gradient has no component along it.
    assert log_times.grad is not None and log_times.grad.abs().max() > 1e-3 and log_times.grad.sum().abs() < 1e-8


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"stack": torch.zeros(3, 4, 4)}, ValueError, r"estimate_crf: stack must be \[N, P, C, H, W\]"),
        ({"stack": torch.zeros(1, 3, 1, 4, 4, dtype=torch.int64)}, TypeError, "uint8, uint16 or floating"),
        ({"stack": torch.zeros(1, 1, 1, 4, 4), "log_exposures": torch.zeros(1)}, ValueError, "at least 2 frames"),
        ({"stack": torch.zeros(1, 3, 1, 0, 4)}, ValueError, "empty"),
        ({"log_exposures": torch.zeros(4)}, ValueError, r"must be \[P\] or \[N\|1, P\] with N = 1, P = 3"),
        ({"log_exposures": torch.zeros(3)}, ValueError, "all 3 exposures are equal"),
        ({"log_exposures": torch.tensor([0.0, 1.0, torch.nan])}, ValueError, "finite"),
        ({"log_exposures": torch.arange(3)}, TypeError, "floating point"),
        ({"mask": torch.zeros(1, 3, 1, 4, 5, dtype=torch.bool)}, ValueError, "mask must be"),
        ({"mask": torch.zeros(1, 3, 1, 4, 4)}, TypeError, "mask must be bool"),
        ({"method": "mitsunaga"}, ValueError, "method must be one of .*got 'mitsunaga'"),
        ({"samples": 1}, ValueError, "samples must be at least 2"),
        ({"smoothness": 0.0}, ValueError, "smoothness must be positive"),
        ({}, ValueError, "nothing fixes the slope"),
        ({"method": "robertson"}, ValueError, "nothing fixes the slope"),
    ],
)
def test_errors_say_what_is_wrong(change: dict, kind: type[Exception], message: str) -> None:
    """The last two: a black bracket."""
    arguments = {"stack": torch.zeros(1, 3, 1, 4, 4), "log_exposures": torch.tensor([-1.0, 0.0, 1.0]), **change}
    with pytest.raises(kind, match=message):
        estimate_crf(**arguments)


def test_a_large_solve_stays_small_in_memory() -> None:
    """16,000 samples x 16 frames x 3 channels raise the process's peak by less than 500 MB."""
    log_times = torch.linspace(-7, 4, 16)
    radiance = torch.randn(3, 16000, 1, generator=torch.Generator().manual_seed(0)) * 3
    codes = ((radiance + log_times).exp() * 20).clamp(0, 255).to(torch.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    solve_debevec(codes, log_times, smoothness=200.0)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 500 * 1024
