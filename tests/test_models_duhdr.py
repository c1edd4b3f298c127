"""DuHDR: its size, TensorFlow's conventions, the networks, inference, and that it learns."""

import copy
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import hdrops
from duhdr_cases import smooth, system
from hdrops import _backends, models
from hdrops.camera import EMoR, invert_curve
from hdrops.models import crf_net, duhdr, duhdr_training
from hdrops.models.duhdr_networks import (
    Dnet,
    ITnet,
    OOnet,
    SameConv2d,
    depth_to_space,
    enlarge,
    overexposed,
    pad_same,
    vgg_input,
)
from hdrops.models.duhdr_response import Preoperation, ResponseNet

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> duhdr.DuHDR:
    return system()


@pytest.fixture(scope="module")
def printed() -> duhdr.DuHDR:
    """The system whose size the paper prints."""
    return duhdr.DuHDR(duhdr.DuHDRConfig(downblock="conv", secondary=False))


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def test_parameters(model: duhdr.DuHDR, printed: duhdr.DuHDR) -> None:
    sizes = {"dnet": 1_999_779, "innet": 1_200_971, "itnet": 24_569_118, "oonet": 3_046_659}
    assert {name: _count(printed.get_submodule(name)) for name in sizes} == sizes
    assert _count(printed) == sum(sizes.values()) == 30_816_527
    assert _count(model.oonet) == 2_553_479 and _count(model.nnet) == _count(model.innet)
    bare = OOnet(multi_scale=False)
    assert _count(bare) == _count(model.oonet) - _count(model.oonet.middle)
    assert bare(*(torch.rand(1, 3, 32, 64) for _ in range(3))).shape == (1, 3, 32, 64)


def test_operations_are_the_papers(printed: duhdr.DuHDR) -> None:
    rows = {row.part: row for row in duhdr.DuHDR.paper_rows}
    assert list(rows) == ["", "dnet", "innet", "itnet", "oonet"]
    for part, row in rows.items():
        found = printed.complexity(*row.size, part).operations[row.rule]
        assert row.giga is not None and found / 1e9 == pytest.approx(row.giga, rel=0.002), part


# --- TensorFlow's conventions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "kernel", "before", "after"), [(8, 5, 1, 2), (8, 7, 2, 3), (9, 5, 2, 2), (8, 1, 0, 0)]
)
def test_same_padding_of_stride_two(size: int, kernel: int, before: int, after: int) -> None:
    image = torch.rand(1, 2, size, size)
    expected = F.pad(image, (before, after, before, after))
    assert torch.equal(pad_same(image, kernel, 2), expected)
    layer = SameConv2d(2, 3, kernel, stride=2)
    assert torch.equal(layer(image), F.conv2d(expected, layer.weight, layer.bias, 2))
    assert layer(image).shape[-1] == math.ceil(size / 2)


def test_enlargement_keeps_the_even_pixels() -> None:
    image = torch.rand(2, 3, 4, 5)
    larger = enlarge(image)
    right = torch.cat((image, image[..., -1:]), -1)
    assert larger.shape == (2, 3, 8, 10)
    torch.testing.assert_close(larger[..., ::2, ::2], image)
    torch.testing.assert_close(larger[..., ::2, 1::2], (right[..., :-1] + right[..., 1:]) / 2)


def test_depth_to_space_takes_the_place_before_the_channel() -> None:
    features = torch.rand(1, 12, 2, 3)
    larger = depth_to_space(features)
    for channel in range(3):
        for dy in range(2):
            for dx in range(2):
                assert torch.equal(larger[0, channel, dy::2, dx::2], features[0, (dy * 2 + dx) * 3 + channel])


def test_the_image_beside_edges_and_histograms() -> None:
    y, x = torch.meshgrid(torch.arange(6.0), torch.arange(7.0), indexing="ij")
    image = torch.stack((0.01 * y, 0.02 * x, 0 * x)).unsqueeze(0)
    found = Preoperation()(image)
    assert found.shape == (1, 102, 6, 7) and torch.equal(found[:, :3], image)
    inner = found[0, 3:9, 1:-1, 1:-1].mean((1, 2))  # for each colour: by y, by x
    torch.testing.assert_close(inner, torch.tensor([0.08, 0, 0, 0.16, 0, 0]))
    assert torch.equal(found[:, 9:], hdrops.tent_histogram(image))
    assert not found[0, 3, 0].any()  # reflected, so flat across the border


