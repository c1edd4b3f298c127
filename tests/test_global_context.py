"""context_pool and global_context against their float64 references, OP-2 written out, mmcv's block, and the
registrations."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import hdrops
from hdrops.reference import global_context as reference
from hdrops.testing import assert_close

POOL, POOL_BACKWARD = torch.ops.hdrops.context_pool.default, torch.ops.hdrops._context_pool_backward.default
OP, BACKWARD = torch.ops.hdrops.global_context.default, torch.ops.hdrops._global_context_backward.default
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FUSIONS = ["add", "mul"]
NAMES = (
    "input",
    "key_weight",
    "key_bias",
    "squeeze_weight",
    "squeeze_bias",
    "norm_weight",
    "norm_bias",
    "excite_weight",
    "excite_bias",
)
LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.mT.contiguous().mT,
}


def arguments(
    n: int = 2,
    channels: int = 5,
    size: tuple[int, int] = (7, 9),
    hidden: int = 3,
    dtype: torch.dtype = torch.float64,
    layout: str = "contiguous",
    seed: int = 0,
) -> list[Tensor]:
    """The nine tensors, of unit size; logits too."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=random, dtype=torch.float64) * scale).to(dtype)

    image = LAYOUTS[layout](normal(n, channels, *size))
    squeeze = [normal(hidden, channels), normal(hidden)]
    norm = [normal(hidden), normal(hidden)]
    return [
        image,
        normal(channels, scale=channels**-0.5),
        normal(1),
        *squeeze,
        *norm,
        normal(channels, hidden, scale=hidden**-0.5),
        normal(channels),
    ]


def leaves_of(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in tensors]


def gradients(function, tensors: list[Tensor], output_gradient: Tensor, **options: object) -> list[Tensor]:
    leaves = leaves_of(tensors)
    return list(torch.autograd.grad(function(*leaves, **options), leaves, output_gradient))


def far_from_the_kink(tensors: list[Tensor]) -> bool:
    """Whether no unit of the bottleneck is so near zero that rounding may switch it."""
    exact = [tensor.double() for tensor in tensors]
    context = reference.context_pool(*exact[:3])
    hidden = torch.nn.functional.linear(context, exact[3], exact[4])
    units = torch.nn.functional.layer_norm(hidden, hidden.shape[1:], exact[5], exact[6])
    return bool((units.abs() > 1e-3).all())


def test_the_block_written_out():
    image, key, key_bias, squeeze, b1, gamma, beta, excite, b2 = arguments(n=1)
    logits = torch.stack([(image[0, :, y, x] * key).sum() + key_bias[0] for y in range(7) for x in range(9)])
    weights = logits.exp() / logits.exp().sum()
    pixels = [image[0, :, y, x] for y in range(7) for x in range(9)]
    context = sum(weight * pixel for weight, pixel in zip(weights, pixels, strict=True))
    z = squeeze @ context + b1
    normalised = (z - z.mean()) / (((z - z.mean()) ** 2).mean() + 1e-5).sqrt()
    t = excite @ (gamma * normalised + beta).clamp(min=0) + b2
    for backend in ("cpu", "reference"):
        torch.testing.assert_close(hdrops.context_pool(image, key, key_bias, backend=backend)[0], context)
        added = hdrops.global_context(*arguments(n=1), backend=backend)
        torch.testing.assert_close(added, image + t[:, None, None])
        scaled = hdrops.global_context(*arguments(n=1), fusion="mul", backend=backend)
        torch.testing.assert_close(scaled, image * t.sigmoid()[:, None, None])


