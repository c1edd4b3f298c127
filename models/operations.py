"""Counting the parameters and operations of a model, by the rule of this package and by those of the papers.

A model is run once on fake tensors, which have shapes and no data; every call of a layer is recorded, and a rule turns
each call into a count. ``fixed`` is the rule of this package, the same for every system. The papers counted by others;
each of those is here under the name of the program that counts so, and a paper's figure is only held against its own:

=========== ==========================================================================================================
fixed       multiply-adds of weights; a transposed convolution on its input's grid; a deformable one as a dense one
thop        multiply-adds of weights; a transposed convolution on its output's grid; 4 an element of instance norm
torchinfo   parameters (with bias) of a convolution times its output's pixels, transposed ones too; of others once
tensorflow  2 a multiply-add, 1 a bias addition, 1 a tap of pooling, 2 an element of leaky ReLU or batch norm, and
            what a layer names in ``arithmetic_per_pixel`` for each pixel of its output
=========== ==========================================================================================================
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hdrops.nn import DeformConv2d, GlobalContextBlock

CONVOLUTIONS = (nn.Conv2d, DeformConv2d)


class Call(NamedTuple):
    """One call of a layer: the module, its first input's shape and its output's."""

    layer: nn.Module
    input: torch.Size
    output: torch.Size


@dataclass(frozen=True)
class Report:
    """What one forward pass takes.

    Attributes:
        parameters: all of them, and those that are trained.
        operations: rule -> count; of multiply-adds, but for ``tensorflow``, which counts operations.
    """

    parameters: int
    trained: int
    operations: dict[str, float]


@dataclass(frozen=True)
class PaperRow:
    """A line of a paper's table of complexity.

    Attributes:
        label: the line's name, with the table's.
        rule: how the paper counted.
        size: height and width of the image that it counted for.
        parameters: as printed, in millions; None where the table has none.
        giga: operations as printed, in 10^9; None likewise.
        config: options that make the network of the line.
        part: attribute of the system that the line is about, for a line about a part of it; "" for all.
    """

    label: str
    rule: str
    size: tuple[int, int]
    parameters: float | None = None
    giga: float | None = None
    config: dict[str, object] = field(default_factory=dict)
    part: str = ""


def _weights(call: Call) -> float:
    """Multiply-adds of the call's weights for each pixel of the grid that the layer's kernel visits."""
    layer = call.layer
    if isinstance(layer, (*CONVOLUTIONS, nn.ConvTranspose2d)):
        grid = call.input if isinstance(layer, nn.ConvTranspose2d) else call.output
        return layer.weight.numel() * math.prod(grid[2:]) * grid[0]
    if isinstance(layer, nn.Linear):
        return layer.weight.numel() * math.prod(call.output[:-1])
    if isinstance(layer, GlobalContextBlock) and len(layer.fusion_types) == 1:
        # One operator: the layers that hold its weights are not called.
        bottleneck = layer.channel_add_conv or layer.channel_mul_conv
        assert bottleneck is not None
        weights = sum(part.weight.numel() for part in bottleneck if isinstance(part, nn.Conv2d))
        return call.input[0] * (layer.conv_mask.weight.numel() * math.prod(call.input[2:]) + weights)
    return 0


def _fixed(call: Call) -> float:
    return _weights(call)


def _thop(call: Call) -> float:
    if isinstance(call.layer, nn.ConvTranspose2d):
        return call.layer.weight.numel() * math.prod(call.output[2:]) * call.output[0]
    if isinstance(call.layer, nn.InstanceNorm2d):
        return 4 * math.prod(call.input)
    return _weights(call)


def _torchinfo(call: Call) -> float:
    parameters = sum(parameter.numel() for parameter in call.layer.parameters(recurse=False))
    if isinstance(call.layer, (*CONVOLUTIONS, nn.ConvTranspose2d)):
        return parameters * math.prod(call.output[2:]) * call.output[0]
    return parameters * call.output[0] if call.output else 0


def _tensorflow(call: Call) -> float:
    layer, count = call.layer, 2 * _weights(call)
    if isinstance(layer, (*CONVOLUTIONS, nn.ConvTranspose2d, nn.Linear)) and layer.bias is not None:
        count += math.prod(call.output)
    if isinstance(layer, (nn.AvgPool2d, nn.MaxPool2d)):
        size = layer.kernel_size
        count += math.prod(call.output) * (size[0] * size[1] if isinstance(size, tuple) else size * size)
    if isinstance(layer, (nn.LeakyReLU, nn.BatchNorm2d)):
        count += 2 * math.prod(call.output)
    arithmetic: float = getattr(layer, "arithmetic_per_pixel", 0)
    return count + arithmetic * call.output[0] * math.prod(call.output[2:])


RULES: dict[str, Callable[[Call], float]] = {
    "fixed": _fixed,
    "thop": _thop,
    "torchinfo": _torchinfo,
    "tensorflow": _tensorflow,
}


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[Call]]:
    """The calls of layers, in order, while the context is open: what has weights of its own, or no layers inside."""
    calls: list[Call] = []

    def record(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and inputs and isinstance(inputs[0], Tensor):
            calls.append(Call(layer, inputs[0].shape, output.shape))

    layers = [
        module
        for module in model.modules()
        if isinstance(module, GlobalContextBlock)
        or not any(True for _ in module.children())
        or any(True for _ in module.parameters(recurse=False))
    ]
    hooks = [layer.register_forward_hook(record) for layer in layers]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def measure(model: nn.Module, inputs: Callable[[], Sequence[Any]]) -> Report:
    """Counts one forward pass of ``model`` in evaluation mode on the arguments that ``inputs()`` makes.

    Neither the model nor its arguments need memory beyond the model's own.
    """
    parameters = list(model.parameters())
    device = parameters[0].device if parameters else torch.device("cpu")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    # Each module's own: training may hold parts of a model in evaluation mode.
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with recorded(model) as calls, mode, torch.no_grad(), torch.device(device):
            model(*inputs())
    finally:
        for module, was in training:
            module.training = was
    return Report(
        parameters=sum(parameter.numel() for parameter in parameters),
        trained=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        operations={name: float(sum(map(rule, calls))) for name, rule in RULES.items()},
    )