def test_caffes_input_is_blue_green_red_without_means() -> None:
    image = torch.tensor([1.0, 0.5, 0.0]).view(1, 3, 1, 1)
    torch.testing.assert_close(
        vgg_input(image, "caffe").flatten(), torch.tensor([-103.939, 127.5 - 116.779, 255 - 123.68])
    )


# --- Networks -------------------------------------------------------------------------------------------------------


def test_well_exposed_pixels_pass_itnet_unchanged(model: duhdr.DuHDR) -> None:
    image = 0.9 * torch.rand(1, 3, 64, 64)
    image[..., 16:48, 16:48] = 1
    with torch.no_grad():
        restored = model.itnet.eval()(image)
    mask = model.itnet.mask(image)
    well_exposed = (mask == 0).expand_as(image)
    assert torch.equal(restored[well_exposed], image[well_exposed]) and well_exposed[..., :16, :].all()
    assert (restored[..., 16:48, 16:48] > 1).any() and (restored >= image).all()
    codes = torch.tensor([0.0, 0.95, 0.975, 1.0, 3.0]).view(1, 1, 1, 5)
    torch.testing.assert_close(overexposed(codes, 0.95).flatten(), torch.tensor([0, 0, 0.5, 1, 1]))


def test_itnet_begins_as_the_sum_of_both_sides(model: duhdr.DuHDR) -> None:
    fuse = ITnet().decoder[4].fuse
    decoded, skipped = torch.rand(1, 64, 3, 3), torch.rand(1, 64, 3, 3)
    torch.testing.assert_close(fuse(torch.cat((decoded, skipped), 1)), decoded + skipped)


def test_dnet_stays_within_an_image() -> None:
    net = Dnet()
    with torch.no_grad():
        net.out.weight.zero_()
        image = torch.rand(1, 3, 32, 48)
        assert torch.equal(net(image), image)
        net.out.bias.fill_(3)
        assert (net(image) <= 1).all()


def test_response_nets_give_monotone_curves_for_each_image(model: duhdr.DuHDR) -> None:
    images = torch.rand(2, 3, 33, 47) * torch.tensor([1.0, 0.2]).view(2, 1, 1, 1)
    for net in (model.innet, model.nonlinear_net):
        net.eval()
        with torch.no_grad():
            curves = net.curve(images)
            mapped = net(images)
        assert curves.shape == (2, 1024) and (curves.diff() >= 0).all()
        torch.testing.assert_close(curves[:, [0, -1]], torch.tensor([[0.0, 1.0]] * 2))
        assert not torch.equal(curves[0], curves[1])
        torch.testing.assert_close(mapped, hdrops.crf_lookup(images, curves[:, None], backend="reference"))


def test_zero_coefficients_are_the_mean_curve(data: Path) -> None:
    path = data / "crf" / "invemor.txt"
    net = ResponseNet(path, inverse=True)
    torch.nn.init.zeros_(net.coefficients.weight)
    torch.testing.assert_close(net.curve(torch.rand(1, 3, 16, 16))[0], EMoR.load(path).mean.float(), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"invemor\.txt must hold responses, it holds inverse responses"):
        ResponseNet(path, inverse=False)


def _is_undone(curve: torch.Tensor) -> None:
    """The response of the inverse response is the identity, within 2/1023."""
    image = torch.rand(len(curve), 3, 64, 64)
    linear = hdrops.crf_lookup(image, invert_curve(curve)[:, None])
    again = hdrops.crf_lookup(linear, curve[:, None])
    assert (again - image).abs().max() <= 2 / 1023


def test_a_response_undoes_its_inverse() -> None:
    basis = EMoR.parametric()
    coefficients = torch.randn(8, 11) * torch.tensor([1.0] + [0.3] * 10)
    _is_undone(basis.curve(coefficients))
    _is_undone(torch.stack([torch.linspace(0, 1, 1024) ** (1 / gamma) for gamma in (1.4, 1.8, 2.2)]))


