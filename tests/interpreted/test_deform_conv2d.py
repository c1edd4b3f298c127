"""The Triton kernels of deform_conv2d, interpreted on CPU tensors, against the float64 reference.

In float32, float16 and float64: the interpreter's bfloat16 products are wrong. It takes some 10 ms for each step of a
program, so the slow ones of the CPU tests' geometries have fewer taps or images here, and the same channels.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import hdrops
import test_deform_conv2d as cpu_tests
from hdrops.testing import DEFORM_CONV2D_CASES, sizes_of_products, sizes_of_weight_products
from hdrops.testing import DeformConv2dCase as Case
from hdrops.triton import configs

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = cpu_tests.NAMES
GEOMETRIES = {
    **DEFORM_CONV2D_CASES,
    **{
        name: replace(DEFORM_CONV2D_CASES[name], n=1, kernel=(2, 2))
        for name in (
            "groups",
            "offset_groups",
            "both_groups",
            "offset_group_across_groups",
            "depthwise",
            "many_tiles",
            "eight_offset_groups",
            "very_wide_channels",
            "many_outputs",
            "offset_groups_of_two",
        )
    },
    "large_batch": replace(DEFORM_CONV2D_CASES["large_batch"], n=5, kernel=(2, 2)),
    "tall_and_far": replace(DEFORM_CONV2D_CASES["tall_and_far"], n=1, size=(50, 11)),
}
# One of few steps, for what does not depend on the geometry.
TINY = Case(n=1, channels=4, out_channels=4, size=(4, 5), kernel=(1, 2), padding=(0, 1), offset_groups=2)
FORWARD = torch.ops.hdrops._deform_conv2d_triton.default
BACKWARD = torch.ops.hdrops._deform_conv2d_triton_backward.default


def run(tensors: dict[str, Tensor], case: Case, grad_output: Tensor | None) -> dict[str, Tensor]:
    """Output and gradients of the Triton kernels."""
    return cpu_tests._run(
        lambda **arguments: hdrops.deform_conv2d(**arguments, backend="triton"), tensors, case, grad_output
    )


def gradient_like(case: Case, dtype: torch.dtype) -> Tensor:
    return cpu_tests.gradient_like(case, dtype)


def assert_right(tensors: dict[str, Tensor], case: Case, grad_output: Tensor | None = None) -> dict[str, Tensor]:
    """Compares with the reference, and returns the kernels' results."""
    dtype = tensors["input"].dtype
    if grad_output is None:
        grad_output = gradient_like(case, dtype)
    results = run(tensors, case, grad_output)
    products = ()
    if dtype == torch.float16:
        products = sizes_of_products(case, tensors), sizes_of_weight_products(case, tensors, grad_output)
    cpu_tests.assert_all_close(results, cpu_tests.expected(tensors, case, grad_output), case, *products)
    return results


@pytest.mark.parametrize("name", GEOMETRIES)
def test_equals_reference(name: str) -> None:
    case = GEOMETRIES[name]
    assert_right(case.tensors(torch.float32), case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["asymmetric", "no_mask_no_bias", "wide_channels", "pointwise"])
def test_equals_reference_in_other_dtypes(name: str, dtype: torch.dtype) -> None:
    case = GEOMETRIES[name]
    assert_right(case.tensors(dtype), case)


def test_float32_offsets_beside_half_data() -> None:
    results = assert_right(TINY.tensors(torch.float16, coordinates=torch.float32), TINY)
    assert [results[name].dtype for name in ("input", "offset", "mask")] == [torch.float16, *[torch.float32] * 2]


@pytest.mark.parametrize("kernel", ["forward", "backward_data", "backward_weight"])
@pytest.mark.parametrize("device", ["sm_75", "sm_90"])
def test_tiles_of_a_gpu(kernel: str, device: str, monkeypatch) -> None:
    """The tiles a GPU would get, smaller than the interpreter's: several of each kind."""
    choose = configs.choose
    monkeypatch.setattr(
        configs, "choose", lambda name, _, *sizes: choose(name, device if name == kernel else "interpreter", *sizes)
    )
    case = Case(n=1, channels=70, out_channels=80, size=(9, 19), kernel=(1, 1), padding=(0, 0), offset_groups=2)
    assert_right(case.tensors(torch.float32), case)


@pytest.mark.parametrize("axis", [0, 1])
def test_special_offsets(axis: int) -> None:
    """A special value for each tap: NaN, infinities, far outside, integers, halves."""
    values = list(cpu_tests.SPECIAL.values())
    case = Case(n=1, size=(5, 8), kernel=(1, len(values)), padding=(0, 4), channels=3)
    tensors = case.tensors(torch.float32)
    taps = tensors["offset"].unflatten(1, (len(values), 2))
    for tap, value in enumerate(values):
        taps[:, tap, axis] = value
    results = assert_right(tensors, case)
    for tap, name in enumerate(cpu_tests.SPECIAL):
        if name not in ("integer", "half"):
            assert (results["offset"].unflatten(1, (len(values), 2))[:, tap] == 0).all()
            assert (results["mask"][:, tap] == 0).all()


