"""How deform_conv2d is registered with PyTorch: fake kernels, autograd, autocast, vmap, compile and export."""

import functools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import hdrops
from hdrops import _backends, _load
from hdrops.ops import _common
from hdrops.testing import DeformConv2dCase as Case
from hdrops.testing import assert_close, rounded_products

pytestmark = pytest.mark.device
DEVICE = torch.get_default_device().type

OP = torch.ops.hdrops.deform_conv2d.default
BACKWARD = torch.ops.hdrops._deform_conv2d_backward.default
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.mT.contiguous().mT,
}
CASES = {
    "plain": Case(),
    "groups_strided": Case(channels=8, size=(11, 9), stride=(2, 1), dilation=(1, 2), groups=2, offset_groups=4),
    "bare": Case(mask=False, bias=False, kernel=(1, 2), padding=(0, 0)),
    "one_channel": Case(channels=1, out_channels=1),
    "one_row": Case(size=(1, 6)),
    "empty_batch": Case(n=0),
}


def arguments(
    case: Case, dtype: torch.dtype = torch.float32, coordinates: torch.dtype | None = None, layout="contiguous"
):
    """The operator's positional arguments; the layout is the input's."""
    tensors = case.tensors(dtype, coordinates)
    tensors["input"] = LAYOUTS[layout](tensors["input"])
    data = [tensors["input"], tensors["offset"], tensors["weight"], tensors.get("bias"), tensors.get("mask")]
    return [*data, list(case.stride), list(case.padding), list(case.dilation)]


def backward_arguments(case: Case, output_mask: list[bool], **options):
    input, offset, weight, _, mask, *geometry = arguments(case, **options)
    grad_output = torch.randn(case.n, case.out_channels, *case.output_size).to(input.dtype)
    return [grad_output, input, offset, weight, mask, *geometry, output_mask, False]


def requiring_grad(values: list) -> list:
    return [value.requires_grad_() if isinstance(value, Tensor) else value for value in values]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_layouts_and_dtypes(layout: str, dtype: torch.dtype) -> None:
    torch.library.opcheck(OP, requiring_grad(arguments(CASES["plain"], dtype, layout=layout)))


@pytest.mark.parametrize("name", CASES)
def test_opcheck_cases(name: str) -> None:
    torch.library.opcheck(OP, requiring_grad(arguments(CASES[name])))


