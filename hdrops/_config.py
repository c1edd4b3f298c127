"""What hdrops runs on: ``hdrops.show_config()`` and ``hdrops info``."""

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from hdrops import _backends, _load

# Package, and what the command uses it for.
_OPTIONAL = {
    "opencv-python-headless": "PNG, TIFF, Radiance HDR; alignment",
    "Pillow": "JPEG, EXIF, previews",
    "OpenEXR": "OpenEXR",
    "tifffile": "writing TIFF",
    "matplotlib": "--plot",
    "tqdm": "progress bars",
    "rawpy": "raw camera files",
}


def config() -> str:
    """Versions, libraries, instruction set, threads, huge pages, CUDA and optional packages, as lines of text."""
    from hdrops import __version__

    reason = _load.cuda_status()
    lines = {
        "hdrops": f"{__version__} in {Path(__file__).parent}",
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        "python": f"{platform.python_version()} on {platform.platform()}",
        "_C": f"loaded, {_load.CPU_LIBRARY.name}",
        "_C_cuda": "not there"
        if _load.CUDA_LIBRARY is None
        else f"{_load.CUDA_LIBRARY.name}"
        + (f", failed to load: {_load.loader_words(_load.CUDA_ERROR)}" if _load.CUDA_ERROR else ", loaded"),
        "CUDA": f"no: {reason}"
        if reason
        else ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())),
        "CPU": _processor(),
        "SIMD": f"{_load.simd_level()} (HDROPS_SIMD={os.environ.get('HDROPS_SIMD', 'not set')})",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "huge pages": _huge_pages(),
        "backend": _backends._REQUESTED or "best for each call (HDROPS_BACKEND not set)",
    }
    text = [f"{name:11} {value}" for name, value in lines.items()]
    text += ["", "optional packages (pip install 'hdrops[photo,raw]')"]
    text += [f"  {name:24} {_version(name):12} {purpose}" for name, purpose in _OPTIONAL.items()]
    return "\n".join(text)


def show_config() -> None:
    """Prints :func:`config`: put it into a bug report."""
    print(config())


def _version(package: str) -> str:
    names = (package, "opencv-python", "opencv-contrib-python") if package.startswith("opencv") else (package,)
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not there"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _huge_pages() -> str:
    """The setting in brackets decides: hdrops asks for them (madvise) for large results."""
    try:
        setting = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return "unknown to this system"
    return setting[setting.index("[") + 1 : setting.index("]")]
