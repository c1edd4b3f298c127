"""One typical call of each operator, for ``hdrops bench`` and the demo: what it is given and how it is called."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import hdrops


@dataclass(frozen=True)
class Case:
    """A call.

    Attributes:
        operator: its name.
        size: what it is given, in words.
        inputs: tensors, those to be differentiated with ``requires_grad``.
        call: the operator on these inputs, by the named backend (None: the best there is).
    """

    operator: str
    size: str
    inputs: tuple[Tensor, ...]
    call: Callable[[str | None], Tensor]

    def backward(self, result: Tensor) -> None:
        """Differentiates the sum of the result, the gradients of earlier calls forgotten."""
        for tensor in self.inputs:
            tensor.grad = None
        result.sum().backward()


def cases(height: int = 540, width: int = 960) -> list[Case]:
    """The cases, with frames of the given size and features of 64 channels at a quarter of it."""
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).requires_grad_()

    frame = f"[1, 3, {height}, {width}]"
    features = uniform(1, 64, height // 4, width // 4)
    offset = torch.randn(1, 18, height // 4, width // 4, generator=generator).requires_grad_()
    weight, modulation = uniform(64, 64, 3, 3), uniform(1, 9, height // 4, width // 4)
    image, curve = uniform(1, 3, height, width), torch.linspace(0, 1, 1024).pow(2.2).requires_grad_()
    stack, times = uniform(1, 5, 3, height, width), torch.tensor([[1 / 60, 1 / 15, 1 / 4, 1.0, 4.0]]).log()

    def deform(backend: str | None) -> Tensor:
        return hdrops.deform_conv2d(features, offset, weight, padding=1, mask=modulation, backend=backend)

    return [
        Case(
            "deform_conv2d", f"{list(features.shape)}, 64 filters 3x3", (features, offset, weight, modulation), deform
        ),
        Case(
            "crf_lookup", f"{frame}, 1024 entries", (image, curve), lambda b: hdrops.crf_lookup(image, curve, backend=b)
        ),
        Case(
            "merge_exposures",
            f"5 frames {frame}, curve of 1024",
            (stack, curve),
            lambda b: hdrops.merge_exposures(stack, times, curve, backend=b),
        ),
        Case("quantize_ste", frame, (image,), lambda b: hdrops.quantize_ste(image, backend=b)),
        Case("tent_histogram", frame, (image,), lambda b: hdrops.tent_histogram(image, backend=b)),
        Case("value_histogram", frame, (image,), lambda b: hdrops.value_histogram(image, backend=b)),
        Case("truncate", frame, (image,), lambda b: hdrops.truncate(image, backend=b)),
    ]
