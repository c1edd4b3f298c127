"""deform_conv2d computes what OP-1 says: against the float64 reference, identities, and at the awkward places."""

import doctest
import itertools
import os
import subprocess
import sys

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import hdrops
from hdrops.reference import deform_conv2d as reference
from hdrops.testing import DEFORM_CONV2D_CASES as GEOMETRIES
from hdrops.testing import DeformConv2dCase as Case
from hdrops.testing import assert_close, rounded_products

pytestmark = [pytest.mark.device, pytest.mark.usefixtures("one_thread")]
DEVICE = torch.get_default_device().type

NAMES = ("input", "offset", "weight", "bias", "mask")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def run(tensors: dict[str, Tensor], case: Case, grad_output: Tensor | None = None) -> dict[str, Tensor]:
    """Output and, with ``grad_output``, all gradients of the CPU kernels."""
    return _run(hdrops.deform_conv2d, tensors, case, grad_output)


def expected(tensors: dict[str, Tensor], case: Case, grad_output: Tensor | None = None) -> dict[str, Tensor]:
    """The same of the float64 reference on the same values."""
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    return _run(reference.deform_conv2d, exact, case, None if grad_output is None else grad_output.double())


def _run(function, tensors: dict[str, Tensor], case: Case, grad_output: Tensor | None) -> dict[str, Tensor]:
    if grad_output is None:
        return {"output": function(**tensors, **case.geometry)}
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    output = function(**leaves, **case.geometry)
    gradients = torch.autograd.grad(output, list(leaves.values()), grad_output)
    return {"output": output.detach(), **dict(zip(leaves, gradients, strict=True))}


def gradient_like(case: Case, dtype: torch.dtype) -> Tensor:
    shape = (case.n, case.out_channels, *case.output_size)
    return torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(1), dtype=torch.float64).to(dtype)


