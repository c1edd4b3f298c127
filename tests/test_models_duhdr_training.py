"""Training of DuHDR: its losses by hand, its phases, and that each of them learns what it should."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import hdrops
from duhdr_cases import smooth, system
from hdrops.models import duhdr
from hdrops.models import duhdr_training as training

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> duhdr.DuHDR:
    return system()


@pytest.fixture(scope="module")
def perceptual(model: duhdr.DuHDR) -> training.Perceptual:
    return training.perceptual_loss(model)


def pair(number: int = 1, size: int = 64) -> training.Batch:
    """Smooth photographs of a camera with gamma 2.2, and the HDR images that they show up to white."""
    radiance = smooth(1.7, size, size, number).square()
    clean = radiance.clamp(max=1) ** (1 / 2.2)
    return training.Batch((255 * clean).round() / 255, radiance, clean)


# --- Losses, with networks that are known functions -----------------------------------------------------------------


def _networks(**networks: Callable[..., Tensor]) -> SimpleNamespace:
    """A system of given functions; the others are identities."""
    names = ("dnet", "innet", "itnet", "nonlinear_net")
    parts = {name: networks.get(name, lambda image: image) for name in names}
    itnet = parts["itnet"]
    parts["itnet"] = lambda image: itnet(image)
    parts["itnet"].mask = lambda image: duhdr.ITnet.mask(SimpleNamespace(alpha=0.95), image)
    return SimpleNamespace(config=duhdr.DuHDRConfig(), **parts)


def _squares(image: Tensor) -> Tensor:
    return image.square().mean()


def test_dequantisation() -> None:
    batch = pair()
    model = _networks(dnet=lambda image: image + 0.003)
    individual = _squares(batch.ldr + 0.003 - batch.clean)
    dual = _squares(hdrops.quantize_ste(batch.ldr + 0.003) - batch.ldr)
    assert dual > 0
    torch.testing.assert_close(training.eq4(model, batch), individual)
    torch.testing.assert_close(training.eq5(model, batch), individual + 10 * dual)
    torch.testing.assert_close(training.eq6(model, batch), dual)
    without = training.Batch(batch.ldr, batch.hdr)  # then Nnet's output is the target, as the text has it
    model = _networks(nonlinear_net=lambda image: 0.5 * image)
    torch.testing.assert_close(training.eq4(model, without), _squares(batch.ldr - 0.5 * batch.hdr.clamp(max=1)))


def test_nonlinear_mapping() -> None:
    batch = pair()
    clipped = batch.hdr.clamp(max=1)
    model = _networks(
        dnet=lambda image: 0.9 * image, innet=lambda image: image**2, nonlinear_net=lambda image: image / 2
    )
    torch.testing.assert_close(training.eq11(model, batch), _squares(clipped / 2 - batch.clean))
    torch.testing.assert_close(training.eq12(model, batch), _squares(batch.clean**2 - clipped))
    found = 0.9 * batch.ldr
    linear, dual = _squares(found**2 - clipped), _squares(found**2 / 2 - found)
    expected = linear + 0.01 * dual + 0.005 * training.eq5(model, batch)
    torch.testing.assert_close(training.eq13(model, batch), expected)
    torch.testing.assert_close(training.eq14(model, batch), dual)


def test_inverse_truncation() -> None:
    batch = pair()
    clipped, radiance = batch.hdr.clamp(max=1), batch.hdr
    seen = []

    def perceptual(found: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        seen.append((found, target, mask))
        return found.mean()

    model = _networks(itnet=lambda image: 1.1 * image)
    mask = ((clipped.amax(1, keepdim=True) - 0.95) / 0.05).clamp(0, 1)
    expected = _squares((1.1 * clipped + 1 / 255).log() - (radiance + 1 / 255).log()) + 0.001 * 1.1 * clipped.mean()
    torch.testing.assert_close(training.eq16(model, batch, perceptual), expected)
    torch.testing.assert_close(seen[0], (1.1 * clipped, radiance, mask))

    truncated, expected, unpaired, given = hdrops.truncate(radiance), 0, 0, batch.ldr
    for _ in range(3):
        restored = 1.1 * truncated
        mask = ((truncated.amax(1, keepdim=True) - 0.95) / 0.05).clamp(0, 1)
        truncated = hdrops.truncate(restored)
        expected += _squares((restored + 1 / 255).log() - (radiance + 1 / 255).log()) + 0.001 * restored.mean()
        expected += 10 * _squares((truncated - clipped) * (1 - mask))
        given = hdrops.truncate(1.1 * given)
        unpaired += _squares(given - batch.ldr)
    torch.testing.assert_close(training.eq17(model, batch, perceptual), expected)
    torch.testing.assert_close(training.eq20(model, batch), unpaired)


def test_networks_that_do_nothing_satisfy_the_unpaired_losses_alone() -> None:
    batch = pair()
    model = _networks()
    assert training.eq6(model, batch) == 0 and training.eq14(model, batch) == 0
    assert training.eq5(model, batch) > 0 and training.eq13(model, batch) > 0


def test_perceptual_loss(perceptual: training.Perceptual) -> None:
    radiance, other, mask = (torch.rand(1, channels, 32, 32) for channels in (3, 3, 1))
    assert perceptual(radiance, radiance, mask) == 0
    assert perceptual(other, radiance, 0 * mask) == 0
    found = perceptual(other, radiance, torch.ones_like(mask))
    features = [perceptual._features(image) for image in (other, radiance)]
    torch.testing.assert_close(found, sum(_squares(one - two) for one, two in zip(*features, strict=True)))
    torch.testing.assert_close(perceptual(other, radiance, 0.5 * torch.ones_like(mask)), found / 4)
    assert [feature.shape[1] for feature in features[0]] == [64, 128, 256]
    with pytest.raises(ValueError, match="must have one shape"):
        perceptual(other, radiance[..., :16], mask)


def test_quantisation_lets_the_dual_loss_reach_dnet(model: duhdr.DuHDR) -> None:
    """The released code's quantisation stops every gradient; rounding here passes it on."""
    training.prepare(model, training.phase_named("U1"))
    gradients = torch.autograd.grad(model.loss(pair(), "U1"), list(model.dnet.parameters()))
    assert all(gradient.any() and gradient.isfinite().all() for gradient in gradients)