def test_measured_responses_undo_their_inverses(data: Path) -> None:
    deviations = torch.tensor([3.4, 1.3, 0.47])  # of DoRF's first coefficients
    _is_undone(EMoR.load(data / "crf" / "emor.txt").curve((torch.randn(16, 3) * deviations).double()).float())


# --- The system -----------------------------------------------------------------------------------------------------


def _photograph(height: int = 64, width: int = 64, number: int = 1) -> torch.Tensor:
    """Codes of 8 bits, smooth, with a white area."""
    return (255 * smooth(1.6, height, width, number).clamp(0, 1)).round() / 255


def _pair(size: int = 64) -> duhdr_training.Batch:
    """A photograph by gamma 2.2, whose HDR image goes up to 4."""
    ldr = _photograph(size, size)
    white = (ldr.amax(1, keepdim=True) - 0.95).clamp_min(0) / 0.05
    return duhdr_training.Batch(ldr, ldr**2.2 * (1 + 3 * white), (ldr + 0.3 / 255).clamp(0, 1))


def test_forward_takes_any_size(model: duhdr.DuHDR) -> None:
    model.eval()
    with torch.no_grad():
        found = model(_photograph(45, 70, 2))
        tiny = model(torch.rand(1, 3, 1, 2)).radiance
        even = model(_photograph(64, 96))
        last = model.photograph(even.radiance)
    assert all(image.shape == (2, 3, 45, 70) for image in found) and tiny.shape == (1, 3, 1, 2)
    for image in (found.nonlinear, found.clipped):
        assert image.min() >= 0 and image.max() <= 1 + 1e-5  # a curve ends at 1 up to rounding
    assert found.radiance.min() >= 0 and found.radiance.isfinite().all()
    torch.testing.assert_close(last * 255, (last * 255).round())
    staged = model.oonet(even.restored, even.clipped, even.nonlinear)
    assert torch.equal(staged, even.radiance)


def test_predict_is_the_published_inference(model: duhdr.DuHDR) -> None:
    model.eval()
    image = _photograph(64, 64)
    with torch.no_grad():
        found = model.predict(image.unsqueeze(1))
        by_numpy = torch.from_numpy(np.pad(image.numpy(), ((0, 0), (0, 0), (32, 32), (32, 32)), mode="symmetric"))
        expected = model(by_numpy).radiance[..., 32:-32, 32:-32]
        torch.testing.assert_close(found, expected)
        resized = model.predict(_photograph(50, 70).unsqueeze(1))
    assert resized.shape == (1, 3, 50, 70) and resized.min() >= 0 and resized.isfinite().all()


def test_bad_input_is_named(model: duhdr.DuHDR) -> None:
    for call, error, words in (
        (
            lambda: model(torch.rand(3, 64, 64)),
            ValueError,
            r"duhdr: the image must be \[N, 3, H, W\], got .*\[3, 64, 64\]",
        ),
        (lambda: model(torch.rand(1, 4, 64, 64)), ValueError, r"\[N, 3, H, W\], got shape \[1, 4, 64, 64\]"),
        (lambda: model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)), TypeError, "floating point, got torch.uint8"),
        (lambda: model("image"), TypeError, "must be a tensor, got str"),
        (lambda: model.predict(torch.rand(1, 2, 3, 64, 64)), ValueError, "duhdr: takes 1 frames, got 2"),
        (lambda: model.dnet(torch.rand(1, 3, 24, 32)), ValueError, "Dnet: height and width must be .* multiples of 16"),
        (lambda: model.itnet(torch.rand(1, 3, 16, 32)), ValueError, "ITnet: height and width .* multiples of 32, got"),
        (lambda: model(torch.rand(1, 3, 0, 64)), ValueError, "must be positive"),
        (lambda: ITnet()(torch.rand(1, 3, 32, 32)), ValueError, r"more than one image of 32 x 32 .*\[1, 3, 32, 32\]"),
        (lambda: OOnet("pool"), ValueError, "downblock must be 'rfb' or 'conv', got 'pool'"),
        (lambda: ITnet(alpha=1.0), ValueError, r"alpha must lie in \[0, 1\), got 1.0"),
        (lambda: ITnet(convention="rgb"), ValueError, "vgg_input must be one of caffe, torchvision, got 'rgb'"),
        (lambda: ITnet(weights="torchvision"), ValueError, "need vgg_input='torchvision', got 'caffe'"),
        (lambda: ITnet(weights="/nowhere/vgg16.pth"), OSError, r"vgg16\.pth"),
        (lambda: models.create("duhdr", width=3), ValueError, "unknown option width"),
        (lambda: models.create("duhdr", iterations=0), ValueError, "iterations must be at least 1, got 0"),
        (lambda: models.create("duhdr", prec=-1), ValueError, "prec must be at least 0, got -1"),
        (lambda: ResponseNet(inverse=True, components=101), ValueError, r"components must lie in 1\.\.100, got 101"),
        (lambda: ResponseNet("/nowhere/emor.txt", inverse=True), FileNotFoundError, "no such file"),
    ):
        with pytest.raises(error, match=words):
            call()


