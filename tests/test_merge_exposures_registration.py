"""How merge_exposures is registered with PyTorch, its module, and the calls it refuses."""

import pytest
import torch
from torch import Tensor

import hdrops
from merge_exposures_cases import FLOATS, bracket, log_times, response

pytestmark = pytest.mark.device
DEVICE = torch.get_default_device().type
OP = torch.ops.hdrops.merge_exposures.default


# Registration


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_opcheck(dtype, interleaved):
    stack = bracket(dtype, 2, 3, 3, 4, 5, interleaved)
    times, curve, weight = log_times(3).float(), response(16, 2, 3).float(), torch.tensor([0.0, 1.0, 0.0])
    for tensor in (stack, times, curve):
        tensor.requires_grad_(tensor.is_floating_point())
    mask = torch.rand(1, 3, 1, 4, 5)
    torch.library.opcheck(OP, (stack, times, curve, weight, mask, True))
    torch.library.opcheck(OP, (stack, times, None, weight, mask < 0.3, False))
    backward = torch.ops.hdrops._merge_exposures_backward.default
    output_gradient = torch.rand(2, 3, 4, 5).to(dtype if dtype in FLOATS else torch.float32)
    arguments = tuple(t.detach() for t in (output_gradient, stack, times, curve, weight, mask))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(backward, (*arguments, True, [True, True, True]), test_utils=tests)


@pytest.mark.parametrize("interleaved", [False, True])
def test_compile_without_recompiling_for_sizes(interleaved):
    torch._dynamo.reset()
    compiled = torch.compile(hdrops.merge_exposures, fullgraph=True, dynamic=True, backend="aot_eager")
    times, curve = log_times(3).float().requires_grad_(), response(256, 1, 3).float().requires_grad_()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for height in (6, 9, 12):
            stack = bracket(torch.uint8, 2, 3, 3, height, 7, interleaved)
            radiance, eager = compiled(stack, times, curve), hdrops.merge_exposures(stack, times, curve)
            assert torch.equal(radiance, eager) and radiance.stride() == eager.stride()
            got, want = (torch.autograd.grad(r.sum(), (times, curve)) for r in (radiance, eager))
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_export():
    class Merge(torch.nn.Module):
        def forward(self, stack: Tensor, times: Tensor) -> Tensor:
            return hdrops.merge_exposures(stack, times)

    stack, times = bracket(torch.uint8), log_times(4).float()
    program = torch.export.export(Merge(), (stack, times))
    assert torch.equal(program.module()(stack, times), hdrops.merge_exposures(stack, times))


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (1, 0, None), (None, 0, 1)])
def test_vmap_equals_a_loop(in_dims):
    def batched(tensor: Tensor, dim: int | None) -> Tensor:
        return tensor[0] if dim is None else tensor.movedim(0, dim)

    inputs = [
        torch.stack([bracket(torch.float32, 2, 3) for _ in range(4)]),
        torch.stack([log_times(3).float() for _ in range(4)]),
        torch.stack([response(16, 1, 3).float() for _ in range(4)]),
    ]
    mapped = torch.vmap(hdrops.merge_exposures, in_dims)(*(batched(t, d) for t, d in zip(inputs, in_dims, strict=True)))
    for k in range(4):
        one = hdrops.merge_exposures(*(t[0 if d is None else k] for t, d in zip(inputs, in_dims, strict=True)))
        assert torch.equal(mapped[k], one)


def test_autocast_merges_half_precision_in_float32():
    stack, times = bracket(torch.bfloat16), log_times(4).float()
    for backend in (DEVICE, "reference"):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            radiance = hdrops.merge_exposures(stack, times, backend=backend)
        assert torch.equal(radiance, hdrops.merge_exposures(stack.float(), times, backend=backend))


# The module


def test_module_trains_its_curve_and_saves_it():
    stack, times = bracket(torch.float32, 1, 3), log_times(3).float()
    layer = hdrops.nn.ExposureMerge(response(32, 1, 3).float(), learnable=True)
    target = hdrops.merge_exposures(stack, times, response(32, 1, 3).float()).log()
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        loss = (layer(stack, times).log() - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 100
    other = hdrops.nn.ExposureMerge(torch.zeros(1, 3, 32), learnable=True)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(stack, times), layer(stack, times))


