"""The Triton backend of deform_conv2d: its kernels in the interpreter, and when it is chosen."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hdrops
from hdrops import _backends, _load, triton
from hdrops.ops import deform_conv2d as op
from hdrops.testing import DeformConv2dCase as Case

ROOT = Path(__file__).resolve().parents[1]


def test_kernels_in_the_interpreter() -> None:
    """tests/interpreted in a process of its own: whether Triton interprets is decided when it is imported."""
    pytest.importorskip("triton", reason="Triton is not installed")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/interpreted/test_deform_conv2d.py",
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert result.returncode == 0, result.stdout
    assert "skipped" not in result.stdout, result.stdout
    print(result.stdout.splitlines()[-1])


def test_is_chosen_after_cuda_and_before_the_reference() -> None:
    assert list(op._CAN_RUN) == ["cpu", "cuda", "triton", "reference"]


class OnCuda:
    """A tensor on a GPU, as far as the choice of a backend looks."""

    device = torch.device("cuda", 0)


def test_is_chosen_on_a_gpu_without_the_cuda_library(monkeypatch) -> None:
    monkeypatch.setattr(_load, "CUDA_LIBRARY", None)
    monkeypatch.setattr(triton, "INSTALLED", True)
    assert _backends.choose("deform_conv2d", OnCuda, None, op._CAN_RUN) == "triton"
    monkeypatch.setattr(triton, "INSTALLED", False)
    assert _backends.choose("deform_conv2d", OnCuda, None, op._CAN_RUN) == "reference"
    with pytest.raises(
        NotImplementedError, match=r"Triton is not installed \(pip install 'hdrops\[triton\]' installs it\)"
    ):
        _backends.choose("deform_conv2d", OnCuda, "triton", op._CAN_RUN)


def test_refuses_cpu_tensors_outside_the_interpreter() -> None:
    case = Case()
    with pytest.raises(NotImplementedError, match=r"deform_conv2d: backend triton cannot run .*TRITON_INTERPRET=1"):
        hdrops.deform_conv2d(**case.tensors(torch.float32), **case.geometry, backend="triton")


@pytest.mark.parametrize("name", ["deform_conv2d", "_deform_conv2d_backward"])
def test_has_the_compiled_operators_arguments(name: str) -> None:
    twin = "_deform_conv2d_triton" + name.removeprefix("_").removeprefix("deform_conv2d")
    compiled, ours = (str(getattr(torch.ops.hdrops, n).default._schema) for n in (name, twin))
    assert compiled.partition("(")[2] == ours.partition("(")[2]
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"hdrops::{twin}", "CUDA")
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"hdrops::{twin}", "CPU")


WITHOUT_TRITON = """
import sys
{before}
import torch, hdrops
from hdrops import triton
assert "triton" not in sys.modules or sys.modules["triton"] is None, "import hdrops imports triton"
input, offset, weight = torch.rand(1, 1, 3, 3), torch.zeros(1, 2, 3, 3), torch.rand(1, 1, 1, 1)
assert torch.allclose(hdrops.deform_conv2d(input, offset, weight), input * weight)
print(triton.status())
"""


def test_import_does_not_import_triton() -> None:
    run_python(WITHOUT_TRITON.format(before=""))


def test_works_without_triton() -> None:
    told = run_python(WITHOUT_TRITON.format(before='sys.modules["triton"] = None'))
    assert told == "Triton is not installed (pip install 'hdrops[triton]' installs it)"


def run_python(script: str) -> str:
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()
