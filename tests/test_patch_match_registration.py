"""How patch_match and patch_swap are registered with PyTorch, and the modules around them."""

import copy
import functools
import pickle

import pytest
import torch
from torch import Tensor

import hdrops

MATCH = torch.ops.hdrops.patch_match.default
MATCH_BACKWARD = torch.ops.hdrops._patch_match_backward.default
SWAP = torch.ops.hdrops.patch_swap.default
SWAP_BACKWARD = torch.ops.hdrops._patch_swap_backward.default
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.mT.contiguous().mT,
}
NAMES = ("match", "match around centers", "swap")


def pair(
    n: int = 2, channels: int = 3, size: tuple[int, int] = (6, 7), dtype: torch.dtype = torch.float32, seed: int = 0
):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, channels, *size, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))


def places(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(1))


def arguments(name: str, dtype: torch.dtype = torch.float32, layout: str = "contiguous", n: int = 2) -> tuple:
    """The operator and its positional arguments."""
    query, key = (LAYOUTS[layout](tensor) for tensor in pair(n, dtype=dtype))
    if name == "swap":
        return SWAP, (key, places(42, n, 5, 4), 3, 1, "exclude")
    centers = None if name == "match" else places(42, n, 6, 7)
    return MATCH, (query, key, [1, 2], centers, 3, "both")


def backward_arguments(
    name: str, layout: str = "contiguous", mask: tuple[bool, bool] = (True, True), n: int = 2
) -> tuple:
    query, key = (LAYOUTS[layout](tensor) for tensor in pair(n))
    if name == "swap":
        grad_output = LAYOUTS[layout](torch.randn(n, 3, 10, 8))
        return SWAP_BACKWARD, (
            grad_output,
            places(42, n, 5, 4),
            [12, 14],
            3,
            2,
            "zero",
            layout == "channels_last",
            False,
        )
    return MATCH_BACKWARD, (torch.randn(n, 6, 7), query, key, places(42, n, 6, 7), 3, "both", list(mask), False)


def requiring_grad(values: tuple) -> tuple:
    return tuple(v.requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v for v in values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, layout: str, dtype: torch.dtype) -> None:
    op, values = arguments(name, dtype, layout)
    torch.library.opcheck(op, requiring_grad(values))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["match", "swap"])
