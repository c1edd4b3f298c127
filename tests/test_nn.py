"""hdrops.nn: the modules compute what their operators do, and load the state dicts of other libraries."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor

import hdrops
from hdrops.nn import CRF, DeformConv2d, ExposureMerge, ModulatedDeformConv2d

pytestmark = pytest.mark.device
DEVICE = torch.get_default_device().type


def randomised(layer: torch.nn.Module, scale: float = 0.3) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, scale)
    return layer


def plain_definition(
    input: Tensor, offset_y: Tensor, offset_x: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, geometry: dict
) -> Tensor:
    """OP-1 in loops for one offset group: offset_y, offset_x and mask are [N, K, out_h, out_w]; float64."""
    n, _, height, width = input.shape
    kernel_h, kernel_w = weight.shape[2:]
    padded = torch.nn.functional.pad(input, (1, 1, 1, 1))
    output = bias.reshape(1, -1, 1, 1).expand(n, -1, *mask.shape[2:]).clone()
    for k in range(kernel_h * kernel_w):
        for row in range(mask.shape[2]):
            for column in range(mask.shape[3]):
                for image in range(n):
                    y = row * geometry["stride"] - geometry["padding"] + k // kernel_w * geometry["dilation"]
                    x = column * geometry["stride"] - geometry["padding"] + k % kernel_w * geometry["dilation"]
                    y, x = y + float(offset_y[image, k, row, column]), x + float(offset_x[image, k, row, column])
                    if not (-1 < y < height and -1 < x < width):
                        continue
                    top, left = int(y + 1) - 1, int(x + 1) - 1
                    ly, lx = y - top, x - left
                    cell = padded[image, :, top + 1 : top + 3, left + 1 : left + 3]
                    rows = cell[:, 0] * (1 - ly) + cell[:, 1] * ly
                    sample = (rows[:, 0] * (1 - lx) + rows[:, 1] * lx) * mask[image, k, row, column]
                    output[image, :, row, column] += weight[:, :, k // kernel_w, k % kernel_w] @ sample
    return output


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_deform_conv2d_is_its_operator(bias: bool, masked: bool) -> None:
    layer = DeformConv2d(4, 6, (3, 2), stride=(2, 1), padding=1, dilation=(1, 2), groups=2, bias=bias)
    input, offset, mask = torch.randn(2, 4, 9, 8), torch.randn(2, 24, 5, 8), torch.rand(2, 12, 5, 8)
    arguments = (input, offset, mask) if masked else (input, offset)
    wanted = hdrops.deform_conv2d(
        input, offset, layer.weight, layer.bias, (2, 1), (1, 1), (1, 2), mask if masked else None
    )
    assert torch.equal(layer(*arguments), wanted)
    assert list(layer.state_dict()) == (["weight", "bias"] if bias else ["weight"])


def test_initial_values_are_those_of_conv2d() -> None:
    torch.manual_seed(3)
    layer = DeformConv2d(6, 4, 3, groups=2)
    torch.manual_seed(3)
    plain = torch.nn.Conv2d(6, 4, 3, groups=2)
    assert torch.equal(layer.weight, plain.weight)
    assert torch.equal(layer.bias, plain.bias)


def test_modulated_starts_as_half_a_plain_convolution() -> None:
    layer = ModulatedDeformConv2d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2, offset_groups=2)
    input = torch.randn(2, 4, 11, 12)
    offset, mask = layer.predict(input)
    assert offset.shape == (2, 36, 6, 6)
    assert mask.shape == (2, 18, 6, 6)
    assert (offset == 0).all()
    assert (mask == 0.5).all()
    plain = torch.conv2d(input, 0.5 * layer.weight, layer.bias, 2, 2, 2, groups=2)
    torch.testing.assert_close(layer(input), plain, rtol=1e-5, atol=1e-5)


def test_modulated_trains_every_parameter() -> None:
    layer = ModulatedDeformConv2d(4, 6, 3, padding=1, offset_groups=2)
    layer(torch.randn(2, 4, 8, 9)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


LAYERS = [
    lambda: DeformConv2d(4, 6, 3, padding=1),
    lambda: randomised(ModulatedDeformConv2d(4, 6, 3, padding=1, offset_groups=2)),
]


@pytest.mark.parametrize("make", LAYERS, ids=["DeformConv2d", "ModulatedDeformConv2d"])
def test_copies_compute_the_same(make) -> None:
    layer = make()
    inputs = [torch.randn(1, 4, 8, 9)] + ([torch.randn(1, 18, 8, 9)] if type(layer) is DeformConv2d else [])
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert torch.equal(other(*inputs), layer(*inputs))
        assert repr(other) == repr(layer)
    other = make()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(*inputs), layer(*inputs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_modules_move_to_a_dtype(dtype: torch.dtype) -> None:
    layer = randomised(ModulatedDeformConv2d(4, 6, 3, padding=1)).to(dtype)
    assert layer(torch.randn(1, 4, 8, 9, dtype=dtype)).dtype == dtype


def test_autocast_predicts_and_samples_in_the_ambient_dtype() -> None:
    layer = randomised(ModulatedDeformConv2d(4, 6, 3, padding=1))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        output = layer(torch.randn(1, 4, 8, 9))
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())


def test_modules_compile() -> None:
    torch._dynamo.reset()
    layer = randomised(ModulatedDeformConv2d(4, 6, 3, padding=1))
    input = torch.randn(2, 4, 8, 9)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input), layer(input))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DeformConv2d(4, 6, 3, groups=4), "DeformConv2d: out_channels must be a multiple of groups = 4, got 6"),
        (lambda: DeformConv2d(5, 6, 3, groups=2), "DeformConv2d: in_channels must be a multiple of groups = 2, got 5"),
        (
            lambda: DeformConv2d(4, 6, 0),
            "DeformConv2d: kernel_size must be an integer or a pair of integers >= 1, got 0",
        ),
        (
            lambda: ModulatedDeformConv2d(4, 6, 3, offset_groups=3),
            "ModulatedDeformConv2d: in_channels must be a multiple of offset_groups = 3, got 4",
        ),
    ],
)
def test_wrong_arguments_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CRF(curve=[0.0, 1.0]), "CRF: curve must be a tensor or None, got list"),
        (lambda: CRF(curve=torch.arange(4)), "CRF: a learnable curve must be floating point, got torch.int64"),
        (lambda: ExposureMerge([0.0, 1.0]), "ExposureMerge: curve must be a tensor or None, got list"),
        (lambda: ExposureMerge(weight=None), "ExposureMerge: weight must be a name or a tensor, got NoneType"),
    ],
)
def test_wrong_kinds_are_named(make, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


def test_loads_torchvisions_layout() -> None:
    state = {"weight": torch.randn(6, 2, 3, 3), "bias": torch.randn(6)}
    layer = DeformConv2d(4, 6, 3, groups=2)
    layer.load_state_dict(state)
    assert torch.equal(layer.weight, state["weight"])
    assert torch.equal(layer.bias, state["bias"])


def packed_state(groups: int = 1) -> dict[str, Tensor]:
    """mmcv's ModulatedDeformConv2dPack: conv_offset gives chunks o1, o2, mask; cat(o1, o2) holds y, x of each tap."""
    return {
        "weight": torch.randn(6, 4, 3, 3, dtype=torch.float64),
        "bias": torch.randn(6, dtype=torch.float64),
        "conv_offset.weight": torch.randn(27 * groups, 4, 3, 3, dtype=torch.float64) * 0.2,
        "conv_offset.bias": torch.randn(27 * groups, dtype=torch.float64),
    }


