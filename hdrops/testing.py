"""Comparison with the float64 reference: one tolerance table for every test, benchmark check and user.

A kernel in dtype d is compared with the float64 reference evaluated on inputs rounded to d. The error allowed is

    rounding(d) * |expected|  +  accumulation(d) * sqrt(terms) * scale  +  factor(d) * products

where ``terms`` is the number of products summed for one element and ``scale`` the size of a typical sum's terms (by
default the root mean square of the expected values). Float16 and bfloat16 kernels accumulate in float32, so their
second coefficient is float32's and the first is half a unit in the last place of the format, with a margin.

The last term is there only for a kernel that rounds a factor of each product before it multiplies, which only
deform_conv2d does: in bfloat16 on processors with bfloat16 dot products, in 16-bit formats and TensorFloat-32 on GPUs
(``rounded_products``). ``products`` is the root of the sum of the squared products of an element: independent rounding
errors add up like that.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hdrops import _load
from hdrops.reference import deform_conv2d as reference


@dataclass(frozen=True)
class Tolerance:
    """Relative error of the stored result, of one accumulation step, and of a product whose one factor is rounded."""

    rounding: float
    accumulation: float
    factor: float = 0.0


TOLERANCES = {
    torch.float64: Tolerance(rounding=4e-15, accumulation=4e-15),
    torch.float32: Tolerance(rounding=2e-6, accumulation=1e-6),
    # A rounded factor is off by at most 2**-8 and by 0.42 * 2**-8 in the root mean square: nearly five times that, for
    # the worst of a million sums (measured: 1.8 * 2**-8 among 600,000).
    torch.bfloat16: Tolerance(rounding=2**-8 * 1.01, accumulation=1e-6, factor=2**-7),
    torch.float16: Tolerance(rounding=2**-11 * 1.01, accumulation=1e-6, factor=2**-10),
}
# Float32 multiplied in TensorFloat-32, which rounds both factors to 11 bits.
TF32 = Tolerance(rounding=2e-6, accumulation=1e-6, factor=2**-9)


def assert_close(
    actual: Tensor,
    expected: Tensor,
    *,
    terms: int = 1,
    scale: float | None = None,
    products: Tensor | None = None,
    tolerance: Tolerance | None = None,
    name: str = "result",
) -> None:
    """Asserts that ``actual`` equals the float64 ``expected`` within the table; NaN must meet NaN.

    Args:
        actual: what the kernel gave, in any floating dtype of the table.
        expected: the reference's result in float64, same shape.
        terms: number of products summed for one element.
        scale: magnitude of the sums' terms; None takes the root mean square of the finite expected values.
        products: root of the sum of the squared products of each element, where the kernel rounds a factor of each.
        tolerance: what to allow; None takes the table's for the dtype.
        name: what is compared, for the message.

    Raises:
        AssertionError: names the worst element, its error and the bound.
    """
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if actual.numel() == 0:
        return
    tolerance = tolerance or TOLERANCES[actual.dtype]
    got, want = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert torch.equal(got.isnan(), want.isnan()), (
        f"{name}: NaN in {int((got.isnan() ^ want.isnan()).sum())} wrong places"
    )
    finite = want.isfinite()
    assert torch.equal(got[~finite & ~want.isnan()], want[~finite & ~want.isnan()]), f"{name}: infinities differ"
    if scale is None:
        scale = float(want[finite].square().mean().sqrt()) if finite.any() else 0.0
    bound = tolerance.rounding * want.abs() + tolerance.accumulation * terms**0.5 * scale
    if products is not None:
        bound = bound + tolerance.factor * products
    excess = torch.where(finite, (got - want).abs() - bound, torch.full_like(want, -torch.inf))
    worst = int(excess.argmax())
    assert excess.flatten()[worst] <= 0, (
        f"{name} ({actual.dtype}): {int((excess > 0).sum())} of {want.numel()} elements off; "
        f"worst at flat index {worst}: got {got.flatten()[worst]:.9g}, expected {want.flatten()[worst]:.9g}, "
        f"error {(got - want).abs().flatten()[worst]:.3g}, allowed {bound.flatten()[worst]:.3g}"
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Error of ``actual`` as one vector: the L2 norm of the difference over the L2 norm of ``expected``."""
    difference = torch.linalg.vector_norm(actual.detach().double() - expected.detach().double())
    return float(difference / torch.linalg.vector_norm(expected.detach().double()).clamp_min(1e-300))


