"""Fixtures shared by all tests, and where the real photographs are."""

import os
import runpy
from pathlib import Path
from types import ModuleType

import pytest
import torch


def data_dir() -> Path | None:
    """The folder of real test data: ``HDROPS_DATA``, or ``shared/data`` beside the checkout; None where absent."""
    candidates = [os.environ.get("HDROPS_DATA"), Path(__file__).resolve().parents[2] / "shared" / "data"]
    return next((Path(path) for path in candidates if path and Path(path).is_dir()), None)


@pytest.fixture(scope="session")
def data() -> Path:
    """Real brackets, response curves and HDR images; a test that needs them skips where they are absent."""
    found = data_dir()
    if found is None:
        pytest.skip("real test data absent: set HDROPS_DATA to the folder that holds memorial/, stack_room/, crf/ ...")
    return found


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def threads():
    """Restores torch's thread count after a test that changes it."""
    count = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(count)


@pytest.fixture(scope="session")
def emulated_module() -> ModuleType:
    """The CUDA kernels for the host's emulator, built first; a failure to build is a failure of the tests."""
    return runpy.run_path(str(Path(__file__).parent / "emu" / "build.py"))["load"]()


@pytest.fixture
def emulated(emulated_module: ModuleType) -> ModuleType:
    """The same with the emulator's device, schedule and random order as they are by default (docs/emulator.md)."""
    emulated_module.set_device()
    emulated_module.set_schedule("any")
    emulated_module.set_seed(0)
    return emulated_module