def check_against_reference(tensors: list[Tensor], fusion: str) -> None:
    """Results and gradients of both functions, in the tensors' dtype, against the reference in float64.

    The bottleneck amplifies the rounding of the context, by layer norm and two matrices: its terms count in ``terms``,
    and every parameter's gradient is measured against its largest element.
    """
    image = tensors[0]
    n, channels = image.shape[:2]
    pixels, hidden = image.shape[2] * image.shape[3], tensors[3].shape[0]
    exact = [tensor.double() for tensor in tensors]
    context = hdrops.context_pool(*tensors[:3])
    assert context.shape == (n, channels) and context.dtype == image.dtype
    scale = float(image.double().abs().max()) if n else 1.0
    assert_close(context, reference.context_pool(*exact[:3]), terms=pixels + channels, scale=scale, name="context")
    output = hdrops.global_context(*tensors, fusion=fusion)
    assert output.shape == image.shape and output.dtype == image.dtype
    if n > 0:
        assert output.is_contiguous(memory_format=memory_format(image))
    if n == 0 or not far_from_the_kink(tensors):
        return
    terms = 64 * (pixels + channels + hidden)
    want = reference.global_context(*exact, fusion=fusion)
    assert_close(output, want, terms=terms, scale=float(want.abs().max()), name="output")
    output_gradient = torch.randn(image.shape, dtype=torch.float64).to(image.dtype)
    got = gradients(hdrops.global_context, tensors, output_gradient, fusion=fusion)
    want = gradients(reference.global_context, exact, output_gradient.double(), fusion=fusion)
    size = float(want[8].abs().max())  # of the sums over pixels that all others begin with
    for name, left, right in zip(NAMES, got, want, strict=True):
        scale = max(size, float(right.abs().max()))
        assert_close(left, right, terms=terms, scale=scale, name=f"gradient of {name}")
    output_gradient = torch.randn(n, channels, dtype=torch.float64).to(image.dtype)
    got = gradients(hdrops.context_pool, tensors[:3], output_gradient)
    want = gradients(reference.context_pool, exact[:3], output_gradient.double())
    for name, left, right in zip(NAMES, got, want, strict=False):
        scale = max(1.0, float(right.abs().max()))
        assert_close(left, right, terms=terms, scale=scale, name=f"pooling's gradient of {name}")


def memory_format(tensor: Tensor) -> torch.memory_format:
    last = not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


@pytest.mark.asan
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        {"n": 3, "channels": 64, "size": (40, 37), "hidden": 16},  # several blocks, whole and cut vectors
        {"n": 2, "channels": 13, "size": (9, 31), "hidden": 9},
        {"n": 0},
        {"size": (1, 1)},
        {"channels": 1, "hidden": 2},
        {"hidden": 1},
        {"n": 70, "channels": 4, "size": (3, 5)},
        {"n": 1, "channels": 300, "size": (20, 21), "hidden": 75},  # blocks shorter than the longest
        {"n": 1, "channels": 2, "size": (300, 211), "hidden": 2},  # runs of several blocks
    ],
    ids=str,
)
def test_against_the_reference(shape, dtype, layout, fusion):
    check_against_reference(arguments(**shape, dtype=dtype, layout=layout), fusion)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    n=st.integers(0, 3),
    channels=st.integers(1, 40),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    hidden=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(sorted(LAYOUTS)),
    fusion=st.sampled_from(FUSIONS),
    seed=st.integers(0, 1000),
)
def test_random_shapes(n, channels, height, width, hidden, dtype, layout, fusion, seed):
    check_against_reference(arguments(n, channels, (height, width), hidden, dtype, layout, seed), fusion)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_an_image_that_is_stored_past_the_caches(layout):
    tensors = arguments(1, 64, (261, 260), 8, torch.float32, layout)
    for fusion in FUSIONS:
        check_against_reference(tensors, fusion)


