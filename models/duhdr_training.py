"""Training of DuHDR: the losses by the paper's numbers, and Algorithms 1 and 2 as a list of phases.

N2(x) is the mean of x^2 over all elements. H is at the exposure of its photograph L, so that I_clip = min(1, H); I_n is
L before its quantisation, known where photographs are synthesised (HDR-Synth).

===== ======================= ============= ============================================ ========= ====== ==========
phase trained                 loss          input                                        data      lr     iterations
===== ======================= ============= ============================================ ========= ====== ==========
P1    Dnet                    Eq. 4         L                                            HDR-Synth 1e-4   500,000
P2    Dnet                    Eq. 5         L                                            HDR-Synth 1e-4   100,000
P3a   INnet                   Eq. 12        I_n                                          HDR-Synth 1e-4   100,000
P3b   Nnet                    Eq. 11        I_clip                                       HDR-Synth 1e-4   100,000
P4    INnet, Nnet, Dnet       Eq. 13        Dnet(L)                                      HDR-Real  1e-5   100,000
P5    ITnet                   Eq. 16        I_clip                                       HDR-Synth 1e-4   500,000
P6    ITnet                   Eq. 17-19     C(H), then C(H_hat) twice                    HDR-Real  1e-5   100,000
P7    OOnet                   Eq. 24        L                                            HDR-Real  1e-5   10,000
P8    all but Nnet            Eq. 24        L                                            HDR-Real  1e-5   converged
U1    Dnet                    Eq. 6         L                                            any       1e-5   converged
U2    INnet, Nnet             Eq. 14        Dnet(L)                                      any       1e-5   converged
U3    ITnet                   Eq. 18-20     INnet(Dnet(L))                               any       1e-5   converged
U4    OOnet                   Eq. 25        L                                            any       1e-5   converged
===== ======================= ============= ============================================ ========= ====== ==========

Adam, batches of 8 crops of 256. "Individual, then joint" training is one phase after the other over the whole data, as
in the published code, rather than two steps for each batch, as the algorithm may be read.

Eq. 6, 14 and 20 are smallest for networks that do nothing. The paper does not say what keeps the unpaired phases from
that; here each of the three steps takes a paired batch beside its unpaired one and adds the paired loss of the same
networks (its ``guard``: Eq. 5, 13, 17), unless the caller says otherwise.

The losses call the networks one by one: for DistributedDataParallel wrap a module whose ``forward`` is the loss of the
phase, after :func:`prepare`, so that only what is trained asks for gradients.

Losses compute in float32 or what autocast gives; log is log(x + 1/255), as in the published code.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hdrops
from hdrops.models.backbones import VGG
from hdrops.models.duhdr_networks import ITnet, check_image, vgg_input
from hdrops.models.losses import check_same_shape, log_compress

if TYPE_CHECKING:
    from hdrops.models.duhdr import DuHDR

BATCH_SIZE = 8
CROP = 256
_LOG_OFFSET = 1 / 255


@dataclass(frozen=True)
class Batch:
    """Images of one step, each [N, 3, H, W] floating point, H and W multiples of 32.

    Attributes:
        ldr: L, photographs in [0, 1].
        hdr: H, linear radiance at the photographs' exposure, mean about 0.5; None for unpaired photographs.
        nonlinear: I_n, the photographs before quantisation and JPEG; None where it is not known.
    """

    ldr: Tensor
    hdr: Tensor | None = None
    nonlinear: Tensor | None = None

    def __post_init__(self) -> None:
        for name, image in (("ldr", self.ldr), ("hdr", self.hdr), ("nonlinear", self.nonlinear)):
            if image is not None:
                check_image(f"duhdr: a batch's {name}", image, ITnet.MULTIPLE)
                if image.shape != self.ldr.shape:
                    raise ValueError(
                        f"duhdr: a batch's {name} must have ldr's shape {list(self.ldr.shape)}, got {list(image.shape)}"
                    )

    @property
    def radiance(self) -> Tensor:
        """H; raises ValueError where there is none."""
        if self.hdr is None:
            raise ValueError("duhdr: this loss compares with HDR images: the batch must have hdr, got None")
        return self.hdr

    @property
    def clipped(self) -> Tensor:
        """I_clip = min(1, H)."""
        return self.radiance.clamp(max=1)

    @property
    def clean(self) -> Tensor:
        """I_n; raises ValueError where it is not known."""
        if self.nonlinear is None:
            raise ValueError("duhdr: this loss needs photographs before quantisation: nonlinear, got None")
        return self.nonlinear


class Perceptual(nn.Module):
    """N2 of the differences of VGG16's pool1, pool2 and pool3 under a mask, added up (in Eq. 16).

    The images go through log(1 + 10 x) / log 11 first; the mask is averaged to the size of the features.

    Args:
        weights, convention, seed: as of :class:`hdrops.models.duhdr_networks.ITnet`.

    Shapes:
        prediction and target [N, 3, H, W], mask [N, 1, H, W] -> a scalar.
    """

    def __init__(self, weights: str | None = None, convention: str = "caffe", seed: int = 0) -> None:
        super().__init__()
        self.convention = convention
        self.vgg = VGG(16, ("pool1", "pool2", "pool3"), weights, seed)

    def forward(self, prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        check_same_shape("duhdr: the perceptual loss", prediction, target)
        with torch.no_grad():
            wanted = self._features(target)
        losses = []
        for level, (found, goal) in enumerate(zip(self._features(prediction), wanted, strict=True), 1):
            losses.append(((found - goal) * F.avg_pool2d(mask, 2**level)).square().mean())
        return torch.stack(losses).sum()

    def _features(self, radiance: Tensor) -> list[Tensor]:
        found: list[Tensor] = self.vgg(vgg_input(log_compress(radiance), self.convention))
        return found


def perceptual_loss(model: "DuHDR") -> Perceptual:
    """The perceptual loss that the model's configuration asks for, on the model's device."""
    config = model.config
    device = model.itnet.fuse.weight.device
    return Perceptual(config.vgg_weights, config.vgg_input, config.seed).to(device)


def _dequantized(model: "DuHDR", batch: Batch, found: Tensor) -> Tensor:
    """Eq. 4: N2(I_n_hat - I_n). Where I_n is not known it is Nnet's of the clipped HDR image, as the text has it."""
    if batch.nonlinear is not None:
        return F.mse_loss(found, batch.nonlinear)
    with torch.no_grad():
        wanted = model.nonlinear_net(batch.clipped)
    return F.mse_loss(found, wanted)