def assert_all_close(
    actual: dict[str, Tensor],
    wanted: dict[str, Tensor],
    case: Case,
    products: Tensor | None = None,
    weight_products: Tensor | None = None,
) -> None:
    """Compares output and gradients; the products of output and weight gradient are given if a factor is rounded."""
    rounded = {"output": products, "weight": weight_products}
    taps = case.kernel[0] * case.kernel[1]
    sites = case.n * case.output_size[0] * case.output_size[1]
    from_output = case.out_channels // case.groups
    terms = {
        "output": case.channels // case.groups * taps,
        "input": from_output * taps,
        "offset": from_output * (case.channels // case.offset_groups),
        "weight": sites,
        "bias": sites,
        "mask": from_output * (case.channels // case.offset_groups),
    }
    assert actual.keys() == wanted.keys()
    for name in actual:
        assert_close(actual[name], wanted[name], terms=terms[name], products=rounded.get(name), name=name)


def assert_matches_reference(tensors: dict[str, Tensor], case: Case, grad_output: Tensor | None = None) -> None:
    if grad_output is None:
        grad_output = gradient_like(case, tensors["input"].dtype)
    wanted = expected(tensors, case, grad_output)
    assert_all_close(run(tensors, case, grad_output), wanted, case, rounded_products(case, tensors))


@pytest.mark.asan
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_equals_reference(name: str, dtype: torch.dtype) -> None:
    case = GEOMETRIES[name]
    assert_matches_reference(case.tensors(dtype), case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["plain", "no_mask_no_bias", "both_groups", "eight_offset_groups", "many_tiles"])
def test_float32_offsets_beside_half_data(name: str, dtype: torch.dtype) -> None:
    case = GEOMETRIES[name]
    tensors = case.tensors(dtype, coordinates=torch.float32)
    assert_matches_reference(tensors, case)
    gradients = run(tensors, case, gradient_like(case, dtype))
    assert gradients["offset"].dtype == torch.float32
    assert gradients["input"].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("coordinates", ["offset", "mask"])
def test_one_of_offset_and_mask_in_float32(coordinates: str, dtype: torch.dtype) -> None:
    case = Case()
    tensors = case.tensors(dtype)
    tensors[coordinates] = tensors[coordinates].float()
    assert_matches_reference(tensors, case)
    gradients = run(tensors, case, gradient_like(case, dtype))
    assert {name: gradients[name].dtype for name in tensors} == {name: tensors[name].dtype for name in tensors}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_coordinates_beyond_1024_are_exact(dtype: torch.dtype) -> None:
    # Alternating columns: 0.3 px from an even column the sample is 0.3, and 16-bit coordinates would give 0 or 1 here.
    width = 3000
    columns = torch.arange(width) % 2
    input = columns.to(dtype).reshape(1, 1, 1, width).expand(1, 1, 3, width).contiguous()
    offset = torch.zeros(1, 2, 3, width)
    offset[:, 1] = 0.3
    output = hdrops.deform_conv2d(input, offset.to(torch.float32), torch.ones(1, 1, 1, 1, dtype=dtype))
    wanted = torch.where(columns == 0, 0.3, 0.7).expand(3, width)[:, :-1]
    error = (output[0, 0, :, :-1].double() - wanted).abs().max()
    assert error < {torch.float32: 2e-4, torch.float16: 5e-4, torch.bfloat16: 3e-3}[dtype]


@st.composite
def cases(draw) -> Case:
    groups, offset_groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    channels = groups * offset_groups * draw(st.integers(1, 3))
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    return Case(
        n=draw(st.integers(0, 3)),
        channels=channels,
        out_channels=groups * draw(st.integers(1, 4)),
        size=(least[0] + draw(st.integers(0, 12)), least[1] + draw(st.integers(0, 30))),
        kernel=kernel,
        stride=draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        padding=padding,
        dilation=dilation,
        groups=groups,
        offset_groups=offset_groups,
        mask=draw(st.booleans()),
        bias=draw(st.booleans()),
        reach=draw(st.sampled_from([0.0, 0.4, 3.0, 50.0])),
    )


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(case=cases(), seed=st.integers(0, 1000), channels_last=st.booleans())
def test_random_geometry_equals_reference(case: Case, seed: int, channels_last: bool) -> None:
    tensors = case.tensors(seed=seed)
    if channels_last:
        tensors["input"] = tensors["input"].contiguous(memory_format=torch.channels_last)
    assert_matches_reference(tensors, case)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("dy", "dx"), [(0, 0), (1, 0), (-2, 3), (4, -1)])
def test_integer_offsets_shift_a_plain_convolution(dy: int, dx: int, dtype: torch.dtype) -> None:
    case = Case(size=(10, 11), channels=4, groups=2, mask=False)
    tensors = case.tensors(dtype)
    tensors["offset"] = torch.tensor([dy, dx]).repeat(9).to(dtype).reshape(1, 18, 1, 1).expand_as(tensors["offset"])
    frame = torch.nn.functional.pad(tensors["input"].double(), (8, 8, 8, 8))
    shifted = frame.roll((-dy, -dx), (2, 3))
    wanted = torch.conv2d(shifted, tensors["weight"].double(), tensors["bias"].double(), groups=2, padding=1)
    assert_close(run(tensors, case)["output"], wanted[:, :, 8:-8, 8:-8], terms=18)


@hypothesis.settings(max_examples=15, deadline=None, derandomize=True)
@hypothesis.given(a=st.floats(-3, 3), b=st.floats(-3, 3), name=st.sampled_from(["input", "weight", "mask"]))
def test_is_linear_in_input_weight_and_mask(a: float, b: float, name: str) -> None:
    case = Case(bias=False, offset_groups=2)
    tensors, others = case.tensors(seed=0), case.tensors(seed=1)
    mixed = run({**tensors, name: a * tensors[name] + b * others[name]}, case)["output"]
    first, second = (run({**tensors, name: part[name]}, case)["output"] for part in (tensors, others))
    assert_close(mixed, a * first + b * second, terms=36, scale=float(first.std() + second.std()) * 3)


def smooth_offsets(offset: Tensor) -> Tensor:
    """The offsets moved away from integers, where the derivative jumps, by at least 0.1."""
    return offset.floor() + 0.1 + 0.8 * (offset - offset.floor())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "case",
    [
        Case(n=1, channels=2, out_channels=2, size=(3, 4), kernel=(2, 2), reach=1.0),
        Case(n=2, channels=4, out_channels=2, size=(3, 3), kernel=(2, 1), groups=2, offset_groups=2, reach=1.0),
    ],
    ids=["plain", "groups"],
)
def test_gradcheck(name: str, case: Case) -> None:
    tensors = case.tensors()
    tensors["offset"] = smooth_offsets(tensors["offset"])

    def function(leaf: Tensor) -> Tensor:
        return hdrops.deform_conv2d(**{**tensors, name: leaf}, **case.geometry)

    assert torch.autograd.gradcheck(function, tensors[name].requires_grad_())


