"""EAPNet: the tables it must meet, its encodings, its loss, its gradients, its average of weights."""

import doctest
import hashlib
import math
import sys

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hdrops import io, models
from hdrops.models.eapnet import EMA, VARIANTS, Alignment, EAPNet
from hdrops.models.operations import PaperRow

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"channels": 8, "restoration_channels": 12, "growth": 4}


def small(variant: str = "standard", **config: object) -> EAPNet:
    return models.create("eapnet", variant=variant, **{**SMALL, "blocks": 2, **config})


def random_frames(height: int = 32, width: int = 32, n: int = 1) -> list[Tensor]:
    return [torch.rand(n, 6, height, width) for _ in range(3)]


# What the two networks of the paper take here, exactly.
FOUND = {"lightweight": (383_939, 146.52), "standard": (585_411, 196.71)}


@pytest.mark.parametrize("row", EAPNet.paper_rows, ids=lambda row: row.label)
def test_parameters_and_operations_of_the_tables(row: PaperRow) -> None:
    report = models.create("eapnet", **row.config).complexity(*row.size)
    giga = report.operations[row.rule] / 1e9
    assert row.rule == "torchinfo" and giga == pytest.approx(row.giga, rel=0.01)
    if row.parameters is not None:
        assert report.trained / 1e6 == pytest.approx(row.parameters, rel=0.025)
        assert (report.parameters, round(giga, 2)) == FOUND[row.config["variant"]]


def test_a_block_more_adds_its_own_parameters_and_operations() -> None:
    three, four = (models.create("eapnet", variant="lightweight", blocks=blocks) for blocks in (3, 4))
    reports = [model.complexity(1060, 1900) for model in (three, four)]
    assert reports[1].parameters - reports[0].parameters == 98_752
    block = three.complexity(1060, 1900, "blocks.0")
    assert block.parameters == 98_752
    for rule, count in block.operations.items():
        assert reports[1].operations[rule] - reports[0].operations[rule] == count, rule
    assert block.operations["torchinfo"] / 1e9 == pytest.approx(17.93, abs=0.005)
    # A block's input is of the size that forward pads the image to.
    assert three.complexity(61, 62, "blocks.0") == three.complexity(64, 64, "blocks.0")
    with pytest.raises(ValueError, match="not of 'fuse'"):
        three.complexity(64, 64, "fuse")


def test_shared_weights_are_one_encoder_and_one_guide() -> None:
    apart, shared = (models.create("eapnet", variant="lightweight", shared=shared) for shared in (False, True))
    reports = [model.complexity(64, 64) for model in (apart, shared)]
    assert reports[0].operations["fixed"] == reports[1].operations["fixed"]
    assert reports[0].parameters - reports[1].parameters == 2 * 7_264 + 2 * (4_096 + 5_152)
    assert shared(*random_frames()).shape == (1, 3, 32, 32)


def test_the_names_of_the_state_dict_are_stable() -> None:
    def digest(variant: str) -> str:
        state = models.create("eapnet", variant=variant).state_dict()
        text = "\n".join(f"{name} {tuple(value.shape)}" for name, value in sorted(state.items()))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    assert {variant: digest(variant) for variant in VARIANTS} == {
        "standard": "e065b27ef903bbde",
        "lightweight": "a7b264f599e871b4",
    }


def test_the_challenges_size_keeps_its_shape_with_an_odd_quarter() -> None:
    model = models.create("eapnet")
    assert model.config.align == "half"
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        assert model(*random_frames(1060, 1900)).shape == (1, 3, 1060, 1900)


@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("size", [(20, 12), (9, 14), (1, 1)])
def test_any_size_is_kept_and_images_are_not_negative(variant: str, size: tuple[int, int]) -> None:
    image = small(variant)(*random_frames(*size, n=2))
    assert image.shape == (2, 3, *size) and image.min() >= 0


def test_alignment_at_half_resolution_is_that_of_the_averaged_features() -> None:
    half, full = Alignment(4, halves=True), Alignment(4, halves=False)
    full.load_state_dict(half.state_dict())
    frame, reference = torch.rand(2, 1, 4, 6, 10)
    averaged = [feature.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5)) for feature in (frame, reference)]
    enlarged = torch.nn.functional.interpolate(full(*averaged), scale_factor=2, mode="bilinear")
    torch.testing.assert_close(half(frame, reference), enlarged)
    scale, bias = full.body(torch.cat((frame, reference), 1)).split(4, 1)
    torch.testing.assert_close(full(frame, reference), scale * frame + bias)


