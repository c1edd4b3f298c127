"""Tone mapping: formulas, ranges, robustness to NaN and infinity, OpenCV's operators as peers."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hdrops.camera import drago, expose, luminance, mu_law, mu_law_inverse, reinhard, srgb_decode, srgb_encode

MAPPERS = [reinhard, drago, expose]


def _scene(height: int = 40, width: int = 60) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, height, width, generator=generator, dtype=torch.float64).mul(2).exp()


def test_mu_law_and_its_inverse() -> None:
    x = torch.tensor([0.0, 0.1, 1.0, 2.0, -0.5], dtype=torch.float64)
    expected = [math.copysign(math.log1p(5000 * abs(v)) / math.log(5001), v) for v in x.tolist()]
    torch.testing.assert_close(mu_law(x), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(mu_law_inverse(mu_law(x)), x)
    torch.testing.assert_close(mu_law_inverse(mu_law(x, mu=100.0), mu=100.0), x)
    assert torch.autograd.gradcheck(mu_law, (x[1:4].clone().requires_grad_(),))


def test_srgb_code_values() -> None:
    linear = torch.tensor([-1.0, 0.0, 0.0031308, 0.18, 0.5, 1.0, 7.0, torch.nan, torch.inf], dtype=torch.float64)
    expected = torch.tensor([0.0, 0.0, 0.04045, 0.461356, 0.735357, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(srgb_encode(linear), expected, rtol=0, atol=1e-5)
    ramp = torch.linspace(0, 1, 1001, dtype=torch.float64)
    torch.testing.assert_close(srgb_decode(srgb_encode(ramp)), ramp, rtol=0, atol=1e-6)
    zero = torch.zeros(1, requires_grad=True)
    srgb_encode(zero).sum().backward()
    assert zero.grad is not None and float(zero.grad) == pytest.approx(12.92)


def test_luminance_of_white_is_its_value() -> None:
    torch.testing.assert_close(luminance(torch.full((2, 3, 4, 5), 0.7)), torch.full((2, 1, 4, 5), 0.7))


def test_reinhard_formula() -> None:
    """Grey pixels, so that luminance is the value: key 0.18 at the log average, white as given."""
    values = torch.tensor([0.5, 1.0, 2.0, 8.0], dtype=torch.float64)
    image = values.expand(3, 1, 4)
    scaled = 0.18 * values / values.log().mean().exp()
    expected = (scaled * (1 + scaled / 9) / (1 + scaled)).clamp(max=1)
    torch.testing.assert_close(reinhard(image, white=3.0)[0, 0], expected)


def test_drago_formula() -> None:
    values = torch.tensor([0.5, 1.0, 2.0, 8.0], dtype=torch.float64)
    scaled = values / values.log().mean().exp()
    peak = scaled[-1]
    base = 2 + 8 * (scaled / peak) ** (math.log(0.85) / math.log(0.5))
    expected = torch.log1p(scaled) / base.log() / torch.log10(1 + peak)
    torch.testing.assert_close(drago(values.expand(3, 1, 4))[0, 0], expected)


def test_expose_puts_the_log_average_at_middle_grey() -> None:
    image = torch.tensor([1.0, 4.0], dtype=torch.float64).expand(3, 1, 2)
    expected = torch.tensor([0.18, 0.72], dtype=torch.float64)
    torch.testing.assert_close(expose(image, stops=1.0)[0, 0], expected)
    torch.testing.assert_close(expose(image, stops=1.0, gamma=2.2)[0, 0], expected ** (1 / 2.2))


@pytest.mark.parametrize("mapper", MAPPERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mapped_images_are_display_light(mapper: Callable[..., Tensor], dtype: torch.dtype) -> None:
    image = _scene().to(dtype)
    mapped = mapper(image)
    assert mapped.shape == image.shape and mapped.dtype == dtype
    assert mapped.min() >= 0 and mapped.max() <= 1
    # Absolute scale is arbitrary in a merged radiance.
    torch.testing.assert_close(mapper(image * 1000), mapped, rtol=1e-4, atol=1e-5)
    # Brighter stays brighter: luminance is mapped by one rising curve.
    order = luminance(image).flatten().argsort()
    grey = luminance(image).expand(3, -1, -1)
    assert (mapper(grey)[0].flatten()[order].diff() >= -1e-6).all()


@pytest.mark.parametrize("mapper", MAPPERS)
def test_batch_equals_loop(mapper: Callable[..., Tensor]) -> None:
    batch = torch.stack((_scene(), _scene().flip(-1) * 3 + 1))
    torch.testing.assert_close(mapper(batch), torch.stack([mapper(image) for image in batch]))
    assert mapper(batch[:0]).shape == (0, 3, 40, 60)


@pytest.mark.parametrize("mapper", MAPPERS)
def test_nan_and_infinity_stay_where_they_are(mapper: Callable[..., Tensor]) -> None:
    image = _scene()
    spoilt = image.clone()
    spoilt[:, 3, 4] = torch.nan
    spoilt[:, 5, 6] = torch.inf
    spoilt[:, 7, 8] = -torch.inf
    mapped = mapper(spoilt)
    assert mapped.isfinite().all()
    assert (mapped[:, 3, 4] == 0).all() and (mapped[:, 7, 8] == 0).all()
    assert (mapped[:, 5, 6] >= mapped.flatten(1).amax(1) - 1e-9).all()
    # The rest looks as it did: the statistics hardly notice.
    kept = torch.ones(40, 60, dtype=torch.bool)
    kept[3, 4] = kept[5, 6] = kept[7, 8] = False
    assert (mapped - mapper(image))[:, kept].abs().max() < 0.02


@pytest.mark.parametrize("mapper", MAPPERS)
@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf, 1.0, -1.0, 1e-38, 1e38])
def test_degenerate_images_do_not_break(mapper: Callable[..., Tensor], value: float) -> None:
    mapped = mapper(torch.full((3, 4, 5), value))
    assert mapped.isfinite().all() and mapped.min() >= 0 and mapped.max() <= 1


@pytest.mark.parametrize("mapper", MAPPERS)
def test_mappers_are_differentiable(mapper: Callable[..., Tensor]) -> None:
    image = _scene(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: mapper(x), (image,))


@pytest.mark.parametrize("mapper", MAPPERS)
def test_wrong_images_are_refused(mapper: Callable[..., Tensor]) -> None:
    with pytest.raises(
        ValueError, match=rf"{mapper.__name__}: radiance must be \[\.\.\., 3, H, W\], got shape \[4, 5\]"
    ):
        mapper(torch.zeros(4, 5))
    with pytest.raises(TypeError, match="floating point"):
        mapper(torch.zeros(3, 4, 5, dtype=torch.uint8))


def test_drago_agrees_with_opencv(data: Path) -> None:
    """OpenCV's Drago maps luminance to the same curve up to its final stretch: nearly perfect correlation."""
    cv2 = pytest.importorskip("cv2")
    bgr = cv2.imread(str(data / "hdri" / "venice.hdr"), cv2.IMREAD_UNCHANGED)[::4, ::4]
    peer = cv2.createTonemapDrago(gamma=1.0, saturation=1.0, bias=0.85).process(np.ascontiguousarray(bgr))
    image = torch.from_numpy(bgr[..., ::-1].copy()).permute(2, 0, 1)
    ours = luminance(drago(image))[0].flatten()
    theirs = luminance(torch.from_numpy(peer[..., ::-1].copy()).permute(2, 0, 1))[0].flatten()
    shown = ours < 0.99
    assert float(torch.corrcoef(torch.stack((ours[shown], theirs[shown])))[0, 1]) > 0.99


def test_real_images_use_the_display_range(data: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    for name in ("venice", "night", "workshop"):
        bgr = cv2.imread(str(data / "hdri" / f"{name}.hdr"), cv2.IMREAD_UNCHANGED)
        image = torch.from_numpy(bgr[..., ::-1].copy()).permute(2, 0, 1)
        for mapper in MAPPERS:
            shown = srgb_encode(luminance(mapper(image)))
            assert 0.2 < float(shown.mean()) < 0.7, (name, mapper.__name__)
            assert float(shown.std()) > 0.1, (name, mapper.__name__)
