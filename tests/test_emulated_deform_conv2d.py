"""deform_conv2d's CUDA forward pass, run by the emulator, against the float64 reference."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from hdrops.reference import deform_conv2d as reference
from hdrops.testing import DEFORM_CONV2D_CASES, TF32, Tolerance, assert_close, sizes_of_products
from hdrops.testing import DeformConv2dCase as Case

pytestmark = pytest.mark.asan

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Kernel:
    """What chooses a kernel: the data's type, the device, and whether TensorFloat-32 is allowed."""

    dtype: torch.dtype
    capability: int = 90
    allow_tf32: bool = False

    @property
    def rounds_columns(self) -> bool:
        """Whether products have rounded factors: on matrix units."""
        return self.capability >= 80 and (self.dtype in HALF or (self.allow_tf32 and self.dtype == torch.float32))


KERNELS = {
    "float64": Kernel(torch.float64),
    "float32": Kernel(torch.float32),
    "tf32": Kernel(torch.float32, allow_tf32=True),
    "bfloat16": Kernel(torch.bfloat16),
    "float16": Kernel(torch.float16, 80),
    "bfloat16_sm75": Kernel(torch.bfloat16, 75),
    "float16_sm75": Kernel(torch.float16, 75),
}
# More channels and outputs than a block takes at once, runs of channels that are no whole vectors, and patches that the
# output cuts.
LARGER = {
    "outputs_of_two_blocks": Case(n=1, channels=8, out_channels=140, size=(3, 5)),
    "wide_group_outputs": Case(n=1, channels=16, out_channels=192, size=(3, 5), groups=2, kernel=(1, 2)),
    "plan_of_several_chunks": Case(n=1, channels=160, out_channels=40, size=(5, 6), kernel=(2, 1)),
    "runs_across_chunks": Case(n=1, channels=72, out_channels=8, size=(5, 6), kernel=(1, 2), offset_groups=3),
    "several_patches": Case(n=2, channels=8, out_channels=8, size=(19, 37), kernel=(1, 1), padding=(0, 0)),
    "one_column": Case(n=1, size=(150, 1), kernel=(3, 1)),
}


def as_array(tensor: Tensor | None) -> np.ndarray | None:
    """A tensor's elements in their order in memory; those of 16 bits as integers."""
    if tensor is None:
        return None
    return (tensor.view(torch.uint16) if tensor.dtype in HALF else tensor).numpy()


def run(
    emulated, tensors: dict[str, Tensor], case: Case, kernel: Kernel, channels_last: bool = False, seed: int = 1
) -> Tensor:
    """The output of the emulated kernels."""
    shape = (case.n, case.out_channels, *case.output_size)
    order = (0, 2, 3, 1) if channels_last else (0, 1, 2, 3)
    output = torch.full([shape[dim] for dim in order], float("nan"), dtype=kernel.dtype)
    arrays = {name: as_array(tensors.get(name)) for name in ("offset", "weight", "bias", "mask")}
    arrays["input"] = as_array(tensors["input"].permute(order).contiguous())
    arrays["output"] = as_array(output)
    sizes = [case.n, case.channels, *case.size, case.out_channels, *case.output_size, *case.kernel]
    sizes += [*case.stride, *case.padding, *case.dilation, case.groups, case.offset_groups]
    emulated.set_seed(seed)
    emulated.set_device(kernel.capability)
    emulated.deform_conv2d_forward(
        str(kernel.dtype).removeprefix("torch."),
        sizes,
        channels_last,
        tensors["offset"].dtype == torch.float32,
        "mask" in tensors and tensors["mask"].dtype == torch.float32,
        kernel.allow_tf32,
        arrays,
    )
    return output.permute(0, 3, 1, 2) if channels_last else output


def expected(tensors: dict[str, Tensor], case: Case) -> Tensor:
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    return reference.deform_conv2d(**exact, **case.geometry)


