"""Export to ONNX: one DeformConv node, and ONNX Runtime computes what the operator does."""

import pytest
import torch
from torch import Tensor

import hdrops
from hdrops.testing import DeformConv2dCase as Case


def test_opsets_without_deform_conv_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"hdrops.onnx: opset_version must be >= 19, the first with DeformConv, got 18"
    ):
        hdrops.onnx.translation_table(opset_version=18)
    with pytest.raises(ValueError, match=r"hdrops.onnx: opset_version must be >= 19"):
        hdrops.onnx.export(torch.nn.Identity(), (torch.zeros(1),), opset_version=18)


@pytest.fixture(scope="module")
def runtime():
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: torch.onnx.export(dynamo=True) needs it")
    return pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: it is the peer of these tests")


class Layer(torch.nn.Module):
    def __init__(self, case: Case, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.case = case
        self.weight = torch.nn.Parameter(tensors["weight"])
        self.bias = torch.nn.Parameter(tensors["bias"]) if "bias" in tensors else None

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        return hdrops.deform_conv2d(input, offset, self.weight, self.bias, mask=mask, **self.case.geometry)


def run(runtime, program, inputs: tuple[Tensor, ...]) -> Tensor:
    session = runtime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {given.name: value.numpy() for given, value in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(session.run(None, feeds)[0])


CASES = {
    "plain": Case(n=1),
    "no_mask": Case(mask=False),
    "no_bias": Case(bias=False),
    "bare": Case(mask=False, bias=False),
    "groups": Case(channels=8, groups=2),
    "offset_groups": Case(channels=8, offset_groups=4),
    "asymmetric": Case(size=(11, 14), kernel=(3, 2), stride=(2, 1), padding=(0, 3), dilation=(1, 2)),
    "far": Case(channels=12, groups=3, offset_groups=2, reach=12.0),
}


@pytest.mark.parametrize(("name", "helper"), [("plain", "table"), *((name, "export") for name in CASES)])
def test_onnx_runtime_agrees(name: str, helper: str, runtime) -> None:
    case = CASES[name]
    tensors = case.tensors(torch.float32)
    layer = Layer(case, tensors).eval()
    inputs = tuple(tensors[key] for key in ("input", "offset", "mask") if key in tensors)
    if helper == "export":
        program = hdrops.onnx.export(layer, inputs, verbose=False)
    else:
        table = hdrops.onnx.translation_table(opset_version=19)
        program = torch.onnx.export(
            layer, inputs, dynamo=True, opset_version=19, custom_translation_table=table, verbose=False
        )
    assert [node.op_type for node in program.model_proto.graph.node] == ["DeformConv"]
    assert {opset.version for opset in program.model_proto.opset_import if opset.domain == ""} == {19}
    wanted = layer(*inputs).detach()
    torch.testing.assert_close(run(runtime, program, inputs), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_nan_offsets_read_nothing_in_both(runtime) -> None:
    case = Case(n=1)
    tensors = case.tensors(torch.float32)
    tensors["offset"][:, 3:9] = float("nan")
    layer, inputs = Layer(case, tensors).eval(), (tensors["input"], tensors["offset"], tensors["mask"])
    program = hdrops.onnx.export(layer, inputs, verbose=False)
    torch.testing.assert_close(run(runtime, program, inputs), layer(*inputs).detach(), rtol=1e-4, atol=1e-4)


def test_a_module_with_dynamic_sizes(runtime) -> None:
    layer = hdrops.nn.ModulatedDeformConv2d(4, 6, 3, padding=1, offset_groups=2).eval()
    torch.nn.init.normal_(layer.conv_offset.weight, std=0.3)
    auto = torch.export.Dim.AUTO
    program = hdrops.onnx.export(
        layer, (torch.randn(2, 4, 8, 9),), dynamic_shapes=({0: auto, 2: auto, 3: auto},), verbose=False
    )
    input = torch.randn(3, 4, 13, 7)
    torch.testing.assert_close(run(runtime, program, (input,)), layer(input).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("fusion_types", [("channel_add",), ("channel_mul",), ("channel_add", "channel_mul")], ids=str)
def test_global_context_in_onnx_runtime(fusion_types: tuple[str, ...], dynamic: bool, runtime) -> None:
    block = hdrops.nn.GlobalContextBlock(8, 0.5, fusion_types=fusion_types).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(0, 0.5)
    input = torch.randn(2, 8, 9, 7)
    auto = torch.export.Dim.AUTO
    shapes = ({0: auto, 2: auto, 3: auto},) if dynamic else None
    program = hdrops.onnx.export(block, (input,), dynamic_shapes=shapes)
    for tried in (input, torch.randn(3, 8, 6, 11)) if dynamic else (input,):
        torch.testing.assert_close(run(runtime, program, (tried,)), block(tried), rtol=1e-5, atol=1e-5)