# --- Phases ---------------------------------------------------------------------------------------------------------

# Biases that a batch norm takes out again: their gradient is zero but for rounding.
_WITHOUT_GRADIENT = {"innet.trunk.conv1.bias", "nnet.trunk.conv1.bias", "itnet.bottom.0.bias", "itnet.out.0.bias"}


@pytest.mark.parametrize("phase", training.PHASES, ids=lambda phase: phase.name)
def test_each_phase_trains_its_networks_and_no_other(
    model: duhdr.DuHDR, perceptual: training.Perceptual, phase: training.Phase
) -> None:
    whole = pair()
    hdr, clean = whole.hdr if phase.paired else None, whole.nonlinear if phase.synthetic else None
    optimizer, batch = training.prepare(model, phase), training.Batch(whole.ldr, hdr, clean)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss = training.step(model, phase, optimizer, batch, perceptual=perceptual, guarded=False)
    assert loss.dim() == 0 and loss.isfinite() and not loss.requires_grad
    for name, parameter in model.named_parameters():
        if name.split(".")[0] not in phase.trained:
            assert parameter.grad is None, name
        elif name not in _WITHOUT_GRADIENT:
            assert parameter.grad is not None and parameter.grad.any() and parameter.grad.isfinite().all(), name
    for name, value in model.state_dict().items():
        if name.split(".")[0] not in phase.trained:
            assert torch.equal(value, before[name]), name
        elif name.endswith(("weight", "running_mean")):
            assert not torch.equal(value, before[name]), name
    model.zero_grad(set_to_none=True)


def test_phases_follow_both_algorithms() -> None:
    assert " ".join(phase.name for phase in training.PHASES) == "P1 P2 P3a P3b P4 P5 P6 P7 P8 U1 U2 U3 U4"
    for phase in training.PHASES:
        assert set(phase.trained) <= set(training.PARTS)
        assert phase.paired == (phase.name[0] == "P")
        if phase.guard is not None:
            guard = training.phase_named(phase.guard)
            assert guard.paired and set(phase.trained) <= set(guard.trained)
    assert [phase.name for phase in training.PHASES if phase.guard] == ["U1", "U2", "U3"]
    assert "nnet" not in training.phase_named("P8").trained


def test_the_guard_adds_a_paired_loss(model: duhdr.DuHDR) -> None:
    phase = training.phase_named("U1")
    optimizer = training.prepare(model, phase)
    unpaired, paired = training.Batch(pair().ldr), pair()
    with pytest.raises(
        ValueError, match=r"phase U1 is smallest for networks that do nothing.*phase P2, or guarded=False"
    ):
        training.step(model, phase, optimizer, unpaired)
    with torch.no_grad():
        expected = model.loss(unpaired, "U1") + model.loss(paired, "P2")
    torch.testing.assert_close(training.step(model, phase, optimizer, unpaired, paired=paired), expected)
    model.zero_grad(set_to_none=True)


def test_it_learns_a_small_batch() -> None:
    """Algorithm 1 in small: some phases after each other, each lowers its loss."""
    model, batch = duhdr.DuHDR(), pair()
    for name, rate, steps in (("P1", 1e-4, 5), ("P3a", 3e-5, 6), ("P3b", 3e-5, 6), ("P8", 1e-4, 3)):
        phase = training.phase_named(name)
        optimizer = training.prepare(model, phase)
        optimizer.param_groups[0]["lr"] = rate
        losses = [training.step(model, phase, optimizer, batch).item() for _ in range(steps)]
        assert losses[-1] < 0.9 * losses[0], (name, losses)


def test_what_is_missing_is_named(model: duhdr.DuHDR) -> None:
    paired, ldr = pair(), pair().ldr
    for call, words in (
        (lambda: model.loss(training.Batch(ldr), "P8"), "the batch must have hdr, got None"),
        (lambda: model.loss(training.Batch(ldr, paired.hdr), "P3a"), "photographs before quantisation: nonlinear"),
        (lambda: model.loss(paired, "P5"), "it must have perceptual, got None"),
        (lambda: model.loss(paired, "P9"), "phase must be one of P1, P2, .*U4, got 'P9'"),
        (lambda: training.Batch(ldr, paired.hdr[..., :32]), r"batch's hdr must have ldr's shape \[1, 3, 64, 64\], got"),
        (lambda: training.Batch(ldr[..., :40]), "batch's ldr: height and width must be positive multiples of 32"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match=r"batch's hdr: the image must be floating point, got torch\.uint8"):
        training.Batch(ldr, ldr.byte())
    slim = SimpleNamespace(dnet=model.dnet, innet=model.innet, itnet=model.itnet, oonet=model.oonet, nnet=None)
    with pytest.raises(ValueError, match="phase P3b trains nnet, and the model was made without it"):
        training.prepare(slim, training.phase_named("P3b"))
    with pytest.raises(ValueError, match="made with secondary=False"):
        duhdr.DuHDR.nonlinear_net.fget(slim)