def test_gradcheck_of_a_larger_call() -> None:
    case = Case(channels=16, out_channels=8, size=(9, 10), offset_groups=2)
    tensors = case.tensors()
    tensors["offset"] = smooth_offsets(tensors["offset"])
    leaves = [tensors[name].requires_grad_() for name in NAMES]

    def function(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        return hdrops.deform_conv2d(input, offset, weight, bias, mask=mask, **case.geometry)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("wanted", [s for r in range(1, 6) for s in itertools.combinations(NAMES, r)], ids="-".join)
def test_each_subset_of_gradients(wanted: tuple[str, ...]) -> None:
    case = Case(channels=8, offset_groups=2)
    tensors, grad_output = case.tensors(torch.float32), gradient_like(case, torch.float32)
    everything = run(tensors, case, grad_output)
    leaves = {name: tensor.clone().requires_grad_(name in wanted) for name, tensor in tensors.items()}
    hdrops.deform_conv2d(**leaves, **case.geometry).backward(grad_output)
    for name, leaf in leaves.items():
        if name in wanted:
            assert torch.equal(leaf.grad, everything[name]), name
        else:
            assert leaf.grad is None, name


@pytest.mark.cpu
@pytest.mark.asan
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(n=1, channels=16, out_channels=16, size=(61, 67), reach=4.0),
        Case(n=3, channels=16, out_channels=8, size=(33, 35), offset_groups=8, reach=40.0),
        Case(n=1, channels=6, out_channels=6, size=(50, 70), groups=3),
        Case(n=1, channels=5, out_channels=3, size=(150, 11), reach=40.0),
    ],
    ids=["one_image", "offset_groups", "groups", "tall_and_far"],
)
def test_bitwise_equal_for_any_thread_count(case: Case, dtype: torch.dtype, threads) -> None:
    tensors, grad_output = case.tensors(dtype), gradient_like(case, dtype)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(run(tensors, case, grad_output))
    for other in results[1:]:
        for name, tensor in results[0].items():
            assert torch.equal(tensor, other[name]), name


@pytest.mark.cpu
@pytest.mark.asan
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["plain", "both_groups", "tall_and_far"])
def test_wide_indices_compute_the_same(name: str, dtype: torch.dtype, monkeypatch) -> None:
    """The 64-bit path, which an image of more than 2^31 elements takes, on small ones."""
    case = GEOMETRIES[name]
    tensors, grad_output = case.tensors(dtype), gradient_like(case, dtype)
    narrow = run(tensors, case, grad_output)
    monkeypatch.setenv("HDROPS_INDEX_WIDTH", "64")
    wide = run(tensors, case, grad_output)
    for result in narrow:
        assert torch.equal(wide[result], narrow[result]), result


SPECIAL = {
    "nan": float("nan"),
    "inf": float("inf"),
    "minus_inf": -float("inf"),
    "1e30": 1e30,
    "minus_1e30": -1e30,
    "beyond_int32": 3e9,
    "integer": 2.0,
    "half": 0.5,
}


