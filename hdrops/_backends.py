"""Which implementation of an operator runs: ``cpu``, ``cuda``, ``triton`` or ``reference``.

Each operator says for each backend whether it can run the call at hand: None, or the reason why not. The first backend
that can, in the order of its device, is taken. ``backend=`` of a call, and below it the variable ``HDROPS_BACKEND``
read at import, name one backend instead; if that one cannot run the call, the reason is raised.
"""

import os
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hdrops import _load, triton

NAMES = ("cpu", "cuda", "triton", "reference")
CanRun = Callable[[Tensor], str | None]

_REQUESTED = os.environ.get("HDROPS_BACKEND") or None
if _REQUESTED is not None and _REQUESTED not in NAMES:
    raise ImportError(f"hdrops: HDROPS_BACKEND must be one of {', '.join(NAMES)}, got {_REQUESTED!r}")


def can_run_cpu(tensor: Tensor) -> str | None:
    """For an operator with a CPU kernel for every dtype it accepts."""
    return None if tensor.device.type == "cpu" else f"the tensors are on {tensor.device}"


def can_run_cuda(tensor: Tensor) -> str | None:
    """For an operator with a CUDA kernel for every dtype it accepts."""
    if tensor.device.type != "cuda":
        return f"the tensors are on {tensor.device}"
    return _load.cuda_status()


def can_run_triton(tensor: Tensor) -> str | None:
    """For an operator with a Triton kernel for every dtype it accepts."""
    if tensor.device.type == "cpu" and not triton.INTERPRETED:
        return (
            "the tensors are on cpu, where Triton runs only in its interpreter (TRITON_INTERPRET=1, set before import)"
        )
    if tensor.device.type not in ("cpu", "cuda"):
        return f"the tensors are on {tensor.device}"
    return triton.status()


def can_run_reference(tensor: Tensor) -> str | None:
    """Plain PyTorch runs wherever PyTorch does."""
    return None


def choose(op: str, tensor: Tensor, backend: str | None, can_run: Mapping[str, CanRun]) -> str:
    """The backend for a call of ``op`` whose first input is ``tensor``.

    Args:
        op: name of the operator, for messages.
        tensor: the input whose device decides.
        backend: the caller's ``backend=``, or None.
        can_run: for each backend the operator has, its predicate, in order of preference.

    Raises:
        ValueError: ``backend`` is no backend's name.
        NotImplementedError: the named backend, or every backend, refuses the call.
        RuntimeError: CUDA tensors, and the CUDA library failed to load.
    """
    wanted = backend or _REQUESTED
    if wanted is not None:
        if wanted not in NAMES:
            raise ValueError(f"{op}: backend must be one of {', '.join(NAMES)} or None, got {wanted!r}")
        if wanted not in can_run:
            raise NotImplementedError(f"{op}: has no {wanted} backend; it has {', '.join(can_run)}")
        reason = can_run[wanted](tensor)
        if reason is not None:
            raise NotImplementedError(f"{op}: backend {wanted} cannot run this call: {reason}")
        return wanted
    if tensor.device.type == "cuda" and _load.CUDA_ERROR is not None:
        raise RuntimeError(
            f"{op}: the tensors are on {tensor.device}, but {_load.cuda_status()}. "
            "Repair it, or pass backend='reference'."
        ) from _load.CUDA_ERROR
    reasons = {}
    for name, predicate in can_run.items():
        reasons[name] = predicate(tensor)
        if reasons[name] is None:
            return name
    raise NotImplementedError(
        f"{op}: no backend can run this call: " + "; ".join(f"{k}: {v}" for k, v in reasons.items())
    )


def refuse_forward_ad(op: str, *tensors: Tensor | None) -> None:
    """Raises if a tensor carries a forward-mode tangent, which a compiled operator would drop in silence."""
    forward_ad = torch.autograd.forward_ad
    if forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if tensor is not None and tensor.is_floating_point() and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{op}: forward-mode differentiation (jvp) is not built into the kernels; "
                "backend='reference' supports it"
            )


def refuse_double_backward(op: str) -> Callable[..., None]:
    """The autograd formula of a backward operator: second derivatives raise instead of being dropped in silence."""

    def formula(*_: object) -> None:
        raise NotImplementedError(
            f"{op}: second derivatives are not built into the kernels; backend='reference' supports them"
        )

    return formula
