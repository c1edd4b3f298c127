"""What a call on a GPU is refused with, and what to do about it: shown without a GPU, by what the choice of a backend
asks (`_load`, `torch.cuda`). Mixed devices and wrong dtypes of single operators are in their own tests."""

from pathlib import Path

import pytest
import torch

import hdrops
from hdrops import _backends, _load
from hdrops.ops import crf, deform_conv2d, merge_exposures, truncate

OPERATORS = {
    "deform_conv2d": deform_conv2d._CAN_RUN,
    "crf_lookup": crf._CAN_RUN,
    "merge_exposures": merge_exposures._CAN_RUN,
    "truncate": truncate._CAN_RUN,
}
LOADER_SAYS = "(?:file too short|invalid ELF header)"  # of a file that is no library
every_operator = pytest.mark.parametrize("op", OPERATORS)


class OnCuda:
    """A tensor on a GPU, as far as the choice of a backend looks."""

    device = torch.device("cuda", 0)


@pytest.fixture
def cuda_torch(monkeypatch) -> None:
    """A torch with CUDA that finds a Hopper GPU, and an hdrops whose CUDA library has loaded."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(_load, "CUDA_LIBRARY", Path("_C_cuda.so"))
    monkeypatch.setattr(_load, "CUDA_ERROR", None)


@pytest.fixture
def broken_library(cuda_torch, monkeypatch, tmp_path) -> OSError:
    """The same with a CUDA library that the loader refuses: its error."""
    path = tmp_path / "_C_cuda.so"
    path.write_text("no shared library")
    monkeypatch.setattr(_load, "library_path", lambda stem: path)
    library, error = _load._load_cuda()
    assert library == path
    assert isinstance(error, OSError)
    monkeypatch.setattr(_load, "CUDA_LIBRARY", library)
    monkeypatch.setattr(_load, "CUDA_ERROR", error)
    return error


def choose(op: str, backend: str | None = None) -> str:
    return _backends.choose(op, OnCuda, backend, OPERATORS[op])


@every_operator
def test_cuda_kernels_are_preferred(op, cuda_torch):
    assert choose(op) == choose(op, "cuda") == "cuda"


@every_operator
def test_a_library_that_does_not_load_is_an_error(op, broken_library):
    """Not a slow operator: plain PyTorch runs only if asked for."""
    with pytest.raises(
        RuntimeError,
        match=rf"^{op}: the tensors are on cuda:0, but _C_cuda\.so failed to load: .*_C_cuda\.so: {LOADER_SAYS} "
        r"\(HDROPS_CUDA=1 pip install --no-build-isolation \. builds one for this torch's CUDA 13\.0\)\. "
        r"Repair it, or pass backend='reference'\.$",
    ) as caught:
        choose(op)
    assert caught.value.__cause__ is broken_library
    assert choose(op, "reference") == "reference"
    with pytest.raises(
        NotImplementedError,
        match=rf"^{op}: backend cuda cannot run this call: _C_cuda\.so failed to load: .*: {LOADER_SAYS} \(HDROPS_CUDA",
    ):
        choose(op, "cuda")


def test_a_library_that_does_not_load_is_shown(broken_library):
    line = next(line for line in hdrops._config.config().splitlines() if "_C_cuda" in line)
    assert f"failed to load: {broken_library.__cause__}" in line


@every_operator
def test_a_gpu_that_is_too_old_is_refused(op, cuda_torch, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    with pytest.raises(
        NotImplementedError,
        match=rf"^{op}: backend cuda cannot run this call: Tesla V100 has compute capability 7\.0, and the CUDA "
        r"kernels need 7\.5 or later \(pass backend='reference'\)$",
    ):
        choose(op, "cuda")
    assert choose(op) != "cuda"


@every_operator
def test_a_build_without_cuda_says_how_to_build_it(op, cuda_torch, monkeypatch):
    monkeypatch.setattr(_load, "CUDA_LIBRARY", None)
    with pytest.raises(
        NotImplementedError,
        match=r"built without its CUDA library \(HDROPS_CUDA=1 pip install --no-build-isolation \. builds it\)$",
    ):
        choose(op, "cuda")
    assert choose(op) != "cuda"


@every_operator
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ((torch.version, "cuda", None), "is built without CUDA"),
        ((torch.cuda, "is_available", bool), "finds no CUDA device"),
    ],
)
def test_a_torch_that_has_no_gpu_says_so(op, change, reason, cuda_torch, monkeypatch):
    monkeypatch.setattr(*change)
    with pytest.raises(NotImplementedError, match=rf"^{op}: backend cuda cannot run this call: .*{reason}$"):
        choose(op, "cuda")


def test_tensors_of_the_cpu_are_refused():
    for call in (hdrops.truncate, hdrops.quantize_ste, hdrops.tent_histogram):
        with pytest.raises(NotImplementedError, match="backend cuda cannot run this call: the tensors are on cpu"):
            call(torch.rand(1, 1, 8, 8), backend="cuda")


def test_the_compiled_operators_guard_themselves():
    """A direct call of torch.ops.hdrops, past the checks in Python. The bindings are the same for CPU and CUDA."""
    image = torch.zeros(1, 1, 8, 8)
    ops = torch.ops.hdrops
    floating = r"dtype must be float32, float64, bfloat16 or float16, got scalar type 3"
    for call in (
        lambda: ops.truncate(image.int(), 2, 0.01),
        lambda: ops.quantize_ste(image.int(), 256, False),
        lambda: ops.tent_histogram(image.int(), [4]),
        lambda: ops.value_histogram(image.int(), 4),
    ):
        with pytest.raises(ValueError, match=floating):
            call()
    for wrong in (image.double(), image[..., :7]):
        with pytest.raises(ValueError, match="truncate: grad_output must have the shape and dtype of input"):
            ops._truncate_backward(wrong, image, 2, 0.01)
    with pytest.raises(ValueError, match="truncate: radius must be at least 1 and below height and width, got 8"):
        ops.truncate(image, 8, 0.01)
