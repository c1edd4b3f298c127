"""Operations on sampled curves: monotone repair, inversion, resampling. All are differentiable."""

import torch
from torch import Tensor


def _check_curve(name: str, curve: Tensor) -> None:
    if not curve.is_floating_point():
        raise TypeError(f"{name}: curve must be floating point, got {curve.dtype}")
    if curve.dim() < 1 or curve.shape[-1] < 2:
        raise ValueError(f"{name}: curve must be [..., L] with L >= 2, got shape {list(curve.shape)}")


def monotone_repair(curve: Tensor) -> Tensor:
    """Makes curves rise from 0 to 1: steps are lifted until none is negative, then scaled to sum to 1 (DuHDR's repair).

    With s the differences of ``curve`` and r = max(0, -min s): result = [0, cumsum((s + r) / sum(s + r))].

    Args:
        curve: [..., L], any values.

    Returns:
        [..., L] non-decreasing, first value 0, last 1 up to rounding. A constant curve gives the straight line.

    Gradients:
        To ``curve``; that of the minimum goes to the first smallest step.
    """
    _check_curve("monotone_repair", curve)
    steps = curve.diff(dim=-1)
    smallest = steps.gather(-1, steps.detach().argmin(-1, keepdim=True))
    lifted = steps + torch.relu(-smallest)
    total = lifted.sum(-1, keepdim=True)
    share = torch.where(total > 0, lifted / torch.where(total > 0, total, 1), 1 / steps.shape[-1])
    return torch.nn.functional.pad(share.cumsum(-1), (1, 0))


def monotone_from_middle(curve: Tensor) -> Tensor:
    """Flattens the falling stretches of [..., L]: running maximum above the middle, running minimum below it.

    Monotone curves stay as they are. The value at L // 2 stays, so a curve anchored there keeps its anchor.
    """
    _check_curve("monotone_from_middle", curve)
    middle = curve.shape[-1] // 2
    below = curve[..., : middle + 1].flip(-1).cummin(-1).values.flip(-1)
    above = curve[..., middle:].cummax(-1).values
    return torch.cat((below, above[..., 1:]), -1)


def invert_curve(curve: Tensor, levels: int | None = None) -> Tensor:
    """Inverse of non-decreasing, piecewise linear curves.

    ``curve`` [..., L] holds y(x) at L equal steps of x from 0 to 1. The result holds, at ``levels`` equal steps of y
    from curve[..., 0] to curve[..., -1], the smallest x that reaches y: on a flat stretch its left end. So the inverse
    of a camera response (exposure to code, both from 0 to 1) is its inverse response, and the other way round.

    Args:
        curve: [..., L], finite; where it falls it is read as its running maximum.
        levels: samples of the inverse; None keeps L.

    Returns:
        [..., levels] in [0, 1], non-decreasing, same dtype. A constant curve gives 0 everywhere.

    Gradients:
        To ``curve``, piecewise: that of the segment each sample falls in, one-sided at a knot.

    Example:
        >>> import torch
        >>> from hdrops.camera import invert_curve
        >>> invert_curve(torch.tensor([0.0, 0.5, 0.5, 1.0]), levels=5)
        tensor([0.0000, 0.1667, 0.3333, 0.8333, 1.0000])
    """
    _check_curve("invert_curve", curve)
    length = curve.shape[-1]
    levels = length if levels is None else levels
    if levels < 2:
        raise ValueError(f"invert_curve: levels must be at least 2, got {levels}")
    rising = curve.cummax(-1).values
    share = torch.linspace(0, 1, levels, dtype=curve.dtype, device=curve.device)
    # A mean weighted both ways meets both ends exactly.
    wanted = rising[..., :1] * (1 - share) + rising[..., -1:] * share
    upper = torch.searchsorted(rising.detach().contiguous(), wanted.detach().contiguous()).clamp(max=length - 1)
    lower = (upper - 1).clamp_min(0)
    start, end = rising.gather(-1, lower), rising.gather(-1, upper)
    within = end > start
    fraction = torch.where(within, (wanted - start) / torch.where(within, end - start, 1), 0)
    return (lower + fraction).clamp(0, length - 1) / (length - 1)


def resample_curve(curve: Tensor, levels: int) -> Tensor:
    """Curves [..., L] read at ``levels`` equal steps over the same range, linearly: [..., levels]."""
    _check_curve("resample_curve", curve)
    if levels == curve.shape[-1]:
        return curve
    flat = curve.reshape(1, -1, curve.shape[-1])
    read = torch.nn.functional.interpolate(flat, size=levels, mode="linear", align_corners=True)
    return read.view(*curve.shape[:-1], levels)
