"""Patch swap in Triton: how its kernels (``patch_swap_kernels``) are launched.

``forward`` and ``backward`` are the kernels of the operators ``hdrops::_patch_swap_triton`` and
``hdrops::_patch_swap_triton_backward``. The backward pass first sorts the sites of the query by their match, on the
device: every size is known beforehand, so nothing waits, and a sort that keeps the order of equals makes the gradient
the same bit for bit in every run. :class:`Plan` describes the launches, which ``ahead_of_time`` compiles without making
them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hdrops.ops import _common
from hdrops.triton import patch_swap_kernels as kernels
from hdrops.triton.configs import Config
from hdrops.triton.launch import Launch

# Elements of a tile, by kernel, and warps. A program of the gradient waits for the pixel that the most sites match: its
# tile is small, and one warp finds the longest list without a barrier.
_TILES = {"swap": (1024, 4), "share": (256, 4), "run": (1024, 4), "gradient": (512, 1)}
# The interpreter's time goes by programs and steps, not by elements.
_INTERPRETED_TILE = 8192
# Pixels of a tile at least where these lie side by side in memory, and channels at most where those do.
_LEAST_PIXELS = 32
_MOST_CHANNELS = 64
# Sites of a run. The sums of all runs take patch_size^2 / _RUN of the output gradient's size, in float32.
_RUN = 256
# From so many pixels on they are numbered in 64 bits: the numbers of a tile may go beyond the last pixel.
_LAST_PLACE = 2**31 - 2**16


def forward(source: Tensor, index: Tensor, patch_size: int, scale: int, border: str) -> Tensor:
    """The operator ``hdrops::_patch_swap_triton``; its arguments have been checked."""
    size = source.shape[2], source.shape[3]
    plan = Plan(source, index, size, patch_size, scale, border)
    shape = (*source.shape[:2], scale * index.shape[1], scale * index.shape[2])
    output = torch.empty(shape, dtype=source.dtype, device=source.device, memory_format=_common.memory_format(source))
    if output.numel() > 0:
        with torch.cuda.device_of(source):
            plan.swap(output).run()
    return output


def backward(
    grad_output: Tensor,
    index: Tensor,
    size: Sequence[int],
    patch_size: int,
    scale: int,
    border: str,
    channels_last: bool,
    deterministic: bool,
) -> Tensor:
    """The operator ``hdrops::_patch_swap_triton_backward``; its arguments have been checked. Always deterministic."""
    plan = Plan(grad_output, index, size, patch_size, scale, border)
    shape = (*grad_output.shape[:2], *size)
    format = torch.channels_last if channels_last else torch.contiguous_format
    grad_source = torch.empty(shape, dtype=grad_output.dtype, device=grad_output.device, memory_format=format)
    if grad_source.numel() == 0:
        return grad_source
    if index.numel() == 0:
        return grad_source.zero_()
    with torch.cuda.device_of(grad_output):
        matches = plan.sort()
        share, runs = plan.new_share(), plan.new_runs()
        if share is not None:
            plan.share(share).run()
        if runs is not None:
            plan.run_sums(matches, share, runs).run()
        plan.gradient(matches, share, runs, grad_source).run()
    return grad_source


class Matches(NamedTuple):
    """The query's sites sorted by their match, as ``kernels.gradient_kernel`` has them."""

    keys: Tensor
    sites: Tensor
    first: Tensor


