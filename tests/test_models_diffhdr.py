"""DiffHDR: its sizes, its recursion, the HDR layer, its losses and one small training."""

import math
import re

import pytest
import torch
from torch import Tensor

import hdrops
from hdrops import _backends, models
from hdrops.models import diffhdr_losses as losses
from hdrops.models.complexity import table
from hdrops.models.diffhdr import EVS, ConditionalInstanceNorm, DiffHDR, ExposureStack, canny_edges, log_exposures
from hdrops.models.diffhdr_layer import HDRLayer, histogram_quantiles

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"tone_channels": 4, "edge_channels": 4, "refine_channels": 4}


@pytest.fixture
def model() -> DiffHDR:
    torch.manual_seed(0)
    return models.create("diffhdr", **SMALL)


def scene(size: int = 64, seed: int = 0) -> Tensor:
    """Radiance [1, 3, size, size] over ten stops, smooth with some texture."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.nn.functional.interpolate(torch.randn(1, 3, 5, 5, generator=generator), size, mode="bicubic")
    return (1.6 * coarse + 0.1 * torch.randn(1, 3, size, size, generator=generator) - 1).exp()


def photographs(radiance: Tensor, gamma: float = 2.2) -> Tensor:
    """The stack [1, 7, 3, H, W] in [0, 1] that a camera of that gamma takes."""
    exposure = radiance.unsqueeze(1) * log_exposures().exp().view(1, -1, 1, 1, 1)
    return ((exposure.clamp(0, 1) ** (1 / gamma)) * 255).round() / 255


def test_a16_parameters_of_the_three_networks() -> None:
    with torch.device("meta"):
        model = models.create("diffhdr")
    counts = {
        part: sum(parameter.numel() for parameter in model.get_submodule(part).parameters())
        for part in ("up.tone", "up.edge", "up.refine", "down")
    }
    assert counts == {
        "up.tone": 98_918_403,
        "up.edge": 6_188_815,
        "up.refine": 11_007_971,
        "down": 98_918_403 + 6_188_815 + 11_007_971,
    }


def test_the_table_of_complexity_agrees_with_the_public_code(monkeypatch) -> None:
    monkeypatch.setattr(DiffHDR, "build", classmethod(lambda cls, **config: _on_meta(**config)))
    for line in table("diffhdr"):
        differences = [abs(float(word)) for word in line.replace("%", " ").split() if word[0] in "+-" and word[1:2]]
        assert len(differences) == 2 and differences[0] < 0.005 and differences[1] < 0.5, line


def _on_meta(**config: object) -> DiffHDR:
    with torch.device("meta"):
        return DiffHDR(DiffHDR.Config(**config))


def test_the_names_of_the_parameters_are_stable(model: DiffHDR) -> None:
    names = sorted(model.state_dict())
    assert len(names) == 372 and names[0] == "down.edge.body.bottleneck.first.bias"
    stems = {".".join(name.split(".")[:3]) for name in names}
    tone, refine = {f"{d}.tone.{part}" for d in ("up", "down") for part in ("body", "exit")}, {"up.refine.body"}
    assert tone <= stems and refine <= stems and "up.edge.edge" in stems


def test_a_stack_keeps_the_photograph_where_it_stands(model: DiffHDR) -> None:
    image = torch.rand(2, 3, 32, 64) * 2 - 1
    edge = canny_edges(image)
    for ev in (-3, 0, 2):
        stack = model(image, edge, ev=ev)
        assert stack.images.shape == stack.tones.shape == (2, 7, 3, 32, 64) and stack.edges.shape == (2, 7, 1, 32, 64)
        assert torch.equal(stack.images[:, ev + 3], image) and torch.equal(stack.edges[:, ev + 3], edge)
        assert stack.images.abs().max() <= 1 and stack.edges.min() >= 0 and stack.edges.max() <= 1
    unrefined = model(image, edge, refine=False)
    assert torch.equal(unrefined.images, unrefined.tones)


def test_each_step_has_its_own_map_and_the_states_matter(model: DiffHDR) -> None:
    """A change of the map of the step 1 -> 2 shows from exposure value 2 on, and nowhere below."""
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    before = model(image)
    norms = [m for m in model.up.modules() if isinstance(m, ConditionalInstanceNorm)]
    with torch.no_grad():
        for norm in norms:
            norm.weight[4].mul_(1.5)
            norm.bias[4].add_(0.2)
    after = model(image)
    same = [torch.equal(before.tones[:, k], after.tones[:, k]) for k in range(7)]
    assert same == [True] * 5 + [False, False]
    # Forced onto the true stack, only the hidden state carries a change of the first step to the second.
    teacher = ExposureStack(*(torch.rand(1, 7, c, 32, 32) for c in (3, 3, 1)))
    forced = model(image, teacher=teacher)
    with torch.no_grad():
        for norm in norms:
            norm.weight[3].mul_(1.5)
    again = model(image, teacher=teacher)
    assert not torch.equal(forced.edges[:, 5], again.edges[:, 5])


def test_states_and_maps_can_be_taken_out() -> None:
    torch.manual_seed(0)
    model = models.create("diffhdr", recurrent=False, conditional=False, **SMALL)
    maps = [m.weight for m in model.modules() if isinstance(m, ConditionalInstanceNorm)]
    assert maps and all(len(weight) == 1 for weight in maps)
    # Every step is then the same function of the image and the edges before it.
    image, edge = torch.rand(1, 3, 32, 32) * 2 - 1, (torch.rand(1, 1, 32, 32) > 0.8).float()
    teacher = ExposureStack(*(part[:, None].repeat(1, 7, 1, 1, 1) for part in (image, image, edge)))
    stack = model(image, edge, ev=-3, teacher=teacher)
    for number in range(2, 7):
        torch.testing.assert_close(stack.images[:, number], stack.images[:, 1])
    kept = models.create("diffhdr", conditional=False, **SMALL)
    kept.load_state_dict(model.state_dict())
    assert not torch.allclose(kept(image, edge, ev=-3, teacher=teacher).tones[:, 2], stack.tones[:, 2])


def test_teacher_forcing_keeps_gradients_within_a_step(model: DiffHDR) -> None:
    image = torch.rand(1, 3, 32, 32, requires_grad=True)
    teacher = ExposureStack(*(torch.rand(1, 7, c, 32, 32) for c in (3, 3, 1)))
    stack = model(image * 2 - 1, canny_edges(image.detach()), teacher=teacher)
    (gradient,) = torch.autograd.grad(stack.tones[:, 5].sum(), image, allow_unused=True)
    assert gradient is None or not gradient.any()


def test_a_step_compiles_without_graph_breaks(model: DiffHDR) -> None:
    """A step, of which a stack is six: tracing all takes half a minute and shows no more."""
    step = model.up
    arguments = torch.rand(1, 3, 32, 32) * 2 - 1, torch.zeros(1, 1, 32, 32), 3, (None, None), True
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*arguments)[0], step(*arguments)[0])


def test_channels_last_and_autocast(model: DiffHDR) -> None:
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    expected = model(image).images
    last = model.to(memory_format=torch.channels_last)(image.contiguous(memory_format=torch.channels_last)).images
    torch.testing.assert_close(last, expected, atol=1e-4, rtol=1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(image).images.isfinite().all()
        assert model.predict(torch.rand(1, 1, 3, 40, 36)).isfinite().all()


def test_canny_finds_a_step_and_nothing_in_a_flat_image() -> None:
    image = torch.full((2, 3, 40, 40), -1.0)
    image[1, :, :, 20:] = 1
    edges = canny_edges(image)
    assert not edges[0].any()
    assert edges[1, 0, 10:30, 19:21].sum(-1).eq(1).all() and not edges[1, 0, :, :15].any()


def test_a14_the_layer_recovers_the_radiance_of_a_known_camera() -> None:
    radiance = scene()
    stack = photographs(radiance)
    found, curve = HDRLayer()(stack, log_exposures())
    valid = (((stack > 0) & (stack < 1)).sum(1) >= 2).all(1, keepdim=True).expand_as(radiance)
    error = (found.log() - radiance.log())[valid]
    assert valid.float().mean() > 0.8
    assert (error - error.mean()).square().mean().sqrt() < 0.05
    assert curve.shape == (1, 3, 256) and torch.equal(curve[:, 2].amax(-1), torch.ones(1))


def test_a15_the_slope_is_the_difference_of_the_curve() -> None:
    layer = HDRLayer()
    curve = torch.linspace(0.2, 1, 256).square().expand(1, 3, 256).contiguous()
    codes = torch.arange(256.0).div(255).reshape(1, 1, 1, 16, 16).expand(1, 3, 3, 16, 16).clone().requires_grad_()
    times = torch.tensor([-1.0, 0.0, 1.0])
    merged = layer.merge(codes, times, curve)
    (gradient,) = torch.autograd.grad(merged.log().sum(), codes)
    slope = torch.cat((curve[0, 0, :1], curve[0, 0].diff())) / curve[0, 0]
    inner = gradient[0, :, 0].sum(0).flatten()[1:-1]  # equal weights of the three frames add up to one
    torch.testing.assert_close(inner, slope[1:-1], rtol=1e-4, atol=1e-7)


def test_clipped_everywhere_takes_the_shortest_or_the_longest_frame() -> None:
    layer = HDRLayer()
    curve = torch.linspace(1e-3, 1, 256).expand(1, 3, 256).contiguous()
    stack = torch.zeros(1, 3, 3, 1, 2)
    stack[..., 0] = 1
    times = torch.tensor([0.0, 2.0, 1.0])  # in any order
    merged = layer.merge(stack, times, curve)
    torch.testing.assert_close(merged[0, :, 0, 0], torch.full((3,), 1.0))
    torch.testing.assert_close(merged[0, :, 0, 1], torch.full((3,), 1e-3 * math.exp(-2)))


def test_the_layer_keeps_float64_and_confines_nan() -> None:
    stack = photographs(scene(32))
    radiance, _ = HDRLayer()(stack, log_exposures())
    exact, curve = HDRLayer()(stack.double(), log_exposures())
    assert exact.dtype == curve.dtype == torch.float64
    # Of float32 codes a few round to another entry of the table.
    assert (exact / radiance - 1).abs().median() < 1e-4
    stack[0, 3, 1, 4, 5] = torch.nan
    broken, _ = HDRLayer()(stack, log_exposures())
    assert broken[0, :, 4, 5].isnan().any() and broken.isnan().sum() <= 3
    assert canny_edges(torch.full((1, 3, 32, 32), torch.nan)).sum() == 0


def test_quantiles_of_a_histogram() -> None:
    ramp = torch.arange(256.0).div(255).reshape(1, 1, 1, 16, 16)
    expected = [(torch.arange(1, 257) / 256 - u).abs().argmin().item() for u in torch.linspace(0, 1, 256).double()]
    assert histogram_quantiles(ramp)[0, 0, 0].tolist() == expected


@pytest.mark.parametrize("form", [losses.bilateral_loss, losses.contextual_loss])
def test_context_losses_by_strips_equal_whole_matrices(form, monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(2, 6, 9, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    theirs = torch.randn(2, 6, 9, 7, generator=generator, dtype=torch.float64)
    monkeypatch.setattr(losses, "ROWS", 1000)
    whole = form(ours, theirs)
    (expected,) = torch.autograd.grad(whole, ours)
    monkeypatch.setattr(losses, "ROWS", 8)
    strips = form(ours, theirs)
    (gradient,) = torch.autograd.grad(strips, ours)
    torch.testing.assert_close(strips, whole)
    torch.testing.assert_close(gradient, expected)
    assert torch.autograd.gradcheck(lambda x: form(x, theirs), ours, fast_mode=True)


def test_context_losses_know_a_perfect_match() -> None:
    features = torch.randn(1, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    assert losses.bilateral_loss(features, features).item() == pytest.approx(0, abs=1e-6)
    assert losses.contextual_loss(features, features) < losses.contextual_loss(features, features.flip(3)) * 0.9


def test_centralised_gradients() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 3, 3, 3))
    weight.grad = torch.randn(4, 3, 3, 3) + 5
    losses.CentralizedAdam([weight]).step()
    assert weight.grad.mean((1, 2, 3)).abs().max() < 1e-5


def training(model: DiffHDR, steps: int) -> tuple[list[float], DiffHDR]:
    """A few steps of full recursion on one stack; the sum of all losses before each."""
    loss = losses.DiffHDRLoss()
    true = photographs(scene(32)) * 2 - 1
    target = ExposureStack(true, true, canny_edges(true))
    wanted = model.radiance(true)
    optimizer = losses.CentralizedAdam(model.parameters(), lr=2e-3)
    values = []
    for _ in range(steps):
        optimizer.zero_grad()
        stack = model(true[:, 3], target.edges[:, 3])
        total = torch.stack(list(loss(stack, target, model.radiance(stack.images), wanted).values())).sum()
        total.backward()
        values.append(total.item())
        if len(values) < steps:
            optimizer.step()
    return values, model


def test_a_few_steps_reduce_the_loss_and_reach_every_parameter(model: DiffHDR) -> None:
    values, model = training(model, 7)
    assert values[-1] < 0.8 * values[0], values
    for name, parameter in model.named_parameters():
        # A bias right before a norm has no effect.
        before_norm = re.search(
            r"decoder\.\d\.second\.bias|edge\.body\.encoder\.\d\.second\.bias|edge\.exit\.bias", name
        )
        assert parameter.grad is not None and (before_norm or parameter.grad.abs().max() > 0), name


def test_reference_backend_gives_the_same(monkeypatch) -> None:
    results = []
    for backend in (None, "reference"):
        monkeypatch.setattr(_backends, "_REQUESTED", backend)
        torch.manual_seed(0)
        model = models.create("diffhdr", **SMALL)
        values, model = training(model, 1)
        results.append((values[0], torch.cat([parameter.grad.flatten() for parameter in model.parameters()])))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-3, atol=1e-5)


def test_what_does_not_fit_is_refused(model: DiffHDR) -> None:
    image = torch.rand(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"multiples of 32, got shape \[1, 3, 40, 32\]"):
        model(torch.rand(1, 3, 40, 32))
    with pytest.raises(TypeError, match="floating point in"):
        model((image * 255).byte())
    with pytest.raises(ValueError, match="ev must be an integer from -3 to 3, got 4"):
        model(image, ev=4)
    with pytest.raises(ValueError, match=r"edge must be \[1, 1, 32, 32\], got shape \[1, 3, 32, 32\]"):
        model(image, image)
    with pytest.raises(ValueError, match="takes 1 frames, got 2"):
        model.predict(torch.rand(1, 2, 3, 32, 32))
    with pytest.raises(ValueError, match="unknown option depth"):
        models.create("diffhdr", depth=3)
    with pytest.raises(ValueError, match=r"stack must be \[N, P, 3, H, W\]"):
        HDRLayer()(torch.rand(1, 3, 4, 4), torch.zeros(3))
    with pytest.raises(ValueError, match="HDRLayer: log_exposures must be finite"):
        HDRLayer()(torch.rand(1, 2, 3, 4, 4), torch.tensor([0.0, torch.nan]))
    with pytest.raises(TypeError, match="HDRLayer: stack must be floating point"):
        HDRLayer()(torch.zeros(1, 2, 3, 4, 4, dtype=torch.uint8), torch.arange(2.0))
    with pytest.raises(TypeError, match="HDRLayer: stack and log_exposures must be tensors, got Tensor and list"):
        HDRLayer()(torch.rand(1, 2, 3, 4, 4), [0.0, 1.0])
    with pytest.raises(TypeError, match="diffhdr: image must be a tensor, got list"):
        model([image])
    with pytest.raises(TypeError, match="diffhdr: teacher must be an ExposureStack, got tuple"):
        model(image, teacher=(image, image, image))
    with pytest.raises(ValueError, match=r"ev must be an integer from -3 to 3, got 0\.0"):
        model(image, ev=0.0)
    with pytest.raises(ValueError, match="diffhdr: image must have pixels"):
        model(image[..., :0])
    for part in ("layer", "up"):
        with pytest.raises(ValueError, match=f"diffhdr: complexity is told of .*, not of '{part}'"):
            model.complexity(32, 32, part)
    with pytest.raises(ValueError, match="given together"):
        stack = model(image)
        losses.DiffHDRLoss()(stack, stack, radiance=image)


def test_prediction_of_any_size_is_finite_radiance(model: DiffHDR) -> None:
    radiance = model.predict(torch.rand(1, 1, 3, 45, 33))
    assert radiance.shape == (1, 3, 45, 33) and radiance.isfinite().all() and (radiance > 0).all()
    assert len(EVS) == 7 and hdrops.models.names()[-1] == "diffhdr"
