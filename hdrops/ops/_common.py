"""What the operator modules share: arguments, the layout of outputs, autocast, and refusals."""

import contextlib
import numbers
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from hdrops import _backends

OptionalTensor = TypeVar("OptionalTensor", Tensor, Tensor | None)

HALF_DTYPES = (torch.float16, torch.bfloat16)
FLOATING_DTYPES = (torch.float64, torch.float32, *HALF_DTYPES)
_MAX_STEP = 2**31 - 1

# Python kernels for dispatch keys of operators whose schemas are in csrc/schema.cpp; lives as long as the process.
_LIBRARY = torch.library.Library("hdrops", "IMPL")


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """``value`` for height and width: an integer stands for both."""
    if isinstance(value, (int, torch.SymInt)):
        return value, value
    height, width = value
    return height, width


def checked_pair(op: str, name: str, value: int | Sequence[int], minimum: int) -> tuple[int, int]:
    """:func:`pair` of a user's argument.

    Raises:
        TypeError: something else than integers.
        ValueError: not one or two of them, or one below ``minimum`` or above 2**31 - 1.
    """

    def rule() -> str:
        return f"{op}: {name} must be an integer or a pair of integers >= {minimum}, got {value!r}"

    values = value if isinstance(value, (tuple, list)) else (value, value)
    if not all(is_integer(item) for item in values):
        raise TypeError(rule())
    if len(values) != 2 or values[0] < minimum or values[1] < minimum:
        raise ValueError(rule())
    if values[0] > _MAX_STEP or values[1] > _MAX_STEP:
        raise ValueError(f"{op}: {name} must be below 2**31, got {value!r}")
    plain: list[Any] = [item if isinstance(item, (int, torch.SymInt)) else int(item) for item in values]
    return plain[0], plain[1]


def is_integer(value: object) -> bool:
    """Whether ``value`` is an integer, Python's, NumPy's or the compiler's; 3.0 is none."""
    return isinstance(value, (int, torch.SymInt, numbers.Integral))


def shape_of(tensor: Tensor) -> str:
    """A tensor's shape as messages print it."""
    return f"[{', '.join(str(size) for size in tensor.shape)}]"


def check_dimensions(op: str, name: str, tensor: Tensor, form: str) -> None:
    """Raises unless ``tensor`` is a tensor with as many dimensions as ``form`` ("N, C, H, W") names."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    wanted = form.count(",") + 1
    if tensor.dim() != wanted:
        raise ValueError(
            f"{op}: {name} must have {wanted} dimension{'s' if wanted > 1 else ''} [{form}], "
            f"got {tensor.dim()} ({name} shape {shape_of(tensor)})"
        )


def check_devices(op: str, first: str, tensor: Tensor, **others: Tensor | None) -> None:
    """Raises unless every tensor is on the device of the first."""
    for name, other in others.items():
        if other is not None and other.device != tensor.device:
            raise ValueError(f"{op}: {name} must be on {first}'s device {tensor.device}, got {other.device}")


def memory_format(tensor: Tensor) -> torch.memory_format:
    """The layout an output takes from an NCHW input: channels_last where the input is that and nothing else."""
    if not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype autocast asks for on the tensor's device, None where it is off."""
    device = tensor.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """For what has chosen its own precision: autocast is off inside, on the tensor's device."""
    if autocast_dtype(tensor) is None:
        return contextlib.nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


def allow_tf32(tensor: Tensor) -> bool:
    """Whether torch's switch lets kernels multiply ``tensor``'s values in TensorFloat-32."""
    return tensor.device.type == "cuda" and tensor.dtype == torch.float32 and _matmul_allows_tf32()


def _matmul_allows_tf32() -> bool:
    """``torch.backends.cuda.matmul.allow_tf32`` by its newer name; the older raises where the newer has been set.

    The compiler cannot trace it, but guards its graphs by the switch.
    """
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


# What torch.compiler.assume_constant_result does, without importing the compiler, which takes longer than all the rest.
_matmul_allows_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]


