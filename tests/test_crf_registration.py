"""How the response-curve operators are registered with PyTorch: fake kernels, autograd, vmap, compile and export."""

import pytest
import torch
from torch import Tensor

import hdrops
from hdrops.testing import assert_close

pytestmark = pytest.mark.device
DEVICE = torch.get_default_device().type

OPS = torch.ops.hdrops
LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.mT.contiguous().mT,
}


def samples(layout="contiguous", dtype=torch.float32, n=2):
    """Every operator with arguments: (name, arguments of the forward operator)."""
    x = LAYOUTS[layout](torch.rand(n, 3, 5, 4).to(dtype))
    positions = torch.float64 if dtype == torch.float64 else torch.float32
    curve = torch.rand(1, 3, 9, dtype=positions)
    codes = LAYOUTS[layout](torch.randint(256, (n, 3, 5, 4), dtype=torch.uint8))
    return {
        "linear": ("crf_lookup", [x, curve, "linear", None]),
        "nearest": ("crf_lookup", [x, curve[:, :1], "nearest", 1.0]),
        "codes": ("crf_lookup", [codes, torch.rand(1, 1, 256).to(dtype), "linear", None]),
        "tents": ("tent_histogram", [x, [2, 3]]),
        "values": ("value_histogram", [x, 7]),
        "quantize": ("quantize_ste", [x, 5, False]),
    }


def backward_samples(layout="contiguous"):
    for key, (name, arguments) in samples(layout).items():
        grad_output = torch.randn_like(getattr(OPS, name).default(*arguments))
        if name == "crf_lookup":
            for mask in ([True, True], [True, False], [False, True], [False, False]):
                yield f"{key} {mask}", OPS._crf_lookup_backward.default, [grad_output, *arguments, mask]
        else:
            kept = arguments[:1] + arguments[2:] if name == "quantize_ste" else arguments
            yield key, getattr(OPS, f"_{name}_backward").default, [grad_output, *kept]


def requiring_grad(arguments):
    return [a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]


def described(results):
    results = [results] if isinstance(results, Tensor) else results
    return [(tuple(t.shape), t.stride(), t.dtype) for t in results]