@pytest.mark.asan
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [16, 17])
@pytest.mark.parametrize("axis", ["y", "x", "both"])
@pytest.mark.parametrize("value", SPECIAL)
def test_special_offsets(value: str, axis: str, width: int, dtype: torch.dtype) -> None:
    case = Case(n=1, size=(5, width), channels=4)
    tensors = case.tensors(dtype, coordinates=torch.float64 if dtype == torch.float64 else torch.float32)
    pairs = tensors["offset"].unflatten(1, (9, 2))
    components = {"y": [0], "x": [1], "both": [0, 1]}[axis]
    for component in components:
        pairs[:, ::2, component] = SPECIAL[value]
    assert_matches_reference(tensors, case)
    gradients = run(tensors, case, gradient_like(case, dtype))
    if value not in ("integer", "half"):
        outside = gradients["offset"].unflatten(1, (9, 2))[:, ::2]
        assert (outside == 0).all()
        assert (gradients["mask"][:, ::2] == 0).all()


@pytest.mark.asan
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("position", ["-1-", "-1", "-1+", "-0", "0", "last-", "last", "last+", "end-", "end", "end+"])
def test_exact_borders(position: str, dtype: torch.dtype) -> None:
    """Samples at, just below and just above -1, 0, H-1 and H, along each axis: values and right-hand derivatives."""
    size, step = 8, {torch.float64: 2.0**-40, torch.float32: 2.0**-18}[dtype]
    anchor = {"-1": -1.0, "-0": -0.0, "0": 0.0, "last": size - 1.0, "end": float(size)}
    name = position[:-1] if position[-1] in "+-" and position not in ("-1", "-0") else position
    coordinate = anchor[name] + step * (position.endswith("+") - position.endswith("-") * (name != position))
    case = Case(n=1, size=(size, size), kernel=(1, 1), padding=(0, 0), channels=3)
    for axis in (0, 1):
        tensors = case.tensors(dtype)
        grid = torch.arange(size, dtype=dtype).reshape((-1, 1) if axis == 0 else (1, -1))
        tensors["offset"][:, axis] = coordinate - grid
        tensors["offset"][:, 1 - axis] = 0.25
        assert_matches_reference(tensors, case)
        if coordinate <= -1 or coordinate >= size:
            assert (run(tensors, case, gradient_like(case, dtype))["offset"] == 0).all()


@pytest.mark.asan
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_samples_outside_do_not_see_the_image(value: float) -> None:
    case = Case(n=1, channels=3, bias=False)
    tensors = case.tensors(torch.float32)
    tensors["input"][:] = value
    tensors["offset"][:] = float("nan")
    tensors["offset"][:, ::3] = 1e30
    assert (run(tensors, case)["output"] == 0).all()
    gradients = run(tensors, case, gradient_like(case, torch.float32))
    for name in ("input", "offset", "weight", "mask"):
        assert (gradients[name] == 0).all(), name


@pytest.mark.asan
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("channels", [1, 3, 8])
@pytest.mark.parametrize("pixel", [(0, 0), (0, -1), (-1, 0), (-1, -1), (5, 5)])
def test_a_pixel_of_nan_reaches_only_what_samples_it(pixel: tuple[int, int], channels: int, value: float) -> None:
    case = Case(n=2, size=(12, 12), channels=channels)
    tensors = case.tensors(torch.float32)
    tensors["input"][0, :, pixel[0], pixel[1]] = value
    wanted = expected(tensors, case)["output"]
    touched = ~wanted.isfinite()
    assert 0 < touched.sum() < touched.numel() / 4
    output = run(tensors, case)["output"]
    assert torch.equal(~output.isfinite(), touched)
    assert_close(output[~touched], wanted[~touched], terms=9 * channels)


@pytest.mark.asan
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 5, 17])
@pytest.mark.parametrize("offset_groups", [1, 2])
def test_nan_in_one_weight_group_stays_there(channels: int, offset_groups: int, dtype: torch.dtype) -> None:
    """Odd numbers of channels, whose last shares its registers, and in bfloat16 its pair, with the next group's."""
    case = Case(n=1, channels=2 * channels, out_channels=6, groups=2, offset_groups=offset_groups)
    tensors = case.tensors(dtype)
    clean = run(tensors, case)["output"]
    for group in (0, 1):
        spoiled = tensors["input"].clone()
        spoiled[:, channels * group : channels * (group + 1)] = float("nan")
        output = run({**tensors, "input": spoiled}, case)["output"].unflatten(1, (2, 3))
        assert torch.equal(output[:, 1 - group], clean.unflatten(1, (2, 3))[:, 1 - group])
        assert output[:, group].isnan().any()


