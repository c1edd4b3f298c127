"""Global context, OP-2: ``context_pool`` and ``global_context``, and how their operators are registered with PyTorch.

The operators return a second tensor, ``state``: for each image the softmax's largest logit and sum, the context and the
bottleneck's activations. It is all that the backward pass needs beside the inputs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hdrops import _backends, triton
from hdrops.ops import _common
from hdrops.reference import global_context as reference

FUSIONS = ("add", "mul")

_MOST_TRITON_CHANNELS = 1024


def _can_run_triton(input: Tensor) -> str | None:
    if input.shape[1] > _MOST_TRITON_CHANNELS:
        return f"its kernels take at most {_MOST_TRITON_CHANNELS} channels, the input has {input.shape[1]}"
    return _backends.can_run_triton(input)


_CAN_RUN: dict[str, _backends.CanRun] = {
    "cpu": _backends.can_run_cpu,
    "triton": _can_run_triton,
    "reference": _backends.can_run_reference,
}


def context_pool(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    r"""Softmax attention pooling: the mean of an image's pixels, weighted by a softmax over all of them.

    .. math::
        a_p = \langle weight, x_p \rangle + bias, \quad w = softmax_p(a), \quad context_c = \sum_p w_p x_{c, p}

    Args:
        input: float [N, C, H, W]; N may be 0. NCHW and channels_last are read as they are.
        weight: [C], the input's dtype: a 1x1 convolution to one channel.
        bias: [1], the input's dtype, or None. It cancels in the softmax; what is not finite makes the result NaN.
        backend: "cpu", "triton", "reference", or None for the best that runs on the input's device.

    Returns:
        context [N, C] in the input's dtype. float64, float32, bfloat16 or float16; sums and the softmax are float32
        for 16-bit and 32-bit data. Any logits are safe: the largest is subtracted before exp.

    Gradients flow to input, weight and (zero) bias, each computed only if asked for; on the CPU bitwise equal for any
    number of threads. Nothing of the input's size is saved beside the input. A NaN in an image makes its context NaN.
    Under autocast all arguments take the ambient dtype.

    Raises:
        ValueError: a wrong shape or device.
        TypeError: a wrong dtype or kind of argument.
        NotImplementedError: a backend that cannot run the call; second derivatives, forward-mode AD and
            ``torch.func.grad`` outside of ``backend="reference"``.

    Example:
        >>> import torch, hdrops
        >>> input = torch.rand(2, 4, 8, 9)
        >>> torch.allclose(hdrops.context_pool(input, torch.zeros(4)), input.mean((2, 3)))
        True

    Source: Cao et al., GCNet: Non-local Networks Meet Squeeze-Excitation Networks and Beyond, 2019, equation 4.
    """
    op = "context_pool"
    _check_input(op, input)
    _check_shapes(op, {"weight": (weight, "C", (input.shape[1],)), "bias": (bias, "1", (1,))})
    _common.check_devices(op, "input", input, weight=weight, bias=bias)
    ambient = _common.autocast_dtype(input)
    if ambient is not None:
        input, weight, bias = _follow_autocast(ambient, input, weight, bias)
    _check_dtypes(op, input, {"weight": weight, "bias": bias})
    chosen = _backends.choose(op, input, backend, _CAN_RUN)
    if chosen == "reference":
        with _common.without_autocast(input):
            return reference.context_pool(input, weight, bias)
    _common.refuse_functional_transforms(op, input, weight, bias)
    kernels = torch.ops.hdrops._context_pool_triton if chosen == "triton" else torch.ops.hdrops.context_pool
    context: Tensor = kernels.default(input, weight, bias)[0]
    return context


def global_context(
    input: Tensor,
    key_weight: Tensor,
    key_bias: Tensor | None,
    squeeze_weight: Tensor,
    squeeze_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    excite_weight: Tensor,
    excite_bias: Tensor,
    *,
    fusion: str = "add",
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    r"""The global-context block of GCNet: pools an image to a context and adds what follows from it to every pixel.

    .. math::
        h = ReLU(LayerNorm(squeeze \cdot context + b_1)), \quad t = excite \cdot h + b_2, \quad
        out_{c, p} = x_{c, p} + t_c \;\text{ or }\; x_{c, p} \, sigmoid(t_c)

    with the context of :func:`context_pool`. The input is read twice and the output written once.

    Args:
        input: float [N, C, H, W]; N may be 0. Its memory format (NCHW or channels_last) is the output's.
        key_weight: [C], of the pooling.
        key_bias: [1], of the pooling, or None; it cancels in the softmax.
        squeeze_weight: [P, C].
        squeeze_bias: [P].
        norm_weight: [P], scale of the layer norm over P.
        norm_bias: [P].
        excite_weight: [C, P].
        excite_bias: [C].
        fusion: "add" or "mul".
        eps: of the layer norm, at least 0.
        backend: "cpu", "triton", "reference", or None for the best that runs on the input's device.

    Returns:
        [N, C, H, W] in the input's dtype and memory format. float64, float32, bfloat16 or float16; everything between
        input and output is float32 for 16-bit and 32-bit data. Parameters have the input's dtype.

    Gradients flow to all nine tensors (zero to ``key_bias``), each computed only if asked for; on the CPU bitwise equal
    for any number of threads. Nothing of the input's size is saved beside the input. A NaN in an image makes all of its
    output NaN. Under autocast all tensors take the ambient dtype.

    Raises:
        ValueError: a wrong shape, value or device.
        TypeError: a wrong dtype or kind of argument.
        NotImplementedError: a backend that cannot run the call; second derivatives, forward-mode AD and
            ``torch.func.grad`` outside of ``backend="reference"``.

    Example:
        >>> import torch, hdrops
        >>> input, key = torch.rand(1, 4, 8, 9), torch.rand(4)
        >>> squeeze, excite = (torch.rand(2, 4), torch.zeros(2)), (torch.zeros(4, 2), torch.ones(4))
        >>> output = hdrops.global_context(input, key, None, *squeeze, torch.ones(2), torch.zeros(2), *excite)
        >>> torch.equal(output, input + 1)
        True

    Source: Cao et al., GCNet: Non-local Networks Meet Squeeze-Excitation Networks and Beyond, 2019, equation 5.
    """
    op = "global_context"
    _check_input(op, input)
    _common.check_dimensions(op, "squeeze_weight", squeeze_weight, "P, C")
    channels, hidden = input.shape[1], squeeze_weight.shape[0]
    if hidden < 1:
        raise ValueError(f"{op}: squeeze_weight must have P >= 1 rows, got shape {_common.shape_of(squeeze_weight)}")
    parameters = {
        "key_weight": (key_weight, "C", (channels,)),
        "key_bias": (key_bias, "1", (1,)),
        "squeeze_weight": (squeeze_weight, "P, C", (hidden, channels)),
        "squeeze_bias": (squeeze_bias, "P", (hidden,)),
        "norm_weight": (norm_weight, "P", (hidden,)),
        "norm_bias": (norm_bias, "P", (hidden,)),
        "excite_weight": (excite_weight, "C, P", (channels, hidden)),
        "excite_bias": (excite_bias, "C", (channels,)),
    }
    _check_shapes(op, parameters)
    if fusion not in FUSIONS:
        raise ValueError(f"{op}: fusion must be 'add' or 'mul', got {fusion!r}")
    if not isinstance(eps, (int, float, torch.SymFloat)):
        raise TypeError(f"{op}: eps must be a number, got {eps!r}")
    if not eps >= 0:
        raise ValueError(f"{op}: eps must be at least 0, got {eps}")
    tensors: Sequence[Any] = [input, *(tensor for tensor, _, _ in parameters.values())]
    _common.check_devices(op, "input", input, **dict(zip(parameters, tensors[1:], strict=True)))
    ambient = _common.autocast_dtype(input)
    if ambient is not None:
        tensors = _follow_autocast(ambient, *tensors)
    _check_dtypes(op, tensors[0], dict(zip(parameters, tensors[1:], strict=True)))
    chosen = _backends.choose(op, tensors[0], backend, _CAN_RUN)
    if chosen == "reference":
        with _common.without_autocast(input):
            return reference.global_context(*tensors, fusion=fusion, eps=eps)
    _common.refuse_functional_transforms(op, *tensors)
    kernels = torch.ops.hdrops._global_context_triton if chosen == "triton" else torch.ops.hdrops.global_context
    output: Tensor = kernels.default(*tensors, fusion, float(eps))[0]
    return output


def _check_input(op: str, input: Tensor) -> None:
    _common.check_dimensions(op, "input", input, "N, C, H, W")
    if min(input.shape[1:]) < 1:
        raise ValueError(
            f"{op}: input must have at least one channel, row and column, got shape {_common.shape_of(input)}"
        )


def _check_shapes(op: str, parameters: dict[str, tuple[Any, str, tuple[int, ...]]]) -> None:
    """Raises unless each parameter has its shape; ``form`` is that in letters. Biases of the key may be None."""
    for name, (tensor, form, shape) in parameters.items():
        if tensor is None and name in ("bias", "key_bias"):
            continue
        _common.check_dimensions(op, name, tensor, form)
        if tuple(tensor.shape) != shape:
            wanted = f"[{form}] = [{', '.join(str(size) for size in shape)}]"
            raise ValueError(f"{op}: {name} must have shape {wanted}, got {_common.shape_of(tensor)}")


def _check_dtypes(op: str, input: Tensor, parameters: dict[str, Tensor | None]) -> None:
    if input.dtype not in _common.FLOATING_DTYPES:
        raise TypeError(f"{op}: input must be float64, float32, bfloat16 or float16, got {input.dtype}")
    for name, tensor in parameters.items():
        if tensor is not None and tensor.dtype != input.dtype:
            raise TypeError(f"{op}: {name} must have the input's dtype {input.dtype}, got {tensor.dtype}")


def _follow_autocast(ambient: torch.dtype, *arguments: Any) -> tuple[Any, ...]:
    """The operator's arguments under autocast: every tensor in the ambient dtype."""
    return tuple(_common.cast(a, ambient) if isinstance(a, Tensor) else a for a in arguments)


