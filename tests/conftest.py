"""Fixtures shared by all tests, and where the real photographs are."""

import math
import os
import runpy
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

# For this process, the workers of pytest-xdist and the programs that tests start: threads of torch that wait must not
# spin, which takes the core from whom they wait for. OpenMP reads it once, when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from torch import Tensor

pytest.register_assert_rewrite("merge_exposures_cases")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the operators' tests make their tensors: cpu or cuda")


def pytest_configure(config: pytest.Config) -> None:
    # Before the tests are imported: some keep tensors in module variables.
    if config.getoption("--device") != "cpu":
        torch.set_default_device(config.getoption("--device"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On another device than the CPU only the operators' tests run, without those of the CPU kernels' own ways."""
    if config.getoption("--device") == "cpu":
        return
    wanted = [item for item in items if item.get_closest_marker("device") and not item.get_closest_marker("cpu")]
    config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
    items[:] = wanted


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


@pytest.fixture(scope="module")
def one_thread():
    """For files of tiny tensors: threads that wait for tiny work fight over a shared machine."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


@pytest.fixture
def bracket() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Makes brackets of still scenes: photographs [n, 3, 3, h, w], log exposures [3], radiance as the middle one's."""

    def make(gamma: float, height: int = 32, width: int = 32, n: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        coarse = torch.nn.functional.interpolate(torch.randn(n, 3, 4, 4), (height, width), mode="bicubic")
        radiance = (coarse + 0.1 * torch.randn(n, 3, height, width) - 1).exp()
        log_exposures = torch.tensor([-2.0, 0.0, 2.0]) * math.log(2.0) - 3.0
        exposed = radiance[:, None] * torch.tensor([0.25, 1.0, 4.0]).view(1, 3, 1, 1, 1)
        return exposed.clamp(0, 1) ** (1 / gamma), log_exposures, radiance

    return make


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
