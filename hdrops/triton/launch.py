"""One launch of a Triton kernel, described before it is made; and which class of device a tensor is on.

A description can be run, or compiled for another device than the machine has (``hdrops.triton.ahead_of_time``).
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton

from hdrops.triton.configs import Config


@dataclass(frozen=True)
class Launch:
    """A kernel, its number of programs, its arguments by name, and the configuration that holds its tiles."""

    kernel: triton.JITFunction
    programs: int
    arguments: dict[str, Any]
    config: Config

    @property
    def options(self) -> dict[str, Any]:
        """How the compiler is to build the kernel."""
        return {"num_warps": self.config.warps, "num_stages": self.config.stages, "enable_fp_fusion": True}

    def run(self) -> None:
        """Launches on the current stream of the current device."""
        if self.programs > 0:
            self.kernel[(self.programs,)](**self.arguments, **self.options)


def device_class(device: torch.device) -> str:
    """The row of the configuration tables for a device: "sm_90", "hip", ... or "interpreter" for the CPU.

    Raises:
        NotImplementedError: a GPU that Triton does not compile for.
    """
    if device.type != "cuda":
        return "interpreter"
    return _cuda_class(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _cuda_class(index: int) -> str:
    if torch.version.hip is not None:
        return "hip"
    capability = torch.cuda.get_device_capability(index)
    if capability < (7, 5):
        raise NotImplementedError(
            "hdrops: the triton backend needs a GPU of compute capability 7.5 or newer, "
            f"{torch.cuda.get_device_name(index)} has {capability[0]}.{capability[1]}; pass backend='reference'"
        )
    return "sm_75" if capability[0] == 7 else f"sm_{capability[0]}0"