def test_the_state_dict_is_stable(model: duhdr.DuHDR, printed: duhdr.DuHDR) -> None:
    state = model.state_dict()
    assert {name.split(".")[0] for name in state} == {"dnet", "innet", "itnet", "oonet", "nnet"}
    for name in (
        "dnet.stem.0.0.weight",
        "dnet.down.3.2.0.bias",
        "dnet.up.0.second.0.weight",
        "innet.trunk.res2a.branch2b.1.running_mean",
        "innet.basis.basis",
        "innet.coefficients.weight",
        "itnet.encoder.features.28.weight",
        "itnet.decoder.4.fuse.weight",
        "oonet.down.0.1.far.3.0.weight",
        "oonet.middle.units.2.gate.squeeze.weight",
    ):
        assert name in state, name
    assert state["innet.basis.basis"].shape == (11, 1024) and state["innet.basis.basis"].dtype == torch.float32
    with pytest.raises(RuntimeError, match="Unexpected key"):
        printed.load_state_dict(state)
    other = {name: value + 1 for name, value in state.items() if name.startswith("dnet")}
    printed.load_state_dict(other, strict=False)
    assert torch.equal(printed.dnet.out.weight, model.dnet.out.weight + 1)


def test_layouts_and_half_precision(model: duhdr.DuHDR) -> None:
    model.eval()
    image = _photograph()
    with torch.no_grad():
        expected = model(image).radiance
        last = model(image.to(memory_format=torch.channels_last)).radiance
        torch.testing.assert_close(last, expected, rtol=1e-3, atol=1e-3)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(image)
            assert model.innet.curve(image).dtype == torch.float32
    assert half.radiance.isfinite().all()
    assert (half.radiance - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_it_compiles_without_breaks(model: duhdr.DuHDR) -> None:
    model.eval()
    image = _photograph()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(image).radiance, model(image).radiance)


