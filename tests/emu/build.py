"""Builds the emulated kernels: every tests/emu/*.cpp into one Python module that needs neither CUDA nor torch.

The module is build/emu/hdrops_emulated*.so, or build/emu-asan/... with the sanitizers where HDROPS_SANITIZE=1. An
object is compiled anew when its source, a header it includes, or the command has changed. Environment: CXX, MAX_JOBS.

By hand: ``python tests/emu/build.py``
"""

import fcntl
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "tests" / "emu"
NAME = "hdrops_emulated"

# Multiplications and additions are fused as nvcc fuses them, and memory may be seen as several types, as on the device.
FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-fno-strict-aliasing"]
WARNINGS = ["-Wall", "-Wno-unknown-pragmas", "-Wno-psabi"]
OPTIMIZED = ["-O2", "-march=native", "-g0"]
SANITIZED = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def sanitized() -> bool:
    return os.environ.get("HDROPS_SANITIZE", "0") == "1"


def build_dir() -> Path:
    return ROOT / "build" / ("emu-asan" if sanitized() else "emu")


def flags() -> list[str]:
    import pybind11

    includes = [SOURCES, ROOT / "csrc"]
    system = [sysconfig.get_path("include"), pybind11.get_include()]
    return [
        *(FLAGS + WARNINGS + (SANITIZED if sanitized() else OPTIMIZED)),
        "-DHDROPS_EMULATED",
        *(f"-I{path}" for path in includes),
        *(f"-isystem{path}" for path in system),
    ]


def run(command: list[str]) -> None:
    # A sanitizer that is preloaded for the tests is not for the compiler.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")


def is_current(target: Path, command: list[str], inputs: list[Path]) -> bool:
    """Whether the target was made by this command and is newer than its inputs."""
    recorded = target.with_name(target.name + ".command")
    if not target.exists() or not recorded.exists() or recorded.read_text() != shlex.join(command):
        return False
    made = target.stat().st_mtime_ns
    return all(path.exists() and path.stat().st_mtime_ns < made for path in inputs)


def make(target: Path, command: list[str]) -> None:
    recorded = target.with_name(target.name + ".command")
    recorded.unlink(missing_ok=True)
    run(command)
    recorded.write_text(shlex.join(command))


def dependencies(depfile: Path) -> list[Path]:
    """The files that the compiler has read, by the rule for make that it wrote."""
    if not depfile.exists():
        return []
    _, _, files = depfile.read_text().replace("\\\n", " ").partition(": ")
    return [Path(name.replace("\\ ", " ")) for name in re.findall(r"(?:\\.|\S)+", files)]


def compile_object(source: Path) -> Path:
    target = build_dir() / f"{source.stem}.o"
    depfile = target.with_suffix(".d")
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    command = [*compiler, *flags(), "-MMD", "-MF", str(depfile), "-c", str(source), "-o", str(target)]
    if not is_current(target, command, [source, *dependencies(depfile)]):
        make(target, command)
    return target


def build() -> Path:
    """Compiles what has changed and returns the module's path."""
    directory = build_dir()
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    with (directory / "lock").open("w") as lock, ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        objects = list(pool.map(compile_object, sorted(SOURCES.glob("*.cpp"))))
        compiler = shlex.split(os.environ.get("CXX", "g++"))
        sanitizers = [flag for flag in flags() if flag.startswith("-fsanitize")]
        command = [*compiler, "-shared", *sanitizers, *map(str, objects), "-o", str(target)]
        if not is_current(target, command, objects):
            make(target, command)
    return target


def load() -> ModuleType:
    """The module, built first if need be."""
    specification = importlib.util.spec_from_file_location(NAME, build())
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


if __name__ == "__main__":
    try:
        print(build())
    except RuntimeError as error:
        sys.exit(str(error))