def register_autocast(name: str, cast: Callable[..., tuple[Any, ...]]) -> None:
    """Runs ``torch.ops.hdrops.<name>`` under autocast on what ``cast(ambient_dtype, *arguments)`` returns.

    ``torch.library.register_autocast`` casts every tensor to one dtype fixed beforehand; an operator of coordinates or
    curves must follow the ambient dtype with its data and keep those in float32.
    """
    op = getattr(torch.ops.hdrops, name).default

    def register(device: str, key: str) -> None:
        excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def run(*arguments: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(excluded):
                return op(*cast(torch.get_autocast_dtype(device), *arguments))

        _LIBRARY.impl(name, run, key)

    register("cpu", "AutocastCPU")
    register("cuda", "AutocastCUDA")


def cast(tensor: OptionalTensor, dtype: torch.dtype) -> OptionalTensor:
    """``tensor`` in the ambient dtype, by autocast's own rule: float64 and integers stay what they are."""
    if tensor is None or tensor.dtype == torch.float64 or not tensor.is_floating_point():
        return tensor
    return tensor.to(dtype)


def refuse_functional_transforms(op: str, *tensors: Tensor | None) -> None:
    """Raises under a derivative transform of ``torch.func``, which a compiled operator cannot take part in.

    Forward mode (jvp, jacfwd) would drop the tangent in silence; reverse mode (grad, vjp, jacrev) would speak of an
    autograd.Function that the caller has never seen. ``torch.func.vmap`` is fine.
    """
    _backends.refuse_forward_ad(op, *tensors)
    if torch.compiler.is_compiling():
        return
    functorch = torch._C._functorch
    for tensor in tensors:
        while tensor is not None and functorch.is_functorch_wrapped_tensor(tensor):
            if functorch.is_gradtrackingtensor(tensor):
                raise NotImplementedError(
                    f"{op}: torch.func.grad, vjp and jacrev are not built into the kernels; "
                    "torch.autograd.grad is, and backend='reference' supports them"
                )
            tensor = functorch.get_unwrapped(tensor)


def refuse_double_backward(name: str) -> None:
    """Makes a second derivative through the backward operator ``hdrops::<name>`` an error instead of a silent zero."""
    public = name.removeprefix("_").removesuffix("_backward")
    torch.library.register_autograd(f"hdrops::{name}", _backends.refuse_double_backward(public))


def none_if_unwanted(gradients: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Gradients as autograd wants them: a backward operator returns empty tensors for what was not asked."""
    return tuple(gradient if asked else None for gradient, asked in zip(gradients, wanted, strict=True))


def fold_batch(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """vmap's batch made part of N, the first dimension; without one the tensor is repeated."""
    batched = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return batched.flatten(0, 1)


def unfold_batch(results: Sequence[Tensor], tensor: Tensor, dim: int | None, size: int) -> tuple[Tensor, ...]:
    """The batch of an operator's results, taken out of N; ``tensor`` and ``dim`` are an input of :func:`fold_batch`."""
    n = tensor.shape[0] if dim is None else tensor.movedim(dim, 0).shape[1]
    return tuple(result.unflatten(0, (size, n)) for result in results)


def vmap_by_loop(op: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """A vmap rule that runs ``op`` once for each member of the batch."""

    def select(tensor: Tensor, dim: int, b: int) -> Tensor:
        if tensor.shape[dim] == 0:  # a member of an empty batch, for the shapes of the results
            return tensor.new_zeros([*tensor.shape[:dim], *tensor.shape[dim + 1 :]])
        return tensor.select(dim, b)

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        def member(b: int) -> list[Any]:
            return [
                select(argument, dim, b) if isinstance(dim, int) else argument
                for argument, dim in zip(arguments, in_dims, strict=True)
            ]

        results = [op(*member(b)) for b in range(max(info.batch_size, 1))]
        if isinstance(results[0], Tensor):
            return torch.stack(results)[: info.batch_size], 0
        stacked = tuple(torch.stack(parts)[: info.batch_size] for parts in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    return rule