class Plan:
    """The launches of a call that reads ``image`` (the source, or the output's gradient) in its own layout.

    ``size``: the source's height and width.
    """

    def __init__(
        self, image: Tensor, index: Tensor, size: Sequence[int], patch_size: int, scale: int, border: str
    ) -> None:
        self.image = image.contiguous(memory_format=_common.memory_format(image))
        self.index = index.contiguous()
        self.patch_size, self.scale, self.exclude = patch_size, scale, border == "exclude"
        self.real = torch.float64 if image.dtype == torch.float64 else torch.float32
        key = size[0] // scale, size[1] // scale
        self.grids = kernels.Grids(image.shape[1], *key, *index.shape[1:])
        self.key_sites, self.query_sites = key[0] * key[1], index.shape[1] * index.shape[2]
        most = image.shape[0] * max(self.key_sites, self.query_sites) * scale**2
        self.place = torch.int32 if most < _LAST_PLACE else torch.int64
        self._types = {
            "REAL": tl.float64 if self.real == torch.float64 else tl.float32,
            "PLACE": tl.int32 if self.place == torch.int32 else tl.int64,
        }

    def sort(self) -> Matches:
        """Sorts the sites of all images at once; matches outside of the key are clamped to it."""
        n, device = self.index.shape[0], self.index.device
        before = torch.arange(n, device=device)[:, None, None] * self.key_sites
        numbered = (self.index.clamp(0, self.key_sites - 1) + before).to(self.place)
        keys, sites = numbered.flatten().sort(stable=True)
        every = torch.arange(n * self.key_sites + 1, dtype=self.place, device=device)
        return Matches(keys, sites, torch.searchsorted(keys, every, out_int32=self.place == torch.int32))

    def new_share(self) -> Tensor | None:
        """A number for each of the query's sites, where these are not all the same."""
        return torch.empty(self.index.shape, dtype=self.real, device=self.image.device) if self.exclude else None

    def new_runs(self) -> Tensor | None:
        """Sums of the patches of each run; None where the list is too short for one."""
        count = self.index.numel() // _RUN
        shape = count, self.patch_size**2, self.scale**2, self.image.shape[1]
        return torch.empty(shape, dtype=self.real, device=self.image.device) if count > 0 else None

    def swap(self, output: Tensor) -> Launch:
        arguments: dict[str, object] = {
            "source": self.image,
            "index": self.index,
            "output": output,
            "grids": self.grids,
            "source_step": _steps(self.image),
            "output_step": _steps(output),
            "PATCH": self.patch_size,
            "SCALE": self.scale,
            "EXCLUDE": self.exclude,
        }
        config = self._config("swap")
        programs = self._programs(self.query_sites * self.scale**2, config)
        return Launch(kernels.swap_kernel, programs, {**arguments, **self._types, **_tile(config)}, config)

    def share(self, share: Tensor) -> Launch:
        config = self._config("share")
        arguments: dict[str, object] = {
            "index": self.index,
            "share": share,
            "grids": self.grids,
            "PATCH": self.patch_size,
            "BLOCK_P": config.pixels,
        }
        programs = self.index.shape[0] * triton.cdiv(self.query_sites, config.pixels)
        return Launch(kernels.share_kernel, programs, {**arguments, **self._types}, config)

    def run_sums(self, matches: Matches, share: Tensor | None, runs: Tensor) -> Launch:
        config = self._config("run")
        arguments = self._of_list(matches, share, runs, config)
        del arguments["first"]
        programs = runs.shape[0] * triton.cdiv(self.grids.channels, config.channels)
        return Launch(kernels.run_kernel, programs, arguments, config)

    def gradient(self, matches: Matches, share: Tensor | None, runs: Tensor | None, grad_source: Tensor) -> Launch:
        config = self._config("gradient")
        arguments = self._of_list(matches, share, runs, config)
        arguments.update(grad_source=grad_source, source_step=_steps(grad_source))
        programs = self._programs(self.key_sites * self.scale**2, config)
        return Launch(kernels.gradient_kernel, programs, arguments, config)

    def _of_list(
        self, matches: Matches, share: Tensor | None, runs: Tensor | None, config: Config
    ) -> dict[str, object]:
        """What both kernels on the list of sites take."""
        return {
            "grad_output": self.image,
            **matches._asdict(),
            "share": share,
            "runs": runs,
            "grids": self.grids,
            "grad_step": _steps(self.image),
            "PATCH": self.patch_size,
            "SCALE": self.scale,
            "RUN": _RUN,
            **self._types,
            **_tile(config),
        }

    def _programs(self, pixels: int, config: Config) -> int:
        """One for each tile of images of so many pixels."""
        blocks, tiles = triton.cdiv(self.grids.channels, config.channels), triton.cdiv(pixels, config.pixels)
        return self.image.shape[0] * int(blocks * tiles)

    def _config(self, kernel: str) -> Config:
        elements, warps = _TILES[kernel]
        if self.real == torch.float64 or self.place == torch.int64:
            elements //= 2
        if self.image.device.type == "cpu":
            elements = _INTERPRETED_TILE
        if kernel == "share":
            return Config(elements, 1, 1, warps, 1)
        channels = elements // _LEAST_PIXELS
        if kernel != "run" and _common.memory_format(self.image) == torch.channels_last:
            channels = min(_MOST_CHANNELS, elements // 4)
        channels = min(channels, triton.next_power_of_2(self.grids.channels))
        # A run is always added up in the same order.
        pixels = min(_LEAST_PIXELS, _RUN) if kernel == "run" else elements // channels
        return Config(pixels, channels, 1, warps, 1)


def _tile(config: Config) -> dict[str, int]:
    return {"BLOCK_C": config.channels, "BLOCK_P": config.pixels}


def _steps(image: Tensor) -> kernels.Steps:
    """Of an image that lies whole in memory, NCHW or channels last."""
    channels, pixels = image.shape[1], image.shape[2] * image.shape[3]
    if _common.memory_format(image) == torch.channels_last:
        return kernels.Steps(channels * pixels, 1, channels)
    return kernels.Steps(channels * pixels, pixels, 1)