def _requantized(found: Tensor, ldr: Tensor) -> Tensor:
    """N2(Q(I_n_hat) - L), with Q's straight-through gradient: of Eq. 5 and 6."""
    return F.mse_loss(hdrops.quantize_ste(found), ldr)


def _dual_dequantization(model: "DuHDR", batch: Batch, found: Tensor) -> Tensor:
    return _dequantized(model, batch, found) + model.config.dn_dual * _requantized(found, batch.ldr)


def eq4(model: "DuHDR", batch: Batch, perceptual: nn.Module | None = None) -> Tensor:
    """Dnet alone: N2(Dnet(L) - I_n)."""
    return _dequantized(model, batch, model.dnet(batch.ldr))


def eq5(model: "DuHDR", batch: Batch, perceptual: nn.Module | None = None) -> Tensor:
    """Dnet with its dual: Eq. 4 + dn_dual N2(Q(Dnet(L)) - L)."""
    return _dual_dequantization(model, batch, model.dnet(batch.ldr))


def eq6(model: "DuHDR", batch: Batch, perceptual: nn.Module | None = None) -> Tensor:
    """Dnet, unpaired: N2(Q(Dnet(L)) - L)."""
    return _requantized(model.dnet(batch.ldr), batch.ldr)


def eq11(model: "DuHDR", batch: Batch, perceptual: nn.Module | None = None) -> Tensor:
    """Nnet alone: N2(Nnet(I_clip) - I_n)."""
    return F.mse_loss(model.nonlinear_net(batch.clipped), batch.clean)


def eq12(model: "DuHDR", batch: Batch, perceptual: nn.Module | None = None) -> Tensor:
    """INnet alone: N2(INnet(I_n) - I_clip)."""
    return F.mse_loss(model.innet(batch.clean), batch.clipped)


