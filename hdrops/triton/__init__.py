"""Triton kernels: portable twins of the CUDA library's, for a torch on a GPU that has no compiled ``_C_cuda``.

Importing this package does not import triton; the first call of an operator does. With ``TRITON_INTERPRET=1`` in the
environment before that, Triton interprets the kernels, and they run on CPU tensors too (slowly: for tests).
"""

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")

# The operators' schemas and kernels; lives as long as the process.
_LIBRARY = torch.library.Library("hdrops", "FRAGMENT")


def status() -> str | None:
    """None if Triton is there, else the reason why its kernels cannot run, in one line."""
    return None if INSTALLED else "Triton is not installed (pip install 'hdrops[triton]' installs it)"


def define_twin(name: str, of: str, kernel: Callable[..., Any]) -> None:
    """Defines the operator ``hdrops::<name>`` with the arguments and results of ``hdrops::<of>``.

    The registration is opaque: PyTorch sees one operator, not its launches, so that tracing works under the
    interpreter and on every supported version.
    """
    signature = str(getattr(torch.ops.hdrops, of).default._schema).partition("(")[2]
    _LIBRARY.define(f"{name}({signature}")
    _LIBRARY.impl(name, kernel, "CUDA")
    if INTERPRETED:
        _LIBRARY.impl(name, kernel, "CPU")