def test_module_passes_its_options_on():
    stack, times, table = bracket(torch.uint8), log_times(4).float(), torch.rand(7)
    mask = torch.rand(1, 4, 1, 9, 13)
    layer = hdrops.nn.ExposureMerge(weight=table, fallback=False)
    assert not list(layer.parameters())
    wanted = hdrops.merge_exposures(stack, times, weight=table, mask=mask, fallback=False)
    assert torch.equal(layer(stack, times, mask), wanted)
    assert "weight=table" in repr(layer)
    with pytest.raises(ValueError, match="ExposureMerge: learnable=True needs a curve"):
        hdrops.nn.ExposureMerge(learnable=True)


# Errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"stack": torch.rand(2, 4, 3, 5)}, ValueError, r"stack must be \[N, P, C, H, W\], got shape \[2, 4, 3, 5\]"),
        ({"stack": torch.zeros(2, 4, 3, 5, 6, dtype=torch.int32)}, TypeError, "stack must be .*int32"),
        ({"stack": torch.rand(2, 0, 3, 5, 6)}, ValueError, "at least one frame"),
        ({"log_exposures": torch.zeros(4)}, ValueError, r"log_exposures must be \[N or 1, P\] = \[2 or 1, 4\], got"),
        ({"log_exposures": torch.zeros(1, 3)}, ValueError, r"log_exposures must be .*got shape \[1, 3\]"),
        ({"log_exposures": torch.zeros(1, 4).long()}, TypeError, "log_exposures must be floating, got torch.int64"),
        ({"log_exposures": torch.tensor([[0, torch.nan, 1, 2]])}, ValueError, "log_exposures must be finite, got nan"),
        ({"log_exposures": torch.tensor([[0, 1, torch.inf, 2]])}, ValueError, "log_exposures must be finite.* frame 2"),
        ({"curve": torch.rand(3, 256)}, ValueError, r"curve must be \[L\] or \[N or 1, C or 1, L\] = \[2 or 1, 3 or 1"),
        ({"curve": torch.rand(1, 2, 256)}, ValueError, r"curve must be .*got shape \[1, 2, 256\]"),
        ({"curve": torch.rand(0)}, ValueError, "curve must have at least one entry"),
        ({"curve": torch.arange(256)}, TypeError, "curve must be floating, got torch.int64"),
        ({"weight": "robertson"}, ValueError, "weight must be one of hat, debevec, uniform or a tensor.*'robertson'"),
        ({"weight": torch.rand(2, 3)}, ValueError, r"weight must be a table \[L\], got shape \[2, 3\]"),
        (
            {"weight": torch.tensor([0.0, -1.0])},
            ValueError,
            "weight must be finite and not negative, got -1 in entry 1",
        ),
        (
            {"mask": torch.ones(2, 4, 3, 5, 6)},
            ValueError,
            r"mask must be \[N or 1, P, 1, H, W\] = \[2 or 1, 4, 1, 5, 6\]",
        ),
        ({"mask": torch.ones(1, 4, 1, 5, 6).int()}, TypeError, "mask must be bool or floating, got torch.int32"),
        ({"stack": [[0.5]]}, TypeError, "merge_exposures: stack must be a tensor, got list"),
        ({"log_exposures": [0.0]}, TypeError, "merge_exposures: log_exposures must be a tensor, got list"),
        ({"curve": [0.0, 1.0]}, TypeError, "merge_exposures: curve must be a tensor or None, got list"),
        ({"mask": [True]}, TypeError, "merge_exposures: mask must be a tensor or None, got list"),
        ({"weight": [1.0]}, ValueError, r"weight must be one of hat, debevec, uniform or a tensor.*got \[1.0\]"),
        ({"fallback": "yes"}, TypeError, "merge_exposures: fallback must be a bool, got 'yes'"),
        ({"backend": "opencl"}, ValueError, "backend must be one of"),
        ({"backend": "cuda"}, NotImplementedError, "backend cuda cannot run this call: the tensors are on cpu"),
        ({"curve": torch.rand(9, device="meta")}, ValueError, "curve must be on the stack's device cpu, got meta"),
    ],
)
def test_errors(change, error, message):
    arguments = {"stack": torch.rand(2, 4, 3, 5, 6), "log_exposures": torch.zeros(1, 4), **change}
    with pytest.raises(error, match=f"merge_exposures: .*{message}" if error is not TypeError else message):
        hdrops.merge_exposures(**arguments)