def assert_right(output: Tensor, tensors: dict[str, Tensor], case: Case, kernel: Kernel) -> None:
    taps = case.kernel[0] * case.kernel[1]
    tolerance: Tolerance | None = TF32 if kernel.allow_tf32 else None
    products = sizes_of_products(case, tensors) if kernel.rounds_columns else None
    terms = case.channels // case.groups * taps
    assert_close(output, expected(tensors, case), terms=terms, products=products, tolerance=tolerance, name="output")


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("kernel", ["float64", "float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("name", DEFORM_CONV2D_CASES)
def test_equals_reference(emulated, name: str, kernel: str, channels_last: bool) -> None:
    case = DEFORM_CONV2D_CASES[name]
    tensors = case.tensors(KERNELS[kernel].dtype)
    output = run(emulated, tensors, case, KERNELS[kernel], channels_last)
    assert_right(output, tensors, case, KERNELS[kernel])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", LARGER)
def test_sizes_beyond_one_block(emulated, name: str, kernel: str) -> None:
    tensors = LARGER[name].tensors(KERNELS[kernel].dtype)
    for channels_last in (False, True):
        output = run(emulated, tensors, LARGER[name], KERNELS[kernel], channels_last)
        assert_right(output, tensors, LARGER[name], KERNELS[kernel])


@pytest.mark.parametrize("kernel", ["float16", "bfloat16_sm75", "float16_sm75"])
@pytest.mark.parametrize("name", ["plain", "both_groups", "wide_channels", "eight_offset_groups", "one_row"])
def test_other_devices_and_float16(emulated, name: str, kernel: str) -> None:
    case = DEFORM_CONV2D_CASES[name]
    tensors = case.tensors(KERNELS[kernel].dtype)
    assert_right(run(emulated, tensors, case, KERNELS[kernel]), tensors, case, KERNELS[kernel])


@pytest.mark.parametrize("kernel", ["bfloat16", "float16"])
@pytest.mark.parametrize("in_float", [("offset",), ("mask",), ("offset", "mask")], ids="-".join)
def test_float32_coordinates_beside_half_data(emulated, in_float: tuple[str, ...], kernel: str) -> None:
    case = Case(channels=8, offset_groups=2)
    tensors = case.tensors(KERNELS[kernel].dtype)
    tensors.update({name: tensor for name, tensor in case.tensors(torch.float32).items() if name in in_float})
    assert_right(run(emulated, tensors, case, KERNELS[kernel]), tensors, case, KERNELS[kernel])


SPECIAL = {
    "nan": float("nan"),
    "inf": float("inf"),
    "minus_inf": -float("inf"),
    "1e30": 1e30,
    "minus_1e30": -1e30,
    "beyond_int32": 3e9,
    "integer": 2.0,
    "half": 0.5,
    "minus_one": -1.0,
}


@pytest.mark.parametrize("kernel", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("value", SPECIAL)
def test_special_offsets(emulated, value: str, kernel: str) -> None:
    case = Case(n=1, size=(5, 16), channels=4)
    dtype = KERNELS[kernel].dtype
    for components in ([0], [1], [0, 1]):
        tensors = case.tensors(dtype, coordinates=torch.float64 if dtype == torch.float64 else torch.float32)
        for component in components:
            tensors["offset"].unflatten(1, (9, 2))[:, ::2, component] = SPECIAL[value]
        assert_right(run(emulated, tensors, case, KERNELS[kernel]), tensors, case, KERNELS[kernel])


@pytest.mark.parametrize("coordinate", [-1.0, -1 + 2**-18, -(2**-18), 0.0, 7.0, 7 + 2**-18, 8 - 2**-18, 8.0])
def test_borders(emulated, coordinate: float) -> None:
    case = Case(n=1, size=(8, 8), kernel=(1, 1), padding=(0, 0), channels=3)
    kernel = KERNELS["float32"]
    for axis in (0, 1):
        tensors = case.tensors(kernel.dtype)
        grid = torch.arange(8.0).reshape((-1, 1) if axis == 0 else (1, -1))
        tensors["offset"][:, axis] = coordinate - grid
        tensors["offset"][:, 1 - axis] = 0.25
        assert_right(run(emulated, tensors, case, kernel), tensors, case, kernel)


@pytest.mark.parametrize("kernel", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_samples_outside_do_not_see_the_image(emulated, value: float, kernel: str) -> None:
    case = Case(n=1, channels=3, bias=False)
    tensors = case.tensors(KERNELS[kernel].dtype, coordinates=torch.float32)
    tensors["input"][:] = value
    tensors["offset"][:] = float("nan")
    tensors["offset"][:, ::3] = 1e30
    assert (run(emulated, tensors, case, KERNELS[kernel]) == 0).all()


@pytest.mark.parametrize("kernel", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("channels", [1, 3, 8])
def test_nan_in_one_weight_group_stays_there(emulated, channels: int, kernel: str) -> None:
    case = Case(n=1, channels=2 * channels, out_channels=6, groups=2)
    tensors = case.tensors(KERNELS[kernel].dtype)
    clean = run(emulated, tensors, case, KERNELS[kernel])
    for group in (0, 1):
        spoiled = tensors["input"].clone()
        spoiled[:, channels * group : channels * (group + 1)] = float("nan")
        output = run(emulated, {**tensors, "input": spoiled}, case, KERNELS[kernel]).unflatten(1, (2, 3))
        assert torch.equal(output[:, 1 - group], clean.unflatten(1, (2, 3))[:, 1 - group])
        assert output[:, group].isnan().any()


@pytest.mark.parametrize("kernel", ["float32", "tf32", "bfloat16"])
def test_any_order_of_threads_gives_the_same(emulated, kernel: str) -> None:
    case = Case(n=2, channels=24, out_channels=20, size=(9, 17), offset_groups=3)
    tensors = case.tensors(KERNELS[kernel].dtype)
    first = run(emulated, tensors, case, KERNELS[kernel])
    for schedule in ("mixed", "ahead"):
        emulated.set_schedule(schedule)
        for seed in (2, 3):
            assert torch.equal(run(emulated, tensors, case, KERNELS[kernel], seed=seed), first)


def test_empty_batch(emulated) -> None:
    case = Case(n=0)
    assert run(emulated, case.tensors(torch.float32), case, KERNELS["float32"]).shape == (0, 6, 8, 9)