@dataclass(frozen=True)
class DeformConv2dCase:
    """Sizes of one call of ``deform_conv2d``, and random tensors of those sizes.

    Attributes:
        reach: standard deviation of the offsets, in pixels. They are multiples of 1/1024: a coordinate is then exact in
            float32, and a comparison with float64 sees the kernel's sums, on both sides in the same cell.
    """

    n: int = 2
    channels: int = 4
    out_channels: int = 6
    size: tuple[int, int] = (8, 9)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    offset_groups: int = 1
    mask: bool = True
    bias: bool = True
    reach: float = 2.0

    @property
    def geometry(self) -> dict[str, tuple[int, int]]:
        """The keyword arguments beside the tensors."""
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of the output."""
        extent = [d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True)]
        height, width = (
            (self.size[axis] + 2 * self.padding[axis] - extent[axis]) // self.stride[axis] + 1 for axis in (0, 1)
        )
        return height, width

    def tensors(
        self, dtype: torch.dtype = torch.float64, coordinates: torch.dtype | None = None, seed: int = 0
    ) -> dict[str, Tensor]:
        """The tensor arguments that the case has, by name; offset and mask in ``coordinates`` or else ``dtype``.

        They are on torch's default device, with the same values on each.
        """
        random, device = torch.Generator().manual_seed(seed), torch.get_default_device()

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, dtype=torch.float64, device="cpu").to(device)

        taps = self.offset_groups * self.kernel[0] * self.kernel[1]
        offset = normal(self.n, 2 * taps, *self.output_size) * self.reach
        tensors = {
            "input": normal(self.n, self.channels, *self.size).to(dtype),
            "offset": ((offset * 1024).round() / 1024).to(coordinates or dtype),
            "weight": normal(self.out_channels, self.channels // self.groups, *self.kernel).to(dtype),
        }
        if self.bias:
            tensors["bias"] = normal(self.out_channels).to(dtype)
        if self.mask:
            tensors["mask"] = normal(self.n, taps, *self.output_size).to(coordinates or dtype)
        return tensors


# What every kernel of ``deform_conv2d`` is tested on, by name.
DEFORM_CONV2D_CASES = {
    "plain": DeformConv2dCase(),
    "no_mask_no_bias": DeformConv2dCase(mask=False, bias=False),
    "asymmetric": DeformConv2dCase(size=(11, 14), kernel=(3, 2), stride=(2, 1), padding=(0, 3), dilation=(1, 2)),
    "groups": DeformConv2dCase(channels=8, out_channels=12, groups=4),
    "offset_groups": DeformConv2dCase(channels=8, offset_groups=4),
    "both_groups": DeformConv2dCase(channels=12, out_channels=6, groups=3, offset_groups=2),
    "offset_group_across_groups": DeformConv2dCase(channels=12, out_channels=4, groups=2, offset_groups=3),
    "depthwise": DeformConv2dCase(channels=6, out_channels=6, groups=6, offset_groups=6),
    "pointwise": DeformConv2dCase(kernel=(1, 1), padding=(0, 0), channels=5, out_channels=7),
    "one_channel": DeformConv2dCase(channels=1, out_channels=1),
    "large_kernel": DeformConv2dCase(n=1, kernel=(5, 7), padding=(2, 3), channels=3, out_channels=5),
    "one_pixel": DeformConv2dCase(size=(1, 1), n=3),
    "one_row": DeformConv2dCase(size=(1, 37)),
    "far": DeformConv2dCase(reach=15.0),
    "wide_channels": DeformConv2dCase(n=1, channels=40, out_channels=35, size=(9, 10)),
    "eight_offset_groups": DeformConv2dCase(n=1, channels=64, out_channels=32, size=(7, 19), offset_groups=8),
    "many_tiles": DeformConv2dCase(n=2, channels=16, out_channels=24, size=(37, 41)),
    "large_batch": DeformConv2dCase(n=33, channels=3, out_channels=4, size=(4, 5)),
    "very_wide_channels": DeformConv2dCase(n=1, channels=520, out_channels=9, size=(5, 6), offset_groups=4),
    "many_outputs": DeformConv2dCase(n=1, channels=3, out_channels=530, size=(5, 6)),
    "tall_and_far": DeformConv2dCase(n=2, channels=5, out_channels=3, size=(150, 11), reach=40.0),
    "offset_groups_of_two": DeformConv2dCase(channels=6, offset_groups=3),
}


def rounded_products(case: DeformConv2dCase, tensors: dict[str, Tensor]) -> Tensor | None:
    """``assert_close``'s ``products`` for the output of the CPU kernels of ``deform_conv2d``.

    None where they round no factor: in every dtype but bfloat16, and on processors without bfloat16 dot products.
    """
    if tensors["input"].dtype != torch.bfloat16 or _load.simd_level() not in ("avx512_bf16", "amx"):
        return None
    return sizes_of_products(case, tensors)


def sizes_of_products(case: DeformConv2dCase, tensors: dict[str, Tensor]) -> Tensor:
    """``assert_close``'s ``products`` for the output of a kernel of ``deform_conv2d`` that rounds a factor of each."""
    weight = tensors["weight"].double().reshape(case.groups, case.out_channels // case.groups, -1)
    squares = _columns(case, tensors).reshape(case.n, case.groups, weight.shape[2], -1).square()
    return (weight.square() @ squares).sqrt().reshape(case.n, case.out_channels, *case.output_size)


def sizes_of_weight_products(case: DeformConv2dCase, tensors: dict[str, Tensor], grad_output: Tensor) -> Tensor:
    """The same for the weight's gradient, a sum of products of samples and output gradients."""
    gradients = grad_output.double().reshape(case.n, case.groups, case.out_channels // case.groups, -1)
    squares = _columns(case, tensors).reshape(case.n, case.groups, -1, gradients.shape[3]).square()
    return (gradients.square() @ squares.mT).sum(0).sqrt().reshape(tensors["weight"].shape)


def _columns(case: DeformConv2dCase, tensors: dict[str, Tensor]) -> Tensor:
    """The samples, [N, channels * taps, H, W]: what a kernel of one tap for each channel and tap gives."""
    exact = {name: tensor.double() for name, tensor in tensors.items() if name != "bias"}
    taps = case.kernel[0] * case.kernel[1]
    picks = torch.eye(taps, dtype=torch.float64).repeat(case.channels, 1).reshape(-1, 1, *case.kernel)
    return reference.deform_conv2d(
        exact["input"], exact["offset"], picks, None, case.stride, case.padding, case.dilation, exact.get("mask")
    )
