"""merge_exposures: a bracket of photographs to one radiance map (OP-10)."""

from typing import Any

import torch
from torch import Tensor

from hdrops import _backends
from hdrops.ops import _common
from hdrops.reference import merge_exposures as _reference

_CAN_RUN: dict[str, _backends.CanRun] = {
    "cpu": _backends.can_run_cpu,
    "cuda": _backends.can_run_cuda,
    "reference": _backends.can_run_reference,
}


def merge_exposures(
    stack: Tensor,
    log_exposures: Tensor,
    curve: Tensor | None = None,
    *,
    weight: str | Tensor = "hat",
    mask: Tensor | None = None,
    fallback: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Merges the frames of a bracket into radiance, in the log domain.

    For each pixel and channel, over the frames j with readings z_j and exposure times t_j::

        ln E = sum_j m_j w(z_j) (ln g(z_j) - ln t_j) / (sum_j m_j w(z_j) + 1e-9)

    Args:
        stack: frames [N, P, C, H, W], P >= 1, in any order. Floating (float32, float64, bfloat16, float16) readings
            in [0, 1], clamped; or uint8, uint16 codes. Frames stored planar or interleaved (``[N, P, H, W, C]`` memory,
            as photographs read from files are) are read where they are; another layout is copied.
        log_exposures: natural logarithm of the exposure times in seconds [N or 1, P], floating, finite.
        curve: inverse response, the relative exposure g of each reading: [L] or [N or 1, C or 1, L] over [0, 1],
            floating. Integer codes take their own entry where L is the number of codes (256, 65536); everything else is
            interpolated linearly. Entries that are not positive count as 1e-7. None: linear, g(z) = z.
        weight: ``"hat"``, 2 min(z, 1 - z); ``"debevec"``, min(z, max - z) of the codes scaled to [0, 1], which is the
            same function; ``"uniform"``; or a non-negative table [L], read as ``curve`` is.
        mask: [N or 1, P, 1, H, W]; a bool one excludes a frame's pixel where it is True; a floating one multiplies its
            weight, 0 excludes. A pixel excluded in every frame is merged as if in none.
        fallback: where the weights sum to 1e-4 or less (clipped in every frame), take the estimate of one frame: the
            shortest if the middle frame by exposure reads above one half, else the longest. Masked frames do not count;
            of an even number the shorter middle one decides. False: the formula as it stands, 1 where no weight is.
        backend: ``"cpu"``, ``"cuda"``, ``"reference"`` or None for the best that can run.

    Returns:
        Radiance [N, C, H, W], channels last in memory if the frames are interleaved. Its dtype is the stack's; float32
        for integer codes, or float64 if ``curve`` is. It is positive and finite for readings that are numbers,
        saturating where the dtype ends. It does not depend on the order of the frames, not in one bit: they are taken
        by exposure, and those of equal exposure by reading.

    A reading that is NaN counts as masked; one that is NaN in every frame gives NaN. On a GPU, where a look at the
    values would wait for the device, exposures that are not finite make their image NaN and weights that are negative
    or not finite make every image NaN; the CPU refuses both.

    **Gradients** reach ``stack`` (the slope of ``curve``; zero where clamped), ``log_exposures`` and ``curve`` (zero
    where an entry was replaced). **Weights and mask are constants**: no gradient flows through w(z), as in the paper,
    so the gradient is not the derivative of the whole formula unless ``weight="uniform"``. Where the fallback decides,
    gradients go to the frame that was taken. They are the same for any number of threads, and from call to call on a
    GPU.

    Under autocast a half precision stack is merged in float32, as ``exp`` and ``log`` are.

    Raises:
        ValueError: a shape, a weight's name or a value that breaks a rule above.
        TypeError: a dtype that is not listed.
        NotImplementedError: the backend cannot run the call; second derivatives or forward-mode AD outside of
            ``backend="reference"``.

    Example:
        >>> import math, torch, hdrops
        >>> frames = torch.tensor([[[[[64]]], [[[128]]], [[[255]]]]], dtype=torch.uint8)  # [1, 3, 1, 1, 1]
        >>> hdrops.merge_exposures(frames, torch.tensor([[0.25, 0.5, 1.0]]).log()).item()  # doctest: +ELLIPSIS
        1.003...

    Source: Debevec and Malik, "Recovering High Dynamic Range Radiance Maps from Photographs", 1997, equation 6; Kim et
    al., "End-to-End Differentiable Learning to HDR Image Synthesis for Multi-exposure Images", 2021, for the fallback.
    """
    op = "merge_exposures"
    _check(stack, log_exposures, curve, weight, mask)
    if not isinstance(fallback, bool):
        raise TypeError(f"{op}: fallback must be a bool, got {fallback!r}")
    if stack.dtype in _common.HALF_DTYPES and _common.autocast_dtype(stack) is not None:
        stack = stack.float()
    if _backends.choose(op, stack, backend, _CAN_RUN) == "reference":
        return _reference.merge_exposures(stack, log_exposures, curve, weight=weight, mask=mask, fallback=fallback)
    _common.refuse_functional_transforms(op, stack, log_exposures, curve)
    dtype = _reference.accumulation_dtype(stack, curve)
    if curve is not None:
        curve = curve.to(dtype).reshape((1, 1, -1) if curve.dim() == 1 else curve.shape)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.detach().to(dtype)
    table = _reference.weight_table(weight, stack.device, dtype)
    radiance: Tensor = torch.ops.hdrops.merge_exposures.default(
        stack, log_exposures.to(dtype), curve, table, mask, fallback
    )
    return radiance


def _check(
    stack: Tensor, log_exposures: Tensor, curve: Tensor | None, weight: str | Tensor, mask: Tensor | None
) -> None:
    """Everything that shapes, dtypes and devices can tell."""
    op = "merge_exposures"
    for name, given in (("stack", stack), ("log_exposures", log_exposures)):
        if not isinstance(given, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(given).__name__}")
    for name, table in (("curve", curve), ("mask", mask)):
        if table is not None and not isinstance(table, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor or None, got {type(table).__name__}")
    if stack.dtype not in (*_common.FLOATING_DTYPES, *_reference.LEVELS):
        raise TypeError(f"{op}: stack must be float32, float64, bfloat16, float16, uint8 or uint16, got {stack.dtype}")
    if stack.dim() != 5:
        raise ValueError(f"{op}: stack must be [N, P, C, H, W], got shape {list(stack.shape)}")
    n, p, c, h, w = stack.shape
    if p < 1:
        raise ValueError(f"{op}: stack must have at least one frame, got shape {list(stack.shape)}")
    if not log_exposures.is_floating_point():
        raise TypeError(f"{op}: log_exposures must be floating, got {log_exposures.dtype}")
    if log_exposures.dim() != 2 or log_exposures.shape[0] not in (1, n) or log_exposures.shape[1] != p:
        raise ValueError(
            f"{op}: log_exposures must be [N or 1, P] = [{n} or 1, {p}], got shape {list(log_exposures.shape)}"
        )
    if curve is not None:
        _check_table("curve", curve)
        if curve.dim() != 1 and (curve.dim() != 3 or curve.shape[0] not in (1, n) or curve.shape[1] not in (1, c)):
            raise ValueError(
                f"{op}: curve must be [L] or [N or 1, C or 1, L] = [{n} or 1, {c} or 1, L], "
                f"got shape {list(curve.shape)}"
            )
    if isinstance(weight, Tensor):
        _check_table("weight", weight)
        if weight.dim() != 1:
            raise ValueError(f"{op}: weight must be a table [L], got shape {list(weight.shape)}")
    elif not isinstance(weight, str) or weight not in _reference.WEIGHT_TABLES:
        names = ", ".join(_reference.WEIGHT_TABLES)
        raise ValueError(f"{op}: weight must be one of {names} or a tensor [L], got {weight!r}")
    if mask is not None:
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(f"{op}: mask must be bool or floating, got {mask.dtype}")
        if mask.dim() != 5 or mask.shape[0] not in (1, n) or mask.shape[1:] != (p, 1, h, w):
            raise ValueError(
                f"{op}: mask must be [N or 1, P, 1, H, W] = [{n} or 1, {p}, 1, {h}, {w}], got shape {list(mask.shape)}"
            )
    for name, tensor in (("log_exposures", log_exposures), ("curve", curve), ("weight", weight), ("mask", mask)):
        if isinstance(tensor, Tensor) and tensor.device != stack.device:
            raise ValueError(f"{op}: {name} must be on the stack's device {stack.device}, got {tensor.device}")


def _check_table(name: str, table: Tensor) -> None:
    if not table.is_floating_point():
        raise TypeError(f"merge_exposures: {name} must be floating, got {table.dtype}")
    if table.dim() == 0 or table.shape[-1] < 1:
        raise ValueError(f"merge_exposures: {name} must have at least one entry, got shape {list(table.shape)}")


@torch.library.register_fake("hdrops::merge_exposures")
def _fake(
    stack: Tensor, log_exposures: Tensor, curve: Tensor | None, weight: Tensor, mask: Tensor | None, fallback: bool
) -> Tensor:
    n, _, c, h, w = stack.shape
    dtype = log_exposures.dtype if stack.dtype in _reference.LEVELS else stack.dtype
    layout = torch.channels_last if _reference.is_interleaved(stack) else torch.contiguous_format
    return torch.empty((n, c, h, w), dtype=dtype, device=stack.device, memory_format=layout)


@torch.library.register_fake("hdrops::_merge_exposures_backward")
def _fake_backward(
    grad_output: Tensor,
    stack: Tensor,
    log_exposures: Tensor,
    curve: Tensor | None,
    weight: Tensor,
    mask: Tensor | None,
    fallback: bool,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    wants_stack, wants_times, wants_curve = output_mask
    grad_stack = grad_output.new_empty(0)
    if wants_stack and stack.is_floating_point():
        n, p, c, h, w = stack.shape
        interleaved = _reference.is_interleaved(stack)
        grad_stack = stack.new_empty((n, p, h, w, c)).movedim(-1, 2) if interleaved else stack.new_empty(stack.shape)
    grad_times = log_exposures.new_empty(log_exposures.shape if wants_times else 0)
    grad_curve = log_exposures.new_empty(curve.shape if wants_curve and curve is not None else 0)
    return grad_stack, grad_times, grad_curve


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    stack, log_exposures, curve, weight, mask, ctx.fallback = inputs
    ctx.save_for_backward(stack, log_exposures, curve, weight, mask)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:3])
    gradients = torch.ops.hdrops._merge_exposures_backward.default(
        grad_output, *ctx.saved_tensors, ctx.fallback, wanted
    )
    return (*_common.none_if_unwanted(gradients, wanted), None, None, None)


torch.library.register_autograd("hdrops::merge_exposures", _backward, setup_context=_setup_context)
_common.refuse_double_backward("_merge_exposures_backward")


@torch.library.register_vmap("hdrops::merge_exposures")
def _vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    stack: Tensor,
    log_exposures: Tensor,
    curve: Tensor | None,
    weight: Tensor,
    mask: Tensor | None,
    fallback: bool,
) -> tuple[Tensor, int]:
    """The mapped dimension becomes part of the batch."""
    if in_dims[3] is not None:
        raise NotImplementedError("merge_exposures: vmap over weight is not supported; map over the other inputs")
    batch = stack.shape[0] if in_dims[0] is None else stack.movedim(in_dims[0], 0).shape[1]

    def fold(tensor: Tensor | None, dim: int | None) -> Tensor | None:
        if tensor is None or (dim is None and tensor.shape[0] == 1 and tensor is not stack):
            return tensor
        mapped = tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        return mapped.expand(-1, batch, *mapped.shape[2:]).flatten(0, 1)

    radiance = torch.ops.hdrops.merge_exposures.default(
        fold(stack, in_dims[0]),
        fold(log_exposures, in_dims[1]),
        fold(curve, in_dims[2]),
        weight,
        fold(mask, in_dims[4]),
        fallback,
    )
    return radiance.unflatten(0, (info.batch_size, batch)), 0


torch.library.register_vmap(
    "hdrops::_merge_exposures_backward",
    _common.vmap_by_loop(torch.ops.hdrops._merge_exposures_backward.default),
)