def packed_definition(state: dict[str, Tensor], input: Tensor, geometry: dict) -> Tensor:
    predicted = torch.conv2d(input, state["conv_offset.weight"], state["conv_offset.bias"], **geometry)
    o1, o2, mask = torch.chunk(predicted, 3, dim=1)
    offset = torch.cat((o1, o2), dim=1)
    return plain_definition(
        input, offset[:, 0::2], offset[:, 1::2], mask.sigmoid(), state["weight"], state["bias"], geometry
    )


@pytest.mark.parametrize("geometry", [(1, 1, 1), (2, 2, 2)])
def test_loads_mmcvs_layout(geometry: tuple[int, int, int]) -> None:
    options = dict(zip(("stride", "padding", "dilation"), geometry, strict=True))
    state, input = packed_state(), torch.randn(2, 4, 7, 6, dtype=torch.float64)
    layer = ModulatedDeformConv2d(4, 6, 3, **options).double()
    layer.load_state_dict(state)
    torch.testing.assert_close(layer(input), packed_definition(state, input, options), rtol=1e-10, atol=1e-10)


def test_offset_groups_of_mmcvs_layout() -> None:
    # Chunks are cut over all groups at once: group g of two owns offsets 18 g ... 18 g + 17 and masks 9 g ... 9 g + 8.
    state, input = packed_state(groups=2), torch.randn(1, 4, 5, 6, dtype=torch.float64)
    geometry = {"stride": 1, "padding": 1, "dilation": 1}
    layer = ModulatedDeformConv2d(4, 6, 3, padding=1, offset_groups=2).double()
    layer.load_state_dict(state)
    predicted = torch.conv2d(input, state["conv_offset.weight"], state["conv_offset.bias"], padding=1)
    o1, o2, mask = torch.chunk(predicted, 3, dim=1)
    offset, mask = torch.cat((o1, o2), dim=1), mask.sigmoid()
    wanted = state["bias"].reshape(1, -1, 1, 1)
    for g in (0, 1):
        half, taps = slice(2 * g, 2 * g + 2), offset[:, 18 * g : 18 * g + 18]
        part = plain_definition(
            input[:, half],
            taps[:, 0::2],
            taps[:, 1::2],
            mask[:, 9 * g : 9 * g + 9],
            state["weight"][:, half],
            torch.zeros(6, dtype=torch.float64),
            geometry,
        )
        wanted = wanted + part
    torch.testing.assert_close(layer(input), wanted, rtol=1e-10, atol=1e-10)


