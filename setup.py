"""Builds hdrops' shared libraries on the LibTorch stable ABI: one wheel for Python >= 3.10 and torch >= 2.11.

``hdrops/_C.so`` holds the operator schemas and the CPU kernels. ``hdrops/_C_cuda.so`` holds the CUDA kernels and is
built where the sources (``csrc/**/*.cu``) and a CUDA toolkit are there.

Environment:
    HDROPS_CUDA        auto (default): CUDA library if a toolkit is found; 1: the same, but a missing one is an error; 0: never.
    HDROPS_CUDA_ARCH   architectures, in the form of TORCH_CUDA_ARCH_LIST; default in CUDA_ARCHITECTURES below.
    HDROPS_SANITIZE    1: AddressSanitizer and UndefinedBehaviorSanitizer, for `make test-asan`.
    HDROPS_LOWERED_ISA 1: compile the AVX-512 kernels for AVX2, to test their logic on any x86-64 machine.
    MAX_JOBS           parallel compilations.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
except ImportError as error:
    sys.exit(
        "hdrops: building needs torch >= 2.11 in the same environment. Install torch first and use "
        f"`pip install --no-build-isolation .`, or let pip's isolated build fetch it. ({error})"
    )

ROOT = Path(__file__).parent
CUDA_ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY", "-DPy_LIMITED_API=0x030a0000"]


def switch(name: str, choices: tuple[str, ...]) -> str:
    """The value of an environment switch, the first choice by default."""
    value = os.environ.get(name, choices[0])
    if value not in choices:
        sys.exit(f"hdrops: {name} must be one of {', '.join(choices)}, got {value!r}")
    return value


def sources(suffix: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob(f"*{suffix}"))


def cuda_home() -> tuple[Path | None, str]:
    """The CUDA toolkit's root and where it was found, or None and the reason."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            root = Path(os.environ[name])
            if (root / "bin" / "nvcc").exists():
                return root, name
            return None, f"{name}={root} has no bin/nvcc"
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None, "no nvcc on PATH and CUDA_HOME is not set"
    # nvcc on PATH may be a wrapper; its dry run names the toolkit it belongs to.
    told = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    for line in told.splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.removeprefix("#$ TOP=").strip()).resolve(), f"{nvcc} --dryrun"
    return Path(nvcc).resolve().parent.parent, nvcc


def host_flags() -> list[str]:
    flags = ["-O3", "-std=c++20", "-g0", "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas"]
    flags += ["-ffp-contract=fast", "-fno-math-errno"]
    if switch("HDROPS_SANITIZE", ("0", "1")) == "1":
        flags += ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
    if switch("HDROPS_LOWERED_ISA", ("0", "1")) == "1":
        flags += ["-DHDROPS_LOWERED_ISA"]
    return flags


def extensions() -> list:
    include = [str(ROOT / "csrc")]
    host = host_flags()
    link = ["-fsanitize=address,undefined"] if os.environ.get("HDROPS_SANITIZE") == "1" else ["-s"]
    built = [
        CppExtension(
            "hdrops._C",
            sources(".cpp"),
            include_dirs=include,
            extra_compile_args={"cxx": host + STABLE_ABI},
            extra_link_args=link,
            py_limited_api=True,
        )
    ]
    wanted = switch("HDROPS_CUDA", ("auto", "0", "1"))
    root, reason = (None, "HDROPS_CUDA=0") if wanted == "0" else cuda_home()
    cuda_sources = sources(".cu")
    if root is not None and not cuda_sources:
        root, reason = None, "this version has no CUDA sources"
    if root is None and wanted == "1":
        sys.exit(f"hdrops: HDROPS_CUDA=1 but the CUDA library cannot be built: {reason}")
    architectures = os.environ.get("HDROPS_CUDA_ARCH", os.environ.get("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES))
    if root is not None:
        os.environ["CUDA_HOME"] = str(root)
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
        torch.utils.cpp_extension.CUDA_HOME = str(root)
        built.append(
            CUDAExtension(
                "hdrops._C_cuda",
                cuda_sources,
                include_dirs=include,
                extra_compile_args={"cxx": host + STABLE_ABI, "nvcc": ["-O3", "-std=c++20", "-DUSE_CUDA", *STABLE_ABI]},
                extra_link_args=link,
                py_limited_api=True,
            )
        )
    print("hdrops build configuration")
    print(f"  torch        {torch.__version__} (headers only: the libraries run on every torch >= 2.11)")
    print(f"  host flags   {' '.join(host)}")
    print(f"  CUDA         {f'{root} for {architectures}' if root else f'no CUDA library: {reason}'} (HDROPS_CUDA={wanted})")
    print(f"  jobs         MAX_JOBS={os.environ.get('MAX_JOBS', 'ninja decides')}", flush=True)
    return built


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension.with_options(no_python_abi_suffix=True)},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