def on_fake(op, arguments):
    with torch._subclasses.FakeTensorMode() as mode:
        return described(op(*[mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("key", samples())
def test_opcheck(key, layout):
    name, arguments = samples(layout)[key]
    torch.library.opcheck(getattr(OPS, name).default, requiring_grad(arguments))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck_of_other_dtypes(dtype):
    for name, arguments in samples(dtype=dtype).values():
        torch.library.opcheck(getattr(OPS, name).default, requiring_grad(arguments), test_utils=("test_faketensor",))


def test_opcheck_of_the_backward_operators():
    for _, op, arguments in backward_samples():
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", [0, 1, 2])
def test_fake_kernels_have_the_real_strides(layout, n):
    for name, arguments in samples(layout, n=n).values():
        op = getattr(OPS, name).default
        assert on_fake(op, arguments) == described(op(*arguments)), name
    for key, op, arguments in backward_samples(layout):
        assert on_fake(op, arguments) == described(op(*arguments)), key


def pipeline(x: Tensor, curve: Tensor) -> Tensor:
    y = hdrops.quantize_ste(hdrops.crf_lookup(x, curve), levels=16)
    z = hdrops.crf_lookup(x, curve[:, :1], mode="nearest")
    return y.square().sum() + z.mean() + hdrops.tent_histogram(x).sum() + hdrops.value_histogram(x).square().sum()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiles_for_all_sizes_at_once(layout):
    torch._dynamo.reset()
    compiled = torch.compile(pipeline, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n, height, width in [(2, 8, 9), (5, 12, 7), (4, 20, 21)]:
            x = LAYOUTS[layout](torch.rand(n, 3, height, width, dtype=torch.float64))
            curve = torch.rand(1, 3, 11, dtype=torch.float64)
            results = []
            for function in (compiled, pipeline):
                leaves = [x.clone().requires_grad_(), curve.clone().requires_grad_()]
                value = function(*leaves)
                results.append([value.detach(), *torch.autograd.grad(value, leaves)])
            for got, want in zip(*results, strict=True):
                torch.testing.assert_close(got, want)


def test_codes_compile():
    torch._dynamo.reset()
    codes, curve = torch.randint(256, (2, 3, 5, 4), dtype=torch.uint8), torch.rand(1, 3, 19)
    compiled = torch.compile(hdrops.crf_lookup, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(codes, curve), hdrops.crf_lookup(codes, curve))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiles_with_inductor(layout):
    """Inductor holds the kernels to the strides that the fake ones promised."""
    torch._dynamo.reset()
    x, curve = LAYOUTS[layout](torch.rand(2, 3, 6, 5)), torch.rand(1, 3, 11)
    got = torch.compile(hdrops.crf_lookup, fullgraph=True)(x, curve)
    want = hdrops.crf_lookup(x, curve)
    assert torch.equal(got, want) and got.stride() == want.stride()


def test_exports(tmp_path):
    class Pipeline(torch.nn.Module):
        def forward(self, x: Tensor, curve: Tensor) -> Tensor:
            return pipeline(x, curve)

    inputs = (torch.rand(2, 3, 6, 5), torch.rand(1, 3, 11))
    auto = torch.export.Dim.AUTO
    program = torch.export.export(Pipeline(), inputs, dynamic_shapes=({0: auto, 2: auto, 3: auto}, None))
    torch.export.save(program, tmp_path / "pipeline.pt2")
    loaded = torch.export.load(tmp_path / "pipeline.pt2").module()
    for n, height in [(2, 6), (4, 9)]:
        x = torch.rand(n, 3, height, 8)
        torch.testing.assert_close(loaded(x, inputs[1]), pipeline(x, inputs[1]))


@pytest.mark.parametrize("in_dims", [(0, None), (0, 0), (None, 0), (2, 1)])
@pytest.mark.parametrize("curves", [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_vmap_of_the_lookup(in_dims, curves):
    def batched(shape, dim):
        tensor = torch.rand(shape if dim is None else (*shape[:dim], 4, *shape[dim:]))
        return tensor, [tensor if dim is None else tensor.select(dim, b) for b in range(4)]

    x, xs = batched((2, 3, 5, 6), in_dims[0])
    curve, cs = batched((*curves, 7), in_dims[1])
    got = torch.vmap(hdrops.crf_lookup, in_dims)(x, curve)
    want = torch.stack([hdrops.crf_lookup(a, b) for a, b in zip(xs, cs, strict=True)])
    torch.testing.assert_close(got, want)


def test_vmap_without_channels():
    x, curve = torch.rand(4, 9), torch.rand(4, 7)
    got = torch.vmap(hdrops.crf_lookup)(x, curve)
    torch.testing.assert_close(got, torch.stack([hdrops.crf_lookup(a, b) for a, b in zip(x, curve, strict=True)]))


@pytest.mark.parametrize(
    "function", [hdrops.tent_histogram, hdrops.value_histogram, hdrops.quantize_ste], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("dim", [0, 2])
def test_vmap_of_the_others(function, dim):
    x = torch.rand(2, 2, 2, 3, 4)
    got = torch.vmap(function, dim)(x)
    torch.testing.assert_close(got, torch.stack([function(x.select(dim, b)) for b in range(2)]))


def test_batched_gradients():
    x, curve = torch.rand(2, 3, 4, 5, requires_grad=True), torch.rand(1, 3, 8, requires_grad=True)
    for output in (hdrops.crf_lookup(x, curve), hdrops.tent_histogram(x), hdrops.quantize_ste(x)):
        inputs = (x, curve) if output.shape == x.shape and output.grad_fn.name().find("lookup") >= 0 else (x,)
        directions = torch.randn(3, *output.shape)
        got = torch.autograd.grad(output, inputs, directions, is_grads_batched=True, retain_graph=True)
        for b in range(3):
            want = torch.autograd.grad(output, inputs, directions[b], retain_graph=True)
            for left, right in zip(got, want, strict=True):
                torch.testing.assert_close(left[b], right)


def test_autocast_changes_nothing():
    """16-bit pixels meet a float32 curve; the gradient of each keeps its dtype."""
    curve = torch.rand(1024, requires_grad=True)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.rand(1, 3, 6, 7).to(dtype).requires_grad_()
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            output = hdrops.crf_lookup(x, curve)
        assert output.dtype == dtype
        assert_close(output, hdrops.reference.crf.crf_lookup(x.double(), curve.double()))
        grad_x, grad_curve = torch.autograd.grad(output.float().sum(), (x, curve))
        assert grad_x.dtype == dtype and grad_curve.dtype == torch.float32


CALLS = {
    "crf_lookup": lambda x, backend=None: hdrops.crf_lookup(x, x.reshape(-1)[:7] ** 2, backend=backend),
    "tent_histogram": lambda x, backend=None: hdrops.tent_histogram(x, backend=backend) ** 2,
    "value_histogram": lambda x, backend=None: hdrops.value_histogram(x, backend=backend) ** 2,
    "quantize_ste": lambda x, backend=None: hdrops.quantize_ste(x, backend=backend) ** 2,
}


@pytest.mark.parametrize("name", CALLS)
def test_second_derivatives_raise_and_the_reference_has_them(name):
    x = torch.rand(1, 2, 3, 4, dtype=torch.float64).requires_grad_()
    (first,) = torch.autograd.grad(CALLS[name](x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{name}: second derivatives .* backend='reference'"):
        first.sum().backward()
    (first,) = torch.autograd.grad(CALLS[name](x, "reference").sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert second.any()


def test_second_derivatives_of_the_reference_are_right():
    x = (torch.randint(4, (2, 3, 2, 2)) + 0.1 + 0.8 * torch.rand(2, 3, 2, 2, dtype=torch.float64)) / 4
    curve = torch.rand(2, 3, 5, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(
        hdrops.reference.crf.crf_lookup, (x.requires_grad_(), curve.requires_grad_()), check_fwd_over_rev=True
    )


@pytest.mark.parametrize("name", CALLS)
def test_forward_mode_raises_and_the_reference_has_it(name):
    x, direction = torch.rand(1, 2, 3, 4, dtype=torch.float64), torch.rand(1, 2, 3, 4, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=f"{name}: forward-mode differentiation"):
        torch.func.jvp(CALLS[name], (x,), (direction,))
    _, tangent = torch.func.jvp(lambda t: CALLS[name](t, "reference"), (x,), (direction,))
    leaf = x.clone().requires_grad_()
    weights = torch.randn_like(tangent)
    (gradient,) = torch.autograd.grad(CALLS[name](leaf, "reference"), leaf, weights)
    torch.testing.assert_close((tangent * weights).sum(), (gradient * direction).sum())


@pytest.mark.parametrize("name", CALLS)
def test_functional_gradients_raise_and_the_reference_has_them(name):
    x = torch.rand(1, 2, 3, 4, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=f"{name}: torch.func.grad, vjp and jacrev"):
        torch.func.grad(lambda t: CALLS[name](t).sum())(x)
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(CALLS[name](leaf).sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda t: CALLS[name](t, "reference").sum())(x), want)