@pytest.mark.device
@pytest.mark.parametrize("config", [{}, {"variant": "lightweight"}, {"align": "none", "shared": True}])
def test_a_tiny_batch_is_learnt_and_every_parameter_takes_part(bracket, config: dict) -> None:
    images, log_exposures, radiance = bracket(2.24)
    model = small(**config)
    frames, target = model.prepare(images, log_exposures), model.encode_target(radiance)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    for step in range(15):
        optimizer.zero_grad()
        loss = model.loss(model(*frames), target)
        loss.backward()
        if step < 2:
            assert not [name for name, parameter in model.named_parameters() if not parameter.grad.any()]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0], losses
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_the_loss_is_the_sum_of_tanh_l1_and_the_challenges_tone_mapping() -> None:
    model = small(tanh_weight=0.5, mu_weight=2.0)
    prediction, target = 1.5 * torch.rand(2, 3, 10, 10), 1.5 * torch.rand(2, 3, 10, 10)
    assert model.loss(target, target) == 0
    expected = 0.5 * (prediction.tanh() - target.tanh()).abs().mean()
    for image, truth in zip(prediction, target, strict=True):
        # Of 300 values the 297th: at least 99 % lie at or below it.
        white = truth.pow(2.24).flatten().sort().values[296]
        tone = [(1 + 5000 * torch.tanh(x**2.24 / white)).log() / math.log(5001) for x in (image, truth)]
        expected = expected + 2 * (tone[0] - tone[1]).abs().mean() / 2
    torch.testing.assert_close(model.loss(prediction, target), expected, rtol=1e-4, atol=1e-6)
    plain = small(tanh_weight=0, mu_weight=0, l1_weight=3.0)
    torch.testing.assert_close(plain.loss(prediction, target), 3 * (prediction - target).abs().mean())
    black = torch.zeros_like(target, requires_grad=True)
    model.loss(black, target).backward()
    assert black.grad.isfinite().all()
    with pytest.raises(ValueError, match="must have one shape"):
        model.loss(prediction, target[:1])


def test_frames_hold_the_code_and_the_code_at_the_medium_exposure(bracket) -> None:
    images, log_exposures, radiance = bracket(2.24, n=2)
    frames = EAPNet.prepare(images, log_exposures)
    target = EAPNet.encode_target(radiance)
    for index, frame in enumerate(frames):
        code, aligned = frame.split(3, 1)
        assert torch.equal(code, images[:, index])
        seen = code < 1
        assert seen.float().mean() > 0.2
        torch.testing.assert_close(aligned[seen], target[seen], rtol=1e-5, atol=1e-6)
    assert torch.equal(frames[1][:, 3:], images[:, 1])
    torch.testing.assert_close(EAPNet.decode(target), radiance)


def test_real_frames_agree_at_the_medium_exposure(data) -> None:
    import numpy as np

    folder = data / "ntire21" / "000000"
    frames = [torch.from_numpy(io.read_image(folder / f"{index}.png").astype("float32")) / 255 for index in range(3)]
    images = torch.stack([frame.permute(2, 0, 1) for frame in frames])[None]
    log_exposures = torch.from_numpy(np.load(folder / "exposures.npy")).double() * math.log(2)
    short, medium, long = EAPNet.prepare(images, log_exposures)
    # Neither clipped (the camera's white is code 248) nor lost in the steps of the darkest codes.
    for frame in (short, long):
        used = (frame[:, :3] > 0.15) & (frame[:, :3] < 0.9) & (medium[:, :3] > 0.15) & (medium[:, :3] < 0.9)
        ratio = (frame[:, 3:] / medium[:, 3:])[used]
        assert len(ratio) > 1000
        assert float(ratio.median()) == pytest.approx(1, abs=0.1)


def test_channels_last_gives_the_same_values() -> None:
    model, frames = small(), random_frames(n=2)
    expected = model(*frames)
    model = model.to(memory_format=torch.channels_last)
    output = model(*(frame.to(memory_format=torch.channels_last) for frame in frames))
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_autocast_keeps_the_image_in_float32() -> None:
    model, frames = small(), random_frames()
    expected = model(*frames)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(*frames)
        loss = model.loss(output, torch.rand(1, 3, 32, 32))
    loss.backward()
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, expected, rtol=0, atol=0.03)
    assert len(output.unique()) > 384  # more than bfloat16 has in this range
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_it_compiles_to_one_graph(variant: str) -> None:
    model, frames = small(variant, blocks=1, dense_layers=2), random_frames(14, 23)
    expected = model(*frames)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(*frames), expected)