@pytest.mark.asan
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_strided_images(layout):
    tensors = arguments(2, 12, (20, 30), 3, torch.float32, layout)
    image = tensors[0]
    for view in (image[..., 3:17, 5:29], image.transpose(2, 3), image[:1].expand(3, -1, -1, -1)):
        for fusion in FUSIONS:
            strided = hdrops.global_context(view, *tensors[1:], fusion=fusion)
            dense = view.contiguous(memory_format=memory_format(view))
            assert torch.equal(strided, hdrops.global_context(dense, *tensors[1:], fusion=fusion))


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("position", range(9), ids=NAMES)
def test_gradcheck(position, layout, fusion):
    tensors = arguments(1, 3, (2, 4), 4, layout=layout)
    assert far_from_the_kink(tensors)

    def function(one: Tensor) -> Tensor:
        changed = [*tensors[:position], one, *tensors[position + 1 :]]
        return hdrops.global_context(*changed, fusion=fusion)

    torch.autograd.gradcheck(function, tensors[position].requires_grad_())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck_of_the_pooling(layout):
    torch.autograd.gradcheck(hdrops.context_pool, tuple(leaves_of(arguments(2, 3, (3, 4), layout=layout)[:3])))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_keys_bias_cancels(backend):
    tensors = arguments()
    without = hdrops.global_context(tensors[0], tensors[1], None, *tensors[3:], backend=backend)
    torch.testing.assert_close(hdrops.global_context(*tensors, backend=backend), without)
    tensors[2].requires_grad_()
    hdrops.global_context(*tensors, backend=backend).sum().backward()
    assert tensors[2].grad.abs() < 1e-12


@pytest.mark.asan
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [2.0**10, 2.0**20, -(2.0**20)])
def test_large_logits(size, dtype, layout):
    """exp of any of them would overflow or vanish; the softmax is nearly a choice of one pixel.

    All values are multiples of 1/8, so that the logits are exact in either precision.
    """
    tensors = [(tensor * 8).round() / 8 for tensor in arguments(2, 8, (30, 50), 4, dtype, layout)]
    tensors[1] = tensors[1] * size
    exact = [tensor.double() for tensor in tensors]
    context = hdrops.context_pool(*tensors[:2])
    assert_close(context, reference.context_pool(*exact[:2]), terms=1500, scale=float(exact[0].abs().max()))
    for fusion in FUSIONS:
        output_gradient = torch.ones_like(tensors[0])
        found = gradients(hdrops.global_context, tensors, output_gradient, fusion=fusion)
        assert all(gradient.isfinite().all() for gradient in found)


def test_logits_that_grow_from_block_to_block():
    """The running maximum changes with every block, and all but the last pixels' weights vanish."""
    image = torch.arange(300 * 200, dtype=torch.float64).reshape(1, 1, 300, 200) / 10
    context = hdrops.context_pool(image, torch.ones(1, dtype=torch.float64))
    torch.testing.assert_close(context, reference.context_pool(image, torch.ones(1, dtype=torch.float64)))
    falling = hdrops.context_pool(image, -torch.ones(1, dtype=torch.float64))
    torch.testing.assert_close(falling, reference.context_pool(image, -torch.ones(1, dtype=torch.float64)))


