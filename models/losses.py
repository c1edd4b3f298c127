"""Losses that more than one system trains with. Images are linear radiance [N, C, H, W] unless said otherwise."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hdrops.camera import mu_law

NTIRE_GAMMA = 2.24


def mu_law_l1(prediction: Tensor, target: Tensor, mu: float = 5000.0) -> Tensor:
    """Mean absolute difference of mu-law tone-mapped images; below 0 the prediction counts as 0.

    The gradient of a negative prediction is that of the clamp: zero.
    """
    check_same_shape("mu_law_l1", prediction, target)
    return F.l1_loss(mu_law(prediction.clamp_min(0), mu), mu_law(target, mu))


def ntire_tonemap(encoded: Tensor, white: Tensor, mu: float = 5000.0) -> Tensor:
    """The tone mapping of the NTIRE HDR challenges: mu-law of tanh(x^2.24 / white).

    Args:
        encoded: gamma-encoded image; values below 1e-8 count as that, so that the slope stays finite.
        white: radiance that tanh takes for 1, broadcast; the challenge takes :func:`ntire_white` of the target.
        mu: of the mu-law.
    """
    return mu_law(torch.tanh(encoded.clamp_min(1e-8).pow(NTIRE_GAMMA) / white), mu)


def ntire_white(target: Tensor) -> Tensor:
    """The 99th percentile of the linearised target over each image: [N, 1, 1, 1], without a gradient."""
    linear = target.detach().clamp_min(0).pow(NTIRE_GAMMA).flatten(1).float()
    rank = math.ceil(0.99 * linear.shape[1])
    return linear.kthvalue(rank, dim=1).values.clamp_min(1e-8).reshape(-1, 1, 1, 1)


def log_compress(radiance: Tensor) -> Tensor:
    """log(1 + 10 x) / log 11, the tone mapping of SingleHDR and its successors."""
    return torch.log1p(10 * radiance) / math.log(11)


def rescale_to_mean(radiance: Tensor, mean: float = 0.5) -> Tensor:
    """Each image scaled to that mean over channels and pixels, differentiated through."""
    return mean * radiance / (1e-6 + radiance.mean((1, 2, 3), keepdim=True))


def check_same_shape(op: str, prediction: Tensor, target: Tensor) -> None:
    """Raises unless both have one shape: broadcasting would hide a mistake."""
    if prediction.shape != target.shape:
        raise ValueError(
            f"{op}: prediction and target must have one shape, got {list(prediction.shape)} and {list(target.shape)}"
        )