def test_opcheck_mixed_precision() -> None:
    torch.library.opcheck(OP, requiring_grad(arguments(Case(), torch.bfloat16, torch.float32)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wanted", [[True] * 5, [False, True, False, True, False]], ids=["all", "some"])
def test_opcheck_backward(wanted: list[bool], layout: str) -> None:
    values = backward_arguments(Case(), wanted, layout=layout)
    torch.library.opcheck(BACKWARD, values, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


def described(results) -> list[tuple]:
    results = [results] if isinstance(results, Tensor) else results
    return [(tuple(t.shape), t.stride(), t.dtype, t.device.type) for t in results]


def on_fake(op, values: list) -> list[tuple]:
    with torch._subclasses.FakeTensorMode() as mode:
        return described(op(*[mode.from_tensor(v) if isinstance(v, Tensor) else v for v in values]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_fake_kernels_have_the_real_strides(name: str, layout: str) -> None:
    case = CASES[name]
    values = arguments(case, layout=layout)
    assert on_fake(OP, values) == described(OP(*values))
    for wanted in ([True] * 5, [False] * 5, [True, False, True, False, True]):
        values = backward_arguments(case, wanted, layout=layout)
        assert on_fake(BACKWARD, values) == described(BACKWARD(*values))


@pytest.mark.parametrize("name", CASES)
def test_fake_backward_of_mixed_precision(name: str) -> None:
    values = backward_arguments(CASES[name], [True] * 5, dtype=torch.bfloat16, coordinates=torch.float32)
    assert on_fake(BACKWARD, values) == described(BACKWARD(*values))


def loss(tensors: dict[str, Tensor], case: Case) -> Tensor:
    return hdrops.deform_conv2d(**tensors, **case.geometry).square().sum()


def value_and_gradients(function, tensors: dict[str, Tensor]) -> list[Tensor]:
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    value = function(leaves)
    return [value.detach(), *torch.autograd.grad(value, list(leaves.values()))]


# In the first entry no two sizes are equal: the compiler would take them for one.
SIZES = [(2, (8, 9)), (3, (12, 7)), (5, (9, 16)), (2, (20, 21))]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiles_for_all_sizes_at_once(layout: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n, size in SIZES:
            case = Case(n=n, size=size, channels=14, groups=2, offset_groups=2)
            tensors = case.tensors(torch.float64)
            tensors["input"] = LAYOUTS[layout](tensors["input"])
            got = value_and_gradients(functools.partial(compiled, case=case), tensors)
            wanted = value_and_gradients(functools.partial(loss, case=case), tensors)
            for left, right in zip(got, wanted, strict=True):
                torch.testing.assert_close(left, right)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiles_with_inductor(layout: str) -> None:
    """Inductor holds the kernels to the strides that the fake ones promised; alone in a graph they need no compiler."""
    torch._dynamo.reset()
    case = Case()
    tensors = case.tensors(torch.float32)
    tensors["input"] = LAYOUTS[layout](tensors["input"])

    def function(tensors: dict[str, Tensor]) -> Tensor:
        return hdrops.deform_conv2d(**tensors, **case.geometry)

    def gradients(function) -> list[Tensor]:
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
        output = function(leaves)
        grad_output = torch.linspace(-1, 1, output.numel()).view(output.shape)
        return [output.detach(), *torch.autograd.grad(output, list(leaves.values()), grad_output)]

    for left, right in zip(gradients(torch.compile(function, fullgraph=True)), gradients(function), strict=True):
        assert left.stride() == right.stride()
        torch.testing.assert_close(left, right)


def test_compiles_under_autocast() -> None:
    torch._dynamo.reset()
    case = Case()
    tensors = case.tensors(torch.float32)

    def function(tensors: dict[str, Tensor]) -> Tensor:
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            return hdrops.deform_conv2d(**tensors, **case.geometry)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(tensors)
    assert compiled.dtype == torch.bfloat16
    assert torch.equal(compiled, function(tensors))


def test_compiled_errors_are_the_same() -> None:
    torch._dynamo.reset()
    case = Case()
    tensors = {**case.tensors(torch.float32), "bias": torch.zeros(5)}
    compiled = torch.compile(loss, backend="aot_eager")
    with pytest.raises(
        ValueError, match="deform_conv2d: bias must have one value for each of 6 output channels, got 5"
    ):
        compiled(tensors, case)


class Layer(torch.nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        tensors = case.tensors(torch.float32)
        self.case = case
        self.weight, self.bias = torch.nn.Parameter(tensors["weight"]), torch.nn.Parameter(tensors["bias"])

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        return hdrops.deform_conv2d(input, offset, self.weight, self.bias, mask=mask, **self.case.geometry)


@pytest.mark.parametrize("dynamic", [False, True])
def test_exports(dynamic: bool, tmp_path) -> None:
    case = Case(offset_groups=2)
    layer, tensors = Layer(case), case.tensors(torch.float32)
    inputs = tuple(tensors[name] for name in ("input", "offset", "mask"))
    auto = torch.export.Dim.AUTO
    shapes = [{0: auto, 2: auto, 3: auto}] * 3 if dynamic else None
    program = torch.export.export(layer, inputs, dynamic_shapes=shapes)
    assert [node.target for node in program.graph.nodes if node.target is OP] == [OP]
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    assert torch.equal(loaded(*inputs), layer(*inputs))
    if dynamic:
        tensors = Case(n=3, size=(13, 10), offset_groups=2).tensors(torch.float32)
        inputs = tuple(tensors[name] for name in ("input", "offset", "mask"))
        assert torch.equal(loaded(*inputs), layer(*inputs))


NAMES = ("input", "offset", "weight", "bias", "mask")
BATCHED = [
    ("input",),
    ("offset",),
    ("mask",),
    ("weight",),
    ("bias",),
    ("input", "offset", "mask"),
    ("weight", "bias"),
    NAMES,
]


@pytest.mark.parametrize("batched", BATCHED, ids="-".join)
@pytest.mark.parametrize("out_dim", [0, 1])
def test_vmap_equals_a_loop(batched: tuple[str, ...], out_dim: int) -> None:
    case = Case(channels=8, offset_groups=2)
    members = [case.tensors(torch.float64, seed=seed) for seed in range(3)]
    dims = {name: position % 2 if name in batched else None for position, name in enumerate(NAMES)}
    stacked = [
        members[0][name] if dims[name] is None else torch.stack([m[name] for m in members], dims[name])
        for name in NAMES
    ]

    def function(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        return hdrops.deform_conv2d(input, offset, weight, bias, mask=mask, **case.geometry)

    got = torch.vmap(function, in_dims=tuple(dims.values()), out_dims=out_dim)(*stacked)
    loop = [function(*((m if name in batched else members[0])[name] for name in NAMES)) for m in members]
    torch.testing.assert_close(got, torch.stack(loop, out_dim), rtol=1e-12, atol=1e-12)


def test_vmap_without_mask_and_bias() -> None:
    case = Case(mask=False, bias=False)
    tensors = case.tensors(torch.float64)
    inputs = torch.stack([case.tensors(torch.float64, seed=seed)["input"] for seed in range(3)])
    function = functools.partial(hdrops.deform_conv2d, offset=tensors["offset"], weight=tensors["weight"], padding=1)
    wanted = torch.stack([function(input) for input in inputs])
    torch.testing.assert_close(torch.vmap(function)(inputs), wanted, rtol=1e-12, atol=1e-12)


def test_gradients_through_vmap() -> None:
    case = Case(channels=4)
    members = [case.tensors(torch.float64, seed=seed) for seed in range(3)]
    stacked = [torch.stack([m[name] for m in members]).requires_grad_() for name in NAMES]

    def function(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        return hdrops.deform_conv2d(input, offset, weight, bias, mask=mask, **case.geometry)

    got = torch.autograd.grad(torch.vmap(function)(*stacked).square().sum(), stacked)
    each = [value_and_gradients(functools.partial(loss, case=case), member)[1:] for member in members]
    by_name = dict(zip(members[0], zip(*each, strict=True), strict=True))
    for name, gradient in zip(NAMES, got, strict=True):
        torch.testing.assert_close(gradient, torch.stack(by_name[name]), rtol=1e-10, atol=1e-10)


def test_vectorised_jacobian_equals_the_looped_one() -> None:
    case = Case(n=1, channels=2, out_channels=2, size=(3, 3), kernel=(2, 2), padding=(0, 0))
    tensors = case.tensors()

    def function(offset: Tensor) -> Tensor:
        return hdrops.deform_conv2d(**{**tensors, "offset": offset}, **case.geometry)

    jacobian = functools.partial(torch.autograd.functional.jacobian, function, tensors["offset"])
    torch.testing.assert_close(jacobian(vectorize=True), jacobian(vectorize=False))


@pytest.mark.parametrize("ambient", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_follows_the_ambient_dtype_and_keeps_coordinates(given: torch.dtype, ambient: torch.dtype) -> None:
    case = Case(size=(20, 22), reach=6.0)
    tensors = case.tensors(torch.float32)
    tensors["input"] = tensors["input"].to(given)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    with torch.autocast(DEVICE, dtype=ambient):
        output = hdrops.deform_conv2d(**leaves, **case.geometry)
        raw = OP(*(leaves[name] for name in NAMES), *([1, 1],) * 3)
    assert output.dtype == ambient
    assert torch.equal(output, raw)
    rounded = {name: t if name in ("offset", "mask") else t.to(ambient) for name, t in tensors.items()}
    assert torch.equal(output, hdrops.deform_conv2d(**rounded, **case.geometry))
    output.float().sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == tensors[name].dtype, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_autocast_takes_offsets_of_another_dtype(dtype: torch.dtype) -> None:
    case = Case()
    tensors = case.tensors(torch.float32)
    tensors["offset"] = tensors["offset"].to(dtype)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        output = hdrops.deform_conv2d(**tensors, **case.geometry)
        same = hdrops.deform_conv2d(**{**tensors, "offset": tensors["offset"].float()}, **case.geometry)
    assert torch.equal(output, same)


def test_autocast_leaves_float64_alone() -> None:
    tensors = Case().tensors(torch.float64)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert hdrops.deform_conv2d(**tensors, padding=1).dtype == torch.float64
        with pytest.raises(TypeError, match=r"weight must have the input's dtype torch.float64, got torch.bfloat16"):
            hdrops.deform_conv2d(**{**tensors, "weight": tensors["weight"].float()}, padding=1)


def test_autocast_of_the_reference_backend() -> None:
    case = Case()
    tensors = case.tensors(torch.float32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        output = hdrops.deform_conv2d(**tensors, **case.geometry, backend="reference")
        kernels = hdrops.deform_conv2d(**tensors, **case.geometry)
    rounded = {name: t if name in ("offset", "mask") else t.bfloat16() for name, t in tensors.items()}
    exact = hdrops.deform_conv2d(**{name: t.double() for name, t in rounded.items()}, **case.geometry)
    for got, products in ((output, None), (kernels, rounded_products(case, rounded))):
        assert got.dtype == torch.bfloat16
        assert_close(got, exact, terms=36, products=products)


def test_autocast_is_registered_for_both_devices() -> None:
    for key in ("AutocastCPU", "AutocastCUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key("hdrops::deform_conv2d", key)


def test_second_derivatives_raise() -> None:
    case = Case()
    leaves = {name: tensor.requires_grad_() for name, tensor in case.tensors().items()}
    first = torch.autograd.grad(loss(leaves, case), leaves["input"], create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="deform_conv2d: second derivatives"):
        first.square().sum().backward()
    # As one term of a larger second-order graph, too.
    total = loss(leaves, case) + leaves["weight"].pow(3).sum()
    first = torch.autograd.grad(total, leaves["weight"], create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="backend='reference' supports them"):
        torch.autograd.grad(first.sum(), leaves["weight"])


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_raises(name: str) -> None:
    case = Case()
    tensors = case.tensors()
    tangent = torch.ones_like(tensors[name])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tensors[name], tangent)
        with pytest.raises(NotImplementedError, match="deform_conv2d: forward-mode differentiation"):
            hdrops.deform_conv2d(**{**tensors, name: dual}, **case.geometry)

    def function(value: Tensor) -> Tensor:
        return hdrops.deform_conv2d(**{**tensors, name: value}, **case.geometry)

    with pytest.raises(NotImplementedError, match="deform_conv2d: forward-mode differentiation"):
        torch.func.jvp(function, (tensors[name],), (tangent,))
    with pytest.raises(NotImplementedError, match="deform_conv2d: forward-mode differentiation"):
        torch.func.jacfwd(function)(tensors[name])


def test_forward_mode_of_something_else_does_not_disturb() -> None:
    case = Case()
    tensors = case.tensors()
    with torch.autograd.forward_ad.dual_level():
        torch.autograd.forward_ad.make_dual(torch.zeros(1), torch.ones(1))
        output = hdrops.deform_conv2d(**tensors, **case.geometry)
    assert torch.equal(output, hdrops.deform_conv2d(**tensors, **case.geometry))


def test_functional_gradients_raise_and_the_reference_has_them() -> None:
    case = Case()
    tensors = case.tensors()

    def function(input: Tensor, backend: str | None = None) -> Tensor:
        return hdrops.deform_conv2d(**{**tensors, "input": input}, **case.geometry, backend=backend).square().sum()

    def of_a_batch(inputs: Tensor) -> Tensor:
        return torch.func.vmap(function)(inputs).sum()

    input, inputs = tensors["input"], torch.stack([tensors["input"]] * 2)
    for call in (
        lambda: torch.func.grad(function)(input),
        lambda: torch.func.vmap(torch.func.grad(function))(inputs),
        lambda: torch.func.grad(of_a_batch)(inputs),
    ):
        with pytest.raises(NotImplementedError, match=r"deform_conv2d: torch.func.grad, vjp and jacrev are not built"):
            call()
    leaf = input.clone().requires_grad_()
    wanted = torch.autograd.grad(function(leaf), leaf)[0]
    torch.testing.assert_close(torch.func.grad(function)(input, "reference"), wanted)


def test_passes_torchs_determinism_to_the_backward_operator() -> None:
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is BACKWARD:
                seen.append((list(args[-2]), args[-1]))
            return func(*args, **(kwargs or {}))

    case = Case()
    tensors = case.tensors(torch.float32)
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            weight = tensors["weight"].clone().requires_grad_()
            output = hdrops.deform_conv2d(**{**tensors, "weight": weight}, **case.geometry)
            with Watch():
                output.sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
    only_weight = [False, False, True, False, False]
    assert seen == [(only_weight, False), (only_weight, True)]


def test_passes_the_tf32_switch_to_both_operators(monkeypatch) -> None:
    monkeypatch.setattr(_common, "allow_tf32", lambda tensor: True)
    seen = {}

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen[func] = args
            return func(*args, **(kwargs or {}))

    case = Case()
    tensors = case.tensors(torch.float32)
    weight = tensors["weight"].clone().requires_grad_()
    with Watch():
        hdrops.deform_conv2d(**{**tensors, "weight": weight}, **case.geometry).sum().backward()
    assert len(seen[OP]) == 9
    assert seen[OP][-1] is True
    assert len(seen[BACKWARD]) == 11
    assert seen[BACKWARD][-1] is True


@pytest.fixture
def matmul_precision():
    """torch's switch, by its newer name; restored afterwards."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield matmul
    matmul.fp32_precision = before


def test_tf32_follows_torchs_switch(matmul_precision) -> None:
    def of(device: str, dtype: torch.dtype) -> bool:
        return _common.allow_tf32(SimpleNamespace(device=torch.device(device), dtype=dtype))

    for precision, allowed in (("ieee", False), ("tf32", True)):
        matmul_precision.fp32_precision = precision
        assert of("cuda", torch.float32) is allowed
        assert not of("cuda", torch.bfloat16)
        assert not of("cuda", torch.float64)
        assert not of("cpu", torch.float32)


def test_compiled_calls_follow_the_tf32_switch(matmul_precision) -> None:
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def function(tensor: Tensor) -> Tensor:
        return tensor + 1 if _common._matmul_allows_tf32() else tensor

    for precision, wanted in (("ieee", 0), ("tf32", 1), ("ieee", 0)):
        matmul_precision.fp32_precision = precision
        assert function(torch.zeros(())) == wanted


def test_a_gpu_that_is_too_old_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(_load, "cuda_status", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    tensor = SimpleNamespace(device=torch.device("cuda", 0))
    reason = _backends.can_run_cuda(tensor)
    assert reason == (
        "Tesla V100 has compute capability 7.0, and the CUDA kernels need 7.5 or later (pass backend='reference')"
    )
    with pytest.raises(NotImplementedError, match=r"deform_conv2d: backend cuda cannot run this call: Tesla V100"):
        _backends.choose("deform_conv2d", tensor, "cuda", {"cuda": _backends.can_run_cuda})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert _backends.can_run_cuda(tensor) is None


def test_mixed_devices_are_refused() -> None:
    tensors = Case().tensors(torch.float32)
    for name in ("offset", "weight", "bias", "mask"):
        with pytest.raises(ValueError, match=rf"deform_conv2d: {name} must be on input's device cpu, got meta"):
            hdrops.deform_conv2d(**{**tensors, name: tensors[name].to("meta")}, padding=1)