@pytest.mark.asan
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [(0, 0), (20, 3), (39, 36)])
def test_nan_and_infinity_stay_in_their_image(place, value, layout):
    tensors = arguments(3, 16, (40, 37), 4, torch.float32, layout)
    whole = hdrops.global_context(*tensors)
    tensors[0][1, 5, place[0], place[1]] = value
    output = hdrops.global_context(*tensors)
    assert torch.equal(output[[0, 2]], whole[[0, 2]])
    context = hdrops.context_pool(*tensors[:2])
    wanted = reference.context_pool(*tensors[:2])
    assert torch.equal(context.isnan(), wanted.isnan())
    if value != value:
        assert context[1].isnan().all() and output[1].isnan().all()
    found = gradients(hdrops.global_context, tensors, torch.ones_like(tensors[0]))
    assert found[0][[0, 2]].isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bias_that_is_not_finite_is_not_hidden(value):
    tensors = arguments()
    tensors[2].fill_(value)
    for backend in ("cpu", "reference"):
        assert hdrops.context_pool(*tensors[:3], backend=backend).isnan().all()
        assert hdrops.global_context(*tensors, backend=backend).isnan().all()


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(1, 24, (120, 130)), (5, 8, (31, 33))], ids=str)
def test_any_number_of_threads_gives_the_same_bits(shape, layout, fusion, threads):
    tensors = arguments(*shape, hidden=6, dtype=torch.float32, layout=layout)
    output_gradient = torch.randn_like(tensors[0])
    results = []
    for count in (1, 2, 3):
        threads(count)
        output = hdrops.global_context(*tensors, fusion=fusion)
        pooled = hdrops.context_pool(*tensors[:3])
        pooled_gradients = gradients(hdrops.context_pool, tensors[:3], torch.ones_like(pooled))
        found = gradients(hdrops.global_context, tensors, output_gradient, fusion=fusion)
        results.append([output, pooled, *pooled_gradients, *found])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.asan
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize(
    "wanted",
    [("input",), ("key_weight",), ("excite_bias",), ("key_bias",), ("input", "norm_weight"), NAMES[3:]],
    ids=str,
)
def test_subsets_of_gradients(wanted, fusion):
    tensors = arguments(2, 12, (20, 21), 5)
    output_gradient = torch.randn_like(tensors[0])
    every = dict(zip(NAMES, gradients(hdrops.global_context, tensors, output_gradient, fusion=fusion), strict=True))
    leaves = [t.detach().requires_grad_(name in wanted) for name, t in zip(NAMES, tensors, strict=True)]
    chosen = [leaf for leaf in leaves if leaf.requires_grad]
    found = torch.autograd.grad(hdrops.global_context(*leaves, fusion=fusion), chosen, output_gradient)
    assert all(torch.equal(every[name], g) for name, g in zip(wanted, found, strict=True))


