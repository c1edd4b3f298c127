"""deform_conv2d's CUDA backward pass, run by the emulator, against the float64 reference."""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from hdrops.reference import deform_conv2d as reference
from hdrops.testing import DeformConv2dCase as Case
from hdrops.testing import assert_close

pytestmark = pytest.mark.asan

NAMES = ("input", "offset", "weight", "bias", "mask")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HALF = (torch.bfloat16, torch.float16)
GEOMETRIES = {
    "plain": Case(),
    "no_mask_no_bias": Case(mask=False, bias=False),
    "asymmetric": Case(size=(11, 14), kernel=(3, 2), stride=(2, 1), padding=(0, 3), dilation=(1, 2)),
    "groups": Case(channels=8, out_channels=12, groups=4),
    "offset_groups": Case(channels=8, offset_groups=4),
    "both_groups": Case(channels=12, out_channels=6, groups=3, offset_groups=2),
    "offset_group_across_groups": Case(channels=12, out_channels=4, groups=2, offset_groups=3),
    "depthwise": Case(channels=6, out_channels=6, groups=6, offset_groups=6, kernel=(2, 2)),
    "pointwise": Case(kernel=(1, 1), padding=(0, 0), channels=5, out_channels=7),
    "one_channel": Case(channels=1, out_channels=1),
    "large_kernel": Case(n=1, kernel=(5, 7), padding=(2, 3), channels=3, out_channels=5, size=(6, 7)),
    "one_pixel": Case(size=(1, 1), n=3),
    "one_row": Case(size=(1, 37)),
    "far": Case(reach=15.0),
    "wide_channels": Case(n=1, channels=40, out_channels=35, size=(9, 10)),
    "eight_offset_groups": Case(n=1, channels=64, out_channels=32, size=(7, 9), offset_groups=8),
    "several_tiles": Case(n=2, channels=8, out_channels=6, size=(13, 17), kernel=(2, 2), padding=(0, 0)),
    "large_batch": Case(n=9, channels=3, out_channels=4, size=(4, 5)),
    "very_wide_channels": Case(n=1, channels=280, out_channels=9, size=(3, 4), kernel=(1, 2), offset_groups=4),
    "offset_group_across_chunks": Case(
        n=1, channels=192, out_channels=4, size=(4, 5), kernel=(1, 2), groups=2, offset_groups=3
    ),
    "many_outputs": Case(n=1, channels=3, out_channels=270, size=(3, 4), kernel=(2, 1)),
    "tall_and_far": Case(n=2, channels=5, out_channels=3, size=(50, 3), kernel=(3, 1), reach=40.0),
    "offset_groups_of_two": Case(channels=6, offset_groups=3),
}


@dataclass(frozen=True)
class Mode:
    """How a backward pass is run."""

    capability: int = 90
    multiprocessors: int = 4
    channels_last: bool = False
    deterministic: bool = False
    allow_tf32: bool = False
    seed: int = 1
    wanted: tuple[str, ...] = NAMES


def as_array(tensor: Tensor | None) -> np.ndarray | None:
    """A tensor's elements in their order in memory; those of 16 bits as integers."""
    if tensor is None:
        return None
    if tensor.dtype in HALF:
        return tensor.view(torch.uint16).numpy()
    return tensor.numpy()


def run(emulated, tensors: dict[str, Tensor], case: Case, grad_output: Tensor, mode: Mode) -> dict[str, Tensor]:
    """The wanted gradients, by name."""
    input = tensors["input"]

    def laid_out(tensor: Tensor) -> Tensor:
        return tensor.permute(0, 2, 3, 1).contiguous() if mode.channels_last else tensor.contiguous()

    arguments = {**tensors, "bias": torch.empty(case.out_channels, dtype=input.dtype)}
    gradients = {
        name: torch.full_like(laid_out(arguments[name]) if name == "input" else arguments[name], float("nan"))
        for name in tensors
        if name in mode.wanted
    }
    arrays = {
        "input": as_array(laid_out(input)),
        "grad_output": as_array(laid_out(grad_output)),
        **{name: as_array(tensors.get(name)) for name in ("offset", "weight", "mask")},
        **{f"grad_{name}": as_array(gradients.get(name)) for name in NAMES},
    }
    sizes = [case.n, case.channels, *case.size, case.out_channels, *case.output_size, *case.kernel]
    sizes += [*case.stride, *case.padding, *case.dilation, case.groups, case.offset_groups]
    emulated.set_seed(mode.seed)
    emulated.set_device(mode.capability, mode.multiprocessors)
    emulated.deform_conv2d_backward(
        str(input.dtype).removeprefix("torch."),
        sizes,
        mode.channels_last,
        tensors["offset"].dtype == torch.float32,
        "mask" in tensors and tensors["mask"].dtype == torch.float32,
        mode.deterministic,
        mode.allow_tf32,
        arrays,
    )
    if mode.channels_last and "input" in gradients:
        gradients["input"] = gradients["input"].permute(0, 3, 1, 2)
    return gradients


