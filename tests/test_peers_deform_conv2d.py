"""deform_conv2d agrees with torchvision's operator, forward and gradients, on random geometries.

Except where torchvision's offset gradient is not OP-1's: at a coordinate of exactly -1, where its value is zero by the
border rule and its gradient is not, and at infinite offsets, where it is NaN.
"""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import hdrops
from hdrops.testing import DeformConv2dCase as Case

torchvision = pytest.importorskip(
    "torchvision",
    reason="torchvision is not installed: it is the peer that this file compares with",
    exc_type=ImportError,
)


@st.composite
def cases(draw) -> Case:
    groups, offset_groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    return Case(
        n=draw(st.integers(1, 3)),
        channels=groups * offset_groups * draw(st.integers(1, 3)),
        out_channels=groups * draw(st.integers(1, 4)),
        size=(least[0] + draw(st.integers(0, 10)), least[1] + draw(st.integers(0, 10))),
        kernel=kernel,
        stride=draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        padding=padding,
        dilation=dilation,
        groups=groups,
        offset_groups=offset_groups,
        mask=draw(st.booleans()),
        bias=draw(st.booleans()),
        reach=draw(st.sampled_from([0.0, 1.0, 9.0])),
    )


def off_integers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The offsets of a case, multiples of 1/1024, moved half a step."""
    return {**tensors, "offset": tensors["offset"] + 1 / 2048}


def value_and_gradients(function, tensors: dict[str, Tensor], case: Case) -> list[Tensor]:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    output = function(**leaves, **case.geometry)
    grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    return [output.detach(), *torch.autograd.grad(output, list(leaves.values()), grad_output)]


def assert_agrees(case: Case, tensors: dict[str, Tensor], tolerance: float) -> None:
    ours = value_and_gradients(hdrops.deform_conv2d, tensors, case)
    theirs = value_and_gradients(torchvision.ops.deform_conv2d, tensors, case)
    for name, left, right in zip(["output", *tensors], ours, theirs, strict=True):
        error = (left - right).abs().max() / right.abs().max().clamp_min(1.0)
        assert error <= tolerance, f"{name}: {error:.3g} of scale, allowed {tolerance}"


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(case=cases(), seed=st.integers(0, 1000))
def test_agrees_in_float64(case: Case, seed: int) -> None:
    assert_agrees(case, off_integers(case.tensors(seed=seed)), 1e-10)


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(case=cases(), seed=st.integers(0, 1000))
def test_agrees_in_float32(case: Case, seed: int) -> None:
    assert_agrees(case, off_integers(case.tensors(torch.float32, seed=seed)), 1e-5)


@pytest.mark.parametrize("offset_groups", [1, 8])
def test_agrees_on_a_feature_map(offset_groups: int) -> None:
    case = Case(n=1, channels=64, out_channels=64, size=(48, 50), offset_groups=offset_groups, reach=3.0)
    assert_agrees(case, off_integers(case.tensors(torch.float32)), 1e-5)


def test_integer_coordinates_agree() -> None:
    size = 9
    case = Case(size=(size, size), kernel=(1, 1), padding=(0, 0), channels=3)
    tensors = case.tensors()
    coordinates = torch.tensor([-3, -2, *range(size + 2)], dtype=torch.float64)
    places = coordinates[torch.randint(len(coordinates), tensors["offset"].shape)]
    grid = torch.arange(size, dtype=torch.float64)
    tensors["offset"] = places - torch.stack([grid[:, None].expand(size, size), grid.expand(size, size)])
    assert_agrees(case, tensors, 1e-10)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), 1e30])
def test_infinite_offsets_agree(value: float) -> None:
    case = Case(size=(9, 16))
    tensors = off_integers(case.tensors())
    tensors["offset"][:, ::3] = value
    ours = hdrops.deform_conv2d(**tensors, **case.geometry)
    torch.testing.assert_close(ours, torchvision.ops.deform_conv2d(**tensors, **case.geometry), rtol=0, atol=1e-10)


def test_layer_loads_torchvisions_state_dict() -> None:
    theirs = torchvision.ops.DeformConv2d(4, 6, 3, stride=2, padding=1, groups=2)
    ours = hdrops.nn.DeformConv2d(4, 6, 3, stride=2, padding=1, groups=2)
    ours.load_state_dict(theirs.state_dict())
    inputs = torch.randn(2, 4, 9, 8), torch.randn(2, 18, 5, 4), torch.rand(2, 9, 5, 4)
    torch.testing.assert_close(ours(*inputs), theirs(*inputs), rtol=1e-5, atol=1e-5)
    theirs.load_state_dict(ours.state_dict())
