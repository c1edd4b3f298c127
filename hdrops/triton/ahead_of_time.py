"""Compiles every Triton kernel for every architecture, without a GPU: ``python -m hdrops.triton.ahead_of_time``.

The launches are those that :mod:`hdrops.triton.deform_conv2d` would make for a few layers, and
:mod:`hdrops.triton.patch_swap` for a few swaps, planned on tensors without memory; the arguments' types and the sizes
known to the compiler follow Triton's own rules. The table has each kernel's registers and spilled bytes, from the
assembler that Triton brings along, its shared memory, and what it multiplies by.
"""

import functools
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hdrops.testing import DeformConv2dCase
from hdrops.triton import deform_conv2d, patch_swap
from hdrops.triton.launch import Launch

# Compute capability, and shared memory in bytes that a block may have.
ARCHITECTURES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


@dataclass(frozen=True)
class Variant:
    """A kernel as one layer in one dtype launches it."""

    kernel: str
    layer: str
    dtype: torch.dtype
    tf32: bool = False

    @property
    def name(self) -> str:
        """For tables and test names."""
        dtype = str(self.dtype).removeprefix("torch.") + ("_tf32" if self.tf32 else "")
        return f"{self.kernel}-{self.layer}-{dtype}"


@dataclass(frozen=True)
class Compiled:
    """What compiling a variant for an architecture gave; None where the assembler did not tell."""

    shared: int
    registers: int | None
    spilled: int | None
    instructions: tuple[str, ...]
    seconds: float
    ptx: str


LAYERS = {
    # The layer of the benchmarks: 64 channels, channels last.
    "wide": DeformConv2dCase(n=1, channels=64, out_channels=64, size=(256, 256)),
    # More channels and outputs, in offset groups.
    "deep": DeformConv2dCase(n=1, channels=256, out_channels=256, size=(64, 64), offset_groups=8),
    # Few channels, read in NCHW as they lie, in two groups of both kinds.
    "narrow": DeformConv2dCase(n=1, channels=6, out_channels=6, size=(60, 60), groups=2, offset_groups=2, mask=False),
}
_PLANS: dict[str, Callable[[deform_conv2d.Call, Tensor, Tensor | None, Tensor | None, str], Launch]] = {
    "forward": lambda call, output, bias, mask, device: call.plan_forward(bias, output, device),
    "backward_data": lambda call, output, bias, mask, device: call.plan_backward_data(
        output, deform_conv2d.InputSums(call, output, False), call.offset, call.mask, device
    ),
    "backward_data_fixed_point": lambda call, output, bias, mask, device: call.plan_backward_data(
        output, deform_conv2d.InputSums(call, output, True), call.offset, call.mask, device
    ),
    "backward_weight": lambda call, output, bias, mask, device: call.plan_backward_weight(output, device),
}


@dataclass(frozen=True)
class Swap:
    """A call of ``patch_swap`` on two images, whose key and query are ``size`` sites."""

    dtype: torch.dtype
    channels: int = 64
    channels_last: bool = False
    patch_size: int = 3
    scale: int = 1
    border: str = "exclude"
    size: tuple[int, int] = (1000, 1500)


SWAPS = {
    "float32": Swap(torch.float32),
    "bfloat16": Swap(torch.bfloat16, channels_last=True, scale=2, border="zero"),
    "float16": Swap(torch.float16, scale=4),
    "float64": Swap(torch.float64, channels=256, channels_last=True, patch_size=7),
    # More than 2^31 sites.
    "large": Swap(torch.float32, channels=3, patch_size=7, size=(33000, 33000)),
}
SWAP_KERNELS = ("swap", "share", "run", "gradient")


def variants() -> Iterator[Variant]:
    """Every kernel in every arithmetic for the wide layer; those of the other layers that compile to something else."""
    for kernel in ("forward", "backward_data", "backward_weight"):
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            yield Variant(kernel, "wide", dtype)
        yield Variant(kernel, "wide", torch.float32, tf32=True)
        yield Variant(kernel, "deep", torch.float16)
        yield Variant(kernel, "narrow", torch.float32)
    yield Variant("backward_data_fixed_point", "wide", torch.float32)


def plan(variant: Variant, capability: int) -> Launch:
    """The launch of a variant on a GPU of that compute capability."""
    case = LAYERS[variant.layer]
    tensors = {name: tensor.to("meta") for name, tensor in case.tensors(variant.dtype, torch.float32).items()}
    if variant.dtype == torch.float64:
        tensors = {name: tensor.double() for name, tensor in tensors.items()}
    input, offset, weight = (tensors[name] for name in ("input", "offset", "weight"))
    call = deform_conv2d.Call(
        input, offset, weight, tensors.get("mask"), case.stride, case.padding, case.dilation, variant.tf32
    )
    output = torch.empty(case.n, case.out_channels, *case.output_size, dtype=variant.dtype, device="meta")
    if variant.layer != "narrow":
        output = output.contiguous(memory_format=torch.channels_last)
    return _PLANS[variant.kernel](call, output, tensors.get("bias"), tensors.get("mask"), f"sm_{capability}")


