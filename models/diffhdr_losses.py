"""What DiffHDR is trained with: its losses (equations 4 to 7), the contextual bilateral loss, and its optimiser.

The contextual bilateral loss compares every feature of one image with every feature of another. The matrix of distances
has (H W)^2 entries: 64 MiB at relu3_4 of a 256 x 256 photograph, and half a dozen such matrices with their gradients.
Here a strip of rows stands in memory at a time (:data:`ROWS`, 4 MiB a matrix there), forward and backward.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hdrops import value_histogram
from hdrops.models.backbones import VGG, imagenet_normalize
from hdrops.models.diffhdr import ExposureStack
from hdrops.models.losses import check_same_shape, mu_law_l1

# Features of the prediction whose distances to all of the target's are in memory at once.
ROWS = 256
# Keeps a division by the distance of a perfect match, and the logarithm of no similarity, finite.
_EPSILON = 1e-5


@dataclass(frozen=True)
class LossWeights:
    """lambda_1 ... lambda_6 of equations 4 to 6, as the public code has them; the paper's print is garbled."""

    tone: float = 1.0
    histogram: float = 0.01
    edge: float = 1.0
    image: float = 1.0
    radiance: float = 1.0
    context: float = 0.1


class DiffHDRLoss(nn.Module):
    """The losses of the three networks of a stack, by name.

    * ``tone``: lambda_1 L1 + lambda_2 L_hist of the tones (equation 4);
    * ``edge``: lambda_3 L1 of the edge maps (equation 5);
    * ``refine``: lambda_4 L1 + lambda_5 L_HDR + lambda_6 L_CoBi of the images and their radiance (equations 6 and 7).

    Each is for its own networks in the public code; L_HDR, which reaches all of them through the recursion, trains all.
    L_HDR has the mu-law's normalisation 1/log(1 + mu), which equation 7 leaves out.

    Args:
        vgg_weights: of VGG19, see :class:`hdrops.models.backbones.VGG`; None starts it at random.
        weights: lambda_1 ... lambda_6.
        mu: of L_HDR: 5000 in the paper, 100 in its code.
        context: "bilateral" for the paper's equation 7, "contextual" for its code's form.

    Shapes:
        prediction and target: :class:`hdrops.models.diffhdr.ExposureStack`; radiance and target_radiance [N, 3, H, W],
        or None to leave L_HDR out -> a dict of scalars.
    """

    def __init__(
        self,
        vgg_weights: str | None = None,
        weights: LossWeights | None = None,
        mu: float = 5000.0,
        context: str = "bilateral",
    ) -> None:
        super().__init__()
        if context not in _CONTEXT:
            raise ValueError(f"DiffHDRLoss: context must be one of {', '.join(_CONTEXT)}, got {context!r}")
        self.weights = weights or LossWeights()
        self.mu = mu
        self.context = _CONTEXT[context]
        self.vgg = VGG(19, ["relu3_4", "relu4_4"], vgg_weights)

    def forward(
        self,
        prediction: ExposureStack,
        target: ExposureStack,
        radiance: Tensor | None = None,
        target_radiance: Tensor | None = None,
    ) -> dict[str, Tensor]:
        for name, ours, theirs in zip(ExposureStack._fields, prediction, target, strict=True):
            check_same_shape(f"DiffHDRLoss {name}", ours, theirs)
        if (radiance is None) != (target_radiance is None):
            raise ValueError("DiffHDRLoss: radiance and target_radiance must be given together")
        w = self.weights
        tone = w.tone * F.l1_loss(prediction.tones, target.images)
        tone = tone + w.histogram * histogram_loss(prediction.tones.flatten(0, 1), target.images.flatten(0, 1))
        refine = w.image * F.l1_loss(prediction.images, target.images)
        refine = refine + w.context * self.context_loss(prediction.images.flatten(0, 1), target.images.flatten(0, 1))
        if radiance is not None and target_radiance is not None:
            refine = refine + w.radiance * mu_law_l1(radiance, target_radiance, self.mu)
        return {"tone": tone, "edge": w.edge * F.l1_loss(prediction.edges, target.edges), "refine": refine}

    def context_loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """The sum over both layers of VGG19; images [N, 3, H, W] in [-1, 1]."""
        features = zip(self._features(images), self._features(targets), strict=True)
        return torch.stack([self.context(ours, theirs.detach()) for ours, theirs in features]).sum()

    def _features(self, images: Tensor) -> Sequence[Tensor]:
        found: list[Tensor] = self.vgg(imagenet_normalize((images + 1) / 2))
        return found


def histogram_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """L_hist of equation 4: mean difference of the value-weighted histograms of images [N, 3, H, W] in [-1, 1]."""
    return F.l1_loss(value_histogram(prediction), value_histogram(target))