def expected(tensors: dict[str, Tensor], case: Case, grad_output: Tensor) -> dict[str, Tensor]:
    """All gradients of the float64 reference on the same values."""
    leaves = {name: tensor.detach().double().clone().requires_grad_() for name, tensor in tensors.items()}
    output = reference.deform_conv2d(**leaves, **case.geometry)
    gradients = torch.autograd.grad(output, list(leaves.values()), grad_output.double())
    return dict(zip(leaves, gradients, strict=True))


def gradient_like(case: Case, dtype: torch.dtype) -> Tensor:
    shape = (case.n, case.out_channels, *case.output_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def rounded_weight_products(tensors: dict[str, Tensor], case: Case, grad_output: Tensor) -> Tensor:
    """Root of the sum of the squared products of each element of the weight's gradient: grad_output times columns."""
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    taps = case.kernel[0] * case.kernel[1]
    picks = torch.eye(taps, dtype=torch.float64).repeat(case.channels, 1).reshape(-1, 1, *case.kernel)
    columns = reference.deform_conv2d(
        exact["input"], exact["offset"], picks, None, case.stride, case.padding, case.dilation, exact.get("mask")
    )
    squares = columns.square().reshape(case.n, case.groups, -1, columns.shape[2] * columns.shape[3])
    gradient = grad_output.double().square().reshape(case.n, case.groups, -1, squares.shape[3])
    return torch.einsum("ngop,ngcp->goc", gradient, squares).sqrt().reshape(tensors["weight"].shape)


# Half a unit in the last place, which rounding a factor of each product costs at most, with the margin of bfloat16's
# entry in the table.
ROUNDED_FACTOR = {torch.bfloat16: 2**-7, torch.float16: 2**-10}


def assert_matches(
    emulated, tensors: dict[str, Tensor], case: Case, mode: Mode, grad_output: Tensor | None = None
) -> dict[str, Tensor]:
    if grad_output is None:
        grad_output = gradient_like(case, tensors["input"].dtype)
    actual = run(emulated, tensors, case, grad_output, mode)
    wanted = expected(tensors, case, grad_output)
    assert set(actual) == set(wanted) & set(mode.wanted)
    taps = case.kernel[0] * case.kernel[1]
    sites = case.n * case.output_size[0] * case.output_size[1]
    from_output = case.out_channels // case.groups
    terms = {
        "input": from_output * taps,
        "offset": from_output * (case.channels // case.offset_groups),
        "weight": sites,
        "bias": sites,
        "mask": from_output * (case.channels // case.offset_groups),
    }
    for name in actual:
        want = wanted[name]
        if name == "weight" and tensors["input"].dtype in HALF:
            # Columns are rounded to the data's type: the table's term for products with a rounded factor.
            allowed = ROUNDED_FACTOR[tensors["input"].dtype] * rounded_weight_products(tensors, case, grad_output)
            error = (actual[name].double() - want).abs()
            assert (error <= allowed + 1.01 * torch.finfo(tensors["input"].dtype).eps * want.abs() + 1e-6).all()
        else:
            assert_close(actual[name], want, terms=terms[name], name=name)
    return actual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_equals_reference(emulated, name: str, dtype: torch.dtype) -> None:
    case = GEOMETRIES[name]
    assert_matches(emulated, case.tensors(dtype), case, Mode())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["plain", "both_groups", "offset_group_across_chunks", "several_tiles"])
def test_deterministic_mode_equals_reference(emulated, name: str, dtype: torch.dtype) -> None:
    case = GEOMETRIES[name]
    assert_matches(emulated, case.tensors(dtype), case, Mode(deterministic=True))


@pytest.mark.parametrize("deterministic", [False, True], ids=["floats", "deterministic"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [Case(), Case(channels=16, out_channels=24, offset_groups=2, size=(6, 7))], ids=["padded", "in_place"]
)
def test_channels_last(emulated, case: Case, dtype: torch.dtype, deterministic: bool) -> None:
    assert_matches(emulated, case.tensors(dtype), case, Mode(channels_last=True, deterministic=deterministic))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("name", ["plain", "both_groups", "wide_channels"])
def test_devices_without_matrix_units(emulated, name: str, dtype: torch.dtype) -> None:
    case = GEOMETRIES[name]
    assert_matches(emulated, case.tensors(dtype), case, Mode(capability=75))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("coordinates", [("offset", "mask"), ("offset",), ("mask",)], ids="-".join)
def test_float_offsets_beside_half_data(emulated, coordinates: tuple[str, ...], dtype: torch.dtype) -> None:
    case = Case(channels=8, offset_groups=2)
    tensors = case.tensors(dtype)
    for name in coordinates:
        tensors[name] = tensors[name].float()
    for deterministic in (False, True):
        gradients = assert_matches(emulated, tensors, case, Mode(deterministic=deterministic))
        assert {name: gradients[name].dtype for name in tensors} == {name: tensors[name].dtype for name in tensors}


@pytest.mark.parametrize("name", ["plain", "both_groups", "wide_channels", "many_outputs"])
def test_tf32_is_exact_on_values_that_it_holds(emulated, name: str) -> None:
    """Small integers and no offsets: products of the rounded factors are exact, so only the sums' layout can be wrong.

    The exactness of the factors is what the mode gives up; that it does is seen on other values.
    """
    case = GEOMETRIES[name]
    tensors = {key: value.float() for key, value in case.tensors(torch.bfloat16).items()}
    tensors["offset"] = tensors["offset"].round()
    grad_output = gradient_like(case, torch.bfloat16).float()
    tensors["mask"] = tensors["mask"].round()
    assert_matches(emulated, tensors, case, Mode(allow_tf32=True), grad_output)
    rough, exact = (
        run(emulated, case.tensors(torch.float32), case, gradient_like(case, torch.float32), Mode(allow_tf32=allowed))
        for allowed in (True, False)
    )
    for key in ("input", "weight"):
        error = float((rough[key] - exact[key]).norm() / exact[key].norm())
        assert 0 < error < 2**-10, key


@pytest.mark.parametrize("wanted", [s for r in range(1, 6) for s in itertools.combinations(NAMES, r)], ids="-".join)
def test_each_subset_of_gradients(emulated, wanted: tuple[str, ...]) -> None:
    case = Case(channels=8, offset_groups=2, n=1)
    assert_matches(emulated, case.tensors(torch.float32), case, Mode(wanted=wanted))


SPECIAL = {
    "nan": float("nan"),
    "inf": float("inf"),
    "minus_1e30": -1e30,
    "beyond_int32": 3e9,
    "integer": 2.0,
    "half": 0.5,
}


@pytest.mark.parametrize("deterministic", [False, True], ids=["floats", "deterministic"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("components", [(0,), (1,)], ids=["y", "x"])
@pytest.mark.parametrize("value", SPECIAL)
def test_special_offsets(
    emulated, value: str, components: tuple[int, ...], dtype: torch.dtype, deterministic: bool
) -> None:
    case = Case(n=1, size=(5, 17), channels=4)
    tensors = case.tensors(dtype)
    if dtype in HALF:
        tensors["offset"] = tensors["offset"].float()
    pairs = tensors["offset"].unflatten(1, (9, 2))
    for component in components:
        pairs[:, ::2, component] = SPECIAL[value]
    gradients = assert_matches(emulated, tensors, case, Mode(deterministic=deterministic))
    if value not in ("integer", "half"):
        assert (gradients["offset"].unflatten(1, (9, 2))[:, ::2] == 0).all()
        assert (gradients["mask"][:, ::2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("position", [-1.0, 0.0, 7.0, 8.0])
def test_exact_borders(emulated, position: float, dtype: torch.dtype) -> None:
    """Samples at, just below and just above -1, 0, H-1 and H, along each axis: values and right-hand derivatives."""
    size, step = 8, {torch.float64: 2.0**-40, torch.float32: 2.0**-18}[dtype]
    case = Case(n=1, size=(size, size), kernel=(1, 1), padding=(0, 0), channels=3)
    for axis, shift in itertools.product((0, 1), (-step, 0.0, step)):
        tensors = case.tensors(dtype)
        grid = torch.arange(size, dtype=dtype).reshape((-1, 1) if axis == 0 else (1, -1))
        tensors["offset"][:, axis] = position + shift - grid
        tensors["offset"][:, 1 - axis] = 0.25
        gradients = assert_matches(emulated, tensors, case, Mode())
        if not -1 < position + shift < size:
            assert (gradients["offset"] == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_samples_outside_do_not_see_the_image(emulated, value: float) -> None:
    case = Case(n=1, channels=3)
    tensors = case.tensors(torch.float32)
    tensors["input"][:] = value
    tensors["mask"][:] = value
    tensors["offset"][:] = float("nan")
    tensors["offset"][:, ::3] = 1e30
    for deterministic in (False, True):
        gradients = run(emulated, tensors, case, gradient_like(case, torch.float32), Mode(deterministic=deterministic))
        for name in ("input", "offset", "weight", "mask"):
            assert (gradients[name] == 0).all(), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so_in_deterministic_mode(emulated, value: float, dtype: torch.dtype) -> None:
    case = Case(n=2, size=(9, 10), channels=3)
    tensors, grad_output = case.tensors(dtype), gradient_like(case, dtype)
    grad_output[0, 1, 4, 4] = value
    plain = run(emulated, tensors, case, grad_output, Mode())["input"]
    fixed = run(emulated, tensors, case, grad_output, Mode(deterministic=True))["input"]
    assert 0 < (~plain.isfinite()).sum() < plain.numel() / 2
    assert torch.equal(plain.isnan(), fixed.isnan())
    assert torch.equal(plain[plain.isinf()], fixed[plain.isinf()])
    wanted = expected(tensors, case, torch.where(grad_output.isfinite(), grad_output, 0))["input"]
    finite = plain.isfinite()
    assert_close(fixed[finite], wanted[finite], terms=54)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("exponent", [-60, 0, 60])
def test_fixed_point_follows_the_values(emulated, exponent: int, dtype: torch.dtype) -> None:
    """Gradients far from one, and all samples on one pixel: as accurate, and no overflow."""
    case = Case(n=1, size=(9, 10), channels=3)
    tensors = case.tensors(dtype)
    rows, columns = torch.arange(9, dtype=dtype).reshape(-1, 1), torch.arange(10, dtype=dtype)
    taps = torch.arange(9)
    pairs = tensors["offset"].unflatten(1, (9, 2))
    pairs[:, :, 0] = 4 - rows + 1 - (taps // 3).reshape(-1, 1, 1)
    pairs[:, :, 1] = 5 - columns + 1 - (taps % 3).reshape(-1, 1, 1)
    tensors["mask"] = tensors["mask"].abs()
    tensors["weight"] = tensors["weight"].abs()
    grad_output = gradient_like(case, dtype).abs() * 2.0**exponent
    wanted = expected(tensors, case, grad_output)["input"]
    assert (wanted != 0).sum() == 3
    actual = run(emulated, tensors, case, grad_output, Mode(deterministic=True))["input"]
    assert torch.equal(actual != 0, wanted != 0)
    assert_close(actual, wanted, terms=6 * 810)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["several_tiles", "both_groups"])
def test_deterministic_mode_is_bitwise_repeatable(emulated, name: str, dtype: torch.dtype) -> None:
    """Blocks and threads in another order each time; the other gradients repeat without the mode."""
    case = GEOMETRIES[name]
    tensors, grad_output = case.tensors(dtype), gradient_like(case, dtype)
    for deterministic in (False, True):
        first, *others = (
            run(emulated, tensors, case, grad_output, Mode(deterministic=deterministic, seed=seed))
            for seed in (1, 2, 3)
        )
        for other in others:
            for key in first:
                if key != "input" or deterministic:
                    assert torch.equal(first[key], other[key]), key


def test_the_order_of_blocks_shows_without_the_mode(emulated) -> None:
    """That the test above can fail."""
    case = GEOMETRIES["several_tiles"]
    tensors, grad_output = case.tensors(torch.float32), gradient_like(case, torch.float32)
    results = [run(emulated, tensors, case, grad_output, Mode(seed=seed))["input"] for seed in range(4)]
    assert any(not torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("multiprocessors", [1, 200])
def test_any_number_of_multiprocessors(emulated, multiprocessors: int) -> None:
    case = Case(n=2, size=(23, 29), channels=5, out_channels=4, kernel=(2, 1), padding=(0, 0))
    assert_matches(emulated, case.tensors(torch.float32), case, Mode(multiprocessors=multiprocessors))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_batch(emulated, dtype: torch.dtype) -> None:
    case = Case(n=0)
    for deterministic in (False, True):
        mode = Mode(deterministic=deterministic)
        gradients = run(emulated, case.tensors(dtype), case, gradient_like(case, dtype), mode)
        assert gradients["input"].shape == (0, 4, 8, 9)
        assert (gradients["weight"] == 0).all()
        assert (gradients["bias"] == 0).all()
