"""Every Triton kernel compiles for every architecture, within its shared memory and registers. Needs no GPU."""

import re

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from hdrops import triton
from hdrops.triton import ahead_of_time

if triton.INTERPRETED:
    pytest.skip("the interpreter does not compile", allow_module_level=True)

# What multiplies 16-bit factors on each architecture; float32 multiplies by TF32 there only if allowed.
MATRIX_UNITS = {80: "mma.sync", 90: "wgmma.mma_async|mma.sync", 100: "tcgen05.mma|mma.sync", 120: "mma.sync"}


@pytest.mark.parametrize("capability", ahead_of_time.ARCHITECTURES)
@pytest.mark.parametrize("variant", list(ahead_of_time.variants()), ids=lambda variant: variant.name)
def test_compiles(variant: ahead_of_time.Variant, capability: int) -> None:
    compiled = ahead_of_time.compile_variant(variant, capability)
    assert compiled.shared <= ahead_of_time.ARCHITECTURES[capability]
    assert compiled.shared <= 64 << 10  # so that devices without a row of their own can launch it
    assert compiled.spilled in (0, None), f"{compiled.spilled} bytes spilled, {compiled.registers} registers"
    products = re.findall(rf"(?:{MATRIX_UNITS[capability]})\S*", compiled.ptx)
    if variant.dtype in (torch.float16, torch.bfloat16):
        assert products
        if capability in (80, 120):
            kind = "bf16" if variant.dtype == torch.bfloat16 else "f16"
            assert all(f".f32.{kind}.{kind}.f32" in product for product in products)
    if variant.dtype == torch.float32:
        assert bool(products) == variant.tf32
        assert ("tf32" in compiled.ptx) == variant.tf32


@pytest.mark.parametrize("capability", [90, 100, 120])
def test_input_gradients_are_added_four_at_a_time(capability: int) -> None:
    compiled = ahead_of_time.compile_variant(ahead_of_time.Variant("backward_data", "wide", torch.float16), capability)
    additions = re.findall(r"\bred\.global\S*", compiled.ptx)
    assert len(additions) >= 4
    assert all(".v4.f32" in addition for addition in additions)


def test_corners_are_read_sixteen_bytes_at_a_time() -> None:
    compiled = ahead_of_time.compile_variant(ahead_of_time.Variant("forward", "wide", torch.bfloat16), 90)
    assert len(re.findall(r"cp\.async\.\w+\.shared\.global \[[^]]+\], \[[^]]+\], 0x10", compiled.ptx)) >= 16
