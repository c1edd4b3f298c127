"""Builds hdrops' shared libraries on the LibTorch stable ABI: one wheel for Python >= 3.10 and torch >= 2.11.

``hdrops/_C.so`` holds the operator schemas and the CPU kernels. ``hdrops/_C_cuda.so`` holds the CUDA kernels and is
built where there are CUDA sources (``csrc/**/*.cu``), a CUDA toolkit, and a torch for the same major CUDA version.
Object files stay in ``build/objects``, whichever command builds (pip, editable, wheel): the next build compiles only
what changed.

Environment:
    HDROPS_CUDA        auto (default): build the CUDA library if possible; 1: fail if it is not; 0: never build it;
                       only: like 1, and leave the CPU library alone (for work on kernels).
    HDROPS_CUDA_ARCH   architectures, in the form of TORCH_CUDA_ARCH_LIST (which serves as well); default: all of
                       CUDA_ARCHITECTURES below that the toolkit knows.
    HDROPS_SANITIZE    1: AddressSanitizer and UndefinedBehaviorSanitizer, for `make test-asan`.
    HDROPS_LOWERED_ISA 1: compile the AVX-512 kernels for AVX2, to test their logic on any x86-64 machine.
                       only: and no others; then HDROPS_SIMD chooses nothing.
    MAX_JOBS           parallel compilations.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    sys.exit(
        "hdrops: building needs torch >= 2.11 in the same environment. Install torch first and use "
        f"`pip install --no-build-isolation .`, or let pip's isolated build fetch it. ({error})"
    )

ROOT = Path(__file__).parent
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]
# Each with the first toolkit that knows it.
CUDA_ARCHITECTURES = {
    "7.5": (10, 0),
    "8.0": (11, 0),
    "8.6": (11, 1),
    "8.9": (11, 8),
    "9.0": (11, 8),
    "10.0": (12, 8),
    "12.0": (12, 8),
}


def switch(name: str, choices: tuple[str, ...]) -> str:
    """The value of an environment switch, the first choice by default."""
    value = os.environ.get(name, choices[0])
    if value not in choices:
        sys.exit(f"hdrops: {name} must be one of {', '.join(choices)}, got {value!r}")
    return value


def sources(suffix: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob(f"*{suffix}"))


def cuda_home() -> Path | str:
    """The CUDA toolkit's root, or the reason why there is none."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            root = Path(os.environ[name])
            return root if (root / "bin" / "nvcc").exists() else f"{name}={root} has no bin/nvcc"
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        packaged = packaged_toolkit()
        return packaged or "no nvcc on PATH nor from PyPI (nvidia-cuda-nvcc), and CUDA_HOME is not set"
    # nvcc on PATH may be a wrapper; its dry run names the toolkit it belongs to.
    told = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", told, re.MULTILINE)
    root = Path(top[1].strip()) if top else Path(nvcc).resolve().parent.parent
    return root.resolve() if (root / "bin" / "nvcc").exists() else f"{nvcc} does not tell its toolkit; set CUDA_HOME"


def packaged_toolkit() -> Path | None:
    """The toolkit that the nvidia-cuda-* packages of PyPI make up in this environment."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in spec.submodule_search_locations or []] if spec else []
    return next((nvcc.parents[1] for folder in folders for nvcc in sorted(folder.glob("cu*/bin/nvcc"))), None)


def cuda_runtime_folder(root: Path) -> Path:
    """Where the linker finds libcudart.so; PyPI's toolkit has it under its versioned name only, and gets a link."""
    for folder in (root / "lib64", root / "lib"):
        if (folder / "libcudart.so").exists():
            return folder
    link = ROOT / "build" / "cudart" / "libcudart.so"
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(next((root / "lib").glob("libcudart.so.*")))
    return link.parent


