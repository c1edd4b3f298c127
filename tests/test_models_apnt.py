"""APNT-Fusion: its sizes, matching and transfer, one small training, both backends, every row of its ablation."""

import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hdrops
from hdrops import _backends, models
from hdrops.models import apnt
from hdrops.models._blocks import ChannelAttention
from hdrops.models.apnt import APNTConfig, APNTFusion, TextureMatching, to_radiance
from hdrops.models.backbones import imagenet_normalize
from hdrops.reference import patch_match as reference
from hdrops.testing import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")


# Without reduction no channel attention starts with all its ReLUs at rest, which would stop its gradients.
SMALL = {"channels": 16, "blocks": 1, "reduction": 1, "radii": (2, 1, 1)}
TIMES = torch.tensor([1.0, 4.0, 16.0])
# One of them for each row of table II, then the options that are not in it.
VARIANTS = (
    {"ms_hdr": False},
    {"transfer": False},
    {"matching": "vgg_fine"},
    {"matching": "encoder"},
    {"motion_attention": False},
    {"scale_attention": False},
    {"swap_mask": True},
    {"shared_saturation": False},
    {"inputs": "both"},
    {"sigmoid": "output"},
    {"vgg_curve": "mu"},
    {"normalize": "query"},
    {"transfer": False, "motion_attention": False, "scale_attention": False, "shared_saturation": False},
)


@pytest.fixture
def model() -> APNTFusion:
    return small()


def small(**config: object) -> APNTFusion:
    torch.manual_seed(0)
    made = models.create("apnt", **{**SMALL, **config})
    assert isinstance(made, APNTFusion)
    return made


