"""STHDR: the table it must meet, its frames and radiance, its loss, its gradients, and where it must run."""

import doctest
import hashlib
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hdrops import _backends, models
from hdrops.models.sthdr import STHDR, VARIANTS, GuidedDeformConv2d, SpatialCorrectModule, STHDRConfig, STHDROutput
from hdrops.testing import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"channels": 8, "stem_channels": 4}


def small(variant: str = "scm_ms", **config: object) -> STHDR:
    return models.create("sthdr", variant=variant, **SMALL, **config)


def away_from_zero(model: torch.nn.Module) -> torch.nn.Module:
    """The model with what starts at zero, offsets and contexts, drawn at random instead."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "conv_offset" in name or "channel_add_conv.3" in name:
                parameter.normal_(0, 0.3)
    return model


def random_frames(height: int = 32, width: int = 32, n: int = 1) -> list[Tensor]:
    return [torch.rand(n, 6, height, width) for _ in range(3)]


COUNTS = {"hss": 679_347, "ss": 1_419_030, "ms": 1_455_958, "scm_ss": 1_551_118, "scm_ms": 1_561_230}


def test_parameters_and_operations_of_table_4() -> None:
    assert [row.config["variant"] for row in STHDR.paper_rows] == list(VARIANTS)
    for row in STHDR.paper_rows:
        report = models.create("sthdr", **row.config).complexity(*row.size)
        variant = row.config["variant"]
        assert report.parameters == report.trained == COUNTS[variant]
        assert report.parameters / 1e6 == pytest.approx(row.parameters, rel=0.003)
        giga = report.operations["thop"] / 1e9
        assert giga == pytest.approx(row.giga, rel=0.02 if variant == "scm_ms" else 0.003), variant
        # The paper's rule takes a transposed convolution four times.
        assert report.operations["fixed"] < report.operations["thop"]


def test_the_names_of_the_state_dict_are_stable() -> None:
    def digest(variant: str) -> str:
        state = models.create("sthdr", variant=variant).state_dict()
        text = "\n".join(f"{name} {tuple(value.shape)}" for name, value in sorted(state.items()))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    assert {variant: digest(variant) for variant in VARIANTS} == {
        "hss": "84b90c16753d83e2",
        "ss": "d1deea70ee37479b",
        "ms": "97a88fe078d9fd9f",
        "scm_ss": "23324c73aaf3aa9f",
        "scm_ms": "1487fe1d54c4e268",
    }


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [(48, 64), (37, 50), (3, 17)])
def test_sizes_are_halved_rounding_up_and_images_lie_in_0_1(variant: str, size: tuple[int, int]) -> None:
    model = small(variant)
    with torch.no_grad():
        output = model(*random_frames(*size, n=2))
    scales = 3 if variant in ("ms", "scm_ms") else 1
    expected = [(2, 3, math.ceil(size[0] / 2**k), math.ceil(size[1] / 2**k)) for k in range(scales)]
    assert [tuple(image.shape) for image in output.images] == expected
    assert [tuple(image.shape) for image in output.first] == ([] if variant == "hss" else expected)
    assert all(image.min() >= 0 and image.max() <= 1 for image in output.images)
    target = torch.rand(2, 3, *size)
    assert model.loss(output, target).isfinite()


def test_the_datasets_size_is_kept() -> None:
    model = models.create("sthdr")
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        images = model(*random_frames(1000, 1500)).images
    assert [tuple(image.shape[2:]) for image in images] == [(1000, 1500), (500, 750), (250, 375)]


def test_it_runs_on_the_meta_device_which_has_no_autocast() -> None:
    with torch.device("meta"):
        assert small("ss")(*random_frames()).images[0].is_meta


def test_padding_mirrors_the_frames() -> None:
    model, frames = away_from_zero(small()), random_frames(37, 50)
    padded = [F.pad(frame, (0, 14, 0, 11), mode="reflect") for frame in frames]
    with torch.no_grad():
        torch.testing.assert_close(model(*frames).images[0], model(*padded).images[0][..., :37, :50])


@pytest.mark.parametrize("variant", ["ms", "scm_ms"])
def test_a_finer_scale_is_guided_by_the_coarser(variant: str) -> None:
    model, frames = small(variant), random_frames()
    before = model(*frames).images
    with torch.no_grad():
        model.handover[0].weight[:, 8:] *= 2  # what reads the guide, beside the 8 channels of the feature
    after = model(*frames).images
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[2], after[2])


def test_scales_share_their_weights_but_for_the_hand_over_of_features() -> None:
    counts = {variant: len(small(variant).handover) for variant in VARIANTS}
    assert counts == {"hss": 0, "ss": 0, "ms": 2, "scm_ss": 0, "scm_ms": 1}
    model = small("ms", scales=2)
    assert len(model.handover) == 1 and len(model(*random_frames()).images) == 2


def test_the_loss_is_zero_for_a_perfect_prediction_and_sums_over_scales() -> None:
    model = small("ms", scale_weights=(1.0, 0.5, 0.25), first_stage_weight=2.0)
    target = torch.rand(2, 3, 22, 32)
    pyramid = [target, F.avg_pool2d(target, 2, ceil_mode=True)]
    pyramid.append(F.avg_pool2d(pyramid[1], 2, ceil_mode=True))
    perfect = STHDROutput(tuple(pyramid), tuple(pyramid))
    assert model.loss(perfect, target) == 0

    def error(image: Tensor, truth: Tensor) -> float:
        tone = [torch.log(1 + 5000 * x) / math.log(5001) for x in (image, truth)]
        return float((tone[0] - tone[1]).abs().mean())

    black = [torch.zeros_like(image) for image in pyramid]
    expected = sum(
        weight * error(image, truth) for weight, image, truth in zip((1, 0.5, 0.25), black, pyramid, strict=True)
    )
    assert float(model.loss(STHDROutput(tuple(black), perfect.first), target)) == pytest.approx(expected, rel=1e-5)
    assert float(model.loss(STHDROutput(perfect.images, tuple(black)), target)) == pytest.approx(2 * expected, rel=1e-5)
    with pytest.raises(ValueError, match="must have one shape"):
        model.loss(perfect, target[:1])


def test_scm_starts_finite_and_sends_gradients_to_both_inputs() -> None:
    scm = SpatialCorrectModule(STHDRConfig())
    for zero in (*scm.deform.conv_offset.parameters(), *scm.context.channel_add_conv[3].parameters()):
        assert not zero.any()
    frame = torch.randn(1, 32, 12, 13, requires_grad=True)
    reference = frame.detach().clone().requires_grad_()
    output = scm(frame, reference)
    assert output.shape == frame.shape and output.isfinite().all()
    (output - reference).square().sum().backward()
    for leaf in (frame, reference):
        assert leaf.grad is not None and leaf.grad.isfinite().all() and (leaf.grad != 0).float().mean() > 0.9


def test_the_guided_deformable_convolution_starts_as_half_a_plain_one_and_follows_its_guide() -> None:
    layer = GuidedDeformConv2d(4, offset_groups=2)
    input, guide = torch.randn(1, 4, 7, 8), torch.randn(1, 4, 7, 8)
    plain = F.conv2d(input, layer.weight, padding=1) / 2
    torch.testing.assert_close(layer(input, guide), plain)
    torch.nn.init.normal_(layer.conv_offset.weight[:, 4:])
    assert not torch.allclose(layer(input, guide), layer(input, guide.flip(3)))


# Behind what starts at zero, the last layer of a context, nothing has a gradient yet; the logits' bias never has one,
# for a softmax does not change when all its inputs do.
BEHIND_ZERO = {
    f"align.scms.{index}.context.{name}"
    for index in (0, 1)
    for name in (
        "conv_mask.weight",
        "channel_add_conv.0.weight",
        "channel_add_conv.0.bias",
        "channel_add_conv.1.weight",
        "channel_add_conv.1.bias",
    )
}
NEVER = {f"align.scms.{index}.context.conv_mask.bias" for index in (0, 1)}


@pytest.mark.device
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_tiny_batch_is_learnt_and_every_parameter_takes_part(bracket, variant: str) -> None:
    images, log_exposures, radiance = bracket(2.2)
    model = small(variant)
    frames, target = model.prepare(images, log_exposures), model.encode_target(radiance, log_exposures)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    for step in range(10):
        optimizer.zero_grad()
        loss = model.loss(model(*frames), target)
        loss.backward()
        still = {name for name, parameter in model.named_parameters() if not parameter.grad.any()}
        if step < 2:
            assert still == ((NEVER if step else NEVER | BEHIND_ZERO) if "scm" in variant else set())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0], losses
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.device
def test_the_reference_gives_what_the_kernels_give(bracket, monkeypatch) -> None:
    images, log_exposures, radiance = bracket(2.2, n=2)
    results = {}
    for backend in (None, "reference"):
        monkeypatch.setattr(_backends, "_REQUESTED", backend)
        torch.manual_seed(1)
        model = away_from_zero(small())
        frames, target = model.prepare(images, log_exposures), model.encode_target(radiance, log_exposures)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        output = model(*frames)
        model.loss(output, target).backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        optimizer.step()
        after = model.loss(model(*frames), target)
        results[backend] = output.images, gradients, float(after.detach())
    (images, gradients, loss), (expected, expected_gradients, expected_loss) = results[None], results["reference"]
    for image, truth in zip(images, expected, strict=True):
        torch.testing.assert_close(image, truth, rtol=2e-5, atol=2e-6)
    for name, truth in expected_gradients.items():
        if name in NEVER:
            assert truth.abs().max() < 1e-6 and gradients[name].abs().max() < 1e-6
        else:
            assert relative_error(gradients[name], truth) < 1e-4, name
    assert loss == pytest.approx(expected_loss, rel=1e-4)


@pytest.mark.parametrize("variant", ["scm_ms", "ms"])
def test_channels_last_gives_the_same_values(variant: str) -> None:
    model, frames = away_from_zero(small(variant)), random_frames(n=2)
    expected = model(*frames)
    model = model.to(memory_format=torch.channels_last)
    output = model(*(frame.to(memory_format=torch.channels_last) for frame in frames))
    for image, truth in zip(output.images, expected.images, strict=True):
        torch.testing.assert_close(image, truth, rtol=1e-4, atol=1e-5)


def test_autocast_keeps_the_image_in_float32() -> None:
    model, frames = away_from_zero(small()), random_frames()
    expected = model(*frames)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(*frames)
        loss = model.loss(output, torch.rand(1, 3, 32, 32))
    loss.backward()
    for image, truth in zip(output.images, expected.images, strict=True):
        assert image.dtype == torch.float32
        torch.testing.assert_close(image, truth, rtol=0, atol=0.03)
    # More values than bfloat16 has between a quarter and three quarters.
    assert len(output.images[0].unique()) > 384
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_model_in_bfloat16_runs() -> None:
    model = small().to(torch.bfloat16)
    output = model(*(frame.bfloat16() for frame in random_frames()))
    assert output.images[0].dtype == torch.bfloat16 and output.images[0].isfinite().all()


@pytest.mark.parametrize("variant", ["ms", "scm_ms"])
def test_it_compiles_to_one_graph(variant: str) -> None:
    # Fewer levels are the same code: the loops over them are unrolled.
    model, frames = away_from_zero(small(variant, scales=2, depth=2)), random_frames(10, 21)
    expected = model(*frames)
    torch._dynamo.reset()
    output = torch.compile(model, backend="eager", fullgraph=True)(*frames)
    for image, truth in zip(output.images, expected.images, strict=True):
        torch.testing.assert_close(image, truth)


def test_scm_compiles_with_its_gradients() -> None:
    scm = away_from_zero(SpatialCorrectModule(STHDRConfig(**SMALL)))
    frame, reference = torch.randn(2, 1, 8, 10, 11, requires_grad=True)
    expected = torch.autograd.grad(scm(frame, reference).square().sum(), (frame, reference))
    torch._dynamo.reset()
    compiled = torch.compile(scm, backend="aot_eager", fullgraph=True)
    gradients = torch.autograd.grad(compiled(frame, reference).square().sum(), (frame, reference))
    for gradient, truth in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, truth, rtol=1e-4, atol=1e-4)


def test_frames_hold_the_code_and_radiance_relative_to_the_shortest_exposure(bracket) -> None:
    images, log_exposures, radiance = bracket(2.2, n=2)
    frames = STHDR.prepare(images, log_exposures)
    target = STHDR.encode_target(radiance, log_exposures)
    for index, frame in enumerate(frames):
        code, linear = frame.split(3, 1)
        assert torch.equal(code, images[:, index])
        seen = code < 1
        assert seen.float().mean() > 0.2
        torch.testing.assert_close(linear[seen], target[seen], rtol=1e-5, atol=1e-6)
    assert max(float(frame.max()) for frame in frames) <= 1
    back = STHDR.decode(STHDROutput((target,), ()), log_exposures)
    torch.testing.assert_close(back, radiance.clamp(max=4))
    # Exposures of each image its own.
    both = STHDR.prepare(images, torch.stack((log_exposures, 1.5 * log_exposures)))
    torch.testing.assert_close(both[2][:1], frames[2][:1])
    torch.testing.assert_close(both[2][1:, 3:], frames[2][1:, 3:] / 4)


def test_predict_sorts_frames_and_depends_on_ratios_of_exposures_alone(bracket) -> None:
    images, log_exposures, _ = bracket(2.2, 30, 41)
    model = small("scm_ss").eval()
    with torch.no_grad():
        radiance = model.predict(images, log_exposures)
        assert radiance.shape == (1, 3, 30, 41) and radiance.min() >= 0 and radiance.max() <= 4
        shuffled = model.predict(images[:, [2, 0, 1]], log_exposures[[2, 0, 1]].tolist())
        torch.testing.assert_close(shuffled, radiance)
        torch.testing.assert_close(model.predict(images, log_exposures + 5), radiance, rtol=1e-4, atol=1e-5)


def test_bad_input_is_told_what_was_expected() -> None:
    model, frames = small("hss"), random_frames()
    with pytest.raises(ValueError, match=r"sthdr: takes 3 frames, got 2"):
        model.predict(torch.rand(1, 2, 3, 32, 32), [0.0, 1.0])
    with pytest.raises(ValueError, match=r"sthdr: needs the logarithms of 3 exposures, got none"):
        model.predict(torch.rand(1, 3, 3, 32, 32))
    with pytest.raises(ValueError, match=r"sthdr: exposures must differ"):
        model.predict(torch.rand(1, 3, 3, 32, 32), [0.0, 1.0, 1.0])
    with pytest.raises(TypeError, match=r"sthdr: images must be floating point codes in \[0, 1\], got torch.uint8"):
        model.predict(torch.zeros(1, 3, 3, 32, 32, dtype=torch.uint8), [0.0, 1.0, 2.0])
    with pytest.raises(ValueError, match=r"sthdr: exposures must ascend"):
        model.prepare(torch.rand(1, 3, 3, 32, 32), torch.tensor([0.0, 2.0, 1.0]))
    with pytest.raises(ValueError, match=r"sthdr: log_exposures must be \[3\] or \[1, 3\], got shape \[2\]"):
        model.prepare(torch.rand(1, 3, 3, 32, 32), torch.tensor([0.0, 2.0]))
    with pytest.raises(ValueError, match=r"sthdr: each frame must be \[N, 6, H, W\], got shapes \[1, 3, 32, 32\]"):
        model(frames[0][:, :3], *frames[1:])
    with pytest.raises(ValueError, match=r"sthdr: the frames must have one shape, got \[1, 6, 32, 30\], "):
        model(frames[0][..., :30], *frames[1:])
    with pytest.raises(TypeError, match=r"sthdr: the frames must be floating point, got torch.uint8"):
        model(frames[0].byte(), *frames[1:])
    with pytest.raises(TypeError, match="long"):
        model(*frames[:2])
    with pytest.raises(ValueError, match=r"sthdr: height or width must be above 16, .* got 9x16"):
        small()(*random_frames(9, 16))
    for options, words in (
        ({"variant": "sc"}, "variant must be one of hss, ss, ms, scm_ss, scm_ms, got 'sc'"),
        ({"scales": 0}, "scales must be at least 1, got 0"),
        ({"channels": 5}, "channels must be even"),
        ({"scales": 4}, "scale_weights must be at least 4, got 3"),
        ({"depht": 4}, "unknown option depht"),
    ):
        with pytest.raises(ValueError, match=words):
            models.create("sthdr", **options)


def test_the_docstrings_examples_run() -> None:
    results = doctest.testmod(sys.modules[STHDR.__module__])
    assert results.attempted > 0 and results.failed == 0
