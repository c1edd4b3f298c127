"""What the systems share: the registry, checks of what they are given, VGG, losses, counting of operations."""

import copy
import doctest
import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hdrops
from hdrops import _backends, models
from hdrops.models import _system, complexity, losses
from hdrops.models.backbones import VGG, imagenet_normalize, layer_names
from hdrops.models.diffhdr import DiffHDR
from hdrops.models.diffhdr_losses import histogram_loss
from hdrops.models.duhdr import DuHDR
from hdrops.models.operations import measure


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown model 'resnet'; known: sthdr, eapnet, duhdr, apnt, diffhdr"):
        models.create("resnet")


def test_an_options_value_is_of_its_defaults_type() -> None:
    with pytest.raises(TypeError, match="sthdr: scales must be of type int, got 'two'"):
        models.create("sthdr", scales="two")
    config = models.create("sthdr", variant="hss", slope=0, scale_weights=[2.0], channels=4).config
    assert config.slope == 0 and config.scale_weights == [2.0]
    for name, option, words in (
        ("sthdr", {"scales": True}, "sthdr: scales must be of type int, got True"),
        ("sthdr", {"scale_weights": ("a",)}, r"scale_weights must be of type tuple of float, got \('a',\)"),
        ("apnt", {"radii": (8, 2, 1.5)}, "radii must be of type tuple of int"),
        ("apnt", {"vgg_weights": 5}, "apnt: vgg_weights must be the name of a file or None, got 5"),
        ("duhdr", {"invemor": 3}, "duhdr: invemor must be the name of a file or None, got 3"),
    ):
        with pytest.raises(TypeError, match=words):
            models.create(name, **option)


def test_an_options_value_lies_in_its_range() -> None:
    for name, option, words in (
        ("sthdr", {"mu": -1.0}, "sthdr: mu must be above 0, got -1.0"),
        ("sthdr", {"slope": math.nan}, "slope must be finite, got nan"),
        ("sthdr", {"scale_weights": (1.0, -1.0, 1.0)}, "scale_weights must be at least 0"),
        ("sthdr", {"offset_groups": 3}, "channels must be a multiple of offset_groups = 3, got 32"),
        ("eapnet", {"dense_layers": -1}, "eapnet: dense_layers must be at least 0, got -1"),
        ("eapnet", {"mu": 0.0}, "eapnet: mu must be above 0, got 0.0"),
        ("eapnet", {"variant": ["standard"]}, r"variant must be one of standard, lightweight, got \['standard'\]"),
        ("duhdr", {"components": 0}, "duhdr: components must be at least 1, got 0"),
        ("duhdr", {"prec": math.inf}, "duhdr: prec must be finite, got inf"),
        ("apnt", {"radii": (8, 2, -1)}, "apnt: radii must be at least 0"),
        ("apnt", {"channels": 18}, "channels must be even and a multiple of reduction = 16, got 18"),
        ("apnt", {"patch_size": 2}, "patch_size must be one of 1, 3, 5, 7, got 2"),
        ("apnt", {"normalize": "all"}, "normalize must be one of key, query, both, none, got 'all'"),
        ("diffhdr", {"tone_channels": 0}, "diffhdr: tone_channels must be at least 1, got 0"),
        ("diffhdr", {"smoothness": 0.0}, "diffhdr: smoothness must be above 0, got 0.0"),
    ):
        with pytest.raises(ValueError, match=words):
            models.create(name, **option)
    with pytest.raises(ValueError, match=r"unknown model \['sthdr'\]"):
        models.create(["sthdr"])


# Small, and of each system; DuHDR is as large as it is.
SMALL: dict[str, dict[str, object]] = {
    "sthdr": {"channels": 4, "stem_channels": 4},
    "eapnet": {"channels": 4, "restoration_channels": 8, "growth": 4, "blocks": 1},
    "duhdr": {"secondary": False},
    "apnt": {"channels": 16, "blocks": 0},
    "diffhdr": {"tone_channels": 2, "edge_channels": 2, "refine_channels": 2},
}


@pytest.mark.parametrize("name", models.names())
def test_predict_takes_every_float_type_and_clamps_codes(name: str, threads) -> None:
    threads(1)
    model = models.create(name, **SMALL[name]).eval()
    images = (255 * torch.rand(1, model.frames, 3, 19, 21)).round() / 255
    # The first frame has nothing but white and black to be clamped, the others as they are.
    images[:, 0] = images[:, 0].round()
    beyond = images.clone()
    beyond[:, 0] = 3 * beyond[:, 0] - 1
    logs = None if model.frames == 1 else [1.0, -1.0, 0.0]
    with torch.no_grad():
        expected = model.predict(images, logs)
        assert expected.shape == (1, 3, 19, 21) and expected.isfinite().all()
        torch.testing.assert_close(model.predict(beyond, logs), expected)
        wide = model.predict(images.double(), logs)
        # DiffHDR has thresholds, of edges and of codes, so that the last digit of its input may matter.
        close = {"rtol": 1e-3, "atol": 1e-4} if name != "diffhdr" else {"rtol": 0.1, "atol": 0.1}
        torch.testing.assert_close(wide.float(), expected, **close)
        assert model.predict(images.half(), logs).isfinite().all()
        assert model.predict(images[:0], logs).shape == (0, 3, 19, 21)
    with pytest.raises(ValueError, match=rf"{name}: images must have pixels, H and W at least 1, got shape"):
        model.predict(images[..., :0], logs)