def eq13(model: "DuHDR", batch: Batch, perceptual: nn.Module | None = None) -> Tensor:
    """INnet and Nnet joined on Dnet's output: Eq. 12 + dnm_dual Eq. 11 + dnm_dn Eq. 5.

    Nnet's input is INnet's output, its target Dnet's. Dnet learns from the last term alone: the others take its output
    as given.
    """
    found = model.dnet(batch.ldr)
    given = found.detach()
    clipped = model.innet(given)
    linear = F.mse_loss(clipped, batch.clipped)
    dual = F.mse_loss(model.nonlinear_net(clipped), given)
    weights = model.config
    return linear + weights.dnm_dual * dual + weights.dnm_dn * _dual_dequantization(model, batch, found)


def eq14(model: "DuHDR", batch: Batch, perceptual: nn.Module | None = None) -> Tensor:
    """INnet and Nnet, unpaired: N2(Nnet(INnet(I_n_hat)) - I_n_hat), I_n_hat = Dnet(L) as given."""
    given = model.dnet(batch.ldr).detach()
    return F.mse_loss(model.nonlinear_net(model.innet(given)), given)


def _restoration(
    model: "DuHDR", restored: Tensor, mask: Tensor, radiance: Tensor, perceptual: nn.Module | None
) -> Tensor:
    """Eq. 16 of ITnet's output, with the mask of its input."""
    if perceptual is None:
        raise ValueError("duhdr: this loss compares features of VGG16: it must have perceptual, got None")
    logarithms = F.mse_loss(torch.log(restored + _LOG_OFFSET), torch.log(radiance + _LOG_OFFSET))
    features: Tensor = perceptual(restored, radiance, mask)
    return logarithms + model.config.prec * features


def eq16(model: "DuHDR", batch: Batch, perceptual: nn.Module | None = None) -> Tensor:
    """ITnet alone: N2(log H_hat - log H) + prec N2((vgg(H_hat) - vgg(H)) mask), H_hat = ITnet(I_clip)."""
    clipped = batch.clipped
    mask = model.itnet.mask(clipped)
    return _restoration(model, model.itnet(clipped), mask, batch.radiance, perceptual)


def eq17(model: "DuHDR", batch: Batch, perceptual: nn.Module | None = None) -> Tensor:
    """ITnet with its dual: Eq. 16 + itn_dual N2((C(H_hat) - I_clip)(1 - mask)), iterated (Eq. 18, 19) and added up.

    H_hat = ITnet(x), x = C(H) at first and then C of the H_hat before. Gradients flow through all iterations.
    """
    truncated, losses = hdrops.truncate(batch.radiance), []
    for _ in range(model.config.iterations):
        mask = model.itnet.mask(truncated)
        restored = model.itnet(truncated)
        truncated = hdrops.truncate(restored)
        well_exposed = ((truncated - batch.clipped) * (1 - mask)).square().mean()
        losses.append(_restoration(model, restored, mask, batch.radiance, perceptual))
        losses.append(model.config.itn_dual * well_exposed)
    return torch.stack(losses).sum()


def eq20(model: "DuHDR", batch: Batch, perceptual: nn.Module | None = None) -> Tensor:
    """ITnet, unpaired: N2(C(ITnet(x)) - I_clip_hat), x = I_clip_hat at first and then C(ITnet(x)), added up.

    I_clip_hat = INnet(Dnet(L)) as given.
    """
    given = model.innet(model.dnet(batch.ldr)).detach()
    truncated, losses = given, []
    for _ in range(model.config.iterations):
        truncated = hdrops.truncate(model.itnet(truncated))
        losses.append(F.mse_loss(truncated, given))
    return torch.stack(losses).sum()


def eq24(model: "DuHDR", batch: Batch, perceptual: nn.Module | None = None) -> Tensor:
    """All of the primary path: N2(H_oo - H)."""
    return F.mse_loss(model(batch.ldr).radiance, batch.radiance)


def eq25(model: "DuHDR", batch: Batch, perceptual: nn.Module | None = None) -> Tensor:
    """All, unpaired: N2(Q(Nnet(C(H_oo))) - L)."""
    return F.mse_loss(model.photograph(model(batch.ldr).radiance), batch.ldr)


Loss = Callable[["DuHDR", Batch, nn.Module | None], Tensor]