@pytest.mark.asan
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_batch(dtype: torch.dtype) -> None:
    case = Case(n=0)
    results = run(case.tensors(dtype), case, gradient_like(case, dtype))
    assert results["output"].shape == (0, 6, 8, 9)
    assert results["input"].shape == (0, 4, 8, 9)
    assert (results["weight"] == 0).all()
    assert (results["bias"] == 0).all()


def strided(tensor: Tensor) -> Tensor:
    """The same values with a storage offset and every second element of a larger tensor."""
    host = tensor.new_full([2 * size + 1 for size in tensor.shape], float("nan"))
    view = host[tuple(slice(1, None, 2) for _ in tensor.shape)]
    view.copy_(tensor)
    return view


def transposed(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT if tensor.dim() >= 2 else tensor


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def storage_offset(tensor: Tensor) -> Tensor:
    host = torch.cat([tensor.new_full((3,), float("nan")), tensor.flatten()])
    return host[3:].view_as(tensor)


@pytest.mark.asan
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [strided, transposed, channels_last, storage_offset], ids=lambda f: f.__name__)
@pytest.mark.parametrize("which", [*NAMES, "grad_output", "all"])
def test_any_layout_of_any_argument(which: str, layout, dtype: torch.dtype) -> None:
    case = Case(channels=8, offset_groups=2, size=(9, 13))
    tensors, grad_output = case.tensors(dtype), gradient_like(case, dtype)
    wanted = expected(tensors, case, grad_output)
    laid = {name: layout(tensor) if which in (name, "all") else tensor for name, tensor in tensors.items()}
    grad_output = layout(grad_output) if which in ("grad_output", "all") else grad_output
    assert_all_close(run(laid, case, grad_output), wanted, case, rounded_products(case, tensors))


@pytest.mark.asan
def test_expanded_arguments() -> None:
    case = Case(n=3, channels=4, offset_groups=2)
    tensors = case.tensors(torch.float32)
    tensors["input"] = tensors["input"][:1, :1].expand_as(tensors["input"])
    tensors["offset"] = tensors["offset"][:, :, :1, :1].expand_as(tensors["offset"])
    tensors["mask"] = tensors["mask"][:, :1].expand_as(tensors["mask"])
    tensors["weight"] = tensors["weight"][:1].expand_as(tensors["weight"])
    grad_output = torch.ones(()).expand(3, 6, 8, 9)
    assert_matches_reference(tensors, case, grad_output)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [Case(), Case(channels=32, out_channels=32, offset_groups=4)], ids=["small", "wide"])
def test_channels_last_in_channels_last_out(case: Case, dtype: torch.dtype) -> None:
    tensors, grad_output = case.tensors(dtype), gradient_like(case, dtype)
    wanted = expected(tensors, case, grad_output)
    tensors["input"] = channels_last(tensors["input"])
    results = run(tensors, case, channels_last(grad_output))
    assert_all_close(results, wanted, case, rounded_products(case, tensors))
    for name in ("output", "input"):
        assert results[name].is_contiguous(memory_format=torch.channels_last), name
    contiguous = run({**tensors, "input": tensors["input"].contiguous()}, case)["output"]
    assert contiguous.is_contiguous()


@pytest.fixture
def deterministic():
    """torch's deterministic mode, which fills fresh memory with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["plain", "no_mask_no_bias", "both_groups", "far", "many_tiles"])
def test_every_element_is_written(name: str, dtype: torch.dtype, deterministic) -> None:
    assert torch.utils.deterministic.fill_uninitialized_memory
    case = GEOMETRIES[name]
    assert_matches_reference(case.tensors(dtype), case)


SIMD_SCRIPT = """
import sys, torch, hdrops
tensors, geometry, grad_output = torch.load(sys.argv[1])
results = []
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    leaves = {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}
    output = hdrops.deform_conv2d(**leaves, **geometry)
    results.append([output.detach(), *torch.autograd.grad(output, list(leaves.values()), grad_output.to(dtype))])