def test_another_default_device_changes_nothing(threads, monkeypatch) -> None:
    """What the code makes stands where its arguments are, not on the default device: here one without values."""
    threads(1)
    found = []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        built = [models.create(name, **SMALL[name]).eval() for name in SMALL if name != "duhdr"]
        for model in built:
            images = torch.rand(1, model.frames, 3, 20, 24)
            with torch.no_grad(), torch.device(device):
                found.append(model.predict(images, [0.0, 1.0, 2.0]))
    for ours, expected in zip(found[4:], found[:4], strict=True):
        torch.testing.assert_close(ours, expected)
    drawn = []
    start = nn.init.kaiming_normal_
    monkeypatch.setattr(
        nn.init, "kaiming_normal_", lambda x, **kwargs: drawn.append(x.device.type) or start(x, **kwargs)
    )
    with torch.device("meta"):
        assert VGG(19, ["relu1_1"]).features[0].weight.is_meta
    assert drawn == ["cpu"]


def _step_loss(model: models.System, photographs: Tensor, radiance: Tensor) -> Tensor:
    """A loss of the system that runs through its operators, forward and backward."""
    if isinstance(model, DuHDR):
        return F.mse_loss(model.photograph(radiance), photographs[:, 0])
    if isinstance(model, DiffHDR):
        stack = model(photographs[:, 0] * 2 - 1, (photographs[:, 0, :1] > 0.9).to(photographs))
        return histogram_loss(stack.tones.flatten(0, 1), -stack.tones.detach().flatten(0, 1)) + losses.mu_law_l1(
            model.radiance(stack.images), radiance
        )
    logs = torch.tensor([-1.4, 0.0, 1.4])
    return model.loss(model(*model.prepare(photographs, logs)), model.encode_target(radiance, logs))


@pytest.mark.device
@pytest.mark.parametrize("name", models.names())
def test_a17_a_step_is_that_of_the_reference_on_the_cpu(name: str, threads, monkeypatch) -> None:
    threads(1)
    kernels = models.create(name, **{**SMALL[name], **({"secondary": True} if name == "duhdr" else {})})
    reference = copy.deepcopy(kernels).cpu()
    photographs, radiance = torch.rand(2, kernels.frames, 3, 32, 32), 2 * torch.rand(2, 3, 32, 32)
    found: list[list[float]] = [[], []]
    for model, values, backend in ((kernels, found[0], None), (reference, found[1], "reference")):
        monkeypatch.setattr(_backends, "_REQUESTED", backend)
        device = next(model.parameters()).device
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        with torch.device(device), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for _ in range(2):
                optimizer.zero_grad()
                loss = _step_loss(model, photographs.to(device), radiance.to(device))
                loss.backward()
                optimizer.step()
                values.append(loss.item())
    assert found[0] == pytest.approx(found[1], rel=1e-4) and found[0][0] != found[0][1]


def test_predict_waits_for_no_device() -> None:
    """Of tensors without values only the shape can be told: nothing looks at them."""
    with torch.device("meta"):
        model, images = models.create("eapnet", **SMALL["eapnet"]).eval(), torch.rand(1, 3, 3, 20, 24)
    assert model.predict(images, [0.0, 1.0, 2.0]).shape == (1, 3, 20, 24)


def test_exposures_relative_to_a_frame_and_frames_of_one_shape() -> None:
    images = torch.rand(2, 3, 4, 5, 6)
    logs = torch.tensor([[0.0, 1.0, 3.0], [-2.0, 0.0, 1.0]], dtype=torch.float64)
    ratios = _system.exposure_ratios("m", logs, images, 1)
    assert ratios.dtype == torch.float32 and ratios.shape == (2, 3, 1, 1, 1)
    expected = torch.tensor([[-1.0, 0.0, 2.0], [-2.0, 0.0, 1.0]]).exp()
    torch.testing.assert_close(ratios.flatten(1), expected)
    torch.testing.assert_close(_system.exposure_ratios("m", logs[0], images, 1).flatten(), expected[0])
    for wrong, words in (
        (logs.T, r"must be \[3\] or \[2, 3\], got shape \[3, 2\]"),
        (logs.flip(1), "must ascend"),
        (logs * math.nan, "must ascend"),
        (50 * logs, "within a factor that torch.float32 can hold, 3.4e\\+38, got logarithms"),
    ):
        with pytest.raises(ValueError, match=words):
            _system.exposure_ratios("m", wrong, images, 0)
    _system.check_frames("m", images.unbind(1), 4)
    with pytest.raises(ValueError, match=r"m: each frame must be \[N, 5, H, W\], got shapes \[2, 4, 5, 6\]"):
        _system.check_frames("m", images.unbind(1), 5)