@pytest.mark.parametrize("coordinate", [-1.0, -1 + 2**-18, 0.0, 7 - 2**-18, 7.0, 8 - 2**-18, 8.0])
def test_exact_borders(coordinate: float) -> None:
    case = Case(n=1, size=(8, 8), kernel=(1, 1), padding=(0, 0), channels=2)
    for axis in (0, 1):
        tensors = case.tensors(torch.float32)
        grid = torch.arange(8.0).reshape((-1, 1) if axis == 0 else (1, -1))
        tensors["offset"][:, axis] = coordinate - grid
        tensors["offset"][:, 1 - axis] = 0.25
        assert_right(tensors, case)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_samples_outside_do_not_see_the_image(value: float) -> None:
    tensors = {**TINY.tensors(torch.float32), "bias": torch.zeros(4)}
    tensors["input"][:] = value
    tensors["offset"][:] = math.nan
    tensors["offset"][:, ::3] = 1e30
    results = run(tensors, TINY, gradient_like(TINY, torch.float32))
    for name in ("output", "input", "offset", "weight", "mask"):
        assert (results[name] == 0).all(), name


def test_a_pixel_of_nan_reaches_only_what_samples_it() -> None:
    case = replace(TINY, n=2, size=(9, 9))
    tensors = case.tensors(torch.float32)
    tensors["input"][0, :, 4, 4] = math.nan
    touched = cpu_tests.expected(tensors, case)["output"].isnan()
    assert 0 < touched.sum() < touched.numel() / 4
    assert torch.equal(run(tensors, case, None)["output"].isnan(), touched)


def test_nan_in_one_weight_group_stays_there() -> None:
    case = replace(TINY, channels=6, out_channels=6, groups=2, offset_groups=1)
    tensors = case.tensors(torch.float32)
    clean = run(tensors, case, None)["output"]
    tensors["input"][:, :3] = math.nan
    output = run(tensors, case, None)["output"]
    assert torch.equal(output[:, 3:], clean[:, 3:])
    assert output[:, :3].isnan().any()


def test_empty_batch() -> None:
    case = Case(n=0)
    results = run(case.tensors(torch.float32), case, gradient_like(case, torch.float32))
    assert results["output"].shape == (0, 6, 8, 9)
    assert results["input"].shape == (0, 4, 8, 9)
    assert (results["weight"] == 0).all()
    assert (results["bias"] == 0).all()


@pytest.mark.parametrize("layout", ["channels_last", "strided", "transposed", "storage_offset"])
@pytest.mark.parametrize("channels", [4, 18])
def test_any_layout(layout: str, channels: int) -> None:
    case = replace(TINY, channels=channels)
    lay = getattr(cpu_tests, layout)
    tensors = {name: lay(tensor) for name, tensor in case.tensors(torch.float32).items()}
    results = assert_right(tensors, case, lay(gradient_like(case, torch.float32)))
    for name in ("output", "input"):
        assert results[name].is_contiguous(
            memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format
        )


def test_expanded_arguments() -> None:
    tensors = TINY.tensors(torch.float32)
    tensors["input"] = tensors["input"][:, :1].expand_as(tensors["input"])
    tensors["mask"] = tensors["mask"][..., :1].expand_as(tensors["mask"])
    assert_right(tensors, TINY, torch.ones(()).expand(1, 4, *TINY.output_size))


@pytest.mark.parametrize("wanted", [("input",), ("offset",), ("mask",), ("weight", "bias"), ("input", "mask")])
def test_subsets_of_gradients(wanted: tuple[str, ...]) -> None:
    tensors, grad_output = TINY.tensors(torch.float32), gradient_like(TINY, torch.float32)
    everything = run(tensors, TINY, grad_output)
    leaves = {name: tensor.requires_grad_(name in wanted) for name, tensor in tensors.items()}
    hdrops.deform_conv2d(**leaves, **TINY.geometry, backend="triton").backward(grad_output)
    for name, leaf in leaves.items():
        if name in wanted:
            assert torch.equal(leaf.grad, everything[name]), name
        else:
            assert leaf.grad is None, name


