"""Global context in Triton: the kernels in the interpreter and compiled ahead of time, and when they are chosen."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from hdrops import triton
from hdrops.ops import global_context as op
from hdrops.triton import ahead_of_time
from hdrops.triton import global_context as launches
from hdrops.triton.launch import Launch

if triton.INTERPRETED:
    pytest.skip("the interpreter does not compile", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ("pool", "bottleneck", "fuse", "total", "bottleneck_backward", "gradient")
# dtype, channels, hidden units, channels last, whether the change is multiplied
LAYERS = {
    "float32": (torch.float32, 64, 32, False, False),
    "bfloat16": (torch.bfloat16, 64, 32, True, True),
    "float16": (torch.float16, 64, 32, False, True),
    "float64": (torch.float64, 256, 64, True, False),
    "wide": (torch.float32, 1024, 256, False, False),
}


def test_kernels_in_the_interpreter() -> None:
    """tests/interpreted in a process of its own: whether Triton interprets is decided when it is imported."""
    tests = "tests/interpreted/test_global_context.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert result.returncode == 0, result.stdout
    assert "skipped" not in result.stdout, result.stdout


def test_is_chosen_before_the_reference() -> None:
    assert list(op._CAN_RUN) == ["cpu", "triton", "reference"]


def planned(layer: str) -> Iterator[Launch]:
    """The launches for one image of 540 x 960 pixels, on tensors without memory, in the order of KERNELS."""
    dtype, channels, hidden, last, multiply = LAYERS[layer]

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    image = empty(1, channels, 540, 960)
    if last:
        image = image.contiguous(memory_format=torch.channels_last)
    plan = launches.Plan(image, hidden, multiply)
    state, partials = plan.new_state(), plan.new_partials(channels + 2)
    squeeze, gamma, beta, excite = empty(hidden, channels), empty(hidden), empty(hidden), empty(channels, hidden)
    rows = [plan.new_rows(size) for size in (channels, hidden, hidden, hidden, channels)]
    yield plan.pool(empty(channels), partials)
    parameters = [squeeze, empty(hidden), gamma, beta, excite, empty(channels)]
    yield plan.bottleneck(partials, empty(1), state, None, parameters, 1e-5)
    yield plan.fuse(state, torch.empty_like(image))
    yield plan.total(image, partials)
    yield plan.bottleneck_backward(partials, state, [squeeze, gamma, beta, excite], rows)
    yield plan.gradient(image, empty(channels), state, rows[4], torch.empty_like(image), partials)


@pytest.mark.parametrize("capability", ahead_of_time.ARCHITECTURES)
@pytest.mark.parametrize("kernel", range(len(KERNELS)), ids=KERNELS)
@pytest.mark.parametrize("layer", LAYERS)
def test_compiles(layer: str, kernel: int, capability: int) -> None:
    compiled = ahead_of_time.compile_launch(list(planned(layer))[kernel], capability)
    assert compiled.shared <= 48 << 10  # which every device gives without asking
    assert compiled.spilled in (0, None), f"{compiled.spilled} bytes spilled, {compiled.registers} registers"