def test_images_and_exposures_are_checked() -> None:
    images = torch.rand(1, 3, 3, 8, 8)
    _system.check_images("m", images, 3)
    with pytest.raises(ValueError, match=r"m: takes 3 frames, got 2 \(images shape \[1, 2, 3, 8, 8\]\)"):
        _system.check_images("m", images[:, :2], 3)
    with pytest.raises(ValueError, match=r"m: images must be \[N, 3, 3, H, W\], got shape \[3, 3, 8, 8\]"):
        _system.check_images("m", images[0], 3)
    with pytest.raises(TypeError, match=r"m: images must be floating point codes in \[0, 1\], got torch.uint8"):
        _system.check_images("m", images.byte(), 3)
    for exposures, words in (
        (None, "got none"),
        ([0.0, 1.0], "needs 3 exposures, got 2"),
        ([0.0, 1.0, 1.0], "must differ"),
        ([0.0, 1.0, math.nan], "must be finite"),
    ):
        with pytest.raises(ValueError, match=words):
            _system.check_exposures("m", exposures, 3)
    with pytest.raises(TypeError, match=r"m: exposures must be 3 numbers, got \['1/4', '1', '4'\]"):
        _system.check_exposures("m", ["1/4", "1", "4"], 3)
    assert _system.check_exposures("m", (2, 0, 1), 3).tolist() == [2, 0, 1]
    with pytest.raises(ValueError, match="m: the frames must have pixels"):
        _system.check_frames("m", [torch.rand(1, 3, 0, 4)] * 3, 3)


@pytest.mark.parametrize("size", [(5, 9), (8, 8), (1, 3)])
def test_padding_is_undone(size: tuple[int, int]) -> None:
    image = torch.rand(1, 2, *size)
    padded, back = _system.pad_to_multiple(image, 8)
    assert all(length % 8 == 0 for length in padded.shape[2:])
    assert torch.equal(_system.crop_to(padded, back), image)


def test_vgg_has_the_papers_layers_and_torchvisions_names(tmp_path) -> None:
    assert layer_names(19)[-5:] == ["conv5_3", "relu5_3", "conv5_4", "relu5_4", "pool5"]
    vgg = VGG(19, ["relu1_1", "relu2_1", "relu3_1"], seed=3)
    assert sum(parameter.numel() for parameter in vgg.parameters()) == 555_328
    assert not any(parameter.requires_grad for parameter in vgg.parameters())
    image = imagenet_normalize(torch.rand(1, 3, 16, 20))
    assert [feature.shape[1:] for feature in vgg(image)] == [(64, 16, 20), (128, 8, 10), (256, 4, 5)]
    torch.save({**vgg.state_dict(), "classifier.0.weight": torch.zeros(1)}, tmp_path / "vgg.pth")
    loaded = VGG(19, ["relu3_1"], weights=tmp_path / "vgg.pth", seed=4)
    assert torch.equal(loaded(image)[0], vgg(image)[2])
    with pytest.raises(
        ValueError, match=r"VGG16: .*vgg.pth does not fit the model: it lacks 4 of 14 weights, features.12.weight first"
    ):
        VGG(16, ["pool3"], weights=tmp_path / "vgg.pth")
    with pytest.raises(ValueError, match="in the network's order"):
        VGG(16, ["relu2_1", "relu1_1"])
    with pytest.raises(OSError, match=r"none\.pth"):
        VGG(16, ["pool3"], weights=tmp_path / "none.pth")


def test_files_of_weights_run_no_code(tmp_path) -> None:
    class Evil:
        def __reduce__(self):
            return type(tmp_path).touch, (tmp_path / "touched",)

    torch.save({"features.0.weight": Evil()}, tmp_path / "evil.pt")
    torch.save({"features.0.weight": 3}, tmp_path / "number.pt")
    torch.save([1], tmp_path / "list.pt")
    torch.save({"features.0.weight": torch.zeros(64, 3, 1, 1), "features.0.bias": torch.zeros(64)}, tmp_path / "1x1.pt")
    (tmp_path / "text.pt").write_text("text")
    for name, words in (
        ("evil", "must hold a state dict of tensors alone"),
        ("number", "must hold a state dict, names with tensors, got 'features.0.weight' with int"),
        ("list", "got one list"),
        ("1x1", r"1 are of another form: features.0.weight must be \[64, 3, 3, 3\], got \[64, 3, 1, 1\]"),
        ("text", r"text\.pt"),
    ):
        with pytest.raises(ValueError, match=rf"VGG19: .*{name}\.pt.*{words}" if name != "text" else words):
            VGG(19, ["relu1_1"], weights=tmp_path / f"{name}.pt")
    assert not (tmp_path / "touched").exists()