def bilateral_loss(features: Tensor, targets: Tensor, spatial_weight: float = 0.1) -> Tensor:
    """The contextual bilateral loss as the paper prints it: mean over i of min_k (D_ik + w_s D'_ik) (equation 7).

    Args:
        features: [N, C, H, W], of the prediction.
        targets: [N, C, H, W]; no gradient.
        spatial_weight: w_s.

    D is the cosine distance of features centred by the target's mean, D' the squared distance of places in units of the
    image's sides. The gradient of a minimum is that of its smallest entry, so only those are computed twice: first the
    search, strip by strip and without a gradient, then the distances of the pairs it found.
    """
    ours, theirs, places = _directions(features, targets)
    with torch.no_grad():
        best = torch.cat(
            [
                (_distances(ours[:, rows], theirs) + spatial_weight * _spread(places[rows], places)).argmin(-1)
                for rows in _strips(ours.shape[1])
            ],
            1,
        )
    matched = theirs.gather(1, best.unsqueeze(-1).expand(-1, -1, theirs.shape[2]))
    apart = (places - places[best]).square().sum(-1)
    return (1 - (ours * matched).sum(-1) + spatial_weight * apart).mean()


def contextual_loss(features: Tensor, targets: Tensor, spatial_weight: float = 0.1, bandwidth: float = 0.5) -> Tensor:
    """The form of the public code: contextual similarities of features and of places, mixed, and their best logarithm.

    A row of distances d becomes similarities softmax_j((1 - d / (min_j d + eps)) / h); loss = -log(mean_i max_j ((1 -
    w_s) cx + w_s cx')). The code passes the bandwidth where it means w_s, so that its w_s is 0.5 in effect.
    """
    ours, theirs, places = _directions(features, targets)

    def best(ours: Tensor, theirs: Tensor, here: Tensor, places: Tensor) -> Tensor:
        alike = _similarities(_distances(ours, theirs), bandwidth)
        near = _similarities(_spread(here, places).expand_as(alike), bandwidth)
        return ((1 - spatial_weight) * alike + spatial_weight * near).amax(-1)

    found = torch.cat(
        [
            checkpoint(best, ours[:, rows], theirs, places[rows], places, use_reentrant=False)
            for rows in _strips(ours.shape[1])
        ],
        1,
    )
    return -(found.mean(1) + _EPSILON).log().mean()


_CONTEXT: dict[str, Callable[..., Tensor]] = {"bilateral": bilateral_loss, "contextual": contextual_loss}


def _directions(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors [N, HW, C] of both, centred by the target's mean, and the places [HW, 2] of their pixels."""
    check_same_shape("contextual bilateral loss", features, targets)
    height, width = features.shape[2:]
    mean = targets.mean((0, 2, 3), keepdim=True)
    ours, theirs = (F.normalize((x - mean).flatten(2).mT, dim=-1) for x in (features, targets))
    rows = torch.arange(height, device=features.device, dtype=features.dtype) / (height + 1)
    columns = torch.arange(width, device=features.device, dtype=features.dtype) / (width + 1)
    return ours, theirs, torch.cartesian_prod(rows, columns).reshape(-1, 2)


def _strips(count: int) -> list[slice]:
    return [slice(start, start + ROWS) for start in range(0, count, ROWS)]


def _distances(ours: Tensor, theirs: Tensor) -> Tensor:
    return (1 - ours @ theirs.mT).clamp_min(0)


def _spread(here: Tensor, places: Tensor) -> Tensor:
    return (here.unsqueeze(1) - places.unsqueeze(0)).square().sum(-1)


def _similarities(distances: Tensor, bandwidth: float) -> Tensor:
    relative = distances / (distances.amin(-1, keepdim=True) + _EPSILON)
    return ((1 - relative) / bandwidth).softmax(-1)


class CentralizedAdam(torch.optim.Adam):
    """Adam on centralised gradients (Yong et al., ECCV 2020), the paper's optimiser.

    Weight decay is added to the gradient, the mean over all but the first dimension is taken out of that of
    convolutions, and Adam does the rest. The defaults are the paper's rate and momenta and its code's decay.
    """

    def __init__(
        self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.5, 0.999), decay: float = 5e-5
    ) -> None:
        super().__init__(params, lr=lr, betas=betas)
        self.decay = decay

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; ``closure`` computes the gradients anew first, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    gradient = parameter.grad.add_(parameter, alpha=self.decay)
                    if gradient.dim() == 4:
                        gradient.sub_(gradient.mean((1, 2, 3), keepdim=True))
        super().step()
        return loss
