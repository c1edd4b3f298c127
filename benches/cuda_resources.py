"""What each CUDA kernel takes of a multiprocessor: `python -m benches.cuda_resources [--write]`.

Reads the built `hdrops/_C_cuda.so` with cuobjdump, for every architecture in it: registers, static shared memory and
stack of a thread, and from the machine code how often the kernel spills registers, uses the matrix units and moves 16
bytes at once. `--write` records it as benches/results/cuda_resources.json, which tests/test_cuda_library.py compares
with what the compiler makes today: a change of a kernel that costs registers shows in the same commit.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from hdrops import _load

TABLE = Path(__file__).parent / "results" / "cuda_resources.json"
ARCHITECTURE = re.compile(r"^(?:arch = |\s+code for )(sm_\w+)$")
FUNCTION = re.compile(r"^\s*Function\s*:?\s*(_\w+)")
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")
# Instructions worth counting: register spills, matrix products, loads, stores and reductions of 16 bytes.
COUNTED = ("spills", "matrix", "load_16_bytes", "store_16_bytes", "reduce_16_bytes")
INSTRUCTION = re.compile(
    r" (?:(?P<spills>STL|LDL)|(?P<matrix>HMMA|HGMMA)|(?P<load_16_bytes>LDG\S*\.128)|(?P<store_16_bytes>STG\S*\.128)"
    r"|(?P<reduce_16_bytes>RED\S*F32x4))\b"
)

Kernels = dict[str, dict[str, int]]


def tool(name: str) -> str:
    """A binary utility of CUDA: the toolkit's, one on PATH, or the one Triton brings."""
    spec = importlib.util.find_spec("triton")
    folders = [Path(os.environ["CUDA_HOME"]) / "bin"] if "CUDA_HOME" in os.environ else []
    folders += [
        Path(place) / "backends" / "nvidia" / "bin" for place in (spec and spec.submodule_search_locations) or []
    ]
    found = shutil.which(name) or next((str(folder / name) for folder in folders if (folder / name).exists()), None)
    if found is None:
        raise FileNotFoundError(f"hdrops: no {name}: it comes with a CUDA toolkit and with triton")
    return found


def listing(library: Path, what: str) -> Iterator[str]:
    # cuobjdump looks for nvdisasm on PATH.
    cuobjdump = tool("cuobjdump")
    environment = {**os.environ, "PATH": os.pathsep.join([str(Path(cuobjdump).parent), os.environ.get("PATH", "")])}
    command = [cuobjdump, what, str(library)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        yield from process.stdout
    if process.returncode != 0:
        raise RuntimeError(f"hdrops: {' '.join(command)} failed with exit code {process.returncode}")


def readable(names: list[str]) -> dict[str, str]:
    """Mangled name -> the name in the sources with its template arguments, without parameters and namespace hdrops."""
    told = subprocess.run(["c++filt", "-p", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    return {
        mangled: re.sub(r"^void ", "", name).replace("hdrops::", "") for mangled, name in zip(names, told, strict=True)
    }


def read(library: Path) -> dict[str, Kernels]:
    """The kernels of each architecture."""
    found: dict[str, Kernels] = {}
    arch = function = ""
    for line in listing(library, "-res-usage"):
        if match := ARCHITECTURE.match(line.rstrip()):
            arch = match[1]
        elif match := FUNCTION.match(line):
            function = match[1]
        elif match := USAGE.search(line):
            registers, stack, shared = map(int, match.groups())
            found.setdefault(arch, {})[function] = {"registers": registers, "stack": stack, "static_shared": shared}
            found[arch][function] |= dict.fromkeys(COUNTED, 0)
    for line in listing(library, "-sass"):
        if match := ARCHITECTURE.match(line.rstrip()):
            arch = match[1]
        elif match := FUNCTION.match(line):
            function = match[1]
        elif match := INSTRUCTION.search(line):
            found[arch][function][match.lastgroup or ""] += 1
    names = readable(sorted({name for kernels in found.values() for name in kernels}))
    return {
        arch: {names[name]: found[arch][name] for name in sorted(found[arch], key=names.__getitem__)}
        for arch in sorted(found, key=lambda name: int(re.sub(r"\D", "", name)))
    }


def toolkit() -> str:
    """The release of the nvcc that builds here."""
    home = os.environ.get("CUDA_HOME")
    nvcc = str(Path(home) / "bin" / "nvcc") if home else shutil.which("nvcc")
    if nvcc is None:
        return "unknown"
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"V(\d+\.\d+\.\d+)", told)
    return release[1] if release else "unknown"


def differences(now: dict[str, Kernels], recorded: dict[str, Kernels]) -> list[str]:
    """Where two tables differ, one line each, for the architectures of the first."""
    lines = []
    for arch, kernels in now.items():
        before = recorded.get(arch, {})
        lines += [f"{arch}: {name} is new" for name in kernels if name not in before]
        lines += [f"{arch}: {name} is gone" for name in before if name not in kernels]
        lines += [
            f"{arch}: {name}: {field} {before[name].get(field)} -> {value}"
            for name, fields in kernels.items()
            if name in before
            for field, value in fields.items()
            if before[name].get(field) != value
        ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benches.cuda_resources", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="record the table in benches/results/cuda_resources.json")
    options = parser.parse_args()
    library = _load.library_path("_C_cuda")
    if library is None:
        sys.exit("hdrops: no CUDA library in this build (HDROPS_CUDA=1 builds it)")
    now = read(library)
    fields = ["registers", "stack", *COUNTED]
    for arch, kernels in now.items():
        print(arch + "  " + ", ".join(fields))
        for name, row in kernels.items():
            print("".join(f"{row[field]:6d}" for field in fields) + f"  {name}")
    if options.write:
        TABLE.write_text(json.dumps({"nvcc": toolkit(), "kernels": now}, indent=1) + "\n")
        print(f"wrote {TABLE.name} in benches/results")
    elif TABLE.exists():
        print("\n".join(differences(now, json.loads(TABLE.read_text())["kernels"])) or "as recorded")


if __name__ == "__main__":
    main()