def test_loads_the_forks_names_inside_a_network() -> None:
    state, input = packed_state(), torch.randn(1, 4, 6, 5, dtype=torch.float64)
    wanted = packed_definition(state, input, {"stride": 1, "padding": 1, "dilation": 1})
    keys = ("conv2.weight", "conv2.bias", "conv2.conv_offset_mask.weight", "conv2.conv_offset_mask.bias")
    given = dict(zip(keys, state.values(), strict=True))
    block = torch.nn.Module()
    block.conv2 = ModulatedDeformConv2d(4, 6, 3, padding=1).double()
    block.load_state_dict(given)
    torch.testing.assert_close(block.conv2(input), wanted, rtol=1e-10, atol=1e-10)
    assert tuple(given) == keys, "the caller's state dict was changed"


def test_a_forks_undilated_prediction_is_refused() -> None:
    state = packed_state()
    state["conv_offset_mask.weight"] = state.pop("conv_offset.weight")
    state["conv_offset_mask.bias"] = state.pop("conv_offset.bias")
    with pytest.raises(
        ValueError, match=r"predicts with dilation 1; it cannot be loaded into a layer of dilation \(2, 2\)"
    ):
        ModulatedDeformConv2d(4, 6, 3, padding=2, dilation=2).load_state_dict(state)


def state_of_4uiiurz1() -> dict[str, Tensor]:
    """pytorch-deform-conv-v2: separate convolutions, and the y of all taps before the x of all taps."""
    return {
        "conv.weight": torch.randn(6, 4, 3, 3, dtype=torch.float64),
        "p_conv.weight": torch.randn(18, 4, 3, 3, dtype=torch.float64) * 0.2,
        "p_conv.bias": torch.randn(18, dtype=torch.float64),
        "m_conv.weight": torch.randn(9, 4, 3, 3, dtype=torch.float64),
        "m_conv.bias": torch.randn(9, dtype=torch.float64),
    }


@pytest.mark.parametrize("stride", [1, 2])
def test_loads_4uiiurz1s_layout(stride: int) -> None:
    state, input = state_of_4uiiurz1(), torch.randn(2, 4, 7, 6, dtype=torch.float64)
    geometry = {"stride": stride, "padding": 1, "dilation": 1}
    offset = torch.conv2d(input, state["p_conv.weight"], state["p_conv.bias"], stride, 1)
    mask = torch.conv2d(input, state["m_conv.weight"], state["m_conv.bias"], stride, 1).sigmoid()
    bias = torch.zeros(6, dtype=torch.float64)
    wanted = plain_definition(input, offset[:, :9], offset[:, 9:], mask, state["conv.weight"], bias, geometry)
    layer = ModulatedDeformConv2d(4, 6, 3, stride=stride, padding=1, bias=False).double()
    layer.load_state_dict(state)
    torch.testing.assert_close(layer(input), wanted, rtol=1e-10, atol=1e-10)


def test_what_4uiiurz1s_layers_cannot_be() -> None:
    state = state_of_4uiiurz1()
    with pytest.raises(ValueError, match="load into kernel_size 3, padding 1, dilation 1, offset_groups 1, got"):
        ModulatedDeformConv2d(4, 6, 3, bias=False).load_state_dict(state)
    unmodulated = {key: value for key, value in state.items() if not key.startswith("m_conv")}
    with pytest.raises(ValueError, match="p_conv without m_conv is an unmodulated layer"):
        ModulatedDeformConv2d(4, 6, 3, padding=1, bias=False).load_state_dict(unmodulated)


def test_missing_and_unexpected_keys_are_reported() -> None:
    layer = ModulatedDeformConv2d(4, 6, 3, padding=1)
    with pytest.raises(RuntimeError, match=r"Missing key.*conv_offset\.weight"):
        layer.load_state_dict({"weight": layer.weight, "bias": layer.bias})