def cuda_version(root: Path) -> tuple[int, int] | None:
    told = subprocess.run([root / "bin" / "nvcc", "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", told)
    return (int(release[1]), int(release[2])) if release else None


def cuda_toolkit() -> tuple[Path, tuple[int, int]] | str:
    """The toolkit that the CUDA library is built with and its version, or the reason why it cannot be built."""
    if not sources(".cu"):
        return "this version has no CUDA sources"
    root = cuda_home()
    if isinstance(root, str):
        return root
    version = cuda_version(root)
    if version is None:
        return f"{root}/bin/nvcc does not run"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if version[0] != int(torch.version.cuda.split(".")[0]):
        return f"{root} is CUDA {version[0]}.{version[1]}, torch {torch.__version__} is built for {torch.version.cuda}"
    return root, version


def cuda_architectures(version: tuple[int, int]) -> str:
    named = os.environ.get("HDROPS_CUDA_ARCH") or os.environ.get("TORCH_CUDA_ARCH_LIST")
    return named or ";".join(arch for arch, since in CUDA_ARCHITECTURES.items() if version >= since) + "+PTX"


def host_flags() -> list[str]:
    flags = ["-O3", "-std=c++20", "-g0", "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas"]
    flags += ["-ffp-contract=fast", "-fno-math-errno"]
    if SANITIZE:
        flags += ["-O1", "-g1", "-fno-wrapv", "-fno-omit-frame-pointer", *SANITIZERS, "-fno-sanitize-recover=undefined"]
    lowered = switch("HDROPS_LOWERED_ISA", ("0", "1", "only"))
    if lowered != "0":
        flags += ["-DHDROPS_LOWERED_ISA"]
    if lowered == "only":
        flags += ["-DHDROPS_LOWERED_ISA_ONLY"]
    return flags


def extensions() -> list:
    wanted = switch("HDROPS_CUDA", ("auto", "0", "1", "only"))
    toolkit = "HDROPS_CUDA=0" if wanted == "0" else cuda_toolkit()
    if wanted in ("1", "only") and isinstance(toolkit, str):
        sys.exit(f"hdrops: HDROPS_CUDA={wanted} but the CUDA library cannot be built: {toolkit}")
    host = host_flags()
    common = {
        "include_dirs": [str(ROOT / "csrc")],
        "extra_link_args": SANITIZERS if SANITIZE else [],
        "py_limited_api": True,
    }
    flags = {"cxx": host + STABLE_ABI}
    built = []
    if wanted != "only":
        built.append(cpp_extension.CppExtension("hdrops._C", sources(".cpp"), extra_compile_args=flags, **common))
    cuda = f"no CUDA library: {toolkit}"
    if not isinstance(toolkit, str):
        root, version = toolkit
        architectures = cuda_architectures(version)
        cuda = f"{version[0]}.{version[1]} in {root}, for {architectures}"
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
        # torch guesses its CUDA_HOME at import, wrongly where nvcc on PATH is a wrapper.
        os.environ["CUDA_HOME"] = cpp_extension.CUDA_HOME = str(root)
        flags = {**flags, "nvcc": ["-O3", "-std=c++20", "-Xcompiler=-fvisibility=hidden", "-DUSE_CUDA", *STABLE_ABI]}
        common["library_dirs"] = [str(cuda_runtime_folder(root))]
        built.append(cpp_extension.CUDAExtension("hdrops._C_cuda", sources(".cu"), extra_compile_args=flags, **common))
    print("hdrops build configuration")
    print(f"  torch        {torch.__version__} (headers only: the libraries run on every torch >= 2.11)")
    print(f"  host flags   {' '.join(host)}")
    print(f"  CUDA         {cuda} (HDROPS_CUDA={wanted})")
    print(f"  jobs         MAX_JOBS={os.environ.get('MAX_JOBS', 'ninja decides')}", flush=True)
    return built


SANITIZE = switch("HDROPS_SANITIZE", ("0", "1")) == "1"
SANITIZERS = ["-fsanitize=address,undefined"]

setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": cpp_extension.BuildExtension.with_options(no_python_abi_suffix=True)},
    options={
        "build_ext": {"build_temp": "build/objects-asan" if SANITIZE else "build/objects"},
        "bdist_wheel": {"py_limited_api": "cp310"},
    },
)
