"""Loads the shared libraries of hdrops: ``_C`` (schemas and CPU kernels) and, for a CUDA torch, ``_C_cuda``.

A failure to load ``_C`` surfaces at ``import hdrops``. A failure to load ``_C_cuda`` is kept and raised, chained, by
the first call on a CUDA tensor (``_backends.choose``), and shown by ``hdrops info``: a package that works on the CPU
must not die of a broken driver, and a broken CUDA library must not pass for a slow one.
"""

from pathlib import Path

import torch

_HERE = Path(__file__).parent


def library_path(stem: str) -> Path | None:
    """The built library of that name, or None."""
    found = [path for path in sorted(_HERE.glob(f"{stem}*")) if path.suffix in (".so", ".pyd", ".dylib")]
    found = [path for path in found if path.name.split(".")[0] == stem]
    return found[0] if found else None


def loader_words(error: BaseException) -> str:
    """Why a library does not load: torch's own error names the file only, and chains the loader's."""
    return str(error.__cause__ or error)


def _load_cpu() -> Path:
    path = library_path("_C")
    if path is None:
        raise ImportError(
            f"hdrops: its compiled library _C is not in {_HERE}. If this is a source checkout, build it: "
            "`pip install --no-build-isolation -e .`"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"hdrops: {path.name} does not load with torch {torch.__version__}; hdrops needs torch >= 2.11 "
            f"({loader_words(error)})"
        ) from error
    return path


def _load_cuda() -> tuple[Path | None, Exception | None]:
    path = library_path("_C_cuda")
    if path is None or torch.version.cuda is None:
        return None, None
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return path, error
    return path, None


CPU_LIBRARY = _load_cpu()
CUDA_LIBRARY, CUDA_ERROR = _load_cuda()


def cuda_status() -> str | None:
    """None if the CUDA kernels can run in this process, else the reason why not, in one line."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if CUDA_LIBRARY is None:
        return "hdrops was built without its CUDA library (HDROPS_CUDA=1 pip install --no-build-isolation . builds it)"
    if CUDA_ERROR is not None:
        return (
            f"{CUDA_LIBRARY.name} failed to load: {loader_words(CUDA_ERROR)} (HDROPS_CUDA=1 pip install "
            f"--no-build-isolation . builds one for this torch's CUDA {torch.version.cuda})"
        )
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return None


OLDEST_GPU = (7, 5)


def gpu_status(device: torch.device) -> str | None:
    """None if the CUDA kernels run on GPUs like ``device``, else the reason why not, in one line."""
    capability = torch.cuda.get_device_capability(device)
    if capability >= OLDEST_GPU:
        return None
    return (
        f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}, and the CUDA "
        f"kernels need {OLDEST_GPU[0]}.{OLDEST_GPU[1]} or later (pass backend='reference')"
    )


# The instruction sets of the CPU kernels (csrc/common/isa.h), each with all of those before it.
SIMD_LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")


def simd_level() -> str:
    """The instruction set of the CPU kernels in this process (``HDROPS_SIMD`` asks for a lower one)."""
    return SIMD_LEVELS[torch.ops.hdrops._simd_level()]
