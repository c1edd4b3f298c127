"""What the compiled library asks of the machine it runs on: torch's stable ABI, no CPython, and no instruction that
the processor may lack.

One wheel serves every Python >= 3.10, torch >= 2.11 and x86-64 processor. So `_C` may use no C++ symbol of torch (its
names change between releases; the stable ABI is C functions) and no symbol of CPython. And because each kernel is
compiled for several instruction sets into one library (csrc/common/foreach_isa.h), AVX code may stand only in
functions that are named for their instruction set: in any other, a template of std:: or a shared inline function, the
linker keeps one of several copies, and a machine without AVX-512 would meet the copy compiled for it.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hdrops
from hdrops import _load

ROOT = Path(__file__).resolve().parents[1]
SANITIZED = os.environ.get("HDROPS_SANITIZE") == "1"
LIBRARIES = [path for path in (_load.CPU_LIBRARY, _load.CUDA_LIBRARY) if path is not None]

# C++ names of torch outside what its headers define inline for the stable ABI.
UNSTABLE = re.compile(r"\b(?:at|c10|caffe2|torch(?!::(?:stable|headeronly)))::")
PYTHON = re.compile(r"^_?Py[A-Z_]")
NAMED_FOR = re.compile(r"\bhdrops::(avx2|avx512|avx512_bf16)::")
# One instruction of objdump's listing: its name and its operands.
INSTRUCTION = re.compile(r"^\s+[0-9a-f]+:\s+(?:(?:rep|repz|repnz|lock|bnd|notrack|data16|cs) )*(\w+)(.*)$")
FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")
WIDE = re.compile(r"%zmm|%[xy]mm(?:1[6-9]|2\d|3[01])|%k[0-7]")

needs_binutils = pytest.mark.skipif(
    shutil.which("nm") is None or shutil.which("objdump") is None, reason="needs nm and objdump (binutils)"
)
x86_release_build = pytest.mark.skipif(
    SANITIZED or platform.machine() != "x86_64", reason="for the release build on x86-64"
)


def undefined_symbols(library: Path) -> list[str]:
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", "-C", str(library)], capture_output=True, text=True, check=True
    ).stdout
    return [line.split(maxsplit=1)[1] for line in listing.splitlines()]


def listing(binary: Path) -> Iterator[str]:
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(binary)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield from process.stdout
    assert process.returncode == 0


def misplaced_instructions(lines: Iterator[str]) -> dict[str, str]:
    """The functions that use an instruction set they are not named for, each with the first such instruction."""
    found: dict[str, str] = {}
    name, level = "", 0
    for line in lines:
        if header := FUNCTION.match(line):
            name = header[1]
            levels = [{"avx2": 1}.get(match, 2) for match in NAMED_FOR.findall(name)]
            level = max(levels, default=0)
        elif level < 2 and name not in found and (instruction := INSTRUCTION.match(line)):
            needs = 2 if WIDE.search(instruction[2]) else int(instruction[1].startswith("v"))
            if needs > level:
                found[name] = line.strip()
    return found


def objects() -> list[Path]:
    """The object files of the build in this checkout: what each source gave, before the linker chose among copies."""
    return sorted((ROOT / "build" / "objects").rglob("*.o"))


@needs_binutils
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_library_needs_no_unstable_torch_symbol(library: Path) -> None:
    symbols = undefined_symbols(library)
    assert any(symbol.startswith(("aoti_torch_", "torch_")) for symbol in symbols), "no stable ABI in use: wrong file?"
    assert [symbol for symbol in symbols if UNSTABLE.search(symbol)] == []


@needs_binutils
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_library_needs_no_python_symbol(library: Path) -> None:
    assert [symbol for symbol in undefined_symbols(library) if PYTHON.match(symbol)] == []


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_abi3audit_agrees(library: Path) -> None:
    pytest.importorskip("abi3audit")
    command = [sys.executable, "-m", "abi3audit", "--strict", "--assume-minimum-abi3", "3.10", "--report", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"non_abi3_symbols": []' in done.stdout


@needs_binutils
@x86_release_build
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_library_has_wide_instructions_only_in_functions_named_for_them(library: Path) -> None:
    assert misplaced_instructions(listing(library)) == {}


@needs_binutils
@x86_release_build
def test_objects_have_wide_instructions_only_in_functions_named_for_them() -> None:
    if not objects():
        pytest.skip("no object files: the library was not built in this checkout")
    assert {path.name: found for path in objects() if (found := misplaced_instructions(listing(path)))} == {}


def test_audit_of_instructions_finds_what_it_must() -> None:
    text = """
0000000000000000 <hdrops::avx512::add(float*)>:
   0:\tvaddps %zmm1,%zmm0,%zmm0
0000000000000010 <hdrops::avx2::add(float*)>:
  10:\tvaddps %ymm1,%ymm0,%ymm0
  14:\tvaddps %ymm17,%ymm0,%ymm0
0000000000000020 <void std::fill<float*>(float*, float*)>:
  20:\tmovups %xmm0,(%rdi)
  24:\tvmovups %xmm0,(%rdi)
0000000000000030 <void hdrops::parallel_for<hdrops::avx2::add(float*)::{lambda(long, long)#1}>(long)>:
  30:\tvmovups %ymm0,(%rdi)
0000000000000040 <hdrops::baseline::add(float*)>:
  40:\trep stos %al,%es:(%rdi)
"""
    assert misplaced_instructions(iter(text.splitlines())) == {
        "hdrops::avx2::add(float*)": "14:\tvaddps %ymm17,%ymm0,%ymm0",
        "void std::fill<float*>(float*, float*)": "24:\tvmovups %xmm0,(%rdi)",
    }


def test_audit_of_symbols_finds_what_it_must() -> None:
    assert UNSTABLE.search("at::_ops::add_Tensor::call(at::Tensor const&)")
    assert UNSTABLE.search("typeinfo for c10::Error")
    assert UNSTABLE.search("torch::Library::_def(c10::FunctionSchema&&)")
    assert not UNSTABLE.search("torch::stable::Tensor::sizes() const")
    assert not UNSTABLE.search("std::ostream::flush()")
    assert PYTHON.match("PyErr_SetString") and PYTHON.match("_Py_Dealloc")


@pytest.mark.asan
@needs_binutils
def test_sanitizers_are_in_the_library_exactly_when_asked_for() -> None:
    symbols = undefined_symbols(_load.CPU_LIBRARY)
    assert any(symbol.startswith("__asan_") for symbol in symbols) == SANITIZED
    assert any(symbol.startswith("__ubsan_") for symbol in symbols) == SANITIZED


@pytest.mark.asan
@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_simd_level_follows_the_environment(level: str, tmp_path: Path) -> None:
    if level == "avx2" and _load.simd_level() == "baseline":
        pytest.skip("this processor has no AVX2, or HDROPS_SIMD=baseline")
    environment = {**os.environ, "HDROPS_SIMD": level, "PYTHONPATH": str(Path(hdrops.__file__).parents[1])}
    command = [sys.executable, "-c", "from hdrops import _load; print(_load.simd_level())"]
    # Not from the checkout, whose package the program would find before the one that is tested.
    told = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    # The build for the sanitizers has the widest kernels alone.
    assert told.strip() == ("avx512_bf16" if SANITIZED else level)
