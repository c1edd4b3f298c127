"""Patch swap in Triton: the kernels in the interpreter and compiled ahead of time, and when they are chosen."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton.language as tl

import hdrops
from hdrops import _backends, _load, triton
from hdrops.ops import patch_swap as op
from hdrops.triton import ahead_of_time

if triton.INTERPRETED:
    pytest.skip("the interpreter does not compile", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]


def test_kernels_in_the_interpreter() -> None:
    """tests/interpreted in a process of its own: whether Triton interprets is decided when it is imported."""
    tests = "tests/interpreted/test_patch_swap.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert result.returncode == 0, result.stdout
    assert "skipped" not in result.stdout, result.stdout


class OnCuda:
    """A tensor on a GPU, as far as the choice of a backend looks."""

    device = torch.device("cuda", 0)


def test_is_chosen_before_the_reference(monkeypatch) -> None:
    assert list(op._CAN_RUN) == ["cpu", "triton", "reference"]
    monkeypatch.setattr(_load, "CUDA_ERROR", None)
    assert _backends.choose("patch_swap", OnCuda, None, op._CAN_RUN) == "triton"


def test_refuses_cpu_tensors_outside_the_interpreter() -> None:
    source, index = torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64)
    with pytest.raises(NotImplementedError, match=r"patch_swap: backend triton cannot run .*TRITON_INTERPRET=1"):
        hdrops.patch_swap(source, index, backend="triton")


@pytest.mark.parametrize("name", ["patch_swap", "_patch_swap_backward"])
def test_has_the_compiled_operators_arguments(name: str) -> None:
    twin = "_patch_swap_triton" + name.removeprefix("_").removeprefix("patch_swap")
    compiled, ours = (str(getattr(torch.ops.hdrops, n).default._schema) for n in (name, twin))
    assert compiled.partition("(")[2] == ours.partition("(")[2]
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"hdrops::{twin}", "CUDA")
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"hdrops::{twin}", "CPU")


def test_numbers_places_in_64_bits_only_where_they_need_it() -> None:
    for name, swap in ahead_of_time.SWAPS.items():
        place = ahead_of_time.plan_swap("swap", swap).arguments["PLACE"]
        assert place == (tl.int64 if name == "large" else tl.int32)


@pytest.mark.parametrize("capability", ahead_of_time.ARCHITECTURES)
@pytest.mark.parametrize(("kernel", "name"), list(ahead_of_time.swap_launches()))
def test_compiles(kernel: str, name: str, capability: int) -> None:
    compiled = ahead_of_time.compile_launch(ahead_of_time.plan_swap(kernel, ahead_of_time.SWAPS[name]), capability)
    assert compiled.shared <= 48 << 10  # which every device gives without asking
    assert compiled.spilled in (0, None), f"{compiled.spilled} bytes spilled, {compiled.registers} registers"
    assert not re.search(r"\b(atom|red)\b", compiled.ptx)  # sums in no order of arrival


@pytest.mark.parametrize("kernel", ["swap", "gradient"])
def test_channels_last_is_read_and_written_sixteen_bytes_at_a_time(kernel: str) -> None:
    launch = ahead_of_time.plan_swap(kernel, ahead_of_time.SWAPS["bfloat16"])
    ptx = ahead_of_time.compile_launch(launch, 90).ptx
    assert re.search(r"\bld\.global\.v4\.b32", ptx)
    assert re.search(r"\bst\.global\.v4\.b32", ptx)