torch.save((hdrops._load.simd_level(), results), sys.argv[2])
"""


@pytest.mark.cpu
@pytest.mark.parametrize("level", hdrops._load.SIMD_LEVELS)
def test_every_simd_level(level: str, tmp_path) -> None:
    levels = hdrops._load.SIMD_LEVELS
    if levels.index(level) > levels.index(hdrops._load.simd_level()):
        pytest.skip(f"this machine's best instruction set is {hdrops._load.simd_level()}")
    case = Case(channels=20, out_channels=18, size=(11, 13), groups=2, offset_groups=2)
    tensors, grad_output = case.tensors(torch.float16), gradient_like(case, torch.float16)
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    torch.save((tensors, case.geometry, grad_output.bfloat16()), tmp_path / "in.pt")
    command = [sys.executable, "-c", SIMD_SCRIPT, str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    subprocess.run(command, check=True, env={**os.environ, "HDROPS_SIMD": level})
    used, results = torch.load(tmp_path / "out.pt")
    assert used == level
    for dtype, result in zip(DTYPES, results, strict=True):
        cast = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        wanted = expected(cast, case, grad_output.bfloat16().to(dtype))
        products = rounded_products(case, cast) if level in ("avx512_bf16", "amx") else None
        assert_all_close(dict(zip(wanted, result, strict=True)), wanted, case, products)


@pytest.mark.cpu
@pytest.mark.parametrize(
    "case",
    [
        Case(channels=64, out_channels=40, size=(9, 13)),  # a panel and half of one, rows that fill no tile
        Case(n=1, channels=32, out_channels=16, size=(24, 40)),
        Case(channels=64, out_channels=64, groups=2, size=(7, 8)),
        Case(channels=48, out_channels=20, offset_groups=4, size=(6, 11)),  # a depth that 32 does not divide
        Case(n=1, channels=600, out_channels=530, size=(5, 6)),
    ],
    ids=lambda case: f"{case.channels}-{case.out_channels}-{case.groups}-{case.offset_groups}",
)
def test_bf16_products_of_many_channels(case: Case) -> None:
    """Deep enough for the processor's tiles, where it has them."""
    assert_matches_reference(case.tensors(torch.bfloat16), case)


def with_shape(name: str, *shape: int) -> dict[str, Tensor]:
    return {name: torch.zeros(shape)}


