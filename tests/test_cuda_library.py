"""The compiled CUDA library, on a machine without a GPU: it loads, registers every operator, and its machine code is
what was meant (`make cuda` builds it and runs these tests; elsewhere they skip)."""

import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hdrops import _load


def _benchmark_module(name: str) -> ModuleType:
    """A module of benches/, which is not installed."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "benches" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cuda_resources = _benchmark_module("cuda_resources")
Kernels = dict[str, dict[str, int]]

# On CUDA tensors Triton or plain PyTorch does their work.
WITHOUT_CUDA_KERNEL = ("patch_swap", "context_pool", "global_context", "_solve_few_samples")
# Instructions of spills that stay: a register or two, cheaper than the occupancy that would save them.
KNOWN_SPILLS = {
    "sm_80 deform_conv2d::input_gradients<float, deform_conv2d::Tf32Product<float, false> >": 4,
    "sm_90 deform_conv2d::forward_kernel<float, deform_conv2d::Fma<float>, 32>": 2,
}
# Kernels that keep an array of their own in local memory, the frames of a pixel in order, for the rare pixel that is
# clipped or masked in every frame.
WITH_LOCAL_ARRAYS = ("merge_forward_kernel", "merge_backward_kernel")


@pytest.fixture(scope="session")
def library() -> Path:
    missing = None
    if torch.version.cuda is None:
        missing = f"torch {torch.__version__} is built without CUDA"
    elif _load.CUDA_LIBRARY is None:
        missing = "hdrops is built without its CUDA library"
    if missing and os.environ.get("HDROPS_CUDA_TESTS") == "1":
        pytest.fail(missing)
    if missing:
        pytest.skip(f"{missing}; `make cuda` builds it and runs this test")
    return _load.CUDA_LIBRARY


@pytest.fixture(scope="session")
def kernels(library: Path) -> dict[str, Kernels]:
    return cuda_resources.read(library)


def registered(key: str) -> set[str]:
    names = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    return {name for name in names if name.startswith("hdrops::")}


def test_library_loads_without_a_gpu(library: Path) -> None:
    assert _load.CUDA_ERROR is None
    if not torch.cuda.is_available():
        assert _load.cuda_status() == "torch finds no CUDA device"


def test_every_operator_with_a_cpu_kernel_has_a_cuda_kernel(library: Path) -> None:
    without = {name.removeprefix("hdrops::") for name in registered("CPU") - registered("CUDA")}
    forward = {name.removesuffix("_backward").removeprefix("_") if "backward" in name else name for name in without}
    assert forward == set(WITHOUT_CUDA_KERNEL)


def test_no_kernel_spills_registers(kernels: dict[str, Kernels]) -> None:
    spilling = {
        f"{arch} {name}": row["spills"]
        for arch, found in kernels.items()
        for name, row in found.items()
        if row["spills"] and not any(kernel in name for kernel in WITH_LOCAL_ARRAYS)
    }
    assert {name: count for name, count in spilling.items() if count > KNOWN_SPILLS.get(name, 0)} == {}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kernel", ["forward_kernel", "input_gradients", "weight_sums"])
def test_deform_conv2d_uses_the_matrix_units_and_moves_16_bytes(
    kernel: str, dtype: str, kernels: dict[str, Kernels]
) -> None:
    for arch, found in kernels.items():
        if arch != "sm_75":
            rows = [row for name, row in found.items() if name.startswith(f"deform_conv2d::{kernel}<{dtype}")]
            assert any(row["matrix"] and row["load_16_bytes"] for row in rows), arch


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_patch_match_uses_the_matrix_units(dtype: str, kernels: dict[str, Kernels]) -> None:
    for arch, found in kernels.items():
        if arch != "sm_75":
            rows = [row for name, row in found.items() if f"search_by_matrix_units<{dtype}" in name]
            assert rows and all(row["matrix"] and row["registers"] <= 128 for row in rows), arch


def test_input_gradient_is_reduced_by_vectors_from_sm_90_on(kernels: dict[str, Kernels]) -> None:
    for arch in kernels.keys() & {"sm_90", "sm_100", "sm_120"}:
        assert any(row["reduce_16_bytes"] for name, row in kernels[arch].items() if "deform_conv2d" in name), arch


def test_resources_are_as_recorded(kernels: dict[str, Kernels]) -> None:
    recorded = json.loads(cuda_resources.TABLE.read_text())
    if recorded["nvcc"] != cuda_resources.toolkit():
        pytest.skip(f"the table is of nvcc {recorded['nvcc']}, here is {cuda_resources.toolkit()}")
    changes = cuda_resources.differences(kernels, recorded["kernels"])
    assert not changes, "record the change with `python -m benches.cuda_resources --write`:\n" + "\n".join(changes)


def test_differences_name_what_changed() -> None:
    row = {"registers": 32, "spills": 0}
    now = {"sm_90": {"a<float>": {**row, "registers": 40}, "c": row}}
    before = {"sm_90": {"a<float>": row, "b": row}, "sm_80": {"a<float>": row}}
    assert cuda_resources.differences(now, before) == [
        "sm_90: c is new",
        "sm_90: b is gone",
        "sm_90: a<float>: registers 32 -> 40",
    ]