def test_losses_are_zero_for_a_perfect_prediction_and_refuse_other_shapes() -> None:
    image = torch.rand(2, 3, 8, 8)
    assert losses.mu_law_l1(image, image) == 0
    with pytest.raises(ValueError, match="must have one shape"):
        losses.mu_law_l1(image, image[:1])
    expected = (math.log(1 + 5000 * 0.5) - math.log(1 + 5000 * 0.25)) / math.log(5001)
    difference = losses.mu_law_l1(torch.full((1, 3, 2, 2), 0.5), torch.full((1, 3, 2, 2), 0.25))
    assert difference.item() == pytest.approx(expected, rel=1e-5)


def test_the_tone_mapping_of_singlehdr_and_its_mean() -> None:
    assert losses.log_compress(torch.tensor([0.0, 1.0, 10.0])).tolist() == pytest.approx([0, 1, math.log(101, 11)])
    radiance = torch.rand(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    scaled = losses.rescale_to_mean(radiance)
    assert scaled.mean((1, 2, 3)).tolist() == pytest.approx([0.5, 0.5], rel=1e-5)
    # A brighter image is the same one after it: along itself the gradient vanishes.
    (gradient,) = torch.autograd.grad(scaled[:, 0].square().sum(), radiance)
    assert (gradient * radiance).sum((1, 2, 3)).abs().max() < 1e-4


def test_the_white_of_the_challenge_is_a_percentile_of_the_linear_target() -> None:
    target = torch.linspace(0, 1, 300).reshape(1, 3, 10, 10)
    assert losses.ntire_white(target).item() == pytest.approx((296 / 299) ** 2.24, rel=1e-5)
    prediction = torch.zeros(1, 3, 10, 10, requires_grad=True)
    losses.ntire_tonemap(prediction, losses.ntire_white(target)).sum().backward()
    assert prediction.grad is not None and prediction.grad.isfinite().all()


def test_operations_by_each_rule() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.LeakyReLU(), nn.ConvTranspose2d(8, 4, 2, stride=2))
    report = measure(model, lambda: (torch.rand(1, 3, 10, 12),))
    conv, transposed = 3 * 8 * 9 * 120, 8 * 4 * 4 * 120
    assert report.parameters == report.trained == 3 * 8 * 9 + 8 + 8 * 4 * 4 + 4
    assert report.operations["fixed"] == conv + transposed
    assert report.operations["thop"] == conv + 4 * transposed
    assert report.operations["torchinfo"] == (3 * 8 * 9 + 8) * 120 + (8 * 4 * 4 + 4) * 480
    assert report.operations["tensorflow"] == 2 * (conv + transposed) + 8 * 120 + 4 * 480 + 2 * 8 * 120


def test_counting_leaves_the_model_as_it_was() -> None:
    model = models.create("sthdr", **SMALL["sthdr"])
    model.align.eval()
    model.complexity(32, 32)
    assert model.training and model.merge.training and not model.align.training
    assert measure(nn.ReLU(), lambda: (torch.rand(1, 2, 3, 4),)).parameters == 0
    with pytest.raises(ValueError, match="sthdr: has no part 'nose'"):
        model.complexity(32, 32, "nose")


def test_an_unknown_name_of_the_table_is_an_error_of_usage(monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["complexity", "nose"])
    with pytest.raises(SystemExit, match="2"):
        complexity.main()
    assert "unknown model nose; known: sthdr, eapnet, duhdr, apnt, diffhdr" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["apnt", "diffhdr", "diffhdr_layer", "duhdr_training"])
def test_the_docstrings_examples_run(module: str, threads) -> None:
    threads(1)
    results = doctest.testmod(importlib.import_module(f"hdrops.models.{module}"))
    assert results.attempted > 0 and results.failed == 0


def test_operators_count_like_the_dense_layers_they_stand_for() -> None:
    deformable = hdrops.nn.ModulatedDeformConv2d(4, 6, 3, padding=1)
    report = measure(deformable, lambda: (torch.rand(1, 4, 5, 7),))
    assert report.operations["fixed"] == (4 * 6 * 9 + 4 * 27 * 9) * 35
    context = hdrops.nn.GlobalContextBlock(8, ratio=0.5)
    report = measure(context, lambda: (torch.rand(1, 8, 5, 7),))
    assert report.operations["fixed"] == 8 * 35 + 8 * 4 + 4 * 8