def _gradients(model: duhdr.DuHDR, batch: duhdr_training.Batch, quantised: bool = True) -> list[torch.Tensor]:
    """Eq. 25 and its gradients, with Q or without."""
    if quantised:
        loss = model.loss(batch, "U4")
    else:
        again = model.nonlinear_net(hdrops.truncate(model(batch.ldr).radiance))
        loss = F.mse_loss(again, batch.ldr)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def test_the_reference_gives_the_same_loss_and_gradients(model: duhdr.DuHDR, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eq. 25 runs through every operator of the system: histograms, curves, truncation, quantisation.

    In float64 all must agree. In float32 the loss must, and the kernels' gradients may be no further from float64 than
    the reference's; without Q, whose jumps turn a rounding into a step of 1/255.
    """
    model.eval().requires_grad_(True)
    exact_model, batch = copy.deepcopy(model).double(), _pair(32)
    exact_batch = duhdr_training.Batch(batch.ldr.double())
    found, found_smooth = _gradients(model, batch), _gradients(model, batch, False)
    found_exact = _gradients(exact_model, exact_batch)
    monkeypatch.setattr(_backends, "_REQUESTED", "reference")
    expected, expected_smooth = _gradients(model, batch)[0], _gradients(model, batch, False)
    exact, exact_smooth = (_gradients(exact_model, exact_batch, quantised) for quantised in (True, False))
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=0)
    assert all(gradient.any() for gradient in found)

    def worst(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
        return max(float((one - other).norm() / other.norm()) for one, other in zip(found, exact, strict=True))

    assert worst(found_exact, exact) < 1e-9
    assert worst(found_smooth, exact_smooth) <= 2 * worst(expected_smooth, exact_smooth) < 0.02


# --- Weights of others ----------------------------------------------------------------------------------------------


def _caffe_layers(trunk: crf_net.Trunk) -> dict[str, dict[str, np.ndarray]]:
    """The trunk's weights as the converter from Caffe writes them."""
    layers: dict[str, dict[str, np.ndarray]] = {"conv1": {"weights": np.zeros((7, 7, 3, 64)), "biases": np.zeros(64)}}
    for name, module in trunk.named_modules():
        block, _, branch = name.partition(".")
        branch = branch.split(".")[0]
        if isinstance(module, torch.nn.BatchNorm2d):
            layer = name if name == "bn_conv1" else f"bn{block.removeprefix('res')}_{branch}"
            values = (module.weight, module.bias, module.running_mean, module.running_var)
            names = ("scale", "offset", "mean", "variance")
            layers[layer] = {key: value.detach().numpy() for key, value in zip(names, values, strict=True)}
        elif isinstance(module, SameConv2d) and name != "conv1":
            layers[f"{block}_{branch}"] = {"weights": module.weight.detach().permute(2, 3, 1, 0).numpy()}
    return layers


def test_crf_net_loads_from_its_file(tmp_path: Path) -> None:
    published, trunk = ResponseNet(inverse=True).trunk, ResponseNet(inverse=True).trunk
    layers = _caffe_layers(published)
    assert len(layers) == 2 * 17 + 2
    np.save(tmp_path / "crf_net_v2.npy", layers, allow_pickle=True)
    first = trunk.conv1.weight.clone()
    crf_net.load_crf_net(trunk, tmp_path / "crf_net_v2.npy")
    for name, value in trunk.state_dict().items():
        assert name.startswith("conv1.") or torch.equal(value, published.state_dict()[name]), name
    assert torch.equal(trunk.conv1.weight, first)
    torch.save(published.state_dict(), tmp_path / "trunk.pth")
    again = ResponseNet(inverse=True).trunk
    crf_net.load_crf_net(again, tmp_path / "trunk.pth")
    assert torch.equal(again.res3b.branch2c[0].weight, trunk.res3b.branch2c[0].weight)


def test_other_files_are_refused(tmp_path: Path) -> None:
    trunk = ResponseNet(inverse=True).trunk
    layers = _caffe_layers(trunk)

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    np.save(tmp_path / "evil.npy", np.array({"res2a_branch1": {"weights": Evil()}}, dtype=object), allow_pickle=True)
    np.save(tmp_path / "numbers.npy", np.zeros(3))
    np.save(tmp_path / "short.npy", {name: layers[name] for name in layers if name != "res2b_branch2a"})
    np.save(tmp_path / "shape.npy", {**layers, "res2b_branch2a": {"weights": np.zeros((1, 1, 2, 2))}})
    np.save(tmp_path / "names.npy", {**layers, "bn2b_branch2a": {"gamma": np.zeros(64)}})
    for name, words in (
        ("evil", "must be a dictionary of arrays .* asks for"),
        ("numbers", "holds an array of float64"),
        ("short", "CRF-Net: .*it lacks 1 of .* weights, res2b.branch2a.0.weight first"),
        ("shape", "CRF-Net: .*does not fit the model: 1 are of another form: res2b.branch2a.0.weight must be"),
        ("names", "bn2b_branch2a must have scale, offset, mean, variance, it has gamma"),
    ):
        with pytest.raises(ValueError, match=words):
            crf_net.load_crf_net(trunk, tmp_path / f"{name}.npy")
    assert not (tmp_path / "touched").exists()
    (tmp_path / "text.npy").write_bytes(pickle.dumps({}))
    with pytest.raises(ValueError, match="must be a dictionary of arrays"):
        crf_net.load_crf_net(trunk, tmp_path / "text.npy")
    with pytest.raises(OSError, match=r"none\.npy"):
        crf_net.load_crf_net(trunk, tmp_path / "none.npy")