def plan_swap(kernel: str, swap: Swap) -> Launch:
    """The launch of one of ``SWAP_KERNELS``; ``share`` is there for the border "exclude" only."""
    size = swap.scale * swap.size[0], swap.scale * swap.size[1]
    image = torch.empty(2, swap.channels, *size, dtype=swap.dtype, device="meta")
    if swap.channels_last:
        image = image.contiguous(memory_format=torch.channels_last)
    index = torch.empty(2, *swap.size, dtype=torch.int64, device="meta")
    plan = patch_swap.Plan(image, index, size, swap.patch_size, swap.scale, swap.border)
    if kernel == "swap":
        return plan.swap(torch.empty_like(image))
    matches, share, runs = plan.sort(), plan.new_share(), plan.new_runs()
    if kernel == "share":
        assert share is not None
        return plan.share(share)
    if kernel == "run":
        assert runs is not None
        return plan.run_sums(matches, share, runs)
    return plan.gradient(matches, share, runs, torch.empty_like(image))


def swap_launches() -> Iterator[tuple[str, str]]:
    """Kernel and name of every launch of ``SWAPS``."""
    for name, swap in SWAPS.items():
        for kernel in SWAP_KERNELS:
            if kernel != "share" or swap.border == "exclude":
                yield kernel, name


@functools.cache
def compile_variant(variant: Variant, capability: int) -> Compiled:
    """Compiles one variant for one architecture."""
    return compile_launch(plan(variant, capability), capability)


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Compiles the kernel of one launch for one architecture."""
    begin = time.perf_counter()
    kernel = triton.compile(_source(launch), target=GPUTarget("cuda", capability, 32), options=launch.options)
    registers, spilled = _resources(kernel.asm["cubin"])
    return Compiled(
        shared=kernel.metadata.shared,
        registers=registers,
        spilled=spilled,
        instructions=tuple(
            sorted(set(re.findall(r"\b(mma\.sync|wgmma|tcgen05\.mma|red\.global|fma)\b", kernel.asm["ptx"])))
        ),
        seconds=time.perf_counter() - begin,
        ptx=kernel.asm["ptx"],
    )


def _source(launch: Launch) -> ASTSource:
    """The kernel with its arguments' types, and the values that the compiler may know, as at a launch."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def describe(path: tuple[int, ...], value: Any, specialize: bool) -> Any:
        if isinstance(value, tuple):
            return type(value)(*(describe((*path, i), item, True) for i, item in enumerate(value)))
        if value is None or (isinstance(value, int) and specialize and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, Tensor) or (specialize and value % 16 == 0):
            attributes[path] = [["tt.divisibility", 16]]
        return _type(value)

    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        else:
            signature[parameter.name] = describe((index,), value, not parameter.do_not_specialize)
    return ASTSource(launch.kernel, signature, constants, attributes)


def _type(value: Tensor | int) -> str:
    """Triton's name for the type of an argument."""
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    names = {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    return "*" + {**names, torch.int32: "i32", torch.int64: "i64"}[value.dtype]


def _resources(cubin: bytes) -> tuple[int | None, int | None]:
    """Registers of a thread and its stack in bytes, by the tool in Triton's package; None where there is none."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", told)
    return (int(usage[1]), int(usage[2])) if usage else (None, None)


def main() -> None:
    """Prints the table."""
    print(f"triton {triton.__version__}")
    print(f"{'kernel':44} {'arch':6} {'regs':>5} {'spill':>6} {'shared':>7} {'s':>5}  instructions")
    for variant in variants():
        for capability in ARCHITECTURES:
            _print(variant.name, capability, compile_variant(variant, capability))
    for kernel, name in swap_launches():
        for capability in ARCHITECTURES:
            compiled = compile_launch(plan_swap(kernel, SWAPS[name]), capability)
            _print(f"patch_swap_{kernel}-{name}", capability, compiled)


def _print(name: str, capability: int, c: Compiled) -> None:
    resources = f"{c.registers!s:>5} {c.spilled!s:>6} {c.shared:7} {c.seconds:5.1f}"
    print(f"{name:44} sm_{capability:<3} {resources} ", *c.instructions, flush=True)


if __name__ == "__main__":
    main()