@pytest.fixture
def deterministic():
    """torch's deterministic mode, which fills fresh memory with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", ["asymmetric", "wide_channels"])
def test_deterministic_sums_are_right(name: str, deterministic) -> None:
    """In fixed point, whose unit follows the largest gradient, which here is 1000 times the typical one."""
    case = GEOMETRIES[name]
    grad_output = gradient_like(case, torch.float32)
    grad_output[0, 0, 0, 0] = 1000.0
    assert_right(case.tensors(torch.float32), case, grad_output)


def test_deterministic_sums_cannot_hide_a_nan(deterministic) -> None:
    grad_output = gradient_like(TINY, torch.float32)
    grad_output[0, 0, 0, 0] = math.nan
    assert run(TINY.tensors(torch.float32), TINY, grad_output)["input"].isnan().all()
    assert (run(TINY.tensors(torch.float32), TINY, torch.zeros_like(grad_output))["input"] == 0).all()


def test_deterministic_float64_input_gradient_is_refused(deterministic) -> None:
    tensors = TINY.tensors(torch.float64)
    weight = tensors["weight"].clone().requires_grad_()
    hdrops.deform_conv2d(**{**tensors, "weight": weight}, **TINY.geometry, backend="triton").sum().backward()
    with pytest.raises(NotImplementedError, match="no deterministic input gradient in float64"):
        run(tensors, TINY, gradient_like(TINY, torch.float64))


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name: str) -> None:
    case = Case(n=1, channels=2, out_channels=2, size=(2, 3), kernel=(1, 2), padding=(0, 0), reach=1.0)
    tensors = case.tensors()
    tensors["offset"] = cpu_tests.smooth_offsets(tensors["offset"])

    def function(leaf: Tensor) -> Tensor:
        return hdrops.deform_conv2d(**{**tensors, name: leaf}, **case.geometry, backend="triton")

    assert torch.autograd.gradcheck(function, tensors[name].requires_grad_(), fast_mode=True)


def arguments(dtype: torch.dtype = torch.float32) -> list:
    tensors = TINY.tensors(dtype)
    return [*(tensors[name] for name in NAMES), [1, 1], [0, 1], [1, 1]]


def test_opcheck() -> None:
    values = arguments()
    torch.library.opcheck(FORWARD, [v.requires_grad_() if isinstance(v, Tensor) else v for v in values])


def test_opcheck_backward() -> None:
    input, offset, weight, _, mask, *geometry = arguments()
    values = [gradient_like(TINY, torch.float32), input, offset, weight, mask, *geometry]
    for wanted in ([True] * 5, [False, True, False, True, False]):
        torch.library.opcheck(
            BACKWARD,
            [*values, wanted, False],
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


def test_compiles_and_equals_eager() -> None:
    def function(tensors: dict[str, Tensor]) -> Tensor:
        return hdrops.deform_conv2d(**tensors, **TINY.geometry, backend="triton").square()

    tensors = TINY.tensors(torch.float32)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (TINY.size, (3, 7)):
        tensors = replace(TINY, size=size).tensors(torch.float32)
        torch.testing.assert_close(compiled(tensors), function(tensors))


def test_autocast_follows_the_ambient_dtype_and_keeps_coordinates() -> None:
    tensors = {name: tensor.requires_grad_() for name, tensor in TINY.tensors(torch.float32).items()}
    with torch.autocast("cpu", dtype=torch.float16):
        output = hdrops.deform_conv2d(**tensors, **TINY.geometry, backend="triton")
    assert output.dtype == torch.float16
    rounded = {name: t if name in ("offset", "mask") else t.half() for name, t in tensors.items()}
    assert torch.equal(output, hdrops.deform_conv2d(**rounded, **TINY.geometry, backend="triton"))
    output.float().sum().backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in tensors.values())


def test_vmap_equals_a_loop() -> None:
    members = [TINY.tensors(torch.float32, seed=seed) for seed in range(2)]
    stacked = [torch.stack([member[name] for member in members]) for name in NAMES]

    def function(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        return hdrops.deform_conv2d(input, offset, weight, bias, mask=mask, **TINY.geometry, backend="triton")

    loop = torch.stack([function(*(member[name] for name in NAMES)) for member in members])
    torch.testing.assert_close(torch.vmap(function)(*stacked), loop)


def test_second_derivatives_raise() -> None:
    leaves = {name: tensor.requires_grad_() for name, tensor in TINY.tensors(torch.float32).items()}
    output = hdrops.deform_conv2d(**leaves, **TINY.geometry, backend="triton")
    first = torch.autograd.grad(output.square().sum(), leaves["input"], create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="deform_conv2d: second derivatives"):
        first.sum().backward()


def test_direct_calls_are_checked() -> None:
    values = arguments()
    with pytest.raises(ValueError, match="deform_conv2d: offset must have the output's size"):
        FORWARD(values[0], values[1][..., 1:], *values[2:])
    with pytest.raises(ValueError, match="deform_conv2d: padding must be an integer or a pair of integers >= 0"):
        FORWARD(*values[:6], [0, -1], values[7])
    input, offset, weight, _, mask, *geometry = values
    with pytest.raises(ValueError, match=r"deform_conv2d: grad_output must have shape \[1, 4, 4, 6\]"):
        BACKWARD(torch.zeros(1, 4, 4, 5), input, offset, weight, mask, *geometry, [True] * 5, False)


def test_is_not_the_reference_or_the_cpu_kernel() -> None:
    tensors = TINY.tensors(torch.float16)
    names = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        hdrops.deform_conv2d(**tensors, **TINY.geometry, backend="triton")
    assert "hdrops._deform_conv2d_triton.default" in names
    assert "hdrops.deform_conv2d.default" not in names