def texture(height: int, width: int, seed: int = 0, n: int = 1) -> Tensor:
    """Radiance [n, 3, height, width] in (0, 1), textured everywhere, coarse and fine."""
    generator = torch.Generator().manual_seed(seed)
    coarse = F.interpolate(torch.randn(n, 3, height // 6 + 2, width // 6 + 2, generator=generator), (height, width))
    return (coarse + torch.randn(n, 3, height, width, generator=generator) - 1.5).sigmoid()


def photographs(radiance: Tensor, times: Tensor = TIMES) -> Tensor:
    """The codes [n, 3, 3, H, W] that a camera of gamma 2.2 gives of radiance [n, 3, H, W]."""
    return (radiance.unsqueeze(1) * times.view(-1, 1, 1, 1)).clamp(0, 1) ** (1 / 2.2)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameters_of_the_recommended_configuration() -> None:
    model = models.create("apnt")
    assert {name: count(part) for name, part in model.named_children()} == {
        "extract": 1_792,
        "motion_short": 110_720,
        "motion_long": 110_720,
        "saturation": 18_816,
        "encoder": 446_616,
        "decoder": 463_128,
        "enlarge2": 131_200,
        "enlarge1": 65_600,
        "scale1": 110_720,
        "scale0": 110_720,
        "reweight": 19_331,
        "merge": 967_339,
        "matching": 555_328,
    }
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2_556_702
    attention = 2 * 64 * 4  # of a block, once an image
    merge = 384 * 64 + 20 * 64 * 64 + 64 * 3
    assert model.complexity(16, 16, "merge").operations["fixed"] == 16**2 * 9 * merge + 10 * attention
    # Counted without memory, matching included, on the padded grid.
    odd, padded = (small().complexity(*size) for size in ((9, 14), (12, 16)))
    assert odd == padded and odd.operations["fixed"] > 0
    separate = models.create("apnt", shared_saturation=False)
    assert count(separate) - count(model) == 18_816


@pytest.mark.parametrize("shift", [(12, -8), (-32, 32), (0, 0), (5, -10), (20, 20), (-27, 3)], ids=str)
def test_a12_a_planted_shift_is_recovered_at_all_three_levels(shift: tuple[int, int]) -> None:
    """H_s(x + shift) = H_m(x), radiance beyond the middle exposure's white included."""
    matching = TextureMatching(APNTConfig())
    margin, size = 32, 96
    wide = texture(size + 2 * margin, size + 2 * margin) * 0.3
    top, left = margin - shift[0], margin - shift[1]
    middle = wide[..., margin : margin + size, margin : margin + size].clamp_max(1 / 4)
    short = wide[..., top : top + size, left : left + size]
    white = torch.full((1, 1, 1, 1), 0.98**2.2 / 4)
    assert 0.02 < (short > white).float().mean() < 0.3
    for level, index in enumerate(matching(short, middle, white)):
        step, grid = 2**level, size // 2**level
        assert index.shape == (1, grid, grid)
        place = torch.arange(grid)
        dy, dx = index[0] // grid - place[:, None], index[0] % grid - place
        error = torch.stack((dy - shift[0] / step, dx - shift[1] / step)).abs().amax(0)
        # Sites whose texture is in both images: relu3_1's patches see 32 pixels, zeros beyond the border.
        rows, columns = (slice(-(-max(16, 16 - d) // step), (size - max(16, 16 + d)) // step) for d in shift)
        recovered = (error < 1)[rows, columns].float().mean().item()
        assert recovered > 0.95, (level, recovered)
        assert level > 0 or (error == 0)[rows, columns].float().mean() > 0.95


def test_the_masked_domain_is_what_makes_the_exposures_match() -> None:
    """What the middle exposure clips is clipped in the short one too: then both give VGG the same image."""
    radiance = texture(32, 32, n=1)
    codes = photographs(radiance)
    short, middle = to_radiance(codes, TIMES)[:, :2].unbind(1)
    white = torch.full((1, 1, 1, 1), 0.98**2.2 / 4)
    matching = TextureMatching(APNTConfig())
    masked, plain, wanted = (
        matching.features(image, white, mask) for image, mask in ((short, True), (short, False), (middle, True))
    )
    for ours, theirs, other in zip(masked, wanted, plain, strict=True):
        assert ours.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert (other - theirs).abs().max() > 0.1


def test_a13_identity_swap_returns_the_source_borders_included() -> None:
    for level in range(3):
        size = (32 >> level, 48 >> level)
        index = torch.arange(size[0] * size[1]).reshape(1, *size)
        # Multiples of 9!/8: their sums and every mean of them are exact.
        exact = torch.randint(-9, 9, (1, 64, *size)).float() * 2520
        assert torch.equal(hdrops.patch_swap(exact, index), exact)
        features = torch.randn(1, 64, *size)
        assert_close(hdrops.patch_swap(features, index), features.double(), terms=9)


def test_a_still_scene_is_transferred_in_place(model: APNTFusion) -> None:
    """Without motion every match is the place itself, and F_swp is Phi(F_nft), at every scale."""
    images = photographs(texture(32, 32) * 0.24, torch.tensor([1.0, 4.0, 4.1]))
    swapped: list[list[Tensor]] = []
    encoded: list[list[Tensor]] = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: swapped.append(inputs[0]))
    model.encoder.register_forward_hook(lambda _, __, output: encoded.append(output))
    with torch.no_grad():
        model(images, TIMES)
    assert len(encoded) == 1  # F_m is not encoded: every patch is replaced
    for ours, theirs in zip(swapped[0], encoded[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_forward_is_what_the_equations_say(model: APNTFusion) -> None:
    """Written out with the parts of the model, on a scene that moves between the exposures."""
    images = photographs(texture(32, 24, n=1))
    images[:, 0] = images[:, 0].roll((3, -2), (2, 3))
    sigmoid, conv = torch.sigmoid, model.extract
    with torch.no_grad():
        hs, hm, hl = (images[:, k] ** 2.2 / TIMES[k] for k in range(3))  # Eq. 3
        fs, fm, fl = (F.leaky_relu(conv(h), 0.1) for h in (hs, hm, hl))
        assert model.motion_short and model.motion_long and model.scale1 and model.scale0 and model.matching
        a_s, a_l = model.motion_short(torch.cat((fs, fm), 1)), model.motion_long(torch.cat((fl, fm), 1))
        f_mef = torch.cat((fm, fs * sigmoid(a_s), fl * sigmoid(a_l)), 1)  # Eq. 4
        white = 0.98**2.2 / TIMES[1]
        mask_s, mask_m = ((h.amax(1, keepdim=True) >= white).float() for h in (hs, hm))
        assert 0 < mask_s.mean() < 1 and 0 < mask_m.mean() < 1
        f_nft = fs * sigmoid(a_s + model.saturation(mask_s))  # Eq. 9
        assert model.matching.vgg is not None
        psi_s, psi_m = (model.matching.vgg(imagenet_normalize((h / white).clamp(max=1))) for h in (hs, hm))
        match = reference.patch_match_pyramid(psi_m[::-1], psi_s[::-1], radii=(2, 1, 1))[::-1]  # Eq. 5 to 8
        phi = model.encoder(f_nft)
        d0, d1, d2 = model.decoder([reference.patch_swap(p, m.index) for p, m in zip(phi, match, strict=True)])
        d1, d2 = model.enlarge1(d1), model.enlarge2(d2)
        a1 = sigmoid(model.scale1(torch.cat((d2, d1), 1)))  # Eq. 10
        a0 = sigmoid(model.scale0(torch.cat((d1, d0), 1)))  # Eq. 11
        a2 = sigmoid(model.saturation(mask_m))  # Eq. 12
        h_mef = sigmoid(model.merge(torch.cat((a2 * d2, a1 * d1, a0 * d0, f_mef), 1)))  # Eq. 13
        wanted = hm * (1 - sigmoid(model.reweight(a2))) + h_mef  # Eq. 14
        torch.testing.assert_close(model(images, TIMES), wanted, rtol=1e-4, atol=1e-5)


def test_the_encoder_halves_and_the_decoder_doubles(model: APNTFusion) -> None:
    x = torch.rand(1, 16, 16, 24)
    with torch.no_grad():
        levels = model.encoder(x)
        for fine, coarse, blocks in zip(levels, levels[1:], model.encoder.levels[1:], strict=False):
            torch.testing.assert_close(coarse, blocks(F.avg_pool2d(fine, 2)))
        decoded = model.decoder(levels)
        torch.testing.assert_close(decoded[2], model.decoder.levels[2](levels[2]))
        for level in (0, 1):
            enlarged = F.interpolate(decoded[level + 1], scale_factor=2, mode="bilinear")
            joined = model.decoder.join[level](torch.cat((enlarged, levels[level]), 1))
            torch.testing.assert_close(decoded[level], model.decoder.levels[level](joined))


def test_coarser_matches_follow_the_finest() -> None:
    place = torch.arange(16)
    fine = ((place + 4).clamp(0, 15)[:, None] * 16 + (place - 8).clamp(0, 15)).unsqueeze(0)
    small = torch.arange(4)
    wanted = (small + 1).clamp(0, 3)[:, None] * 4 + (small - 2).clamp(0, 3)
    assert torch.equal(apnt._coarser(fine, 4)[0], wanted)
    assert torch.equal(apnt._coarser(fine, 1), fine)


def train(model: APNTFusion, steps: int, seed: int = 1) -> tuple[list[float], Tensor]:
    """A few steps on one pair of crops; the loss before each, and the output of the first."""
    radiance = texture(32, 32, seed=seed, n=2)
    images, times = photographs(radiance), TIMES.expand(2, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    values: list[float] = []
    first = None
    for _ in range(steps):
        optimizer.zero_grad()
        output = model(images, times)
        first = output.detach() if first is None else first
        loss = model.loss(output, radiance)
        loss.backward()
        values.append(loss.item())
        if len(values) < steps:
            optimizer.step()
    assert first is not None
    return values, first


def test_a_few_steps_reduce_the_loss(model: APNTFusion) -> None:
    values, _ = train(model, 14)
    assert all(later < earlier for earlier, later in itertools.pairwise(values)), values
    assert values[-1] < 0.65 * values[0], values


@pytest.mark.parametrize("variant", ({}, *VARIANTS), ids=str)
def test_gradients_reach_every_parameter_of_every_variant(variant: dict[str, object]) -> None:
    model = small(**variant)
    values, output = train(model, 1)
    assert math.isfinite(values[0]) and output.shape == (2, 3, 32, 32) and output.min() >= 0
    for name, parameter in model.named_parameters():
        if name.startswith("matching.vgg."):
            assert not parameter.requires_grad and parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_each_variant_is_another_network() -> None:
    """Same weights where the parts are the same: every switch shows in the output."""
    images = photographs(texture(32, 32, seed=1, n=2))
    images[:, 0] = images[:, 0].roll((4, 8), (2, 3))
    whole = small().state_dict()
    outputs = []
    for variant in ({}, *VARIANTS[:-1]):
        model = small(**variant)
        own = model.state_dict()
        fitting = {name: value for name, value in whole.items() if name in own and own[name].shape == value.shape}
        model.load_state_dict(fitting, strict=False)
        if model.saturation_short is not None:
            model.saturation_short.load_state_dict({k: 2 * v for k, v in model.saturation.state_dict().items()})
        with torch.no_grad():
            outputs.append(model(images, TIMES))
    # Eq. 5 by the letter divides by what cannot change the match, and is then the plain inner product.
    for i, first in enumerate(outputs):
        assert all((first - other).abs().max() > 1e-5 for other in outputs[:i]), i


def test_attention_taken_out_is_a_map_of_ones() -> None:
    """With logits so large that every sigmoid is 1, F_mef and the blended scales are those of the variants."""
    images = photographs(texture(32, 32))
    model, without = small(), small(motion_attention=False, scale_attention=False)
    without.load_state_dict(
        {k: v for k, v in model.state_dict().items() if not k.startswith(("motion_", "scale"))}, strict=True
    )
    seen: list[Tensor] = []
    for net in (model, without):
        net.merge.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for part in (model.motion_short, model.motion_long, model.scale1, model.scale0):
            assert part is not None
            part[2].weight.zero_()
            part[2].bias.fill_(100)
        model.motion_short[2].bias.fill_(1)  # sigmoid(1 + a_sat) in Eq. 9, as in the variant
        model(images, TIMES)
        without(images, TIMES)
    c = model.config.channels
    ones = [slice(0, 3 * c), slice(3 * c, 4 * c), slice(5 * c, 6 * c)]
    for channels in ones:
        torch.testing.assert_close(seen[0][:, channels], seen[1][:, channels])
    gate = torch.tensor(1.0).sigmoid()
    torch.testing.assert_close(seen[0][:, 4 * c : 5 * c], seen[1][:, 4 * c : 5 * c] * gate)


def test_reference_backend_gives_the_same(monkeypatch) -> None:
    """Same matches, outputs, gradients, and the same loss after a step (A17's comparison)."""
    found: dict[str | None, tuple[list[float], Tensor, Tensor]] = {}
    matches: dict[str | None, list[Tensor]] = {None: [], "reference": []}
    for backend in (None, "reference"):
        monkeypatch.setattr(_backends, "_REQUESTED", backend)
        model = small()
        assert model.matching is not None
        model.matching.register_forward_hook(lambda _, __, output, to=matches[backend]: to.extend(output))
        values, output = train(model, 2, seed=2)
        gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        found[backend] = values, output, torch.cat(gradients)
    # The features have no ties here: a match that differs would be a mistake.
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(matches[None], matches["reference"], strict=True))
    (values, output, gradient), (wanted_values, wanted_output, wanted_gradient) = found[None], found["reference"]
    assert values == pytest.approx(wanted_values, rel=1e-4)
    torch.testing.assert_close(output, wanted_output, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-3, atol=1e-3 * wanted_gradient.abs().max().item())


def test_saturated_areas_tie_alike_with_both_backends(monkeypatch) -> None:
    """Where all candidates are equal the backends may round differently: then both matches are equally good."""
    matching = TextureMatching(APNTConfig(radii=(2, 1, 1)))
    short, middle = texture(32, 32), texture(32, 32, seed=1)
    short[..., 8:24, 8:24] = middle[..., 4:20, 8:24] = 1
    white = torch.full((1, 1, 1, 1), 0.98**2.2)
    queries, keys = matching.features(middle, white, True), matching.features(short, white, True)
    scores = []
    for backend in ("cpu", "reference"):
        matches = hdrops.patch_match_pyramid(queries[::-1], keys[::-1], radii=(2, 1, 1), backend=backend)
        scores.append(matches[0].score)
        monkeypatch.setattr(_backends, "_REQUESTED", backend)
        again = matching(short, middle, white)
        assert all(torch.equal(ours, theirs.index) for ours, theirs in zip(again, matches[::-1], strict=True))
    torch.testing.assert_close(*scores, rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (37, 30), (64, 40)], ids=str)
def test_any_size_is_padded_inside(model: APNTFusion, size: tuple[int, int]) -> None:
    images = photographs(texture(*size))
    with torch.no_grad():
        output = model(images, TIMES)
        assert output.shape == (1, 3, *size) and output.isfinite().all() and 0 <= output.min() <= output.max() <= 2
        bottom, right = -size[0] % 4, -size[1] % 4
        mode = "reflect" if bottom < size[0] and right < size[1] else "replicate"
        padded = F.pad(images[0], (0, right, 0, bottom), mode=mode).unsqueeze(0)
        torch.testing.assert_close(model(padded, TIMES)[..., : size[0], : size[1]], output)
    assert model(images[:0], TIMES).shape == (0, 3, *size)


def test_prediction_sorts_the_frames_and_gives_the_middle_exposures_unit(model: APNTFusion) -> None:
    images = photographs(texture(16, 20))
    logs = (TIMES / 60).log()
    with torch.no_grad():
        wanted = model(images, TIMES).clamp(0, 1) * 4
        torch.testing.assert_close(model.predict(images, logs), wanted, rtol=1e-5, atol=1e-6)
        order = [2, 0, 1]
        torch.testing.assert_close(model.predict(images[:, order], logs[order]), wanted, rtol=1e-5, atol=1e-6)
    assert model.decode(torch.full((1, 3, 2, 2), 1.5), logs).unique().item() == pytest.approx(4)


def test_preparation_makes_the_shortest_exposure_the_unit() -> None:
    """What a camera photographs of radiance in that unit is given back by it, also with exposures of each sample."""
    logs = torch.stack(((TIMES / 60).log(), (TIMES.sqrt() / 8).log())).double()
    radiance = texture(8, 8, n=2)  # in the shortest exposure's unit
    images, times = APNTFusion.prepare(torch.rand(2, 3, 3, 8, 8), logs)
    torch.testing.assert_close(times, torch.stack((TIMES, TIMES.sqrt())))
    middle = radiance * torch.tensor([4.0, 2.0]).view(2, 1, 1, 1)
    torch.testing.assert_close(APNTFusion.decode(radiance, logs), middle)
    torch.testing.assert_close(APNTFusion.encode_target(middle, logs), radiance)
    codes, _ = APNTFusion.prepare(3 * images.half() - 1, logs)
    assert codes.dtype == torch.float32 and codes.min() == 0 and codes.max() == 1
    with pytest.raises(ValueError, match="exposures must ascend"):
        APNTFusion.prepare(images, logs.flip(1))
    with pytest.raises(ValueError, match=r"log_exposures must be \[3\] or \[2, 3\], got shape \[2\]"):
        APNTFusion.prepare(images, logs[0, :2])


def test_radiance_of_codes() -> None:
    codes = torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1, 1).expand(1, 3, 3, 1, 1).half()
    found = to_radiance(codes, TIMES)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[0, :, 0, 0, 0], torch.tensor([0.0, 0.5**2.2 / 4, 1 / 16]))
    assert to_radiance(codes.double() - 1, TIMES.expand(1, 3)).isfinite().all()


def test_samples_of_a_batch_have_their_own_exposures(model: APNTFusion) -> None:
    radiance = texture(16, 16, n=2)
    times = torch.stack((TIMES, TIMES * torch.tensor([1.0, 2.0, 4.0])))
    images = torch.cat([photographs(radiance[i : i + 1], times[i]) for i in range(2)])
    with torch.no_grad():
        together = model(images, times)
        alone = torch.cat([model(images[i : i + 1], times[i]) for i in range(2)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_compiles_without_graph_breaks(model: APNTFusion) -> None:
    images = photographs(texture(18, 16))
    expected = model(images, TIMES)
    expected.mean().backward()
    wanted = model.extract.weight.grad
    model.zero_grad()
    output = torch.compile(model, fullgraph=True, backend="eager")(images, TIMES)
    torch.testing.assert_close(output, expected)
    output.mean().backward()
    torch.testing.assert_close(model.extract.weight.grad, wanted, rtol=1e-4, atol=1e-6)


def test_a_variant_compiles_without_graph_breaks() -> None:
    model = small(matching="vgg_fine", swap_mask=True, inputs="both", blocks=0)
    images = photographs(texture(18, 16))
    with torch.no_grad():
        output = torch.compile(model, fullgraph=True, backend="aot_eager")(images, TIMES)
        torch.testing.assert_close(output, model(images, TIMES))


def test_channels_last_autocast_and_other_dtypes(model: APNTFusion) -> None:
    images = photographs(texture(32, 32))
    layouts: list[bool] = []
    model.merge.register_forward_pre_hook(
        lambda _, inputs: layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    with torch.no_grad():
        expected = model(images, TIMES)
        last = model.to(memory_format=torch.channels_last)(images, TIMES)
        assert layouts == [False, True]
        torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-4)
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype=dtype):
                output = model(images, TIMES)
            assert output.dtype == torch.float32
            assert output.to(dtype).ne(output).float().mean() > 0.5  # not rounded to the smaller format
            # Some matches flip; what is kept of H_m is exact.
            assert (output - expected).abs().mean() < 0.02
        double = model.double()(images.double(), TIMES)
        assert double.dtype == torch.float64
        torch.testing.assert_close(double.float(), expected, rtol=1e-4, atol=1e-4)


def test_the_state_dict_is_stable(model: APNTFusion, tmp_path) -> None:
    names = list(model.state_dict())
    stems = {re.sub(r"\.(weight|bias)$", "", name) for name in names}
    attention = {f"{part}.{i}" for part in ("motion_short", "motion_long", "scale1", "scale0") for i in (0, 2)}
    convs = ("body.0", "body.2", "body.3.gate.1", "body.3.gate.3")
    blocks = {
        f"{net}.levels.{level}.{block}.{conv}"
        for net in ("encoder", "decoder")
        for level in range(3)
        for block in range(2)
        for conv in convs
    }
    assert stems == attention | blocks | {
        "extract", "saturation.0", "saturation.2", "decoder.join.0", "decoder.join.1", "enlarge2.0", "enlarge2.1",
        "enlarge1", "reweight.0", "reweight.2", "merge.0", "merge.2", *(f"merge.1.{conv}" for conv in convs),
        *(f"matching.vgg.features.{i}" for i in (0, 2, 5, 7, 10)),
    }  # fmt: skip
    torch.save(model.state_dict(), tmp_path / "apnt.pt")
    other = models.create("apnt", **SMALL, seed=5)
    other.load_state_dict(torch.load(tmp_path / "apnt.pt", weights_only=True))
    images = photographs(texture(16, 16))
    with torch.no_grad():
        assert torch.equal(other(images, TIMES), model(images, TIMES))


def test_vgg_starts_from_a_file_or_a_seed(tmp_path) -> None:
    first, second = small(seed=1), small(seed=1)
    weights = first.state_dict(), second.state_dict()
    assert all(torch.equal(*pair) for pair in zip(weights[0].values(), weights[1].values(), strict=True))
    vgg = {name.removeprefix("matching.vgg."): v for name, v in small(seed=9).state_dict().items() if "vgg" in name}
    torch.save(vgg, tmp_path / "vgg19.pth")
    loaded = small(vgg_weights=str(tmp_path / "vgg19.pth")).state_dict()
    assert torch.equal(loaded["matching.vgg.features.0.weight"], vgg["features.0.weight"])
    with pytest.raises(OSError, match=r"none\.pth"):
        small(vgg_weights=str(tmp_path / "none.pth"))


def test_what_does_not_fit_is_refused(model: APNTFusion) -> None:
    images = torch.rand(2, 3, 3, 16, 16)
    for function in (lambda x: model(x, TIMES), lambda x: model.predict(x, TIMES.log())):
        with pytest.raises(ValueError, match=r"apnt: takes 3 frames, got 2 \(images shape \[2, 2, 3, 16, 16\]\)"):
            function(images[:, :2])
        with pytest.raises(ValueError, match=r"apnt: images must be \[N, 3, 3, H, W\], got shape \[2, 3, 1, 16, 16\]"):
            function(images[:, :, :1])
        with pytest.raises(TypeError, match=r"apnt: images must be floating point codes in \[0, 1\], got torch.uint8"):
            function((images * 255).byte())
        with pytest.raises(TypeError, match=r"apnt: images must be one tensor \[N, 3, 3, H, W\], got list"):
            function([images[:, 0], images[:, 1, :, :8], images[:, 2]])
    with pytest.raises(ValueError, match=r"apnt: times must be \[3\] or \[2, 3\] exposure times, got shape \[2\]"):
        model(images, TIMES[:2])
    with pytest.raises(ValueError, match=r"got shape \[5, 3\]"):
        model(images, TIMES.expand(5, 3))
    with pytest.raises(TypeError, match=r"apnt: times must be floating point, got torch\.int64"):
        model(images, torch.tensor([1, 4, 16]))
    for exposures, words in ((None, "got none"), ([0.0, 1.0], "needs 3 exposures, got 2"), ([0.0, 1.0, 1.0], "differ")):
        with pytest.raises(ValueError, match=words):
            model.predict(images, exposures)
    with pytest.raises(ValueError, match="must have one shape"):
        model.loss(images[:, 0], images[:, 0, :, :8])
    for option, words in (
        ({"matching": "sift"}, "matching must be one of vgg, vgg_fine, encoder, got 'sift'"),
        ({"radii": (8, 2)}, r"radii must be 3 of at least 0, got \[8, 2\]"),
        ({"channels": 7}, "channels must be even"),
        ({"saturation": 1.5}, r"saturation must lie in \(0, 1\]"),
        ({"depth": 3}, "unknown option depth"),
    ):
        with pytest.raises(ValueError, match=words):
            models.create("apnt", **option)
    with pytest.raises(ValueError, match=r"part must be one of extract, .*, got 'nose'"):
        model.example_inputs(8, 8, "nose")
    with pytest.raises(ValueError, match="multiple of reduction, got 10 and 4"):
        ChannelAttention(10, 4)


def test_the_loss_is_that_of_the_tone_mapped_images(model: APNTFusion) -> None:
    output, target = torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 4)
    wanted = (torch.log1p(5000 * output) - torch.log1p(5000 * target)).abs().mean() / math.log(5001)
    torch.testing.assert_close(model.loss(output, target), wanted)