def test_backward_keeps_nothing_of_the_images_size_but_the_image():
    saved = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    leaves = leaves_of(arguments(2, 16, (32, 32), 4))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hdrops.global_context(*leaves)
    large = [tensor for tensor in saved if tensor.numel() >= leaves[0].numel() // 16]
    assert [tensor.data_ptr() for tensor in large] == [leaves[0].data_ptr()]


def test_double_backward_and_forward_ad():
    tensors = arguments(1, 3, (2, 3), 2)
    functions = {"global_context": hdrops.global_context, "context_pool": hdrops.context_pool}
    for name, function in functions.items():
        leaves = leaves_of(tensors if name == "global_context" else tensors[:3])
        (first,) = torch.autograd.grad(function(*leaves).square().sum(), leaves[0], create_graph=True)
        with pytest.raises(NotImplementedError, match=rf"{name}: second derivatives.*backend='reference'"):
            first.sum().backward()
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(tensors[0], torch.ones_like(tensors[0]))
            with pytest.raises(NotImplementedError, match=rf"{name}: forward-mode.*backend='reference'"):
                function(dual, *leaves[1:])
        with pytest.raises(NotImplementedError, match=rf"{name}: torch.func.grad"):
            torch.func.grad(lambda t, f=function, rest=leaves[1:]: f(t, *rest).sum())(tensors[0])
        plain = tuple(leaves)
        torch.autograd.gradcheck(lambda *a, f=function: f(*a, backend="reference"), plain, check_forward_ad=True)
        torch.autograd.gradgradcheck(lambda *a, f=function: f(*a, backend="reference"), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout, dtype):
    for n in (2, 0):
        tensors = leaves_of(arguments(n, dtype=dtype, layout=layout))
        torch.library.opcheck(POOL, tuple(tensors[:3]))
        for fusion in FUSIONS:
            torch.library.opcheck(OP, (*tensors, fusion, 1e-5))


def described(results) -> list[tuple]:
    return [(tuple(t.shape), t.stride(), t.dtype) for t in results]


def on_fake(op, values: list) -> list[tuple]:
    with torch._subclasses.FakeTensorMode() as mode:
        return described(op(*[mode.from_tensor(v) if isinstance(v, Tensor) else v for v in values]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wanted", [[True] * 8, [False] * 8, [True, False] * 4], ids=str)
def test_fake_kernels_have_the_real_strides(wanted, layout):
    for dtype in (torch.float32, torch.float64):
        image, key, bias, squeeze, b1, gamma, beta, excite, b2 = arguments(dtype=dtype, layout=layout)
        values = [image, key, bias, squeeze, b1, gamma, beta, excite, b2, "mul", 1e-5]
        output, state = OP(*values)
        assert on_fake(OP, values) == described((output, state))
        values = [torch.ones_like(output), image, key, squeeze, gamma, beta, excite, state, "mul", wanted]
        assert on_fake(BACKWARD, values) == described(BACKWARD(*values))
        context, state = POOL(image, key, bias)
        assert on_fake(POOL, [image, key, bias]) == described((context, state))
        values = [torch.ones_like(context), image, key, state, wanted[:2]]
        assert on_fake(POOL_BACKWARD, values) == described(POOL_BACKWARD(*values))


def test_compile_without_recompiling_for_sizes():
    torch._dynamo.reset()
    compiled = torch.compile(hdrops.global_context, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n, size in ((2, (8, 9)), (3, (12, 7)), (5, (9, 16))):
            leaves = leaves_of(arguments(n, 14, size, 4, torch.float32))
            output, eager = compiled(*leaves), hdrops.global_context(*leaves)
            assert torch.equal(output, eager)
            got, want = (torch.autograd.grad(r.square().sum(), leaves) for r in (output, eager))
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("fusion_types", [("channel_add",), ("channel_mul",), ("channel_add", "channel_mul")], ids=str)
def test_export(fusion_types, tmp_path):
    block = randomised(hdrops.nn.GlobalContextBlock(8, 0.5, fusion_types=fusion_types))
    image = torch.randn(2, 8, 9, 7)
    program = torch.export.export(
        block, (image,), dynamic_shapes=[{0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO}]
    )
    torch.export.save(program, tmp_path / "block.pt2")
    loaded = torch.export.load(tmp_path / "block.pt2").module()
    for tried in (image, torch.randn(3, 8, 11, 7)):
        assert torch.equal(loaded(tried), block(tried))


@pytest.mark.parametrize("batched", [(0,), (0, 1, 2), (3, 4), tuple(range(9))], ids=str)
def test_vmap_equals_a_loop(batched):
    members = [arguments(seed=seed) for seed in range(3)]
    stacked = [torch.stack([m[k] for m in members], k % 2) if k in batched else members[0][k] for k in range(9)]
    dims = tuple(k % 2 if k in batched else None for k in range(9))
    got = torch.vmap(hdrops.global_context, in_dims=dims)(*stacked)
    loop = [hdrops.global_context(*(m[k] if k in batched else members[0][k] for k in range(9))) for m in members]
    torch.testing.assert_close(got, torch.stack(loop), rtol=1e-12, atol=1e-12)
    if 0 in batched and 3 not in batched:
        got = torch.vmap(hdrops.context_pool, in_dims=dims[:3])(*stacked[:3])
        loop = [hdrops.context_pool(*(m[k] if k in batched else members[0][k] for k in range(3))) for m in members]
        torch.testing.assert_close(got, torch.stack(loop), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batched", [0, 1])
def test_vmap_of_nothing(batched):
    values = list(arguments())
    wanted = (0, *values[0].shape)
    values[batched] = values[batched][None][:0]
    assert (
        torch.vmap(hdrops.global_context, in_dims=tuple(0 if k == batched else None for k in range(9)))(*values).shape
        == wanted
    )


def test_gradients_through_vmap():
    members = [arguments(seed=seed) for seed in range(3)]
    images = torch.stack([m[0] for m in members]).requires_grad_()
    rest = members[0][1:]
    torch.vmap(lambda image: hdrops.global_context(image, *rest))(images).square().sum().backward()
    for member, got in zip(members, images.grad, strict=True):
        image = member[0].requires_grad_()
        hdrops.global_context(image, *rest).square().sum().backward()
        torch.testing.assert_close(got, image.grad)


@pytest.mark.parametrize("ambient", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_follows_the_ambient_dtype(backend, ambient):
    tensors = arguments(dtype=torch.float32)
    rounded = [tensor.to(ambient) for tensor in tensors]
    with torch.autocast("cpu", dtype=ambient):
        output = hdrops.global_context(*tensors, backend=backend)
        context = hdrops.context_pool(*tensors[:3], backend=backend)
        assert hdrops.global_context(*arguments(), backend=backend).dtype == torch.float64
    assert output.dtype == context.dtype == ambient
    assert torch.equal(output, hdrops.global_context(*rounded, backend=backend))
    assert torch.equal(context, hdrops.context_pool(*rounded[:3], backend=backend))


def test_autocast_is_registered_for_both_devices():
    for name in ("hdrops::global_context", "hdrops::context_pool"):
        for key in ("AutocastCPU", "AutocastCUDA"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def test_fresh_memory_is_written_everywhere():
    torch.use_deterministic_algorithms(True)  # fills it with NaN
    try:
        tensors = arguments(2, 12, (70, 31), 5)
        for fusion in FUSIONS:
            assert hdrops.global_context(*tensors, fusion=fusion).isfinite().all()
            found = gradients(hdrops.global_context, tensors, torch.ones_like(tensors[0]), fusion=fusion)
            assert all(gradient.isfinite().all() for gradient in found)
    finally:
        torch.use_deterministic_algorithms(False)


class ContextBlock(nn.Module):
    """mmcv's block with pooling_type "att", from its published definition."""

    def __init__(self, in_channels: int, ratio: float, fusion_types: tuple[str, ...]) -> None:
        super().__init__()
        planes = int(in_channels * ratio)
        self.conv_mask = nn.Conv2d(in_channels, 1, kernel_size=1)
        self.softmax = nn.Softmax(dim=2)

        def bottleneck() -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(in_channels, planes, kernel_size=1),
                nn.LayerNorm([planes, 1, 1]),
                nn.ReLU(inplace=True),
                nn.Conv2d(planes, in_channels, kernel_size=1),
            )

        self.channel_add_conv = bottleneck() if "channel_add" in fusion_types else None
        self.channel_mul_conv = bottleneck() if "channel_mul" in fusion_types else None

    def forward(self, x: Tensor) -> Tensor:
        batch, channel, height, width = x.size()
        input_x = x.view(batch, channel, height * width).unsqueeze(1)
        context_mask = self.conv_mask(x).view(batch, 1, height * width)
        context_mask = self.softmax(context_mask).unsqueeze(-1)
        context = torch.matmul(input_x, context_mask).view(batch, channel, 1, 1)
        out = x
        if self.channel_mul_conv is not None:
            out = out * torch.sigmoid(self.channel_mul_conv(context))
        if self.channel_add_conv is not None:
            out = out + self.channel_add_conv(context)
        return out


def randomised(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.5)
    return module


@pytest.mark.parametrize("fusion_types", [("channel_add",), ("channel_mul",), ("channel_add", "channel_mul")], ids=str)
def test_the_module_equals_mmcvs(fusion_types):
    theirs = randomised(ContextBlock(12, 1 / 3, fusion_types)).double()
    ours = hdrops.nn.GlobalContextBlock(12, 1 / 3, fusion_types=fusion_types).double()
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    image = torch.randn(2, 12, 9, 11, dtype=torch.float64)
    torch.testing.assert_close(ours(image), theirs(image))
    for module in (ours, theirs):
        module(image).square().sum().backward()
    for (name, left), right in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad, msg=name, rtol=1e-9, atol=1e-9)


def test_the_module_starts_as_the_identity():
    image = torch.randn(2, 8, 5, 6)
    assert torch.equal(hdrops.nn.GlobalContextBlock(8, 0.25)(image), image)
    scaled = hdrops.nn.GlobalContextBlock(8, 0.25, fusion_types=("channel_mul",))
    torch.testing.assert_close(scaled(image), image / 2)
    assert "8, ratio=0.25, fusion_types=('channel_mul',)" in repr(scaled)


@pytest.mark.parametrize("fusion_types", [("channel_add",), ("channel_mul",), ("channel_add", "channel_mul")], ids=str)
def test_the_module_follows_autocast(fusion_types):
    module = hdrops.nn.GlobalContextBlock(8, 0.5, fusion_types=fusion_types)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    image = torch.randn(2, 8, 5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        output = module(image)
        assert module.double()(image.double()).dtype == torch.float64
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.double(), module(image.double()), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pooling_type": "avg"}, NotImplementedError, "GlobalContextBlock: pooling_type must be 'att', got 'avg'"),
        ({"pooling_type": "max"}, ValueError, "GlobalContextBlock: pooling_type must be 'att', got 'max'"),
        ({"fusion_types": ()}, ValueError, "fusion_types must be a tuple of 'channel_add' and 'channel_mul'"),
        ({"fusion_types": "channel_add"}, ValueError, "fusion_types must be a tuple .* got 'channel_add'"),
        ({"fusion_types": [["channel_add"]]}, ValueError, r"fusion_types must be a tuple .* got \[\['channel_add'\]\]"),
        ({"fusion_types": 1}, ValueError, "fusion_types must be a tuple .* got 1"),
        ({"ratio": float("nan")}, ValueError, r"must be at least 1, got int\(8 \* nan\)"),
        ({"ratio": float("inf")}, ValueError, r"must be at least 1, got int\(8 \* inf\)"),
        ({"ratio": 0.01}, ValueError, r"int\(in_channels \* ratio\) must be at least 1, got int\(8 \* 0.01\)"),
    ],
)
def test_errors_of_the_module(change, error, message):
    with pytest.raises(error, match=message):
        hdrops.nn.GlobalContextBlock(**{"in_channels": 8, "ratio": 0.5, **change})


SIMD_SCRIPT = """
import sys, torch, hdrops
tensors, output, wanted = torch.load(sys.argv[1])
leaves = [tensor.requires_grad_() for tensor in tensors]
found = hdrops.global_context(*leaves)
torch.testing.assert_close(found, output, rtol=1e-5, atol=1e-5)
for got, want in zip(torch.autograd.grad(found.square().sum(), leaves), wanted):
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
print(hdrops._load.simd_level())
"""


@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_lower_instruction_sets_agree(level, tmp_path):
    levels = hdrops._load.SIMD_LEVELS
    if levels.index(level) >= levels.index(hdrops._load.simd_level()):
        pytest.skip(f"{level} is not below {hdrops._load.simd_level()}, which the other tests run on")
    tensors = arguments(2, 13, (30, 37), 6, torch.float32)
    leaves = leaves_of([tensor.double() for tensor in tensors])
    output = reference.global_context(*leaves)
    wanted = torch.autograd.grad(output.square().sum(), leaves)
    case = (tensors, output.detach().float(), [gradient.float() for gradient in wanted])
    torch.save(case, tmp_path / "case.pt")
    environment = {**os.environ, "HDROPS_SIMD": level, "PYTHONPATH": str(Path(hdrops.__file__).parents[1])}
    command = [sys.executable, "-c", SIMD_SCRIPT, str(tmp_path / "case.pt")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == level


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"input": torch.rand(5, 7, 9)},
            ValueError,
            r"global_context: input must have 4 dimensions \[N, C, H, W\], got 3",
        ),
        ({"input": torch.rand(1, 5, 0, 9)}, ValueError, "input must have at least one channel, row and column"),
        ({"input": [0.5]}, TypeError, "global_context: input must be a tensor, got list"),
        ({"input": torch.zeros(2, 5, 7, 9).int()}, TypeError, "input must be float64, .* got torch.int32"),
        ({"key_weight": torch.rand(4)}, ValueError, r"key_weight must have shape \[C\] = \[5\], got \[4\]"),
        ({"key_weight": None}, TypeError, "key_weight must be a tensor, got NoneType"),
        ({"key_weight": torch.rand(1, 5, 1, 1)}, ValueError, r"key_weight must have 1 dimension \[C\], got 4"),
        ({"key_bias": torch.rand(2)}, ValueError, r"key_bias must have shape \[1\] = \[1\], got \[2\]"),
        ({"squeeze_weight": torch.rand(3, 4)}, ValueError, r"squeeze_weight must have shape \[P, C\] = \[3, 5\], got"),
        ({"squeeze_weight": torch.rand(0, 5)}, ValueError, "squeeze_weight must have P >= 1 rows"),
        ({"squeeze_bias": torch.rand(2)}, ValueError, r"squeeze_bias must have shape \[P\] = \[3\], got \[2\]"),
        ({"norm_weight": torch.rand(2)}, ValueError, r"norm_weight must have shape \[P\] = \[3\], got \[2\]"),
        ({"excite_weight": torch.rand(3, 5)}, ValueError, r"excite_weight must have shape \[C, P\] = \[5, 3\], got"),
        ({"excite_bias": torch.rand(5).half()}, TypeError, "excite_bias must have the input's dtype torch.float32"),
        ({"norm_bias": torch.rand(3, device="meta")}, ValueError, "norm_bias must be on input's device cpu, got meta"),
        ({"fusion": "both"}, ValueError, "fusion must be 'add' or 'mul', got 'both'"),
        ({"eps": "small"}, TypeError, "eps must be a number, got 'small'"),
        ({"eps": -1.0}, ValueError, "eps must be at least 0, got -1.0"),
        ({"eps": float("nan")}, ValueError, "eps must be at least 0, got nan"),
        ({"backend": "cuda"}, NotImplementedError, "global_context: (has no cuda backend|backend cuda cannot)"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        hdrops.global_context(**{**dict(zip(NAMES, arguments(dtype=torch.float32), strict=True)), **change})


def test_errors_of_the_pooling():
    image = torch.rand(2, 5, 7, 9)
    with pytest.raises(ValueError, match=r"context_pool: weight must have shape \[C\] = \[5\], got \[4\]"):
        hdrops.context_pool(image, torch.rand(4))
    with pytest.raises(TypeError, match=r"context_pool: weight must have the input's dtype torch.float32"):
        hdrops.context_pool(image, torch.rand(5).double())
    with pytest.raises(ValueError, match=r"context_pool: bias must have 1 dimension \[1\], got 0"):
        hdrops.context_pool(image, torch.rand(5), torch.tensor(0.0))


def test_the_bindings_guard_memory():
    tensors = arguments(dtype=torch.float32)
    with pytest.raises(ValueError, match="global_context: excite_weight must have the shape"):
        OP(*tensors[:7], torch.rand(5, 2), tensors[8], "add", 1e-5)
    with pytest.raises(ValueError, match="global_context: fusion must be add or mul"):
        OP(*tensors, "both", 1e-5)
    with pytest.raises(ValueError, match="context_pool: weight must have the shape"):
        POOL(tensors[0], torch.rand(4), None)
    with pytest.raises(ValueError, match="context_pool: state must have the shape"):
        POOL_BACKWARD(torch.rand(2, 5), tensors[0], tensors[1], torch.rand(2, 5), [True, True])