@dataclass(frozen=True)
class Phase:
    """A phase of training; see the table above.

    Attributes:
        name: "P1" ... "U4".
        trained: attributes of the model that are trained; the others are frozen.
        loss: takes the model, a batch and the perceptual loss or None.
        learning_rate: of Adam.
        iterations: of the paper's code; None until convergence.
        paired: whether its batches have HDR images.
        synthetic: whether its batches have ``nonlinear``.
        guard: name of the paired phase whose loss keeps an unpaired one from the trivial solution; None if none.
    """

    name: str
    trained: tuple[str, ...]
    loss: Loss
    learning_rate: float
    iterations: int | None
    paired: bool = True
    synthetic: bool = False
    guard: str | None = None


PHASES = (
    Phase("P1", ("dnet",), eq4, 1e-4, 500_000, synthetic=True),
    Phase("P2", ("dnet",), eq5, 1e-4, 100_000, synthetic=True),
    Phase("P3a", ("innet",), eq12, 1e-4, 100_000, synthetic=True),
    Phase("P3b", ("nnet",), eq11, 1e-4, 100_000, synthetic=True),
    Phase("P4", ("dnet", "innet", "nnet"), eq13, 1e-5, 100_000),
    Phase("P5", ("itnet",), eq16, 1e-4, 500_000),
    Phase("P6", ("itnet",), eq17, 1e-5, 100_000),
    Phase("P7", ("oonet",), eq24, 1e-5, 10_000),
    Phase("P8", ("dnet", "innet", "itnet", "oonet"), eq24, 1e-5, None),
    Phase("U1", ("dnet",), eq6, 1e-5, None, paired=False, guard="P2"),
    Phase("U2", ("innet", "nnet"), eq14, 1e-5, None, paired=False, guard="P4"),
    Phase("U3", ("itnet",), eq20, 1e-5, None, paired=False, guard="P6"),
    Phase("U4", ("oonet",), eq25, 1e-5, None, paired=False),
)
PARTS = ("dnet", "innet", "itnet", "oonet", "nnet")


def phase_named(name: str) -> Phase:
    """The phase of that name; raises ValueError, with the names, where there is none."""
    for found in PHASES:
        if found.name == name:
            return found
    raise ValueError(f"duhdr: phase must be one of {', '.join(one.name for one in PHASES)}, got {name!r}")


def prepare(model: "DuHDR", phase: Phase) -> torch.optim.Adam:
    """Sets the model up for a phase and makes its optimiser.

    What the phase trains asks for gradients and is in training mode; the rest does not and is in evaluation mode, so
    that its batch norms stay as they are.
    """
    parameters: list[nn.Parameter] = []
    for name in PARTS:
        part = getattr(model, name)
        if part is None:
            if name in phase.trained:
                raise ValueError(f"duhdr: phase {phase.name} trains {name}, and the model was made without it")
            continue
        part.train(name in phase.trained).requires_grad_(name in phase.trained)
        parameters += part.parameters() if name in phase.trained else ()
    return torch.optim.Adam(parameters, phase.learning_rate)


def step(
    model: "DuHDR",
    phase: Phase,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    perceptual: nn.Module | None = None,
    paired: Batch | None = None,
    guarded: bool = True,
) -> Tensor:
    """One step of a phase: loss, gradients, update.

    Args:
        model: as :func:`prepare` left it.
        phase: of :data:`PHASES`.
        optimizer: of :func:`prepare`.
        batch: photographs, with HDR images where the phase is paired.
        perceptual: :func:`perceptual_loss` of the model, for P5, P6, and U3 with its guard.
        paired: a paired batch, for the guard of U1, U2 and U3.
        guarded: False leaves the guard away: then stop early.

    Returns:
        The loss, a scalar without a graph; the guard's is in it.

    Raises:
        ValueError: what the phase needs is missing.

    Example:
        >>> import torch, hdrops.models
        >>> from hdrops.models import duhdr_training as training
        >>> model = hdrops.models.create("duhdr")
        >>> phase = training.phase_named("P7")
        >>> optimizer = training.prepare(model, phase)
        >>> batch = training.Batch(torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64))
        >>> training.step(model, phase, optimizer, batch).isfinite()
        tensor(True)
    """
    if phase.guard is not None and guarded and paired is None:
        raise ValueError(
            f"duhdr: the loss of phase {phase.name} is smallest for networks that do nothing: give a paired batch for "
            f"its guard, phase {phase.guard}, or guarded=False and stop early"
        )
    loss = phase.loss(model, batch, perceptual)
    if phase.guard is not None and guarded and paired is not None:
        loss = loss + phase_named(phase.guard).loss(model, paired, perceptual)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()