def test_predict_sorts_frames_and_gives_linear_radiance(bracket) -> None:
    images, log_exposures, _ = bracket(2.24, 18, 21)
    model = small().eval()
    with torch.no_grad():
        radiance = model.predict(images, log_exposures)
        torch.testing.assert_close(radiance, model(*model.prepare(images, log_exposures)) ** 2.24)
        shuffled = model.predict(images[:, [2, 0, 1]], log_exposures[[2, 0, 1]].tolist())
        torch.testing.assert_close(shuffled, radiance)
        torch.testing.assert_close(model.predict(images, log_exposures + 5), radiance, rtol=1e-4, atol=1e-5)


def test_the_average_of_weights_is_halved_towards_the_model_at_its_interval() -> None:
    model = small()
    ema = EMA(model, interval=3)
    weight, averaged = model.head.weight, ema.module.head.weight
    assert averaged is not weight and torch.equal(averaged, weight)
    seen, expected = [], None
    for step in range(1, 10):
        torch.nn.init.constant_(weight, float(step))
        ema.after_step(model, step)
        if step % 3 == 0:
            expected = float(step) if expected is None else 0.5 * expected + 0.5 * step
        seen.append(float(averaged.detach().flatten()[0]))
        assert expected is None or seen[-1] == expected
    assert seen[2::3] == [3.0, 4.5, 6.75]
    again = EMA(model, interval=3)
    again.load_state_dict(ema.state_dict())
    torch.nn.init.constant_(weight, 1.25)
    again.after_step(model, 12)
    assert (again.module.head.weight == 4.0).all()
    for options, words in (
        ({"interval": 0}, "EMA: interval must be an integer of at least 1, got 0"),
        ({"interval": 1.5}, "EMA: interval must be an integer of at least 1, got 1.5"),
        ({"decay": 1.5}, r"EMA: decay must lie in \[0, 1\], got 1.5"),
        ({"decay": math.nan}, r"EMA: decay must lie in \[0, 1\], got nan"),
    ):
        with pytest.raises(ValueError, match=words):
            EMA(model, **options)


def test_bad_input_is_told_what_was_expected() -> None:
    model, frames = small(), random_frames()
    with pytest.raises(ValueError, match=r"eapnet: takes 3 frames, got 4"):
        model.predict(torch.rand(1, 4, 3, 32, 32), [0.0, 1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"eapnet: needs the logarithms of 3 exposures, got none"):
        model.predict(torch.rand(1, 3, 3, 32, 32))
    with pytest.raises(ValueError, match=r"eapnet: exposures must differ"):
        model.predict(torch.rand(1, 3, 3, 32, 32), [0.0, 1.0, 1.0])
    with pytest.raises(TypeError, match=r"eapnet: images must be floating point codes in \[0, 1\], got torch.uint8"):
        model.prepare(torch.zeros(1, 3, 3, 32, 32, dtype=torch.uint8), torch.arange(3.0))
    with pytest.raises(ValueError, match=r"eapnet: exposures must ascend"):
        model.prepare(torch.rand(1, 3, 3, 32, 32), torch.tensor([2.0, 1.0, 0.0]))
    with pytest.raises(ValueError, match=r"eapnet: each frame must be \[N, 6, H, W\], got shapes \[1, 3, 32, 32\]"):
        model(frames[0][:, :3], *frames[1:])
    with pytest.raises(ValueError, match=r"eapnet: the frames must have one shape, got \[1, 6, 32, 30\]"):
        model(frames[0][..., :30], *frames[1:])
    with pytest.raises(TypeError, match=r"eapnet: the frames must be floating point, got torch.float32, torch.uint8"):
        model(frames[0], frames[1].byte(), frames[2])
    for options, words in (
        ({"variant": "light"}, "variant must be one of standard, lightweight, got 'light'"),
        ({"align": "quarter"}, "align must be one of full, half, none, got 'quarter'"),
        ({"upsampling": "nearest"}, "upsampling must be one of bilinear, transposed, got 'nearest'"),
        ({"blocks": -1}, "blocks must be at least 0, got -1"),
        ({"block": 1}, "unknown option block; it has variant, blocks"),
    ):
        with pytest.raises(ValueError, match=words):
            models.create("eapnet", **options)


def test_the_docstrings_examples_run() -> None:
    results = doctest.testmod(sys.modules[EAPNet.__module__])
    assert results.attempted > 0 and results.failed == 0
