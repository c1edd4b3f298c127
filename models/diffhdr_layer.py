"""The differentiable HDR layer of DiffHDR: an exposure stack in, its response curve and radiance out. No parameters.

The response is solved for and then held constant (OP-9); every frame's codes are looked up in it, with the finite
difference of the curve as the slope (OP-8), and merged in logarithms (OP-10). So a loss on the radiance reaches the
pixels of the stack, which is what keeps a generated stack consistent with one camera.
"""

import torch
from torch import Tensor, nn

from hdrops import crf_lookup
from hdrops.camera import solve_debevec
from hdrops.models._system import at_least_float32

LEVELS = 256
# Curve values at or below zero count as this, before the logarithm.
_SMALLEST = 1e-7
# A pixel with less weight than this in any channel takes one frame's estimate.
_NO_WEIGHT = 1e-4


class HDRLayer(nn.Module):
    """Radiance of an exposure stack, differentiable to its pixels (Kim et al. 2021, section 3.1, equations 1 to 3).

    Where all weights of a pixel vanish in a channel, all its channels come from the shortest exposure if the middle one
    is bright there, and from the longest if it is dark.

    Args:
        smoothness: lambda of the response's second differences.
        gradient_scale: slope of a lookup per finite difference of the curve; 1 as the paper prints it, whose
            intensities are codes, or 255, the slope to pixels in [0, 1].

    Shapes:
        stack [N, P, 3, H, W] in [0, 1], clamped to it, in any order; log_exposures [P], natural logarithms of seconds
        -> radiance [N, 3, H, W], and curve [N, 3, 256], relative exposure per code, the largest of the last channel 1.

    The curve is solved in float64; the rest computes in float32, or in float64 for a stack of that type, also under
    autocast.

    Raises:
        ValueError: other shapes, exposures that are not finite, or a stack in which nothing fixes a curve, such as one
            of black frames alone (:func:`hdrops.camera.solve_debevec`).
        TypeError: no tensors, or a stack that is not floating point.

    Example:
        >>> import torch
        >>> from hdrops.models.diffhdr_layer import HDRLayer
        >>> scene = torch.rand(1, 1, 3, 32, 32)
        >>> times = torch.tensor([0.5, 1.0, 2.0])
        >>> stack = (scene * times.view(1, 3, 1, 1, 1)).clamp(0, 1) ** (1 / 2.2)
        >>> radiance, curve = HDRLayer()(stack, times.log())
        >>> radiance.shape, curve.shape
        (torch.Size([1, 3, 32, 32]), torch.Size([1, 3, 256]))
    """

    def __init__(self, smoothness: float = 20.0, gradient_scale: float = 1.0) -> None:
        super().__init__()
        self.smoothness = smoothness
        self.gradient_scale = gradient_scale

    def forward(self, stack: Tensor, log_exposures: Tensor) -> tuple[Tensor, Tensor]:
        if not isinstance(stack, Tensor) or not isinstance(log_exposures, Tensor):
            raise TypeError(
                "HDRLayer: stack and log_exposures must be tensors, got "
                f"{type(stack).__name__} and {type(log_exposures).__name__}"
            )
        if not stack.is_floating_point():
            raise TypeError(f"HDRLayer: stack must be floating point in [0, 1], got {stack.dtype}")
        if stack.dim() != 5 or stack.shape[2] != 3 or log_exposures.shape != stack.shape[1:2]:
            raise ValueError(
                f"HDRLayer: stack must be [N, P, 3, H, W] with log_exposures [P], got {list(stack.shape)} and "
                f"{list(log_exposures.shape)}"
            )
        if not bool(log_exposures.isfinite().all()):
            raise ValueError(f"HDRLayer: log_exposures must be finite, got {log_exposures.tolist()}")
        # The solve and the logarithms are wide also under autocast.
        with torch.autocast(stack.device.type, enabled=False):
            stack = at_least_float32(stack).clamp(0, 1)
            log_exposures = log_exposures.to(stack)
            curve = self.response(stack.detach(), log_exposures)
            return self.merge(stack, log_exposures, curve), curve

    def response(self, stack: Tensor, log_exposures: Tensor) -> Tensor:
        """The inverse response [N, 3, 256] of the stack, from quantiles of its histograms.

        Quantiles correspond between exposures whether or not their pixels do (Grossberg and Nayar 2003). Each channel
        is scaled to be 1 at the middle code, which makes that grey; then all by the largest value of the last.
        """
        samples = histogram_quantiles(stack).permute(0, 3, 1, 2)
        log_curve, _ = solve_debevec(
            samples, log_exposures.double(), smoothness=self.smoothness, weight="hat", levels=LEVELS
        )
        curve = log_curve.mT.exp()
        curve = curve / curve[..., LEVELS // 2 - 1, None]
        return (curve / curve[:, -1:].amax(-1, keepdim=True)).to(stack.dtype)

    def merge(self, stack: Tensor, log_exposures: Tensor, curve: Tensor) -> Tensor:
        """Weighted mean of the frames' logarithms of radiance [N, 3, H, W], exponentiated (OP-10)."""
        frames = stack.transpose(1, 2)  # [N, 3, P, H, W]: a curve for each image and channel
        found = crf_lookup(frames.contiguous(), curve, mode="nearest", gradient_scale=self.gradient_scale)
        estimates = found.clamp_min(_SMALLEST).log() - log_exposures.view(1, 1, -1, 1, 1)
        weights = 2 * torch.minimum(frames, 1 - frames).detach()
        total = weights.sum(2)
        merged = (weights * estimates).sum(2) / (total + 1e-9)
        order = log_exposures.argsort()
        shortest, longest = (estimates.index_select(2, order[[end]]).squeeze(2) for end in (0, -1))
        bright = frames.index_select(2, order[[len(order) // 2]]).squeeze(2).detach().mean(1, keepdim=True) > 0.5
        unseen = (total <= _NO_WEIGHT).any(1, keepdim=True)
        return torch.where(unseen, torch.where(bright, shortest, longest), merged).exp()


def histogram_quantiles(stack: Tensor) -> Tensor:
    """Codes [N, P, 3, 256] at 256 equal steps of each image's cumulative histogram: int64 in 0..255.

    For the share u the code whose cumulative share is nearest to u, the first of equals.
    """
    n, frames, channels = stack.shape[:3]
    # NaN, which has no code, counts as black here; as an index it would lie outside of the table.
    codes = (stack.flatten(3).nan_to_num() * (LEVELS - 1)).round().long()
    counts = torch.zeros(n, frames, channels, LEVELS, dtype=torch.float64, device=stack.device)
    counts.scatter_add_(3, codes, torch.ones((), dtype=torch.float64, device=stack.device).expand(codes.shape))
    share = counts.cumsum(3) / codes.shape[3]
    wanted = torch.linspace(0, 1, LEVELS, dtype=torch.float64, device=stack.device)
    return (share.unsqueeze(-2) - wanted.view(-1, 1)).abs().argmin(-1)