def test_opcheck_backward(name: str, layout: str) -> None:
    op, values = backward_arguments(name, layout)
    torch.library.opcheck(op, values, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


def described(results) -> list[tuple]:
    results = [results] if isinstance(results, Tensor) else results
    return [(tuple(t.shape), t.stride(), t.dtype, t.device.type) for t in results]


@pytest.mark.parametrize("n", [0, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [*NAMES, "match backward", "match backward of the key", "swap backward"])
def test_fake_kernels_promise_the_strides_that_the_kernels_give(kind: str, layout: str, n: int) -> None:
    if kind == "swap backward":
        op, values = backward_arguments("swap", layout, n=n)
    elif kind.startswith("match backward"):
        op, values = backward_arguments("match", layout, (not kind.endswith("key"), True), n=n)
    else:
        op, values = arguments(kind, layout=layout, n=n)
    with torch._subclasses.FakeTensorMode() as mode:
        promised = described(op(*[mode.from_tensor(v) if isinstance(v, Tensor) else v for v in values]))
    assert promised == described(op(*values))


def transfer(query: Tensor, key: Tensor) -> Tensor:
    """All operators in one function of two tensors."""
    coarse = [torch.nn.functional.avg_pool2d(tensor, 2) for tensor in (query, key)]
    first, second = hdrops.patch_match_pyramid([coarse[0], query], [coarse[1], key], radii=[2, 1], normalize="both")
    swapped = hdrops.patch_swap(key, second.index) * second.score.unsqueeze(1)
    return swapped.square().sum() + hdrops.patch_swap(key, first.index, scale=2).sum() + first.score.sum()


def value_and_gradients(function, *tensors: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiles_for_all_sizes_at_once(layout: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(transfer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n, size in ((2, (8, 10)), (3, (12, 14)), (5, (16, 12))):
            tensors = [LAYOUTS[layout](tensor) for tensor in pair(n, 7, size, torch.float64)]
            for got, wanted in zip(
                value_and_gradients(compiled, *tensors), value_and_gradients(transfer, *tensors), strict=True
            ):
                torch.testing.assert_close(got, wanted)


def test_compiled_errors_are_the_same() -> None:
    torch._dynamo.reset()
    query, key = pair()
    compiled = torch.compile(hdrops.patch_match, backend="aot_eager")
    with pytest.raises(ValueError, match="patch_match: patch_size must be one of 1, 3, 5, 7, got 2"):
        compiled(query, key, radius=1, patch_size=2)


class Transfer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.match, self.swap = hdrops.nn.PatchMatch((1, 2), normalize="both"), hdrops.nn.PatchSwap(border="zero")

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        index, score = self.match(query, key)
        return self.swap(key, index), score


@pytest.mark.parametrize("dynamic", [False, True])
def test_exports(dynamic: bool, tmp_path) -> None:
    auto = torch.export.Dim.AUTO
    shapes = ({0: auto, 2: auto, 3: auto},) * 2 if dynamic else None
    program = torch.export.export(Transfer(), pair(), dynamic_shapes=shapes)
    assert [node.target for node in program.graph.nodes if node.target in (MATCH, SWAP)] == [MATCH, SWAP]
    torch.export.save(program, tmp_path / "transfer.pt2")
    loaded = torch.export.load(tmp_path / "transfer.pt2").module()
    for inputs in [pair()] + [pair(3, size=(13, 10))] * dynamic:
        assert all(torch.equal(a, b) for a, b in zip(loaded(*inputs), Transfer()(*inputs), strict=True))


@pytest.mark.parametrize("op", ["patch_match", "patch_swap"])
def test_onnx_says_that_there_is_no_form(op: str) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: torch.onnx.export(dynamo=True) needs it")
    query, key = pair()
    with pytest.raises(Exception) as raised:  # torch wraps it in an error of its own
        if op == "patch_match":
            hdrops.onnx.export(hdrops.nn.PatchMatch(1), (query, key), verbose=False)
        else:
            hdrops.onnx.export(hdrops.nn.PatchSwap(), (key, places(42, 2, 5, 4)), verbose=False)
    messages, error = "", raised.value
    while error is not None:
        messages, error = messages + str(error), error.__cause__
    assert f"hdrops.onnx: {op} cannot be exported: ONNX has no form of it" in messages


def test_the_onnx_translation_refuses() -> None:
    table = hdrops.onnx.translation_table()
    for op, name in ((MATCH, "patch_match"), (SWAP, "patch_swap")):
        with pytest.raises(NotImplementedError, match=f"hdrops.onnx: {name} cannot be exported"):
            table[op]()


@pytest.mark.parametrize("dims", [(0, 0, 0), (1, None, None), (None, 2, 1), (0, 1, None)], ids=str)
def test_vmap_of_a_match_equals_a_loop(dims: tuple) -> None:
    members = [(*pair(seed=seed, dtype=torch.float64), places(42, 2, 6, 7) + seed) for seed in range(3)]

    def function(query: Tensor, key: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
        return hdrops.patch_match(query, key, radius=1, centers=centers)

    stacked = [
        members[0][i] if dim is None else torch.stack([m[i] for m in members], dim) for i, dim in enumerate(dims)
    ]
    got = torch.vmap(function, in_dims=dims)(*stacked)
    each = [function(*((members[0] if dim is None else m)[i] for i, dim in enumerate(dims))) for m in members]
    assert all(torch.equal(a, torch.stack(b)) for a, b in zip(got, zip(*each, strict=True), strict=True))


@pytest.mark.parametrize("dims", [(0, 0), (2, None), (None, 1)], ids=str)
def test_vmap_of_a_swap_equals_a_loop(dims: tuple) -> None:
    members = [(pair(seed=seed)[0], places(42, 2, 5, 4) + seed) for seed in range(3)]
    stacked = [
        members[0][i] if dim is None else torch.stack([m[i] for m in members], dim) for i, dim in enumerate(dims)
    ]
    got = torch.vmap(hdrops.patch_swap, in_dims=dims)(*stacked)
    each = [hdrops.patch_swap(*((members[0] if dim is None else m)[i] for i, dim in enumerate(dims))) for m in members]
    assert torch.equal(got, torch.stack(each))


def test_vmap_of_nothing() -> None:
    query, key = pair()
    score = torch.vmap(lambda image: hdrops.patch_match(image, key, radius=1).score, in_dims=2)(
        query[:, :, None][:, :, :0]
    )
    assert score.shape == (0, query.shape[0], *query.shape[2:])
    swapped = torch.vmap(hdrops.patch_swap, in_dims=(None, 0))(query, torch.zeros(0, query.shape[0], 5, 4).long())
    assert swapped.shape == (0, *query.shape[:2], 5, 4)


class Pyramid(torch.nn.Module):
    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        coarse = [torch.nn.functional.avg_pool2d(image, 2) for image in (query, key)]
        return hdrops.patch_match_pyramid([coarse[0], query], [coarse[1], key], radii=[2, 1])[1].index


@pytest.mark.parametrize("strict", [False, True])
def test_a_pyramid_exports_for_all_sizes_at_once(strict: bool) -> None:
    sizes = {0: torch.export.Dim("n"), 2: torch.export.Dim("h", min=4), 3: torch.export.Dim("w", min=4)}
    images = pair(2, 3, (8, 10))
    exported = torch.export.export(Pyramid(), images, dynamic_shapes=(sizes, sizes), strict=strict).module()
    other = pair(1, 3, (13, 22))
    assert torch.equal(exported(*other), Pyramid()(*other))


def test_gradients_through_vmap() -> None:
    members = [pair(seed=seed, dtype=torch.float64, size=(8, 10)) for seed in range(3)]
    stacked = [torch.stack(tensors) for tensors in zip(*members, strict=True)]

    def summed(query: Tensor, key: Tensor) -> Tensor:
        return torch.vmap(transfer)(query, key).sum()

    _, *got = value_and_gradients(summed, *stacked)
    each = [value_and_gradients(transfer, *member)[1:] for member in members]
    for left, right in zip(got, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(left, torch.stack(right))


@pytest.mark.parametrize("ambient", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_follows_the_ambient_dtype(backend: str, ambient: torch.dtype) -> None:
    query, key = pair()
    leaves = query.clone().requires_grad_(), key.clone().requires_grad_()
    with torch.autocast("cpu", dtype=ambient):
        match = hdrops.patch_match(*leaves, radius=1, backend=backend)
        swapped = hdrops.patch_swap(leaves[1], match.index, backend=backend)
        raw = MATCH(*leaves, [1, 1], None, 3, "key"), SWAP(leaves[1], match.index, 3, 1, "exclude")
    wanted = hdrops.patch_match(query.to(ambient), key.to(ambient), radius=1, backend=backend)
    assert match.score.dtype == swapped.dtype == raw[0][0].dtype == raw[1].dtype == ambient
    assert torch.equal(match.index, wanted.index) and torch.equal(match.score, wanted.score)
    assert torch.equal(swapped, hdrops.patch_swap(key.to(ambient), match.index, backend=backend))
    (match.score.float().sum() + swapped.float().sum()).backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)


def test_autocast_leaves_float64_alone() -> None:
    query, key = pair(dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        match = hdrops.patch_match(query, key, radius=1)
        assert match.score.dtype == hdrops.patch_swap(key, match.index).dtype == torch.float64


def test_autocast_is_registered_for_both_devices() -> None:
    for name in ("patch_match", "patch_swap"):
        for key in ("AutocastCPU", "AutocastCUDA"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"hdrops::{name}", key)


FUNCTIONS = {
    "patch_match": lambda t, backend=None: hdrops.patch_match(t, t.detach().flip(3), radius=1, backend=backend).score,
    "patch_swap": lambda t, backend=None: hdrops.patch_swap(t, places(42, 2, 5, 4), backend=backend),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_derivatives_raise_and_the_reference_has_them(name: str) -> None:
    leaf = pair(dtype=torch.float64)[0].requires_grad_()
    (first,) = torch.autograd.grad(FUNCTIONS[name](leaf).square().sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{name}: second derivatives.*backend='reference'"):
        first.square().sum().backward()
    (first,) = torch.autograd.grad(FUNCTIONS[name](leaf, "reference").square().sum(), leaf, create_graph=True)
    assert torch.autograd.grad(first.square().sum(), leaf)[0].isfinite().all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode_raises_and_the_reference_has_it(name: str) -> None:
    tensor, tangent = pair(dtype=torch.float64)
    function = FUNCTIONS[name]
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tensor, tangent)
        with pytest.raises(NotImplementedError, match=f"{name}: forward-mode differentiation"):
            function(dual)
    with pytest.raises(NotImplementedError, match=f"{name}: forward-mode differentiation"):
        torch.func.jvp(function, (tensor,), (tangent,))
    with pytest.raises(NotImplementedError, match=f"{name}: torch.func.grad, vjp and jacrev are not built"):
        torch.func.grad(lambda t: function(t).sum())(tensor)
    reference = functools.partial(function, backend="reference")
    _, derivative = torch.func.jvp(reference, (tensor,), (tangent,))
    leaf = tensor.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reference(leaf).sum(), leaf)
    torch.testing.assert_close(derivative.sum(), (gradient * tangent).sum())


def test_passes_torchs_determinism_to_the_backward_operators() -> None:
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (MATCH_BACKWARD, SWAP_BACKWARD):
                seen.append((func, args[-1]))
            return func(*args, **(kwargs or {}))

    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            for function in FUNCTIONS.values():
                output = function(pair()[0].requires_grad_())
                with Watch():
                    output.sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
    assert seen == [(MATCH_BACKWARD, False), (SWAP_BACKWARD, False), (MATCH_BACKWARD, True), (SWAP_BACKWARD, True)]


def test_the_modules_are_their_operators() -> None:
    query, key = pair()
    centers = places(42, 2, 6, 7)
    layer = hdrops.nn.PatchMatch((1, 2), patch_size=5, normalize="both")
    got = layer(query, key, centers)
    wanted = hdrops.patch_match(query, key, radius=(1, 2), centers=centers, patch_size=5, normalize="both")
    assert isinstance(got, hdrops.PatchMatch)
    assert torch.equal(got.index, wanted.index) and torch.equal(got.score, wanted.score)
    assert repr(layer) == "PatchMatch(radius=(1, 2), patch_size=5, normalize='both')"
    swap = hdrops.nn.PatchSwap(patch_size=5, border="zero")
    assert torch.equal(swap(key, got.index), hdrops.patch_swap(key, got.index, patch_size=5, border="zero"))
    assert repr(swap) == "PatchSwap(patch_size=5, scale=1, border='zero')"
    for module, given in ((layer, (query, key)), (swap, (key, got.index))):
        wanted = module(*given)
        for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert all(torch.equal(a, b) for a, b in zip(again(*given), wanted, strict=True))
        assert list(module.state_dict()) == []
    with pytest.raises(ValueError, match="PatchMatch: radius must be an integer or a pair of integers >= 0, got -1"):
        hdrops.nn.PatchMatch(-1)