WRONG = {
    "input_dimensions": (with_shape("input", 4, 8, 9), {}, r"input must have 4 dimensions \[N, C, H, W\], got 3 "),
    "offset_dimensions": (with_shape("offset", 18, 8, 9), {}, r"offset must have 4 dimensions .* got 3 "),
    "weight_dimensions": (with_shape("weight", 6, 4, 3), {}, r"weight must have 4 dimensions .* got 3 "),
    "mask_dimensions": (with_shape("mask", 9, 8, 9), {}, r"mask must have 4 dimensions .* got 3 "),
    "bias_dimensions": (with_shape("bias", 6, 1), {}, r"bias must have 1 dimension \[O\], got 2 "),
    "no_channels": (
        with_shape("input", 2, 0, 8, 9),
        {},
        r"at least one channel, row and column, got shape \[2, 0, 8, 9\]",
    ),
    "no_weight": (with_shape("weight", 0, 4, 3, 3), {}, r"no empty dimension, got shape \[0, 4, 3, 3\]"),
    "groups": (with_shape("weight", 6, 3, 3, 3), {}, r"C/groups = 3 must divide the input's 4 channels"),
    "group_outputs": (
        with_shape("weight", 5, 2, 3, 3),
        {},
        r"5 output channels must be a multiple of groups = 4/2 = 2",
    ),
    "offset_batch": (with_shape("offset", 1, 18, 8, 9), {}, r"offset must have the input's batch 2, got 1 "),
    "offset_channels": (
        with_shape("offset", 2, 20, 8, 9),
        {},
        r"offset must have 2\*offset_groups\*kh\*kw channels, a multiple of 2\*3\*3 = 18, got 20 "
        r"\(offset shape \[2, 20, 8, 9\]\)",
    ),
    "offset_empty": (with_shape("offset", 2, 0, 8, 9), {}, r"a multiple of 2\*3\*3 = 18, got 0 "),
    "offset_groups": (
        with_shape("offset", 2, 54, 8, 9),
        {},
        r"offset_groups = 54/18 = 3 must divide the input's 4 chan",
    ),
    "offset_size": (with_shape("offset", 2, 18, 8, 8), {}, r"offset must have the output's size 8 x 9, got 8 x 8 "),
    "mask_batch": (with_shape("mask", 1, 9, 8, 9), {}, r"mask must have the input's batch 2, got 1 "),
    "mask_channels": (
        with_shape("mask", 2, 18, 8, 9),
        {},
        r"mask must have offset_groups\*kh\*kw = 1\*3\*3 = 9 channels, got 18",
    ),
    "mask_size": (with_shape("mask", 2, 9, 7, 9), {}, r"mask must have the output's size 8 x 9, got 7 x 9 "),
    "bias_size": (with_shape("bias", 5), {}, r"bias must have one value for each of 6 output channels, got 5 "),
    "kernel": (
        {},
        {"padding": 0, "dilation": 4},
        r"height dilation\*\(kernel-1\)\+1 = 9 must not exceed the padded input's 8 ",
    ),
    "stride": ({}, {"stride": 0}, r"stride must be an integer or a pair of integers >= 1, got 0"),
    "stride_length": ({}, {"stride": (1, 1, 1)}, r"stride must be an integer or a pair .* got \(1, 1, 1\)"),
    "padding": ({}, {"padding": (1, -1)}, r"padding must be an integer or a pair of integers >= 0, got \(1, -1\)"),
    "dilation": ({}, {"dilation": (0, 1)}, r"dilation must be an integer or a pair of integers >= 1, got \(0, 1\)"),
    "huge_stride": ({}, {"stride": 2**70}, r"stride must be below 2\*\*31, got 1180591620717411303424"),
    "huge_padding": ({}, {"padding": (1, 2**31)}, r"padding must be below 2\*\*31, got \(1, 2147483648\)"),
    "backend": ({}, {"backend": "fast"}, r"backend must be one of cpu, cuda, triton, reference or None, got 'fast'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_are_named(name: str) -> None:
    tensors, options, message = WRONG[name]
    case = Case()
    arguments = {**case.tensors(torch.float32), **case.geometry, **tensors, **options}
    with pytest.raises(ValueError, match="^deform_conv2d: .*" + message):
        hdrops.deform_conv2d(**arguments)


WRONG_TYPES = {
    "input_integer": ("input", torch.int64, r"input must be float64, float32, bfloat16 or float16, got torch.int64"),
    "weight": ("weight", torch.float64, r"weight must have the input's dtype torch.float32, got torch.float64"),
    "bias": ("bias", torch.bfloat16, r"bias must have the input's dtype torch.float32, got torch.bfloat16"),
    "offset": ("offset", torch.float16, r"offset must have the input's dtype torch.float32, got torch.float16"),
    "mask": ("mask", torch.float64, r"mask must have the input's dtype torch.float32, got torch.float64"),
}


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_wrong_dtypes_are_named(name: str) -> None:
    argument, dtype, message = WRONG_TYPES[name]
    case = Case()
    tensors = case.tensors(torch.float32)
    tensors[argument] = tensors[argument].to(dtype)
    with pytest.raises(TypeError, match="^deform_conv2d: " + message):
        hdrops.deform_conv2d(**tensors, **case.geometry)


def test_wrong_dtype_beside_half_data() -> None:
    tensors = Case().tensors(torch.float16)
    tensors["offset"] = tensors["offset"].bfloat16()
    with pytest.raises(
        TypeError, match=r"offset must have the input's dtype torch.float16 or torch.float32, got torch.b"
    ):
        hdrops.deform_conv2d(**tensors, **Case().geometry)


@pytest.mark.parametrize("stride", ["1", 1.0, (1, 2.0), None])
def test_wrong_kinds_of_arguments(stride) -> None:
    with pytest.raises(TypeError, match=r"^deform_conv2d: stride must be an integer or a pair of integers"):
        hdrops.deform_conv2d(**Case().tensors(torch.float32), stride=stride)
    with pytest.raises(TypeError, match=r"^deform_conv2d: input must be a tensor, got list"):
        hdrops.deform_conv2d([1.0], torch.zeros(1), torch.zeros(1))


def test_direct_call_refuses_an_image_without_rows() -> None:
    arguments = torch.rand(1, 4, 0, 9), torch.zeros(1, 18, 2, 9), torch.rand(6, 4, 3, 3), None, None
    with pytest.raises(ValueError, match="deform_conv2d: the input must have at least one row and column"):
        torch.ops.hdrops.deform_conv2d.default(*arguments, (1, 1), (2, 1), (1, 1))


COUNT_THREADS = """
import os, torch, hdrops
torch.set_num_threads(2)
def threads_after(size):
    input = torch.rand(1, 8, size, size, requires_grad=True)
    offset, weight = torch.zeros(1, 18, size, size), torch.rand(8, 8, 3, 3)
    hdrops.deform_conv2d(input, offset, weight, padding=1).sum().backward()
    stack = torch.rand(1, 3, 3, size, size)
    hdrops.truncate(hdrops.merge_exposures(stack, torch.zeros(1, 3)))
    return len(os.listdir("/proc/self/task"))
before = len(os.listdir("/proc/self/task"))
print(threads_after(16) - before, threads_after(256) > before)
"""


@pytest.mark.cpu
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
def test_small_calls_wake_no_thread() -> None:
    result = subprocess.run([sys.executable, "-c", COUNT_THREADS], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["0", "True"]


@pytest.mark.cpu
def test_other_backends_and_devices() -> None:
    case = Case()
    tensors = case.tensors(torch.float32)
    with pytest.raises(
        NotImplementedError, match="deform_conv2d: backend cuda cannot run this call: the tensors are on cpu"
    ):
        hdrops.deform_conv2d(**tensors, **case.geometry, backend="cuda")
    with pytest.raises(ValueError, match="deform_conv2d: weight must be on input's device cpu, got meta"):
        hdrops.deform_conv2d(**{**tensors, "weight": tensors["weight"].to("meta")}, **case.geometry)


def test_reference_backend_is_the_reference() -> None:
    case = Case()
    tensors = case.tensors(torch.float32)
    chosen = hdrops.deform_conv2d(**tensors, **case.geometry, backend="reference")
    assert torch.equal(chosen, reference.deform_conv2d(**tensors, **case.geometry))


def test_reference_has_second_and_forward_derivatives() -> None:
    case = Case(n=1, channels=2, out_channels=2, size=(3, 3), kernel=(2, 2), padding=(0, 0), reach=0.5)
    tensors = case.tensors()
    tensors["offset"] = smooth_offsets(tensors["offset"])
    leaves = [tensors[name].requires_grad_() for name in NAMES]

    def function(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        return hdrops.deform_conv2d(input, offset, weight, bias, mask=mask, backend="reference")

    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_positional_call_in_torchvisions_order() -> None:
    case = Case(stride=(2, 1), dilation=(1, 2))
    tensors = case.tensors(torch.float32)
    positional = hdrops.deform_conv2d(
        *(tensors[name] for name in ("input", "offset", "weight", "bias")), (2, 1), (1, 1), [1, 2], tensors["mask"]
    )
    assert torch.equal(positional, run(tensors, case)["output"])


@pytest.mark.cpu
@pytest.mark.parametrize("module", ["hdrops.ops.deform_conv2d", "hdrops.nn"])
def test_the_docstrings_examples_run(module: str) -> None:
    results = doctest.testmod(sys.modules[module])
    assert results.attempted > 0
    assert results.failed == 0