def _state_like(input: Tensor, size: int) -> Tensor:
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    return input.new_empty((input.shape[0], size), dtype=dtype)


def _gradients_like(input: Tensor, parameters: Sequence[Tensor], output_mask: Sequence[bool]) -> tuple[Tensor, ...]:
    """A fresh gradient of each tensor, empty where it is not wanted."""
    first = torch.empty_like(input, memory_format=_common.memory_format(input)) if output_mask[0] else None
    rest = [
        tensor.new_empty(tensor.shape if wanted else (0,))
        for tensor, wanted in zip(parameters, output_mask[1:], strict=True)
    ]
    return (input.new_empty((0,)) if first is None else first, *rest)


def _fake_pool(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    n, channels = input.shape[:2]
    return input.new_empty((n, channels)), _state_like(input, channels + 2)


def _fake_pool_backward(
    grad_context: Tensor, input: Tensor, weight: Tensor, state: Tensor, output_mask: Sequence[bool]
) -> tuple[Tensor, ...]:
    return _gradients_like(input, [weight], output_mask)


def _fake(input: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    hidden, channels = arguments[2].shape
    output = torch.empty_like(input, memory_format=_common.memory_format(input))
    return output, _state_like(input, 2 * channels + hidden + 3)


def _fake_backward(
    grad_output: Tensor,
    input: Tensor,
    key_weight: Tensor,
    squeeze_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    excite_weight: Tensor,
    state: Tensor,
    fusion: str,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    squeeze_bias, excite_bias = norm_bias, key_weight  # as large
    weights = [key_weight, squeeze_weight, squeeze_bias, norm_weight, norm_bias, excite_weight, excite_bias]
    return _gradients_like(input, weights, output_mask)


def _setup_pool_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, weight, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(input, weight, output[1])


def _pool_backward_by(op: Callable[..., Any]) -> Callable[..., Any]:
    def backward(ctx: Any, grad_context: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, state = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:2])
        gradients = op(grad_context, input, weight, state, wanted)
        grad_bias = weight.new_zeros(1) if ctx.needs_input_grad[2] else None
        return *_common.none_if_unwanted(gradients, wanted), grad_bias

    return backward


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, key_weight, _, squeeze_weight, _, norm_weight, norm_bias, excite_weight, _, ctx.fusion, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(input, key_weight, squeeze_weight, norm_weight, norm_bias, excite_weight, output[1])


def _backward_by(op: Callable[..., Any]) -> Callable[..., Any]:
    def backward(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [*ctx.needs_input_grad[:2], *ctx.needs_input_grad[3:9]]
        gradients = op(grad_output, *ctx.saved_tensors, ctx.fusion, wanted)
        grad_input, grad_key, *rest = _common.none_if_unwanted(gradients, wanted)
        grad_bias = ctx.saved_tensors[1].new_zeros(1) if ctx.needs_input_grad[2] else None
        return grad_input, grad_key, grad_bias, *rest, None, None

    return backward


def _vmap_of(op: Callable[..., Any]) -> Callable[..., Any]:
    """A batch of images with the same parameters is folded into N; batches of parameters are run one by one."""

    def rule(info: Any, in_dims: tuple[Any, ...], input: Tensor, *parameters: Any) -> tuple[Any, Any]:
        if in_dims[0] is None or any(dim is not None for dim in in_dims[1:]):
            return _common.vmap_by_loop(op)(info, in_dims, input, *parameters)
        images = input.movedim(in_dims[0], 0)
        results = op(images.flatten(0, 1), *parameters)
        return tuple(result.unflatten(0, images.shape[:2]) for result in results), (0, 0)

    return rule


def _triton(name: str) -> Callable[..., Any]:
    """The kernel of an operator in Triton, which is imported at the first call."""

    def run(*arguments: Any) -> Any:
        from hdrops.triton import global_context as kernels

        return getattr(kernels, name)(*arguments)

    return run


def _register(family: str, twin: str) -> None:
    """Registers all but the kernels of the operator ``family`` + ``twin`` and of its backward operator."""
    name = f"{family}{twin}"
    backward_name = f"_{name.lstrip('_')}_backward"
    op, backward_op = (getattr(torch.ops.hdrops, n).default for n in (name, backward_name))
    pooling = "pool" in family
    torch.library.register_fake(f"hdrops::{name}", _fake_pool if pooling else _fake)
    torch.library.register_fake(f"hdrops::{backward_name}", _fake_pool_backward if pooling else _fake_backward)
    torch.library.register_autograd(
        f"hdrops::{name}",
        (_pool_backward_by if pooling else _backward_by)(backward_op),
        setup_context=_setup_pool_context if pooling else _setup_context,
    )
    refusal = _backends.refuse_double_backward(family.lstrip("_"))
    torch.library.register_autograd(f"hdrops::{backward_name}", refusal)
    _common.register_autocast(name, _follow_autocast)
    torch.library.register_vmap(f"hdrops::{name}", _vmap_of(op))
    torch.library.register_vmap(f"hdrops::{backward_name}", _common.vmap_by_loop(backward_op))


triton.define_twin("_context_pool_triton", "context_pool", _triton("pool"))
triton.define_twin("_context_pool_triton_backward", "_context_pool_backward", _triton("pool_backward"))
triton.define_twin("_global_context_triton", "global_context", _triton("forward"))
triton.define_twin("_global_context_triton_backward", "_global_context_backward", _triton("backward"))
_register("context_pool", "")
_register("global_context", "")
_register("_context_pool", "_triton")
_register("_global_context", "_triton")
