"""The Triton kernels of global context, interpreted on CPU tensors, against the float64 reference."""

import pytest
import torch

import hdrops
import test_global_context as cpu_tests

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPES = {
    "several_tiles": {"n": 2, "channels": 20, "size": (31, 29), "hidden": 5},
    "many_splits": {"n": 1, "channels": 40, "size": (40, 37), "hidden": 16},
    "empty": {"n": 0},
    "one_pixel": {"size": (1, 1)},
    "one_channel": {"channels": 1, "hidden": 2},
    "one_unit": {"hidden": 1},
    "many_channels": {"n": 1, "channels": 300, "size": (6, 7), "hidden": 75},
}


@pytest.fixture(autouse=True)
def on_triton(monkeypatch):
    """The comparisons call the public functions; these have one backend here."""
    monkeypatch.setattr(hdrops._backends, "_REQUESTED", "triton")


@pytest.mark.parametrize("fusion", ["add", "mul"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_equals_reference(name, dtype, layout, fusion):
    cpu_tests.check_against_reference(cpu_tests.arguments(**SHAPES[name], dtype=dtype, layout=layout), fusion)


def test_splits_of_several_tiles(monkeypatch):
    from hdrops.triton import global_context as launches

    monkeypatch.setattr(launches, "_PROGRAMS", 3)
    for layout in ("contiguous", "channels_last"):
        tensors = cpu_tests.arguments(1, 60, (40, 37), 16, torch.float32, layout)
        for fusion in ("add", "mul"):
            cpu_tests.check_against_reference(tensors, fusion)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [2.0**10, -(2.0**20)])
def test_large_logits(size, dtype):
    cpu_tests.test_large_logits(size, dtype, "contiguous")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_stay_in_their_image(value):
    cpu_tests.test_nan_and_infinity_stay_in_their_image((20, 3), value, "contiguous")


def test_a_bias_that_is_not_finite_is_not_hidden():
    tensors = cpu_tests.arguments()
    tensors[2].fill_(torch.inf)
    assert hdrops.context_pool(*tensors[:3]).isnan().all()
    assert hdrops.global_context(*tensors).isnan().all()


def test_subsets_of_gradients():
    for wanted in (("input",), ("key_weight",), ("key_bias",), ("input", "norm_weight")):
        cpu_tests.test_subsets_of_gradients(wanted, "mul")


def test_opcheck_and_compile():
    for layout in ("contiguous", "channels_last"):
        tensors = cpu_tests.leaves_of(cpu_tests.arguments(1, 3, (2, 4), 2, torch.float32, layout))
        torch.library.opcheck(torch.ops.hdrops._context_pool_triton.default, tuple(tensors[:3]))
        torch.library.opcheck(torch.ops.hdrops._global_context_triton.default, (*tensors, "mul", 1e-5))


def test_too_many_channels_are_refused():
    tensors = cpu_tests.arguments(1, 1025, (1, 1), 1, torch.float32)
    with pytest.raises(NotImplementedError, match="at most 1024 channels, the input has 1025"):
        hdrops.global_context(*tensors)


def test_second_derivatives_are_refused():
    tensors = cpu_tests.leaves_of(cpu_tests.arguments(1, 2, (2, 2), 2))
    (first,) = torch.autograd.grad(hdrops.global_context(*tensors).square().sum(), tensors[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="global_context: second derivatives"):
        first.sum().backward()
